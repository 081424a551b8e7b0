//! A pod that containerd describes instead of giving it a pause container: the Sandbox API's way.
//!
//! The sandbox makes a pause container of its own out of the description. It keeps the pod's namespaces and has no
//! program. containerd knows it as the sandbox only. The sandbox also makes hosts, resolv.conf and hostname, which the
//! pod's containers get where they bring none; in the other way containerd does.

use std::{
    collections::HashMap,
    fs, io,
    path::{Path, PathBuf},
};

use oci_spec::runtime::Spec;
use serde_json::json;
use vz_cri::{Message, NamespaceMode, PodSandboxConfig};
use vz_proto::PAUSE_ANNOTATION;

use crate::{container::pod_files::PodFiles, spec};

/// The pause container's root in the bundle: directories for the guest's own mounts, and nothing else. containerd
/// removes the bundle, and with it what is below all names but `rootfs`.
const ROOT: &str = "pause";
/// Mount points in the pause container.
const MOUNT_POINTS: [&str; 3] = ["proc", "dev", "sys"];
/// Servers and options of resolv.conf; libc takes three and some.
const MOST_LINES: usize = 64;
/// A pod's /etc/hosts until somebody brings another: the kubelet does.
const HOSTS: &str = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\nfe00::\tip6-localnet\n\
                     ff00::\tip6-mcastprefix\nff02::1\tip6-allnodes\nff02::2\tip6-allrouters\n";

/// Why there is no pod.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The description is none.
    #[error("options of the sandbox: {0}")]
    Options(String),
    /// It asks for what a VM cannot give.
    #[error(transparent)]
    Spec(#[from] spec::Error),
    /// The pause container's bundle.
    #[error("make {path}")]
    Bundle {
        /// Where.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

/// A pod, as containerd describes it.
#[derive(Debug, Clone)]
pub struct Pod {
    config: PodSandboxConfig,
    netns: PathBuf,
    annotations: HashMap<String, String>,
}

impl Pod {
    /// Reads a description. `annotations` are those of the request, which only containerd 2.3 and later send.
    pub fn parse(options: &[u8], netns: &str, annotations: HashMap<String, String>) -> Result<Self, Error> {
        let config = PodSandboxConfig::parse_from_bytes(options).map_err(|e| Error::Options(e.to_string()))?;
        let pod = Self { config, netns: netns.into(), annotations };
        pod.refuse_hosts()?;
        Ok(pod)
    }

    /// Refuses what cannot be. `hostPID` and `hostIPC` mean the VM's own, as with a pause container of containerd's.
    fn refuse_hosts(&self) -> Result<(), Error> {
        let namespaces = &self.config.linux.security_context.namespace_options;
        let hosts = |mode: vz_cri::EnumOrUnknown<NamespaceMode>| mode.enum_value() == Ok(NamespaceMode::NODE);
        if hosts(namespaces.network) || self.netns.as_os_str().is_empty() {
            return Err(spec::unsupported(
                "hostNetwork",
                "a VM has a network of its own: leave hostNetwork out, or run the pod with another RuntimeClass",
            )
            .into());
        }
        if namespaces.userns_options.as_ref().is_some_and(|user| user.mode.enum_value() == Ok(NamespaceMode::POD)) {
            return Err(spec::unsupported("hostUsers: false", "user namespaces are not supported").into());
        }
        Ok(())
    }

    /// The pod's hostname.
    fn hostname<'a>(&'a self, id: &'a str) -> &'a str {
        if self.config.hostname.is_empty() { id } else { &self.config.hostname }
    }

    /// The spec of its pause container, from which the sandbox is made as from any other one's.
    pub fn spec(&self, id: &str) -> Result<Spec, Error> {
        let linux = &self.config.linux;
        let mut annotations: HashMap<String, String> = self.config.annotations.clone();
        annotations.extend(self.annotations.clone());
        let resources = &linux.resources;
        let figures = [
            (spec::POD_CPU_QUOTA, resources.cpu_quota),
            (spec::POD_CPU_PERIOD, resources.cpu_period),
            (spec::POD_CPU_SHARES, resources.cpu_shares),
            (spec::POD_MEMORY, resources.memory_limit_in_bytes),
        ];
        annotations.extend(figures.map(|(name, figure)| (name.to_owned(), figure.to_string())));
        annotations.insert(spec::POD_ROLE.into(), spec::POD_SANDBOX.into());
        annotations.insert(PAUSE_ANNOTATION.into(), String::new());
        let mount = |at: &str, kind: &str, options: &str| {
            let options: Vec<_> = options.split(',').collect();
            json!({ "destination": at, "type": kind, "source": kind, "options": options })
        };
        let value = json!({
            "ociVersion": "1.2.0",
            "hostname": self.hostname(id),
            "annotations": annotations,
            "root": { "path": ROOT, "readonly": true },
            "process": {
                "cwd": "/", "args": ["/pause"], "env": [], "noNewPrivileges": true,
                "user": { "uid": 65535, "gid": 65535 },
                "capabilities": { "bounding": [], "effective": [], "permitted": [] },
            },
            "mounts": [
                mount("/proc", "proc", "nosuid,noexec,nodev"),
                mount("/dev", "tmpfs", "nosuid,strictatime,mode=755,size=64k"),
                mount("/dev/shm", "tmpfs", "nosuid,noexec,nodev,mode=1777,size=65536k"),
                mount("/sys", "sysfs", "nosuid,noexec,nodev,ro"),
            ],
            "linux": {
                "namespaces": [
                    { "type": "network", "path": self.netns },
                    { "type": "ipc" }, { "type": "uts" }, { "type": "pid" }, { "type": "mount" },
                ],
                "sysctl": linux.sysctls,
                "cgroupsPath": cgroups_path(&linux.cgroup_parent, id),
                "resources": {},
            },
        });
        serde_json::from_value(value).map_err(|e| Error::Options(e.to_string()))
    }

    /// Makes the pause container's bundle out of containerd's for the sandbox, which has neither spec nor root file
    /// system. Returns the files that the pod's containers get.
    pub fn make_bundle(&self, bundle: &Path, id: &str) -> Result<PodFiles, Error> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| Error::Bundle { path, source }
        };
        for name in MOUNT_POINTS {
            let path = bundle.join(ROOT).join(name);
            fs::create_dir_all(&path).map_err(failed(&path))?;
        }
        let spec = serde_json::to_vec(&self.spec(id)?).map_err(|e| Error::Options(e.to_string()))?;
        let write = |name: &str, bytes: &[u8]| {
            let path = bundle.join(name);
            fs::write(&path, bytes).map_err(failed(&path))?;
            Ok::<_, Error>(path)
        };
        write("config.json", &spec)?;
        let hostname = self.hostname(id);
        let files = PodFiles {
            hostname: write("hostname", format!("{hostname}\n").as_bytes())?,
            hosts: write("hosts", HOSTS.as_bytes())?,
            resolv_conf: write("resolv.conf", &self.resolv_conf()?)?,
        };
        Ok(files)
    }

    /// The pod's resolv.conf, in containerd's form; the host's if the pod does not say.
    fn resolv_conf(&self) -> Result<Vec<u8>, Error> {
        let Some(dns) = self.config.dns_config.as_ref() else {
            let path = Path::new("/etc/resolv.conf");
            return match fs::read(path) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
                read => read.map_err(|source| Error::Bundle { path: path.into(), source }),
            };
        };
        if dns.servers.len().max(dns.options.len()) > MOST_LINES {
            return Err(Error::Options(format!("dns_config has more than {MOST_LINES} servers or options")));
        }
        let mut text = String::new();
        if !dns.searches.is_empty() {
            text.push_str(&format!("search {}\n", dns.searches.join(" ")));
        }
        for server in &dns.servers {
            text.push_str(&format!("nameserver {server}\n"));
        }
        if !dns.options.is_empty() {
            text.push_str(&format!("options {}\n", dns.options.join(" ")));
        }
        Ok(text.into_bytes())
    }
}

