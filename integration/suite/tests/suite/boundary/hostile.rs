//! A guest whose init lies: out/hostile, made of integration/hostile.

use std::{
    fs,
    time::{Duration, Instant},
};

use vz_suite::{
    Lab, Skip, Verdict,
    container::{Container, Task},
    events::{Event, Recorder, story},
    host::{Role, await_process, find},
    lab::{BUSYBOX, Restore},
    poll::{patience, patiently, until},
    tests,
};

use super::escape::{private_kib, rss_kib};

tests![
    a_giant_hello_is_refused,
    a_silent_agent_is_given_up,
    an_agent_of_another_version_is_refused_by_name,
    giant_and_garbled_answers_fail_the_request,
    forged_events_reach_nobody,
    a_flooding_agent_grows_nothing,
    an_agent_that_ignores_sigkill_is_ended_with_its_vm,
    an_agent_that_hangs_at_a_creation_fails_it,
    an_agent_that_hangs_at_a_start_or_after_it_is_ended,
    an_agent_that_hangs_up_for_good_is_ended,
    answers_after_the_deadline_reach_nobody,
    an_execs_end_that_is_not_told_is_not_claimed,
    floods_about_its_own_processes_grow_nothing,
    a_flood_of_long_log_lines_is_held_to_its_budget,
];

/// How long `rm -f` may take, whatever the guest does.
const REMOVAL: Duration = Duration::from_secs(10);
/// How long a request to the agent may take here, in seconds.
const AGENT_S: u32 = 5;

/// Has new sandboxes boot the init that lies in this way.
fn scene<'l>(lab: &'l Lab, name: &str, victim: &str) -> Result<[Restore<'l>; 2], Skip> {
    scene_at(lab, name, victim, "")
}

/// The same, at some of the requests.
fn scene_at<'l>(lab: &'l Lab, name: &str, victim: &str, at: &str) -> Result<[Restore<'l>; 2], Skip> {
    lab.vz_only()?;
    let bundle = lab.bundle().with_file_name("hostile");
    if !bundle.join("version.json").is_file() {
        return Err(Skip(format!("no {}: 'make hostile' builds it", bundle.display())));
    }
    let text = fs::read_to_string(bundle.join("version.json")).expect("read version.json");
    let version: serde_json::Value = serde_json::from_str(&text).expect("version.json is JSON");
    let version = version["agent_version"].as_str().expect("it has the agent's version");
    let args = format!("vz.hostile={name} vz.version={version} vz.victim={victim} vz.at={at}");
    // Answers that never come need not be waited for as long as usual; those of a guest that is busy with its lies do.
    let patience = patience();
    let deadline = if name.starts_with("floods") || name == "forged-events" { 60 * patience } else { AGENT_S };
    let timeouts = format!("[timeouts]\nagent_s = {deadline}\nkill_s = {}\n", 4 * patience);
    let config = lab.configure(&format!("[guest]\nkernel_args = \"{args}\"\n{timeouts}"));
    Ok([config, lab.use_bundle(&bundle)])
}

/// A run is refused with these words, and before a minute is over.
#[track_caller]
fn refused(lab: &Lab, name: &str, parts: &[&str]) -> Verdict {
    let _scene = scene(lab, name, "")?;
    let (id, begun) = (lab.id("refused"), Instant::now());
    lab.ctr_run(&["--rm", BUSYBOX, &id, "true"]).run().fails_with(parts);
    assert!(begun.elapsed() < Duration::from_secs(60), "refused after {:?}", begun.elapsed());
    lab.ctr(&["containers", "rm", &id]).run();
    Ok(())
}

fn a_giant_hello_is_refused(lab: &Lab) -> Verdict {
    refused(lab, "giant-hello", &["frame of 4294967295 bytes"])
}

fn a_silent_agent_is_given_up(lab: &Lab) -> Verdict {
    refused(lab, "silence", &["guest agent said nothing for 10 s"])
}

fn an_agent_of_another_version_is_refused_by_name(lab: &Lab) -> Verdict {
    refused(lab, "other-version", &["0.0.0-forged", "build or install the bundle again"])
}

