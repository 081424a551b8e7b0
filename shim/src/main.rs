//! `containerd-shim-vz-v2`: containerd's shim of the runtime `io.containerd.vz.v2`.
//!
//! One program in several roles: called by containerd (`start`, `delete`, `-info`, `-v`), as the daemon of a sandbox
//! (without an action), executed by `start` to watch over that daemon (`watch`), and re-executed by the daemon as its
//! VM's process (`vmm`) and a container's pid on the host (`anchor`).

use std::{env, process::ExitCode};

mod bootstrap;
mod complaint;
mod container;
mod daemon;
mod events;
mod fd;
mod guest;
mod host;
mod limit;
mod log;
mod parts;
mod report;
mod sandbox;
mod service;
mod spec;

fn main() -> ExitCode {
    let args: Vec<_> = env::args_os().collect();
    match (args.get(1).and_then(|arg| arg.to_str()), args.get(2)) {
        (Some("vmm"), None) => vz_machine::vmm::main(),
        (Some("anchor"), Some(_)) => host::anchor::main(),
        _ => bootstrap::main(&args[1..]),
    }
}
