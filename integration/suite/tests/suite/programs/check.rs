//! `vz check`, and the choice of a machine that it explains.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use serde_json::Value;
use vz_suite::{Lab, Skip, Verdict, command::Program, lab::BUSYBOX, tests};

tests![
    check_says_whether_kvm_can_be_used_and_why_not,
    the_exit_status_is_the_sum_of_the_findings,
    auto_probes_once,
    forced_kvm_is_refused_with_the_reason,
    a_host_without_any_machine_is_told_both_reasons,
    completions_and_man_pages_are_made,
];

/// Where the verdict on KVM is remembered.
const VERDICT: &str = "/run/vz/.kvm.json";

#[track_caller]
fn report(program: Program) -> Value {
    let output = program.run();
    let text = output.text();
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {output}"))
}

#[track_caller]
fn check<'r>(report: &'r Value, name: &str) -> &'r Value {
    let checks = report["checks"].as_array().expect("checks are a list");
    checks.iter().find(|check| check["name"] == name).unwrap_or_else(|| panic!("no {name:?} in {report:#}"))
}

fn check_says_whether_kvm_can_be_used_and_why_not(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    let report = report(lab.vz(&["check", "--probe", "--json"]));
    let said = lab.vz(&["check"]).run().text();
    let kvm = &report["kvm"];
    if Path::new("/sys/module/kvm_pvm").exists() {
        // It emulates guests: it gives up on an instruction, or is slow.
        let kind = kvm["finding"]["kind"].as_str().unwrap_or_default();
        assert!(matches!(kind, "internal_error" | "too_slow"), "{report:#}");
        assert_eq!(kvm["usable"], false, "{report:#}");
        let names = ["popcnt", "cmpxchg16b", "pxor", "KVM emulates its guests"];
        assert!(names.iter().any(|name| said.contains(name)), "{said}");
        assert!(said.contains("set machine = \"qemu\""), "{said}");
    }
    if kvm["usable"] == true {
        assert!(kvm["loop_ns"].as_f64().is_some_and(|ns| ns < 300.0), "{report:#}");
    } else {
        assert!(check(&report, "kvm")["advice"].is_string(), "{report:#}");
    }
    // The second one has not probed.
    if kvm["source"] == "probe" {
        assert!(said.contains("as a probe found earlier"), "{said}");
    }
    Ok(())
}

fn the_exit_status_is_the_sum_of_the_findings(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    let good = lab.vz(&["check"]).run();
    assert!(good.ok().contains("Containers can run"), "{good}");
    assert!(!good.text().contains('\x1b'), "colours without a terminal: {good}");
    let report_of = |lab: &Lab| report(lab.vz(&["check", "--json"]));
    let well = report_of(lab);
    assert_eq!((&well["schema"], &well["ready"]), (&Value::from(1), &Value::from(true)));
    for name in ["configuration", "guest bundle", "machine", "containerd", "shim"] {
        assert!(matches!(check(&well, name)["status"].as_str(), Some("ok" | "info")), "{well:#}");
    }
    let guard = lab.configure("\nno_such_key = 1\n");
    let bad = lab.vz(&["check"]).run();
    assert!(bad.exits(1).text().contains("no_such_key"), "{bad}");
    assert_eq!(report_of(lab)["ready"], false);
    drop(guard);
    let guard = lab.use_bundle(Path::new("/nonexistent"));
    assert_eq!(check(&report_of(lab), "guest bundle")["status"], "failed");
    lab.vz(&["check"]).run().exits(1);
    drop(guard);
    lab.vz(&["check", "--no-such-flag"]).run().exits(2);
    lab.vz(&[]).run().exits(2);
    Ok(())
}

/// The number after `at_ms=` in the line that says that a sandbox's VM is launched.
#[track_caller]
fn launched_at_ms(lines: &str, id: &str) -> u64 {
    let line = lines.lines().find(|line| line.contains(id) && line.contains("vm is launched"));
    let number = line.and_then(|line| line.split("at_ms=").nth(1)?.split(|c: char| !c.is_ascii_digit()).next());
    number.and_then(|number| number.parse().ok()).unwrap_or_else(|| panic!("no launch of {id} in {lines}"))
}

