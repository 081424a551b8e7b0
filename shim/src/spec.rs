//! The OCI spec of a container, as its bundle has it: what the sandbox's shape and the container's plan read from it.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

use oci_spec::runtime::{LinuxCpu, LinuxNamespaceType, Spec};
use vz_sys::error::chain;

/// The spec's file in a bundle.
const CONFIG: &str = "config.json";

/// Why a spec cannot be run in a VM. Each names the field, and says what to do.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A part that every Linux container has is missing.
    #[error("config.json has no {0}")]
    Missing(&'static str),
    /// Something that only works on the host itself.
    #[error("{field}: {why}")]
    Unsupported {
        /// The spec's field, with its value.
        field: String,
        /// Why not, and what to use.
        why: &'static str,
    },
    /// A bind mount's source does not exist.
    #[error("mounts: bind source {source_path} for {destination}: {reason}")]
    Source {
        /// The host's path.
        source_path: PathBuf,
        /// Where the container would see it.
        destination: PathBuf,
        /// What stat(2) said.
        reason: String,
    },
    /// config.json cannot be read.
    #[error("read {path}: {reason}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// The guest's form cannot be written.
    #[error("write the guest's {what}: {reason}")]
    Write {
        /// `spec`, `process`.
        what: &'static str,
        /// Why not.
        reason: String,
    },
}

/// Whether a bundle has a spec: containerd's for a pod by the Sandbox API has none.
pub fn is_there(bundle: &Path) -> bool {
    bundle.join(CONFIG).exists()
}

/// Reads a bundle's spec.
pub fn read(bundle: &Path) -> Result<Spec, Error> {
    let path = bundle.join(CONFIG);
    Spec::load(&path).map_err(|error| Error::Read { path, reason: chain(&error) })
}

/// Writes a part of the spec for the guest.
pub fn write(what: &'static str, part: &impl serde::Serialize) -> Result<Vec<u8>, Error> {
    serde_json::to_vec(part).map_err(|error| Error::Write { what, reason: error.to_string() })
}

pub fn unsupported(field: impl Into<String>, why: &'static str) -> Error {
    Error::Unsupported { field: field.into(), why }
}

/// What the VM must have for a sandbox whose first container has this spec: CPUs and bytes, where limited.
pub fn limits(spec: &Spec) -> (Option<u32>, Option<u64>) {
    let (cpu, memory) = resources(spec);
    (cpu.as_ref().and_then(cpus), memory.and_then(bytes))
}

/// CPUs that a quota of CPU time takes, rounded up; nothing if there is no quota.
pub fn cpus(cpu: &LinuxCpu) -> Option<u32> {
    let quota = u64::try_from(cpu.quota()?).ok().filter(|quota| *quota > 0)?;
    let period = cpu.period().filter(|period| *period > 0).unwrap_or(100_000);
    u32::try_from(quota.div_ceil(period)).ok()
}

/// Bytes of a memory limit; nothing if the number stands for no limit.
pub fn bytes(limit: i64) -> Option<u64> {
    u64::try_from(limit).ok().filter(|limit| *limit > 0 && *limit < 1 << 62)
}

/// CPU time and bytes of memory that a sandbox may use: those of its container, or for a pod what all its containers
/// may together, as CRI's annotations have it. The pause container's own are not about the pod.
pub fn resources(spec: &Spec) -> (Option<LinuxCpu>, Option<i64>) {
    if is_pod(spec) {
        let annotations = annotations(spec);
        let number = |name: &str| annotations.get(name)?.parse::<i64>().ok().filter(|number| *number > 0);
        let mut cpu = LinuxCpu::default();
        cpu.set_quota(number(POD_CPU_QUOTA))
            .set_period(number(POD_CPU_PERIOD).map(i64::cast_unsigned))
            .set_shares(number(POD_CPU_SHARES).map(i64::cast_unsigned));
        return (Some(cpu), number(POD_MEMORY));
    }
    let Some(resources) = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref()) else {
        return (None, None);
    };
    (resources.cpu().clone(), resources.memory().as_ref().and_then(oci_spec::runtime::LinuxMemory::limit))
}

/// The annotations of a spec.
pub fn annotations(spec: &Spec) -> HashMap<String, String> {
    spec.annotations().clone().unwrap_or_default()
}

