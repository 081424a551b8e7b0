//! What a pod's containers find in /etc if their specs bring nothing there: containerd leaves that to the shim in the
//! Sandbox API's way.

use std::path::{Path, PathBuf};

use oci_spec::runtime::{Mount, Spec};

/// The pod's files on the host.
#[derive(Debug)]
pub struct PodFiles {
    /// /etc/hostname.
    pub hostname: PathBuf,
    /// /etc/hosts.
    pub hosts: PathBuf,
    /// /etc/resolv.conf.
    pub resolv_conf: PathBuf,
}

impl PodFiles {
    /// Adds binds of the files to a container's spec, where it has no mount of its own.
    pub fn complete(&self, spec: &mut Spec) {
        let readonly = spec.root().as_ref().and_then(oci_spec::runtime::Root::readonly).unwrap_or(false);
        let mut mounts = spec.mounts().clone().unwrap_or_default();
        let files =
            [("/etc/hostname", &self.hostname), ("/etc/hosts", &self.hosts), ("/etc/resolv.conf", &self.resolv_conf)];
        for (destination, source) in files {
            if mounts.iter().any(|mount| mount.destination() == Path::new(destination)) {
                continue;
            }
            let options = ["rbind", "rprivate", if readonly { "ro" } else { "rw" }];
            let mut mount = Mount::default();
            mount
                .set_destination(destination.into())
                .set_typ(Some("bind".into()))
                .set_source(Some(source.clone()))
                .set_options(Some(options.map(String::from).into()));
            mounts.push(mount);
        }
        spec.set_mounts(Some(mounts));
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_container_gets_the_pods_files_where_it_has_none() {
        let mut spec: Spec = serde_json::from_value(json!({
            "ociVersion": "1.2.0", "root": { "path": "rootfs", "readonly": true },
            "mounts": [{ "destination": "/etc/hosts", "type": "bind", "source": "/kubelet/hosts" }],
        }))
        .unwrap();
        let files = PodFiles { hostname: "/p/hostname".into(), hosts: "/p/hosts".into(), resolv_conf: "/p/dns".into() };
        files.complete(&mut spec);
        let mounts = serde_json::to_value(spec.mounts()).unwrap();
        let sources: Vec<_> = mounts.as_array().unwrap().iter().map(|mount| mount["source"].clone()).collect();
        assert_eq!(sources, ["/kubelet/hosts", "/p/hostname", "/p/dns"]);
        assert_eq!(mounts[1]["options"], json!(["rbind", "rprivate", "ro"]));
    }
}
