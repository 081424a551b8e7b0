//! `vz check`: everything that decides whether containers can run on this host, each with what to do about it.

use std::{io, process::ExitCode};

use serde::Serialize;
use vz_config::Config;
use vz_linux::{Bundle, EnsureError};
use vz_machine::{
    control::{MachineChoice, MachineKind},
    select::{Selection, select_by},
    verdict::{Host, Source, Verdict},
};
pub(crate) use vz_sys::error::chain;

use crate::{
    print,
    table::{Style, colours, columns, paint},
};

mod containerd;
mod host;

/// Version of the JSON form: raised when something in it goes away or changes its meaning.
const SCHEMA: u32 = 1;

/// What a finding means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// As it should be.
    Ok,
    /// A fact, neither good nor bad.
    Info,
    /// Containers can run; something is worth a look.
    Warning,
    /// Containers cannot run.
    Failed,
}

/// One finding.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What was looked at; the name never changes.
    name: &'static str,
    /// What it means.
    status: Status,
    /// What was found, for people.
    found: String,
    /// What to do, where there is something to do.
    advice: Option<String>,
}

impl Check {
    fn new(name: &'static str, status: Status, found: impl Into<String>) -> Self {
        Self { name, status, found: found.into(), advice: None }
    }

    fn advise(self, advice: impl Into<String>) -> Self {
        Self { advice: Some(advice.into()), ..self }
    }
}

/// All findings.
#[derive(Debug, Serialize)]
struct Report {
    schema: u32,
    /// Whether containers can run.
    ready: bool,
    machine: Machine,
    kvm: Kvm,
    checks: Vec<Check>,
}

/// Which machine containers get.
#[derive(Debug, Serialize)]
struct Machine {
    configured: MachineChoice,
    /// None where there is none.
    chosen: Option<MachineKind>,
    reason: String,
}

/// What is known of KVM.
#[derive(Debug, Serialize)]
struct Kvm {
    usable: bool,
    /// How that is known: `device`, `probe`, `memory`.
    source: Source,
    /// Nanoseconds of CPU time for an iteration of a loop in a guest, where it was measured.
    loop_ns: Option<f64>,
    /// The finding for programs, with `kind` and what belongs to that; none where it is usable.
    finding: Option<vz_machine::select::Unusable>,
}

