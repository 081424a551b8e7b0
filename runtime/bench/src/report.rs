//! What came of all boots: for people, and for programs.

use std::{fmt::Write as _, path::PathBuf};

use serde::Serialize;
use vz_machine::control::MachineKind;

use crate::{
    boot::{Boot, Fetch},
    guest::Output,
    phases::{Figure, Phase, Unit},
    stats::Summary,
    subject::Subject,
};

/// Raised when a member's name or meaning changes.
const SCHEMA: u32 = 1;

/// Everything.
#[derive(Debug, Serialize)]
pub struct Report {
    schema: u32,
    /// `ns`, or `instructions`.
    unit: &'static str,
    machine: Option<MachineKind>,
    vcpus: u32,
    memory_mib: u64,
    kernel_args: String,
    /// What was booted: the bundle, then what it was compared with.
    pub subjects: Vec<Measured>,
    /// The bundle's figures divided by those of what it was compared with.
    compare: Vec<Ratio>,
}

/// One subject.
#[derive(Debug, Serialize)]
pub struct Measured {
    /// As it was named.
    pub dir: PathBuf,
    /// Of the bundle's description; none for a kernel without one.
    pub profile: Option<String>,
    bundle_version: Option<String>,
    kernel_version: Option<String>,
    /// Parts of a boot, in order.
    pub phases: Vec<Series<Phase>>,
    /// Sums.
    pub figures: Vec<Series<Figure>>,
    /// What was asked of the guest in each boot.
    boots: Vec<Asked>,
}

/// One number, of all boots.
#[derive(Debug, Serialize)]
pub struct Series<K> {
    /// What it is.
    pub name: K,
    /// For people.
    pub title: &'static str,
    /// Of each boot that had it, in order.
    pub values: Vec<u64>,
    /// Summed up.
    #[serde(flatten)]
    pub summary: Summary,
}

#[derive(Debug, Serialize)]
struct Asked {
    #[serde(skip_serializing_if = "Option::is_none")]
    command: Option<CommandResult>,
    #[serde(skip_serializing_if = "Option::is_none")]
    fetch: Option<Fetched>,
}

#[derive(Debug, Serialize)]
struct CommandResult {
    status: u32,
    output: String,
}

#[derive(Debug, Serialize)]
struct Fetched {
    bytes: u64,
    attempts: u32,
}

/// How two compare.
#[derive(Debug, Serialize)]
struct Ratio {
    figure: Figure,
    title: &'static str,
    /// Pair by pair.
    values: Vec<f64>,
    #[serde(flatten)]
    summary: Summary,
}

/// What the boots had in common.
#[derive(Debug)]
pub struct Setting {
    /// The unit of all numbers.
    pub unit: Unit,
    /// The machine that was taken.
    pub machine: Option<MachineKind>,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Added kernel arguments.
    pub kernel_args: String,
}

fn series<K: Copy + PartialEq>(
    boots: &[Boot],
    of: impl Fn(&Boot) -> &[(K, u64)],
    title: fn(K) -> &'static str,
) -> Vec<Series<K>> {
    // In the order in which the boots have them: one that lacks some has the others in the same order.
    let mut names: Vec<K> = Vec::new();
    for (name, _) in boots.iter().flat_map(&of) {
        if !names.contains(name) {
            names.push(*name);
        }
    }
    names
        .into_iter()
        .filter_map(|name| {
            let values: Vec<u64> =
                boots.iter().flat_map(&of).filter(|(other, _)| *other == name).map(|(_, value)| *value).collect();
            let summary = Summary::of(&values.iter().map(|value| *value as f64).collect::<Vec<_>>())?;
            Some(Series { name, title: title(name), values, summary })
        })
        .collect()
}

