//! Putting a bundle in place, as a whole or not at all.
//!
//! Files are written into a directory beside the target, checked against `version.json` on their way and flushed to the
//! disk; then one rename makes that directory the bundle. Whoever is killed in between leaves the old state and a
//! directory that the next installation removes. One installs at a time in a base directory: the others wait.

use std::{
    fs::{self, DirBuilder, File, OpenOptions, Permissions},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{AT_FDCWD, Flock, FlockArg, RenameFlags, renameat2},
};
use sha2::{Digest, Sha256};

use crate::{KernelProfile, VERSION, VersionInfo, verify::hex};

/// Held while something is installed in a base directory.
const LOCK: &str = ".lock";

/// Where a bundle's files come from.
pub trait Source: std::fmt::Debug + Sync {
    /// What this is, for messages.
    fn name(&self) -> String;
    /// Its `version.json`.
    fn version(&self) -> io::Result<Vec<u8>>;
    /// Writes the file of this name to `to`.
    fn copy(&self, name: &str, to: &mut dyn Write) -> io::Result<()>;
    /// Whether it belongs to the program, whose next version brings another one: what it installs is marked, and only
    /// what is marked is ever replaced without being asked.
    fn belongs_to_program(&self) -> bool {
        false
    }
}

/// In a bundle that belongs to the program that installed it.
const MARK: &str = ".embedded";

/// Whether the bundle in `dir` came from a program itself, and not from this version of it.
pub(crate) fn is_outdated(dir: &Path, source: &dyn Source) -> bool {
    source.belongs_to_program()
        && dir.join(MARK).exists()
        && source.version().is_ok_and(|own| fs::read(dir.join(VERSION)).ok().as_ref() != Some(&own))
}

/// A bundle that is a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Directory(pub PathBuf);

impl Source for Directory {
    fn name(&self) -> String {
        self.0.display().to_string()
    }

    fn version(&self) -> io::Result<Vec<u8>> {
        fs::read(self.0.join(VERSION))
    }

    fn copy(&self, name: &str, mut to: &mut dyn Write) -> io::Result<()> {
        io::copy(&mut File::open(self.0.join(name))?, &mut to).map(drop)
    }
}

/// Why a bundle could not be installed. What was there before is still there.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    /// The source cannot be read.
    #[error("install guest bundle: read {name} of {from}")]
    Read {
        /// The file.
        name: String,
        /// The source.
        from: String,
        /// Why.
        source: io::Error,
    },
    /// The source's `version.json` is malformed.
    #[error("install guest bundle: version.json of {from} is malformed")]
    Malformed {
        /// The source.
        from: String,
        /// Where.
        source: serde_json::Error,
    },
    /// The source is a bundle of another profile.
    #[error("install guest bundle: {from} has profile {found}, not {wanted}")]
    Profile {
        /// The source.
        from: String,
        /// What is wanted.
        wanted: KernelProfile,
        /// What it is.
        found: String,
    },
    /// The source's `version.json` names something that is no file name.
    #[error("install guest bundle: version.json of {from} names {name:?}, which is no file name")]
    Name {
        /// The source.
        from: String,
        /// The name.
        name: String,
    },
    /// A file of the source is not what its `version.json` says.
    #[error(
        "install guest bundle: {name} of {from} does not match its version.json: wanted sha256 {wanted}, found {found}"
    )]
    Mismatch {
        /// The file.
        name: String,
        /// The source.
        from: String,
        /// What version.json says.
        wanted: String,
        /// What it has.
        found: String,
    },
    /// The file system says no: read-only, full, not permitted.
    #[error("install guest bundle: {operation} {path}; install it elsewhere with VZ_LINUX_DIR or --dir", path = path.display())]
    System {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

fn system(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> InstallError {
    let path = path.to_owned();
    move |source| InstallError::System { operation, path, source }
}

/// Installs a bundle as `base`/PROFILE. `is_there` is asked, once nobody else installs, whether that is still needed.
/// Returns the bundle's directory.
pub fn install(
    from: &dyn Source,
    base: &Path,
    profile: KernelProfile,
    is_there: impl FnOnce(&Path) -> bool,
) -> Result<PathBuf, InstallError> {
    let target = base.join(profile.name());
    DirBuilder::new().recursive(true).mode(0o755).create(base).map_err(system("make directory", base))?;
    let _lock = lock(base)?;
    if is_there(&target) {
        return Ok(target);
    }
    remove_leftovers(base, profile)?;
    let staging = tempfile::Builder::new()
        .prefix(&prefix(profile))
        .tempdir_in(base)
        .map_err(system("make directory in", base))?;
    fill(from, profile, staging.path())?;
    fs::set_permissions(staging.path(), Permissions::from_mode(0o755)).map_err(system("open up", staging.path()))?;
    flush(staging.path())?;
    // Only whoever holds the lock comes here, so that what is there stays the same between the two.
    let flags =
        if target.symlink_metadata().is_ok() { RenameFlags::RENAME_EXCHANGE } else { RenameFlags::RENAME_NOREPLACE };
    let renamed = renameat2(AT_FDCWD, staging.path(), AT_FDCWD, &target, flags);
    renamed.map_err(Errno::into).map_err(system("put in place", &target))?;
    flush(base)?;
    // What was exchanged, if anything, is removed with the staging directory.
    if flags == RenameFlags::RENAME_NOREPLACE {
        let _: PathBuf = staging.keep();
    }
    Ok(target)
}

fn lock(base: &Path) -> Result<Flock<File>, InstallError> {
    let path = base.join(LOCK);
    let file = OpenOptions::new().create(true).truncate(false).write(true).mode(0o644).open(&path);
    let file = file.map_err(system("open", &path))?;
    Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, errno)| system("lock", &path)(errno.into()))
}

