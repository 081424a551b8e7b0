//! The table of scenes: what came of each hostile guest, what was looked at on the host, and what it cost there.

use std::{collections::BTreeSet, fmt::Write as _};

use crate::watch::Growth;

/// What a test tells of itself.
#[derive(Debug, Default)]
pub struct Notes {
    /// What it looked at, beside what is looked at after every test.
    pub looked_at: BTreeSet<&'static str>,
    /// By how much its sandboxes grew, at most.
    pub growth: Option<Growth>,
}

/// A test in the table.
#[derive(Debug)]
pub struct Row {
    /// Its full name.
    pub scene: String,
    /// `ok`, `FAILED`, or why it was skipped.
    pub outcome: String,
    /// What it told.
    pub notes: Notes,
}

const HEADINGS: [&str; 6] = ["scene", "outcome", "shim KiB", "shim fds", "vmm KiB", "looked at"];

/// The table as text, with a line above it that says which machine it is of and what was looked at each time. `files`
/// is how many files were.
pub fn text(rows: &[Row], machine: &str, files: usize) -> String {
    let mut text = format!(
        "\nthe boundary on machine {machine}, {} scenes. Looked at on the host after each: {files} files by checksum, mounts, network, \
         firewall, cgroups,\nprocesses, sockets, shared memory, containerd's containers and snapshots, state directories\n",
        rows.len()
    );
    let mut lines = vec![HEADINGS.map(str::to_owned)];
    lines.extend(rows.iter().map(cells));
    let width = |column: usize| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or_default();
    let widths: Vec<usize> = (0..HEADINGS.len()).map(width).collect();
    for line in &lines {
        let mut row = String::new();
        for (cell, width) in line.iter().zip(&widths) {
            let _ = write!(row, "  {cell:<width$}");
        }
        text.push_str(row.trim_end());
        text.push('\n');
    }
    text
}

fn cells(row: &Row) -> [String; 6] {
    let grown =
        |get: fn(&Growth) -> i64| row.notes.growth.as_ref().map_or("-".into(), |growth| format!("{:+}", get(growth)));
    [
        row.scene.clone(),
        row.outcome.clone(),
        grown(|growth| growth.shim_kib),
        grown(|growth| growth.shim_descriptors),
        grown(|growth| growth.vmm_kib),
        row.notes.looked_at.iter().copied().collect::<Vec<_>>().join(", "),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_aligned_and_names_its_machine() {
        let growth = Growth { shim_kib: 120, shim_descriptors: 0, vmm_kib: -8 };
        let seen = Notes { looked_at: ["another sandbox"].into(), growth: Some(growth) };
        let rows = [
            Row { scene: "metal::names".into(), outcome: "ok".into(), notes: seen },
            Row { scene: "escape::qemu".into(), outcome: "skipped: not QEMU".into(), notes: Notes::default() },
        ];
        let text = text(&rows, "kvm", 7);
        let lines: Vec<&str> = text.lines().collect();
        assert!(
            lines[1].starts_with("the boundary on machine kvm, 2 scenes. Looked at on the host after each: 7 files")
        );
        assert_eq!(lines[3], "  scene         outcome            shim KiB  shim fds  vmm KiB  looked at");
        assert_eq!(lines[4], "  metal::names  ok                 +120      +0        -8       another sandbox");
        assert_eq!(lines[5], "  escape::qemu  skipped: not QEMU  -         -         -");
    }
}
