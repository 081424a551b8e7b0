//! The home directory of a process's user, which it gets as `HOME` where its environment has none.
//!
//! libcontainer would ask the C library, inside of the container: a static one then loads what the container's
//! `nsswitch.conf` names, for which it was not built. runc reads `/etc/passwd`, and so does this.

use std::{fs::File, io::Read, os::fd::AsFd, path::Path};

use nix::{
    fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2},
    sys::stat::Mode,
};
use oci_spec::runtime::Process;

/// Most bytes of `/etc/passwd` that are read.
const LIMIT: u64 = 1024 * 1024;
/// Where there is no entry, as with runc.
const NONE: &str = "/";

/// Gives the process a `HOME`, by the `/etc/passwd` below `root`.
pub fn settle(process: &mut Process, root: &Path) {
    let env = process.env().as_deref().unwrap_or_default();
    if env.iter().any(|e| e.strip_prefix("HOME=").is_some_and(|home| !home.is_empty())) {
        return;
    }
    let home = passwd(root).and_then(|p| home(&p, process.user().uid()).map(ToOwned::to_owned));
    let mut env: Vec<_> = env.iter().filter(|e| !e.starts_with("HOME=")).cloned().collect();
    env.push(format!("HOME={}", home.as_deref().unwrap_or(NONE)));
    process.set_env(Some(env));
}

/// The container controls what is below its root: it can neither lead outside nor make this wait.
fn passwd(root: &Path) -> Option<String> {
    let root = open(root, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty()).ok()?;
    let how = OpenHow::new()
        .flags(OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_NOCTTY | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    let file = File::from(openat2(root.as_fd(), "etc/passwd", how).ok()?);
    if !file.metadata().ok()?.is_file() {
        return None;
    }
    let mut bytes = Vec::new();
    file.take(LIMIT).read_to_end(&mut bytes).ok()?;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

/// Field 6 of the first entry whose field 3 is the uid.
fn home(passwd: &str, uid: u32) -> Option<&str> {
    let is_of = |line: &&str| line.split(':').nth(2).and_then(|u| u.parse().ok()) == Some(uid);
    let home = passwd.lines().find(is_of)?.split(':').nth(5)?;
    home.starts_with('/').then_some(home)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nbroken\nuser:x:1000:1000::/home/user:\nodd:x:5:5::relative:\n";

    #[test]
    fn entries_are_found_by_uid() {
        assert_eq!(home(PASSWD, 0), Some("/root"));
        assert_eq!(home(PASSWD, 1000), Some("/home/user"));
        assert_eq!(home(PASSWD, 5), None);
        assert_eq!(home(PASSWD, 7), None);
    }

    #[test]
    fn a_home_is_given_to_who_has_none() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("etc")).unwrap();
        std::fs::write(root.path().join("etc/passwd"), PASSWD).unwrap();
        let process = |env: &str, uid: u32| -> Process {
            let json = format!(r#"{{"cwd":"/","user":{{"uid":{uid},"gid":0}},"env":[{env}]}}"#);
            let mut process = serde_json::from_str(&json).unwrap();
            settle(&mut process, root.path());
            process
        };
        assert_eq!(process("", 1000).env().as_deref(), Some(["HOME=/home/user".to_owned()].as_slice()));
        assert_eq!(process("\"HOME=\"", 7).env().as_deref(), Some(["HOME=/".to_owned()].as_slice()));
        assert_eq!(process("\"HOME=/x\"", 0).env().as_deref(), Some(["HOME=/x".to_owned()].as_slice()));
    }

    #[test]
    fn a_link_does_not_lead_outside() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("etc")).unwrap();
        std::os::unix::fs::symlink("../../../../../../etc/passwd", root.path().join("etc/passwd")).unwrap();
        assert_eq!(passwd(root.path()), None);
    }
}