fn giant_and_garbled_answers_fail_the_request(lab: &Lab) -> Verdict {
    refused(lab, "giant-answer", &["create"])?;
    refused(lab, "garbage-answer", &["create"])
}

/// A container that is none of the liar's business.
fn bystander(lab: &Lab) -> Task<'_> {
    Task::start(lab, "victim", &[], BUSYBOX, &["sleep", "1000"])
}

fn forged_events_reach_nobody(lab: &Lab) -> Verdict {
    let victim = bystander(lab);
    let events = Recorder::start(lab);
    let scene = scene(lab, "forged-events", &victim.id)?;
    let mark = lab.log_position();
    let liar = Task::start(lab, "liar", &[], BUSYBOX, &["true"]);
    drop(scene);
    let shim = await_process(&liar.id, Role::Shim).pid;
    // It answers after all lies have been told: a pause of theirs is no part of it.
    liar.kill("SIGKILL");
    let ended = events.expect_where(&liar.id, "/tasks/exit", |_| true);
    // Eight bits of what it said, which was much more.
    assert_eq!(ended.number("exit_status"), 137);
    assert!(rss_kib(shim) < 64 * 1024, "the shim has {} KiB", rss_kib(shim));
    assert_eq!(lab.status(&victim.id).as_deref(), Some("RUNNING"));
    assert_eq!(victim.exec(&["echo", "alive"]).run().ok(), "alive");
    let lines = lab.log_lines_since(mark).lines().count();
    assert!(lines < 500, "{lines} lines in the log");
    let forged =
        |event: &Event| event.topic == "/tasks/oom" || event.topic == "/tasks/exit" && event.text("id") == victim.id;
    assert_eq!(events.of(&victim.id).iter().filter(|event| forged(event)).count(), 0);
    liar.wait();
    Ok(())
}

fn a_flooding_agent_grows_nothing(lab: &Lab) -> Verdict {
    let victim = bystander(lab);
    let scene = scene(lab, "floods", &victim.id)?;
    let (mark, begun) = (lab.log_position(), Instant::now());
    let liar = Task::start(lab, "flood", &[], BUSYBOX, &["true"]);
    drop(scene);
    let (shim, vmm) = (await_process(&liar.id, Role::Shim).pid, await_process(&liar.id, Role::Vmm).pid);
    let before = (rss_kib(shim), private_kib(vmm).expect("the vmm runs"));
    let end = Instant::now() + Duration::from_secs(10);
    until("ten seconds of it", Duration::from_secs(20), || {
        assert_eq!(victim.exec(&["echo", "alive"]).run().ok(), "alive");
        (Instant::now() > end).then_some(())
    });
    let after = (rss_kib(shim), private_kib(vmm).expect("the vmm runs"));
    println!("  shim {} -> {} KiB, vmm {} -> {} KiB", before.0, after.0, before.1, after.1);
    assert!(after.0 < before.0 + 32 * 1024, "the shim grew from {} to {} KiB", before.0, after.0);
    assert!(after.1 < before.1 + 32 * 1024, "the vmm grew from {} to {} KiB", before.1, after.1);
    log_is_within_budget(lab, mark, begun);
    liar.kill("SIGKILL");
    liar.wait();
    Ok(())
}

/// The log has grown by what a guest may have logged: 1 MiB, and 100 KiB a second.
#[track_caller]
fn log_is_within_budget(lab: &Lab, mark: u64, begun: Instant) {
    let log = lab.log_position() - mark;
    let most = (1 << 20) + (100 << 10) * (begun.elapsed().as_secs() + 1);
    println!("  log grew by {} KiB in {} s", log >> 10, begun.elapsed().as_secs());
    // containerd puts its own words around each line.
    assert!(log < most * 3 / 2, "the log grew by {log} bytes, of {most} that may be");
}

/// Open descriptors of a process.
fn descriptors(pid: i32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count)
}

