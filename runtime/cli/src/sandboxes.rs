//! `vz ps` and `vz logs`: the sandboxes of this host, from their state directories.

use std::{
    fs,
    io::{self, Read},
    path::{Path, PathBuf},
    time::Duration,
};

use nix::time::{ClockId, clock_gettime};
use serde::Serialize;
use vz_machine::control::MachineKind;
use vz_state::Resource;

use crate::table::{Style, colours, columns};

/// A sandbox whose shim lives.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Sandbox {
    namespace: String,
    id: String,
    /// None while the VM is being started, or where this user may not know.
    machine: Option<MachineKind>,
    shim_pid: i32,
    vmm_pid: Option<i32>,
    /// Seconds since its shim was started.
    age_s: u64,
}

/// What `vz ps` prints.
pub fn list(json: bool) -> io::Result<String> {
    let sandboxes = sandboxes(Path::new(vz_state::ROOT), Path::new("/proc"))?;
    if json {
        return Ok(format!("{}\n", serde_json::to_string_pretty(&sandboxes)?));
    }
    let row = |cells: [String; 6], style| cells.into_iter().map(|cell| (cell, style)).collect();
    let heads = ["NAMESPACE", "ID", "MACHINE", "SHIM", "VMM", "AGE"].map(str::to_owned);
    let mut rows: Vec<Vec<(String, Style)>> = vec![row(heads, Style::Dim)];
    for sandbox in sandboxes {
        let machine = sandbox.machine.map_or("-", MachineKind::name).to_owned();
        let vmm = sandbox.vmm_pid.map_or_else(|| "-".to_owned(), |pid| pid.to_string());
        let shim = sandbox.shim_pid.to_string();
        let cells = [sandbox.namespace, sandbox.id, machine, shim, vmm, age(sandbox.age_s)];
        rows.push(row(cells, Style::Plain));
    }
    Ok(columns(&rows, colours()))
}

/// The guest's console of `NAMESPACE/ID`.
pub fn console(sandbox: &str) -> io::Result<Vec<u8>> {
    let bad = |what: String| io::Error::new(io::ErrorKind::InvalidInput, what);
    let parts: Vec<&str> = sandbox.split('/').collect();
    let [namespace, id] = parts[..] else {
        return Err(bad(format!("{sandbox:?} is not NAMESPACE/ID, as `vz ps` shows it")));
    };
    if [namespace, id].iter().any(|part| part.is_empty() || part.starts_with('.')) {
        return Err(bad(format!("{sandbox:?} is not the name of a sandbox")));
    }
    let dir = vz_state::dir(namespace, id);
    let path = dir.join(vz_state::CONSOLE);
    let mut bytes = Vec::new();
    match fs::File::open(&path) {
        Ok(mut file) => file.read_to_end(&mut bytes)?,
        Err(e) if e.kind() == io::ErrorKind::NotFound && !dir.exists() => {
            return Err(io::Error::new(
                e.kind(),
                format!("there is no sandbox {sandbox}: `vz ps` lists those that live"),
            ));
        }
        Err(e) => return Err(io::Error::new(e.kind(), format!("read {}: {e}", path.display()))),
    };
    Ok(bytes)
}

fn sandboxes(root: &Path, proc: &Path) -> io::Result<Vec<Sandbox>> {
    let mut found = Vec::new();
    for (namespace, dir) in directories(root)? {
        // It may end while we look.
        for (id, dir) in directories(&dir).unwrap_or_default() {
            // The last line may be half written.
            let Ok(owned) = vz_state::read(&dir, |_| ()) else { continue };
            found.extend(sandbox(&namespace, &id, &owned, proc));
        }
    }
    found.sort_by(|a, b| (&a.namespace, &a.id).cmp(&(&b.namespace, &b.id)));
    Ok(found)
}

/// Name and path of each directory in `dir`; none where there is no `dir`.
fn directories(dir: &Path) -> io::Result<Vec<(String, PathBuf)>> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(io::Error::new(e.kind(), format!("list {}: {e}", dir.display()))),
    };
    let named = |entry: fs::DirEntry| (entry.file_name().to_string_lossy().into_owned(), entry.path());
    Ok(entries.flatten().map(named).filter(|(_, path)| path.is_dir()).collect())
}

/// The sandbox that owns this; none where its shim is gone.
fn sandbox(namespace: &str, id: &str, owned: &[Resource], proc: &Path) -> Option<Sandbox> {
    let living = |wanted: &str| {
        let is_it = |resource: &&Resource| matches!(resource, Resource::Process { role, .. } if role == wanted);
        let process = owned.iter().rfind(is_it)?.process()?;
        process.is_alive_below(proc).then_some(process)
    };
    let shim = living(vz_state::SHIM)?;
    let vmm_pid = living(vz_state::VMM).map(|vmm| vmm.pid);
    let hertz =
        nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK).ok().flatten().and_then(|n| u64::try_from(n).ok());
    let up = clock_gettime(ClockId::CLOCK_BOOTTIME).map(Duration::from).unwrap_or_default().as_secs();
    Some(Sandbox {
        namespace: namespace.to_owned(),
        id: id.to_owned(),
        machine: vmm_pid.and_then(|pid| machine(proc, pid)),
        shim_pid: shim.pid,
        vmm_pid,
        age_s: up.saturating_sub(shim.start_time / hertz.unwrap_or(100)),
    })
}

