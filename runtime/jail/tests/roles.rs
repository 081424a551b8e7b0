//! Each role in a process of its own, which tries what a hostile guest would.
//!
//! The test runs itself: a confined process cannot report more than how it ended.

#![allow(unsafe_code, reason = "system calls that no safe function makes, with arguments that are ours")]

use std::{
    env, fs,
    os::unix::process::ExitStatusExt,
    process::{Command, ExitCode, ExitStatus},
    sync::mpsc,
};

use libc::c_long;
use nix::{fcntl::OFlag, sys::stat::Mode, unistd::UnlinkatFlags};
use vz_jail::{Denied, Role};

/// What only fails with an error in this role, too: the C library tries it before it makes a thread.
const SURVIVED: (Role, &str) = (Role::Fs, "start a process (clone3)");

/// What is tried, and whether that fails, instead of being the end.
const ATTEMPTS: &[(&str, Attempt, bool)] = &[
    ("open /etc/passwd", || call(libc::SYS_openat, [at_cwd(), path(c"/etc/passwd"), 0, 0, 0]), true),
    #[cfg(target_arch = "x86_64")]
    ("open, the older call", || call(libc::SYS_open, [path(c"/etc/passwd"), 0, 0, 0, 0]), false),
    ("start a process (clone3)", || call(libc::SYS_clone3, [0, 0, 0, 0, 0]), false),
    ("start a process (clone)", || call(libc::SYS_clone, [libc::SIGCHLD.into(), 0, 0, 0, 0]), false),
    #[cfg(target_arch = "x86_64")]
    ("fork", || call(libc::SYS_fork, [0; 5]), false),
    ("execute", || call(libc::SYS_execve, [path(c"/bin/true"), 0, 0, 0, 0]), false),
    ("execute by descriptor", || call(libc::SYS_execveat, [at_cwd(), path(c"/bin/true"), 0, 0, 0]), false),
    ("make a network socket", || socket(libc::AF_INET, libc::SOCK_STREAM), false),
    ("make a unix socket", || socket(libc::AF_UNIX, libc::SOCK_STREAM), false),
    ("make a netlink socket", || socket(libc::AF_NETLINK, libc::SOCK_RAW), false),
    ("make a vsock", || socket(libc::AF_VSOCK, libc::SOCK_STREAM), false),
    ("connect", || call(libc::SYS_connect, [0, 0, 0, 0, 0]), false),
    ("bind", || call(libc::SYS_bind, [0, 0, 0, 0, 0]), false),
    (
        "make a datagram pair",
        || call(libc::SYS_socketpair, [libc::AF_UNIX.into(), libc::SOCK_DGRAM.into(), 0, 0, 0]),
        false,
    ),
    ("trace", || call(libc::SYS_ptrace, [libc::PTRACE_ATTACH.into(), 1, 0, 0, 0]), false),
    ("read another's memory", || call(libc::SYS_process_vm_readv, [1, 0, 0, 0, 0]), false),
    ("write another's memory", || call(libc::SYS_process_vm_writev, [1, 0, 0, 0, 0]), false),
    ("take another's descriptor", || call(libc::SYS_pidfd_getfd, [0, 0, 0, 0, 0]), false),
    ("signal another process", || call(libc::SYS_kill, [1, 0, 0, 0, 0]), false),
    ("signal another's thread", || call(libc::SYS_tgkill, [1, 1, 0, 0, 0]), false),
    ("mount", || call(libc::SYS_mount, [0, 0, 0, 0, 0]), false),
    ("open a mount", || call(libc::SYS_open_tree, [at_cwd(), path(c"/"), 1, 0, 0]), false),
    ("move a mount", || call(libc::SYS_move_mount, [0, 0, 0, 0, 0]), false),
    ("change root", || call(libc::SYS_chroot, [path(c"/"), 0, 0, 0, 0]), false),
    ("pivot root", || call(libc::SYS_pivot_root, [0, 0, 0, 0, 0]), false),
    ("enter a namespace", || call(libc::SYS_setns, [0, 0, 0, 0, 0]), false),
    ("make a user namespace", || call(libc::SYS_unshare, [libc::CLONE_NEWUSER.into(), 0, 0, 0, 0]), false),
    ("make a virtual machine", || call(libc::SYS_ioctl, [0, 0xae01, 0, 0, 0]), false),
    ("change a virtual machine's memory", || call(libc::SYS_ioctl, [0, 0x4020_ae46, 0, 0, 0]), false),
    ("load a program into the kernel", || call(libc::SYS_bpf, [0, 0, 0, 0, 0]), false),
    ("use a key ring", || call(libc::SYS_keyctl, [0, 0, 0, 0, 0]), false),
    ("add a key", || call(libc::SYS_add_key, [0, 0, 0, 0, 0]), false),
    ("count events", || call(libc::SYS_perf_event_open, [0, 0, 0, 0, 0]), false),
    ("set up io_uring", || call(libc::SYS_io_uring_setup, [1, 0, 0, 0, 0]), false),
    ("handle page faults", || call(libc::SYS_userfaultfd, [0, 0, 0, 0, 0]), false),
    ("load a module", || call(libc::SYS_finit_module, [0, 0, 0, 0, 0]), false),
    ("set the clock", || call(libc::SYS_clock_settime, [0, 0, 0, 0, 0]), false),
    ("reboot", || call(libc::SYS_reboot, [0, 0, 0, 0, 0]), false),
    ("open by handle", || call(libc::SYS_open_by_handle_at, [at_cwd(), 0, 0, 0, 0]), false),
    ("connect a descriptor to an interrupt", || call(libc::SYS_ioctl, [0, 0x4020_ae76, 0, 0, 0]), false),
    ("connect a descriptor to a register", || call(libc::SYS_ioctl, [0, 0x4040_ae79, 0, 0, 0]), false),
    ("read a processor's special registers", || call(libc::SYS_ioctl, [0, 0xc008_ae88, 0, 0, 0]), false),
    ("make a console type", || call(libc::SYS_ioctl, [0, libc::TIOCSTI.cast_signed(), 0, 0, 0]), false),
    (
        "map executable memory",
        || {
            let (rwx, private) =
                (libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
            call(libc::SYS_mmap, [0, 4096, rwx.into(), private.into(), -1])
        },
        false,
    ),
    #[cfg(target_arch = "x86_64")]
    ("call as a 32-bit program would (x32)", || call(0x4000_0000 | libc::SYS_getpid, [0; 5]), false),
];

type Attempt = fn() -> c_long;

fn call(number: c_long, args: [i64; 5]) -> c_long {
    // SAFETY: all pointers among the arguments are null or static strings.
    unsafe { libc::syscall(number, args[0], args[1], args[2], args[3], args[4]) }
}

fn socket(family: i32, kind: i32) -> c_long {
    call(libc::SYS_socket, [family.into(), kind.into(), 0, 0, 0])
}

fn at_cwd() -> i64 {
    libc::AT_FDCWD.into()
}

fn path(path: &'static std::ffi::CStr) -> i64 {
    path.as_ptr() as i64
}

/// Everything that a thread's run time does by itself.
fn live() {
    let many: Vec<Vec<u8>> = (0..100).map(|i| vec![1; i * 10_000]).collect();
    let sum: usize = many.iter().map(Vec::len).sum();
    drop(many);
    assert_eq!(sum, 49_500_000);
    let (tell, told) = mpsc::channel();
    tell.send(std::time::Instant::now()).unwrap();
    assert!(told.recv_timeout(std::time::Duration::from_millis(1)).is_ok());
    assert!(told.recv_timeout(std::time::Duration::from_millis(1)).is_err());
    std::thread::yield_now();
    eprint!("");
    std::panic::set_hook(Box::new(|_| ()));
    assert!(std::panic::catch_unwind(|| panic!("on purpose")).is_err());
}

const LIVE: &str = "live";
const STATE: &str = "state";

/// The confined process: status 0 where nothing that was tried succeeded.
fn confined(role: &str, what: &str) -> ExitCode {
    let role = Role::ALL.into_iter().find(|r| format!("{r:?}") == role).unwrap();
    // The share of this process is an empty directory, where it may have one of its own.
    let proc = if nix::unistd::geteuid().is_root() { Some(jail()) } else { None };
    let denied = if what == "report" { Denied::Report } else { Denied::Kill };
    vz_jail::restrict(denied).unwrap();
    let what = what.to_owned();
    let (tell, told) = mpsc::channel();
    let body = move || {
        let code = match what.as_str() {
            LIVE => {
                live();
                0
            }
            "abort" => std::process::abort(),
            STATE => i32::from(role == Role::Fs && !state(proc.as_ref().unwrap())),
            "report" => i32::from(call(libc::SYS_bpf, [0; 5]) >= 0),
            name => {
                let (_, attempt, _) = ATTEMPTS.iter().find(|(n, _, _)| *n == name).unwrap();
                i32::from(attempt() >= 0)
            }
        };
        tell.send(code).unwrap();
    };
    let refused = |e: vz_jail::Error| {
        eprintln!("{e}: {:?}", std::error::Error::source(&e).map(ToString::to_string));
    };
    vz_jail::spawn(role, "confined", body, refused).unwrap().join().unwrap();
    vz_jail::enter(Role::Main).unwrap();
    ExitCode::from(u8::try_from(told.recv().unwrap_or(99)).unwrap())
}

/// A root with one mount in it; what is left of /proc.
fn jail() -> fs::File {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
    vz_jail::prepare().unwrap();
    let dir = env::temp_dir().join(format!("vz-jail-{}", std::process::id()));
    let volume = dir.join("volume");
    fs::create_dir_all(&volume).unwrap();
    let flags = nix::mount::MsFlags::empty();
    nix::mount::mount(Some("volume"), &volume, Some("tmpfs"), flags, None::<&str>).unwrap();
    let status = vz_jail::enter_root(&dir).unwrap();
    // The directory is this namespace's root now, and goes with it; its name is the parent's to remove.
    status
}

/// Whether the fs thread can open nothing of the host's but can use what its root has.
fn state(proc_self_fd: &fs::File) -> bool {
    let gone = ["/etc/passwd", "/proc/1/mem", "/proc/self/mem", "/dev/null", "/../etc/passwd", "/sys"];
    if gone.iter().any(|path| fs::File::open(path).is_ok()) {
        return false;
    }
    // The one directory of /proc that is left leads no further.
    let up = ["../mem", "../../sys/kernel/core_pattern", "../../1/environ", "../../../etc/passwd"]
        .map(|path| nix::fcntl::openat(proc_self_fd, path, OFlag::O_RDONLY, Mode::empty()).is_ok());
    // But it has the process's descriptors.
    let own = nix::fcntl::openat(proc_self_fd, "2", OFlag::O_WRONLY, Mode::empty()).is_ok();
    // Names in the root itself are the host's to give; what is mounted there is the guest's.
    let cwd = nix::fcntl::AT_FDCWD;
    let made = [
        fs::write("/file", "x").is_ok(),
        nix::unistd::symlinkat("/volume", cwd, "/link").is_ok(),
        nix::sys::stat::mkdirat(cwd, "/dir", Mode::S_IRWXU).is_ok(),
        nix::fcntl::renameat(cwd, "/volume", cwd, "/away").is_ok(),
        nix::unistd::unlinkat(cwd, "/volume", UnlinkatFlags::RemoveDir).is_ok(),
    ];
    !up.contains(&true)
        && own
        && !made.contains(&true)
        && fs::write("/volume/file", "x").is_ok()
        && nix::unistd::unlinkat(cwd, "/volume/file", UnlinkatFlags::NoRemoveDir).is_ok()
}

fn run(role: Role, what: &str) -> (ExitStatus, String) {
    let child = Command::new(env::current_exe().unwrap())
        .args([CONFINED, &format!("{role:?}"), what])
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let dir = env::temp_dir().join(format!("vz-jail-{}", child.id()));
    let output = child.wait_with_output().unwrap();
    let _ = fs::remove_dir_all(dir);
    (output.status, String::from_utf8_lossy(&output.stderr).into_owned())
}

const CONFINED: &str = "--confined";

fn main() -> ExitCode {
    let args: Vec<String> = env::args().collect();
    if let [_, flag, role, what] = args.as_slice()
        && flag == CONFINED
    {
        return confined(role, what);
    }
    // What libtest would be asked.
    if args.iter().any(|arg| arg == "--list") {
        println!("roles: test");
        return ExitCode::SUCCESS;
    }
    let mut wrong = Vec::new();
    let root = nix::unistd::geteuid().is_root();
    for role in Role::ALL {
        let (status, said) = run(role, LIVE);
        if status.code() != Some(0) {
            wrong.push(format!("{role:?} cannot live: {status} {said}"));
        }
        let (status, said) = run(role, "abort");
        if status.signal() != Some(libc::SIGABRT) {
            wrong.push(format!("{role:?} cannot abort: {status} {said}"));
        }
        let (status, said) = run(role, "report");
        let line = "thread confined made a system call that its filter denies: bpf";
        if status.code() != Some(128 + libc::SIGSYS) || !said.contains(line) {
            wrong.push(format!("{role:?} does not report: {status} {said}"));
        }
        for (name, _, survives) in ATTEMPTS {
            let (status, said) = run(role, name);
            // Unprivileged, the fs thread's root is the host's.
            let skipped = !root && role == Role::Fs && *name == "open /etc/passwd";
            let right = match *survives || SURVIVED == (role, *name) {
                true => status.code() == Some(0),
                false => status.signal() == Some(libc::SIGSYS),
            };
            if !right && !skipped {
                wrong.push(format!("{role:?}: {name}: {status} {said}"));
            }
        }
    }
    if root {
        let (status, said) = run(Role::Fs, STATE);
        if status.code() != Some(0) {
            wrong.push(format!("files: {status} {said}"));
        }
    } else {
        vz_tally::skip!(test: "roles", "root of its own: not root");
    }
    for what in &wrong {
        println!("FAILED {what}");
    }
    println!("{} roles, {} attempts each: {} wrong", Role::ALL.len(), ATTEMPTS.len() + 3, wrong.len());
    if wrong.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
