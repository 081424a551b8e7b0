//! Containers without containerd: `vz run` on a bundle, runc's command line, and podman, which calls that.

use std::{
    fs,
    io::{Read, Write},
    os::unix::{
        fs::{PermissionsExt, symlink},
        net::UnixListener,
    },
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use serde_json::{Value, json};
use tempfile::TempDir;
use vz_suite::{
    Lab, Skip, Verdict,
    command::Program,
    host::{self, Role, await_process},
    leaks::Snapshot,
    poll::until,
    pty::Session,
    tests,
};

tests![
    run_has_the_processs_streams_and_status,
    run_passes_signals_on,
    run_on_a_terminal,
    a_reader_that_goes_ends_the_writer,
    run_of_what_cannot_run_leaves_nothing,
    the_runtimes_command_line,
    exec_has_its_own_streams_and_status,
    a_terminal_goes_to_the_console_socket,
    names_and_states_that_are_wrong_are_refused,
    what_is_killed_is_deleted_without_a_trace,
    an_exec_process_ends_with_its_keeper,
    podman_runs_containers,
    podman_keeps_containers,
];

const APPLETS: [&str; 16] = [
    "sh", "cat", "echo", "sleep", "true", "yes", "head", "stty", "tty", "env", "id", "ps", "kill", "touch", "mount",
    "ls",
];

/// A bundle, and a root for the state of its container.
struct Bundle {
    dir: TempDir,
    id: String,
}

fn busybox() -> Result<PathBuf, Skip> {
    let found = ["/bin/busybox", "/usr/bin/busybox"].iter().map(PathBuf::from).find(|path| path.exists());
    found.ok_or_else(|| Skip("there is no busybox here: install busybox-static".into()))
}

fn rootfs(at: &Path) -> Result<(), Skip> {
    for dir in ["bin", "dev", "etc", "proc", "sys", "tmp"] {
        fs::create_dir_all(at.join(dir)).expect("make a directory");
    }
    fs::copy(busybox()?, at.join("bin/busybox")).expect("copy busybox");
    for applet in APPLETS {
        symlink("busybox", at.join("bin").join(applet)).expect("make a link");
    }
    Ok(())
}

impl Bundle {
    fn new(lab: &Lab, args: &[&str], terminal: bool) -> Result<Self, Skip> {
        lab.vz_only()?;
        let dir = lab.dir();
        rootfs(&dir.path().join("rootfs"))?;
        let capabilities = json!(["CAP_KILL", "CAP_CHOWN"]);
        let config = json!({
            "ociVersion": "1.0.2",
            "process": {
                "terminal": terminal, "user": { "uid": 0, "gid": 0 }, "args": args, "cwd": "/",
                "env": ["PATH=/bin", "TERM=xterm"],
                "capabilities": { "bounding": capabilities, "effective": capabilities, "permitted": capabilities },
            },
            "root": { "path": "rootfs" },
            "hostname": "oci",
            "mounts": [
                { "destination": "/proc", "type": "proc", "source": "proc" },
                { "destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"] },
                { "destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["newinstance", "ptmxmode=0666"] },
            ],
            "annotations": { "of.the.test": "yes" },
            "linux": { "namespaces": [
                { "type": "pid" }, { "type": "network" }, { "type": "ipc" }, { "type": "uts" }, { "type": "mount" },
            ] },
        });
        fs::write(dir.path().join("config.json"), config.to_string()).expect("write a config.json");
        Ok(Self { dir, id: lab.id("oci") })
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).display().to_string()
    }

    /// `vz` with the root of this bundle's container, and then `words`; `%` is its id, `@` the bundle's directory.
    fn args(&self, words: &[&str]) -> Vec<String> {
        let word = |word: &&str| match *word {
            "%" => self.id.clone(),
            "@" => self.path(""),
            other => other.to_owned(),
        };
        ["--root".to_owned(), self.path("state")].into_iter().chain(words.iter().map(word)).collect()
    }

    fn vz(&self, lab: &Lab, words: &[&str]) -> Program {
        let args = self.args(words);
        lab.vz(&args.iter().map(String::as_str).collect::<Vec<_>>())
    }

    fn state(&self, lab: &Lab) -> Value {
        serde_json::from_str(&self.vz(lab, &["state", "%"]).run().ok()).expect("a state is JSON")
    }

    fn await_status(&self, lab: &Lab, wanted: &str) {
        until(&format!("status {wanted}"), Duration::from_secs(30), || {
            (self.state(lab)["status"] == wanted).then_some(())
        });
    }
}

