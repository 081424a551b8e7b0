//! Disks of the host that a VM has: the block devices of its first container's spec, and the image files and block
//! devices that it mounts.
//!
//! A VM gets its disks with its start. What they are called in there only the guest's agent sees, which finds them by
//! their names.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io,
    os::{
        fd::OwnedFd,
        unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
};

use nix::sys::stat::{major, makedev, minor};
use oci_spec::runtime::{LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType, Mount, Spec};
use vz_machine::control;
use vz_sys::mount::is_bind;

/// Block devices by their numbers.
const SYSFS: &str = "/sys/dev/block";

/// Why a disk cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host has no such device.
    #[error("linux.devices: {path}: this host has no block device {major}:{minor}")]
    Missing {
        /// Its path in the container.
        path: PathBuf,
        /// Its number.
        major: i64,
        /// Its number.
        minor: i64,
    },
    /// It cannot be opened.
    #[error("open disk {path}")]
    Open {
        /// The host's path.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Somebody else has it.
    #[error(
        "disk {path} is in use, by the host (where it is mounted) or by another VM: two kernels would damage what is on it"
    )]
    Busy {
        /// The host's path.
        path: PathBuf,
    },
    /// The VM runs already, and has it not.
    #[error("disk {path}: a VM gets its disks with its first container; run this container in a sandbox of its own")]
    Late {
        /// The host's path.
        path: PathBuf,
    },
}

/// A disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// Its name in the guest (`/sys/block/*/serial`).
    pub id: String,
    /// The host's path.
    pub path: PathBuf,
    /// The host's number, of a block device.
    pub number: Option<(u64, u64)>,
    /// Not writable for the guest.
    pub read_only: bool,
    /// What the host knows it by.
    identity: Identity,
    /// The guest mounts it, so that nobody else may write there.
    mounted: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Identity {
    Device(u64),
    File { device: u64, inode: u64 },
}

impl Identity {
    fn of(metadata: &fs::Metadata) -> Option<Self> {
        let kind = metadata.file_type();
        if kind.is_block_device() {
            Some(Self::Device(metadata.rdev()))
        } else if kind.is_file() {
            Some(Self::File { device: metadata.dev(), inode: metadata.ino() })
        } else {
            None
        }
    }
}

/// The disks that a spec asks for.
pub fn find(spec: &Spec) -> Result<Vec<Disk>, Error> {
    let mut disks = Vec::new();
    for mount in spec.mounts().iter().flatten() {
        if let Some((path, identity)) = source(mount) {
            let read_only = has(mount, "ro");
            add(&mut disks, path.to_owned(), identity, read_only, true);
        }
    }
    let linux = spec.linux().as_ref();
    let rules = linux.and_then(|linux| linux.resources().as_ref()).and_then(|r| r.devices().as_ref());
    for device in linux.and_then(|linux| linux.devices().as_ref()).into_iter().flatten() {
        if device.typ() != LinuxDeviceType::B {
            continue;
        }
        let (path, identity) = located(device)?;
        let writable = rules.into_iter().flatten().any(|rule| lets_write(rule, device));
        add(&mut disks, path, identity, !writable, false);
    }
    Ok(disks)
}

/// A VM that runs gets no others than it has.
pub fn refuse_others(spec: &Spec, had: &[Disk]) -> Result<(), Error> {
    let other = find(spec)?.into_iter().find(|disk| !had.iter().any(|had| had.identity == disk.identity));
    other.map_or(Ok(()), |disk| Err(Error::Late { path: disk.path }))
}

/// One disk for whatever is named twice: the guest's kernel could not know that two are the same.
fn add(disks: &mut Vec<Disk>, path: PathBuf, identity: Identity, read_only: bool, mounted: bool) {
    if let Some(disk) = disks.iter_mut().find(|disk| disk.identity == identity) {
        disk.read_only &= read_only;
        disk.mounted |= mounted;
        return;
    }
    let number = match identity {
        Identity::Device(number) => Some((major(number), minor(number))),
        Identity::File { .. } => None,
    };
    disks.push(Disk { id: format!("vz-{}", disks.len()), path, number, read_only, identity, mounted });
}

