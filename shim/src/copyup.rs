//! `tmpcopyup`, an option that podman gives a container's tmpfs mounts (`--tmpfs`, `--read-only`): what the image has below
//! the mount is to be copied into it. The guest's runtime does not know it. Where there is nothing to be copied the option says
//! nothing, and is taken out; elsewhere it is refused, for a container that misses files fails later, and nobody knows why.

use std::{
    fs, io,
    path::{Component, Path, PathBuf},
};

use oci_spec::runtime::Spec;

const OPTION: &str = "tmpcopyup";

/// Why a tmpfs cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is something to be copied.
    #[error(
        "mounts: tmpcopyup on {0}: the image has files there, which cannot be copied into a tmpfs of the VM: \
         leave the mount out, or add notmpcopyup to its options (podman: --tmpfs {0}:notmpcopyup, --read-only-tmpfs=false)"
    )]
    Files(PathBuf),
    /// It could not be looked at.
    #[error("mounts: tmpcopyup: look at {path}")]
    Look {
        /// Where.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

/// Takes the option out of a spec, given the mounted root file system.
pub fn settle(spec: &mut Spec, rootfs: &Path) -> Result<(), Error> {
    for mount in spec.mounts_mut().iter_mut().flatten() {
        let Some(options) = mount.options().clone().filter(|all| all.iter().any(|option| option == OPTION)) else {
            continue;
        };
        if !is_empty(rootfs, mount.destination())? {
            return Err(Error::Files(mount.destination().clone()));
        }
        mount.set_options(Some(options.into_iter().filter(|option| option != OPTION).collect()));
    }
    Ok(())
}

/// Whether an image has nothing at a path: no such directory, or an empty one. A link on the way may lead anywhere, and is not
/// followed: it counts as something.
fn is_empty(rootfs: &Path, destination: &Path) -> Result<bool, Error> {
    let mut path = rootfs.to_owned();
    for part in destination.components() {
        match part {
            Component::Normal(name) => path.push(name),
            Component::ParentDir => return Ok(false),
            _ => continue,
        }
        match fs::symlink_metadata(&path) {
            Ok(meta) if meta.is_dir() => {}
            Ok(_) => return Ok(false),
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(true),
            Err(source) => return Err(Error::Look { path, source }),
        }
    }
    match fs::read_dir(&path) {
        Ok(mut entries) => Ok(entries.next().is_none()),
        Err(source) => Err(Error::Look { path, source }),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_to_be_copied_is_refused_and_nothing_is_nothing() {
        let rootfs = tempfile::tempdir().unwrap();
        fs::create_dir_all(rootfs.path().join("full/inner")).unwrap();
        fs::create_dir(rootfs.path().join("empty")).unwrap();
        symlink("/nowhere", rootfs.path().join("link")).unwrap();
        let settled = |destination: &str| {
            let mount = json!({ "destination": destination, "type": "tmpfs", "source": "tmpfs", "options": ["rw", "tmpcopyup"] });
            let mut spec: Spec = serde_json::from_value(json!({ "ociVersion": "1.0.2", "mounts": [mount] })).unwrap();
            settle(&mut spec, rootfs.path())
                .map(|()| serde_json::to_value(spec).unwrap()["mounts"][0]["options"].clone())
        };
        for destination in ["/empty", "/none", "/none/below", "/full/inner"] {
            assert_eq!(settled(destination).unwrap(), json!(["rw"]), "{destination}");
        }
        for destination in ["/full", "/link", "/link/x", "/empty/../full"] {
            assert!(settled(destination).unwrap_err().to_string().contains("notmpcopyup"), "{destination}");
        }
    }
}
