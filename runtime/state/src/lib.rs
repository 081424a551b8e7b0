//! What vz's programs know of each other's sandboxes: where their state is on the host, and what is in it.
//!
//! [`ROOT`] has a directory NAMESPACE/ID for each sandbox, and a few files with a leading dot that are the host's. A
//! sandbox's journal is a file of JSON lines, each a [`Line`]: its shim writes it, `vz` reads it, and so does a shim of
//! the next version, so that its form is fixed.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use vz_sys::process::Identity;

/// Where all sandboxes keep their state; a tmpfs on every host that has systemd.
pub const ROOT: &str = "/run/vz";
/// The name of a sandbox's journal in its directory.
pub const JOURNAL: &str = "journal";
/// The name of the file with the last of its guest's console.
pub const CONSOLE: &str = "console.log";
/// The role of the shim's own process.
pub const SHIM: &str = "shim";
/// The role of the process of the VM.
pub const VMM: &str = "vmm";
/// What a sandbox's daemon reports once its VM is on the way; anything else is why there is none.
pub const READY: &str = "ready\n";

/// Something that a sandbox owns on the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Resource {
    /// A process; `start_time` tells it from a later one with its pid.
    Process {
        /// What it is, for people.
        role: String,
        /// Its pid on the host.
        pid: i32,
        /// Field 22 of /proc/PID/stat.
        start_time: u64,
    },
    /// A hook that runs: what it does must be done before its counterpart undoes it.
    Hook {
        /// Its pid on the host.
        pid: i32,
        /// Field 22 of /proc/PID/stat.
        start_time: u64,
    },
    /// A unix socket.
    Socket {
        /// Its path.
        path: PathBuf,
        /// Its inode, by which it is told from a later one at the same path.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        inode: Option<u64>,
    },
    /// A directory of a cgroup.
    Cgroup {
        /// Its path.
        path: PathBuf,
    },
    /// The redirection of a link's packets, in a network namespace that outlives the sandbox.
    Redirect {
        /// Where the namespace is.
        netns: PathBuf,
        /// The link's index.
        index: u32,
        /// The link's name.
        link: String,
    },
    /// poststop hooks of a container that are still to be run.
    Poststop {
        /// The container's id.
        id: String,
        /// Its bundle, with the config.json that names them.
        bundle: PathBuf,
    },
}

impl Resource {
    /// Which process it is, where it is one.
    pub fn process(&self) -> Option<Identity> {
        match *self {
            Self::Process { pid, start_time, .. } | Self::Hook { pid, start_time } => {
                Some(Identity { pid, start_time })
            }
            _ => None,
        }
    }
}

/// A line of a journal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Line {
    /// Written before it is made, or as soon as it can be named.
    Made(Resource),
    /// It is gone.
    Gone(Resource),
}

/// The state directory of a sandbox. Both names must be free of `/`.
pub fn dir(namespace: &str, id: &str) -> PathBuf {
    Path::new(ROOT).join(namespace).join(id)
}

/// What the sandbox in `dir` owns by its journal, in the order in which it was made.
///
/// A line that is none goes to `unreadable`. The last line may be cut short by a full disk or a kill: what it announced
/// was then never made.
pub fn read(dir: &Path, unreadable: impl FnMut(&serde_json::Error)) -> io::Result<Vec<Resource>> {
    let bytes = fs::read(dir.join(JOURNAL))?;
    Ok(owned(&String::from_utf8_lossy(&bytes), unreadable))
}

fn owned(text: &str, mut unreadable: impl FnMut(&serde_json::Error)) -> Vec<Resource> {
    let mut made = Vec::new();
    for line in text.lines().filter(|line| !line.is_empty()) {
        match serde_json::from_str(line) {
            Ok(Line::Made(resource)) => made.push(resource),
            Ok(Line::Gone(resource)) => made.retain(|r| *r != resource),
            Err(error) => unreadable(&error),
        }
    }
    made
}

#[cfg(test)]
mod tests {
    use super::*;

    fn socket(path: &str, inode: Option<u64>) -> Resource {
        Resource::Socket { path: path.into(), inode }
    }

    /// One of each, as they stand in journals on hosts.
    const LINES: [&str; 6] = [
        r#"{"made":{"kind":"process","role":"shim","pid":7,"start_time":42}}"#,
        r#"{"made":{"kind":"hook","pid":8,"start_time":43}}"#,
        r#"{"made":{"kind":"socket","path":"/s","inode":3}}"#,
        r#"{"made":{"kind":"cgroup","path":"/sys/fs/cgroup/c1"}}"#,
        r#"{"made":{"kind":"redirect","netns":"/n","index":2,"link":"eth0"}}"#,
        r#"{"gone":{"kind":"poststop","id":"c1","bundle":"/b"}}"#,
    ];

    #[test]
    fn the_form_of_lines_is_fixed() {
        for text in LINES {
            let line: Line = serde_json::from_str(text).unwrap();
            assert_eq!(serde_json::to_string(&line).unwrap(), text);
        }
    }

    #[test]
    fn a_journal_of_the_version_before_is_read() {
        assert_eq!(owned(r#"{"made":{"kind":"socket","path":"/s"}}"#, |e| panic!("{e}")), [socket("/s", None)]);
    }

    #[test]
    fn what_is_gone_is_not_owned_and_what_cannot_be_read_is_passed_over() {
        let dir = tempfile::tempdir().unwrap();
        let (one, two) = (socket("/1", Some(1)), socket("/2", None));
        let mut bytes = b"\xff\xfe\n\n{\"made\":{\"kind\":\"of a later version\"}}\n".to_vec();
        for line in [Line::Made(one.clone()), Line::Made(two.clone()), Line::Gone(one)] {
            bytes.extend(serde_json::to_vec(&line).unwrap());
            bytes.push(b'\n');
        }
        bytes.extend(b"{\"made\":{\"kind\":\"sock");
        fs::write(dir.path().join(JOURNAL), bytes).unwrap();
        let mut unreadable = 0;
        assert_eq!(read(dir.path(), |_| unreadable += 1).unwrap(), [two]);
        assert_eq!(unreadable, 3);
        assert_eq!(read(&dir.path().join("none"), |_| ()).unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn processes_and_hooks_can_be_told_from_later_ones() {
        let made = LINES.join("\n");
        let processes: Vec<_> = owned(&made, |_| ()).iter().filter_map(Resource::process).collect();
        assert_eq!(processes, [Identity { pid: 7, start_time: 42 }, Identity { pid: 8, start_time: 43 }]);
    }
}
