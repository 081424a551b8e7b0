//! A hostile guest: what confines the processes of its sandbox, threads of them taken over, and guest root with every
//! capability. Nothing outside the share is read or written, nothing on the host grows without bound, and other
//! sandboxes do not notice.
//!
//! What needs a hostile guest kernel, raw requests of its drivers, is in `metal`.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::Path,
    time::Duration,
};

use nix::{libc, sys::signal::Signal};
use vz_suite::{
    Lab, Skip, Verdict,
    command::Program,
    container::{Container, Task},
    host::{Role, await_process, find},
    inject::{Arg, Outcome, call, call_and_hold},
    lab::{BUSYBOX, DEBIAN},
    poll::until,
    tests,
    watch::Watch,
};
// For the other modules with hostile guests.
pub use vz_suite::watch::{private_kib, rss_kib};

tests![
    the_vmm_is_confined,
    qemu_is_confined,
    a_sandbox_is_in_its_cgroup,
    a_vmm_thread_that_is_taken_over_opens_nothing,
    a_vmm_thread_that_is_taken_over_dies_of_what_it_tries,
    qemu_that_is_taken_over_gets_nowhere,
    guest_root_stays_below_its_share,
    a_rename_race_does_not_lead_out_of_a_volume,
    guest_root_reaches_no_port_but_its_own,
    floods_do_not_grow_anything,
    a_container_that_replaces_its_share_harms_no_directory_of_the_host,
    a_riot_in_a_share_harms_no_container_that_joins_it,
    a_device_node_of_an_image_is_opened_by_no_thread,
];

/// The capabilities that serve files: CHOWN, DAC_OVERRIDE, FOWNER, FSETID, SETGID, SETUID, MKNOD, SETFCAP.
const FILES: u64 = 1 << 31 | 1 << 27 | 1 << 7 | 1 << 6 | 1 << 4 | 1 << 3 | 1 << 1 | 1;
/// To end QEMU.
const KILL: u64 = 1 << 5;

/// A thread's or process's `status`, by field.
fn status(path: impl AsRef<Path>) -> BTreeMap<String, String> {
    let text = fs::read_to_string(path.as_ref().join("status")).expect("read status");
    text.lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(key, value)| (key.to_owned(), value.trim().to_owned()))
        .collect()
}

fn hex(status: &BTreeMap<String, String>, field: &str) -> u64 {
    u64::from_str_radix(&status[field], 16).unwrap()
}

/// Threads of a process: id and name.
fn threads(pid: i32) -> Vec<(i32, String)> {
    let mut threads: Vec<(i32, String)> = fs::read_dir(format!("/proc/{pid}/task"))
        .unwrap()
        .map(|entry| {
            let entry = entry.unwrap();
            let name = fs::read_to_string(entry.path().join("comm")).unwrap().trim().to_owned();
            (entry.file_name().to_str().unwrap().parse().unwrap(), name)
        })
        .collect();
    threads.sort();
    threads
}

fn namespace(pid: impl std::fmt::Display, name: &str) -> String {
    fs::read_link(format!("/proc/{pid}/ns/{name}")).unwrap().display().to_string()
}

fn entries(path: &str) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(path).unwrap().map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// A sandbox that does nothing.
fn idle<'l>(lab: &'l Lab, what: &str) -> Task<'l> {
    let task = Task::start(lab, what, &[], BUSYBOX, &["sh", "-c", "echo up; exec sleep 1000"]);
    task.expect("up");
    task
}

fn ends(task: &Task<'_>) {
    task.kill("SIGKILL");
    task.wait().exits(137);
}

/// Another sandbox goes on.
#[track_caller]
fn lives(lab: &Lab, bystander: &Task<'_>) {
    lab.looked_at("another sandbox");
    assert_eq!(bystander.exec(&["echo", "alive"]).run().ok(), "alive");
}

