//! containerd's events: all of them, in order, once.

use vz_suite::{
    Lab, Verdict,
    container::Task,
    events::{Recorder, story},
    lab::BUSYBOX,
    tests,
};

tests![
    a_runs_events_come_in_order_and_once,
    a_process_that_ends_at_once_has_started_before,
    an_execs_end_comes_before_its_containers
];

fn a_runs_events_come_in_order_and_once(lab: &Lab) -> Verdict {
    let events = Recorder::start(lab);
    let task = Task::start(lab, "events", &[], BUSYBOX, &["sleep", "1000"]);
    let exec = |name: &str, code: &str| {
        let args = ["task", "exec", "--exec-id", name, &task.id, "sh", "-c", &format!("exit {code}")];
        lab.ctr(&args).run().exits(code.parse().expect("a code"));
        events.expect_where(&task.id, "/tasks/exit", |event| event.text("id") == name);
    };
    exec("vzt-first", "5");
    exec("vzt-second", "6");
    task.kill("SIGKILL");
    task.wait().exits(137);
    events.expect(&task.id, "/tasks/delete");
    let all = events.of(&task.id);
    assert_eq!(
        story(&all),
        [
            "create",
            "start",
            "exec-added vzt-first",
            "exec-started vzt-first",
            "exit vzt-first",
            "exec-added vzt-second",
            "exec-started vzt-second",
            "exit vzt-second",
            "exit",
            "delete"
        ]
    );
    let exits: Vec<_> = all.iter().filter(|e| e.topic == "/tasks/exit").map(|e| e.number("exit_status")).collect();
    assert_eq!(exits, [5, 6, 137]);
    let pid = all[0].number("pid");
    assert!(pid > 0, "{:?}", all[0]);
    assert!(all.iter().filter(|e| e.topic != "/tasks/exec-added").all(|e| e.number("pid") > 0), "{all:?}");
    assert_eq!(all[1].number("pid"), pid);
    Ok(())
}

fn a_process_that_ends_at_once_has_started_before(lab: &Lab) -> Verdict {
    let events = Recorder::start(lab);
    for _ in 0..lab.times(3, 30) {
        let id = lab.id("instant");
        lab.ctr_run(&["--rm", BUSYBOX, &id, "true"]).run().ok();
        // runc's shim may end before it has told of the deletion.
        if lab.is_vz() {
            events.expect(&id, "/tasks/delete");
        }
        let told = story(&events.of(&id));
        assert_eq!(told[..], ["create", "start", "exit", "delete"][..told.len()]);
    }
    let task = Task::start(lab, "instant", &[], BUSYBOX, &["sleep", "1000"]);
    for n in 0..lab.times(20, 200) {
        let name = format!("vzt-e{n}");
        lab.ctr(&["task", "exec", "--exec-id", &name, &task.id, "true"]).run().ok();
        events.expect_where(&task.id, "/tasks/exit", |event| event.text("id") == name);
        let told = story(&events.of(&task.id));
        let wanted = [format!("exec-added {name}"), format!("exec-started {name}"), format!("exit {name}")];
        assert_eq!(told[told.len() - 3..], wanted);
    }
    Ok(())
}

fn an_execs_end_comes_before_its_containers(lab: &Lab) -> Verdict {
    let events = Recorder::start(lab);
    let task = Task::start(lab, "last", &[], BUSYBOX, &["sleep", "1000"]);
    let args = ["task", "exec", "--exec-id", "vzt-outlived", &task.id, "sh", "-c", "echo up; sleep 999"];
    let client = lab.ctr(&args).start();
    client.expect("up");
    task.kill("SIGKILL");
    task.wait().exits(137);
    client.wait();
    events.expect(&task.id, "/tasks/delete");
    let told = story(&events.of(&task.id));
    assert_eq!(
        told,
        [
            "create",
            "start",
            "exec-added vzt-outlived",
            "exec-started vzt-outlived",
            "exit vzt-outlived",
            "exit",
            "delete"
        ]
    );
    Ok(())
}
