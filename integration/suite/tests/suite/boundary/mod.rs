//! Hostile guests, hung guests and busy hosts: they harm nobody else.

pub mod endings;
pub mod escape;
pub mod host_side;
pub mod hostile;
pub mod metal;
