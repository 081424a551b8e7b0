//! Opening a bundle: read `version.json`, open the files, verify them.

use std::{
    fs::File,
    io,
    path::{Path, PathBuf},
};

use crate::{INITRAMFS, KERNEL, SCHEMA, VERSION, VerifyError, VersionInfo, YOUKI, verify::verify};

/// Where checksums of verified files are remembered until the next boot of the host, below [`vz_state::ROOT`]. The
/// other names there are containerd's namespaces, none of which begins with a dot.
const CACHE: &str = ".verified";

/// The cache for this user: what others could write there would count for us.
pub(crate) fn cache() -> Option<PathBuf> {
    if nix::unistd::geteuid().is_root() {
        return Some(Path::new(vz_state::ROOT).join(CACHE));
    }
    // The user's own, and gone with the session.
    let dir = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|dir| dir.is_absolute())?;
    Some(dir.join("vz/verified"))
}

/// A verified bundle: what is in the files is what `version.json` says.
#[derive(Debug)]
pub struct Bundle {
    /// `vmlinux`, open for reading, at offset 0 or its end.
    pub kernel: File,
    /// `initramfs.img`, likewise.
    pub initramfs: File,
    /// `version.json`.
    pub version: VersionInfo,
}

/// Why a bundle cannot be used. Each names the directory.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// `version.json` is missing or cannot be read.
    #[error("no guest bundle in {dir}: read version.json")]
    Missing {
        /// The bundle's directory.
        dir: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// `version.json` is not what it should be.
    #[error("guest bundle {dir}: version.json is malformed")]
    Malformed {
        /// The bundle's directory.
        dir: PathBuf,
        /// Where.
        source: serde_json::Error,
    },
    /// `version.json` is of another schema.
    #[error(
        "guest bundle {dir}: version.json has schema {found}, this runtime reads {SCHEMA}; install a matching bundle"
    )]
    Schema {
        /// The bundle's directory.
        dir: PathBuf,
        /// Its schema.
        found: u32,
    },
    /// `version.json` does not name a file that every bundle has.
    #[error("guest bundle {dir}: version.json names no checksum for {name}")]
    Unlisted {
        /// The bundle's directory.
        dir: PathBuf,
        /// The file's name.
        name: String,
    },
    /// A file is missing or cannot be opened.
    #[error("guest bundle {dir}: open {name}")]
    Open {
        /// The bundle's directory.
        dir: PathBuf,
        /// The file's name.
        name: String,
        /// Why.
        source: io::Error,
    },
    /// A file is not what `version.json` says.
    #[error("guest bundle {dir}")]
    Verify {
        /// The bundle's directory.
        dir: PathBuf,
        /// Which file, wanted and found.
        source: VerifyError,
    },
}

impl Bundle {
    /// Reads `version.json` in `dir`, without looking at the other files.
    pub fn describe(dir: &Path) -> Result<VersionInfo, Error> {
        let text = std::fs::read(dir.join(VERSION)).map_err(|source| Error::Missing { dir: dir.to_owned(), source })?;
        let version: VersionInfo =
            serde_json::from_slice(&text).map_err(|source| Error::Malformed { dir: dir.to_owned(), source })?;
        if version.schema != SCHEMA {
            return Err(Error::Schema { dir: dir.to_owned(), found: version.schema });
        }
        Ok(version)
    }

    /// Opens the bundle in `dir` and verifies what a boot needs of it.
    pub fn open(dir: &Path) -> Result<Self, Error> {
        Self::open_with_cache(dir, cache().as_deref())
    }

    /// As [`Bundle::open`], with checksums remembered in `cache`, where there is one.
    pub fn open_with_cache(dir: &Path, cache: Option<&Path>) -> Result<Self, Error> {
        let version = Self::describe(dir)?;
        let kernel = open(dir, KERNEL, &version, cache)?;
        let initramfs = open(dir, INITRAMFS, &version, cache)?;
        Ok(Self { kernel, initramfs, version })
    }

    /// Verifies every file of the bundle in `dir`.
    pub(crate) fn verify_all(dir: &Path, cache: Option<&Path>) -> Result<VersionInfo, Error> {
        let version = Self::describe(dir)?;
        for name in [KERNEL, INITRAMFS, YOUKI] {
            if !version.artifacts.contains_key(name) {
                return Err(Error::Unlisted { dir: dir.to_owned(), name: name.to_owned() });
            }
        }
        for name in version.artifacts.keys() {
            open(dir, name, &version, cache)?;
        }
        Ok(version)
    }
}

fn open(dir: &Path, name: &str, version: &VersionInfo, cache: Option<&Path>) -> Result<File, Error> {
    let of = || (dir.to_owned(), name.to_owned());
    let unlisted = || {
        let (dir, name) = of();
        Error::Unlisted { dir, name }
    };
    let artifact = version.artifacts.get(name).ok_or_else(unlisted)?;
    let mut file = File::open(dir.join(name)).map_err(|source| {
        let (dir, name) = of();
        Error::Open { dir, name, source }
    })?;
    verify(&mut file, name, &artifact.sha256, cache).map_err(|source| Error::Verify { dir: dir.to_owned(), source })?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use std::{error::Error as _, fs};

    use serde_json::json;

    use super::*;

    const EMPTY: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    fn write(dir: &Path, schema: u32) {
        fs::write(dir.join(KERNEL), "").unwrap();
        fs::write(dir.join(INITRAMFS), "").unwrap();
        let version = json!({
            "schema": schema, "bundle_version": "1", "agent_version": "1", "youki_version": "1", "kernel_version": "6",
            "profile": "container", "security_profile": "constrained", "new_field": true,
            "artifacts": { KERNEL: { "sha256": EMPTY }, INITRAMFS: { "sha256": EMPTY, "size": 0 } },
        });
        fs::write(dir.join(VERSION), version.to_string()).unwrap();
    }

    #[test]
    fn a_whole_bundle_opens_and_a_tampered_one_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let cache = dir.path().join("cache");
        write(dir.path(), SCHEMA);
        assert_eq!(Bundle::open_with_cache(dir.path(), Some(&cache)).unwrap().version.profile, "container");
        fs::write(dir.path().join(INITRAMFS), "evil").unwrap();
        let error = Bundle::open_with_cache(dir.path(), Some(&cache)).unwrap_err();
        assert!(error.source().unwrap().to_string().contains(INITRAMFS), "{error:?}");
        fs::remove_file(dir.path().join(KERNEL)).unwrap();
        let error = Bundle::open_with_cache(dir.path(), Some(&cache)).unwrap_err().to_string();
        assert!(error.contains("open vmlinux"), "{error}");
    }

    #[test]
    fn another_schema_and_no_bundle_say_so() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(Bundle::describe(dir.path()), Err(Error::Missing { .. })));
        write(dir.path(), 99);
        assert!(matches!(Bundle::describe(dir.path()), Err(Error::Schema { found: 99, .. })));
        fs::write(dir.path().join(VERSION), "{").unwrap();
        assert!(matches!(Bundle::describe(dir.path()), Err(Error::Malformed { .. })));
    }
}
