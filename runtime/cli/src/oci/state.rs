//! What the container commands know of a container: one directory for each below `--root`.
//!
//! | file | what |
//! | --- | --- |
//! | `state.json` | this module's [`State`], replaced as a whole |
//! | `task` | the socket of the sandbox's daemon |
//! | `exec` | the socket of the process that keeps the container, for those that keep its exec processes |
//! | `exec-NAME` | a process that keeps an exec process |
//! | `shim.log` | what the daemon says |
//! | `config.toml` | what `--kernel-profile` adds to the configuration |
//!
//! The directory is locked (flock) while its container is being made or taken away. What the sandbox itself owns is in
//! its journal, below /run/vz.

use std::{
    collections::BTreeMap,
    fs::{self, DirBuilder, File},
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd},
        unix::fs::DirBuilderExt,
    },
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use vz_sys::{hex, process::Identity};

use super::error::Error;

/// Where containers are without `--root`.
pub const ROOT: &str = "/run/vz-oci";
const STATE: &str = "state.json";
/// The runtime specification that this is about.
pub const OCI_VERSION: &str = "1.2.0";

/// What is known of a container.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// The version of its specification.
    pub oci_version: String,
    /// Its id.
    pub id: String,
    /// Its bundle.
    pub bundle: PathBuf,
    /// Its root file system.
    pub rootfs: PathBuf,
    /// When it was made, RFC 3339.
    pub created: String,
    /// Its annotations.
    pub annotations: BTreeMap<String, String>,
    /// The sandbox's namespace.
    pub namespace: String,
    /// The shim's program.
    pub shim: PathBuf,
    /// Who makes it.
    #[serde(with = "Form")]
    pub creator: Identity,
    /// Its process on the host.
    #[serde(with = "form_or_none", default)]
    pub init: Option<Identity>,
    /// Whether its creation is done; the daemon knows it before that.
    pub made: bool,
}

/// The form that a process has in these files.
#[derive(Serialize, Deserialize)]
#[serde(remote = "Identity")]
struct Form {
    pid: i32,
    #[serde(rename = "start")]
    start_time: u64,
}

/// A process in that form.
#[derive(Serialize, Deserialize)]
#[serde(transparent)]
struct Noted(#[serde(with = "Form")] Identity);

/// One that there may be.
mod form_or_none {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};
    use vz_sys::process::Identity;

    use super::Noted;

    pub(super) fn serialize<S: Serializer>(process: &Option<Identity>, to: S) -> Result<S::Ok, S::Error> {
        process.map(Noted).serialize(to)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Identity>, D::Error> {
        Ok(Option::<Noted>::deserialize(from)?.map(|noted| noted.0))
    }
}

/// A container's directory, open.
#[derive(Debug)]
pub struct Dir {
    path: PathBuf,
    id: String,
    file: File,
}

/// Whether an id is one that runc takes too.
pub fn check_id(id: &str) -> Result<(), Error> {
    let fits = |c: char| c.is_ascii_alphanumeric() || "_+-.".contains(c);
    if id.is_empty() || id.len() > 255 || id == "." || id == ".." || !id.chars().all(fits) {
        return Err(Error::Id(id.to_owned()));
    }
    Ok(())
}

/// The namespace of the sandboxes of a root: containers of two roots may have one name.
pub fn namespace(root: &Path) -> String {
    if root == Path::new(ROOT) {
        return "oci".into();
    }
    let hash = Sha256::digest(root.as_os_str().as_encoded_bytes());
    format!("oci-{}", hex::encode(hash.get(..6).unwrap_or(&hash)))
}

impl Dir {
    /// Makes that of a new container; it is locked until the returned value is dropped.
    pub fn create(root: &Path, id: &str) -> Result<Self, Error> {
        check_id(id)?;
        let dirs = |path: &Path, recursive| DirBuilder::new().recursive(recursive).mode(0o700).create(path);
        dirs(root, true).map_err(Error::at("make", root))?;
        let path = root.join(id);
        match dirs(&path, false) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => return Err(Error::Exists(id.to_owned())),
            other => other.map_err(Error::at("make", &path))?,
        }
        let this = Self::open_path(path, id)?;
        this.file.lock().map_err(Error::at("lock", &this.path))?;
        Ok(this)
    }

    /// That of a container that there is.
    pub fn open(root: &Path, id: &str) -> Result<Self, Error> {
        check_id(id)?;
        Self::open_path(root.join(id), id)
    }

    fn open_path(path: PathBuf, id: &str) -> Result<Self, Error> {
        match File::open(&path) {
            Ok(file) => Ok(Self { path, id: id.to_owned(), file }),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Err(Error::Missing(id.to_owned())),
            Err(e) => Err(Error::at("open", path)(e)),
        }
    }

    /// The ids below a root.
    pub fn list(root: &Path) -> Result<Vec<String>, Error> {
        let entries = match fs::read_dir(root) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.map_err(Error::at("list", root))?,
        };
        let mut ids: Vec<_> = entries
            .flatten()
            .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .collect();
        ids.sort();
        Ok(ids)
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The container's id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// A path to something in it that is short enough for a socket's address, for as long as this is open.
    pub fn short(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}/{name}", self.file.as_raw_fd()))
    }

    /// Takes the lock; false where somebody has it.
    pub fn try_lock(&self) -> Result<bool, Error> {
        match self.file.try_lock() {
            Ok(()) => Ok(true),
            Err(fs::TryLockError::WouldBlock) => Ok(false),
            Err(fs::TryLockError::Error(e)) => Err(Error::at("lock", &self.path)(e)),
        }
    }

    /// Takes the lock, once nobody else has it.
    pub fn lock(&self) -> Result<(), Error> {
        self.file.lock().map_err(Error::at("lock", &self.path))
    }

    /// Reads the state; none where it has not been written yet.
    pub fn read(&self) -> Result<Option<State>, Error> {
        let path = self.path.join(STATE);
        match fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text).map(Some).map_err(|source| Error::Json { path, source }),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(Error::at("read", path)(e)),
        }
    }

    /// Writes the state, as a whole or not at all.
    pub fn write(&self, state: &State) -> Result<(), Error> {
        let text = serde_json::to_vec(state).map_err(|source| Error::Json { path: self.path.join(STATE), source })?;
        replace(&self.path.join(STATE), &text)
    }

    /// Removes it with all that is in it, the state last.
    pub fn remove(&self) -> Result<(), Error> {
        let path = &self.path;
        for entry in fs::read_dir(path).map_err(Error::at("list", path))? {
            let entry = entry.map_err(Error::at("list", path))?;
            if entry.file_name() != STATE {
                gone(entry.path())?;
            }
        }
        gone(path.join(STATE))?;
        fs::remove_dir(path).map_err(Error::at("remove", path))
    }

    /// Its keeper notes an exec process that it keeps.
    pub fn note_exec(&self, name: &str, keeper: Identity) -> Result<(), Error> {
        let path = self.path.join(format!("exec-{name}"));
        let text = serde_json::to_vec(&Noted(keeper)).map_err(|source| Error::Json { path: path.clone(), source })?;
        replace(&path, &text)
    }

    /// Who keeps exec processes here.
    pub fn execs(&self) -> Vec<Identity> {
        let Ok(entries) = fs::read_dir(&self.path) else { return Vec::new() };
        let noted = entries.flatten().filter(|entry| entry.file_name().as_encoded_bytes().starts_with(b"exec-"));
        noted
            .filter_map(|entry| serde_json::from_slice::<Noted>(&fs::read(entry.path()).ok()?).ok())
            .map(|noted| noted.0)
            .filter(|keeper| keeper.is_alive())
            .collect()
    }
}