/// What a mount takes its file system from, where that is a disk: an image file or a block device.
fn source(mount: &Mount) -> Option<(&Path, Identity)> {
    let path = mount.source().as_deref().filter(|path| path.is_absolute())?;
    if is_bind(mount.typ().as_deref(), mount.options().iter().flatten().map(String::as_str)) {
        return None;
    }
    // Where it cannot be looked at, mounting it says so.
    Some((path, Identity::of(&fs::metadata(path).ok()?)?))
}

fn has(mount: &Mount, name: &str) -> bool {
    mount.options().iter().flatten().any(|option| option == name)
}

/// The host's path of a device, whatever the container calls it.
fn located(device: &LinuxDevice) -> Result<(PathBuf, Identity), Error> {
    let missing = || Error::Missing { path: device.path().clone(), major: device.major(), minor: device.minor() };
    let (Ok(major), Ok(minor)) = (u64::try_from(device.major()), u64::try_from(device.minor())) else {
        return Err(missing());
    };
    let event = fs::read_to_string(format!("{SYSFS}/{major}:{minor}/uevent")).map_err(|_| missing())?;
    let name = event.lines().find_map(|line| line.strip_prefix("DEVNAME=")).ok_or_else(missing)?;
    Ok((Path::new("/dev").join(name), Identity::Device(makedev(major, minor))))
}

/// Whether a rule of the devices' cgroup lets the container write to the device.
fn lets_write(rule: &LinuxDeviceCgroup, device: &LinuxDevice) -> bool {
    let any = |number: Option<i64>, of: i64| number.is_none_or(|number| number < 0 || number == of);
    rule.allow()
        && matches!(rule.typ(), None | Some(LinuxDeviceType::A | LinuxDeviceType::B))
        && any(rule.major(), device.major())
        && any(rule.minor(), device.minor())
        && rule.access().as_deref().is_none_or(|access| access.contains('w'))
}

/// Makes the guest's form of a mount whose source is a disk.
pub fn settle(mount: &mut Mount, disks: &[Disk]) {
    let Some((_, identity)) = source(mount) else { return };
    if let Some(disk) = disks.iter().find(|disk| disk.identity == identity) {
        mount.set_source(Some(format!("{}{}", vz_proto::DISK_PATH, disk.id).into()));
    }
}

/// Opens the disks for the machine.
pub fn open(disks: &[Disk]) -> Result<(Vec<control::Disk>, Vec<OwnedFd>), Error> {
    let files = disks.iter().map(|disk| disk.open().map(OwnedFd::from)).collect::<Result<_, _>>()?;
    let disks = disks.iter().map(|disk| control::Disk { id: disk.id.clone(), read_only: disk.read_only }).collect();
    Ok((disks, files))
}

impl Disk {
    /// What the guest's agent is told of it.
    pub fn to_agent(&self) -> vz_proto::Disk {
        let (major, minor) = self.number.unwrap_or_default();
        vz_proto::Disk { id: self.id.clone(), major, minor, ..Default::default() }
    }

