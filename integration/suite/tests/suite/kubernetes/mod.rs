//! Pods, as containerd's CRI plugin makes them: in both of its ways, by a pause container and by the Sandbox API.

pub mod pods;
