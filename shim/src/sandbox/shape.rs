//! What a VM is made of, before there is one: its size, network, cgroup and disks.
//!
//! A shape comes from the spec of the sandbox's first container. Everything that is made for the VM is made from the
//! shape.

use oci_spec::runtime::Spec;
use vz_config::Config;

use crate::spec;

/// Size and name of a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shape {
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Memory, in MiB.
    pub memory_mib: u64,
    /// The guest's hostname.
    pub hostname: String,
}

/// Longest hostname, in bytes: HOST_NAME_MAX without its last one.
const MAX_HOSTNAME: usize = 63;

impl Shape {
    /// The shape for a sandbox `id` whose first container has this spec.
    pub fn of(config: &Config, spec: &Spec, id: &str) -> Self {
        let (vcpus, memory_mib) = size(config, spec);
        let hostname = id[..id.floor_char_boundary(MAX_HOSTNAME)].to_owned();
        Self { vcpus, memory_mib, hostname }
    }
}

/// vCPUs and MiB for a container with this spec: its limits (memory plus the guest's own need), or the configured
/// size, within the configured bounds. A pod has at least the configured size: what it announces leaves out containers
/// without limits.
fn size(config: &Config, spec: &Spec) -> (u32, u64) {
    let (cpus, memory) = spec::limits(spec);
    let host = host();
    let most_cpus = if config.vm.max_vcpus == 0 { host.vcpus } else { config.vm.max_vcpus };
    let annotated = spec::annotations(spec);
    let set = |key: &str| annotated.contains_key(&format!("{}{key}", vz_config::ANNOTATION));
    let (least_cpus, least_mib) = if spec::is_pod(spec) { (config.vm.vcpus, config.vm.memory_mib) } else { (1, 0) };
    let vcpus = match cpus {
        Some(cpus) if !set("vcpus") => cpus.min(most_cpus).max(least_cpus),
        _ => config.vm.vcpus,
    };
    let mut mib = match memory {
        Some(limit) if !set("memory-mib") => {
            limit.div_ceil(1 << 20).saturating_add(config.vm.memory_base_mib).max(least_mib)
        }
        _ => config.vm.memory_mib,
    };
    let most = if config.vm.max_memory_mib == 0 { host.memory_mib } else { Some(config.vm.max_memory_mib) };
    if let Some(most) = most {
        mib = mib.min(most);
    }
    (vcpus, mib)
}

/// The size of this host.
pub fn host() -> vz_config::Host {
    let vcpus = std::thread::available_parallelism().map_or(1, |n| u32::try_from(n.get()).unwrap_or(u32::MAX));
    let memory_mib = nix::sys::sysinfo::sysinfo().ok().map(|info| info.ram_total() >> 20);
    vz_config::Host { vcpus, memory_mib }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn spec(resources: &serde_json::Value) -> Spec {
        serde_json::from_value(json!({
            "ociVersion": "1.2.0", "root": { "path": "rootfs" }, "linux": { "resources": resources },
        }))
        .unwrap()
    }

    #[test]
    fn a_vm_is_as_large_as_its_limits_and_its_base() {
        let mut config = Config::default();
        config.vm.max_vcpus = 8;
        config.vm.max_memory_mib = 4096;
        assert_eq!(size(&config, &spec(&json!({}))), (1, 1024));
        let limited = json!({ "cpu": { "quota": 250_000, "period": 100_000 }, "memory": { "limit": 67_108_865 } });
        assert_eq!(size(&config, &spec(&limited)), (3, 65 + 128));
        let pod = |memory: &str, quota: &str| {
            let annotations = json!({
                spec::POD_ROLE: spec::POD_SANDBOX, spec::POD_MEMORY: memory, spec::POD_CPU_QUOTA: quota,
            });
            let value =
                json!({ "ociVersion": "1.2.0", "root": { "path": "r" }, "annotations": annotations, "linux": {} });
            size(&config, &serde_json::from_value(value).unwrap())
        };
        assert_eq!(pod("67108864", "50000"), (1, 1024));
        assert_eq!(pod("2147483648", "250000"), (3, 2048 + 128));
        let huge = json!({ "cpu": { "quota": 99_000_000 }, "memory": { "limit": 1_u64 << 50 } });
        assert_eq!(size(&config, &spec(&huge)), (8, 4096));
    }
}