    /// Opens it; what is mounted is claimed for as long as the file is open, by whomever.
    fn open(&self) -> Result<File, Error> {
        let failed = |source| Error::Open { path: self.path.clone(), source };
        let busy = || Error::Busy { path: self.path.clone() };
        let mut options = OpenOptions::new();
        options.read(true).write(!self.read_only);
        let is_device = matches!(self.identity, Identity::Device(_));
        if self.mounted && is_device {
            // Of a block device, and without O_CREAT: fails where somebody has mounted it, or opened it like this.
            options.custom_flags(libc::O_EXCL);
        }
        let file = options.open(&self.path).map_err(|e| match e.kind() {
            io::ErrorKind::ResourceBusy => busy(),
            _ => failed(e),
        })?;
        if Identity::of(&file.metadata().map_err(failed)?) != Some(self.identity) {
            return Err(failed(io::Error::other("it has been replaced in the meantime")));
        }
        if self.mounted && !is_device {
            let locked = if self.read_only { file.try_lock_shared() } else { file.try_lock() };
            match locked {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => return Err(busy()),
                Err(TryLockError::Error(e)) => return Err(failed(e)),
            }
        }
        Ok(file)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn spec(mounts: &Value, linux: &Value) -> Spec {
        serde_json::from_value(json!({ "ociVersion": "1.2.0", "mounts": mounts, "linux": linux })).unwrap()
    }

    fn mount(source: &Path, options: &[&str]) -> Value {
        json!({ "destination": "/data", "type": "ext4", "source": source, "options": options })
    }

    #[test]
    fn an_image_is_one_disk_however_often_it_is_mounted() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let path = image.path();
        let disks = find(&spec(&json!([mount(path, &["ro"]), mount(path, &[])]), &json!({}))).unwrap();
        assert_eq!(disks.len(), 1);
        assert_eq!((disks[0].id.as_str(), disks[0].read_only, disks[0].number), ("vz-0", false, None));
        let mut settled = spec(&json!([mount(path, &[])]), &json!({})).mounts().clone().unwrap().remove(0);
        settle(&mut settled, &disks);
        assert_eq!(settled.source().as_deref(), Some(Path::new("/dev/disk/by-id/virtio-vz-0")));
    }

    #[test]
    fn what_is_no_disk_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let file = tempfile::NamedTempFile::new().unwrap();
        let bind = json!({ "destination": "/f", "type": "bind", "source": file.path(), "options": ["rbind"] });
        let proc = json!({ "destination": "/proc", "type": "proc", "source": "proc" });
        let none =
            find(&spec(&json!([bind, proc, mount(dir.path(), &[]), mount(Path::new("/nowhere"), &[])]), &json!({})));
        assert_eq!(none.unwrap(), []);
    }

    #[test]
    fn a_device_that_is_not_there_is_named() {
        let device = json!({ "path": "/dev/xvda", "type": "b", "major": 4095, "minor": 77 });
        let error = find(&spec(&json!([]), &json!({ "devices": [device] }))).unwrap_err().to_string();
        assert!(error.contains("/dev/xvda") && error.contains("4095:77"), "{error}");
    }

    #[test]
    fn rules_say_whether_a_device_can_be_written() {
        let device: LinuxDevice =
            serde_json::from_value(json!({ "path": "/dev/x", "type": "b", "major": 7, "minor": 1 })).unwrap();
        let writes = |rule: Value| lets_write(&serde_json::from_value(rule).unwrap(), &device);
        assert!(writes(json!({ "allow": true, "type": "b", "major": 7, "minor": 1, "access": "rwm" })));
        assert!(writes(json!({ "allow": true, "access": "rwm" })));
        assert!(!writes(json!({ "allow": true, "type": "b", "major": 7, "minor": 1, "access": "rm" })));
        assert!(!writes(json!({ "allow": true, "type": "b", "major": 7, "minor": 2, "access": "rwm" })));
        assert!(!writes(json!({ "allow": false, "access": "rwm" })));
    }

    #[test]
    fn a_mounted_image_is_claimed_while_it_is_open() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let find = |options: &[&str]| find(&spec(&json!([mount(image.path(), options)]), &json!({}))).unwrap();
        let reading = open(&find(&["ro"])).unwrap();
        assert!(open(&find(&["ro"])).is_ok());
        assert!(matches!(open(&find(&[])), Err(Error::Busy { .. })));
        drop(reading);
        assert!(open(&find(&[])).is_ok());
    }
}
