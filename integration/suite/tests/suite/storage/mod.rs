//! Files, volumes, locks and disks.

pub mod disks;
pub mod files;
pub mod locks;
pub mod volumes;