fn run_has_the_processs_streams_and_status(lab: &Lab) -> Verdict {
    let bundle = Bundle::new(lab, &["sh", "-c", "echo from $(cat); echo badly >&2; exit 7"], false)?;
    let output = bundle.vz(lab, &["run", "--bundle", "@", "%"]).input(b"here").run();
    output.exits(7);
    assert_eq!((output.text().as_str(), output.errors().trim()), ("from here", "badly"));
    // Nothing is left, so the name is free; and a pipe is as good as a file.
    let mut running = bundle.vz(lab, &["run", "-b", "@", "%"]).piped().start();
    running.stdin.take().expect("a pipe").write_all(b"there").expect("write to a pipe");
    let output = running.wait();
    output.exits(7);
    assert_eq!(output.text(), "from there");
    assert_eq!(bundle.vz(lab, &["list", "-q"]).run().ok(), "");
    Ok(())
}

fn run_passes_signals_on(lab: &Lab) -> Verdict {
    let script = "trap 'echo told; exit 3' TERM; echo up; while true; do sleep 0.1; done";
    let bundle = Bundle::new(lab, &["sh", "-c", script], false)?;
    let running = bundle.vz(lab, &["run", "-b", "@", "%"]).start();
    running.expect("up");
    running.signal(Signal::TERM);
    let output = running.wait();
    output.exits(3);
    assert!(output.text().ends_with("told"), "{output}");
    // What ends by a signal has the status of one.
    let running = bundle.vz(lab, &["run", "-b", "@", "%"]).start();
    running.expect("up");
    bundle.vz(lab, &["kill", "%", "KILL"]).run().ok();
    running.wait().exits(137);
    Ok(())
}

fn run_on_a_terminal(lab: &Lab) -> Verdict {
    // BusyBox's `read` gives up, and may lose what it has, where a signal with a trap comes in.
    let script =
        "tty; stty size; trap 'stty size' WINCH; echo ready; until read line; do :; done; echo got $line; sleep 1000";
    let bundle = Bundle::new(lab, &["sh", "-c", script], true)?;
    // Without one it says what to do.
    bundle.vz(lab, &["run", "-b", "@", "%"]).run().fails_with(&["terminal", "--console-socket"]);
    let args = bundle.args(&["run", "-b", "@", "%"]);
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let vz = lab.shim().with_file_name("vz").display().to_string();
    let mut session = Session::start(&vz, &args, lab.env(), (33, 101));
    session.expect("ready");
    session.expect("33 101");
    session.resize(44, 102);
    session.expect("44 102");
    session.type_in("words\r");
    session.expect("got words");
    // The key is the guest's to turn into a signal.
    session.type_in("\x03");
    let (code, screen) = session.wait();
    assert_eq!(code, 130, "{screen:?}");
    assert!(screen.contains("/dev/"), "{screen:?}");
    Ok(())
}

fn a_reader_that_goes_ends_the_writer(lab: &Lab) -> Verdict {
    let bundle = Bundle::new(lab, &["yes"], false)?;
    let args = bundle.args(&["run", "-b", "@", "%"]).join(" ");
    let vz = lab.shim().with_file_name("vz").display().to_string();
    let script = format!("{vz} {args} | head -n 3; exit ${{PIPESTATUS[0]}}");
    let output = Program::new("bash").args(["-c", &script]).envs(lab.env()).run();
    assert_eq!(output.text(), "y\ny\ny");
    // As a process that gets SIGPIPE, or that is told that it cannot write.
    assert!(matches!(output.code(), 141 | 1), "{output}");
    Ok(())
}

fn run_of_what_cannot_run_leaves_nothing(lab: &Lab) -> Verdict {
    let bundle = Bundle::new(lab, &["/no/such/program"], false)?;
    bundle.vz(lab, &["run", "-b", "@", "%"]).run().fails_with(&["/no/such/program"]);
    bundle.vz(lab, &["state", "%"]).run().fails_with(&["does not exist"]);
    let elsewhere = lab.dir();
    let elsewhere = elsewhere.path().display().to_string();
    bundle.vz(lab, &["run", "-b", &elsewhere, "%"]).run().fails_with(&["config.json"]);
    fs::write(bundle.path("config.json"), "{").expect("write a config.json");
    bundle.vz(lab, &["run", "-b", "@", "%"]).run().fails_with(&["config.json"]);
    let log = bundle.path("log");
    let output = bundle.vz(lab, &["--log", &log, "--log-format", "json", "create", "-b", "@", "%"]).run();
    output.fails_with(&["config.json"]);
    let logged: Value = serde_json::from_slice(&fs::read(log).expect("read a log")).expect("it is JSON");
    assert_eq!(logged["level"], "error");
    assert!(logged["msg"].as_str().is_some_and(|text| text.contains("config.json")), "{logged}");
    Ok(())
}