fn prefix(profile: KernelProfile) -> String {
    format!(".{profile}.")
}

/// Removes what installations have left that were killed. Only with the lock.
fn remove_leftovers(base: &Path, profile: KernelProfile) -> Result<(), InstallError> {
    for entry in fs::read_dir(base).map_err(system("list", base))? {
        let entry = entry.map_err(system("list", base))?;
        if entry.file_name().to_string_lossy().starts_with(&prefix(profile)) {
            fs::remove_dir_all(entry.path()).map_err(system("remove", &entry.path()))?;
        }
    }
    Ok(())
}

/// Writes all files, `version.json` last.
fn fill(from: &dyn Source, profile: KernelProfile, dir: &Path) -> Result<(), InstallError> {
    let read = |name: &str, source| InstallError::Read { name: name.to_owned(), from: from.name(), source };
    let text = from.version().map_err(|e| read(VERSION, e))?;
    let version: VersionInfo =
        serde_json::from_slice(&text).map_err(|source| InstallError::Malformed { from: from.name(), source })?;
    if version.profile != profile.name() {
        return Err(InstallError::Profile { from: from.name(), wanted: profile, found: version.profile });
    }
    for (name, artifact) in &version.artifacts {
        if name.contains('/') || name.starts_with('.') || name.is_empty() || name == VERSION {
            return Err(InstallError::Name { from: from.name(), name: name.clone() });
        }
        let path = dir.join(name);
        let mut file = create(&path, if name == crate::YOUKI { 0o755 } else { 0o644 })?;
        let mut to = Checked { file: &mut file, hash: Sha256::new(), failed: false };
        let copied = from.copy(name, &mut to);
        let (found, failed) = (hex(to.hash), to.failed);
        // Which of the two ends it was.
        match (copied, failed) {
            (Err(source), true) => return Err(system("write", &path)(source)),
            (Err(source), false) => return Err(read(name, source)),
            (Ok(()), _) => {}
        }
        if found != artifact.sha256 {
            let wanted = artifact.sha256.clone();
            return Err(InstallError::Mismatch { name: name.clone(), from: from.name(), wanted, found });
        }
        file.sync_all().map_err(system("write", &path))?;
    }
    let last = if from.belongs_to_program() { Some((MARK, [].as_slice())) } else { None };
    for (name, content) in last.into_iter().chain([(VERSION, text.as_slice())]) {
        let path = dir.join(name);
        let mut file = create(&path, 0o644)?;
        file.write_all(content).and_then(|()| file.sync_all()).map_err(system("write", &path))?;
    }
    Ok(())
}

fn create(path: &Path, mode: u32) -> Result<File, InstallError> {
    let file = OpenOptions::new().write(true).create_new(true).open(path).map_err(system("create", path))?;
    // Whatever the umask is.
    file.set_permissions(Permissions::from_mode(mode)).map_err(system("create", path))?;
    Ok(file)
}

fn flush(dir: &Path) -> Result<(), InstallError> {
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(system("write", dir))
}

/// A file whose content is hashed as it is written.
struct Checked<'a> {
    file: &'a mut File,
    hash: Sha256,
    failed: bool,
}

impl Write for Checked<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.file.write(bytes).inspect_err(|_| self.failed = true)?;
        self.hash.update(bytes.get(..count).unwrap_or_default());
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}
