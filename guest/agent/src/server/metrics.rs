//! A container's resource use, as containerd's `io.containerd.cgroups.v2.Metrics`, from its cgroup's files.
//!
//! A file that does not exist (no such controller) leaves its fields at zero; "max" is the largest number, as in
//! containerd's own reader.

use std::{collections::HashMap, fs};

use containerd_shim_protos::cgroups_v2::metrics::{
    CPUStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, PSIData, PSIStats, PidsStat,
};
use protobuf::MessageField;

use super::cgroup::Cgroup;

/// Reads them all.
pub fn read(cgroup: &Cgroup) -> Metrics {
    let file = |name: &str| fs::read_to_string(cgroup.file(name)).unwrap_or_default();
    let number = |name: &str| value(file(name).trim());
    Metrics {
        pids: MessageField::some(PidsStat {
            current: number("pids.current"),
            limit: number("pids.max"),
            ..Default::default()
        }),
        cpu: MessageField::some(CPUStat { psi: pressure(&file("cpu.pressure")), ..cpu(&keyed(&file("cpu.stat"))) }),
        memory: MessageField::some(MemoryStat {
            usage: number("memory.current"),
            usage_limit: number("memory.max"),
            max_usage: number("memory.peak"),
            swap_usage: number("memory.swap.current"),
            swap_limit: number("memory.swap.max"),
            swap_max_usage: number("memory.swap.peak"),
            psi: pressure(&file("memory.pressure")),
            ..memory(&keyed(&file("memory.stat")))
        }),
        io: MessageField::some(IOStat {
            usage: io(&file("io.stat")),
            psi: pressure(&file("io.pressure")),
            ..Default::default()
        }),
        memory_events: MessageField::some(events(&keyed(&file("memory.events")))),
        ..Default::default()
    }
}

fn value(text: &str) -> u64 {
    if text == "max" { u64::MAX } else { text.parse().unwrap_or(0) }
}

fn keyed(text: &str) -> HashMap<&str, u64> {
    text.lines().filter_map(|l| l.split_once(' ')).map(|(key, number)| (key, value(number))).collect()
}

fn cpu(stat: &HashMap<&str, u64>) -> CPUStat {
    let get = |key: &str| stat.get(key).copied().unwrap_or(0);
    CPUStat {
        usage_usec: get("usage_usec"),
        user_usec: get("user_usec"),
        system_usec: get("system_usec"),
        nr_periods: get("nr_periods"),
        nr_throttled: get("nr_throttled"),
        throttled_usec: get("throttled_usec"),
        nr_bursts: get("nr_bursts"),
        burst_usec: get("burst_usec"),
        ..Default::default()
    }
}

fn memory(stat: &HashMap<&str, u64>) -> MemoryStat {
    let get = |key: &str| stat.get(key).copied().unwrap_or(0);
    // Since Linux 5.9 these are counted apart for anonymous and file pages.
    let both = |key: &str| get(&format!("{key}_anon")).saturating_add(get(&format!("{key}_file")));
    MemoryStat {
        anon: get("anon"),
        file: get("file"),
        kernel_stack: get("kernel_stack"),
        slab: get("slab"),
        sock: get("sock"),
        shmem: get("shmem"),
        file_mapped: get("file_mapped"),
        file_dirty: get("file_dirty"),
        file_writeback: get("file_writeback"),
        anon_thp: get("anon_thp"),
        inactive_anon: get("inactive_anon"),
        active_anon: get("active_anon"),
        inactive_file: get("inactive_file"),
        active_file: get("active_file"),
        unevictable: get("unevictable"),
        slab_reclaimable: get("slab_reclaimable"),
        slab_unreclaimable: get("slab_unreclaimable"),
        pgfault: get("pgfault"),
        pgmajfault: get("pgmajfault"),
        workingset_refault: both("workingset_refault"),
        workingset_activate: both("workingset_activate"),
        workingset_nodereclaim: get("workingset_nodereclaim"),
        pgrefill: get("pgrefill"),
        pgscan: get("pgscan"),
        pgsteal: get("pgsteal"),
        pgactivate: get("pgactivate"),
        pgdeactivate: get("pgdeactivate"),
        pglazyfree: get("pglazyfree"),
        pglazyfreed: get("pglazyfreed"),
        thp_fault_alloc: get("thp_fault_alloc"),
        thp_collapse_alloc: get("thp_collapse_alloc"),
        ..Default::default()
    }
}