fn the_runtimes_command_line(lab: &Lab) -> Verdict {
    let bundle = Bundle::new(lab, &["sh", "-c", "echo up; sleep 1000"], false)?;
    let pid_file = bundle.path("pid");
    bundle
        .vz(lab, &["create", "--no-pivot", "--preserve-fds", "0", "-b", "@", "--pid-file", &pid_file, "%"])
        .run()
        .ok();
    let state = bundle.state(lab);
    let pid: i32 = fs::read_to_string(&pid_file).expect("a pid file").parse().expect("a number");
    assert_eq!((&state["status"], &state["pid"]), (&json!("created"), &json!(pid)));
    assert_eq!((&state["id"], &state["ociVersion"]), (&json!(bundle.id), &json!("1.0.2")));
    assert_eq!(state["annotations"]["of.the.test"], "yes");
    assert_eq!(Path::new(state["bundle"].as_str().expect("a path")), bundle.dir.path());
    // Whoever looks up the container by that pid finds it, and not the host.
    let own = |kind: &str| fs::read_link(format!("/proc/self/ns/{kind}")).expect("a namespace");
    for kind in ["net", "mnt"] {
        assert_ne!(fs::read_link(format!("/proc/{pid}/ns/{kind}")).expect("a namespace"), own(kind), "{kind}");
    }
    assert!(Path::new(&format!("/proc/{pid}/root/bin/busybox")).exists());
    bundle.vz(lab, &["create", "-b", "@", "%"]).run().fails_with(&[&bundle.id, "already exists"]);
    bundle.vz(lab, &["start", "%"]).run().ok();
    assert_eq!(bundle.state(lab)["status"], "running");
    bundle.vz(lab, &["start", "%"]).run().fails_with(&["running"]);
    bundle.vz(lab, &["delete", "%"]).run().fails_with(&["cannot delete", "running"]);
    let list = bundle.vz(lab, &["list", "-f", "json"]).run().ok();
    assert_eq!(serde_json::from_str::<Value>(&list).expect("a list is JSON")[0], bundle.state(lab));
    assert_eq!(bundle.vz(lab, &["list", "-q"]).run().ok(), bundle.id);
    let pids = bundle.vz(lab, &["ps", "%", "--format", "json"]).run().ok();
    assert_eq!(serde_json::from_str::<Value>(&pids).expect("pids are JSON"), json!([pid]));
    assert!(bundle.vz(lab, &["ps", "%"]).run().ok().contains(&pid.to_string()));
    assert!(lab.vz(&["ps"]).run().ok().contains(&bundle.id));
    // A signal to the pid is one to the process.
    kill_process(Pid::from_raw(pid).expect("a pid"), Signal::KILL).expect("kill");
    bundle.await_status(lab, "stopped");
    assert_eq!(bundle.state(lab)["pid"], 0);
    bundle.vz(lab, &["kill", "%", "TERM"]).run().fails_with(&["not running"]);
    bundle.vz(lab, &["exec", "%", "true"]).run().fails_with(&["not running"]);
    bundle.vz(lab, &["delete", "%"]).run().ok();
    bundle.vz(lab, &["delete", "%"]).run().fails_with(&["does not exist"]);
    bundle.vz(lab, &["delete", "--force", "%"]).run().ok();
    let features: Value = serde_json::from_str(&lab.vz(&["features"]).run().ok()).expect("features are JSON");
    assert!(features["hooks"].as_array().is_some_and(|hooks| hooks.contains(&json!("createRuntime"))), "{features}");
    Ok(())
}

