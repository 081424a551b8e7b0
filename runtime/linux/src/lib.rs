//! Guest bundles: a directory of `vmlinux`, `initramfs.img`, `youki` and the `version.json` that names their checksums.
//!
//! Invariant: a file that [`Bundle::open`] hands out had, when it was verified, exactly the content that `version.json`
//! names, and it is handed out as the open descriptor that was verified, so that swapping the path changes nothing.

mod bundle;
mod verify;
mod version;

pub use bundle::{Bundle, Error};
pub use verify::VerifyError;
pub use version::{Artifact, SCHEMA, VersionInfo};

/// Name of the uncompressed kernel in a bundle.
pub const KERNEL: &str = "vmlinux";
/// Name of the initramfs in a bundle.
pub const INITRAMFS: &str = "initramfs.img";
/// Name of the description in a bundle.
pub const VERSION: &str = "version.json";