fn the_vmm_is_confined(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    let task = idle(lab, "confined");
    let vmm = await_process(&task.id, Role::Vmm).pid;
    for name in ["mnt", "net", "ipc", "pid", "uts", "cgroup", "user"] {
        assert_ne!(namespace(vmm, name), namespace("self", name), "the vmm shares its {name} namespace with the host");
    }
    for (tid, name) in threads(vmm) {
        let status = status(format!("/proc/{vmm}/task/{tid}"));
        assert_eq!((status["Seccomp"].as_str(), status["NoNewPrivs"].as_str()), ("2", "1"), "thread {name}");
        let wanted = match name.as_str() {
            name if name.starts_with("fs-") && name != "fs-vhost" && name != "fs-end" => FILES,
            _ if tid == vmm => KILL,
            _ => 0,
        };
        for field in ["CapEff", "CapPrm"] {
            assert_eq!(hex(&status, field), wanted, "{field} of thread {name}");
        }
        for field in ["CapInh", "CapBnd", "CapAmb"] {
            assert_eq!(hex(&status, field), 0, "{field} of thread {name}");
        }
    }
    // Its root has the container's directory, and nothing of the host.
    let root = entries(&format!("/proc/{vmm}/root"));
    assert!(
        !root.is_empty() && !root.iter().any(|name| ["etc", "proc", "usr", "dev"].contains(&name.as_str())),
        "{root:?}"
    );
    let limits = fs::read_to_string(format!("/proc/{vmm}/limits")).unwrap();
    let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
    // 1 is none for a program that takes dumps too, which 0 is not.
    assert!(core.split_whitespace().filter(|word| *word == "1").count() == 2, "{core}");
    let environment = fs::read_to_string(format!("/proc/{vmm}/environ")).unwrap();
    assert!(!environment.contains("TTRPC") && !environment.contains("HOME"), "{environment}");
    ends(&task);
    Ok(())
}

fn qemu(task: &Task<'_>) -> Result<i32, Skip> {
    find(&task.id, Role::Qemu).map(|process| process.pid).ok_or_else(|| Skip("the machine is not QEMU".into()))
}

fn qemu_is_confined(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    let task = idle(lab, "qemu");
    let vmm = await_process(&task.id, Role::Vmm).pid;
    let pid = qemu(&task)?;
    for name in ["mnt", "net", "ipc", "uts", "cgroup"] {
        assert_ne!(namespace(pid, name), namespace("self", name), "QEMU shares its {name} namespace with the host");
        assert_ne!(namespace(pid, name), namespace(vmm, name), "QEMU shares its {name} namespace with the vmm");
    }
    // The vmm is pid 1 there: QEMU ends with it.
    assert_eq!(namespace(pid, "pid"), namespace(vmm, "pid"));
    for (tid, name) in threads(pid) {
        let status = status(format!("/proc/{pid}/task/{tid}"));
        assert_eq!((status["Seccomp"].as_str(), status["NoNewPrivs"].as_str()), ("2", "1"), "thread {name}");
        for field in ["CapEff", "CapPrm", "CapInh", "CapBnd", "CapAmb"] {
            assert_eq!(hex(&status, field), 0, "{field} of thread {name}");
        }
        let ids: Vec<u32> = status["Uid"].split_whitespace().map(|id| id.parse().unwrap()).collect();
        assert!(ids.iter().all(|id| *id == ids[0] && *id > 65533), "{ids:?}");
        assert_eq!(status["Groups"], "");
    }
    let root = entries(&format!("/proc/{pid}/root"));
    assert!(
        root.contains(&"usr".into())
            && !root.iter().any(|name| ["home", "root", "run", "var"].contains(&name.as_str()))
    );
    assert_eq!(entries(&format!("/proc/{pid}/root/proc/self")), ["fd"]);
    assert!(!Path::new(&format!("/proc/{pid}/root/etc/passwd")).exists());
    ends(&task);
    Ok(())
}

/// The cgroup directories that a process is in, of the controllers that matter here.
fn cgroups(pid: i32) -> Vec<std::path::PathBuf> {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    let unified = Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
    text.lines()
        .filter_map(|line| {
            let (_, rest) = line.split_once(':')?;
            let (controllers, path) = rest.split_once(':')?;
            let path = path.trim_start_matches('/');
            match controllers {
                "" if unified => Some(Path::new("/sys/fs/cgroup").join(path)),
                "memory" | "cpu" | "cpuacct" | "pids" => Some(Path::new("/sys/fs/cgroup").join(controllers).join(path)),
                _ => None,
            }
        })
        .collect()
}