fn exec_has_its_own_streams_and_status(lab: &Lab) -> Verdict {
    let bundle = Bundle::new(lab, &["sleep", "1000"], false)?;
    bundle.vz(lab, &["run", "-d", "-b", "@", "%"]).run().ok();
    let script = "echo $A $(id -u):$(id -g) $PWD $(cat); exit 4";
    let words = ["exec", "-e", "A=b", "-u", "5:6", "--cwd", "/tmp", "%", "sh", "-c", script];
    let output = bundle.vz(lab, &words).input(b"in").run();
    output.exits(4);
    assert_eq!(output.text(), "b 5:6 /tmp in");
    bundle.vz(lab, &["exec", "%", "no-such-program"]).run().fails_with(&["no-such-program"]);
    let process = json!({ "args": ["sh", "-c", "echo $B"], "cwd": "/", "env": ["PATH=/bin", "B=c"], "user": { "uid": 0, "gid": 0 } });
    fs::write(bundle.path("process.json"), process.to_string()).expect("write a process.json");
    let file = bundle.path("process.json");
    assert_eq!(bundle.vz(lab, &["exec", "--process", &file, "%"]).run().ok(), "c");
    let pid_file = bundle.path("pid");
    bundle.vz(lab, &["exec", "-d", "--pid-file", &pid_file, "%", "sh", "-c", "touch /tmp/done; sleep 1000"]).run().ok();
    until("the exec process", Duration::from_secs(10), || {
        Path::new(&bundle.path("rootfs/tmp/done")).exists().then_some(())
    });
    let pid: Value = fs::read_to_string(pid_file).expect("a pid file").parse::<i32>().expect("a number").into();
    let pids: Value =
        serde_json::from_str(&bundle.vz(lab, &["ps", "%", "-f", "json"]).run().ok()).expect("pids are JSON");
    assert!(pids.as_array().is_some_and(|pids| pids.len() == 2 && pids.contains(&pid)), "{pids}");
    bundle.vz(lab, &["kill", "--all", "%", "KILL"]).run().ok();
    bundle.await_status(lab, "stopped");
    bundle.vz(lab, &["delete", "%"]).run().ok();
    Ok(())
}

fn a_terminal_goes_to_the_console_socket(lab: &Lab) -> Verdict {
    let bundle = Bundle::new(lab, &["sh", "-c", "stty size; read line; echo got $line"], true)?;
    bundle.vz(lab, &["create", "-b", "@", "%"]).run().fails_with(&["--console-socket"]);
    let socket = bundle.path("console");
    let listener = UnixListener::bind(&socket).expect("listen");
    bundle.vz(lab, &["create", "--console-socket", &socket, "-b", "@", "%"]).run().ok();
    let (stream, _) = listener.accept().expect("a connection");
    let mut master = receive(&stream);
    rustix::termios::tcsetwinsize(
        &master,
        rustix::termios::Winsize { ws_row: 11, ws_col: 22, ws_xpixel: 0, ws_ypixel: 0 },
    )
    .expect("resize a terminal");
    bundle.vz(lab, &["start", "%"]).run().ok();
    master.write_all(b"words\r").expect("type");
    let mut screen = String::new();
    let mut part = [0; 512];
    while !screen.contains("got words") {
        match master.read(&mut part) {
            Ok(n @ 1..) => screen.push_str(&String::from_utf8_lossy(&part[..n])),
            other => panic!("the terminal ended ({other:?}): {screen:?}"),
        }
    }
    assert!(screen.contains("11 22"), "{screen:?}");
    bundle.await_status(lab, "stopped");
    bundle.vz(lab, &["delete", "%"]).run().ok();
    Ok(())
}

/// The terminal that comes over a console socket.
fn receive(stream: &std::os::unix::net::UnixStream) -> fs::File {
    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut name = [0; 64];
    recvmsg(stream, &mut [std::io::IoSliceMut::new(&mut name)], &mut control, RecvFlags::CMSG_CLOEXEC)
        .expect("receive");
    let fd = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    fd.expect("a descriptor").into()
}