fn auto_probes_once(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    if report(lab.vz(&["check", "--json"]))["kvm"]["source"] == "device" {
        return Err(Skip("there is no /dev/kvm to be probed".into()));
    }
    let _guard = lab.configure("machine = \"auto\"\n");
    fs::remove_file(VERDICT).expect("remove the verdict");
    let run = |what: &str| {
        let (id, mark) = (lab.id(what), lab.log_position());
        lab.ctr_run(&["--rm", BUSYBOX, &id, "true"]).run().ok();
        (id, lab.log_lines_since(mark))
    };
    let verdict = |lines: &str, id: &str| {
        let said = ["KVM cannot be used on this host", "KVM works on this host"];
        lines.lines().filter(|line| line.contains(id) && said.iter().any(|text| line.contains(text))).count()
    };
    let inode = || fs::metadata(VERDICT).map(|data| data.ino()).expect("a verdict is remembered");
    let (first, lines) = run("first");
    assert_eq!(verdict(&lines, &first), 1, "{lines}");
    let (first_ms, file) = (launched_at_ms(&lines, &first), inode());
    let (second, lines) = run("second");
    assert_eq!(verdict(&lines, &second), 0, "{lines}");
    assert_eq!(inode(), file, "the verdict was written again");
    let second_ms = launched_at_ms(&lines, &second);
    println!("  launched after {first_ms} ms with a probe, {second_ms} ms without");
    assert!(first_ms < second_ms + 1000, "a probe costs {first_ms} - {second_ms} ms");
    Ok(())
}

/// What `ctr run` says that fails.
#[track_caller]
fn refusal(lab: &Lab) -> String {
    let id = lab.id("refused");
    let said = lab.ctr_run(&["--rm", BUSYBOX, &id, "true"]).run().fails();
    lab.ctr(&["containers", "rm", &id]).run();
    said
}

fn forced_kvm_is_refused_with_the_reason(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    let report_before = report(lab.vz(&["check", "--json"]));
    if report_before["kvm"]["usable"] == true {
        return Err(Skip("KVM can be used here".into()));
    }
    let reason = check(&report_before, "kvm")["found"].as_str().unwrap_or_default().to_owned();
    let reason = reason.split_once(": ").map_or(reason.as_str(), |(_, reason)| reason);
    let _guard = lab.configure("machine = \"kvm\"\n");
    let said = refusal(lab);
    for part in ["machine \\\"kvm\\\" cannot run on this host", reason] {
        assert!(said.contains(part) || said.replace('\\', "").contains(&part.replace('\\', "")), "{part}: {said}");
    }
    let bad = lab.vz(&["check"]).run();
    assert!(bad.exits(1).text().contains("Containers cannot run: machine"), "{bad}");
    let report = report(lab.vz(&["check", "--json"]));
    assert_eq!((&report["machine"]["configured"], &report["machine"]["chosen"]), (&"kvm".into(), &Value::Null));
    Ok(())
}

fn a_host_without_any_machine_is_told_both_reasons(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    if report(lab.vz(&["check", "--json"]))["kvm"]["usable"] == true {
        return Err(Skip("KVM can be used here".into()));
    }
    let _guard = lab.configure("machine = \"auto\"\n[qemu]\npath = \"/nonexistent/qemu\"\n");
    let said = refusal(lab);
    assert!(said.contains("KVM") && said.contains("/nonexistent/qemu"), "{said}");
    let bad = lab.vz(&["check"]).run();
    assert!(bad.exits(1).text().contains("/nonexistent/qemu"), "{bad}");
    Ok(())
}

fn completions_and_man_pages_are_made(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    let script = lab.vz(&["completions", "bash"]).run().ok();
    assert!(script.contains("--probe"), "{script}");
    Program::new("bash").args(["-n"]).input(script.as_bytes()).run().ok();
    let dir = lab.dir();
    let pages: PathBuf = dir.path().join("man1");
    lab.vz(&["man", &pages.display().to_string()]).run().ok();
    let page = fs::read_to_string(pages.join("vz-check.1")).expect("a man page of the verb");
    assert!(page.contains("exit status is 0"), "{page}");
    assert!(pages.join("vz.1").exists());
    Ok(())
}
