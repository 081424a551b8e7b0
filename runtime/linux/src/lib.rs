//! Guest bundles: a directory of `vmlinux`, `initramfs.img`, `youki` and the `version.json` that names their checksums.
//!
//! [`ensure_kernel_bundle`] is the way in for programs that boot one themselves; `vz vm linux` is the same for people.
//!
//! Invariant: a file that [`Bundle::open`] hands out had, when it was verified, exactly the content that `version.json`
//! names, and it is handed out as the open descriptor that was verified, so that swapping the path changes nothing.

mod bundle;
#[cfg(feature = "embedded")]
mod embedded;
mod ensure;
mod install;
mod locate;
mod profile;
mod verify;
mod version;

pub use bundle::{Bundle, Error};
pub use ensure::{
    AGENT_VERSION, EnsureError, KernelBundle, KernelBundleOptions, YOUKI_VERSION, embedded, ensure_kernel,
    ensure_kernel_bundle, ensure_kernel_profile, find_or_install, locate,
};
pub use install::{Directory, InstallError, Source, install};
pub use locate::{DIR_VARIABLE, Places, STATE, SYSTEM, in_base};
pub use profile::{KernelProfile, UnknownProfile};
pub use verify::VerifyError;
pub use version::{Artifact, SCHEMA, VERSION_SCHEMA, VersionInfo};

/// Name of the uncompressed kernel in a bundle.
pub const KERNEL: &str = "vmlinux";
/// Name of the initramfs in a bundle.
pub const INITRAMFS: &str = "initramfs.img";
/// Name of the static youki program in a bundle.
pub const YOUKI: &str = "youki";
/// Name of the description in a bundle.
pub const VERSION: &str = "version.json";