fn names_and_states_that_are_wrong_are_refused(lab: &Lab) -> Verdict {
    let bundle = Bundle::new(lab, &["true"], false)?;
    for name in ["../x", "a/b", ".", "..", "a b", ""] {
        for verb in [&["state"][..], &["kill"], &["delete", "--force"], &["create", "-b", "@"]] {
            bundle.vz(lab, &[verb, &[name]].concat()).run().fails_with(&["invalid container ID format"]);
        }
    }
    for verb in ["state", "start", "kill", "delete", "ps"] {
        bundle.vz(lab, &[verb, "%"]).run().fails_with(&["does not exist"]);
    }
    bundle
        .vz(lab, &["create", "--preserve-fds", "1", "-b", "@", "%"])
        .run()
        .fails_with(&["--preserve-fds 1", "volume"]);
    // A state that is no state harms nobody but its container, and can be removed.
    let dir = bundle.path("state/broken");
    fs::create_dir_all(&dir).expect("make a directory");
    assert_eq!(bundle.vz(lab, &["list", "-q"]).run().ok(), "");
    bundle.vz(lab, &["state", "broken"]).run().fails_with(&["does not exist"]);
    fs::write(format!("{dir}/state.json"), "{").expect("write a file");
    bundle.vz(lab, &["state", "broken"]).run().fails_with(&["state.json"]);
    bundle.vz(lab, &["delete", "--force", "broken"]).run().ok();
    assert!(!Path::new(&dir).exists());
    Ok(())
}

fn what_is_killed_is_deleted_without_a_trace(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    for role in [Role::Keeper, Role::Shim, Role::Vmm, Role::Anchor] {
        let before = Snapshot::take(lab);
        let bundle = Bundle::new(lab, &["sleep", "1000"], false)?;
        bundle.vz(lab, &["run", "-d", "-b", "@", "%"]).run().ok();
        host::kill(&await_process(&bundle.id, role));
        if role != Role::Anchor {
            bundle.await_status(lab, "stopped");
        }
        bundle.vz(lab, &["delete", "--force", "%"]).run().ok();
        let left = before.new_since(lab);
        assert!(left.is_empty(), "after the end of {role:?}: {left:?}");
    }
    // In the middle of its creation.
    let before = Snapshot::take(lab);
    let bundle = Bundle::new(lab, &["sleep", "1000"], false)?;
    let creating = bundle.vz(lab, &["create", "-b", "@", "%"]).start();
    await_process(&bundle.id, Role::Vmm);
    assert_eq!(bundle.state(lab)["status"], "creating");
    bundle.vz(lab, &["delete", "%"]).run().fails_with(&["being created", "--force"]);
    creating.signal(Signal::KILL);
    creating.wait().exits(137);
    bundle.vz(lab, &["delete", "--force", "%"]).run().ok();
    let (left, _) = before.settle(lab);
    assert!(left.is_empty(), "after a creation that was killed: {left:?}");
    Ok(())
}

fn an_exec_process_ends_with_its_keeper(lab: &Lab) -> Verdict {
    let bundle = Bundle::new(lab, &["sleep", "1000"], false)?;
    bundle.vz(lab, &["run", "-d", "-b", "@", "%"]).run().ok();
    let pid_file = bundle.path("pid");
    bundle.vz(lab, &["exec", "-d", "--pid-file", &pid_file, "%", "sleep", "999"]).run().ok();
    let processes = || bundle.vz(lab, &["exec", "%", "ps"]).run().ok();
    assert!(processes().contains("sleep 999"));
    let pid: i32 = fs::read_to_string(pid_file).expect("a pid file").parse().expect("a number");
    let pid = Pid::from_raw(pid).expect("a pid");
    test_kill_process(pid).expect("it lives");
    kill_process(pid, Signal::KILL).expect("kill");
    until("the exec process to end", Duration::from_secs(10), || (!processes().contains("sleep 999")).then_some(()));
    bundle.vz(lab, &["delete", "--force", "%"]).run().ok();
    Ok(())
}

/// podman with storage of a test's own, an image, and vz as its runtime.
struct Podman<'l> {
    lab: &'l Lab,
    dir: TempDir,
}

const IMAGE: &str = "localhost/vzt:1";

impl<'l> Podman<'l> {
    fn new(lab: &'l Lab) -> Result<Self, Skip> {
        lab.vz_only()?;
        if !["/usr/bin/podman", "/usr/local/bin/podman"].iter().any(|path| Path::new(path).exists()) {
            return Err(Skip("podman is not installed".into()));
        }
        let this = Self { lab, dir: lab.dir() };
        // podman does not hand its environment to the runtime.
        let env = |name: &str| lab.env().iter().find(|(key, _)| key == name).map_or("", |(_, value)| value.as_str());
        let (config, linux, vz) = (env("VZ_CONFIG"), env("VZ_LINUX_DIR"), lab.shim().with_file_name("vz"));
        let script = format!("#!/bin/sh\nVZ_CONFIG='{config}' VZ_LINUX_DIR='{linux}' exec '{}' \"$@\"\n", vz.display());
        fs::write(this.runtime(), script).expect("write a script");
        fs::set_permissions(this.runtime(), fs::Permissions::from_mode(0o755)).expect("make a script executable");
        let root = this.dir.path().join("image");
        rootfs(&root)?;
        let archive = this.dir.path().join("image.tar").display().to_string();
        Program::new("tar").args(["-C", &root.display().to_string(), "-cf", &archive, "."]).run().ok();
        this.call(&["import", &archive, IMAGE]).run().ok();
        Ok(this)
    }

