//! Booting a root file system of the host's: a directory, shared with the guest as `rootfs`, below an overlay that
//! takes what is written, entered by chroot. Init is a script of BusyBox's; what it has to say comes over the console.

use crate::{
    phases::{Line, mark},
    subject::PLACE,
};

/// The virtiofs tag.
pub const TAG: &str = "rootfs";
/// Around what init reports on the console.
const BEGIN: &str = "vz-linux-bench: report";
const OUTPUT: &str = "vz-linux-bench: output";
const STATUS: &str = "vz-linux-bench: status ";
const END: &str = "vz-linux-bench: end";
const FAILED: &str = "vz-linux-bench: cannot ";

/// Why a boot did not come to its end.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A step of init's.
    #[error("the guest's init cannot {what}: {said}")]
    Step {
        /// Which.
        what: String,
        /// What its program said.
        said: String,
    },
    /// The console ends too early.
    #[error("the guest ended before it had reported; the last that it said: {0}")]
    Cut(String),
}

/// What init reported.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// The kernel's log.
    pub log: Vec<Line>,
    /// The command's exit code and output, where there was one.
    pub output: Option<(u32, String)>,
}

/// The kernel argument that starts the script.
pub fn kernel_argument() -> String {
    format!("rdinit=/{PLACE}/init")
}

/// The script. It runs `command` in the root file system, with its shell or, where it has none, BusyBox's.
pub fn init(command: Option<&str>) -> String {
    // The command is in a file of its own, so that its quotes are its own business. A link to the shell may be
    // absolute.
    let command = command.map_or(String::new(), |_| {
        format!(
            "shell='/.vz-linux-bench/sh'\n\
             if [ -e root/bin/sh ] || [ -L root/bin/sh ]; then shell=/bin/sh; fi\n\
             echo '{OUTPUT}'\n\
             PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin /{PLACE}/bin/chroot root $shell -c \"$(cat command)\" 2>&1\n\
             echo \"{STATUS}$?\"\n"
        )
    });
    format!(
        "#!/{PLACE}/bin/busybox sh\n\
         export PATH=/{PLACE}/bin\n\
         cd /{PLACE}\n\
         mount -t devtmpfs dev /dev && echo '<6>{init}' >/dev/kmsg\n\
         exec >/dev/console 2>&1 </dev/console\n\
         # Nothing of the kernel's between our lines.\n\
         dmesg -n 1\n\
         step() {{\n  what=$1; shift\n  \"$@\" || {{ echo \"{FAILED}$what\"; stty sane; reboot -f; }}\n}}\n\
         step 'mount proc' mount -t proc proc /proc\n\
         step 'mount the shared directory' mount -t virtiofs {TAG} lower\n\
         step 'mount a tmpfs' mount -t tmpfs tmpfs upper\n\
         step 'make directories' mkdir upper/files upper/work\n\
         step 'mount an overlay' mount -t overlay -o lowerdir=lower,upperdir=upper/files,workdir=upper/work overlay root\n\
         echo '<6>{root}' >/dev/kmsg\n\
         step 'make directories in the root file system' mkdir -p root/dev root/proc root/sys root/tmp\n\
         step 'mount dev' mount -t devtmpfs dev root/dev\n\
         step 'mount proc' mount -t proc proc root/proc\n\
         step 'mount sys' mount -t sysfs sys root/sys\n\
         step 'make directories in the root file system' mkdir root/.vz-linux-bench\n\
         step 'bring BusyBox into the root file system' mount -o bind bin root/.vz-linux-bench\n\
         step 'run a program in the root file system' chroot root /.vz-linux-bench/sh -c 'echo \"<6>{chroot}\" >/dev/kmsg'\n\
         {command}\
         echo '{BEGIN}'\n\
         dmesg\n\
         echo '{END}'\n\
         # Waits until all of it has been written.\n\
         stty sane\n\
         reboot -f\n",
        init = mark::INIT,
        root = mark::ROOT,
        chroot = mark::CHROOT,
    )
}

/// Reads what init wrote on the console.
pub fn report(console: &str) -> Result<Report, Error> {
    let lines: Vec<&str> = console.lines().map(|line| line.trim_end_matches('\r')).collect();
    let at = |mark: &str| lines.iter().position(|line| *line == mark);
    let failed = lines.iter().enumerate().find_map(|(at, line)| Some((at, line.strip_prefix(FAILED)?)));
    if let Some((at, what)) = failed {
        let said = at.checked_sub(1).and_then(|before| lines.get(before)).copied().unwrap_or("no reason is known");
        return Err(Error::Step { what: what.to_owned(), said: said.to_owned() });
    }
    let (Some(begin), Some(end)) = (at(BEGIN), at(END)) else {
        let last = lines.iter().rev().find(|line| !line.trim().is_empty()).copied();
        return Err(Error::Cut(last.unwrap_or("nothing").to_owned()));
    };
    let log = lines.get(begin + 1..end).unwrap_or_default().iter().filter_map(|line| parse(line)).collect();
    let output = at(OUTPUT).and_then(|from| {
        let text = lines.get(from + 1..begin)?;
        let (last, text) = text.split_last()?;
        let status = last.strip_prefix(STATUS)?.parse().ok()?;
        Some((status, text.iter().map(|line| format!("{line}\n")).collect()))
    });
    Ok(Report { log, output })
}

/// A line as dmesg prints it: `[    1.028195] text`.
fn parse(line: &str) -> Option<Line> {
    let (time, text) = line.strip_prefix('[')?.split_once("] ")?;
    let (seconds, micros) = time.trim().split_once('.')?;
    let (seconds, micros): (u64, u64) = (seconds.parse().ok()?, micros.parse().ok()?);
    Some(Line { time_us: seconds.checked_mul(1_000_000)?.checked_add(micros)?, text: text.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_read_whatever_is_around_it() {
        let console = "noise\r\nvz-linux-bench: output\r\nhello\r\nworld\r\nvz-linux-bench: status 3\r\n\
                       vz-linux-bench: report\r\n[    0.000000] Linux version 6\r\nnot a line\r\n[   12.000345] Run [x] y\r\n\
                       vz-linux-bench: end\r\n[   13.0] reboot: machine restart\r\n";
        let report = report(console).unwrap();
        assert_eq!(report.output, Some((3, "hello\nworld\n".into())));
        let line = |time_us, text: &str| Line { time_us, text: text.into() };
        assert_eq!(report.log, [line(0, "Linux version 6"), line(12_000_345, "Run [x] y")]);
    }

    #[test]
    fn what_went_wrong_is_said() {
        let step = report("noise\r\nmount: no\r\nvz-linux-bench: cannot mount an overlay\r\n").unwrap_err();
        assert_eq!(step.to_string(), "the guest's init cannot mount an overlay: mount: no");
        let cut = report("vz-linux-bench: report\nKernel panic\n\n").unwrap_err();
        assert!(cut.to_string().ends_with("said: Kernel panic"), "{cut}");
        assert!(report("").unwrap_err().to_string().ends_with("nothing"));
    }

    #[test]
    fn a_script_runs_a_command_only_where_there_is_one() {
        assert!(!init(None).contains("cat command"));
        let with = init(Some("uname -r"));
        assert!(with.contains("cat command") && !with.contains("uname"));
        assert!(with.starts_with("#!/vz-bench/bin/busybox sh\n"));
        assert!(with.contains(mark::CHROOT));
    }
}