/// Removes a container whose guest does not help: in time, with its events in order and its end told once, and with
/// none of its processes left. What else may be left, the suite looks for after each test.
#[track_caller]
fn removed(lab: &Lab, events: &Recorder, id: &str, what: &str, remove: &dyn Fn()) {
    let begun = Instant::now();
    remove();
    let took = begun.elapsed();
    println!("  {what}: removed after {:.1} s", took.as_secs_f64());
    assert!(took < patiently(REMOVAL), "{what}: removed after {took:?}");
    events.expect(id, "/tasks/delete");
    let told = story(&events.of(id));
    assert!(told.ends_with(&["exit".to_owned(), "delete".to_owned()]), "{what}: {told:?}");
    assert_eq!(told.iter().filter(|topic| *topic == "exit").count(), 1, "{what}: {told:?}");
    for role in [Role::Shim, Role::Vmm, Role::Qemu, Role::Anchor] {
        until(&format!("{what}: the end of {role:?}"), Duration::from_secs(5), || {
            find(id, role).is_none().then_some(())
        });
    }
    assert!(!fs::exists(format!("/run/vz/default/{id}")).expect("look for the state directory"), "{what}");
    lab.remove_clients_fifos();
}

/// `ctr task rm -f`, and the container.
#[track_caller]
fn remove_by_ctr(lab: &Lab, task: &Task<'_>) {
    lab.ctr(&["task", "rm", "-f", &task.id]).run();
    assert_eq!(lab.status(&task.id), None, "the task is there still");
    lab.ctr(&["containers", "rm", &task.id]).run().ok();
    task.wait();
}

/// Asks for statistics in vain; containerd logs why, and tells its client nothing.
#[track_caller]
fn no_stats(lab: &Lab, task: &Task<'_>, why: &str) {
    let mark = lab.log_position();
    lab.ctr(&["task", "metrics", &task.id]).run().fails();
    let log = lab.log_lines_since(mark);
    assert!(log.contains(why), "no {why:?} in the log: {log}");
}

/// A liar that runs, under `ctr`.
#[track_caller]
fn liar<'l>(lab: &'l Lab, name: &str, at: &str) -> Result<Task<'l>, Skip> {
    let scene = scene_at(lab, name, "", at)?;
    let liar = Task::start(lab, "liar", &[], BUSYBOX, &["true"]);
    drop(scene);
    Ok(liar)
}

fn an_agent_that_ignores_sigkill_is_ended_with_its_vm(lab: &Lab) -> Verdict {
    let victim = bystander(lab);
    let events = Recorder::start(lab);
    let task = liar(lab, "pretends", "SignalProcess")?;
    // Other signals are its own affair.
    task.kill("SIGTERM");
    assert_eq!(lab.status(&task.id).as_deref(), Some("RUNNING"));
    removed(lab, &events, &task.id, "ctr", &|| remove_by_ctr(lab, &task));
    let exits: Vec<_> = events.of(&task.id).into_iter().filter(|event| event.topic == "/tasks/exit").collect();
    assert_eq!(exits[0].number("exit_status"), 137);
    let scene = scene_at(lab, "pretends", "", "SignalProcess")?;
    let container = Container::start(lab, "liar", &[BUSYBOX, "true"]);
    drop(scene);
    removed(lab, &events, &container.id, "nerdctl", &|| container.remove());
    assert_eq!(victim.exec(&["echo", "alive"]).run().ok(), "alive");
    Ok(())
}

/// A creation that is not answered fails in its time, with what is true.
fn an_agent_that_hangs_at_a_creation_fails_it(lab: &Lab) -> Verdict {
    for (name, at, said) in [
        ("hangs", "CreateContainer", "create: the guest agent did not answer within"),
        // Silent after its hello.
        ("hangs", "*", "create: the guest agent did not answer within"),
        ("hangs-up", "CreateContainer", "lost during create"),
    ] {
        let _scene = scene_at(lab, name, "", at)?;
        let (id, begun) = (lab.id("refused"), Instant::now());
        lab.ctr_run(&["--rm", BUSYBOX, &id, "true"]).run().fails_with(&[said]);
        println!("  {name} at {at}: refused after {:.1} s, its boot among them", begun.elapsed().as_secs_f64());
        assert!(begun.elapsed() < patiently(Duration::from_secs(30)), "refused after {:?}", begun.elapsed());
        lab.ctr(&["containers", "rm", &id]).run();
    }
    Ok(())
}

