//! Checksums of large files, remembered for as long as the file is untouched.
//!
//! A remembered checksum is keyed by device and inode and holds for the same size, mtime and ctime. The cache directory
//! belongs to root; who can write there can already replace the program that reads it.

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt},
    path::Path,
};

use sha2::{Digest, Sha256};

/// Why a file is not what it should be.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// It could not be read.
    #[error("read {name}")]
    Read {
        /// The file's name in the bundle.
        name: String,
        /// Why.
        source: io::Error,
    },
    /// Its content is something else.
    #[error(
        "{name} does not match version.json: wanted sha256 {wanted}, found {found}; build or install the bundle again"
    )]
    Mismatch {
        /// The file's name in the bundle.
        name: String,
        /// What version.json says.
        wanted: String,
        /// What it has.
        found: String,
    },
}

/// Checks that `file` has the SHA-256 `wanted`. What is found is remembered in `cache`, where there is one.
pub(crate) fn verify(file: &mut File, name: &str, wanted: &str, cache: Option<&Path>) -> Result<(), VerifyError> {
    let read = |source| VerifyError::Read { name: name.to_owned(), source };
    let stamp = Stamp::of(file).map_err(read)?;
    let found = match cache.and_then(|cache| stamp.recall(cache)) {
        Some(found) => found,
        None => {
            let found = checksum(file).map_err(read)?;
            // Only what stayed the same while it was read may be remembered.
            if let Some(cache) = cache
                && Stamp::of(file).map_err(read)? == stamp
                && let Err(error) = stamp.remember(cache, &found)
            {
                tracing::warn!(%error, name, cache = %cache.display(), "checksum is not remembered");
            }
            found
        }
    };
    if found == wanted {
        return Ok(());
    }
    Err(VerifyError::Mismatch { name: name.to_owned(), wanted: wanted.to_owned(), found })
}

fn checksum(file: &mut File) -> io::Result<String> {
    let mut hash = Sha256::new();
    // A MiB would stay in the heap for as long as the process lives.
    let mut buffer = vec![0; 64 << 10];
    loop {
        match file.read(&mut buffer)? {
            0 => break,
            n => hash.update(&buffer[..n]),
        }
    }
    Ok(hex(hash))
}

/// The digest, as `version.json` has it.
pub(crate) fn hex(hash: Sha256) -> String {
    vz_sys::hex::encode(&hash.finalize())
}

/// What changes whenever a file's content does.
#[derive(Debug, PartialEq, Eq)]
struct Stamp {
    key: String,
    value: String,
}

impl Stamp {
    fn of(file: &File) -> io::Result<Self> {
        let m = file.metadata()?;
        Ok(Self {
            key: format!("{:x}-{:x}", m.dev(), m.ino()),
            value: format!("{} {}.{:09} {}.{:09}", m.size(), m.mtime(), m.mtime_nsec(), m.ctime(), m.ctime_nsec()),
        })
    }

    fn recall(&self, cache: &Path) -> Option<String> {
        let text = fs::read_to_string(cache.join(&self.key)).ok()?;
        let (found, value) = text.split_once(' ')?;
        (value == self.value && found.len() == 64).then(|| found.to_owned())
    }

    fn remember(&self, cache: &Path, found: &str) -> io::Result<()> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(cache)?;
        let mut file = tempfile::NamedTempFile::new_in(cache)?;
        write!(file, "{found} {}", self.value)?;
        file.persist(cache.join(&self.key))?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EMPTY: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    fn check(path: &Path, cache: &Path, wanted: &str) -> Result<(), VerifyError> {
        verify(&mut File::open(path).unwrap(), "vmlinux", wanted, Some(cache))
    }

    #[test]
    fn a_change_is_found_although_the_checksum_was_remembered() {
        let dir = tempfile::tempdir().unwrap();
        let (path, cache) = (dir.path().join("vmlinux"), dir.path().join("cache"));
        fs::write(&path, "").unwrap();
        check(&path, &cache, EMPTY).unwrap();
        assert_eq!(fs::read_dir(&cache).unwrap().count(), 1);
        check(&path, &cache, EMPTY).unwrap();
        fs::write(&path, "tampered").unwrap();
        let error = check(&path, &cache, EMPTY).unwrap_err().to_string();
        assert!(error.contains("vmlinux") && error.contains(EMPTY), "{error}");
    }

    #[test]
    fn a_remembered_checksum_is_used() {
        let dir = tempfile::tempdir().unwrap();
        let (path, cache) = (dir.path().join("vmlinux"), dir.path().join("cache"));
        fs::write(&path, "content").unwrap();
        let stamp = Stamp::of(&File::open(&path).unwrap()).unwrap();
        stamp.remember(&cache, EMPTY).unwrap();
        check(&path, &cache, EMPTY).unwrap();
    }

    #[test]
    fn a_cache_that_cannot_be_written_is_no_failure() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vmlinux");
        fs::write(&path, "").unwrap();
        check(&path, &path.join("not-a-directory"), EMPTY).unwrap();
    }
}
