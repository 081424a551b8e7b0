//! The OCI spec, from the host's view to the guest's.
//!
//! [`plan`] is pure: it says what is to be shared and which hooks run where, and leaves doing it to others. What cannot
//! be kept across the VM's boundary is either meaningless in a VM (then it is listed in [`Plan::dropped`], which is
//! logged), or an error that names the field: nothing is dropped silently.

use std::{
    cell::LazyCell,
    fs::{self, File},
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::FileTypeExt,
    },
    path::{Path, PathBuf},
};

use nix::sys::statfs::{TMPFS_MAGIC, fstatfs};
use oci_spec::runtime::{
    Hook, Hooks, Linux, LinuxDeviceType, LinuxNamespaceType, LinuxResources, Mount, Process, Spec,
};
use vz_proto::{NETNS_PATH, SHARE_PATH, SHM_PATH};

use super::peers::{self, Peers};
use crate::{
    host::{
        disks::{self, Disk},
        mounts::{self, Entry, open_source},
        share::{Bind, Propagation, ROOTFS, ReadOnly},
    },
    spec::{self, Error, unsupported},
};

/// Character devices that the guest has of its own, under the same name and number as every Linux host.
const GUEST_DEVICES: [&str; 10] = [
    "/dev/null",
    "/dev/zero",
    "/dev/full",
    "/dev/random",
    "/dev/urandom",
    "/dev/tty",
    "/dev/ptmx",
    "/dev/console",
    "/dev/fuse",
    "/dev/kmsg",
];

/// Bytes of a container's shared memory where nobody says: what clients ask for.
const DEFAULT_SHM: u64 = 64 << 20;

/// What there is to do for a container.
#[derive(Debug)]
pub struct Plan {
    /// The spec that the guest gets.
    pub guest: Spec,
    /// What the host shares with the guest, besides the root file system.
    pub binds: Vec<Bind>,
    /// Hooks that run on the host.
    pub hooks: Hooks,
    /// Fields that have no meaning in a VM, for the log.
    pub dropped: Vec<String>,
}

/// Where the guest finds a container's directory of the share.
fn place(container: &str) -> PathBuf {
    Path::new(SHARE_PATH).join(container)
}

/// Makes the guest's spec for `container` out of the host's.
///
/// `disks` are those of the VM that are the container's, and `peers` the containers whose namespaces it may join.
/// `looking` is told each path of the host that is looked at next.
pub fn plan(
    mut spec: Spec,
    container: &str,
    disks: &[Disk],
    peers: &Peers,
    looking: &dyn Fn(&Path),
) -> Result<Plan, Error> {
    let mut dropped = Vec::new();
    refuse_foreign(&spec)?;
    let shm = Shm::of(&spec, container, peers);
    let process = spec.process_mut().as_mut().ok_or(Error::Missing("process"))?;
    guest_process(process, &mut dropped);
    let mut binds = Vec::new();
    if let Some(mounts) = spec.mounts_mut() {
        let table = LazyCell::new(|| {
            mounts::read().unwrap_or_else(|error| {
                tracing::warn!(%error, "mounts below read-only volumes are read-only too");
                Vec::new()
            })
        });
        let mut all = Vec::with_capacity(mounts.len());
        for (index, mut mount) in mounts.drain(..).enumerate() {
            disks::settle(&mut mount, disks);
            looking(mount.source().as_deref().unwrap_or(Path::new("/")));
            let bind = guest_mount(&mut mount, container, index, &shm, &mut dropped)?;
            let submounts = bind.as_ref().map(|bind| writable_submounts(&mount, bind, &table)).unwrap_or_default();
            all.push(mount);
            all.extend(submounts);
            binds.extend(bind);
        }
        *mounts = all;
    }
    let root = spec.root_mut().as_mut().ok_or(Error::Missing("root"))?;
    root.set_path(place(container).join(ROOTFS));
    let linux = spec.linux_mut().as_mut().ok_or(Error::Missing("linux"))?;
    guest_linux(linux, container, peers, &mut dropped)?;
    let hooks = split_hooks(&mut spec);
    Ok(Plan { guest: spec, binds, hooks, dropped })
}

