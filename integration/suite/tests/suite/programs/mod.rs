//! The programs besides the shim: vz, the bundle's, the machines and the tests' own checks.

pub mod bench;
pub mod check;
pub mod checker;
pub mod cli;
pub mod linux;
pub mod machine;
