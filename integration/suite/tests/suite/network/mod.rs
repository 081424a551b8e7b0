//! Networks of containers.

pub mod net;
pub mod net_faults;
pub mod net_same;
