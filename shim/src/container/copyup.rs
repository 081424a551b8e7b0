//! `tmpcopyup`, an option that podman gives a container's tmpfs mounts (`--tmpfs`, `--read-only`): what the image has
//! below the mount is to be copied into it. The guest's runtime does not know it. Where there is nothing to be copied
//! the option says nothing, and is taken out; elsewhere it is refused, for a container that misses files fails later,
//! and nobody knows why.

use std::{
    io,
    os::fd::BorrowedFd,
    path::{Component, Path, PathBuf},
};

use nix::{dir::Dir, fcntl::OFlag};

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
pub fn settle(spec: &mut Spec, rootfs: BorrowedFd<'_>) -> Result<(), Error> {
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

/// Whether an image has nothing at a path: no such directory, or an empty one. A link on the way may lead anywhere, and
/// is not followed: it counts as something, and so does `..`.
fn is_empty(rootfs: BorrowedFd<'_>, destination: &Path) -> Result<bool, Error> {
    let look = |source: io::Error| Error::Look { path: destination.to_owned(), source };
    if destination.components().any(|part| part == Component::ParentDir) {
        return Ok(false);
    }
    let below = destination.strip_prefix("/").unwrap_or(destination);
    let below = if below.as_os_str().is_empty() { Path::new(".") } else { below };
    match vz_sys::mount::open_beneath(rootfs, below, OFlag::O_RDONLY | OFlag::O_DIRECTORY) {
        Ok(dir) => {
            let mut dir = Dir::from_fd(dir).map_err(|e| look(e.into()))?;
            for entry in dir.iter() {
                let entry = entry.map_err(|e| look(e.into()))?;
                if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
                    return Ok(false);
                }
            }
            Ok(true)
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(true),
        Err(e) if matches!(e.raw_os_error(), Some(libc::ELOOP | libc::ENOTDIR)) => Ok(false),
        Err(e) => Err(look(e)),
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs::{self, File},
        os::{fd::AsFd, unix::fs::symlink},
    };

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
            settle(&mut spec, File::open(rootfs.path()).unwrap().as_fd())
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