/// Whose shared memory a container has.
#[derive(Debug, PartialEq, Eq)]
enum Shm {
    /// The VM's: it has no IPC namespace.
    Vm,
    /// Its own.
    Own,
    /// That of a pod, or of whichever container's IPC namespace it joins: this one's.
    Shared(String),
}

impl Shm {
    fn of(spec: &Spec, container: &str, peers: &Peers) -> Self {
        let namespaces = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_ref());
        let Some(ipc) = namespaces.into_iter().flatten().find(|n| n.typ() == LinuxNamespaceType::Ipc) else {
            return Self::Vm;
        };
        let owner = ipc.path().as_ref().and_then(|path| peers.owner(LinuxNamespaceType::Ipc, path));
        match owner {
            Some(owner) => Self::Shared(owner.to_owned()),
            None if spec::is_pod(spec) => Self::Shared(container.to_owned()),
            None => Self::Own,
        }
    }
}

/// Makes the guest's form of a process that is started in a running container.
pub fn exec_process(mut process: Process) -> Process {
    guest_process(&mut process, &mut Vec::new());
    process
}

fn refuse_foreign(spec: &Spec) -> Result<(), Error> {
    let foreign = [
        ("windows", spec.windows().is_some()),
        ("solaris", spec.solaris().is_some()),
        ("vm", spec.vm().is_some()),
        ("zos", spec.zos().is_some()),
    ];
    for (field, set) in foreign {
        if set {
            return Err(unsupported(field, "only Linux containers can be run"));
        }
    }
    Ok(())
}

/// Host security modules know nothing of what runs in the guest; the VM is the boundary.
fn guest_process(process: &mut Process, dropped: &mut Vec<String>) {
    if let Some(profile) = process.apparmor_profile().clone().filter(|p| !p.is_empty()) {
        dropped.push(format!("process.apparmorProfile={profile}"));
    }
    if let Some(label) = process.selinux_label().clone().filter(|l| !l.is_empty()) {
        dropped.push(format!("process.selinuxLabel={label}"));
    }
    process.set_apparmor_profile(None);
    process.set_selinux_label(None);
}