fn a_sandbox_is_in_its_cgroup(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    let flags = ["--memory-limit", "134217728", "--cpu-quota", "150000", "--cpu-shares", "512"];
    let task = Task::start(lab, "grouped", &flags, BUSYBOX, &["sh", "-c", "echo up; exec sleep 1000"]);
    task.expect("up");
    let vmm = await_process(&task.id, Role::Vmm).pid;
    let paths = cgroups(vmm);
    if paths.is_empty() {
        return Err(Skip("no cgroup controllers".into()));
    }
    assert!(paths.iter().all(|path| path.ends_with(format!("default/{}", task.id))), "{paths:?}");
    for role in [Role::Qemu, Role::Anchor] {
        if let Some(process) = find(&task.id, role) {
            assert_eq!(cgroups(process.pid), paths, "{process}");
        }
    }
    let value = |names: &[&str]| {
        let read = |name: &&str| paths.iter().find_map(|path| fs::read_to_string(path.join(name)).ok());
        names.iter().find_map(read).unwrap_or_default().trim().to_owned()
    };
    // The container's 128 MiB, the guest's 128, and 384 for running it.
    assert_eq!(value(&["memory.max", "memory.limit_in_bytes"]), (640u64 << 20).to_string());
    assert!(["150000", "150000 100000"].contains(&value(&["cpu.max", "cpu.cfs_quota_us"]).as_str()));
    assert!(["512", "20"].contains(&value(&["cpu.weight", "cpu.shares"]).as_str()));
    let used: u64 = value(&["memory.current", "memory.usage_in_bytes"]).parse().unwrap();
    assert!(used > 20 << 20, "the guest's memory is not counted: {used}");
    ends(&task);
    task.ctr("rm").run();
    for path in paths {
        until("the cgroup's end", Duration::from_secs(10), || (!path.exists()).then_some(()));
    }
    Ok(())
}

fn open(path: &str) -> [Arg<'_>; 3] {
    [Arg::Number(libc::AT_FDCWD.into()), Arg::Text(path), Arg::Number(0)]
}

fn a_vmm_thread_that_is_taken_over_opens_nothing(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    let task = idle(lab, "taken");
    let vmm = await_process(&task.id, Role::Vmm).pid;
    for (tid, name) in threads(vmm) {
        for path in ["/etc/passwd", "/proc/1/mem", "/proc/self/mem", "/dev/mem", "../../../../etc/passwd"] {
            let outcome = call(tid, libc::SYS_openat, &open(path));
            assert!(outcome.is_error(), "thread {name} opened {path}: {outcome:?}");
        }
        if name == "fs-0" {
            // A device, for somebody on the host to use.
            let device = i64::from(libc::S_IFBLK | 0o666);
            // Names in the share's own directories are the host's; elsewhere the user namespace forbids it.
            let rootfs = format!("/{}/rootfs/disk", task.id);
            for (path, errno) in [("/disk", libc::EROFS), (&rootfs, libc::EPERM)] {
                let path = Arg::Text(path);
                let args = [Arg::Number(libc::AT_FDCWD.into()), path, Arg::Number(device), Arg::Number(8 << 8)];
                assert_eq!(call(tid, libc::SYS_mknodat, &args), Outcome::Returned(-i64::from(errno)));
            }
            // Every directory that it has open ends at the share.
            let fds: Vec<i64> = entries(&format!("/proc/{vmm}/fd")).iter().filter_map(|fd| fd.parse().ok()).collect();
            for fd in fds {
                for path in ["../../../../../../etc/passwd", "../../../sys/kernel/core_pattern", "../../1/environ"] {
                    let outcome = call(tid, libc::SYS_openat, &[Arg::Number(fd), Arg::Text(path), Arg::Number(0)]);
                    assert!(outcome.is_error(), "by descriptor {fd}, {path}: {outcome:?}");
                }
            }
        }
    }
    // It was none the worse for it.
    assert_eq!(task.exec(&["echo", "alive"]).run().ok(), "alive");
    ends(&task);
    Ok(())
}

