//! The guest bundle of the profile `container` for the processor that is compiled for: one crate for each has the
//! bytes, and this one picks. See [`Part`] for what is in it, and `vz_linux` for how it gets to be a bundle on a disk.

#[cfg(target_arch = "x86_64")]
pub use vz_kernel_x86_64::*;

#[cfg(all(feature = "required", not(target_arch = "x86_64")))]
compile_error!("there is no guest bundle to embed for this processor: there is one for x86_64");
