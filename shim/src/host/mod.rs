//! What a sandbox owns on this host, and how that is taken away.

pub mod anchor;
pub mod cgroup;
pub mod disks;
pub mod etc_files;
pub mod hooks;
pub mod journal;
pub mod mirror;
pub mod mount_table;
pub mod network;
pub mod offload;
pub mod oom;
pub mod share;
pub mod socket;