fn guest_mount(
    mount: &mut Mount,
    container: &str,
    index: usize,
    shm: &Shm,
    dropped: &mut Vec<String>,
) -> Result<Option<Bind>, Error> {
    let options = mount.options().clone().unwrap_or_default();
    let has = |name: &str| options.iter().any(|option| option == name);
    let is_bind = mount.typ().as_deref() == Some("bind") || has("bind") || has("rbind");
    let destination = mount.destination().clone();
    if !is_bind {
        if let Shm::Shared(owner) = shm
            && destination == Path::new("/dev/shm")
            && mount.typ().as_deref() == Some("tmpfs")
        {
            let size = options.iter().rfind(|option| option.starts_with("size="));
            share_memory(mount, owner, size.cloned().unwrap_or_else(|| format!("size={DEFAULT_SHM}")));
        }
        return Ok(None);
    }
    let source = mount.source().clone().ok_or(Error::Missing("source of a bind mount"))?;
    let propagation = propagation(&options, &destination)?;
    if ["/proc", "/sys", "/dev/mqueue", "/dev/pts"].iter().any(|kernel| source.starts_with(kernel)) {
        // The guest has these of its own; the host's would tell the container about the host.
        dropped.push(format!("mounts: {} is the guest's own", source.display()));
        return Ok(None);
    }
    let missing = |e: io::Error| Error::Source {
        source_path: source.clone(),
        destination: destination.clone(),
        reason: e.to_string(),
    };
    let file = File::from(open_source(&source).map_err(missing)?);
    let kind = file.metadata().map_err(missing)?.file_type();
    if destination == Path::new("/dev/shm") && is_clients_shm(&source, &file, shm).map_err(missing)? {
        // Shared memory cannot be shared across a VM's boundary: the container gets a tmpfs of the guest, of the same
        // size.
        dropped.push(format!("mounts: {} for /dev/shm, which is a tmpfs of the guest", source.display()));
        let size = fstatfs(&file).map(|found| found.blocks().saturating_mul(found.block_size().cast_unsigned()));
        let size = size.ok().filter(|size| *shm != Shm::Vm && *size > 0).unwrap_or(DEFAULT_SHM);
        let size = format!("size={size}");
        if let Shm::Shared(owner) = shm {
            share_memory(mount, owner, size);
        } else {
            mount.set_typ(Some("tmpfs".into())).set_source(Some("shm".into()));
            mount.set_options(Some(["nosuid", "noexec", "nodev", "mode=1777", &size].map(String::from).into()));
        }
        return Ok(None);
    }
    if kind.is_char_device() || kind.is_block_device() {
        if GUEST_DEVICES.iter().any(|device| source == Path::new(device)) {
            return Ok(None);
        }
        return Err(unsupported(
            format!("mounts: device {}", source.display()),
            "a host device cannot be mounted into a VM; give it a block device as a disk (`--device`)",
        ));
    }
    let name = PathBuf::from(format!("mount{index}"));
    mount.set_source(Some(place(container).join(&name)));
    let readonly = match (has("rro"), has("ro")) {
        (true, _) => ReadOnly::All,
        (false, true) => ReadOnly::Top,
        (false, false) => ReadOnly::No,
    };
    let recursive = has("rbind") || has("rro") || !has("bind");
    // Mapped ownership is done where the files are, and virtiofs has no idmapped mounts in the guest.
    if mount.uid_mappings().is_some() || mount.gid_mappings().is_some() || has("idmap") || has("ridmap") {
        return Err(unsupported(
            format!("mounts: idmap of {}", destination.display()),
            "id-mapped mounts are not supported; change the files' owner, or leave the user namespace out",
        ));
    }
    let is_etc_file = kind.is_file() && crate::host::etc_files::is_etc_file(&destination);
    let (file, is_dir) = (OwnedFd::from(file), kind.is_dir());
    Ok(Some(Bind { source, file, is_dir, name, readonly, recursive, propagation, is_etc_file }))
}

/// Makes a mount that of the shared memory of `owner`'s IPC namespace. `size` is an option of tmpfs.
fn share_memory(mount: &mut Mount, owner: &str, size: String) {
    let options = ["rbind", "nosuid", "noexec", "nodev"].map(String::from);
    mount.set_typ(Some("bind".into())).set_source(Some(Path::new(SHM_PATH).join(owner)));
    mount.set_options(Some(options.into_iter().chain([size]).collect()));
}

/// Whether the source of a bind for /dev/shm is what clients make for a container's shared memory: an empty tmpfs for
/// nothing else, or the host's own for a container without an IPC namespace. Anything else is a volume, and stays one.
fn is_clients_shm(source: &Path, file: &File, shm: &Shm) -> io::Result<bool> {
    if *shm == Shm::Vm && source == Path::new("/dev/shm") {
        return Ok(true);
    }
    if fstatfs(file)?.filesystem_type() != TMPFS_MAGIC || !vz_sys::mount::is_mount_root(file.as_fd())? {
        return Ok(false);
    }
    Ok(fs::read_dir(vz_sys::mount::path_of(file.as_fd()))?.next().is_none())
}

/// The propagation that a mount's options ask for, the last one of several.
fn propagation(options: &[String], destination: &Path) -> Result<Propagation, Error> {
    let mut propagation = Propagation::Slave;
    for option in options {
        propagation = match option.as_str() {
            "slave" | "rslave" => Propagation::Slave,
            "private" | "rprivate" | "unbindable" | "runbindable" => Propagation::Private,
            "shared" | "rshared" => {
                return Err(unsupported(
                    format!("mounts: {option} of {}", destination.display()),
                    "what a VM mounts cannot appear on the host; use rslave, which shows the container what the host \
                     mounts",
                ));
            }
            _ => propagation,
        };
    }
    Ok(propagation)
}

