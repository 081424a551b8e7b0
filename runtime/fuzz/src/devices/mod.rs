//! The devices, each with what a guest says to it and what goes on around it.

pub(crate) mod balloon;
pub(crate) mod blk;
pub(crate) mod console;
pub(crate) mod fs;
pub(crate) mod net;
pub(crate) mod rng;
pub(crate) mod vsock;
