//! kill -9 of each part, while a container runs and while it is made: its end is told, and nothing is left.

use std::{
    fs, thread,
    time::{Duration, Instant},
};

use vz_suite::{
    Lab, Verdict,
    container::{Container, Task},
    events::Recorder,
    host::{self, Role, await_process, find},
    lab::{BUSYBOX, DEBIAN},
    poll::{patiently, try_until, until},
    tests,
};

tests![
    the_shim_is_killed_while_running,
    the_vmm_is_killed_while_running,
    qemu_is_killed_while_running,
    the_anchor_is_killed_while_running,
    the_agent_is_killed_while_running,
    the_shim_is_killed_during_create,
    the_vmm_is_killed_during_create,
    qemu_is_killed_during_create,
    the_shim_of_nerdctls_container_is_killed,
    the_vmm_of_nerdctls_container_is_killed,
    containerd_is_killed_while_running,
    an_end_without_containerd_is_told_afterwards,
    containerd_is_killed_during_create,
    containerd_and_the_shim_are_killed,
];

/// Kills a part of a running container: its end is told once, with 137, and it can be deleted.
fn killed_while_running(lab: &Lab, role: Role) -> Verdict {
    lab.vz_only()?;
    let events = Recorder::start(lab);
    let task = Task::start(lab, "killed", &[], BUSYBOX, &["sleep", "1000"]);
    let client = task.exec(&["sh", "-c", "echo up; sleep 999"]).start();
    client.expect("up");
    let begun = Instant::now();
    host::kill(&await_process(&task.id, role));
    let exit = events.expect_where(&task.id, "/tasks/exit", |event| event.text("id") == task.id);
    println!("  {role:?} killed: exit told after {} ms", begun.elapsed().as_millis());
    assert_eq!(exit.number("exit_status"), 137);
    // Its clients come back.
    assert_ne!(task.wait().code(), 0);
    assert_ne!(client.wait().code(), 0);
    lab.ctr(&["task", "rm", "-f", &task.id]).run();
    lab.ctr(&["containers", "rm", &task.id]).run().ok();
    let exits = events.of(&task.id).into_iter().filter(|e| e.topic == "/tasks/exit" && e.text("id") == task.id);
    assert_eq!(exits.count(), 1);
    lab.remove_clients_fifos();
    Ok(())
}

fn the_shim_is_killed_while_running(lab: &Lab) -> Verdict {
    killed_while_running(lab, Role::Shim)
}

fn the_vmm_is_killed_while_running(lab: &Lab) -> Verdict {
    killed_while_running(lab, Role::Vmm)
}

fn qemu_is_killed_while_running(lab: &Lab) -> Verdict {
    needs_qemu(lab)?;
    killed_while_running(lab, Role::Qemu)
}

pub(crate) fn needs_qemu(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    let task = Task::start(lab, "qemu", &[], BUSYBOX, &["sleep", "1000"]);
    match find(&task.id, Role::Qemu) {
        Some(_) => Ok(()),
        None => Err(vz_suite::Skip("the machine is not QEMU".into())),
    }
}

fn the_anchor_is_killed_while_running(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    let task = Task::start(lab, "anchor", &[], BUSYBOX, &["sleep", "1000"]);
    host::kill(&await_process(&task.id, Role::Anchor));
    // Whether it goes on or ends: it can be asked, ended and deleted.
    if lab.status(&task.id).as_deref() == Some("RUNNING") {
        task.exec(&["true"]).run().ok();
        task.kill("SIGKILL");
    }
    task.wait().exits(137);
    Ok(())
}

fn the_agent_is_killed_while_running(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    // In the guest's first pid namespace its agent can be seen and killed: pid 1 is its init, the server a child of
    // that.
    let flags = ["--pid", "host", "--cap-add", "ALL"];
    let container = Container::start(lab, "agent", &[&flags[..], &[DEBIAN, "sh", "-c", "sleep 1000; exit 5"]].concat());
    let server = "ps -e -o pid=,ppid=,comm= | awk '$2 == 1 && $3 == init { print $1 }' init=\"$(ps -o comm= -p 1)\"";
    let before = container.sh(server);
    assert_eq!(before.lines().count(), 1, "the agent's server: {before:?}; {}", container.sh("ps -e -o pid,ppid,args"));
    // The exec that does it loses its own connection, whatever it is told.
    container.exec(&["kill", "-9", &before]).run();
    // The container has not noticed, and a new server takes over.
    let after = try_until(Duration::from_secs(30), || {
        let output = container.exec(&["sh", "-c", server]).run();
        (output.code() == 0 && !output.text().is_empty() && output.text() != before).then(|| output.text())
    });
    assert!(after.is_some(), "no exec works after the agent's server was killed");
    // Its init ends with this, and takes the exec that did it along, whatever that is told.
    container.exec(&["pkill", "-x", "sleep"]).run();
    assert_eq!(container.nerdctl("wait").ok(), "5");
    Ok(())
}

/// Kills a part of a container in the making, at several moments: the client is told, and nothing is left.
fn killed_during_create(lab: &Lab, role: Role) -> Verdict {
    lab.vz_only()?;
    for delay in [0, 30, 150, 400, 800] {
        let task = Task::begin(lab, "making", &[], BUSYBOX, &["sleep", "1000"]);
        let process = await_process(&task.id, role);
        // Not to wait for anything: to be at another point of the creation each time.
        thread::sleep(patiently(Duration::from_millis(delay)));
        host::kill(&process);
        assert_ne!(task.wait().code(), 0, "killed after {delay} ms");
        lab.ctr(&["task", "rm", "-f", &task.id]).run();
        lab.ctr(&["containers", "rm", &task.id]).run().ok();
        lab.remove_clients_fifos();
    }
    Ok(())
}

