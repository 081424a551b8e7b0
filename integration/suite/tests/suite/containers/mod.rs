//! One container as ctr, nerdctl and the shim's callers see it.

pub mod crash;
pub mod errors;
pub mod events;
pub mod exec;
pub mod lifecycle;
pub mod oci;
pub mod options;
pub mod run;
pub mod stdio;
