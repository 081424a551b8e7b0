//! What a sandbox is on its host: where hooks and loggers run, whom the kernel ends first, and what is left.

use std::{
    fs,
    os::unix::fs::{DirBuilderExt, symlink},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use serde_json::json;
use vz_suite::{
    Lab, Skip, Verdict,
    command::Program,
    container::{Container, Task},
    events::Recorder,
    host::{self, Processes, Role, await_process, find},
    lab::{BUSYBOX, DEBIAN},
    poll::until,
    tests,
};

use super::endings;
use crate::{
    network::net_faults::{Custom, hook},
    programs::cli::watcher,
    storage::disks::{self, Loop},
};

tests![
    hooks_are_where_the_shim_was,
    loggers_are_where_the_shim_was,
    a_hook_without_a_timeout_is_ended_too,
    the_oom_score_is_the_specs,
    without_an_oom_score_nobody_is_spared,
    a_vm_that_is_killed_for_want_of_memory_is_told,
    hosts_that_are_replaced_are_followed,
    nothing_in_the_place_of_hosts_leads_anywhere,
    what_cannot_be_taken_away_is_said_until_it_can,
    what_takes_longer_than_delete_may_is_taken_away_after_it,
    a_daemon_that_hangs_is_ended,
];

fn read(path: impl AsRef<Path>) -> String {
    let path = path.as_ref();
    fs::read_to_string(path).unwrap_or_else(|e| panic!("read {}: {e}", path.display())).trim().to_owned()
}

fn mount_namespace(pid: i32) -> String {
    fs::read_link(format!("/proc/{pid}/ns/mnt")).expect("a process has a mount namespace").display().to_string()
}

/// Soft and hard limit of open files.
fn open_files(pid: i32) -> [String; 2] {
    let limits = read(format!("/proc/{pid}/limits"));
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files")).expect("there is such a limit");
    let mut words = line.split_whitespace().map(str::to_owned);
    [words.next().expect("a soft limit"), words.next().expect("a hard limit")]
}

/// The soft limit that containerd was started with, by this process. It raises its own, and gives this one to its
/// children.
fn given_open_files() -> String {
    let [soft, _] = open_files(host::own_pid());
    soft
}

fn hooks_are_where_the_shim_was(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    let custom = Custom::new(lab, "surroundings");
    let file = custom.said();
    let place = custom.dir.path().join("mounted");
    fs::create_dir(&place).expect("make a directory");
    let place = place.display();
    let look = format!(
        "cat >/dev/null; {{ readlink /proc/self/ns/mnt; pwd; ulimit -Sn; }} >>{file}; \
         mount -t tmpfs vzt-hook {place}; setsid sleep 1000 >/dev/null 2>&1 & echo $! >>{file}"
    );
    let hooks = json!({ "createRuntime": [hook(&look)] });
    custom.run(&["-d"], &hooks, "sleep 1000").run().ok();
    let containerd = lab.containerd().pid;
    let shim = await_process(&custom.id, Role::Shim).pid;
    let said = read(&file);
    let [mounts, directory, limit, left] = said.lines().collect::<Vec<_>>()[..] else { panic!("{said}") };
    assert_eq!(mounts, mount_namespace(containerd));
    assert_ne!(mounts, mount_namespace(shim));
    assert!(directory.ends_with(&format!("/{}", custom.id)), "not in its bundle: {directory}");
    assert_eq!(limit, given_open_files());
    let [soft, hard] = open_files(shim);
    assert_eq!(soft, hard);
    // What it mounts is the host's, and what it leaves behind has nothing of the sandbox.
    let mounted = |pid: i32| read(format!("/proc/{pid}/mountinfo"));
    assert!(mounted(containerd).contains("vzt-hook"));
    let left: i32 = left.parse().expect("a pid");
    assert!(!mounted(left).contains("vz-share"));
    lab.ctr(&["task", "rm", "-f", &custom.id]).run().ok();
    assert!(Processes::now().get(left).is_some(), "the hook's daemon is gone");
    Program::new("kill").args(["-9", &left.to_string()]).run().ok();
    let undo = format!("nsenter -t {containerd} -m umount {place}");
    Program::new("sh").args(["-c", &undo]).run().ok();
    Ok(())
}

fn loggers_are_where_the_shim_was(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    let container = Container::start(lab, "logged", &[BUSYBOX, "sh", "-c", "echo up; exec sleep 1000"]);
    let shim = await_process(&container.id, Role::Shim).pid;
    let all = Processes::now();
    let logger = all.iter().find(|p| p.parent == shim && p.args.iter().any(|arg| arg.contains("INTERNAL_LOGGING")));
    let Some(logger) = logger else { return Err(Skip("nerdctl logs without a program".into())) };
    let containerd = lab.containerd().pid;
    assert_eq!(mount_namespace(logger.pid), mount_namespace(containerd));
    let directory = fs::read_link(format!("/proc/{}/cwd", logger.pid)).expect("it has a directory");
    assert!(directory.ends_with(&container.id), "{}", directory.display());
    until("its output", Duration::from_secs(20), || (container.logs() == "up").then_some(()));
    // nerdctl's program is of those that raise their own limit. A shell does not.
    let dir = lab.dir();
    let uri = endings::logger(dir.path(), "ulimit -Sn >\"$0.limit\"; exec 5>&-; exec cat <&3 >/dev/null");
    let id = lab.id("limited");
    lab.ctr_run(&["--rm", "--log-uri", &uri, BUSYBOX, &id, "true"]).run().ok();
    assert_eq!(read(dir.path().join("logger.limit")), given_open_files());
    Ok(())
}

fn a_hook_without_a_timeout_is_ended_too(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    let _guard = lab.configure("[timeouts]\nhook_s = 2\n");
    let custom = Custom::new(lab, "endless");
    let hooks = json!({ "createRuntime": [hook("exec sleep 1000")], "poststop": [hook("exec sleep 1000")] });
    custom.run(&["--rm"], &hooks, "true").run().fails_with(&["/bin/sh", "timeouts.hook_s of 2 s"]);
    Ok(())
}

fn scores(id: &str) -> Vec<(Role, String)> {
    let roles = [Role::Vmm, Role::Qemu, Role::Anchor].into_iter();
    roles.filter_map(|role| Some((role, read(format!("/proc/{}/oom_score_adj", find(id, role)?.pid))))).collect()
}

fn the_oom_score_is_the_specs(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    let wanted: &[i32] = if may_lower_scores() { &[654, -321] } else { &[654] };
    for score in wanted {
        let custom = Custom::new(lab, "score");
        let edit = |spec: &mut serde_json::Value| spec["process"]["oomScoreAdj"] = json!(score);
        custom.run_edited(&["-d"], "sleep 1000", edit).run().ok();
        let found = scores(&custom.id);
        assert!(found.len() >= 2 && found.iter().all(|(_, found)| *found == score.to_string()), "{found:?}");
    }
    Ok(())
}

fn without_an_oom_score_nobody_is_spared(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    let daemon = lab.containerd().pid;
    let path = format!("/proc/{daemon}/oom_score_adj");
    let before = read(&path);
    // containerd's, the shim's, the VM's.
    let cases: &[_] = if may_lower_scores() { &[(100, 101, 101), (-999, -998, 0)] } else { &[(100, 101, 101)] };
    for (containerds, shims, vms) in cases {
        fs::write(&path, containerds.to_string()).expect("set containerd's score");
        let task = Task::start(lab, "unspared", &[], BUSYBOX, &["sleep", "1000"]);
        fs::write(&path, &before).expect("set containerd's score back");
        let found = scores(&task.id);
        assert!(found.len() >= 2 && found.iter().all(|(_, score)| *score == vms.to_string()), "{found:?}");
        let shim = await_process(&task.id, Role::Shim).pid;
        assert_eq!(read(format!("/proc/{shim}/oom_score_adj")), shims.to_string());
        task.kill("SIGKILL");
        task.wait();
    }
    Ok(())
}

/// Whether this host lets root protect processes; in a container it often does not.
fn may_lower_scores() -> bool {
    let own = "/proc/self/oom_score_adj";
    let before: i32 = read(own).parse().expect("a number");
    let may = fs::write(own, (before - 1).to_string()).is_ok();
    if may {
        fs::write(own, before.to_string()).expect("set a score back");
    } else {
        println!("  scores cannot be lowered on this host: only higher ones are tried");
    }
    may
}

/// The directory of a process's memory cgroup, and the file of its limit.
fn memory_cgroup(pid: i32) -> Option<(PathBuf, &'static str, &'static str)> {
    let text = read(format!("/proc/{pid}/cgroup"));
    text.lines().find_map(|line| {
        let (_, rest) = line.split_once(':')?;
        let (controllers, path) = rest.split_once(':')?;
        let path = path.trim_start_matches('/');
        let root = Path::new("/sys/fs/cgroup");
        let found = match controllers {
            "memory" => (root.join("memory").join(path), "memory.limit_in_bytes", "memory.usage_in_bytes"),
            "" => (root.join(path), "memory.max", "memory.current"),
            _ => return None,
        };
        found.0.join(found.1).exists().then_some(found)
    })
}

fn a_vm_that_is_killed_for_want_of_memory_is_told(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    let events = Recorder::start(lab);
    let mark = lab.log_position();
    let task = Task::start(lab, "starved", &[], DEBIAN, &["sleep", "1000"]);
    let vmm = await_process(&task.id, Role::Vmm).pid;
    let Some((dir, limit, usage)) = memory_cgroup(vmm) else { return Err(Skip("no memory controller".into())) };
    let used: u64 = read(dir.join(usage)).parse().expect("a number");
    fs::write(dir.join(limit), (used + (32 << 20)).to_string()).expect("limit the cgroup's memory");
    // The guest has all of its memory; its host has not.
    let eat = "x = []\nfor _ in range(600): x.append(b'x' * (1 << 20))";
    task.exec(&["python3", "-c", eat]).run();
    events.expect(&task.id, "/tasks/oom");
    let exit = events.expect_where(&task.id, "/tasks/exit", |event| event.text("id") == task.id);
    assert_eq!(exit.number("exit_status"), 137);
    assert_ne!(task.wait().code(), 0);
    lab.ctr(&["task", "rm", "-f", &task.id]).run();
    lab.remove_clients_fifos();
    let said = lab.log_lines_since(mark);
    assert!(said.contains("for want of memory"), "{said}");
    Ok(())
}

/// A container whose /etc/hosts is a file in a directory that it can write, at /dir.
struct Hosts<'l> {
    dir: tempfile::TempDir,
    task: Task<'l>,
}

