//! What a sandbox takes of the host while a scene is played: memory and descriptors of its shim and vmm, and
//! containerd's log.

use std::fs;

use crate::{
    Lab,
    host::{Role, await_process},
};

/// Most by which a sandbox that misbehaves may grow.
const SHIM_KIB: u64 = 16 * 1024;
const VMM_KIB: u64 = 32 * 1024;
const DESCRIPTORS: u64 = 16;
const LOG_BYTES: u64 = 512 * 1024;
/// A mapping of as much is the guest's memory.
const GUEST_MEMORY_KIB: u64 = 100 << 10;

/// Resident memory of a process.
pub fn rss_kib(pid: i32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("read status");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a process has memory");
    kib(line)
}

/// Memory of a process that is its own: of the guest's, which the vmm maps, as much is resident as the guest has
/// touched. `None` if the process has just ended.
pub fn private_kib(pid: i32) -> Option<u64> {
    let maps = fs::read_to_string(format!("/proc/{pid}/smaps")).expect("read the mappings");
    if maps.is_empty() {
        return None;
    }
    let (mut size, mut sum) = (0, 0);
    for line in maps.lines() {
        if let Some(text) = line.strip_prefix("Size:") {
            size = kib(text);
        } else if let Some(text) = line.strip_prefix("Anonymous:")
            && size < GUEST_MEMORY_KIB
        {
            sum += kib(text);
        }
    }
    assert!(sum > 0, "{maps}");
    Some(sum)
}

fn kib(text: &str) -> u64 {
    text.trim().trim_end_matches(" kB").parse().expect("a number of KiB")
}

/// How many descriptors a process has open.
pub fn descriptors(pid: i32) -> u64 {
    fs::read_dir(format!("/proc/{pid}/fd")).expect("list descriptors").count().try_into().expect("a small number")
}

/// What a sandbox has taken, at a moment.
#[derive(Debug, Clone, Copy)]
struct Taken {
    shim_kib: u64,
    shim_descriptors: u64,
    vmm_kib: u64,
    log: u64,
}

/// By how much it has grown since.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Growth {
    /// The shim's resident memory.
    pub shim_kib: i64,
    /// The shim's open descriptors.
    pub shim_descriptors: i64,
    /// The vmm's memory, without the guest's.
    pub vmm_kib: i64,
}

impl Growth {
    /// The larger of two, in each respect.
    #[must_use]
    pub fn most(self, other: Self) -> Self {
        Self {
            shim_kib: self.shim_kib.max(other.shim_kib),
            shim_descriptors: self.shim_descriptors.max(other.shim_descriptors),
            vmm_kib: self.vmm_kib.max(other.vmm_kib),
        }
    }
}

/// A sandbox whose growth is bounded.
#[derive(Debug)]
pub struct Watch<'l> {
    lab: &'l Lab,
    shim: i32,
    vmm: i32,
    before: Taken,
}

impl<'l> Watch<'l> {
    /// Looks at a sandbox for the first time; its processes are waited for.
    #[track_caller]
    pub fn start(lab: &'l Lab, container: &str) -> Self {
        let (shim, vmm) = (await_process(container, Role::Shim).pid, await_process(container, Role::Vmm).pid);
        // A scene may have ended its VM already. Then there is no growth to ask for.
        let vmm_kib = private_kib(vmm).unwrap_or(0);
        Self { lab, shim, vmm, before: Self::look(lab, shim, vmm_kib) }
    }

    fn look(lab: &Lab, shim: i32, vmm_kib: u64) -> Taken {
        Taken { shim_kib: rss_kib(shim), shim_descriptors: descriptors(shim), vmm_kib, log: lab.log_position() }
    }

    /// Fails the test where the sandbox has taken more of the host than it may. The figures are in the suite's table.
    #[track_caller]
    pub fn is_bounded(&self) -> Growth {
        let vmm_kib = private_kib(self.vmm).expect("the vmm runs");
        let (before, after) = (self.before, Self::look(self.lab, self.shim, vmm_kib));
        let grown = |before: u64, after: u64| after.cast_signed() - before.cast_signed();
        let growth = Growth {
            shim_kib: grown(before.shim_kib, after.shim_kib),
            shim_descriptors: grown(before.shim_descriptors, after.shim_descriptors),
            vmm_kib: grown(before.vmm_kib, after.vmm_kib),
        };
        self.lab.grew(growth);
        let log = after.log.saturating_sub(before.log);
        println!(
            "  shim {} -> {} KiB and {} -> {} descriptors, vmm {} -> {} KiB, log {log} bytes",
            before.shim_kib,
            after.shim_kib,
            before.shim_descriptors,
            after.shim_descriptors,
            before.vmm_kib,
            after.vmm_kib
        );
        for (what, before, after, most) in [
            ("the shim's memory (KiB)", before.shim_kib, after.shim_kib, SHIM_KIB),
            ("the shim's descriptors", before.shim_descriptors, after.shim_descriptors, DESCRIPTORS),
            ("the vmm's memory (KiB)", before.vmm_kib, after.vmm_kib, VMM_KIB),
            ("the log (bytes)", before.log, after.log, LOG_BYTES),
        ] {
            assert!(after < before + most, "{what} grew from {before} to {after}");
        }
        growth
    }
}
