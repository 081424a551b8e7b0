//! What a hostile guest, a hung guest and a busy host must not do.

pub mod endings;
pub mod escape;
pub mod host_side;
pub mod hostile;
pub mod metal;