fn the_shim_is_killed_during_create(lab: &Lab) -> Verdict {
    killed_during_create(lab, Role::Shim)
}

fn the_vmm_is_killed_during_create(lab: &Lab) -> Verdict {
    killed_during_create(lab, Role::Vmm)
}

fn qemu_is_killed_during_create(lab: &Lab) -> Verdict {
    needs_qemu(lab)?;
    killed_during_create(lab, Role::Qemu)
}

fn killed_under_nerdctl(lab: &Lab, role: Role) -> Verdict {
    lab.vz_only()?;
    let events = Recorder::start(lab);
    let container = Container::start(lab, "killed", &[BUSYBOX, "sleep", "1000"]);
    host::kill(&await_process(&container.id, role));
    // For a dead shim containerd cleans up itself, in the background: it has the container's hooks run, which write to
    // nerdctl's directory, and tells of the deletion last.
    let topic = if matches!(role, Role::Shim) { "/tasks/delete" } else { "/tasks/exit" };
    let told = |times: usize| {
        until("the end to be told", Duration::from_secs(30), || {
            let told = events.of(&container.id).into_iter().filter(|event| event.topic == topic);
            (told.count() >= times).then_some(())
        });
    };
    told(1);
    // It starts again as if nothing had been; "already exists" until containerd has forgotten the dead shim, which it
    // does after it has told of the deletion.
    until("the container to start again", Duration::from_secs(20), || {
        (container.nerdctl("start").code() == 0).then_some(())
    });
    assert_eq!(container.sh("echo well"), "well");
    host::kill(&await_process(&container.id, role));
    told(2);
    container.remove();
    Ok(())
}

fn the_shim_of_nerdctls_container_is_killed(lab: &Lab) -> Verdict {
    killed_under_nerdctl(lab, Role::Shim)
}

fn the_vmm_of_nerdctls_container_is_killed(lab: &Lab) -> Verdict {
    killed_under_nerdctl(lab, Role::Vmm)
}

fn containerd_is_killed_while_running(lab: &Lab) -> Verdict {
    let container =
        Container::start(lab, "restart", &[BUSYBOX, "sh", "-c", "trap 'exit 23' TERM; while :; do sleep 0.05; done"]);
    let shim = find(&container.id, Role::Shim).map(|process| process.pid);
    container.sh("echo before >/before");
    host::kill(&lab.containerd());
    lab.start_containerd();
    assert_eq!(lab.status(&container.id).as_deref(), Some("RUNNING"));
    assert_eq!(find(&container.id, Role::Shim).map(|process| process.pid), shim);
    assert_eq!(container.sh("cat /before"), "before");
    let events = Recorder::start(lab);
    lab.ctr(&["task", "kill", "-s", "SIGTERM", &container.id]).run().ok();
    let exit = events.expect(&container.id, "/tasks/exit");
    assert_eq!(exit.number("exit_status"), 23);
    lab.await_status(&container.id, "STOPPED");
    assert_eq!(container.nerdctl("wait").ok(), "23");
    Ok(())
}

fn an_end_without_containerd_is_told_afterwards(lab: &Lab) -> Verdict {
    // runc's shim does not keep this promise.
    lab.vz_only()?;
    let dir = lab.dir();
    let volume = format!("{}:/v", dir.path().display());
    let script = "until test -e /v/go; do sleep 0.05; done; echo x >/v/done; exit 9";
    let container = Container::start(lab, "meanwhile", &["-v", &volume, BUSYBOX, "sh", "-c", script]);
    host::kill(&lab.containerd());
    fs::write(dir.path().join("go"), "").expect("write a file");
    until("the container's end", Duration::from_secs(20), || dir.path().join("done").exists().then_some(()));
    lab.start_containerd();
    lab.await_status(&container.id, "STOPPED");
    assert_eq!(container.nerdctl("wait").ok(), "9");
    container.remove();
    Ok(())
}

fn containerd_is_killed_during_create(lab: &Lab) -> Verdict {
    // runc's shim does not keep this promise.
    lab.vz_only()?;
    for delay in [0, 300, 900] {
        let task = Task::begin(lab, "making", &[], BUSYBOX, &["sleep", "1000"]);
        until("the shim", Duration::from_secs(20), || find(&task.id, Role::Shim));
        // Not to wait for anything: to be at another point of the creation each time.
        thread::sleep(patiently(Duration::from_millis(delay)));
        host::kill(&lab.containerd());
        task.wait();
        lab.start_containerd();
        // There, or not: it can be removed.
        lab.ctr(&["task", "rm", "-f", &task.id]).run();
        lab.ctr(&["containers", "rm", &task.id]).run().ok();
        lab.remove_clients_fifos();
    }
    Ok(())
}

fn containerd_and_the_shim_are_killed(lab: &Lab) -> Verdict {
    // runc's shim does not keep this promise.
    lab.vz_only()?;
    let container = Container::start(lab, "both", &[BUSYBOX, "sleep", "1000"]);
    let shim = await_process(&container.id, Role::Shim);
    host::kill(&lab.containerd());
    host::kill(&shim);
    lab.start_containerd();
    // containerd finds a dead shim, and has its delete clean up.
    until("containerd to notice", Duration::from_secs(30), || {
        (lab.status(&container.id).as_deref() != Some("RUNNING")).then_some(())
    });
    container.remove();
    Ok(())
}