/// Annotation by which CRI says what a container is for: `sandbox` or `container`.
pub const POD_ROLE: &str = "io.kubernetes.cri.container-type";
/// What a pod's sandbox is for.
pub const POD_SANDBOX: &str = "sandbox";
/// Annotations by which CRI says what all containers of a pod may use together.
pub const POD_CPU_QUOTA: &str = "io.kubernetes.cri.sandbox-cpu-quota";
/// The period of the quota.
pub const POD_CPU_PERIOD: &str = "io.kubernetes.cri.sandbox-cpu-period";
/// The weight.
pub const POD_CPU_SHARES: &str = "io.kubernetes.cri.sandbox-cpu-shares";
/// Bytes.
pub const POD_MEMORY: &str = "io.kubernetes.cri.sandbox-memory";

/// Whether it is the spec of a pod's sandbox: its pause container.
pub fn is_pod(spec: &Spec) -> bool {
    spec.annotations().as_ref().and_then(|all| all.get(POD_ROLE)).is_some_and(|role| role == POD_SANDBOX)
}

/// The network namespace that a spec names; nothing where it asks for a new one. The host's is refused.
pub fn netns(spec: &Spec) -> Result<Option<PathBuf>, Error> {
    let namespaces = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_ref());
    let network = namespaces.into_iter().flatten().find(|namespace| namespace.typ() == LinuxNamespaceType::Network);
    match network {
        Some(network) => Ok(network.path().clone().filter(|path| !path.as_os_str().is_empty())),
        None => Err(unsupported(
            "linux.namespaces: no network",
            "this asks for the host's network, which a VM cannot share: it has a network of its own; connect the container \
             to a network and publish its ports (`-p`), or run it with `--net none`",
        )),
    }
}

/// To how many networks a client is going to connect a container, where it says.
///
/// nerdctl says so in an annotation before its hook makes the network.
pub fn networks(spec: &Spec) -> Option<usize> {
    let annotations = spec.annotations().as_ref()?;
    let names: Vec<String> = serde_json::from_str(annotations.get("nerdctl/networks")?).ok()?;
    Some(names.iter().filter(|name| *name != "none").count())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn spec(change: impl FnOnce(&mut Value)) -> Spec {
        let mut value = json!({ "ociVersion": "1.2.0", "root": { "path": "rootfs" }, "linux": {} });
        change(&mut value);
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn the_network_is_the_named_one_or_a_new_one_and_never_the_hosts() {
        let with = |namespaces: Value| netns(&spec(|v| v["linux"]["namespaces"] = namespaces));
        assert!(with(json!([{ "type": "pid" }])).unwrap_err().to_string().contains("--net none"));
        let named = with(json!([{ "type": "network", "path": "/run/netns/x" }])).unwrap();
        assert_eq!(named.as_deref(), Some(Path::new("/run/netns/x")));
        assert_eq!(with(json!([{ "type": "network", "path": "" }])).unwrap(), None);
    }

    #[test]
    fn a_pods_resources_are_those_of_all_its_containers() {
        let pause = json!({ "cpu": { "shares": 2, "quota": 7 }, "memory": { "limit": 9 } });
        let pod = |annotations: Value| {
            spec(|v| {
                v["annotations"] = annotations;
                v["annotations"][POD_ROLE] = json!("sandbox");
                v["linux"]["resources"] = pause.clone();
            })
        };
        assert_eq!(limits(&pod(json!({}))), (None, None));
        let announced = json!({
            POD_CPU_QUOTA: "250000", POD_CPU_PERIOD: "100000", POD_CPU_SHARES: "512", POD_MEMORY: "268435456",
        });
        assert_eq!(limits(&pod(announced.clone())), (Some(3), Some(256 << 20)));
        assert_eq!(resources(&pod(announced)).0.unwrap().shares(), Some(512));
        // containerd says so for a pod without limits.
        let none = json!({ POD_CPU_QUOTA: "0", POD_CPU_PERIOD: "0", POD_CPU_SHARES: "0", POD_MEMORY: "0" });
        assert_eq!(limits(&pod(none)), (None, None));
    }

    #[test]
    fn nerdctl_says_how_many_networks_there_will_be() {
        let count = |value: &str| networks(&spec(|v| v["annotations"] = json!({ "nerdctl/networks": value })));
        assert_eq!(networks(&spec(|_| ())), None);
        assert_eq!(count(r#"["none"]"#), Some(0));
        assert_eq!(count(r#"["bridge","other"]"#), Some(2));
        assert_eq!(count("?"), None);
    }
}
