//! The built-in machine: a small x86-64 PC on KVM.
//!
//! It has memory, vCPUs, KVM's own interrupt controllers, virtio-mmio devices, a serial port for early messages, and
//! ACPI tables that describe all of it. A kernel is entered by the 64-bit Linux boot protocol: no firmware, no PCI.
//!
//! Device backends come from `vz-virtio` and know nothing of this crate. Each of their workers has a thread here, each
//! vCPU another one; all are started by `vz-jail`, which confines them.
//!
//! Threat: the guest decides about every exit, every register access and everything in its memory. What it does is
//! served, ignored or ends its own VM with a cause ([`End`]); nothing of it panics or grows.

#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::panic
)]
#![cfg_attr(test, allow(clippy::arithmetic_side_effects))]

use std::{io, sync::Arc};

use vz_sys::error::chain;
use vz_virtio::Kind;

mod acpi;
mod boot;
mod bus;
mod device;
mod end;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod image;
mod join;
mod layout;
mod machine;
mod memory;
mod mmio;
mod ports;
mod register;
mod register_page;
mod vcpu;
mod x86;

pub use end::{End, Processor};
pub use machine::{Config, Ending, MAX_DEVICES, MAX_VCPUS, Machine, Running, kernel_arguments};

/// Called, from any thread of the machine, when that thread failed: the machine cannot go on.
pub type OnFailure = Arc<dyn Fn(String) + Send + Sync>;

/// Why a machine cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// KVM refused something.
    #[error("{operation} (KVM)")]
    Kvm {
        /// What was asked.
        operation: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// A system call failed.
    #[error("{operation}")]
    System {
        /// Which.
        operation: &'static str,
        /// Why.
        source: io::Error,
    },
    /// Guest memory is not a number of pages.
    #[error("guest memory of {0} bytes is not a whole number of pages")]
    MemorySize(u64),
    /// Guest memory cannot be had.
    #[error("reserve {bytes} bytes of guest memory")]
    Memory {
        /// How much.
        bytes: u64,
        /// Why not.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Guest memory has no room for what must be in it.
    #[error("guest has {memory} bytes of low memory, its kernel and initramfs need {needed}: give the VM more memory")]
    TooLittle {
        /// What there is.
        memory: u64,
        /// What would be needed.
        needed: u64,
    },
    /// Something cannot be written to guest memory.
    #[error("write {what} to guest memory")]
    Place {
        /// What.
        what: &'static str,
        /// Why not.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Something would lie where it must not.
    #[error("address {0:#x} is outside of its part of guest memory")]
    Layout(u64),
    /// The kernel is not one.
    #[error("load kernel: {0}: the guest bundle is damaged or of another kind")]
    Kernel(String),
    /// The initramfs cannot be read.
    #[error("read initramfs")]
    Initramfs {
        /// Why.
        source: io::Error,
    },
    /// The command line is too long, or has a zero byte.
    #[error("kernel command line of {len} bytes: at most {most}, without zero bytes: shorten guest.kernel_args")]
    Cmdline {
        /// Its length.
        len: usize,
        /// The largest.
        most: usize,
    },
    /// Too many vCPUs, or none.
    #[error("a VM has 1 to {MAX_VCPUS} vCPUs, not {0}")]
    Vcpus(u32),
    /// Too many devices.
    #[error("a VM has at most {MAX_DEVICES} devices, not {0}")]
    Devices(usize),
    /// A device without anybody who serves it.
    #[error("device has no worker")]
    NoWorkers,
    /// The workers of a device do not serve each queue once.
    #[error("queues of device {0:?} are not served once each")]
    Queues(Kind),
    /// KVM knows more CPUID leaves than fit.
    #[error("too many CPUID leaves")]
    Cpuid,
    /// A list of MSRs did not fit.
    #[error("list of MSRs")]
    Msrs,
    /// KVM does not take an MSR.
    #[error("KVM refused MSR {0:#x}")]
    Msr(u32),
    /// A backend could not be prepared.
    #[error("prepare device")]
    Backend(#[source] vz_virtio::Error),
    /// A thread does not start.
    #[error("start thread {name}")]
    Thread {
        /// Its name.
        name: String,
        /// Why.
        source: io::Error,
    },
}

impl Error {
    fn kvm(operation: &'static str) -> impl Fn(kvm_ioctls::Error) -> Self {
        move |e| Self::Kvm { operation, source: io::Error::from_raw_os_error(e.errno()) }
    }

    fn system(operation: &'static str) -> impl Fn(io::Error) -> Self {
        move |source| Self::System { operation, source }
    }

    fn place<E: std::error::Error + Send + Sync + 'static>(what: &'static str) -> impl Fn(E) -> Self {
        move |e| Self::Place { what, source: Box::new(e) }
    }
}