impl Report {
    /// Sums up what each subject's boots took.
    pub fn new(setting: Setting, results: Vec<(&Subject, Vec<Boot>)>) -> Self {
        let subjects: Vec<Measured> = results
            .into_iter()
            .map(|(subject, boots)| Measured {
                dir: subject.name.clone(),
                profile: subject.version.as_ref().map(|version| version.profile.clone()),
                bundle_version: subject.version.as_ref().map(|version| version.bundle_version.clone()),
                kernel_version: subject.version.as_ref().map(|version| version.kernel_version.clone()),
                phases: series(&boots, |boot| &boot.times.phases, Phase::title),
                figures: series(&boots, |boot| &boot.times.figures, Figure::title),
                boots: boots.into_iter().map(asked).collect(),
            })
            .collect();
        let compare = match subjects.as_slice() {
            [first, second] => ratios(&first.figures, &second.figures),
            _ => Vec::new(),
        };
        let Setting { unit, machine, vcpus, memory_mib, kernel_args } = setting;
        let unit = match unit {
            Unit::Time => "ns",
            Unit::Instructions => "instructions",
        };
        Self { schema: SCHEMA, unit, machine, vcpus, memory_mib, kernel_args, subjects, compare }
    }

    /// What numbers are shown in.
    pub fn scale(&self) -> Scale {
        match self.unit {
            "ns" => Scale { divisor: 1e6, unit: "ms", digits: 2 },
            _ => Scale { divisor: 1e6, unit: "million instructions", digits: 6 },
        }
    }

    /// One line about what the boots had in common.
    pub fn setting(&self) -> String {
        let machine = self.machine.map_or("unknown", MachineKind::name);
        let cpus = if self.vcpus == 1 { "vCPU" } else { "vCPUs" };
        format!("machine {machine}, {} {cpus}, {} MiB", self.vcpus, self.memory_mib)
    }

    /// For people.
    pub fn text(&self) -> String {
        let scale = self.scale();
        let mut text = format!("{}; in {}\n", self.setting(), scale.unit);
        for subject in &self.subjects {
            // Writing to a string cannot fail.
            let _ = write!(text, "\n{}\n", subject.title());
            let mut rows = vec![["", "median", "p90", "min", "max", "spread", "n"].map(str::to_owned)];
            rows.extend(subject.phases.iter().map(|series| row(series.title, &series.summary, &scale)));
            rows.extend(subject.figures.iter().map(|series| row(series.title, &series.summary, &scale)));
            text.push_str(&table(&rows, 1 + subject.phases.len()));
        }
        if let [first, second] = self.subjects.as_slice() {
            let _ = write!(text, "\n{} / {}, pair by pair\n", first.dir.display(), second.dir.display());
            let scale = Scale { divisor: 1.0, unit: "", digits: 3 };
            let mut rows = vec![["", "median", "p90", "min", "max", "spread", "n"].map(str::to_owned)];
            rows.extend(self.compare.iter().map(|ratio| row(ratio.title, &ratio.summary, &scale)));
            text.push_str(&table(&rows, rows.len()));
        }
        text
    }
}

impl Measured {
    /// Which it is.
    pub fn title(&self) -> String {
        let dir = self.dir.display();
        match (&self.profile, &self.kernel_version) {
            (Some(profile), Some(kernel)) => format!("{dir}: {profile}, Linux {kernel}"),
            _ => format!("{dir}: a kernel, with the bundle's initramfs"),
        }
    }
}

/// How numbers are shown.
#[derive(Debug, Clone, Copy)]
pub struct Scale {
    divisor: f64,
    /// The unit's name.
    pub unit: &'static str,
    digits: usize,
}

impl Scale {
    /// A number, in the unit.
    pub fn of(&self, value: f64) -> f64 {
        value / self.divisor
    }

    /// A number in the unit, with all the digits that say something.
    pub fn show(&self, value: f64) -> String {
        format!("{:.*}", self.digits, self.of(value))
    }
}

fn asked(boot: Boot) -> Asked {
    let command = boot.output.map(|Output { status, text }| CommandResult { status, output: text });
    let fetch = boot.fetch.map(|Fetch { bytes, attempts }| Fetched { bytes, attempts });
    Asked { command, fetch }
}

fn ratios(first: &[Series<Figure>], second: &[Series<Figure>]) -> Vec<Ratio> {
    first
        .iter()
        .filter_map(|series| {
            let other = second.iter().find(|other| other.name == series.name)?;
            let pairs = series.values.iter().zip(&other.values).filter(|(_, other)| **other > 0);
            let values: Vec<f64> = pairs.map(|(one, other)| *one as f64 / *other as f64).collect();
            let summary = Summary::of(&values)?;
            Some(Ratio { figure: series.name, title: series.title, values, summary })
        })
        .collect()
}