fn events(stat: &HashMap<&str, u64>) -> MemoryEvents {
    let get = |key: &str| stat.get(key).copied().unwrap_or(0);
    MemoryEvents {
        low: get("low"),
        high: get("high"),
        max: get("max"),
        oom: get("oom"),
        oom_kill: get("oom_kill"),
        oom_group_kill: get("oom_group_kill"),
        ..Default::default()
    }
}

/// Lines of `MAJOR:MINOR key=value...`.
fn io(text: &str) -> Vec<IOEntry> {
    let entry = |line: &str| {
        let mut words = line.split_ascii_whitespace();
        let (major, minor) = words.next()?.split_once(':')?;
        let stat: HashMap<_, _> = words.filter_map(|w| w.split_once('=')).map(|(k, v)| (k, value(v))).collect();
        let get = |key: &str| stat.get(key).copied().unwrap_or(0);
        Some(IOEntry {
            major: major.parse().ok()?,
            minor: minor.parse().ok()?,
            rbytes: get("rbytes"),
            wbytes: get("wbytes"),
            rios: get("rios"),
            wios: get("wios"),
            ..Default::default()
        })
    };
    text.lines().filter_map(entry).collect()
}

/// Lines of `some|full avg10=0.00 avg60=0.00 avg300=0.00 total=0`; absent unless the kernel was asked for them.
fn pressure(text: &str) -> MessageField<PSIStats> {
    let line = |kind: &str| {
        let words = text.lines().find_map(|l| l.strip_prefix(kind))?.split_ascii_whitespace();
        let get: HashMap<_, _> = words.filter_map(|w| w.split_once('=')).collect();
        let average = |key| get.get(key).and_then(|v| v.parse().ok()).unwrap_or(0.0);
        Some(PSIData {
            avg10: average("avg10"),
            avg60: average("avg60"),
            avg300: average("avg300"),
            total: get.get("total").map_or(0, |v| value(v)),
            ..Default::default()
        })
    };
    let (some, full) = (line("some "), line("full "));
    if some.is_none() && full.is_none() {
        return MessageField::none();
    }
    MessageField::some(PSIStats { some: some.into(), full: full.into(), ..Default::default() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flat_files_become_fields() {
        let stat =
            "anon 10\nfile 20\ninactive_file 7\nworkingset_refault_anon 1\nworkingset_refault_file 2\nnonsense\n";
        let memory = memory(&keyed(stat));
        let got = (memory.anon, memory.file, memory.inactive_file, memory.workingset_refault, memory.slab);
        assert_eq!(got, (10, 20, 7, 3, 0));
        let cpu = cpu(&keyed("usage_usec 5\nuser_usec 3\nsystem_usec 2\n"));
        assert_eq!((cpu.usage_usec, cpu.user_usec, cpu.system_usec, cpu.nr_periods), (5, 3, 2, 0));
        assert_eq!(events(&keyed("low 0\noom_kill 4\n")).oom_kill, 4);
    }

    #[test]
    fn no_limit_is_the_largest_number() {
        assert_eq!((value("max"), value("12"), value("")), (u64::MAX, 12, 0));
    }

    #[test]
    fn devices_have_lines_of_their_own() {
        let io = io("254:0 rbytes=4096 wbytes=1 rios=2 wios=3 dbytes=0 dios=0\n7:0 \nbad\n");
        assert_eq!(io.len(), 2);
        assert_eq!((io[0].major, io[0].minor, io[0].rbytes, io[0].wios), (254, 0, 4096, 3));
    }

    #[test]
    fn pressure_may_be_absent() {
        assert!(pressure("").is_none());
        let stats = pressure("some avg10=1.50 avg60=0.00 avg300=0.00 total=12\nfull avg10=0.25 total=3\n").unwrap();
        assert_eq!((stats.some.avg10, stats.some.total, stats.full.avg10), (1.5, 12, 0.25));
    }
}
