//! How likely the host's kernel is to end a sandbox's processes when memory is short.
//!
//! The score is that of the spec (`process.oomScoreAdj`), for the VM's process, for QEMU, which inherits it, and for
//! the container's anchor, from before they take any memory. Without one it is 0, or the shim's own if that is higher:
//! they would inherit containerd's otherwise, which is often -999, and everybody else on the host would be ended before
//! a VM is.

use std::io;

use nix::unistd::Pid;
use oci_spec::runtime::Spec;
use vz_sys::process::{own_oom_score, set_oom_score};

/// The spec asks for a score that no process can have.
#[derive(Debug, thiserror::Error)]
#[error("process.oomScoreAdj is {0}, must be from -1000 to 1000")]
pub struct Error(i32);

/// A score.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Score {
    value: i32,
    /// Whether somebody has asked for it.
    asked: bool,
}

impl Score {
    /// That of a container with this spec.
    pub fn of(spec: &Spec) -> Result<Self, Error> {
        // A host without these scores has nothing to inherit either.
        Self::choose(spec, own_oom_score().unwrap_or(0))
    }

    fn choose(spec: &Spec, own: i32) -> Result<Self, Error> {
        let wanted = spec.process().as_ref().and_then(oci_spec::runtime::Process::oom_score_adj);
        match wanted {
            Some(value) if (-1000..=1000).contains(&value) => Ok(Self { value, asked: true }),
            Some(value) => Err(Error(value)),
            None => Ok(Self { value: own.max(0), asked: false }),
        }
    }

    /// Gives it to a process.
    pub fn set(self, pid: Pid) -> io::Result<()> {
        match set_oom_score(pid, self.value) {
            Err(error) if self.asked => {
                let what = format!("set oom_score_adj to {} (process.oomScoreAdj): {error}", self.value);
                Err(io::Error::new(error.kind(), what))
            }
            // Nothing but the order is lost.
            Err(error) => {
                tracing::warn!(%error, score = self.value, "oom_score_adj stays as it is");
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn choose(score: Option<i32>, own: i32) -> Result<Score, Error> {
        let process = json!({ "cwd": "/", "user": { "uid": 0, "gid": 0 }, "args": ["x"], "oomScoreAdj": score });
        let spec = json!({ "ociVersion": "1.2.0", "root": { "path": "rootfs" }, "process": process });
        Score::choose(&serde_json::from_value(spec).unwrap(), own)
    }

    #[test]
    fn the_spec_says_or_nobody_is_spared() {
        let value = |score, own| choose(score, own).unwrap().value;
        assert_eq!((value(Some(-500), 0), value(Some(300), -999), value(Some(0), 100)), (-500, 300, 0));
        assert_eq!((value(None, -999), value(None, 0), value(None, 500)), (0, 0, 500));
        assert!(choose(Some(1001), 0).unwrap_err().to_string().contains("process.oomScoreAdj is 1001"));
    }

    #[test]
    fn a_process_gets_it() {
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        let pid = Pid::from_raw(i32::try_from(child.id()).unwrap());
        choose(Some(777), 0).unwrap().set(pid).unwrap();
        assert_eq!(std::fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).unwrap().trim(), "777");
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(choose(Some(777), 0).unwrap().set(pid).is_err());
        choose(None, 0).unwrap().set(pid).unwrap();
    }
}