fn a_vmm_thread_that_is_taken_over_dies_of_what_it_tries(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    let execute: &[Arg<'_>] = &[Arg::Text("/bin/sh"), Arg::Number(0), Arg::Number(0)];
    let socket: &[Arg<'_>] =
        &[Arg::Number(libc::AF_UNIX.into()), Arg::Number(libc::SOCK_STREAM.into()), Arg::Number(0)];
    let trace: &[Arg<'_>] = &[Arg::Number(libc::PTRACE_ATTACH.into()), Arg::Number(2)];
    let mount: &[Arg<'_>] = &[Arg::Text("none"), Arg::Text("/"), Arg::Text("proc"), Arg::Number(0), Arg::Number(0)];
    // Each kind of thread with another of them; what every role may is tested with vz-jail.
    for (thread, what, number, args) in [
        ("fs-0", "execve", libc::SYS_execve, execute),
        ("fs-1", "mount", libc::SYS_mount, mount),
        ("vsock", "socket", libc::SYS_socket, socket),
        ("vcpu-0", "execve", libc::SYS_execve, execute),
        ("fs-vhost", "ptrace", libc::SYS_ptrace, trace),
        ("", "fork", libc::SYS_fork, &[]),
    ] {
        let task = idle(lab, "dies");
        let mark = lab.log_position();
        let vmm = await_process(&task.id, Role::Vmm).pid;
        let found =
            threads(vmm).into_iter().find(|(tid, name)| if thread.is_empty() { *tid == vmm } else { name == thread });
        let Some((tid, _)) = found else {
            println!("  no thread {thread} on this machine");
            ends(&task);
            continue;
        };
        // The first thread stands for the process: who traces it is told of its end before the shim is.
        let hold = if thread.is_empty() { Duration::from_millis(300) } else { Duration::ZERO };
        let outcome = call_and_hold(tid, number, args, hold);
        assert_eq!(outcome, Outcome::Killed(Signal::SIGSYS), "{what} by thread {thread:?}");
        task.wait().exits(137);
        // Which call it was is the debug mode's to say; that it was one, the log says.
        let log = lab.log_since(mark);
        assert!(log.contains("system call that its filter denies"), "{log}");
    }
    lab.remove_clients_fifos();
    Ok(())
}

fn qemu_that_is_taken_over_gets_nowhere(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    let task = idle(lab, "qemu");
    let pid = qemu(&task)?;
    for path in ["/etc/passwd", "/etc/shadow", "/proc/1/mem", "/run/vz", "/root", "/dev/kvm", "../../etc/passwd"] {
        let outcome = call(pid, libc::SYS_openat, &open(path));
        assert!(outcome.is_error(), "QEMU opened {path}: {outcome:?}");
    }
    let write = [
        Arg::Number(libc::AT_FDCWD.into()),
        Arg::Text("/file"),
        Arg::Number(i64::from(libc::O_CREAT | libc::O_WRONLY)),
    ];
    assert!(call(pid, libc::SYS_openat, &write).is_error());
    // The vmm is pid 1 where QEMU is.
    assert!(call(pid, libc::SYS_kill, &[Arg::Number(1), Arg::Number(libc::SIGKILL.into())]).is_error());
    assert_eq!(task.exec(&["echo", "alive"]).run().ok(), "alive");
    let execute: &[Arg<'_>] = &[Arg::Text("/bin/sh"), Arg::Number(0), Arg::Number(0)];
    // Its own filter knows no other program.
    assert_eq!(call(pid, libc::SYS_execve, execute), Outcome::Killed(Signal::SIGSYS));
    task.wait().exits(137);
    lab.remove_clients_fifos();
    Ok(())
}

/// Flags for a container whose root may do everything in its guest.
const MIGHTY: [&str; 4] = ["--cap-add", "ALL", "--security-opt", "seccomp=unconfined"];

/// Tries paths, links, devices and attributes; says which of them led somewhere.
const WALK: &str = r#"
import ctypes, errno, os, sys
canary = sys.argv[1]
wrong = []
def attempt(what, f):
    try:
        r = f()
        wrong.append(f"{what}: {r!r}")
    except OSError:
        pass
up = "/volume" + "/.." * 40
os.symlink(canary, "/volume/absolute")
os.symlink("../" * 40 + canary, "/volume/relative")
os.symlink("/proc/1/root" + canary, "/volume/proc")
attempt("absolute link", lambda: open("/volume/absolute").read())
attempt("relative link", lambda: open("/volume/relative").read())
attempt("link through proc", lambda: open("/volume/proc").read())
attempt("dots", lambda: open(up + canary).read())
attempt("write by link", lambda: open("/volume/relative", "r+").write("x"))
attempt("rename out", lambda: os.rename("/volume/absolute", up + canary + ".stolen"))
attempt("rename in", lambda: os.rename(up + canary, "/volume/stolen"))
attempt("link in", lambda: os.link(up + canary, "/volume/stolen"))
attempt("block device", lambda: os.mknod("/volume/disk", 0o60666, os.makedev(8, 0)))
attempt("memory device", lambda: os.mknod("/volume/mem", 0o20666, os.makedev(1, 1)))
attempt("trusted attribute", lambda: os.setxattr("/volume", "trusted.overlay.opaque", b"y"))
# Handles name files without a path.
libc = ctypes.CDLL(None, use_errno=True)
class Handle(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_uint), ("type", ctypes.c_int), ("f", ctypes.c_ubyte * 128)]
volume = os.open("/volume", os.O_RDONLY)
for kind in (1, 2, 0x81, 0x82):
    for inode in (1, 2, 3, 128, 256):
        h = Handle(bytes=8, type=kind)
        ctypes.memmove(h.f, inode.to_bytes(8, "little"), 8)
        fd = libc.open_by_handle_at(volume, ctypes.byref(h), os.O_RDONLY)
        if fd >= 0:
            names = os.listdir(fd) if os.path.isdir(f"/proc/self/fd/{fd}") else []
            if "etc" in names and not os.path.samefile(f"/proc/self/fd/{fd}", "/"):
                wrong.append(f"handle of inode {inode}: {names}")
# What the guest mounts the share as: all of it is the sandbox's own.
os.makedirs("/seen", exist_ok=True)
MS = 0
if libc.mount(b"vz", b"/seen", b"virtiofs", MS, None) == 0:
    for base, dirs, files in os.walk("/seen"):
        for name in files:
            if name == os.path.basename(canary):
                wrong.append(f"found {base}/{name}")
        if base.count("/") > 4:
            dirs.clear()
    attempt("dots from the share's root", lambda: open("/seen" + "/.." * 40 + canary).read())
print("WRONG" if wrong else "contained", wrong)
"#;

fn guest_root_stays_below_its_share(lab: &Lab) -> Verdict {
    let dir = lab.dir();
    let canary = dir.path().join("canary-f00d");
    fs::write(&canary, "secret").unwrap();
    let volume = dir.path().join("volume");
    fs::create_dir(&volume).unwrap();
    let mount = format!("{}:/volume", volume.display());
    let script = dir.path().join("walk.py");
    fs::write(&script, WALK).unwrap();
    let text = format!("{}:/walk.py:ro", script.display());
    let path = canary.display().to_string();
    let args = [&["--rm"][..], &MIGHTY, &["-v", &mount, "-v", &text, DEBIAN, "python3", "/walk.py", &path]].concat();
    lab.vz_only()?;
    let said = lab.nerdctl_run(&args).deadline(120).run().ok();
    assert!(said.starts_with("contained"), "{said}");
    assert_eq!(fs::read_to_string(&canary).unwrap(), "secret");
    assert_eq!(entries(&dir.path().display().to_string()), ["canary-f00d", "volume", "walk.py"]);
    for name in entries(&volume.display().to_string()) {
        let kind = fs::symlink_metadata(volume.join(&name)).unwrap().file_type();
        assert!(kind.is_symlink(), "{name} is on the volume");
    }
    Ok(())
}

/// Swaps a directory for a link that leads out, while another process opens and makes files through it.
const RACE: &str = r#"
import os, sys, time
canary, seconds = sys.argv[1], float(sys.argv[2])
os.makedirs("/volume/real", exist_ok=True)
open("/volume/real/file", "w").write("inside")
os.symlink(os.path.dirname(canary), "/volume/link")
end = time.monotonic() + seconds
if os.fork() == 0:
    while time.monotonic() < end:
        os.rename("/volume/real", "/volume/turn"); os.rename("/volume/link", "/volume/real")
        os.rename("/volume/real", "/volume/link"); os.rename("/volume/turn", "/volume/real")
    os._exit(0)
name = os.path.basename(canary)
tries = 0
while time.monotonic() < end:
    tries += 1
    for f in (lambda: open(f"/volume/real/{name}").read(), lambda: open(f"/volume/real/{name}", "r+").write("x"),
              lambda: os.unlink(f"/volume/real/{name}"), lambda: os.rename(f"/volume/real/{name}", "/volume/stolen"),
              lambda: open("/volume/real/planted", "x").close() or os.unlink("/volume/real/planted")):
        try:
            r = f()
            if r == "secret": print("WRONG: read it"); sys.exit(1)
        except OSError:
            pass
os.wait()
print("raced", tries > 20, os.path.exists("/volume/stolen"))
"#;

fn a_rename_race_does_not_lead_out_of_a_volume(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    let dir = lab.dir();
    let outside = dir.path().join("outside");
    fs::create_dir(&outside).unwrap();
    fs::set_permissions(&outside, fs::Permissions::from_mode(0o777)).unwrap();
    let canary = outside.join("canary");
    fs::write(&canary, "secret").unwrap();
    fs::set_permissions(&canary, fs::Permissions::from_mode(0o666)).unwrap();
    let volume = dir.path().join("volume");
    fs::create_dir(&volume).unwrap();
    let script = dir.path().join("race.py");
    fs::write(&script, RACE).unwrap();
    let mounts = [format!("{}:/volume", volume.display()), format!("{}:/race.py:ro", script.display())];
    let path = canary.display().to_string();
    let seconds = lab.times(5, 60).to_string();
    let args = ["-v", &mounts[0], "-v", &mounts[1], DEBIAN, "python3", "/race.py", &path, &seconds];
    // The race is in the guest, and on the host as well: two containers of two sandboxes have the volume.
    let said = lab.nerdctl_run(&[&["--rm"][..], &MIGHTY, &args].concat()).deadline(180).run().ok();
    assert_eq!(said, "raced True False");
    assert_eq!(fs::read_to_string(&canary).unwrap(), "secret");
    assert_eq!(entries(&outside.display().to_string()), ["canary"]);
    Ok(())
}

/// Connects to ports and context ids; prints those that answered.
const PORTS: &str = r#"
import socket, itertools
def answers(cid, port):
    s = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    s.settimeout(3)
    try:
        s.connect((cid, port))
        return True
    except OSError:
        return False
    finally:
        s.close()
powers = [1 << n for n in range(32)]
ports = sorted({p + d for p in powers for d in (-1, 0, 1)} | set(range(1000, 1040)) | {22, 80, 111, 2049, 2375, 9999})
host = [p for p in ports if 0 <= p < 1 << 32 and answers(2, p)]
others = [(c, p) for c in (0, 4, 5, 100, 0xfffffffe) for p in (1, 22, 1024, 1025) if answers(c, p)]
print("host", host, "others", others)
"#;

fn guest_root_reaches_no_port_but_its_own(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    let flags = [&MIGHTY[..], &[DEBIAN, "sleep", "1000"]].concat();
    let bystander = idle(lab, "bystander");
    let container = Container::start(lab, "ports", &flags);
    let said = container.exec(&["python3", "-c", PORTS]).deadline(180).run().ok();
    println!("  {said}");
    let (host, others) = said.split_once(" others ").unwrap();
    assert_eq!(others, "[]");
    // Those of the agent, whose place is taken.
    let open: Vec<u32> =
        host.trim_start_matches("host [").trim_end_matches(']').split(", ").filter_map(|p| p.parse().ok()).collect();
    assert!(open.len() <= 2, "{open:?}");
    // The shim still has its own agent, and answers.
    assert_eq!(container.sh("echo alive"), "alive");
    lives(lab, &bystander);
    ends(&bystander);
    Ok(())
}

fn floods_do_not_grow_anything(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    let bystander = idle(lab, "bystander");
    let flags = [&MIGHTY[..], &[DEBIAN, "sleep", "1000"]].concat();
    let container = Container::start(lab, "flood", &flags);
    let id = container.inspect(".ID");
    let watch = Watch::start(lab, &id);
    // The kernel's log goes to the console; the agent's log port takes records; connections come and go.
    let flood = r#"
import os, socket, time
end = time.monotonic() + 10
kmsg = os.open("/dev/kmsg", os.O_WRONLY) if os.path.exists("/dev/kmsg") else -1
n = 0
while time.monotonic() < end:
    n += 1
    if kmsg >= 0:
        try: os.write(kmsg, b"<0>" + b"flood " * 100)
        except OSError: pass
    for port in (1024, 1025):
        s = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
        s.settimeout(1)
        try:
            s.connect((2, port)); s.sendall(b"x" * 65536)
        except OSError: pass
        s.close()
print("flooded", n > 10)
"#;
    assert_eq!(container.exec(&["python3", "-c", flood]).deadline(120).run().ok(), "flooded True");
    watch.is_bounded();
    let console = format!("/run/vz/default/{id}/console.log");
    let size = fs::metadata(&console).map_or(0, |metadata| metadata.len());
    assert!(size <= 256 * 1024, "{console} has {size} bytes");
    assert_eq!(container.sh("echo alive"), "alive");
    lives(lab, &bystander);
    ends(&bystander);
    Ok(())
}

/// Replaces whatever is in the share's own directories by links to a directory of the host; prints what could be done.
const REPLACE: &str = r#"
cd /proc/1/root/run/vz/share || exit 3
for name in *; do
  mv "$name/rootfs" "$name/rootfs.away" && echo "moved $name/rootfs" && ln -s "$1" "$name/rootfs"
  mkdir "$name/planted" && echo "made $name/planted"
  touch "$name" && echo "touched $name"
  chmod 777 "$name" && echo "changed $name"
  # Last: with it gone, nothing else in it can be tried.
  mv "$name" "$name.away" && echo "moved $name" && ln -s "$1" "$name"
done
mkdir planted && echo "made planted"
ln -s "$1" trap && echo "linked trap"
echo "over"
"#;

fn a_container_that_replaces_its_share_harms_no_directory_of_the_host(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    let bystander = idle(lab, "bystander");
    let capabilities = ["--pid", "host", "--cap-add", "SYS_ADMIN", "--cap-add", "SYS_PTRACE"];
    let flags = [&capabilities[..], &[BUSYBOX, "sleep", "1000"]].concat();
    let container = Container::start(lab, "replacing", &flags);
    let watch = Watch::start(lab, &container.id);
    let planted = lab.planted().display().to_string();
    let said = container.exec(&["sh", "-c", REPLACE, "sh", &planted]).run();
    watch.is_bounded();
    // What the host does last with a share is what would harm it.
    container.remove();
    let (done, refusals) = (said.text(), said.errors());
    for line in refusals.lines() {
        assert!(["Read-only file system", "Operation not permitted"].iter().any(|why| line.contains(why)), "{line}");
    }
    assert_eq!(done.trim(), "over", "{refusals}");
    lives(lab, &bystander);
    ends(&bystander);
    Ok(())
}

/// An image with nodes of devices that the host has, in `/nodes`; removed when dropped.
pub struct Nodes<'l> {
    lab: &'l Lab,
    /// Its name.
    pub image: String,
    /// The host's loop device behind `/nodes/disk`, in which there is a secret.
    device: String,
    _dir: tempfile::TempDir,
}

/// What is on the loop device.
pub const SECRET: &str = "what the host's disk has in it\n";

impl<'l> Nodes<'l> {
    /// Makes it with runc: nothing that runs in a guest can make a node on the host.
    pub fn make(lab: &'l Lab) -> Result<Self, Skip> {
        let dir = lab.dir();
        let disk = dir.path().join("disk");
        fs::write(&disk, SECRET.repeat(4096)).expect("write a disk");
        let looped = Program::new("losetup").args(["--find", "--show"]).args([&disk]).run();
        if looped.code() != 0 {
            return Err(Skip(format!("no loop device: {}", looped.errors())));
        }
        let device = looped.text().trim().to_owned();
        let number = fs::metadata(&device).expect("look at the loop device").rdev();
        let name = lab.id("nodes");
        let nodes = Self { lab, image: format!("vz.test/{name}:1"), device, _dir: dir };
        let script = format!(
            "mkdir /nodes && mknod -m 666 /nodes/disk b {} {} && mknod -m 666 /nodes/random c 1 8 && \
             mknod -m 666 /nodes/zero c 1 5",
            libc::major(number),
            libc::minor(number)
        );
        let flags = ["--runtime", "io.containerd.runc.v2", "--net", "none", "--cap-add", "MKNOD", "--name", &name];
        lab.nerdctl(&["run"]).args(flags).args([BUSYBOX, "sh", "-c", &script]).run().ok();
        lab.nerdctl(&["commit", &name, &nodes.image]).run().ok();
        lab.nerdctl(&["rm", &name]).run().ok();
        Ok(nodes)
    }
}

impl Drop for Nodes<'_> {
    fn drop(&mut self) {
        self.lab.nerdctl(&["rmi", "-f", &self.image]).run();
        Program::new("losetup").args(["--detach", &self.device]).run();
    }
}

fn a_device_node_of_an_image_is_opened_by_no_thread(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    let nodes = Nodes::make(lab)?;
    let task = Task::start(lab, "nodes", &[], &nodes.image, &["sleep", "1000"]);
    let vmm = await_process(&task.id, Role::Vmm).pid;
    let fs_threads: Vec<_> = threads(vmm).into_iter().filter(|(_, name)| name.starts_with("fs-")).collect();
    let (tid, _) = fs_threads.iter().find(|(_, name)| name == "fs-0").expect("a thread serves files");
    for name in ["disk", "random", "zero"] {
        let path = format!("/{}/rootfs/nodes/{name}", task.id);
        for flags in [libc::O_RDONLY, libc::O_RDWR, libc::O_RDONLY | libc::O_NONBLOCK] {
            let args = [Arg::Number(libc::AT_FDCWD.into()), Arg::Text(&path), Arg::Number(flags.into())];
            // Not ENOENT: it is there.
            assert_eq!(call(*tid, libc::SYS_openat, &args), Outcome::Returned(-i64::from(libc::EACCES)), "{name}");
        }
    }
    // The guest has its own devices, and not the host's under the same number.
    let said = task.exec(&["sh", "-c", "cat /nodes/disk; head -c 4 /nodes/zero | wc -c"]).run();
    assert!(!said.text().contains(SECRET), "{said}");
    ends(&task);
    Ok(())
}

/// Does to the share's own directories whatever may disturb a container that is being made: floods, renames, exchanges
/// and links. What it could do is counted in /done.
const RIOT: &str = r#"
import ctypes, os, sys
share, planted = "/proc/1/root/run/vz/share", sys.argv[1].encode()
libc = ctypes.CDLL(None, use_errno=True)
here = os.open(share, os.O_RDONLY)
EXCHANGE = 2
done = 0
def rename(a, b, flags=0):
    return libc.renameat2(here, a, here, b, flags) == 0
def attempt(*calls):
    global done
    before = done
    for call in calls:
        try:
            if call() is not False: done += 1
        except OSError: pass
    if done != before: open("/done", "w").write(str(done))
own = os.listdir(here)
print("rioting", flush=True)
n = 0
while True:
    n += 1
    flood = b"flood%d" % n
    attempt(lambda: os.mkdir(flood, dir_fd=here), lambda: os.symlink(planted, b"link%d" % n, dir_fd=here))
    for name in os.listdir(here):
        name = name.encode()
        if os.fsdecode(name) in own: continue
        attempt(lambda: rename(name, flood), lambda: os.symlink(planted, name, dir_fd=here), lambda: rename(name, own[0].encode(), EXCHANGE))
        for below in (b"rootfs", b"mount0", b"mount7", b"mount8", b"mount9"):
            below = name + b"/" + below
            attempt(lambda: rename(below, flood), lambda: os.symlink(planted, below, dir_fd=here), lambda: os.mkdir(below, dir_fd=here))
"#;

fn a_riot_in_a_share_harms_no_container_that_joins_it(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    let bystander = idle(lab, "bystander");
    let dir = lab.dir();
    let volume = dir.path().join("volume");
    fs::create_dir(&volume).and_then(|()| fs::write(volume.join("mine"), "mine")).expect("make a volume");
    let mount = format!("{}:/volume", volume.display());
    let group = format!("io.containerd.runc.v2.group={}", lab.id("riot"));
    let joins = ["--annotation", &group];
    let flags = [&joins[..], &MIGHTY, &["--pid", "host", DEBIAN, "sleep", "1000"]].concat();
    let first = Container::start(lab, "first", &flags);
    let planted = lab.planted().display().to_string();
    let riot = first.exec(&["python3", "-c", RIOT, &planted]).deadline(1000).start();
    riot.expect("rioting");
    let mut joined = Vec::new();
    for number in 2..=10 {
        let flags = [&joins[..], &["-v", &mount, BUSYBOX, "sleep", "1000"]].concat();
        let next = Container::start(lab, "joins", &flags);
        assert_eq!(
            next.sh("cat /volume/mine && hostname >/volume/told && echo it works"),
            "mineit works",
            "the {number}."
        );
        // Half of them go again meanwhile, as what the host does last with a share is what would harm it.
        if number % 2 == 0 {
            next.remove();
        } else {
            joined.push(next);
        }
    }
    lives(lab, &bystander);
    drop(riot);
    let done = first.exec(&["cat", "/done"]).run();
    drop(joined);
    first.remove();
    assert_eq!(done.text(), "", "calls that changed the share");
    assert_eq!(entries(&dir.path().display().to_string()), ["volume"]);
    assert_eq!(entries(&volume.display().to_string()), ["mine", "told"]);
    ends(&bystander);
    Ok(())
}
