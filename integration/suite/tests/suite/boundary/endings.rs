//! What always ends, with a good guest: stopped processes, logging programs, deletions that meet.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::Path,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use vz_suite::{
    Lab, Verdict,
    container::{Container, Task},
    events::{Recorder, story},
    host::{Role, await_process, find},
    lab::BUSYBOX,
    poll::{patiently, until},
    tests,
};

use crate::containers::crash::needs_qemu;

tests![
    a_stopped_vmm_is_ended,
    a_stopped_qemu_is_ended,
    stopped_vcpus_are_ended,
    a_vmm_that_is_stopped_during_a_creation_is_ended,
    a_logging_program_that_is_never_ready_fails_its_container_only,
    a_logging_program_that_does_not_end_is_ended,
    deletions_that_meet_are_one,
    an_exec_that_is_deleted_while_it_starts_leaves_nothing,
    a_spec_that_is_too_large_is_refused_by_its_size,
];

/// How long `rm -f` may take.
const REMOVAL: Duration = Duration::from_secs(10);

fn stop(pid: i32) {
    let pid = Pid::from_raw(pid).expect("a pid is positive");
    kill_process(pid, Signal::STOP).expect("stop a process");
}

/// Stops something of a running container, under ctr and under nerdctl: each is removed in time, its end told once and
/// last, and another container does not notice.
fn ends_although(lab: &Lab, stopped: impl Fn(&str)) -> Verdict {
    lab.vz_only()?;
    let other = Task::start(lab, "other", &[], BUSYBOX, &["sleep", "1000"]);
    let events = Recorder::start(lab);
    let task = Task::start(lab, "stopped", &[], BUSYBOX, &["sleep", "1000"]);
    let client = task.exec(&["sh", "-c", "echo up; sleep 999"]).start();
    client.expect("up");
    stopped(&task.id);
    let begun = Instant::now();
    lab.ctr(&["task", "rm", "-f", &task.id]).run();
    let by_ctr = begun.elapsed();
    lab.ctr(&["containers", "rm", &task.id]).run().ok();
    // Somebody else has deleted what they wait for.
    assert_ne!(task.wait().code(), 0);
    assert_ne!(client.wait().code(), 0);
    events.expect(&task.id, "/tasks/delete");
    let told = story(&events.of(&task.id));
    let exec = told.iter().position(|topic| topic.starts_with("exit ")).expect("the exec's end is told");
    assert_eq!((told.len() - exec, &told[exec + 1..]), (3, &["exit".to_owned(), "delete".to_owned()][..]), "{told:?}");

    let container = Container::start(lab, "stopped", &[BUSYBOX, "sleep", "1000"]);
    stopped(&container.id);
    let begun = Instant::now();
    container.remove();
    let by_nerdctl = begun.elapsed();
    println!("  ctr task rm -f {:.1} s, nerdctl rm -f {:.1} s", by_ctr.as_secs_f64(), by_nerdctl.as_secs_f64());
    assert!(by_ctr.max(by_nerdctl) < patiently(REMOVAL), "{by_ctr:?}, {by_nerdctl:?}");
    for id in [&task.id, &container.id] {
        for role in [Role::Shim, Role::Vmm, Role::Qemu, Role::Anchor] {
            until(&format!("the end of {role:?}"), Duration::from_secs(5), || find(id, role).is_none().then_some(()));
        }
        assert!(!Path::new("/run/vz/default").join(id).exists());
    }
    assert_eq!(other.exec(&["echo", "alive"]).run().ok(), "alive");
    lab.remove_clients_fifos();
    Ok(())
}

fn a_stopped_vmm_is_ended(lab: &Lab) -> Verdict {
    ends_although(lab, |id| stop(await_process(id, Role::Vmm).pid))
}

fn a_stopped_qemu_is_ended(lab: &Lab) -> Verdict {
    needs_qemu(lab)?;
    ends_although(lab, |id| stop(await_process(id, Role::Qemu).pid))
}

/// All threads but the first one of the process that has the vCPUs. The kernel stops the whole process with them.
fn stopped_vcpus_are_ended(lab: &Lab) -> Verdict {
    ends_although(lab, |id| {
        let pid = find(id, Role::Qemu).unwrap_or_else(|| await_process(id, Role::Vmm)).pid;
        for entry in fs::read_dir(format!("/proc/{pid}/task")).expect("list threads").flatten() {
            let tid: i32 = entry.file_name().to_string_lossy().parse().expect("a thread's id is a number");
            if tid != pid {
                // kill(2) takes the id of a thread for that of its process.
                stop(tid);
            }
        }
    })
}

