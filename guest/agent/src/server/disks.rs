//! The VM's disks, as a container's spec is to name them.
//!
//! The host knows them by ids, and which of its own devices they stand for; what they are called here is the kernel's
//! choice.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use oci_spec::runtime::{LinuxDeviceType, Mount, Spec};
use vz_proto::{DISK_PATH, Disk};

use super::error::{CallError, Result};

/// Block devices of this guest.
const SYSFS: &str = "/sys/block";

/// A disk as the kernel has it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Found {
    node: PathBuf,
    major: i64,
    minor: i64,
}

/// Puts this guest's names and numbers into a spec.
pub fn settle(spec: &mut Spec, disks: &[Disk]) -> Result<()> {
    let found: Vec<_> = disks
        .iter()
        .map(|disk| {
            let found = find(Path::new(SYSFS), &disk.id).map_err(CallError::io(format!("find disk {}", disk.id)))?;
            Ok((disk, found))
        })
        .collect::<Result<_>>()?;
    put(spec, &found);
    Ok(())
}

/// Each place is looked at once: one disk's number on the host may be another one's here.
fn put(spec: &mut Spec, disks: &[(&Disk, Found)]) {
    for mount in spec.mounts_mut().iter_mut().flatten() {
        let source = mount.source().as_deref().and_then(Path::to_str);
        let id = source.and_then(|source| source.strip_prefix(DISK_PATH));
        if let Some((_, found)) = disks.iter().find(|(disk, _)| Some(disk.id.as_str()) == id) {
            mount.set_source(Some(found.node.clone()));
            read_only(mount);
        }
    }
    // An image file has no number on the host.
    let numbered = |major: Option<i64>, minor: Option<i64>| {
        let number = (u64::try_from(major?).ok()?, u64::try_from(minor?).ok()?);
        let disk = disks.iter().find(|(disk, _)| (disk.major, disk.minor) == number && number != (0, 0))?;
        Some((disk.1.major, disk.1.minor))
    };
    let Some(linux) = spec.linux_mut() else { return };
    for device in linux.devices_mut().iter_mut().flatten().filter(|device| device.typ() == LinuxDeviceType::B) {
        if let Some((major, minor)) = numbered(Some(device.major()), Some(device.minor())) {
            device.set_major(major).set_minor(minor);
        }
    }
    let rules = linux.resources_mut().as_mut().and_then(|resources| resources.devices_mut().as_mut());
    for rule in rules.into_iter().flatten().filter(|rule| rule.typ() == Some(LinuxDeviceType::B)) {
        if let Some((major, minor)) = numbered(rule.major(), rule.minor()) {
            rule.set_major(Some(major)).set_minor(Some(minor));
        }
    }
}

/// libcontainer takes `ro` as a property of the mount, which leaves the file system below it writable: one that cannot
/// be, since its disk is not, is refused then. In this spelling the option passes it by, and reaches the kernel, which
/// only looks at the name.
fn read_only(mount: &mut Mount) {
    if let Some(options) = mount.options_mut().as_mut().filter(|options| options.iter().any(|option| option == "ro")) {
        options.push("ro=1".into());
    }
}

fn find(sysfs: &Path, id: &str) -> io::Result<Found> {
    for entry in fs::read_dir(sysfs)? {
        let entry = entry?;
        // Other kinds of block devices have no such name.
        if !fs::read_to_string(entry.path().join("serial")).is_ok_and(|serial| serial.trim_end() == id) {
            continue;
        }
        let number = fs::read_to_string(entry.path().join("dev"))?;
        let (major, minor) = number.trim_end().split_once(':').unwrap_or_default();
        let number = |text: &str| text.parse().map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e));
        let node = Path::new("/dev").join(entry.file_name());
        return Ok(Found { node, major: number(major)?, minor: number(minor)? });
    }
    Err(io::Error::new(io::ErrorKind::NotFound, "the VM has none of that name"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_disk_is_found_by_its_name() {
        let dir = std::env::temp_dir().join(format!("vz-agent-disks-{}", std::process::id()));
        for (name, serial) in [("loop0", None), ("vda", Some("vz-0")), ("vdb", Some("vz-1"))] {
            fs::create_dir_all(dir.join(name)).unwrap();
            fs::write(dir.join(name).join("dev"), if name == "vdb" { "254:16\n" } else { "7:0\n" }).unwrap();
            if let Some(serial) = serial {
                fs::write(dir.join(name).join("serial"), serial).unwrap();
            }
        }
        assert_eq!(find(&dir, "vz-1").unwrap(), Found { node: "/dev/vdb".into(), major: 254, minor: 16 });
        assert_eq!(find(&dir, "vz-2").unwrap_err().kind(), io::ErrorKind::NotFound);
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn mounts_devices_and_rules_get_the_guests_names() {
        let mut spec: Spec = serde_json::from_value(json!({
            "ociVersion": "1.2.0",
            "mounts": [
                { "destination": "/data", "type": "ext4", "source": "/dev/disk/by-id/virtio-vz-0", "options": ["ro"] },
                { "destination": "/proc", "type": "proc", "source": "proc" },
            ],
            "linux": {
                "devices": [
                    { "path": "/dev/xvda", "type": "b", "major": 7, "minor": 3 },
                    { "path": "/dev/null", "type": "c", "major": 7, "minor": 3 },
                ],
                "resources": { "devices": [
                    { "allow": false, "access": "rwm" },
                    { "allow": true, "type": "b", "major": 7, "minor": 3, "access": "rm" },
                ] },
            },
        }))
        .unwrap();
        let found = Found { node: "/dev/vda".into(), major: 254, minor: 0 };
        let disk = Disk { id: "vz-0".into(), major: 7, minor: 3, ..Default::default() };
        put(&mut spec, &[(&disk, found)]);
        let spec = serde_json::to_value(spec).unwrap();
        assert_eq!(spec["mounts"][0]["source"], "/dev/vda");
        assert_eq!(spec["mounts"][0]["options"], json!(["ro", "ro=1"]));
        assert_eq!(spec["mounts"][1]["source"], "proc");
        let devices = &spec["linux"]["devices"];
        assert_eq!((&devices[0]["major"], &devices[0]["minor"]), (&json!(254), &json!(0)));
        assert_eq!(devices[1]["major"], 7);
        let rules = &spec["linux"]["resources"]["devices"];
        assert_eq!((&rules[1]["major"], &rules[1]["access"]), (&json!(254), &json!("rm")));
        assert_eq!(rules[0].get("major"), None);
    }

    #[test]
    fn numbers_that_change_places_are_changed_once() {
        let device = |minor: i64| json!({ "path": format!("/dev/{minor}"), "type": "b", "major": 254, "minor": minor });
        let mut spec: Spec =
            serde_json::from_value(json!({ "ociVersion": "1.2.0", "linux": { "devices": [device(16), device(0)] } }))
                .unwrap();
        let disk = |minor| Disk { major: 254, minor, ..Default::default() };
        let found = |minor| Found { node: "/dev/vdx".into(), major: 254, minor };
        put(&mut spec, &[(&disk(16), found(0)), (&disk(0), found(16))]);
        let devices = serde_json::to_value(spec).unwrap()["linux"]["devices"].clone();
        assert_eq!((&devices[0]["minor"], &devices[1]["minor"]), (&json!(0), &json!(16)));
    }
}