fn row(title: &str, summary: &Summary, scale: &Scale) -> [String; 7] {
    let Summary { count, min, median, p90, max, spread } = *summary;
    let [median, p90, min, max, spread] = [median, p90, min, max, spread].map(|value| scale.show(value));
    [title.to_owned(), median, p90, min, max, spread, count.to_string()]
}

/// Columns, numbers to the right; an empty line before row `gap`.
fn table(rows: &[[String; 7]], gap: usize) -> String {
    let mut widths = [0; 7];
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.chars().count().max(*width);
        }
    }
    let mut text = String::new();
    for (index, row) in rows.iter().enumerate() {
        if index == gap && index > 1 {
            text.push('\n');
        }
        let mut line = String::new();
        for (column, (width, cell)) in widths.iter().zip(row).enumerate() {
            let _ = match column {
                0 => write!(line, "  {cell:width$}"),
                _ => write!(line, "  {cell:>width$}"),
            };
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::phases::Times;

    pub(crate) fn boot(phases: &[(Phase, u64)]) -> Boot {
        let total = phases.iter().map(|(_, value)| value).sum();
        let times = Times { phases: phases.to_vec(), figures: vec![(Figure::Hello, total)] };
        Boot { machine: Some(MachineKind::Qemu), times, log: Vec::new(), output: None, fetch: None }
    }

    pub(crate) fn subject(dir: &str) -> Subject {
        Subject { name: dir.into(), dir: dir.into(), version: None, agent_version: "1".into() }
    }

    pub(crate) fn setting(unit: Unit) -> Setting {
        Setting { unit, machine: Some(MachineKind::Qemu), vcpus: 1, memory_mib: 256, kernel_args: String::new() }
    }

    pub(crate) fn report() -> Report {
        let (one, other) = (subject("out/one"), subject("out/<other>"));
        let first = (1..=4).map(|n| boot(&[(Phase::Kernel, n * 10_000_000), (Phase::Agent, 5_000_000)])).collect();
        let second = (1..=4).map(|n| boot(&[(Phase::Kernel, n * 30_000_000), (Phase::Agent, 5_000_000)])).collect();
        Report::new(setting(Unit::Time), vec![(&one, first), (&other, second)])
    }

    #[test]
    fn numbers_are_summed_up_by_name() {
        let report = report();
        let phases = &report.subjects[0].phases;
        assert_eq!(phases.iter().map(|series| series.name).collect::<Vec<_>>(), [Phase::Kernel, Phase::Agent]);
        assert_eq!(phases[0].values, [10_000_000, 20_000_000, 30_000_000, 40_000_000]);
        assert_eq!(phases[0].summary.median, 25e6);
        let ratio = &report.compare[0];
        assert_eq!((ratio.figure, ratio.values.len()), (Figure::Hello, 4));
        assert!((ratio.values[0] - 15.0 / 35.0).abs() < 1e-12);
    }

    #[test]
    fn people_get_a_table_in_their_unit() {
        let text = report().text();
        assert!(text.starts_with("machine qemu, 1 vCPU, 256 MiB; in ms\n"), "{text}");
        let line = text.lines().find(|line| line.contains("kernel ")).unwrap();
        let words: Vec<_> = line.split_whitespace().collect();
        assert_eq!(words, ["kernel", "25.00", "40.00", "10.00", "40.00", "30.00", "4"]);
        assert!(text.contains("out/one / out/<other>, pair by pair"), "{text}");
    }

    #[test]
    fn programs_get_every_number() {
        let json = serde_json::to_value(report()).unwrap();
        assert_eq!((&json["schema"], &json["unit"], &json["machine"]), (&1.into(), &"ns".into(), &"qemu".into()));
        let phase = &json["subjects"][1]["phases"][0];
        assert_eq!((&phase["name"], &phase["count"]), (&"kernel".into(), &4.into()));
        assert_eq!(phase["values"][3], 120_000_000);
        assert_eq!(json["compare"][0]["figure"], "hello");
    }

    #[test]
    fn instructions_are_shown_to_the_last_one() {
        let one = subject("x");
        let report = Report::new(setting(Unit::Instructions), vec![(&one, vec![boot(&[(Phase::Kernel, 28_333_417)])])]);
        assert!(report.text().contains("28.333417"), "{}", report.text());
    }
}
