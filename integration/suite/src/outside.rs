//! What no sandbox may change: the host outside of it. Looked at before and after each scene in which a guest is
//! hostile.
//!
//! Files by checksum (those that the suite has planted for a guest to try, and the host's /etc), and what was mounted,
//! connected and filtered. What is new is [`crate::leaks`]' to find.

use std::{
    collections::BTreeMap,
    fs, io,
    os::unix::fs::{FileTypeExt, MetadataExt, symlink},
    path::{Path, PathBuf},
};

use sha2::{Digest, Sha256};

use crate::{
    Lab,
    leaks::{Item, Snapshot},
};

/// Modules whose guests are hostile, or hang.
pub const BOUNDARY: [&str; 4] = ["endings", "escape", "hostile", "metal"];
/// Kinds of things whose end is as bad as their beginning.
const KEPT: [&str; 5] = ["mount", "network namespace", "network link", "firewall rule", "loop device"];

/// Fills a directory with what a guest might be after: files that are removed or changed as easily as any.
pub fn plant(dir: &Path) -> io::Result<()> {
    match fs::remove_dir_all(dir) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    fs::create_dir_all(dir.join("full"))?;
    fs::create_dir(dir.join("empty"))?;
    // The names that a container's directory has, too.
    for name in ["a", "b", "rootfs", "mount0", "mount7", "full/inner"] {
        fs::write(dir.join(name), format!("{name} was here before\n"))?;
    }
    symlink("a", dir.join("link"))
}

/// The host at a moment.
#[derive(Debug)]
pub struct Outside {
    files: BTreeMap<PathBuf, String>,
    things: Vec<Item>,
}

impl Outside {
    /// Looks at files, and at `things`, what there is by then.
    pub fn look(lab: &Lab, things: &Snapshot) -> Self {
        let mut files = BTreeMap::new();
        for dir in [lab.planted(), Path::new("/etc")] {
            digest(dir, &mut files);
        }
        let things = things.iter().filter(|item| KEPT.contains(&item.kind)).cloned().collect();
        Self { files, things }
    }

    /// What is not as it was, a line each.
    pub fn changes(&self, now: &Self) -> Vec<String> {
        let mut changes = Vec::new();
        for (path, was) in &self.files {
            match now.files.get(path) {
                None => changes.push(format!("{} is gone", path.display())),
                Some(is) if is != was => changes.push(format!("{} was {was}, is {is}", path.display())),
                Some(_) => {}
            }
        }
        let new = now.files.keys().filter(|path| !self.files.contains_key(*path));
        changes.extend(new.map(|path| format!("{} is new", path.display())));
        let lost = self.things.iter().filter(|item| !now.things.contains(item));
        changes.extend(lost.map(|item| format!("{item} is gone")));
        changes
    }

    /// How many files were looked at.
    pub fn files(&self) -> usize {
        self.files.len()
    }
}

/// Everything at and below a path: type, mode, owner, and what is in it. Links are not followed.
fn digest(path: &Path, files: &mut BTreeMap<PathBuf, String>) {
    let Ok(data) = fs::symlink_metadata(path) else { return };
    let kind = data.file_type();
    let content = if kind.is_file() {
        match fs::read(path) {
            Ok(bytes) => Sha256::digest(&bytes).iter().take(8).map(|byte| format!("{byte:02x}")).collect(),
            Err(e) => e.to_string(),
        }
    } else if kind.is_symlink() {
        fs::read_link(path).map_or_else(|e| e.to_string(), |target| target.display().to_string())
    } else if kind.is_char_device() || kind.is_block_device() {
        format!("{:x}", data.rdev())
    } else {
        String::new()
    };
    files.insert(path.to_owned(), format!("{:o} {}:{} {content}", data.mode(), data.uid(), data.gid()));
    if kind.is_dir() {
        for entry in fs::read_dir(path).into_iter().flatten().flatten() {
            digest(&entry.path(), files);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn look(dir: &Path) -> Outside {
        let mut files = BTreeMap::new();
        digest(dir, &mut files);
        Outside { files, things: Vec::new() }
    }

    #[test]
    fn every_change_of_a_file_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let planted = dir.path().join("planted");
        let changed = |how: &dyn Fn(&Path), line: &str| {
            plant(&planted).unwrap();
            let before = look(&planted);
            assert_eq!(before.changes(&look(&planted)), Vec::<String>::new());
            how(&planted);
            let changes = before.changes(&look(&planted));
            assert!(changes.iter().any(|change| change.contains(line)), "{line}: {changes:?}");
        };
        changed(&|dir| fs::remove_file(dir.join("a")).unwrap(), "planted/a is gone");
        changed(&|dir| fs::remove_dir(dir.join("empty")).unwrap(), "planted/empty is gone");
        changed(&|dir| fs::write(dir.join("full/inner"), "other").unwrap(), "planted/full/inner was");
        changed(&|dir| fs::write(dir.join("new"), "").unwrap(), "planted/new is new");
        changed(&|dir| fs::set_permissions(dir.join("b"), PermissionsExt::from_mode(0o777)).unwrap(), "planted/b was");
        changed(
            &|dir| fs::remove_file(dir.join("link")).and_then(|()| symlink("b", dir.join("link"))).unwrap(),
            "link was",
        );
    }

    #[test]
    fn a_mount_that_is_gone_is_found() {
        let mount = Item { kind: "mount", name: "/mnt".into(), pid: None };
        let (none, one) = (look(Path::new("/none")), Outside { files: BTreeMap::new(), things: vec![mount] });
        assert_eq!(one.changes(&none), ["mount /mnt is gone"]);
        assert_eq!(none.changes(&one), Vec::<String>::new());
    }
}