impl<'l> Hosts<'l> {
    fn start(lab: &'l Lab, options: &str) -> Self {
        let dir = lab.dir();
        for name in ["hosts", "resolv.conf", "hostname"] {
            fs::write(dir.path().join(name), "old\n").expect("write a file");
        }
        let path = dir.path().display();
        let mount =
            |name: &str, to: &str, options: &str| format!("type=bind,src={path}{name},dst={to},options={options}");
        let mounts = [
            mount("", "/dir", "rbind:rw"),
            mount("/hosts", "/etc/hosts", options),
            mount("/resolv.conf", "/etc/resolv.conf", options),
            mount("/hostname", "/etc/hostname", options),
        ];
        let flags: Vec<_> = mounts.iter().flat_map(|mount| ["--mount", mount]).collect();
        let task = Task::start(lab, "names", &flags, BUSYBOX, &["sh", "-c", "echo up; exec sleep 1000"]);
        task.expect("up");
        Self { dir, task }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Moves a new file over one of them, as editors do.
    fn replace(&self, name: &str, text: &str) {
        fs::write(self.path("next"), text).expect("write a file");
        fs::rename(self.path("next"), self.path(name)).expect("rename a file");
    }

    fn seen(&self, name: &str) -> String {
        self.task.exec(&["cat", &format!("/etc/{name}")]).run().ok()
    }
}

fn hosts_that_are_replaced_are_followed(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    let hosts = Hosts::start(lab, "rbind:rw");
    for name in ["hosts", "resolv.conf", "hostname"] {
        for text in ["newer", "newest"] {
            hosts.replace(name, &format!("{text}\n"));
            until("the new file", Duration::from_secs(20), || (hosts.seen(name) == text).then_some(()));
        }
    }
    // The old file has a name still: it is not the shim's to change.
    fs::rename(hosts.path("hosts"), hosts.path("hosts.first")).expect("rename a file");
    hosts.replace("hosts", "other\n");
    hosts.replace("hosts", "and another\n");
    until("the new file", Duration::from_secs(20), || (hosts.seen("hosts") == "and another").then_some(()));
    drop(hosts);
    let hosts = Hosts::start(lab, "rbind:rw");
    fs::rename(hosts.path("hosts"), hosts.path("hosts.bak")).expect("rename a file");
    hosts.replace("hosts", "new\n");
    hosts.replace("resolv.conf", "new\n");
    until("the other new file", Duration::from_secs(20), || (hosts.seen("resolv.conf") == "new").then_some(()));
    assert_eq!((read(hosts.path("hosts.bak")), hosts.seen("hosts")), ("old".into(), "old".into()));
    fs::remove_file(hosts.path("hosts.bak")).expect("remove a file");
    until("the new file", Duration::from_secs(20), || (hosts.seen("hosts") == "new").then_some(()));
    // Read-only: as with runc.
    drop(hosts);
    let hosts = Hosts::start(lab, "rbind:ro");
    hosts.replace("hosts", "new\n");
    assert_eq!((hosts.seen("hosts"), read(hosts.path("hosts"))), ("old".into(), "new".into()));
    Ok(())
}

fn nothing_in_the_place_of_hosts_leads_anywhere(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    let outside = lab.dir();
    let secret = outside.path().join("secret");
    fs::write(&secret, "secret\n").expect("write a file");
    let hosts = Hosts::start(lab, "rbind:rw");
    let sh = |script: &str| hosts.task.exec(&["sh", "-c", script]).run().ok();
    for name in ["hosts", "resolv.conf", "hostname"] {
        let link = format!("rm -f /dir/{name}; ln -s {} /dir/next; mv /dir/next /dir/{name}", secret.display());
        let fifo = format!("rm -f /dir/{name}; mkfifo /dir/next; mv /dir/next /dir/{name}");
        let directory = format!("rm -f /dir/{name}; mkdir /dir/next; mv -T /dir/next /dir/{name}");
        for script in [link, fifo, directory] {
            sh(&script);
            // Events come in order: once a file beside it has been followed, this has been looked at.
            let beside = if name == "hosts" { "resolv.conf" } else { "hosts" };
            hosts.replace_anything(beside, &script);
            until("a file beside it", Duration::from_secs(20), || (hosts.seen(beside) == script).then_some(()));
            let seen = sh(&format!("cat /etc/{name}"));
            assert!(!seen.contains("secret"), "{script}: {seen}");
        }
    }
    // From the host's side too, and all at once.
    let hosts = Hosts::start(lab, "rbind:rw");
    for name in ["hosts", "resolv.conf", "hostname"] {
        fs::remove_file(hosts.path(name)).expect("remove a file");
    }
    symlink(&secret, hosts.path("next")).expect("make a link");
    fs::rename(hosts.path("next"), hosts.path("hosts")).expect("rename a link");
    Program::new("mkfifo").args([hosts.path("next")]).run().ok();
    fs::rename(hosts.path("next"), hosts.path("resolv.conf")).expect("rename a fifo");
    fs::DirBuilder::new().mode(0o755).create(hosts.path("next")).expect("make a directory");
    fs::rename(hosts.path("next"), hosts.path("hostname")).expect("rename a directory");
    for name in ["hosts", "resolv.conf", "hostname"] {
        assert_eq!(hosts.seen(name), "old", "{name}");
    }
    let begun = Instant::now();
    lab.ctr(&["task", "rm", "-f", &hosts.task.id]).run();
    println!("  rm -f took {} ms", begun.elapsed().as_millis());
    until("the shim's end", Duration::from_secs(10), || find(&hosts.task.id, Role::Shim).is_none().then_some(()));
    assert_eq!(read(&secret), "secret");
    Ok(())
}

impl Hosts<'_> {
    /// As [`Hosts::replace`], whatever is there.
    fn replace_anything(&self, name: &str, text: &str) {
        drop(fs::remove_dir(self.path(name)));
        self.replace(name, text);
    }
}

