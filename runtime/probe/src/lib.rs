//! Whether this host's KVM can run a guest, found out by running one.
//!
//! That `/dev/kvm` opens says little: there are KVMs that emulate their guests instruction by instruction, a thousand
//! times slower than the processor, and give up on instructions that every kernel has. So [`probe`] makes a VM of one
//! page of code in 64-bit mode, and has it execute some of these instructions and a loop whose time tells a processor
//! from an emulator.
//!
//! It runs in a child process of its own under a deadline: whatever KVM does to it, the caller gets an answer in time.
//!
//! `unsafe` is in `vm.rs` only: to give guest memory to KVM, and to read an exit's details, which are a C union.

mod guard;
mod payload;
mod unusable;
mod vm;

use std::time::Duration;

use nix::errno::Errno;
use serde::{Deserialize, Serialize};

pub use payload::Payload;
pub use unusable::Unusable;

/// Time for the whole of a probe. A KVM that runs its guests on the processor takes some milliseconds, one that
/// emulates them has shown it within a tenth of a second, and on a processor that is emulated itself two seconds were
/// seen. So whoever takes longer hangs.
pub const DEADLINE: Duration = Duration::from_secs(5);
/// The device.
pub const DEVICE: &str = "/dev/kvm";

/// How fast a KVM that works is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Speed {
    /// CPU time of an iteration of a loop of two instructions, in picoseconds.
    pub loop_ps: u64,
}

/// An open `/dev/kvm`.
#[derive(Debug)]
pub struct Kvm(kvm_ioctls::Kvm);

impl Kvm {
    /// Opens the device, and asks for its version and for what the built-in machine cannot do without. This is cheap,
    /// and what it finds can change at any time; what a guest finds stays.
    pub fn open() -> Result<Self, Unusable> {
        let kvm = kvm_ioctls::Kvm::new().map_err(|e| match Errno::from_raw(e.errno()) {
            Errno::ENOENT => Unusable::Missing,
            Errno::ENODEV | Errno::ENXIO => Unusable::NoDriver,
            Errno::EACCES | Errno::EPERM => Unusable::Permission,
            Errno::EBUSY => Unusable::Busy,
            errno => Unusable::failed("open /dev/kvm", errno),
        })?;
        vm::check(&kvm)?;
        Ok(Self(kvm))
    }

    /// Runs the guest. For a process with one thread.
    pub fn probe(&self) -> Result<Speed, Unusable> {
        self.run(&Payload::default(), DEADLINE)
    }

    /// As [`Kvm::probe`], with another guest and deadline.
    pub fn run(&self, payload: &Payload<'_>, deadline: Duration) -> Result<Speed, Unusable> {
        guard::guarded(deadline, || vm::run(&self.0, payload))
    }
}
