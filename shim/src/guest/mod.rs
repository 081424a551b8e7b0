//! The other end of the sandbox: its VM, and the agent that answers in it.

pub mod agent;
pub mod answers;
pub mod forward;
pub mod metrics;
pub mod vmm;