impl AsFd for Dir {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn gone(path: PathBuf) -> Result<(), Error> {
    match fs::remove_file(&path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(Error::at("remove", path)(e)),
        _ => Ok(()),
    }
}

/// Writes a file so that whoever reads it sees all of it or the old one.
pub fn replace(path: &Path, text: &[u8]) -> Result<(), Error> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}", std::process::id()));
    let new = path.with_file_name(name);
    fs::write(&new, text).map_err(Error::at("write", &new))?;
    fs::rename(&new, path).map_err(Error::at("write", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_checked_as_runc_does() {
        for id in ["a", "web-1", "x.y_z+1", &"a".repeat(64)] {
            check_id(id).unwrap();
        }
        for id in ["", ".", "..", "a/b", "../x", "a b", "é", "a\n", &"a".repeat(256)] {
            assert!(check_id(id).unwrap_err().to_string().contains("invalid container ID format"), "{id}");
        }
    }

    #[test]
    fn two_roots_have_two_namespaces() {
        assert_eq!(namespace(Path::new(ROOT)), "oci");
        assert_ne!(namespace(Path::new("/a")), namespace(Path::new("/b")));
    }

    #[test]
    fn an_id_is_taken_until_its_directory_is_removed() {
        let root = tempfile::tempdir().unwrap();
        let dir = Dir::create(root.path(), "c1").unwrap();
        assert!(matches!(Dir::create(root.path(), "c1"), Err(Error::Exists(_))));
        let again = Dir::open(root.path(), "c1").unwrap();
        assert!(!again.try_lock().unwrap());
        assert_eq!(dir.read().unwrap(), None);
        let state = State {
            oci_version: OCI_VERSION.into(),
            id: "c1".into(),
            bundle: "/b".into(),
            rootfs: "/b/rootfs".into(),
            created: "now".into(),
            annotations: BTreeMap::new(),
            namespace: "oci".into(),
            shim: "/s".into(),
            creator: Identity::this().unwrap(),
            init: None,
            made: false,
        };
        dir.write(&state).unwrap();
        assert_eq!(again.read().unwrap(), Some(state));
        dir.note_exec("x", Identity::this().unwrap()).unwrap();
        dir.note_exec("y", Identity { pid: i32::MAX, start_time: 1 }).unwrap();
        assert_eq!(again.execs(), [Identity::this().unwrap()]);
        assert_eq!(Dir::list(root.path()).unwrap(), ["c1"]);
        drop(dir);
        assert!(again.try_lock().unwrap());
        again.remove().unwrap();
        assert!(matches!(Dir::open(root.path(), "c1"), Err(Error::Missing(_))));
    }

    #[test]
    fn the_form_of_processes_is_fixed() {
        let text = r#"{"oci_version":"1","id":"c","bundle":"/b","rootfs":"/r","created":"now","annotations":{},"namespace":"oci","shim":"/s","creator":{"pid":7,"start":42},"init":null,"made":false}"#;
        let mut state: State = serde_json::from_str(text).unwrap();
        assert_eq!((state.creator, state.init), (Identity { pid: 7, start_time: 42 }, None));
        assert_eq!(serde_json::to_string(&state).unwrap(), text);
        state.init = Some(state.creator);
        let text = text.replace(r#""init":null"#, r#""init":{"pid":7,"start":42}"#);
        assert_eq!(serde_json::to_string(&state).unwrap(), text);
        assert_eq!(serde_json::from_str::<State>(&text).unwrap(), state);
    }

    #[test]
    fn a_state_that_is_none_is_named() {
        let root = tempfile::tempdir().unwrap();
        let dir = Dir::create(root.path(), "c1").unwrap();
        fs::write(dir.path().join(STATE), "{").unwrap();
        assert!(dir.read().unwrap_err().to_string().contains("state.json"));
    }
}
