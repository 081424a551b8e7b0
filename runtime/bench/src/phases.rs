//! From the guest's time stamps to the parts of a boot.
//!
//! Three clocks are involved. The *counter* (time-stamp counter) starts at 0 with the machine. The *kernel's clock*
//! starts when the kernel has found out how fast the counter is, and goes with it from there: it stamps the lines of
//! the kernel's log, and is what the agent reads. The *host's* clock is only used for what is outside of the guest.
//! With instructions counted, guest clocks advance by one nanosecond with each instruction.

use serde::Serialize;
use vz_proto::{Hello, LogRecord};

/// A part of a boot; parts do not overlap.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// On the host: from the request to the machine's start, and from the guest's hello to whoever takes it.
    Host,
    /// In the guest, before the kernel has a clock: firmware, decompression where there is any, memory.
    Early,
    /// The kernel's core: until its drivers and other parts are started.
    Core,
    /// The kernel's parts, one after the other, and the initramfs unpacked.
    Initcalls,
    /// The kernel frees and protects its memory.
    Memory,
    /// The kernel starts init.
    Exec,
    /// The kernel as a whole, where its log has not the lines that tell its parts apart.
    Kernel,
    /// The agent: from init's first line to its hello.
    Agent,
    /// From init's first line until the root file system is mounted.
    Mount,
    /// Until the first program in the root file system runs.
    Chroot,
}

impl Phase {
    /// For people.
    pub fn title(self) -> &'static str {
        match self {
            Self::Host => "host: start and answer",
            Self::Early => "before the kernel's clock",
            Self::Core => "kernel: core",
            Self::Initcalls => "kernel: initcalls",
            Self::Memory => "kernel: free and protect memory",
            Self::Exec => "kernel: start init",
            Self::Kernel => "kernel",
            Self::Agent => "agent: to its hello",
            Self::Mount => "init: mount root",
            Self::Chroot => "init: chroot",
        }
    }
}

/// A sum of phases, or something that was measured by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Figure {
    /// From the machine's start to init's first line.
    Init,
    /// From the machine's start to the agent's hello.
    Hello,
    /// The same without what the agent's processes used of the processor, system calls included.
    HelloWithoutAgent,
    /// From the request to the hello, by the host's clock.
    Wall,
    /// From the start of the kernel's clock until the first program in the root file system runs.
    Chroot,
    /// Fetching the URL, by the host's clock.
    Fetch,
}

impl Figure {
    /// For people.
    pub fn title(self) -> &'static str {
        match self {
            Self::Init => "machine's start to init",
            Self::Hello => "machine's start to hello",
            Self::HelloWithoutAgent => "the same without the agent",
            Self::Wall => "request to hello (wall)",
            Self::Chroot => "kernel's clock to chroot",
            Self::Fetch => "fetch of the URL (wall)",
        }
    }
}

/// What one boot took, in nanoseconds or instructions.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Times {
    /// Its parts, in order.
    pub phases: Vec<(Phase, u64)>,
    /// Its sums.
    pub figures: Vec<(Figure, u64)>,
}

/// Time stamps do not fit together.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the guest's time stamps make no sense: {0}")]
pub struct Nonsense(&'static str);

/// A line of the kernel's log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// When, in microseconds by the kernel's clock.
    pub time_us: u64,
    /// What.
    pub text: String,
}

impl From<LogRecord> for Line {
    fn from(record: LogRecord) -> Self {
        Self { time_us: record.time_us, text: record.message }
    }
}

impl std::fmt::Display for Line {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "[{:5}.{:06}] {}", self.time_us / 1_000_000, self.time_us % 1_000_000, self.text)
    }
}

/// How the guest's clocks are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// They show time.
    Time,
    /// They count instructions, and the counter does too, one by one.
    Instructions,
}

