//! The end of the VM.

use std::{io::Write, panic::PanicHookInfo, path::Path};

use nix::{
    sys::reboot::{RebootMode, reboot},
    unistd::sync,
};

/// Writes what is cached and ends the VM.
fn off() -> ! {
    sync();
    // Without ACPI nothing can switch the machine off; the kernel's command line and the VMM make a reboot its end.
    let modes = if Path::new("/sys/firmware/acpi").exists() {
        [RebootMode::RB_POWER_OFF, RebootMode::RB_AUTOBOOT]
    } else {
        [RebootMode::RB_AUTOBOOT, RebootMode::RB_POWER_OFF]
    };
    for mode in modes {
        let _ = reboot(mode);
    }
    // The kernel panics when PID 1 ends, and a panic ends the VM too.
    std::process::exit(1)
}

/// Says on the console why PID 1 cannot go on, and ends the VM.
pub fn fatal(why: &str) -> ! {
    say(&format!("vz-agent: fatal: {why}\n"));
    off()
}

/// The panic hook: a panic of PID 1 is fatal, one of its children is that child's end.
pub fn panicked(info: &PanicHookInfo<'_>) {
    let at = info.location().map(ToString::to_string).unwrap_or_default();
    let why = info.payload_as_str().unwrap_or("no message");
    if std::process::id() == 1 {
        fatal(&format!("panic at {at}: {why}"));
    }
    say(&format!("vz-agent: child {} panicked at {at}: {why}\n", std::process::id()));
}

fn say(line: &str) {
    let console = std::fs::OpenOptions::new().write(true).open("/dev/console");
    // Standard error is the console too, and open even where devtmpfs could not be mounted.
    let said = console.and_then(|mut console| console.write_all(line.as_bytes()));
    if said.is_err() {
        let _ = std::io::stderr().write_all(line.as_bytes());
    }
}