/// What a request says whose answer does not come, and that the container is as it was before.
fn an_agent_that_hangs_at_a_start_or_after_it_is_ended(lab: &Lab) -> Verdict {
    let victim = bystander(lab);
    let events = Recorder::start(lab);
    let scene = scene_at(lab, "hangs", "", "StartContainer")?;
    let unstarted = lab.id("unstarted");
    lab.ctr_run(&["--rm", BUSYBOX, &unstarted, "true"]).run().fails_with(&["start: the guest agent did not answer"]);
    lab.ctr(&["containers", "rm", &unstarted]).run();
    drop(scene);

    let task = liar(lab, "hangs", "ExecProcess,Stats,SignalProcess,DeleteProcess,WaitProcess,UpdateNetwork")?;
    let shim = await_process(&task.id, Role::Shim).pid;
    let before = (rss_kib(shim), descriptors(shim));
    let exec = ["task", "exec", "--exec-id", "vzt-hanging", &task.id, "true"];
    lab.ctr(&exec).run().fails_with(&["exec: the guest agent did not answer within"]);
    no_stats(lab, &task, "stats: the guest agent did not answer within");
    // "not found" is what clients take for an end.
    let said = lab.ctr(&["task", "kill", "-s", "SIGTERM", &task.id]).run();
    assert!(!said.fails().contains("not found"), "{said}");
    assert_eq!(lab.status(&task.id).as_deref(), Some("RUNNING"));
    let after = (rss_kib(shim), descriptors(shim));
    println!("  shim {} -> {} KiB, {} -> {} descriptors", before.0, after.0, before.1, after.1);
    assert!(after.0 < before.0 + 8 * 1024 && after.1 < before.1 + 8, "{before:?} -> {after:?}");
    removed(lab, &events, &task.id, "hangs", &|| remove_by_ctr(lab, &task));
    assert_eq!(victim.exec(&["echo", "alive"]).run().ok(), "alive");
    Ok(())
}

fn an_agent_that_hangs_up_for_good_is_ended(lab: &Lab) -> Verdict {
    let victim = bystander(lab);
    let events = Recorder::start(lab);
    let task = liar(lab, "hangs-up", "Stats")?;
    no_stats(lab, &task, "the guest agent was lost during stats");
    no_stats(lab, &task, "stats: the guest agent is not connected after");
    let said = lab.ctr(&["task", "kill", "-s", "SIGTERM", &task.id]).run();
    assert!(!said.fails().contains("not found"), "{said}");
    assert_eq!(lab.status(&task.id).as_deref(), Some("RUNNING"));
    removed(lab, &events, &task.id, "hangs up", &|| remove_by_ctr(lab, &task));
    assert_eq!(victim.exec(&["echo", "alive"]).run().ok(), "alive");
    Ok(())
}

fn answers_after_the_deadline_reach_nobody(lab: &Lab) -> Verdict {
    let events = Recorder::start(lab);
    let task = liar(lab, "late", "ExecProcess,Stats,SignalProcess")?;
    let exec = ["task", "exec", "--exec-id", "vzt-late", &task.id, "true"];
    lab.ctr(&exec).run().fails_with(&["exec: the guest agent did not answer within"]);
    no_stats(lab, &task, "stats: the guest agent did not answer within");
    // Its answers come meanwhile, and are nobody's: nothing of the exec is told, and another one can have its name.
    lab.ctr(&exec).run().fails_with(&["exec: the guest agent did not answer within"]);
    let told = story(&events.of(&task.id));
    assert!(told.iter().all(|topic| !topic.starts_with("exec-started") && !topic.starts_with("exit")), "{told:?}");
    removed(lab, &events, &task.id, "late", &|| remove_by_ctr(lab, &task));
    Ok(())
}