/// Parts of the kernel's own time, by what its log says; all of it as one where the log does not.
fn kernel(lines: &[Line], init_ns: u64) -> Vec<(Phase, u64)> {
    let at = |wanted: fn(&str) -> bool| lines.iter().find(|line| wanted(&line.text)).map(|line| line.time_us * 1000);
    let marks = (
        at(|text| text == "devtmpfs: initialized"),
        at(|text| text.starts_with("Freeing unused kernel image (initmem)")),
        at(|text| text.starts_with("Run ") && text.ends_with(" as init process")),
    );
    match marks {
        (Some(drivers), Some(freeing), Some(run)) if drivers <= freeing && freeing <= run && run <= init_ns => vec![
            (Phase::Core, drivers),
            (Phase::Initcalls, freeing - drivers),
            (Phase::Memory, run - freeing),
            (Phase::Exec, init_ns - run),
        ],
        _ => vec![(Phase::Kernel, init_ns)],
    }
}

/// A boot to the agent's hello, which came `wall_ns` after the request.
pub fn to_hello(hello: &Hello, lines: &[Line], wall_ns: u64, unit: Unit) -> Result<Times, Nonsense> {
    let counted = hello.tsc.checked_sub(hello.init_tsc).ok_or(Nonsense("the counter goes back"))?;
    let agent = hello.uptime_ns.checked_sub(hello.init_ns).ok_or(Nonsense("the clock goes back"))?;
    if hello.init_tsc == 0 || counted == 0 || agent == 0 {
        return Err(Nonsense("it has no counter"));
    }
    // The counter's rate is the guest's own business: what both show from init to hello tells it.
    let ns = |count: u64| match unit {
        Unit::Instructions => Some(count),
        Unit::Time => u64::try_from(u128::from(count) * u128::from(agent) / u128::from(counted)).ok(),
    };
    let too_much = Nonsense("the counter is too large");
    let (init, guest) = (ns(hello.init_tsc).ok_or(too_much.clone())?, ns(hello.tsc).ok_or(too_much)?);
    let early = init.checked_sub(hello.init_ns).ok_or(Nonsense("the kernel's clock is older than the machine"))?;
    let mut times = Times::default();
    if unit == Unit::Time {
        // A counter that was already running when the request came is no measure of it.
        times.phases.push((Phase::Host, wall_ns.saturating_sub(guest)));
        times.figures.push((Figure::Wall, wall_ns));
    }
    times.phases.push((Phase::Early, early));
    times.phases.extend(kernel(lines, hello.init_ns));
    times.phases.push((Phase::Agent, guest.saturating_sub(init)));
    times.figures.push((Figure::Init, init));
    times.figures.push((Figure::Hello, guest));
    times.figures.push((Figure::HelloWithoutAgent, guest.saturating_sub(hello.agent_cpu_ns)));
    Ok(times)
}

/// What init writes into the kernel's log when it boots a root file system, each at its moment.
pub mod mark {
    /// Its first line.
    pub const INIT: &str = "vz-linux-bench: init";
    /// The root file system is mounted.
    pub const ROOT: &str = "vz-linux-bench: root";
    /// The first program in it.
    pub const CHROOT: &str = "vz-linux-bench: chroot";
}

