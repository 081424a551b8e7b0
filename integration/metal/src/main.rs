//! A guest without a kernel, in the place of `vmlinux`: it drives its virtio devices itself, as no kernel would. What
//! it does is named on the command line:
//!
//! - `vz.metal=NAME` one of the functions in [`SCENES`]
//! - `vz.own=ID` the container that the VM is for
//! - `vz.victim=ID` another sandbox
//! - `vz.planted=PATH` a directory of the host that is none of the guest's
//! - `vz.device=NUMBER` the one kind of devices, by virtio's number, that the scene is about
//!
//! What it found is on its console, a line each: `refused WHAT ERROR`, `dropped WHAT` for what came back without an
//! answer, `fine WHAT`, and `WRONG ...` for what a host must not do. The last line is `done`.
#![cfg_attr(panic = "abort", no_std, no_main)]
// Builds that unwind only look at the code.
#![cfg_attr(panic = "unwind", allow(dead_code))]

mod boot;
#[cfg(panic = "abort")]
mod compiler;
mod fuse;
mod machine;
mod scenes;
mod virtio;

use machine::say;

type Scene = fn(&Guest<'_>);

const SCENES: [(&str, Scene); 10] = [
    ("names", scenes::names::play),
    ("lies", scenes::lies::play),
    ("chains", scenes::chains::play),
    ("places", scenes::places::play),
    ("registers", scenes::registers::play),
    ("endless", scenes::endless::play),
    ("share", scenes::shares::play),
    ("swap", scenes::shares::swap),
    ("swap-below", scenes::shares::swap_below),
    ("nodes", scenes::shares::nodes),
];

/// What the scenes know.
struct Guest<'c> {
    devices: [Option<virtio::Device>; virtio::MOST],
    own: &'c str,
    victim: &'c str,
    planted: &'c str,
    only: Option<u32>,
}

impl Guest<'_> {
    /// All devices that the scene is about.
    fn devices(&self) -> impl Iterator<Item = virtio::Device> {
        self.devices.iter().flatten().copied().filter(|device| self.only.is_none_or(|only| device.kind == only))
    }

    /// The first of a kind.
    fn device(&self, kind: u32) -> Option<virtio::Device> {
        self.devices().find(|device| device.kind == kind)
    }
}

fn play(command_line: &str) {
    let value = |key: &str| command_line.split_whitespace().find_map(|word| word.strip_prefix(key)).unwrap_or_default();
    let guest = Guest {
        devices: virtio::devices(command_line),
        own: value("vz.own="),
        victim: value("vz.victim="),
        planted: value("vz.planted="),
        only: value("vz.device=").parse().ok(),
    };
    for device in guest.devices() {
        say!("device {} at {:#x}", device.kind, device.base);
    }
    let name = value("vz.metal=");
    match SCENES.iter().find(|(known, _)| *known == name) {
        Some((_, scene)) => scene(&guest),
        None => say!("WRONG: no scene {name:?}"),
    }
    match machine::wrongs() {
        0 => {}
        count => say!("WRONG: {count} times"),
    }
    say!("done");
}

/// Called by the first instructions. It does not end: what a VM that ends does is tested elsewhere.
#[cfg(panic = "abort")]
#[allow(unsafe_code)]
#[unsafe(no_mangle)]
extern "C" fn metal_main(handed: u64, pvh: u32) -> ! {
    play(boot::command_line(handed, pvh == 1));
    loop {
        machine::halt();
    }
}

#[cfg(panic = "abort")]
#[panic_handler]
fn panicked(info: &core::panic::PanicInfo<'_>) -> ! {
    say!("WRONG: {info}");
    machine::end()
}

#[cfg(panic = "unwind")]
fn main() {
    eprintln!("vz-metal: this is a guest, for a VM of its own: see mk/bundle/metal");
}