/// Mounts of their own for what is mounted below a bind that is read-only by itself only (`ro`, not `rro`): in the
/// guest they would otherwise take the bind's `ro` over. Those that the host has read-only stay so.
fn writable_submounts(mount: &Mount, bind: &Bind, table: &[Entry]) -> Vec<Mount> {
    if bind.readonly != ReadOnly::Top || !bind.recursive {
        return Vec::new();
    }
    let Ok(source) = fs::read_link(vz_sys::mount::path_of(bind.file.as_fd())) else { return Vec::new() };
    let mut below: Vec<&Path> = table.iter().filter_map(|known| known.point.strip_prefix(&source).ok()).collect();
    below.retain(|path| !path.as_os_str().is_empty());
    // Parents before what is below them.
    below.sort();
    below.dedup();
    let options = mount.options().iter().flatten().filter(|option| !["ro", "rbind"].contains(&option.as_str()));
    let options: Vec<String> = options.cloned().chain(["bind".into()]).collect();
    let shared = mount.source().clone().unwrap_or_default();
    let submount = |path: &Path| {
        let mut submount = Mount::default();
        submount
            .set_destination(mount.destination().join(path))
            .set_typ(Some("bind".into()))
            .set_source(Some(shared.join(path)))
            .set_options(Some(options.clone()));
        submount
    };
    below.into_iter().map(submount).collect()
}

fn guest_linux(linux: &mut Linux, container: &str, peers: &Peers, dropped: &mut Vec<String>) -> Result<(), Error> {
    let mut namespaces = linux.namespaces().clone().unwrap_or_default();
    for namespace in &mut namespaces {
        let path = namespace.path().clone().filter(|path| !path.as_os_str().is_empty());
        match (namespace.typ(), path) {
            (LinuxNamespaceType::Network, _) => {
                namespace.set_path(Some(NETNS_PATH.into()));
            }
            (kind, Some(path)) => {
                let joined = peers.owner(kind, &path).and_then(|owner| peers::guest_path(owner, kind));
                let joined = joined.ok_or_else(|| {
                    unsupported(
                        format!("linux.namespaces: {kind} {}", path.display()),
                        "a VM's container can join the namespaces of containers of the same sandbox only",
                    )
                })?;
                namespace.set_path(Some(joined));
            }
            (_, None) => {}
        }
    }
    linux.set_namespaces(Some(namespaces));
    linux.set_cgroups_path(Some(format!("/{container}").into()));
    if let Some(label) = linux.mount_label().clone().filter(|l| !l.is_empty()) {
        dropped.push(format!("linux.mountLabel={label}"));
    }
    linux.set_mount_label(None);
    if linux.intel_rdt().is_some() {
        return Err(unsupported("linux.intelRdt", "cache and memory bandwidth belong to the host"));
    }
    if linux.net_devices().as_ref().is_some_and(|devices| !devices.is_empty()) {
        return Err(unsupported("linux.netDevices", "a host's network device cannot be moved into a VM"));
    }
    for device in linux.devices().iter().flatten() {
        // Block devices are the VM's disks.
        let possible = matches!(device.typ(), LinuxDeviceType::P | LinuxDeviceType::B)
            || GUEST_DEVICES.iter().any(|known| device.path() == Path::new(known));
        if !possible {
            return Err(unsupported(
                format!("linux.devices: {}", device.path().display()),
                "character devices of the host cannot be given to a VM: leave the device (or `--privileged`) out",
            ));
        }
    }
    let resources = linux.resources().clone().map(|resources| guest_resources(resources, dropped));
    linux.set_resources(resources);
    Ok(())
}