fn what_cannot_be_taken_away_is_said_until_it_can(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    let id = lab.id("blocked");
    let run = || lab.ctr_run(&["-d", BUSYBOX, &id, "sleep", "1000"]).deadline(120).run();
    let remove = || {
        lab.ctr(&["task", "rm", "-f", &id]).run();
        lab.ctr(&["containers", "rm", &id]).run();
    };
    run().ok();
    let vmm = await_process(&id, Role::Vmm).pid;
    let Some((cgroup, ..)) = memory_cgroup(vmm) else { return Err(Skip("no memory controller".into())) };
    // Somebody's cgroup below the sandbox's keeps that.
    let below = cgroup.join("somebodys");
    fs::create_dir(&below).expect("make a cgroup");
    host::kill(&await_process(&id, Role::Shim));
    until("the rest to be gone", Duration::from_secs(30), || {
        (find(&id, Role::Shim).is_none() && !Processes::now().iter().any(|p| p.pid == vmm)).then_some(())
    });
    // containerd has called `delete` by then, and knows no task any more.
    until("the task's end", Duration::from_secs(30), || lab.status(&id).is_none().then_some(()));
    remove();
    let said = run().fails_with(&["somebodys"]);
    println!("  {said}");
    remove();
    fs::remove_dir(&below).expect("remove a cgroup");
    run().ok();
    remove();
    until("the cgroup's end", Duration::from_secs(10), || (!cgroup.exists()).then_some(()));
    lab.remove_clients_fifos();
    Ok(())
}

