//! From creation to deletion, as clients go about it.

use std::{fs, path::PathBuf};

use vz_suite::{
    Lab, Verdict,
    container::{Container, Task},
    host::{Processes, Role, find},
    lab::{BUSYBOX, DEBIAN, LIMITS},
    poll::until,
    pty::Session,
    tests,
};

tests![
    stop_lets_a_handler_choose_the_exit_code,
    stop_kills_what_does_not_listen,
    signals_reach_their_handler,
    kill_all_reaches_every_process,
    several_clients_wait_for_one_end,
    a_running_task_is_not_deleted,
    lists_and_states_are_true,
    the_pid_on_the_host_leads_to_the_rootfs,
    logs_are_kept_and_followed,
    a_detached_terminal_is_attached_again,
    a_container_starts_again,
    what_is_killed_can_be_started_at_once,
    containers_live_side_by_side,
    what_is_not_offered_says_so,
    limits_change_while_a_container_runs,
    a_killed_client_can_be_cleaned_up_after,
];

/// Counts until told to end, and says which way.
const HANDLER: &str = "trap 'echo stopping; exit 23' TERM; trap 'echo got-usr1' USR1; trap 'echo got-hup' HUP; \
                       echo ready; while :; do sleep 0.05; done";

#[track_caller]
fn await_logs(container: &Container<'_>, wanted: &str) {
    until(&format!("{wanted:?} in the logs"), std::time::Duration::from_secs(30), || {
        container.logs().contains(wanted).then_some(())
    });
}

fn stop_lets_a_handler_choose_the_exit_code(lab: &Lab) -> Verdict {
    let container = Container::start(lab, "stop", &[BUSYBOX, "sh", "-c", HANDLER]);
    await_logs(&container, "ready");
    lab.nerdctl(&["stop", "-t", "30", &container.name]).run().ok();
    assert_eq!(container.inspect(".State.ExitCode"), "23");
    assert_eq!(container.inspect(".State.Status"), "exited");
    await_logs(&container, "stopping");
    Ok(())
}

fn stop_kills_what_does_not_listen(lab: &Lab) -> Verdict {
    let container = Container::start(lab, "deaf", &[BUSYBOX, "sleep", "1000"]);
    lab.nerdctl(&["stop", "-t", "1", &container.name]).run().ok();
    assert_eq!(container.inspect(".State.ExitCode"), "137");
    Ok(())
}

fn signals_reach_their_handler(lab: &Lab) -> Verdict {
    let container = Container::start(lab, "signals", &[BUSYBOX, "sh", "-c", HANDLER]);
    await_logs(&container, "ready");
    for (signal, said) in [("USR1", "got-usr1"), ("HUP", "got-hup")] {
        lab.nerdctl(&["kill", "-s", signal, &container.name]).run().ok();
        await_logs(&container, said);
    }
    lab.nerdctl(&["kill", &container.name]).run().ok();
    assert_eq!(container.nerdctl("wait").ok(), "137");
    // Gone is gone.
    lab.nerdctl(&["kill", &container.name]).run();
    lab.ctr(&["task", "kill", &container.id]).run().fails();
    Ok(())
}

fn kill_all_reaches_every_process(lab: &Lab) -> Verdict {
    let task = Task::start(
        lab,
        "all",
        &[],
        BUSYBOX,
        &["sh", "-c", "sleep 998 & trap 'echo init' TERM; while :; do wait; done"],
    );
    let client = task.exec(&["sh", "-c", "echo up; exec sleep 997"]).start();
    client.expect("up");
    lab.ctr(&["task", "kill", "--all", "-s", "SIGTERM", &task.id]).run().ok();
    client.wait().exits(143);
    task.expect("init");
    until("the init's child to end", std::time::Duration::from_secs(10), || {
        // The init's own arguments have it too, but not at their end.
        (!task.exec(&["ps"]).run().ok().lines().any(|line| line.ends_with("sleep 998"))).then_some(())
    });
    lab.ctr(&["task", "kill", "--all", "-s", "SIGKILL", &task.id]).run().ok();
    task.wait().exits(137);
    Ok(())
}

fn several_clients_wait_for_one_end(lab: &Lab) -> Verdict {
    let container = Container::start(lab, "wait", &[BUSYBOX, "sh", "-c", HANDLER]);
    await_logs(&container, "ready");
    let waiting: Vec<_> = (0..4).map(|_| lab.nerdctl(&["wait", &container.name]).start()).collect();
    lab.nerdctl(&["kill", "-s", "TERM", &container.name]).run().ok();
    for client in waiting {
        assert_eq!(client.wait().ok(), "23");
    }
    // And one that comes late.
    assert_eq!(container.nerdctl("wait").ok(), "23");
    Ok(())
}

