//! Where the unsafe system calls live: everything above calls these through safe signatures.
//!
//! Invariants: no global state, no allocation between fork and exec, every descriptor that is handed out is
//! owned and close-on-exec.

pub mod block;
pub mod bpf;
pub mod channel;
pub mod error;
pub mod fd;
pub mod fork;
pub mod hex;
#[cfg(feature = "memory")]
pub mod memory;
pub mod mount;
pub mod namespace;
pub mod process;
pub mod random;
pub mod rate;
pub mod sigsys;
pub mod sk_lookup;
pub mod socket;
pub mod surroundings;
pub mod sync;
pub mod tap;
pub mod thread;
pub mod tsc;
pub mod tty;