/// Where containerd would put a pause container below the pod's cgroup.
fn cgroups_path(parent: &str, id: &str) -> String {
    match parent.rsplit('/').next() {
        Some(slice) if slice.ends_with(".slice") => format!("{slice}:cri-containerd:{id}"),
        _ => Path::new("/").join(parent.trim_start_matches('/')).join(id).to_string_lossy().into_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(change: impl FnOnce(&mut PodSandboxConfig)) -> Result<Pod, Error> {
        let mut config = PodSandboxConfig::new();
        change(&mut config);
        Pod::parse(&config.write_to_bytes().unwrap(), "/run/netns/p", HashMap::new())
    }

    #[test]
    fn a_pods_pause_container_has_its_names_and_limits() {
        let pod = pod(|config| {
            config.hostname = "web".into();
            let linux = config.linux.mut_or_insert_default();
            linux.cgroup_parent = "/kubepods/pod1".into();
            linux.sysctls.insert("net.core.somaxconn".into(), "7".into());
            linux.resources.mut_or_insert_default().memory_limit_in_bytes = 64 << 20;
        });
        let spec = pod.unwrap().spec("s1").unwrap();
        assert!(spec::is_pod(&spec));
        assert_eq!(spec::limits(&spec), (None, Some(64 << 20)));
        let value = serde_json::to_value(&spec).unwrap();
        assert_eq!(value["hostname"], "web");
        assert_eq!(value["linux"]["cgroupsPath"], "/kubepods/pod1/s1");
        assert_eq!(value["linux"]["sysctl"]["net.core.somaxconn"], "7");
        assert_eq!(value["linux"]["namespaces"][0]["path"], "/run/netns/p");
    }

    #[test]
    fn the_hosts_network_is_refused_by_the_pods_field() {
        let refused = pod(|config| {
            let context = config.linux.mut_or_insert_default().security_context.mut_or_insert_default();
            context.namespace_options.mut_or_insert_default().network = NamespaceMode::NODE.into();
        });
        let error = refused.unwrap_err().to_string();
        assert!(error.starts_with("hostNetwork: "), "{error}");
    }

    #[test]
    fn slices_are_named_as_containerd_does() {
        assert_eq!(cgroups_path("/kubepods.slice/kubepods-pod1.slice", "s"), "kubepods-pod1.slice:cri-containerd:s");
        assert_eq!(cgroups_path("", "s"), "/s");
    }

    #[test]
    fn resolv_conf_is_what_the_pod_says() {
        let pod = pod(|config| {
            let dns = config.dns_config.mut_or_insert_default();
            dns.servers = vec!["10.0.0.10".into()];
            dns.searches = vec!["a.svc".into(), "svc".into()];
            dns.options = vec!["ndots:5".into()];
        });
        let text = String::from_utf8(pod.unwrap().resolv_conf().unwrap()).unwrap();
        assert_eq!(text, "search a.svc svc\nnameserver 10.0.0.10\noptions ndots:5\n");
    }
}
