//! Namespaces and shared memory that several containers of a VM use.

use std::{
    fs, io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::statvfs::statvfs,
};
use oci_spec::runtime::Spec;
use vz_proto::{NAMESPACES_PATH, SHM_PATH};

use super::error::{CallError, Result};
use crate::text;

/// Puts the paths of namespaces into a spec that names them by their containers. `init` tells the pid of a container's
/// init that runs.
pub fn join(spec: &mut Spec, mut init: impl FnMut(&str) -> Result<i32>) -> Result<()> {
    let Some(linux) = spec.linux_mut().as_mut() else { return Ok(()) };
    for namespace in linux.namespaces_mut().iter_mut().flatten() {
        let path = namespace.path().clone().unwrap_or_default();
        let Ok(named) = path.strip_prefix(NAMESPACES_PATH) else { continue };
        let owner = named.parent().and_then(Path::to_str).unwrap_or_default();
        let kind = named.file_name().unwrap_or_default();
        let pid = init(owner)?;
        namespace.set_path(Some(Path::new("/proc").join(pid.to_string()).join("ns").join(kind)));
    }
    Ok(())
}

/// Makes the shared memory that a spec has as sources of mounts, unless it is there.
pub fn make_memory(spec: &mut Spec) -> Result<()> {
    for mount in spec.mounts_mut().iter_mut().flatten() {
        let Some(owner) = mount.source().as_ref().and_then(|source| source.strip_prefix(SHM_PATH).ok()) else {
            continue;
        };
        let owner = owner.to_str().filter(|owner| text::is_id(owner));
        let owner = owner.ok_or_else(|| CallError::Invalid("shared memory belongs to no container".into()))?;
        let path = memory(owner);
        let options = mount.options().clone().unwrap_or_default();
        let (size, others): (Vec<String>, _) = options.into_iter().partition(|option| option.starts_with("size="));
        make(&path, size.first().map_or("", String::as_str)).map_err(CallError::io("make shared memory"))?;
        mount.set_options(Some(others));
    }
    Ok(())
}

/// Takes the shared memory of a container's IPC namespace away; containers that still have it keep it.
pub fn remove_memory(owner: &str) -> io::Result<()> {
    let path = memory(owner);
    match umount2(&path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
        Err(Errno::ENOENT) => Ok(()),
        // It was not mounted: what making it has left.
        Err(Errno::EINVAL) | Ok(()) => fs::remove_dir(&path),
        Err(e) => Err(e.into()),
    }
}

fn memory(owner: &str) -> PathBuf {
    Path::new(SHM_PATH).join(owner)
}

fn make(path: &Path, size: &str) -> io::Result<()> {
    match fs::DirBuilder::new().mode(0o700).create(path) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => return grow(path, size),
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            fs::DirBuilder::new().mode(0o700).recursive(true).create(path)?;
        }
        made => made?,
    }
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let data = format!("mode=1777{}{size}", if size.is_empty() { "" } else { "," });
    mount(Some("shm"), path, Some("tmpfs"), flags, Some(data.as_str())).map_err(|e| {
        // Without it, the next container would take the directory for the memory.
        drop(fs::remove_dir(path));
        e.into()
    })
}

/// Gives it the larger one of its size and `size`, an option of tmpfs: a container may bring more for all.
fn grow(path: &Path, size: &str) -> io::Result<()> {
    let has = statvfs(path)?;
    let has = has.blocks().saturating_mul(has.fragment_size());
    let wanted = size.strip_prefix("size=").and_then(bytes);
    if wanted.is_none_or(|wanted| wanted <= has) {
        return Ok(());
    }
    let flags = MsFlags::MS_REMOUNT | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    Ok(mount(None::<&str>, path, None::<&str>, flags, Some(size))?)
}

/// A size as tmpfs takes it, where it is a number of bytes.
fn bytes(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match text.get(digits.len()..)?.to_ascii_lowercase().as_str() {
        "" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(linux: &str) -> Spec {
        serde_json::from_str(&format!(r#"{{"ociVersion":"1.0.2","linux":{{"namespaces":[{linux}]}}}}"#)).unwrap()
    }

    #[test]
    fn namespaces_of_other_containers_are_those_of_their_inits() {
        let mut spec =
            spec(r#"{"type":"ipc","path":"/run/vz/ns/pause/ipc"},{"type":"pid"},{"type":"uts","path":"/x"}"#);
        join(&mut spec, |owner| {
            assert_eq!(owner, "pause");
            Ok(17)
        })
        .unwrap();
        let linux = spec.linux().clone().unwrap();
        let paths: Vec<_> = linux.namespaces().iter().flatten().map(|n| n.path().clone()).collect();
        assert_eq!(paths, [Some("/proc/17/ns/ipc".into()), None, Some("/x".into())]);
    }

    #[test]
    fn sizes_are_tmpfs_own() {
        let found = ["65536k", "1G", "7", "50%", "", "x", "18446744073709551615g"].map(bytes);
        assert_eq!(found, [Some(64 << 20), Some(1 << 30), Some(7), None, None, None, None]);
    }

    #[test]
    fn a_container_that_has_ended_cannot_be_joined() {
        let mut spec = spec(r#"{"type":"ipc","path":"/run/vz/ns/pause/ipc"}"#);
        let error = join(&mut spec, |owner| Err(CallError::no_container(owner))).unwrap_err();
        assert!(error.to_string().contains("pause"), "{error}");
    }
}
