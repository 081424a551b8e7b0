//! Changes the limits of a container that there is: in the guest, and for the sandbox's only container on the host too.

use oci_spec::runtime::{LinuxMemory, LinuxResources};

use super::{Container, Error, State, plan};
use crate::{guest::Size, spec};

impl Container {
    /// Sets the limits that `resources` name; what they do not name stays. A limit above the VM's size is refused.
    pub async fn update(&self, resources: LinuxResources) -> Result<(), Error> {
        if let State::Stopped(_) = self.init.state() {
            return Err(self.wrong_state(&self.init, "must be running"));
        }
        fits(&resources, self.lent.guest.size)?;
        let cpu = resources.cpu().clone();
        let mut dropped = Vec::new();
        let resources = plan::guest_resources(resources, &mut dropped);
        for field in dropped {
            tracing::info!(container = self.id, field, "has no meaning in a vm, is left out");
        }
        self.lent.guest.agent.update_container(&self.id, spec::write("resources", &resources)?).await?;
        match (&self.lent.host.cgroup, cpu) {
            (Some(cgroup), Some(cpu)) => Ok(cgroup.change_cpu(&cpu)?),
            _ => Ok(()),
        }
    }
}

/// Refuses what a VM of this size does not have.
fn fits(resources: &LinuxResources, size: Size) -> Result<(), Error> {
    let memory = resources.memory().as_ref().and_then(LinuxMemory::limit);
    let asked = memory.and_then(spec::bytes).map(|bytes| bytes.div_ceil(1 << 20));
    if let Some(mib) = asked.filter(|mib| *mib > size.memory_mib) {
        return Err(Error::TooLarge {
            asked: format!("memory limit of {mib} MiB"),
            has: format!("{} MiB", size.memory_mib),
            set: "vm.memory_mib",
        });
    }
    let cpus = resources.cpu().as_ref().and_then(spec::cpus);
    if let Some(cpus) = cpus.filter(|cpus| *cpus > size.vcpus) {
        return Err(Error::TooLarge {
            asked: format!("CPU limit of {cpus} CPUs"),
            has: format!("{} vCPUs", size.vcpus),
            set: "vm.vcpus",
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn limits_above_the_vms_size_are_refused_by_name() {
        let check = |resources: serde_json::Value| {
            let resources: LinuxResources = serde_json::from_value(resources).unwrap();
            fits(&resources, Size { vcpus: 2, memory_mib: 512 }).map_err(|error| error.to_string())
        };
        assert_eq!(check(json!({ "memory": { "limit": 512 << 20 }, "cpu": { "quota": 200_000 } })), Ok(()));
        assert_eq!(check(json!({ "memory": { "limit": -1 }, "cpu": { "quota": -1 } })), Ok(()));
        let memory = check(json!({ "memory": { "limit": (512 << 20) + 1 } })).unwrap_err();
        assert!(memory.contains("513 MiB") && memory.contains("vm.memory_mib"), "{memory}");
        let cpu = check(json!({ "cpu": { "quota": 50_001, "period": 25_000 } })).unwrap_err();
        assert!(cpu.contains("3 CPUs") && cpu.contains("2 vCPUs"), "{cpu}");
    }
}
