//! More processes in a running container.

use vz_suite::{
    Lab, Verdict,
    command::{Output, Program},
    container::{Container, Task},
    host::{Role, find},
    lab::{BUSYBOX, DEBIAN},
    tests,
};

tests![
    exec_has_its_own_code_user_env_and_directory,
    a_missing_command_is_named_and_harms_nothing,
    a_missing_command_of_a_container_is_named,
    twenty_execs_at_once,
    an_exec_is_killed_alone,
    exec_ids_can_be_used_again_but_not_twice_at_once,
    exec_in_a_stopped_container_is_refused,
    execs_end_with_their_container,
];

fn exec_has_its_own_code_user_env_and_directory(lab: &Lab) -> Verdict {
    let container = Container::start(lab, "exec", &["-e", "A=a", DEBIAN, "sleep", "1000"]);
    // nerdctl's own exit code is 1 whatever the process's is.
    container.exec(&["sh", "-c", "exit 5"]).run().fails_with(&["exit code 5"]);
    container.exec(&["sh", "-c", "kill -9 $$"]).run().fails_with(&["exit code 137"]);
    lab.ctr(&["task", "exec", "--exec-id", "vzt-code", &container.id, "sh", "-c", "exit 6"]).run().exits(6);
    let args = ["exec", "--user", "www-data", "-e", "B=b", "--workdir", "/tmp", &container.name];
    let said = lab.nerdctl(&args).args(["sh", "-c", "id -un; id -gn; echo $A$B; pwd"]).run().ok();
    assert_eq!(said, "www-data\nwww-data\nab\n/tmp");
    let ctr = ["task", "exec", "--exec-id", "vzt-user", "--user", "42:43", "--cwd", "/usr", &container.id];
    assert_eq!(lab.ctr(&ctr).args(["sh", "-c", "id -u; id -g; pwd"]).run().ok(), "42\n43\n/usr");
    // In the container's namespaces, and without a terminal.
    let said = container.sh("cat /proc/1/cmdline | tr '\\0' ' '; test -t 0 || echo no terminal");
    assert_eq!(said, "sleep 1000 no terminal");
    container.exec(&["sh", "-c", "echo kept >/exec"]).run().ok();
    assert_eq!(container.sh("cat /exec"), "kept");
    Ok(())
}

fn a_missing_command_is_named_and_harms_nothing(lab: &Lab) -> Verdict {
    let container = Container::start(lab, "missing", &[BUSYBOX, "sleep", "1000"]);
    let shim = find(&container.id, Role::Shim).map(|process| process.pid);
    for _ in 0..3 {
        let said = container.exec(&["no-such-command"]).run().fails();
        assert!(said.contains("no-such-command") && said.contains("not found"), "{said}");
    }
    container.exec(&["/etc/passwd"]).run().fails_with(&["ermission denied"]);
    lab.nerdctl(&["exec", "--user", "nobody-here", &container.name, "true"]).run().fails();
    lab.nerdctl(&["exec", "--workdir", "/etc/passwd/x", &container.name, "true"]).run().fails();
    assert_eq!(container.sh("echo well"), "well");
    assert_eq!(find(&container.id, Role::Shim).map(|process| process.pid), shim);
    Ok(())
}

fn a_missing_command_of_a_container_is_named(lab: &Lab) -> Verdict {
    let said = lab.nerdctl_run(&["--rm", BUSYBOX, "no-such-command"]).run().fails();
    assert!(said.contains("no-such-command") && said.contains("not found"), "{said}");
    let said = lab.ctr_run(&["--rm", BUSYBOX, &lab.id("missing"), "/no/such/command"]).run().fails();
    assert!(said.contains("/no/such/command"), "{said}");
    Ok(())
}

fn twenty_execs_at_once(lab: &Lab) -> Verdict {
    let task = Task::start(lab, "twenty", &[], BUSYBOX, &["sleep", "1000"]);
    let program = |n: usize| -> Program { task.exec(&["sh", "-c", &format!("echo {n}; usleep 300000; exit {n}")]) };
    let running: Vec<_> = (0..20).map(|n| program(n).start()).collect();
    let outputs: Vec<Output> = running.into_iter().map(vz_suite::command::Running::wait).collect();
    for (n, output) in outputs.iter().enumerate() {
        assert_eq!((output.code(), output.text()), (i32::try_from(n).unwrap_or(-1), n.to_string()), "{output}");
    }
    Ok(())
}

fn an_exec_is_killed_alone(lab: &Lab) -> Verdict {
    let task = Task::start(lab, "alone", &[], BUSYBOX, &["sleep", "1000"]);
    let client =
        lab.ctr(&["task", "exec", "--exec-id", "vzt-victim", &task.id, "sh", "-c", "echo up; sleep 999"]).start();
    client.expect("up");
    lab.ctr(&["task", "kill", "-s", "SIGKILL", "--exec-id", "vzt-victim", &task.id]).run().ok();
    client.wait().exits(137);
    assert_eq!(lab.status(&task.id).as_deref(), Some("RUNNING"));
    Ok(())
}

fn exec_ids_can_be_used_again_but_not_twice_at_once(lab: &Lab) -> Verdict {
    let task = Task::start(lab, "ids", &[], BUSYBOX, &["sleep", "1000"]);
    let exec = |args: &[&str]| lab.ctr(&["task", "exec", "--exec-id", "vzt-same", &task.id]).args(args);
    let client = exec(&["sh", "-c", "echo up; read x; exit 3"]).piped().start();
    client.expect("up");
    exec(&["true"]).run().fails_with(&["exists"]);
    client.wait().fails();
    for n in 0..3 {
        exec(&["sh", "-c", &format!("exit {n}")]).run().exits(n);
    }
    // It was refused, and must not be in the way.
    exec(&["no-such-command"]).run().fails_with(&["not found"]);
    exec(&["true"]).run().ok();
    Ok(())
}

fn exec_in_a_stopped_container_is_refused(lab: &Lab) -> Verdict {
    let container = Container::start(lab, "stopped", &[BUSYBOX, "true"]);
    container.nerdctl("wait").ok();
    container.exec(&["true"]).run().fails();
    let id = lab.id("stopped");
    // nerdctl looks before it asks; ctr asks.
    lab.ctr_run(&["-d", BUSYBOX, &id, "true"]).run().ok();
    lab.await_status(&id, "STOPPED");
    lab.ctr(&["task", "exec", "--exec-id", "vzt-late", &id, "true"]).run().fails();
    lab.ctr(&["task", "rm", &id]).run();
    lab.ctr(&["containers", "rm", &id]).run().ok();
    Ok(())
}

fn execs_end_with_their_container(lab: &Lab) -> Verdict {
    let task = Task::start(lab, "ends", &[], BUSYBOX, &["sleep", "1000"]);
    let client = task.exec(&["sh", "-c", "echo up; sleep 999"]).start();
    client.expect("up");
    task.kill("SIGKILL");
    task.wait().exits(137);
    assert_ne!(client.wait().code(), 0);
    Ok(())
}
