//! The guest bundle of the profile `container` for x86-64, as compressed constants, with what it takes to decompress
//! them.
//!
//! ```
//! # #[cfg(payload)]
//! # fn main() -> std::io::Result<()> {
//! use vz_kernel_x86_64::{KERNEL_BYTES, Part};
//!
//! let kernel = Part::Kernel.decompress()?;
//! assert!(kernel.starts_with(b"\x7fELF") && kernel.len() > KERNEL_BYTES.len());
//! # Ok(())
//! # }
//! # #[cfg(not(payload))]
//! # fn main() {}
//! ```
//!
//! Compression is Zstandard's. The agent is in the initramfs and shares most of its libraries with youki, so these two
//! are compressed with the agent as the dictionary, which saves 2.7 MB of 11.5: to decompress them takes the agent, and
//! [`Part`] knows.
//!
//! In vz's repository the payload is made by `make payload`. Where it has not been made this crate has nothing but
//! [`PRESENT`]; with the feature `required` it does not compile then.

/// Whether the payload was there when this was compiled.
pub const PRESENT: bool = cfg!(payload);

#[cfg(payload)]
mod payload;

#[cfg(payload)]
pub use payload::*;