/// Leaves what limits the container within the VM, and takes out what is about the host's hardware.
pub fn guest_resources(mut resources: LinuxResources, dropped: &mut Vec<String>) -> LinuxResources {
    if let Some(cpu) = resources.cpu_mut() {
        for (name, value) in [("cpus", cpu.cpus().clone()), ("mems", cpu.mems().clone())] {
            if let Some(value) = value.filter(|value| !value.is_empty()) {
                dropped.push(format!("linux.resources.cpu.{name}={value}"));
            }
        }
        cpu.set_cpus(None).set_mems(None);
        if cpu.realtime_runtime().is_some_and(|n| n != 0) || cpu.realtime_period().is_some_and(|n| n != 0) {
            dropped.push("linux.resources.cpu.realtime*, which cgroup v2 does not have".into());
        }
        cpu.set_realtime_runtime(None).set_realtime_period(None);
        // What clients say for the usual one.
        if cpu.period() == Some(0) {
            cpu.set_period(None);
        }
    }
    if let Some(memory) = resources.memory_mut() {
        // The guest has no swap: the memory limit is the limit of both.
        memory.set_swap(None);
        if memory.swappiness().is_some() || memory.kernel().is_some() || memory.kernel_tcp().is_some() {
            dropped.push("linux.resources.memory.{swappiness,kernel,kernelTCP}, which cgroup v2 does not have".into());
        }
        if memory.disable_oom_killer() == Some(true) {
            dropped.push("linux.resources.memory.disableOOMKiller, which cgroup v2 does not have".into());
        }
        memory.set_swappiness(None).set_kernel(None).set_kernel_tcp(None).set_disable_oom_killer(None);
    }
    if resources.block_io().is_some() {
        dropped.push("linux.resources.blockIO, which is about the host's disks".into());
        resources.set_block_io(None);
    }
    if resources.network().is_some() {
        dropped.push("linux.resources.network, which cgroup v2 does not have".into());
        resources.set_network(None);
    }
    resources
}