fn an_execs_end_that_is_not_told_is_not_claimed(lab: &Lab) -> Verdict {
    let events = Recorder::start(lab);
    let task = liar(lab, "pretends", "SignalProcess")?;
    let client = lab.ctr(&["task", "exec", "--exec-id", "vzt-deaf", &task.id, "true"]).start();
    events.expect(&task.id, "/tasks/exec-started");
    let kill = ["task", "kill", "--exec-id", "vzt-deaf", "-s", "SIGKILL", &task.id];
    let said = lab.ctr(&kill).run();
    said.fails_with(&["exec vzt-deaf", "not confirmed"]);
    assert!(said.took < patiently(REMOVAL), "{said}");
    removed(lab, &events, &task.id, "with its init", &|| remove_by_ctr(lab, &task));
    assert_ne!(client.wait().code(), 0);
    let told = story(&events.of(&task.id));
    assert_eq!(told[told.len() - 3..], ["exit vzt-deaf", "exit", "delete"], "{told:?}");
    Ok(())
}

fn floods_about_its_own_processes_grow_nothing(lab: &Lab) -> Verdict {
    let victim = bystander(lab);
    let events = Recorder::start(lab);
    let task = liar(lab, "floods-own", "")?;
    let shim = await_process(&task.id, Role::Shim).pid;
    let containerd = lab.containerd().pid;
    let (before, begun) = ((rss_kib(shim), descriptors(shim), rss_kib(containerd)), Instant::now());
    // The exec is the flood's beginning, and ends with its first false word.
    lab.ctr(&["task", "exec", "--exec-id", "vzt-flood", &task.id, "true"]).run().exits(7);
    let end = Instant::now() + Duration::from_secs(20);
    until("twenty seconds of it", Duration::from_secs(60), || {
        assert_eq!(victim.exec(&["echo", "alive"]).run().ok(), "alive");
        (Instant::now() > end).then_some(())
    });
    let after = (rss_kib(shim), descriptors(shim), rss_kib(containerd));
    let told = story(&events.of(&task.id));
    let lacks = told.iter().filter(|topic| *topic == "oom").count();
    println!(
        "  shim {} -> {} KiB, {} -> {} descriptors, {lacks} events of a lack of memory",
        before.0, after.0, before.1, after.1
    );
    assert!(after.0 < before.0 + 16 * 1024, "the shim grew from {} to {} KiB", before.0, after.0);
    assert!(after.1 < before.1 + 8, "{} -> {} descriptors", before.1, after.1);
    let most = usize::try_from(begun.elapsed().as_secs() / 10 + 2).expect("a small number");
    assert!((1..=most).contains(&lacks), "{lacks} events of a lack of memory, at most {most}");
    assert_eq!(told.iter().filter(|topic| topic.starts_with("exit")).count(), 1, "{told:?}");
    removed(lab, &events, &task.id, "floods", &|| remove_by_ctr(lab, &task));
    Ok(())
}

fn a_flood_of_long_log_lines_is_held_to_its_budget(lab: &Lab) -> Verdict {
    let events = Recorder::start(lab);
    let task = liar(lab, "floods-log", "")?;
    let shim = await_process(&task.id, Role::Shim).pid;
    // What it may say at once has been said by then.
    let (mark, begun, before) = (lab.log_position(), Instant::now(), rss_kib(shim));
    let cpu = cpu_ticks(shim);
    let end = Instant::now() + Duration::from_secs(20);
    until("twenty seconds of it", Duration::from_secs(60), || (Instant::now() > end).then_some(()));
    log_is_within_budget(lab, mark, begun);
    println!("  shim {before} -> {} KiB, {} ms of CPU time", rss_kib(shim), (cpu_ticks(shim) - cpu) * 10);
    assert!(rss_kib(shim) < before + 8 * 1024, "the shim grew from {before} to {} KiB", rss_kib(shim));
    removed(lab, &events, &task.id, "floods the log", &|| remove_by_ctr(lab, &task));
    Ok(())
}

/// CPU time of a process, in clock ticks: fields 14 and 15 of proc_pid_stat(5).
fn cpu_ticks(pid: i32) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("read stat");
    let (_, rest) = stat.rsplit_once(')').expect("stat has a name");
    rest.split_whitespace().skip(11).take(2).map(|ticks| ticks.parse::<u64>().expect("ticks are a number")).sum()
}