/// A file system of its own on which writers hang, until it is dropped.
struct Frozen {
    dir: PathBuf,
    _device: Loop,
}

impl Frozen {
    fn new(dir: &Path) -> Result<Self, Skip> {
        let device = Loop::attach(&disks::image(dir))?;
        let frozen = Self { dir: dir.join("frozen"), _device: device };
        fs::create_dir(&frozen.dir).expect("make a directory");
        Program::new("mount").args([&frozen._device.0, &frozen.path()]).run().ok();
        Program::new("fsfreeze").args(["--freeze", &frozen.path()]).run().ok();
        Ok(frozen)
    }

    fn path(&self) -> String {
        self.dir.display().to_string()
    }

    fn thaw(&self) {
        Program::new("fsfreeze").args(["--unfreeze", &self.path()]).run();
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        self.thaw();
        Program::new("umount").args([&self.path()]).run().ok();
    }
}

fn what_takes_longer_than_delete_may_is_taken_away_after_it(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    let dir = lab.dir();
    let task = Task::start(lab, "slow", &[], BUSYBOX, &["sleep", "1000"]);
    let vmm = await_process(&task.id, Role::Vmm).pid;
    let Some((cgroup, ..)) = memory_cgroup(vmm) else { return Err(Skip("no memory controller".into())) };
    let state = Path::new("/run/vz/default").join(&task.id);
    assert!(state.exists());
    // A process in the sandbox's cgroup that a SIGKILL does not end, as one that waits for a device or a server.
    let frozen = Frozen::new(dir.path())?;
    let file = frozen.dir.join("file").display().to_string();
    let writer = Program::new("touch").args([&file]).start();
    until("the writer to hang", Duration::from_secs(20), || {
        let hangs = Processes::now().iter().find(|p| p.args.last() == Some(&file)).map(|p| p.pid)?;
        read(format!("/proc/{hangs}/stat")).contains(" D ").then(|| {
            fs::write(cgroup.join("cgroup.procs"), hangs.to_string()).expect("move a process");
        })
    });
    host::kill(&await_process(&task.id, Role::Shim));
    // containerd calls `delete`, which gives up before containerd does.
    until("delete to give up", Duration::from_secs(30), || watcher(&task.id));
    until("the task's end", Duration::from_secs(30), || lab.status(&task.id).is_none().then_some(()));
    assert!(cgroup.exists() && state.exists(), "the writer held nothing up");
    frozen.thaw();
    until("the rest to be taken away", Duration::from_secs(15), || (!cgroup.exists() && !state.exists()).then_some(()));
    drop(writer);
    lab.remove_clients_fifos();
    Ok(())
}

fn a_daemon_that_hangs_is_ended(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    let dir = lab.dir();
    // A file that it waits for, for ever.
    let config = dir.path().join("config.toml");
    Program::new("mkfifo").args([&config]).run().ok();
    let id = lab.id("hangs");
    let path = config.display().to_string();
    let run = lab.ctr_run(&["--rm", "--runtime-config-path", &path, BUSYBOX, &id, "true"]).deadline(200).run();
    run.fails_with(&["daemon was not ready after 90 s"]);
    assert!(find(&id, Role::Shim).is_none());
    lab.ctr(&["containers", "rm", &id]).run();
    // The id is free.
    lab.ctr_run(&["--rm", BUSYBOX, &id, "true"]).run().ok();
    Ok(())
}