/// Which machine a vmm process runs: it has a VM of its own, or QEMU as its child.
fn machine(proc: &Path, vmm: i32) -> Option<MachineKind> {
    let dir = proc.join(vmm.to_string());
    let mut files = fs::read_dir(dir.join("fd")).ok()?.flatten();
    if files.any(|fd| fs::read_link(fd.path()).is_ok_and(|file| file.as_os_str() == "anon_inode:kvm-vm")) {
        return Some(MachineKind::Kvm);
    }
    let children = fs::read_to_string(dir.join("task").join(vmm.to_string()).join("children")).ok()?;
    children.split_whitespace().next().map(|_| MachineKind::Qemu)
}

fn age(seconds: u64) -> String {
    match (seconds / 86400, seconds / 3600, seconds / 60) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, minutes) => format!("{minutes}m{:02}s", seconds % 60),
        (0, hours, minutes) => format!("{hours}h{:02}m", minutes % 60),
        (days, hours, _) => format!("{days}d{:02}h", hours % 24),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn process(proc: &Path, pid: i32, state: char, start: u64) {
        let dir = proc.join(pid.to_string());
        fs::create_dir_all(dir.join("fd")).unwrap();
        fs::create_dir_all(dir.join("task").join(pid.to_string())).unwrap();
        fs::write(dir.join("task").join(pid.to_string()).join("children"), "").unwrap();
        let zeros = "0 ".repeat(18);
        fs::write(dir.join("stat"), format!("{pid} (a) b) {state} {zeros}{start} 0\n")).unwrap();
    }

    fn journal(root: &Path, name: &str, lines: &[(&str, i32, u64)]) {
        let dir = root.join(name);
        fs::create_dir_all(&dir).unwrap();
        let line = |(role, pid, start): &(&str, i32, u64)| {
            format!("{{\"made\":{{\"kind\":\"process\",\"role\":\"{role}\",\"pid\":{pid},\"start_time\":{start}}}}}\n")
        };
        let mut text: String = lines.iter().map(line).collect();
        text.push_str("{\"made\":{\"kind\":\"tap\",\"name\":\"t\"}}\n{\"gone\":{\"kind\":\"new\"}}\n{\"made\":{\"ki");
        fs::write(dir.join("journal"), text).unwrap();
    }

    #[test]
    fn sandboxes_whose_shim_lives_are_listed() {
        let dir = tempfile::tempdir().unwrap();
        let (root, proc) = (dir.path().join("vz"), dir.path().join("proc"));
        assert_eq!(sandboxes(&root, &proc).unwrap(), []);
        for (pid, state, start) in [(10, 'S', 5), (11, 'S', 6), (20, 'S', 7), (21, 'S', 8), (30, 'Z', 9), (40, 'S', 99)]
        {
            process(&proc, pid, state, start);
        }
        fs::write(proc.join("11/task/11/children"), "12 ").unwrap();
        symlink("anon_inode:kvm-vm", proc.join("21/fd/9")).unwrap();
        journal(&root, "ns/b", &[("shim", 10, 5), ("vmm", 11, 6), ("anchor", 13, 7)]);
        journal(&root, "ns/a", &[("shim", 20, 7), ("vmm", 21, 8)]);
        journal(&root, "ns/ended", &[("shim", 30, 9)]);
        journal(&root, "ns/another_has_its_pid", &[("shim", 40, 1)]);
        journal(&root, "other/c", &[("shim", 10, 5)]);
        fs::write(root.join(".kvm.json"), "{}").unwrap();
        let found = sandboxes(&root, &proc).unwrap();
        let names: Vec<_> =
            found.iter().map(|s| (s.namespace.as_str(), s.id.as_str(), s.machine, s.shim_pid, s.vmm_pid)).collect();
        assert_eq!(
            names,
            [
                ("ns", "a", Some(MachineKind::Kvm), 20, Some(21)),
                ("ns", "b", Some(MachineKind::Qemu), 10, Some(11)),
                ("other", "c", None, 10, None),
            ]
        );
    }

    #[test]
    fn names_that_are_no_sandboxes_are_refused() {
        for name in ["", "ns", "ns/", "/id", "../etc", "ns/../x", "ns/.."] {
            assert_eq!(console(name).unwrap_err().kind(), io::ErrorKind::InvalidInput, "{name}");
        }
        assert!(console("no-such/sandbox").unwrap_err().to_string().contains("vz ps"));
    }

    #[test]
    fn an_age_has_two_units() {
        assert_eq!([0, 59, 61, 3600, 90061].map(age), ["0s", "59s", "1m01s", "1h00m", "1d01h"]);
    }
}