    fn runtime(&self) -> String {
        self.dir.path().join("vz").display().to_string()
    }

    fn call(&self, args: &[&str]) -> Program {
        let path = |name: &str| self.dir.path().join(name).display().to_string();
        let (root, runroot, tmp, vz) = (path("root"), path("runroot"), path("tmp"), self.runtime());
        Program::new("podman")
            .envs(self.lab.env())
            .args(["--root", &root, "--runroot", &runroot, "--tmpdir", &tmp, "--storage-driver", "vfs"])
            .args(["--cgroup-manager", "cgroupfs", "--events-backend", "file", "--runtime", &vz])
            .args(args)
    }

    fn run(&self, args: &[&str]) -> Program {
        self.call(&["run", "--network", "none"]).args(args)
    }
}

impl Drop for Podman<'_> {
    fn drop(&mut self) {
        drop(self.call(&["rm", "--all", "--force", "--time", "0"]).start().wait_at_most(Duration::from_secs(60)));
    }
}

fn podman_runs_containers(lab: &Lab) -> Verdict {
    let podman = Podman::new(lab)?;
    let output = podman.run(&["--rm", IMAGE, "sh", "-c", "echo out; echo err >&2; exit 5"]).run();
    output.exits(5);
    assert_eq!((output.text().as_str(), output.errors().trim()), ("out", "err"));
    let output = podman.run(&["--rm", "-i", IMAGE, "cat"]).input(b"through").run();
    assert_eq!(output.ok(), "through");
    let volume = lab.dir();
    fs::write(volume.path().join("in"), "volume\n").expect("write a file");
    let bind = format!("{}:/v", volume.path().display());
    let output = podman.run(&["--rm", "-v", &bind, IMAGE, "sh", "-c", "cat /v/in; touch /v/out"]).run();
    assert_eq!(output.ok(), "volume");
    assert!(volume.path().join("out").exists());
    podman.run(&["--rm", IMAGE, "/no/such"]).run().exits(127);
    // podman wants what is below a tmpfs copied into it: where that is nothing, nothing is missing.
    let read_only = podman.run(&["--rm", "--read-only", IMAGE, "sh", "-c", "touch /tmp/x && ! touch /etc/x"]).run();
    read_only.exits(0);
    podman.run(&["--rm", "--tmpfs", "/bin", IMAGE, "true"]).run().fails_with(&["tmpcopyup", "notmpcopyup"]);
    Ok(())
}

fn podman_keeps_containers(lab: &Lab) -> Verdict {
    let podman = Podman::new(lab)?;
    let name = lab.id("podman");
    let script = "trap 'echo bye; exit 6' TERM; echo up; while true; do sleep 0.1; done";
    podman.run(&["-d", "--name", &name, IMAGE, "sh", "-c", script]).run().ok();
    let logs = || podman.call(&["logs", &name]).run().ok();
    until("the container's words", Duration::from_secs(20), || logs().contains("up").then_some(()));
    assert_eq!(podman.call(&["ps", "--format", "{{.Names}}"]).run().ok(), name);
    let output = podman.call(&["exec", &name, "sh", "-c", "echo in; exit 9"]).run();
    output.exits(9);
    assert_eq!(output.text(), "in");
    let running =
        |wanted: &str| assert_eq!(podman.call(&["inspect", "-f", "{{.State.Running}}", &name]).run().ok(), wanted);
    running("true");
    podman.call(&["stop", &name]).run().ok();
    running("false");
    assert_eq!(podman.call(&["wait", &name]).run().ok(), "6");
    assert!(logs().ends_with("bye"));
    podman.call(&["start", &name]).run().ok();
    podman.call(&["kill", &name]).run().ok();
    assert_eq!(podman.call(&["wait", &name]).run().ok(), "137");
    podman.call(&["rm", &name]).run().ok();
    Ok(())
}