fn a_vmm_that_is_stopped_during_a_creation_is_ended(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    // The shim's own deadline for a vmm that says nothing is 15 seconds above this.
    let config = lab.configure("[timeouts]\nboot_s = 5\n");
    let task = Task::begin(lab, "making", &[], BUSYBOX, &["sleep", "1000"]);
    stop(await_process(&task.id, Role::Vmm).pid);
    let begun = Instant::now();
    let said = task.wait();
    println!("  refused after {:.1} s", begun.elapsed().as_secs_f64());
    said.fails_with(&["boot", "not connected"]);
    assert!(begun.elapsed() < patiently(Duration::from_secs(40)), "{said}");
    drop(config);
    lab.ctr(&["containers", "rm", &task.id]).run();
    lab.remove_clients_fifos();
    Ok(())
}

/// A logging program that is a shell's script.
pub(crate) fn logger(dir: &Path, script: &str) -> String {
    let path = dir.join("logger");
    fs::write(&path, format!("#!/bin/sh\n{script}\n")).expect("write a program");
    fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).expect("make it one");
    format!("binary://{}", path.display())
}

fn a_logging_program_that_is_never_ready_fails_its_container_only(lab: &Lab) -> Verdict {
    let other = Task::start(lab, "other", &[], BUSYBOX, &["sleep", "1000"]);
    let dir = lab.dir();
    let uri = logger(dir.path(), "echo $$ >\"$0.pid\"; exec sleep 1000");
    let id = lab.id("unready");
    let client = lab.ctr_run(&["-d", "--log-uri", &uri, BUSYBOX, &id, "true"]).start();
    let pid = until("the logging program", Duration::from_secs(60), || {
        fs::read_to_string(dir.path().join("logger.pid")).ok()?.trim().parse::<i32>().ok()
    });
    // Its shim serves others meanwhile.
    if lab.is_vz() {
        let shim = await_process(&id, Role::Shim);
        let begun = Instant::now();
        let socket = shim.flag("-socket").expect("a shim has its socket").trim_start_matches("unix://").to_owned();
        assert!(serves(&socket, &id), "the shim does not answer");
        println!("  the shim answers after {} ms", begun.elapsed().as_millis());
        assert!(begun.elapsed() < patiently(Duration::from_secs(3)));
    }
    let said = client.wait();
    said.fails_with(&["logging program"]);
    assert!(!Path::new(&format!("/proc/{pid}")).exists(), "the logging program runs still");
    lab.ctr(&["containers", "rm", &id]).run();
    assert_eq!(other.exec(&["echo", "alive"]).run().ok(), "alive");
    Ok(())
}

/// Whether a shim answers Connect, which asks nothing of its guest.
fn serves(socket: &str, id: &str) -> bool {
    use std::io::{Read, Write};
    // ttrpc: length, stream, type (request), flags; then Request { service = 1, method = 2, payload = 3 }.
    let field = |number: u8, bytes: &[u8]| {
        let length = u8::try_from(bytes.len()).expect("a short field");
        [&[number << 3 | 2, length], bytes].concat()
    };
    let request =
        [field(1, b"containerd.task.v3.Task"), field(2, b"Connect"), field(3, &field(1, id.as_bytes()))].concat();
    let length = u32::try_from(request.len()).expect("a short request");
    let message = [&length.to_be_bytes()[..], &1_u32.to_be_bytes(), &[1, 0], &request].concat();
    let mut stream = std::os::unix::net::UnixStream::connect(socket).expect("connect to a shim");
    stream.set_read_timeout(Some(patiently(Duration::from_secs(5)))).expect("set a deadline");
    stream.write_all(&message).expect("ask a shim");
    stream.read_exact(&mut [0; 10]).is_ok()
}

fn a_logging_program_that_does_not_end_is_ended(lab: &Lab) -> Verdict {
    // runc's shim gives it 12 seconds more.
    lab.vz_only()?;
    let dir = lab.dir();
    let uri = logger(dir.path(), "trap '' TERM; exec 5>&-; echo $$ >\"$0.pid\"; while :; do sleep 0.1; done");
    let id = lab.id("endless");
    lab.ctr_run(&["-d", "--log-uri", &uri, BUSYBOX, &id, "sleep", "1000"]).run().ok();
    let pid = fs::read_to_string(dir.path().join("logger.pid")).expect("it has written its pid").trim().to_owned();
    let begun = Instant::now();
    lab.ctr(&["task", "rm", "-f", &id]).run();
    println!("  removed after {:.1} s", begun.elapsed().as_secs_f64());
    assert!(begun.elapsed() < patiently(REMOVAL + Duration::from_secs(2)), "{:?}", begun.elapsed());
    assert_eq!(lab.status(&id), None);
    assert!(!Path::new(&format!("/proc/{pid}")).exists(), "the logging program runs still");
    lab.ctr(&["containers", "rm", &id]).run().ok();
    Ok(())
}