fn a_running_task_is_not_deleted(lab: &Lab) -> Verdict {
    let task = Task::start(lab, "running", &[], BUSYBOX, &["sleep", "1000"]);
    task.ctr("rm").run().fails_with(&["must be stopped"]);
    assert_eq!(lab.status(&task.id).as_deref(), Some("RUNNING"));
    lab.ctr(&["containers", "rm", &task.id]).run().fails();
    task.exec(&["true"]).run().ok();
    task.ctr("start").run().fails();
    Ok(())
}

fn lists_and_states_are_true(lab: &Lab) -> Verdict {
    let container = Container::start(lab, "lists", &[BUSYBOX, "sh", "-c", HANDLER]);
    await_logs(&container, "ready");
    assert_eq!(lab.status(&container.id).as_deref(), Some("RUNNING"));
    let pid = container.inspect(".State.Pid");
    let listed = lab.ctr(&["task", "ls"]).run().ok();
    assert!(listed.lines().any(|line| line.contains(&container.id) && line.contains(&pid)), "{listed}");
    let processes = lab.ctr(&["task", "ps", &container.id]).run().ok();
    assert!(processes.lines().skip(1).any(|line| line.split_whitespace().next() == Some(&pid)), "{processes}");
    let shown = lab.nerdctl(&["ps", "--filter", &format!("name={}", container.name)]).run().ok();
    assert!(shown.contains("Up"), "{shown}");
    assert_eq!(container.inspect(".State.Running"), "true");
    container.nerdctl("stop").ok();
    let shown = lab.nerdctl(&["ps", "-a", "--filter", &format!("name={}", container.name)]).run().ok();
    assert!(shown.contains("Exited (23)"), "{shown}");
    // What is not there is not found, and says so.
    lab.ctr(&["task", "kill", "vzt-no-such-task"]).run().fails_with(&["not found"]);
    Ok(())
}

fn the_pid_on_the_host_leads_to_the_rootfs(lab: &Lab) -> Verdict {
    let container = Container::start(lab, "pid", &[BUSYBOX, "sh", "-c", "echo here >/here; exec sleep 1000"]);
    let pid: i32 = container.inspect(".State.Pid").parse().expect("a pid is a number");
    let root = PathBuf::from(format!("/proc/{pid}/root"));
    // The shell makes the file first, and writes it then.
    until("the container's file", std::time::Duration::from_secs(10), || {
        (fs::read_to_string(root.join("here")).ok()? == "here\n").then_some(())
    });
    let net = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/net")).expect("read a namespace's name");
    assert_ne!(net(&pid.to_string()), net("self"), "the network namespace is the host's");
    container.nerdctl("kill").ok();
    container.nerdctl("wait").ok();
    container.remove();
    assert!(Processes::now().get(pid).is_none());
    Ok(())
}

fn logs_are_kept_and_followed(lab: &Lab) -> Verdict {
    let dir = lab.dir();
    let volume = format!("{}:/v", dir.path().display());
    let script = "echo one; echo two >&2; until test -e /v/go; do usleep 20000; done; echo three; seq 1 2000; exit 3";
    let container = Container::start(lab, "logs", &["-v", &volume, BUSYBOX, "sh", "-c", script]);
    await_logs(&container, "one");
    let follow = lab.nerdctl(&["logs", "-f", &container.name]).start();
    follow.expect("one");
    fs::write(dir.path().join("go"), "").expect("write a file");
    assert_eq!(container.nerdctl("wait").ok(), "3");
    let wanted = format!("one\nthree\n{}", (1..=2000).map(|n| n.to_string()).collect::<Vec<_>>().join("\n"));
    let logs = container.nerdctl("logs");
    assert!(logs.ok() == wanted, "{} lines of log instead of {}", logs.text().lines().count(), wanted.lines().count());
    assert_eq!(logs.errors(), "two");
    let followed = follow.wait().ok();
    // The log is whole, see above. What nerdctl shows of it while it grows can lack lines: it decodes anew from
    // wherever the file ended, in the middle of an entry too, and stops when it is told of the exit. What it shows is
    // in order.
    let mut rest = wanted.lines();
    let strange = followed.lines().find(|line| !rest.any(|wanted| wanted == *line));
    assert!(strange.is_none(), "followed what is not in the log, or not in its order: {strange:?}");
    Ok(())
}

fn a_detached_terminal_is_attached_again(lab: &Lab) -> Verdict {
    let name = lab.id("attach");
    let args = ["run", "-it", "--name", &name, "--runtime", lab.runtime(), "--net", "none", BUSYBOX, "sh"];
    let mut first = Session::start("nerdctl", &args, lab.env(), (24, 80));
    first.type_in("kept=value; echo fi''rst\n");
    first.expect("first");
    first.type_in("\u{10}\u{11}");
    let (code, screen) = first.wait();
    assert_eq!(code, 0, "{screen:?}");
    let mut second = Session::start("nerdctl", &["attach", &name], lab.env(), (24, 80));
    second.type_in("echo again $kept\n");
    second.expect("again value");
    second.type_in("exit 3\n");
    let (_, screen) = second.wait();
    assert_eq!(lab.nerdctl(&["wait", &name]).run().ok(), "3", "{screen:?}");
    lab.nerdctl(&["rm", &name]).run().ok();
    Ok(())
}

