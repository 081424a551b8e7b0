//! What is booted: a guest bundle as it is, one with BusyBox added, or a kernel with another bundle's initramfs.

use std::{
    fs::{self, File},
    io::{self, Read, Seek},
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::Command,
};

use sha2::{Digest, Sha256};
use vz_linux::{Artifact, Bundle, INITRAMFS, KERNEL, VERSION, VersionInfo};
use vz_sys::hex;

use crate::cpio::{self, Archive};

/// What a directory that is no bundle may have instead, the first one first.
const KERNELS: [&str; 2] = [KERNEL, "bzImage"];
/// Where BusyBox and what goes with it is in the guest.
pub const PLACE: &str = "vz-bench";
/// ELF: offsets of the program headers, and the type of the one that names a dynamic loader.
const ELF: &[u8] = b"\x7fELF\x02\x01";
const PT_INTERP: u32 = 3;

/// Why something cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The bundle.
    #[error(transparent)]
    Bundle(#[from] vz_linux::Error),
    /// Neither a bundle nor a kernel.
    #[error("{} has neither a guest bundle (version.json) nor a kernel (vmlinux or bzImage)", .0.display())]
    Nothing(PathBuf),
    /// A file.
    #[error("{action} {}", path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// With which.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// BusyBox.
    #[error("{} is not a static 64-bit program: install BusyBox (Debian: busybox-static), or name one with --busybox", .0.display())]
    Busybox(PathBuf),
    /// The archive.
    #[error("add BusyBox to the initramfs")]
    Archive(#[source] io::Error),
    /// The description.
    #[error("write version.json")]
    Describe(#[source] serde_json::Error),
}

fn file<'p>(action: &'static str, path: &'p Path) -> impl FnOnce(io::Error) -> Error + use<'p> {
    move |source| Error::File { action, path: path.to_owned(), source }
}

/// Something that boots.
#[derive(Debug)]
pub struct Subject {
    /// As it was named.
    pub name: PathBuf,
    /// A directory that is a bundle.
    pub dir: PathBuf,
    /// What it says of itself; a kernel without a bundle says nothing.
    pub version: Option<VersionInfo>,
    /// The version that its agent must have.
    pub agent_version: String,
}

impl Subject {
    /// The bundle in `dir`, with `more` behind its initramfs; what has to be made is made in `work`.
    pub fn bundle(dir: &Path, more: Option<&[u8]>, work: &Path) -> Result<Self, Error> {
        let bundle = Bundle::open(dir)?;
        let version = bundle.version.clone();
        let made = match more {
            None => fs::canonicalize(dir).map_err(file("find", dir))?,
            Some(more) => make(&dir.join(KERNEL), &bundle, more, work)?,
        };
        let agent_version = version.agent_version.clone();
        Ok(Self { name: dir.to_owned(), dir: made, version: Some(version), agent_version })
    }

    /// The bundle or kernel in `dir`; a kernel gets the initramfs of `lender`, with the same `more`.
    pub fn other(dir: &Path, lender: &Path, more: Option<&[u8]>, work: &Path) -> Result<Self, Error> {
        if dir.join(VERSION).symlink_metadata().is_ok() {
            return Self::bundle(dir, more, work);
        }
        let kernel = KERNELS.iter().map(|name| dir.join(name)).find(|path| path.is_file());
        let kernel = kernel.ok_or_else(|| Error::Nothing(dir.to_owned()))?;
        let lent = Bundle::open(lender)?;
        let agent_version = lent.version.agent_version.clone();
        let made = make(&kernel, &lent, more.unwrap_or_default(), work)?;
        Ok(Self { name: dir.to_owned(), dir: made, version: None, agent_version })
    }
}

/// Makes a bundle in `work` of a kernel, and another bundle's initramfs with something behind it.
fn make(kernel: &Path, lender: &Bundle, more: &[u8], work: &Path) -> Result<PathBuf, Error> {
    fs::create_dir_all(work).map_err(file("make", work))?;
    let kernel = fs::canonicalize(kernel).map_err(file("find", kernel))?;
    let target = work.join(KERNEL);
    symlink(&kernel, &target).map_err(file("link", &target))?;

    let target = work.join(INITRAMFS);
    let mut initramfs = Vec::new();
    let mut from = &lender.initramfs;
    from.rewind().and_then(|()| from.read_to_end(&mut initramfs)).map_err(file("read initramfs for", &target))?;
    if !more.is_empty() {
        cpio::align(&mut initramfs);
        initramfs.extend_from_slice(more);
    }
    fs::write(&target, &initramfs).map_err(file("write", &target))?;
    // QEMU runs as another user: what that can open need not be copied at each start.
    fs::set_permissions(&target, fs::Permissions::from_mode(0o644)).map_err(file("open up", &target))?;

    let mut version = lender.version.clone();
    let mut opened = File::open(&kernel).map_err(file("open", &kernel))?;
    let mut content = Vec::new();
    opened.read_to_end(&mut content).map_err(file("read", &kernel))?;
    version.artifacts = [(KERNEL, content.as_slice()), (INITRAMFS, initramfs.as_slice())]
        .map(|(name, content)| {
            let sha256 = hex::encode(&Sha256::digest(content));
            (name.to_owned(), Artifact { sha256, size: u64::try_from(content.len()).ok() })
        })
        .into();
    let target = work.join(VERSION);
    let text = serde_json::to_vec(&version).map_err(Error::Describe)?;
    fs::write(&target, text).map_err(file("write", &target))?;
    Ok(work.to_owned())
}

/// The archive that brings BusyBox into a guest, as the root file system of a container, `/vz-bench`: all its programs
/// in `bin`, `hosts` as its /etc/hosts, and `files` (path in there, mode, content) besides.
pub fn busybox(program: &Path, hosts: &str, files: &[(&str, u32, &str)]) -> Result<Vec<u8>, Error> {
    let content = fs::read(program).map_err(file("read", program))?;
    if !is_static(&content) {
        return Err(Error::Busybox(program.to_owned()));
    }
    let listed = Command::new(program).arg("--list").output().map_err(file("run", program))?;
    let names = String::from_utf8_lossy(&listed.stdout);
    if !listed.status.success() || !names.lines().any(|name| name == "sh") {
        return Err(Error::Busybox(program.to_owned()));
    }
    let mut archive = Archive::default();
    let pack = |archive: &mut Archive| -> io::Result<()> {
        archive.directory(PLACE, 0o755)?;
        for name in ["bin", "dev", "etc", "proc", "sys", "tmp", "lower", "upper", "root"] {
            archive.directory(&format!("{PLACE}/{name}"), if name == "tmp" { 0o1777 } else { 0o755 })?;
        }
        archive.file(&format!("{PLACE}/bin/busybox"), 0o755, &content)?;
        for name in names.lines().filter(|name| *name != "busybox" && !name.contains('/')) {
            archive.link(&format!("{PLACE}/bin/{name}"), "busybox")?;
        }
        archive.file(&format!("{PLACE}/etc/hosts"), 0o644, hosts.as_bytes())?;
        for (path, mode, content) in files {
            archive.file(&format!("{PLACE}/{path}"), *mode, content.as_bytes())?;
        }
        Ok(())
    };
    pack(&mut archive).and_then(|()| archive.finish()).map_err(Error::Archive)
}

/// Whether this is a 64-bit ELF program that needs no loader.
fn is_static(program: &[u8]) -> bool {
    let number = |at: usize, size: usize| -> Option<usize> {
        let mut bytes = [0; 8];
        bytes.get_mut(..size)?.copy_from_slice(program.get(at..at.checked_add(size)?)?);
        usize::try_from(u64::from_le_bytes(bytes)).ok()
    };
    let interpreted = || {
        let (table, size, count) = (number(32, 8)?, number(54, 2)?, number(56, 2)?);
        let mut kinds = (0..count).map(|index| number(table.checked_add(size.checked_mul(index)?)?, 4));
        kinds.try_fold(false, |found, kind| Some(found || kind? == PT_INTERP as usize))
    };
    program.starts_with(ELF) && interpreted() == Some(false)
}

#[cfg(test)]
mod tests {
    use std::error::Error as _;

    use serde_json::json;

    use super::*;

    fn sha256(content: &[u8]) -> String {
        hex::encode(&Sha256::digest(content))
    }

    fn write_bundle(dir: &Path) {
        fs::create_dir_all(dir).unwrap();
        fs::write(dir.join(KERNEL), "kernel").unwrap();
        fs::write(dir.join(INITRAMFS), "initr").unwrap();
        let version = json!({
            "schema": 1, "bundle_version": "1", "agent_version": "7", "youki_version": "1", "kernel_version": "6",
            "profile": "container", "security_profile": "constrained",
            "artifacts": { KERNEL: { "sha256": sha256(b"kernel") }, INITRAMFS: { "sha256": sha256(b"initr") } },
        });
        fs::write(dir.join(VERSION), version.to_string()).unwrap();
    }

    #[test]
    fn a_bundle_is_booted_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        write_bundle(dir.path());
        let subject = Subject::bundle(dir.path(), None, &dir.path().join("work")).unwrap();
        assert_eq!(subject.dir, fs::canonicalize(dir.path()).unwrap());
        assert!(!dir.path().join("work").exists());
    }

    #[test]
    fn what_is_added_is_in_a_copy_that_is_a_bundle_too() {
        let dir = tempfile::tempdir().unwrap();
        let (from, work) = (dir.path().join("from"), dir.path().join("work"));
        write_bundle(&from);
        let subject = Subject::bundle(&from, Some(b"more"), &work).unwrap();
        assert_eq!(subject.dir, work);
        assert_eq!(fs::read(work.join(INITRAMFS)).unwrap(), b"initr\0\0\0more");
        assert_eq!(Bundle::open_with_cache(&work, None).unwrap().version.agent_version, "7");
        assert_eq!(fs::read(from.join(INITRAMFS)).unwrap(), b"initr");
    }

    #[test]
    fn a_kernel_alone_gets_the_others_initramfs() {
        let dir = tempfile::tempdir().unwrap();
        let (from, other) = (dir.path().join("from"), dir.path().join("other"));
        write_bundle(&from);
        fs::create_dir(&other).unwrap();
        let refused = Subject::other(&other, &from, None, &dir.path().join("w0")).unwrap_err();
        assert!(refused.to_string().contains("neither a guest bundle"), "{refused}");
        fs::write(other.join("bzImage"), "another").unwrap();
        let subject = Subject::other(&other, &from, None, &dir.path().join("w1")).unwrap();
        assert_eq!((subject.version, subject.agent_version.as_str()), (None, "7"));
        assert_eq!(fs::read(subject.dir.join(KERNEL)).unwrap(), b"another");
        Bundle::open_with_cache(&subject.dir, None).unwrap();
    }

    #[test]
    fn a_tampered_bundle_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        write_bundle(dir.path());
        fs::write(dir.path().join(INITRAMFS), "other").unwrap();
        let refused = Subject::bundle(dir.path(), None, &dir.path().join("work")).unwrap_err();
        let cause = refused.source().unwrap().to_string();
        assert!(cause.contains(INITRAMFS), "{refused}: {cause}");
    }

    #[test]
    fn programs_that_need_a_loader_or_are_none_are_not_busybox() {
        assert!(!is_static(b""));
        assert!(!is_static(b"\x7fELF\x02\x01"));
        assert!(!is_static(&fs::read("/proc/self/exe").unwrap()));
        let script = Path::new("/etc/passwd");
        assert!(matches!(busybox(script, "", &[]), Err(Error::Busybox(_))));
        assert!(matches!(busybox(Path::new("/nowhere"), "", &[]), Err(Error::File { .. })));
    }
}