/// A boot of a root file system, by the marks in the kernel's log.
pub fn to_chroot(lines: &[Line]) -> Result<Times, Nonsense> {
    let at = |mark: &str| lines.iter().find(|line| line.text == mark).map(|line| line.time_us * 1000);
    let init = at(mark::INIT).ok_or(Nonsense("init has left no mark in the kernel's log"))?;
    let root = at(mark::ROOT).ok_or(Nonsense("init has not mounted the root file system"))?;
    let chroot = at(mark::CHROOT).ok_or(Nonsense("no program has run in the root file system"))?;
    let mut times = Times { phases: kernel(lines, init), figures: Vec::new() };
    let mount = root.checked_sub(init).ok_or(Nonsense("marks are out of order"))?;
    times.phases.push((Phase::Mount, mount));
    times.phases.push((Phase::Chroot, chroot.checked_sub(root).ok_or(Nonsense("marks are out of order"))?));
    times.figures.push((Figure::Chroot, chroot));
    Ok(times)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(time_us: u64, text: &str) -> Line {
        Line { time_us, text: text.into() }
    }

    fn log() -> Vec<Line> {
        vec![
            line(0, "Linux version 6.12"),
            line(8_000, "devtmpfs: initialized"),
            line(27_000, "Freeing unused kernel image (initmem) memory: 896K"),
            line(27_500, "Freeing unused kernel image (rodata/data gap) memory: 380K"),
            line(28_000, "Run /init as init process"),
        ]
    }

    fn hello() -> Hello {
        Hello {
            init_ns: 30_000_000,
            uptime_ns: 40_000_000,
            init_tsc: 64_000_000,
            tsc: 84_000_000,
            agent_cpu_ns: 8_000_000,
            ..Default::default()
        }
    }

    #[test]
    fn phases_add_up_to_the_whole() {
        // The counter runs at 2 GHz and is 2 ms ahead of the kernel's clock.
        let times = to_hello(&hello(), &log(), 100_000_000, Unit::Time).unwrap();
        let wanted = [
            (Phase::Host, 58_000_000),
            (Phase::Early, 2_000_000),
            (Phase::Core, 8_000_000),
            (Phase::Initcalls, 19_000_000),
            (Phase::Memory, 1_000_000),
            (Phase::Exec, 2_000_000),
            (Phase::Agent, 10_000_000),
        ];
        assert_eq!(times.phases, wanted);
        let wanted = [
            (Figure::Wall, 100_000_000),
            (Figure::Init, 32_000_000),
            (Figure::Hello, 42_000_000),
            (Figure::HelloWithoutAgent, 34_000_000),
        ];
        assert_eq!(times.figures, wanted);
        assert_eq!(times.phases.iter().map(|(_, ns)| ns).sum::<u64>(), 100_000_000);
    }

    #[test]
    fn instructions_are_the_counter_itself_and_know_no_host() {
        let hello = Hello { init_tsc: 31_000_001, tsc: 41_000_003, ..hello() };
        let times = to_hello(&hello, &log(), 1, Unit::Instructions).unwrap();
        assert_eq!(times.phases[0], (Phase::Early, 1_000_001));
        assert_eq!(times.phases.iter().map(|(_, count)| count).sum::<u64>(), 41_000_003);
        assert_eq!(times.figures[0], (Figure::Init, 31_000_001));
        assert_eq!(times.figures.len(), 3);
    }

    #[test]
    fn a_log_that_does_not_tell_leaves_the_kernel_whole() {
        for log in [&[][..], &log()[..3], &[line(31_000, "Run /init as init process")]] {
            assert_eq!(kernel(log, 30_000_000), [(Phase::Kernel, 30_000_000)]);
        }
    }

    #[test]
    fn time_stamps_that_make_no_sense_are_refused() {
        let refused = |hello: Hello| to_hello(&hello, &[], 1, Unit::Time).unwrap_err().to_string();
        assert!(refused(Hello { tsc: 1, ..hello() }).contains("goes back"));
        assert!(refused(Hello { uptime_ns: 1, ..hello() }).contains("goes back"));
        assert!(refused(Hello { init_tsc: 0, ..hello() }).contains("no counter"));
        assert!(refused(Hello { init_tsc: 1, tsc: 20_000_001, ..hello() }).contains("older than the machine"));
        assert!(refused(Hello { init_tsc: u64::MAX - 1, tsc: u64::MAX, ..hello() }).contains("too large"));
    }

    #[test]
    fn a_root_file_systems_boot_is_told_by_its_marks() {
        let mut lines = log();
        lines.extend([line(30_000, mark::INIT), line(33_000, mark::ROOT), line(35_500, mark::CHROOT)]);
        let times = to_chroot(&lines).unwrap();
        assert_eq!(times.phases[4..], [(Phase::Mount, 3_000_000), (Phase::Chroot, 2_500_000)]);
        assert_eq!(times.figures, [(Figure::Chroot, 35_500_000)]);
        lines.pop();
        assert!(to_chroot(&lines).unwrap_err().to_string().contains("no program"));
    }

    #[test]
    fn lines_look_as_dmesg_prints_them() {
        assert_eq!(line(1_028_195, "Run /init").to_string(), "[    1.028195] Run /init");
    }
}
