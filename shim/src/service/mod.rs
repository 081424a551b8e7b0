//! containerd's requests, translated. Nothing is decided here.

pub mod error;
pub mod sandbox;
pub mod task;

pub use error::Error;