fn a_container_starts_again(lab: &Lab) -> Verdict {
    let script = "n=$(cat /n 2>/dev/null || echo 0); n=$((n + 1)); echo $n >/n; echo run $n; exit $n";
    let container = Container::start(lab, "again", &[BUSYBOX, "sh", "-c", script]);
    for n in 1..=3 {
        assert_eq!(container.nerdctl("wait").ok(), n.to_string());
        await_logs(&container, &format!("run {n}"));
        if n < 3 {
            container.nerdctl(if n == 1 { "start" } else { "restart" }).ok();
        }
    }
    assert_eq!(container.logs(), "run 1\nrun 2\nrun 3");
    Ok(())
}

fn containers_live_side_by_side(lab: &Lab) -> Verdict {
    let names: Vec<_> = (0..4).map(|n| lab.id(&format!("side{n}"))).collect();
    let clients: Vec<_> =
        names.iter().map(|name| lab.nerdctl_run(&["-d", "--name", name, BUSYBOX, "sleep", "1000"]).start()).collect();
    for client in clients {
        client.wait().ok();
    }
    for name in &names {
        lab.nerdctl(&["exec", name, "sh", "-c", &format!("hostname; echo {name} >/mine")]).run().ok();
    }
    for name in &names {
        assert_eq!(&lab.nerdctl(&["exec", name, "cat", "/mine"]).run().ok(), name);
    }
    let mut args = vec!["rm", "-f"];
    args.extend(names.iter().map(String::as_str));
    lab.nerdctl(&args).run().ok();
    Ok(())
}

fn what_is_not_offered_says_so(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    let container = Container::start(lab, "offered", &[BUSYBOX, "sleep", "1000"]);
    // A checkpoint begins with a pause.
    for action in ["pause", "resume", "checkpoint"] {
        lab.ctr(&["task", action, &container.id]).run().fails_with(&["not supported by vz"]);
    }
    // None of which does any harm.
    assert_eq!(container.sh("echo well"), "well");
    Ok(())
}

fn limits_change_while_a_container_runs(lab: &Lab) -> Verdict {
    let container = Container::start(lab, "limits", &["--memory", "200m", "--cpus", "1", BUSYBOX, "sleep", "1000"]);
    let figures = || container.sh(LIMITS);
    let update = |args: &[&str]| {
        let args: Vec<_> = ["update"].iter().chain(args).copied().chain([container.name.as_str()]).collect();
        lab.nerdctl(&args).run()
    };
    assert_eq!(figures(), format!("{}\n100000 100000", 200 << 20));
    // Not `--cpus`, which this nerdctl's update leaves out.
    update(&["--memory", "100m", "--cpu-quota", "50000", "--cpu-period", "100000"]).ok();
    assert_eq!(figures(), format!("{}\n50000 100000", 100 << 20));
    update(&["--memory", "150m"]).ok();
    assert_eq!(figures(), format!("{}\n50000 100000", 150 << 20));
    if lab.is_vz() {
        update(&["--memory", "64g"]).fails_with(&["memory limit of 65536 MiB", "vm.memory_mib"]);
        assert_eq!(figures(), format!("{}\n50000 100000", 150 << 20));
    }
    Ok(())
}

fn what_is_killed_can_be_started_at_once(lab: &Lab) -> Verdict {
    let container = Container::start(lab, "again", &[BUSYBOX, "sleep", "1000"]);
    for _ in 0..lab.times(4, 30) {
        // Nobody waits in between: nerdctl leaves alone what it meets running, and that would be on its way to die.
        lab.nerdctl(&["kill", &container.name]).run().ok();
        lab.nerdctl(&["start", &container.name]).run().ok();
        assert_eq!(container.sh("echo well"), "well");
    }
    let task = Task::start(lab, "asked", &[], BUSYBOX, &["sleep", "1000"]);
    task.kill("SIGKILL");
    // Its client may have taken it away by now.
    let status = lab.status(&task.id);
    assert!(matches!(status.as_deref(), None | Some("STOPPED")), "{status:?}");
    Ok(())
}

fn a_killed_client_can_be_cleaned_up_after(lab: &Lab) -> Verdict {
    let task = Task::start(lab, "client", &[], DEBIAN, &["sleep", "1000"]);
    task.kill_client();
    assert_eq!(lab.status(&task.id).as_deref(), Some("RUNNING"));
    task.exec(&["true"]).run().ok();
    lab.ctr(&["task", "rm", "-f", &task.id]).run();
    lab.ctr(&["containers", "rm", &task.id]).run().ok();
    if lab.is_vz() {
        assert!(find(&task.id, Role::Shim).is_none());
    }
    Ok(())
}