/// Leaves the hooks that run in the container's namespaces to the guest, and returns the others.
fn split_hooks(spec: &mut Spec) -> Hooks {
    let Some(mut hooks) = spec.hooks().clone() else { return Hooks::default() };
    let mut guest = Hooks::default();
    guest.set_create_container(hooks.create_container().clone());
    guest.set_start_container(hooks.start_container().clone());
    let any = |list: &Option<Vec<Hook>>| list.as_ref().is_some_and(|list| !list.is_empty());
    let needed = any(guest.create_container()) || any(guest.start_container());
    spec.set_hooks(needed.then_some(guest));
    hooks.set_create_container(None).set_start_container(None);
    hooks
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn spec(change: impl FnOnce(&mut Value)) -> Spec {
        let mut value = json!({
            "ociVersion": "1.2.0",
            "process": { "user": { "uid": 0, "gid": 0 }, "args": ["sh"], "cwd": "/", "apparmorProfile": "docker-default" },
            "root": { "path": "rootfs" },
            "mounts": [{ "destination": "/proc", "type": "proc", "source": "proc" }],
            "linux": { "namespaces": [{ "type": "pid" }, { "type": "network" }], "cgroupsPath": "a.slice:b:c" },
        });
        change(&mut value);
        serde_json::from_value(value).unwrap()
    }

    fn plan(spec: Spec, container: &str, disks: &[Disk]) -> Result<Plan, Error> {
        let peers = [(41, "pause".to_owned())].into_iter().collect();
        super::plan(spec, container, disks, &peers, &|_| ())
    }

    fn guest(spec: Spec) -> Value {
        serde_json::to_value(plan(spec, "c1", &[]).unwrap().guest).unwrap()
    }

    #[test]
    fn paths_become_the_guests() {
        let guest = guest(spec(|_| ()));
        assert_eq!(guest["root"]["path"], "/run/vz/share/c1/rootfs");
        assert_eq!(guest["linux"]["cgroupsPath"], "/c1");
        assert_eq!(guest["linux"]["namespaces"][1]["path"], NETNS_PATH);
        assert_eq!(guest["process"].get("apparmorProfile"), None);
        assert_eq!(guest["mounts"][0]["source"], "proc");
        assert_eq!(guest["linux"]["namespaces"][1]["path"], NETNS_PATH);
    }

    #[test]
    fn a_bind_is_shared_once_and_found_below_the_share() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().to_str().unwrap().to_owned();
        let plan = plan(
            spec(|s| {
                s["mounts"][0] =
                    json!({ "destination": "/v", "type": "bind", "source": path, "options": ["rbind", "ro"] });
            }),
            "c1",
            &[],
        )
        .unwrap();
        let [bind] = &plan.binds[..] else { panic!("{:?}", plan.binds) };
        assert_eq!((bind.source.as_path(), bind.name.as_path()), (dir.path(), Path::new("mount0")));
        assert_eq!((bind.readonly, bind.propagation), (ReadOnly::Top, Propagation::Slave));
        assert!(bind.is_dir && bind.recursive && !bind.is_etc_file);
        let mount = &plan.guest.mounts().as_ref().unwrap()[0];
        assert_eq!(mount.source().as_deref(), Some(Path::new("/run/vz/share/c1/mount0")));
    }

    fn bound(options: &[&str]) -> Result<Plan, Error> {
        let mount = json!({ "destination": "/v", "type": "bind", "source": "/usr", "options": options });
        plan(spec(|s| s["mounts"][0] = mount), "c1", &[])
    }

    #[test]
    fn propagation_and_read_only_are_taken_from_the_options() {
        let of = |options: &[&str]| {
            let plan = bound(options).unwrap();
            (plan.binds[0].readonly, plan.binds[0].propagation)
        };
        let (slave, private) = (Propagation::Slave, Propagation::Private);
        assert_eq!(of(&["rbind"]), (ReadOnly::No, slave));
        assert_eq!(of(&["rbind", "rprivate", "ro"]), (ReadOnly::Top, private));
        assert_eq!(of(&["rbind", "rro", "ro", "private"]), (ReadOnly::All, private));
        assert_eq!(of(&["rbind", "rprivate", "rslave"]), (ReadOnly::No, slave));
        for option in ["shared", "rshared"] {
            let error = bound(&["rbind", option]).unwrap_err().to_string();
            assert!(error.contains(option) && error.contains("rslave"), "{error}");
        }
    }

    #[test]
    fn what_is_mounted_below_a_read_only_bind_is_mounted_by_itself() {
        let line = |id: i32, point: &str| Entry { id, point: point.into() };
        let table = [line(2, "/usr"), line(3, "/usr/b/c"), line(4, "/usr/a"), line(5, "/usr/b"), line(6, "/usrlocal")];
        let mounts = |options: &[&str]| {
            let mut plan = bound(options).unwrap();
            let (mount, bind) = (plan.guest.mounts().as_ref().unwrap()[0].clone(), plan.binds.remove(0));
            serde_json::to_value(writable_submounts(&mount, &bind, &table)).unwrap()
        };
        let one = |path: &str| {
            json!({
                "destination": format!("/v/{path}"), "type": "bind",
                "source": format!("/run/vz/share/c1/mount0/{path}"), "options": ["nosuid", "rprivate", "bind"],
            })
        };
        assert_eq!(mounts(&["rbind", "nosuid", "ro", "rprivate"]), json!([one("a"), one("b"), one("b/c")]));
        assert_eq!(mounts(&["rbind", "rro"]), json!([]));
        assert_eq!(mounts(&["bind", "ro"]), json!([]));
        assert_eq!(mounts(&["rbind"]), json!([]));
    }

    #[test]
    fn a_volume_for_shared_memory_stays_a_volume() {
        let dir = tempfile::tempdir().unwrap();
        let shm = |source: &str, namespaces: Value| {
            let mount = json!({ "destination": "/dev/shm", "type": "bind", "source": source, "options": ["rbind"] });
            let plan = plan(
                spec(|s| {
                    s["mounts"][0] = mount;
                    s["linux"]["namespaces"] = namespaces;
                }),
                "c1",
                &[],
            )
            .unwrap();
            serde_json::to_value(plan.guest).unwrap()["mounts"][0]["type"].clone()
        };
        let (own, hosts) = (json!([{ "type": "ipc" }, { "type": "network" }]), json!([{ "type": "network" }]));
        assert_eq!(shm(dir.path().to_str().unwrap(), own.clone()), "bind");
        assert_eq!(shm("/dev/shm", hosts), "tmpfs");
    }

    #[test]
    fn a_member_of_a_pod_joins_the_namespaces_of_its_pause_container() {
        let with = |pid: u32| {
            let path = |kind: &str| json!({ "type": kind, "path": format!("/proc/{pid}/ns/{kind}") });
            plan(spec(|s| s["linux"]["namespaces"] = json!([path("ipc"), path("pid"), path("uts")])), "c1", &[])
        };
        let guest = serde_json::to_value(with(41).unwrap().guest).unwrap();
        let paths: Vec<_> = (0..3).map(|index| guest["linux"]["namespaces"][index]["path"].clone()).collect();
        assert_eq!(paths, ["/run/vz/ns/pause/ipc", "/run/vz/ns/pause/pid", "/run/vz/ns/pause/uts"]);
        assert!(with(42).unwrap_err().to_string().contains("/proc/42/ns/ipc"));
    }

    #[test]
    fn shared_memory_is_the_pods() {
        let shm = |pod: bool, ipc: Value| {
            let spec = spec(|s| {
                s["linux"]["namespaces"] = json!([ipc]);
                if pod {
                    s["annotations"] = json!({ "io.kubernetes.cri.container-type": "sandbox" });
                }
            });
            Shm::of(&spec, "c1", &[(41, "pause".to_owned())].into_iter().collect())
        };
        assert_eq!(shm(true, json!({ "type": "ipc" })), Shm::Shared("c1".into()));
        assert_eq!(shm(false, json!({ "type": "ipc" })), Shm::Own);
        assert_eq!(shm(false, json!({ "type": "ipc", "path": "/proc/41/ns/ipc" })), Shm::Shared("pause".into()));
        assert_eq!(shm(false, json!({ "type": "uts" })), Shm::Vm);
    }

    #[test]
    fn a_missing_source_and_a_host_device_are_named() {
        let bind = |source: &str| {
            let s = json!({ "destination": "/v", "type": "bind", "source": source, "options": ["bind"] });
            plan(spec(|v| v["mounts"][0] = s), "c1", &[]).unwrap_err().to_string()
        };
        assert!(bind("/nowhere/at/all").contains("/nowhere/at/all"));
        let device = json!({ "path": "/dev/mem", "type": "c", "major": 1, "minor": 1 });
        let error = plan(spec(|v| v["linux"]["devices"] = json!([device])), "c1", &[]).unwrap_err().to_string();
        assert!(error.contains("/dev/mem"), "{error}");
    }

    #[test]
    fn limits_of_the_hosts_hardware_are_taken_out_and_said() {
        let plan = plan(
            spec(|v| {
                v["linux"]["resources"] = json!({
                    "cpu": { "cpus": "3", "quota": 150_000, "period": 0 },
                    "memory": { "limit": 67_108_864, "swap": 67_108_864, "swappiness": 10 },
                    "pids": { "limit": 5 }, "blockIO": { "weight": 10 },
                });
            }),
            "c1",
            &[],
        )
        .unwrap();
        assert_eq!(spec::limits(&plan.guest), (Some(2), Some(67_108_864)));
        assert_eq!(plan.dropped.len(), 4, "{:?}", plan.dropped);
        let guest = serde_json::to_value(plan.guest).unwrap();
        assert_eq!(guest["linux"]["resources"]["memory"], json!({ "limit": 67_108_864 }));
        assert_eq!(guest["linux"]["resources"]["pids"]["limit"], 5);
        assert_eq!(guest["linux"]["resources"]["cpu"].get("period"), None);
    }

    #[test]
    fn hooks_are_split_between_host_and_guest() {
        let hook = json!([{ "path": "/bin/true" }]);
        let plan = plan(
            spec(|v| v["hooks"] = json!({ "createRuntime": hook, "poststop": hook, "startContainer": hook })),
            "c1",
            &[],
        )
        .unwrap();
        assert!(plan.hooks.create_runtime().is_some() && plan.hooks.poststop().is_some());
        assert!(plan.hooks.start_container().is_none());
        let guest = serde_json::to_value(plan.guest).unwrap();
        assert_eq!(guest["hooks"], json!({ "startContainer": hook }));
    }
}
