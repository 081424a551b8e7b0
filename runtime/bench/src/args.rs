//! The command line. The man page is made from these definitions.

use std::{num::NonZeroU32, path::PathBuf};

use clap::{Parser, ValueEnum};

use crate::network::Url;

const AFTER: &str = "\
WHAT IS MEASURED

A boot is told by the guest's own clocks, not by looking from outside whether it is there yet. The processor's time-stamp \
counter starts at 0 with the machine; the kernel's clock starts a little later, when the kernel has found out how fast the \
counter is, and stamps the lines of the kernel's log; the agent sends both in its hello, as it has read them in its first \
line and when it sends. The phases of a boot do not overlap:

  host: start and answer         by the host's clock: what is left of the time from the request to the hello when the \
guest's is taken off: the vmm process, the machine's own start, the hello's way
  before the kernel's clock      firmware, decompression if there is any, memory
  kernel: core                   until drivers are started
  kernel: initcalls              drivers, file systems, network, one after the other; the initramfs is unpacked
  kernel: free and protect memory
  kernel: start init
  agent: to its hello            from init's first line

One boot before those that count warms the caches; with --instructions there is none. The median of an even number is \
between the two in the middle, p90 is the least value that nine of ten are no more than, spread is from the least to the \
most.

INSTRUCTIONS

--instructions has QEMU count the guest's instructions and advance all of the guest's clocks by one nanosecond for each, \
instead of by time; random numbers and the calendar are the same each time. The VM has all of a container's devices but \
the one for entropy, whose host part is a thread that answers when it gets to it: to count, it is left out. A guest that waits counts as well: it is made \
to spin. So everything up to init is the same number in every run, whatever else the host does. From init to the hello \
the guest waits for the host's side of its vsock connection, for as long as that takes; what the agent itself used of the \
processor, system calls included, is known from its own CPU time.

WITH BUSYBOX

--http-smoke-url, --guest-log-command and --rootfs-dir need programs in the guest. BusyBox is then added to a copy of the \
initramfs, as a second archive, which costs the boot some milliseconds; the bundle stays as it is.

EXIT STATUS

0 if all boots came to their end, 1 if one did not, 2 if the command line is wrong. Needs root, for the confinement of the \
VM's process.";

/// Boots a guest bundle again and again, and says where the time goes.
///
/// The VM is started the way the shim starts those of containers: in a confined process, on the machine that this host
/// can run.
#[derive(Debug, Parser)]
#[command(name = "vz-linux-bench", version, max_term_width = 100, after_long_help = AFTER)]
pub struct Args {
    /// The guest bundle; without it, the container profile's that the shim would use.
    #[arg(long, value_name = "DIR")]
    pub bundle_dir: Option<PathBuf>,
    /// Another bundle to compare with, or a directory with only a kernel, vmlinux or bzImage, which then gets the
    /// bundle's initramfs.
    ///
    /// Boots alternate between the two, so that what else the host does hits both. What is said about the two is from
    /// pairs of neighbouring boots.
    #[arg(long, value_name = "DIR")]
    pub compare: Option<PathBuf>,
    /// Boots that count, of each.
    #[arg(long, value_name = "N", default_value = "10")]
    pub iterations: NonZeroU32,
    /// How long one boot may take, with everything that is asked of the guest after it.
    #[arg(long, value_name = "N", default_value = "60")]
    pub timeout_secs: NonZeroU32,
    /// The machine; auto is what containers get on this host.
    #[arg(long, value_enum, value_name = "MACHINE", default_value = "auto")]
    pub machine: Machine,
    /// Count instructions instead of time; on QEMU, with one vCPU.
    #[arg(long)]
    pub instructions: bool,
    /// Virtual CPUs.
    #[arg(long, value_name = "N", default_value = "1")]
    pub vcpus: NonZeroU32,
    /// Memory of the guest.
    #[arg(long, value_name = "MIB", default_value = "256")]
    pub memory_mib: NonZeroU32,
    /// Arguments to add to the kernel's command line, for example initcall_debug.
    #[arg(long, value_name = "ARGS", default_value = "", allow_hyphen_values = true)]
    pub append: String,
    /// Print the last lines of the kernel's log after each boot, to standard error.
    #[arg(long, value_name = "LINES", num_args = 0..=1, default_missing_value = "20", require_equals = true)]
    pub guest_logs: Option<usize>,
    /// Run this in the guest after each boot, and print what it says, to standard error.
    ///
    /// With BusyBox's shell, in a container that may read the kernel's log; with --rootfs-dir, in that root file
    /// system. A command that fails is told of and is no failure of the boot.
    #[arg(long, value_name = "COMMAND")]
    pub guest_log_command: Option<String>,
    /// Fetch this URL in the guest after each boot, with BusyBox's wget.
    ///
    /// The guest gets a network card and reaches the URL's host through this program, and nothing else: a redirection
    /// to another host fails. An address in place of the host's name, or localhost, is that of this host's network; the
    /// guest then asks for it by another one. Attempts that fail are repeated for as long as the boot may take.
    #[arg(long, value_name = "URL", conflicts_with = "rootfs_dir")]
    pub http_smoke_url: Option<Url>,
    /// Tell of every Nth fetch that failed.
    #[arg(long, value_name = "N", default_value = "10")]
    pub retry_log_every: NonZeroU32,
    /// Boot into this root file system instead of the agent.
    ///
    /// The directory, without what is mounted below it, is shared as virtiofs, tag rootfs; init mounts it below an
    /// overlay that takes what is written, and runs a first program in it by chroot.
    #[arg(long, value_name = "DIR")]
    pub rootfs_dir: Option<PathBuf>,
    /// BusyBox for the guest, static.
    #[arg(long, value_name = "FILE", default_value = "/bin/busybox")]
    pub busybox: PathBuf,
    /// QEMU's program, a path or a name.
    #[arg(long, value_name = "PROGRAM", default_value = "qemu-system-x86_64")]
    pub qemu: PathBuf,
    /// Write JSON.
    #[arg(long)]
    pub json: bool,
    /// Draw the boots' timeline and their distribution into this file, as SVG.
    #[arg(long, value_name = "FILE")]
    pub plot: Option<PathBuf>,
    /// Write the man page into a directory, and do nothing else.
    #[arg(long, value_name = "DIR", hide = true, exclusive = true)]
    pub man: Option<PathBuf>,
}

/// A choice of machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Machine {
    /// The best that works on this host.
    Auto,
    /// vz's own, on KVM.
    Kvm,
    /// QEMU's microvm, software emulation.
    Qemu,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn parse(more: &[&str]) -> Result<Args, clap::Error> {
        Args::try_parse_from([&["vz-linux-bench"], more].concat())
    }

    #[test]
    fn the_definitions_agree_with_each_other() {
        Args::command().debug_assert();
    }

    #[test]
    fn a_number_of_lines_is_not_needed_and_takes_nothing_else() {
        assert_eq!(parse(&[]).unwrap().guest_logs, None);
        assert_eq!(parse(&["--guest-logs", "--json"]).unwrap().guest_logs, Some(20));
        assert_eq!(parse(&["--guest-logs=3"]).unwrap().guest_logs, Some(3));
        assert_eq!(parse(&["--append", "-x y"]).unwrap().append, "-x y");
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for wrong in [
            &["--iterations", "0"][..],
            &["--timeout-secs", "0"],
            &["--machine", "xen"],
            &["--http-smoke-url", "ftp://x"],
            &["--http-smoke-url", "http://x", "--rootfs-dir", "/"],
            &["stray"],
        ] {
            assert!(parse(wrong).is_err(), "{wrong:?}");
        }
    }
}