/// Looks at everything and prints it.
pub fn run(probe: bool, json: bool) -> io::Result<ExitCode> {
    let report = look(probe);
    let text = if json {
        let mut text = serde_json::to_string_pretty(&report)?;
        text.push('\n');
        text
    } else {
        show(&report, colours())
    };
    print(text.as_bytes())?;
    Ok(if report.ready { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn look(probe: bool) -> Report {
    let mut checks = vec![host::user(), host::kernel()];
    let config = match Config::load(None) {
        Ok(config) => {
            checks.push(Check::new("configuration", Status::Ok, "valid"));
            config
        }
        Err(e) => {
            let advice = "correct the file; what follows is checked with the defaults";
            checks.push(Check::new("configuration", Status::Failed, chain(&e)).advise(advice));
            Config::default()
        }
    };
    let host = Host::this();
    let verdict = if probe { host.probe() } else { host.kvm() };
    let (machine, problem) = choose(&config, &verdict);
    checks.push(kvm(&verdict, machine.configured));
    checks.push(host::qemu(&config, machine.chosen == Some(MachineKind::Qemu)));
    checks.push(problem.unwrap_or_else(|| {
        let kind = machine.chosen.map_or("none", MachineKind::name);
        Check::new("machine", Status::Ok, format!("{kind}: {}", machine.reason))
    }));
    checks.push(bundle(&config));
    checks.extend(containerd::checks());
    checks.extend([host::cgroup(), host::overlayfs(), host::tun(), host::vhost(), host::user_namespaces()]);
    let ready = checks.iter().all(|check| check.status != Status::Failed);
    Report { schema: SCHEMA, ready, machine, kvm: summary(verdict), checks }
}

fn choose(config: &Config, verdict: &Verdict) -> (Machine, Option<Check>) {
    let configured = config.machine;
    match select_by(configured, || verdict.kvm.clone()) {
        Ok(Selection { kind, reason }) => {
            (Machine { configured, chosen: Some(kind), reason: reason.to_string() }, None)
        }
        Err(refused) => {
            let reason = refused.to_string();
            let check = Check::new("machine", Status::Failed, reason.clone());
            (Machine { configured, chosen: None, reason }, Some(check))
        }
    }
}

fn kvm(verdict: &Verdict, configured: MachineChoice) -> Check {
    let known = match verdict.source {
        Source::Device => "",
        Source::Probe => ", as a probe has just found",
        Source::Memory => ", as a probe found earlier",
    };
    match &verdict.kvm {
        Ok(speed) => {
            let found = format!("usable{known}: {:.1} ns for an iteration of a loop", nanoseconds(speed.loop_ps));
            Check::new("kvm", Status::Ok, found)
        }
        Err(why) => {
            // The machine's own finding says that it is needed.
            let status = if configured == MachineChoice::Qemu { Status::Info } else { Status::Warning };
            Check::new("kvm", status, format!("not usable{known}: {why}")).advise(why.advice())
        }
    }
}

fn summary(verdict: Verdict) -> Kvm {
    let (usable, loop_ns, finding) = match verdict.kvm {
        Ok(speed) => (true, Some(nanoseconds(speed.loop_ps)), None),
        Err(why) => (false, None, Some(why)),
    };
    Kvm { usable, source: verdict.source, loop_ns, finding }
}

fn bundle(config: &Config) -> Check {
    let profile = config.linux_profile;
    let dir = match vz_linux::locate(config.guest_bundle(), profile) {
        Ok(dir) => dir,
        Err(EnsureError::NotFound { .. }) if vz_linux::embedded(profile).is_some() => {
            let found = format!("in the program; the first start installs it in {}", vz_linux::STATE);
            return Check::new("guest bundle", Status::Ok, found);
        }
        Err(e) => return Check::new("guest bundle", Status::Failed, chain(&e)),
    };
    match Bundle::open(&dir) {
        Ok(bundle) => {
            let version = bundle.version;
            let found = format!(
                "verified: {}, profile {}, kernel {}, agent {}",
                dir.display(),
                version.profile,
                version.kernel_version,
                version.agent_version
            );
            Check::new("guest bundle", Status::Ok, found)
        }
        Err(e) => Check::new("guest bundle", Status::Failed, chain(&e)),
    }
}

fn show(report: &Report, colours: bool) -> String {
    let mut rows = Vec::new();
    for check in &report.checks {
        let (word, style) = match check.status {
            Status::Ok => ("ok", Style::Good),
            Status::Info => ("-", Style::Dim),
            Status::Warning => ("note", Style::Notable),
            Status::Failed => ("FAILED", Style::Bad),
        };
        let cell = |text: &str, style| (text.to_owned(), style);
        rows.push(vec![cell(check.name, Style::Plain), cell(word, style), cell(&check.found, Style::Plain)]);
        if let Some(advice) = &check.advice {
            rows.push(vec![cell("", Style::Plain), cell("", Style::Plain), cell(&format!("-> {advice}"), Style::Dim)]);
        }
    }
    let machine = report.machine.chosen.map_or("none", MachineKind::name);
    let last = if report.ready {
        paint(&format!("Containers can run, on the machine {machine}."), Style::Good, colours)
    } else {
        let failed: Vec<&str> =
            report.checks.iter().filter(|check| check.status == Status::Failed).map(|check| check.name).collect();
        paint(&format!("Containers cannot run: {}.", failed.join(", ")), Style::Bad, colours)
    };
    format!("{}\n{last}\n", columns(&rows, colours))
}

#[allow(clippy::cast_precision_loss)]
fn nanoseconds(ps: u64) -> f64 {
    ps as f64 / 1000.0
}

#[cfg(test)]
mod tests {
    use vz_machine::select::{Speed, Unusable};

    use super::*;

    fn verdict(kvm: Result<Speed, Unusable>) -> Verdict {
        Verdict { kvm, source: Source::Memory }
    }

    fn config(machine: vz_config::Machine) -> Config {
        Config { machine, ..Config::default() }
    }

    #[test]
    fn an_unusable_kvm_matters_where_it_is_wanted() {
        let verdict = verdict(Err(Unusable::Permission));
        let (machine, problem) = choose(&config(vz_config::Machine::Auto), &verdict);
        assert_eq!((machine.chosen, problem), (Some(MachineKind::Qemu), None));
        assert!(machine.reason.contains("may not be opened"), "{}", machine.reason);
        let (machine, problem) = choose(&config(vz_config::Machine::Kvm), &verdict);
        assert_eq!((machine.chosen, problem.unwrap().status), (None, Status::Failed));
        let (machine, problem) = choose(&config(vz_config::Machine::Qemu), &verdict);
        assert_eq!((machine.chosen, problem), (Some(MachineKind::Qemu), None));
        assert_eq!(kvm(&verdict, MachineChoice::Auto).status, Status::Warning);
        assert_eq!(kvm(&verdict, MachineChoice::Qemu).status, Status::Info);
    }

    #[test]
    fn what_is_shown_has_advice_below_and_the_sum_at_the_end() {
        let (machine, _) = choose(&config(vz_config::Machine::Auto), &verdict(Err(Unusable::Missing)));
        let checks = vec![
            Check::new("kvm", Status::Warning, "none").advise("get one"),
            Check::new("guest bundle", Status::Failed, "missing"),
        ];
        let report =
            Report { schema: SCHEMA, ready: false, machine, kvm: summary(verdict(Err(Unusable::Missing))), checks };
        assert_eq!(
            show(&report, false),
            "kvm           note    none\n                      -> get one\nguest bundle  FAILED  missing\n\n\
             Containers cannot run: guest bundle.\n"
        );
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["kvm"]["finding"]["kind"], "missing");
        assert_eq!(json["machine"]["configured"], "auto");
        assert_eq!(json["checks"][0]["status"], "warning");
        assert_eq!(json["checks"][1]["advice"], serde_json::Value::Null);
    }
}
