//! The guest's PID 1.
//!
//! It mounts what a Linux system needs, moves into an overlayfs over the initramfs, and stays: single-threaded, the
//! reaper of every orphan and the only process that forks. What it forks is the [`server`], which talks to the shim,
//! and one short-lived [`container`] worker for each call of libcontainer. The table of containers and their stdio
//! lives in [`init`], so that a server that dies is started again and no container notices.
//!
//! Threat: containers of this VM are hostile to the agent, and the agent trusts the host. Nothing here may panic on
//! what a container did; a PID 1 that cannot go on says so on the console and ends the VM.

#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::panic
)]
#![cfg_attr(test, allow(clippy::arithmetic_side_effects))]

mod boot;
mod clock;
mod container;
mod home;
mod init;
mod log;
mod net;
mod paths;
mod power;
mod protocol;
mod server;
mod text;

fn main() {
    let first = clock::Moment::now();
    if std::process::id() != 1 {
        println!("vz-agent {}: the init of a vz guest; does nothing anywhere else", env!("CARGO_PKG_VERSION"));
        return;
    }
    std::panic::set_hook(Box::new(power::panicked));
    let log = log::install(log::Kernel);
    if let Err(e) = boot::root() {
        power::fatal(&text::chain(&e));
    }
    let init = match init::Init::start(first, log) {
        Ok(init) => init,
        Err(e) => power::fatal(&text::chain(&e)),
    };
    if let Err(e) = boot::rest() {
        power::fatal(&text::chain(&e));
    }
    init.run()
}
