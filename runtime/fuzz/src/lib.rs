//! Fuzz targets for everything that parses what a guest says.
//!
//! A target turns bytes into a program of a hostile guest's driver, runs it against a device, and panics where the
//! device did what it must not: panicked, wrote outside of the guest's buffers, returned what was not its own. The same
//! targets are run by libFuzzer (`make fuzz`) and, over the committed corpus, by `cargo test`.

mod answers;
mod devices;
mod guest;
mod mmio;
mod program;
mod proto;
mod ring;
mod values;

/// Runs one input. An error says that the target cannot run here, and why.
pub type Target = fn(&[u8]) -> Result<(), String>;

/// All of them, by name.
pub const TARGETS: [(&str, Target); 10] = [
    ("answers", answers::run),
    ("balloon", guest::run::<devices::balloon::Guest>),
    ("blk", guest::run::<devices::blk::Guest>),
    ("console", guest::run::<devices::console::Guest>),
    ("fs", guest::run::<devices::fs::Guest>),
    ("mmio", mmio::run),
    ("net", guest::run::<devices::net::Guest>),
    ("proto", proto::run),
    ("rng", guest::run::<devices::rng::Guest>),
    ("vsock", guest::run::<devices::vsock::Guest>),
];

/// The target of that name.
pub fn target(name: &str) -> Option<Target> {
    TARGETS.iter().find(|(target, _)| *target == name).map(|(_, target)| *target)
}