fn deletions_that_meet_are_one(lab: &Lab) -> Verdict {
    let dir = lab.dir();
    let rootfs = dir.path().join("rootfs");
    fs::create_dir(&rootfs).expect("make a directory");
    lab.ctr(&["images", "mount", "--rw", BUSYBOX, &rootfs.display().to_string()]).run().ok();
    let id = lab.id("twice");
    let ran = dir.path().join("ran");
    let mut spec: Value = serde_json::from_str(&lab.ctr(&["oci", "spec"]).run().ok()).expect("a spec is JSON");
    spec["root"] = json!({ "path": rootfs });
    spec["process"]["args"] = json!(["sleep", "1000"]);
    spec["process"]["terminal"] = json!(false);
    // Long enough for all deletions to meet.
    let script = format!("echo ran >>{}; sleep 1", ran.display());
    let hook = json!({ "path": "/bin/sh", "args": ["hook", "-c", script], "env": ["PATH=/usr/bin:/bin"] });
    spec["hooks"] = json!({ "poststop": [hook] });
    spec["linux"]["cgroupsPath"] = json!(format!("/default/{id}"));
    let config = dir.path().join("config.json");
    fs::write(&config, spec.to_string()).expect("write a spec");
    let events = Recorder::start(lab);
    lab.ctr_run(&["-d", "--config", &config.display().to_string(), &id]).run().ok();
    lab.ctr(&["task", "kill", "-s", "SIGKILL", &id]).run().ok();
    lab.await_status(&id, "STOPPED");
    let deletions: Vec<_> = (0..4).map(|_| lab.ctr(&["task", "rm", &id]).start()).collect();
    let done = deletions.into_iter().map(|deletion| deletion.wait().code()).filter(|code| *code == 0).count();
    assert!(done >= 1, "no deletion succeeded");
    events.expect(&id, "/tasks/delete");
    lab.ctr(&["containers", "rm", &id]).run().ok();
    lab.ctr(&["images", "unmount", "--rm", &rootfs.display().to_string()]).run().ok();
    assert_eq!(fs::read_to_string(&ran).expect("the hook has run"), "ran\n");
    if lab.is_vz() {
        let told = story(&events.of(&id));
        assert_eq!(told.iter().filter(|topic| *topic == "delete").count(), 1, "{told:?}");
    }
    Ok(())
}

fn an_exec_that_is_deleted_while_it_starts_leaves_nothing(lab: &Lab) -> Verdict {
    let task = Task::start(lab, "raced", &[], BUSYBOX, &["sleep", "1000"]);
    for n in 0..lab.times(6, 60) {
        let exec = format!("vzt-raced{n}");
        let marker = 3_000 + n;
        let args = ["task", "exec", "-d", "--exec-id", &exec, &task.id, "sleep", &marker.to_string()];
        let start = lab.ctr(&args).start();
        let remove = ["task", "rm", "--exec-id", &exec, &task.id];
        let removed = until("a moment to delete it in", Duration::from_secs(30), || {
            let output = lab.ctr(&remove).run();
            // Not added yet, else one way or the other.
            (!output.errors().contains("not found")).then(|| output.code() == 0)
        });
        let started = start.wait().code() == 0;
        let runs = || {
            let processes = task.exec(&["ps", "-o", "args"]).run().ok();
            processes.lines().any(|line| line.trim() == format!("sleep {marker}"))
        };
        println!("  started: {started}, removed: {removed}");
        if removed {
            assert!(!runs(), "exec {exec} was deleted and runs");
        } else {
            assert!(started, "exec {exec} was neither deleted nor started");
            lab.ctr(&["task", "kill", "--exec-id", &exec, "-s", "SIGKILL", &task.id]).run().ok();
            // ctr ends with the status of what it has deleted.
            lab.ctr(&remove).run().exits(137);
            assert!(!runs(), "exec {exec} was killed and deleted, and runs");
        }
    }
    task.kill("SIGKILL");
    task.wait();
    // A client that does not wait for its exec leaves these to nobody.
    lab.remove_clients_fifos();
    Ok(())
}

fn a_spec_that_is_too_large_is_refused_by_its_size(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    let dir = lab.dir();
    let file = dir.path().join("env");
    let line = |n: usize| format!("LONG_{n}={}\n", "x".repeat(50_000));
    fs::write(&file, (0..100).map(line).collect::<String>()).expect("write a file");
    let id = lab.id("large");
    let said = lab.ctr_run(&["--rm", "--env-file", &file.display().to_string(), BUSYBOX, &id, "true"]).run();
    said.fails_with(&["create: the request has", "at most"]);
    lab.ctr(&["containers", "rm", &id]).run();
    Ok(())
}
