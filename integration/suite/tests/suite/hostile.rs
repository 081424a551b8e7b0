//! A guest whose init lies: out/hostile, made of integration/hostile.

use std::{
    fs,
    time::{Duration, Instant},
};

use vz_suite::{
    Lab, Skip, Verdict,
    container::Task,
    events::{Event, Recorder},
    host::{Role, await_process},
    lab::{BUSYBOX, Restore},
    poll::{patience, until},
    tests,
};

use crate::escape::{private_kib, rss_kib};

tests![
    a_giant_hello_is_refused,
    a_silent_agent_is_given_up,
    an_agent_of_another_version_is_refused_by_name,
    giant_and_garbled_answers_fail_the_request,
    forged_events_reach_nobody,
    a_flooding_agent_grows_nothing,
];

/// Has new sandboxes boot the init that lies in this way.
fn scene<'l>(lab: &'l Lab, name: &str, victim: &str) -> Result<[Restore<'l>; 2], Skip> {
    lab.vz_only()?;
    let bundle = lab.bundle().with_file_name("hostile");
    if !bundle.join("version.json").is_file() {
        return Err(Skip(format!("no {}: 'make hostile' builds it", bundle.display())));
    }
    let text = fs::read_to_string(bundle.join("version.json")).expect("read version.json");
    let version: serde_json::Value = serde_json::from_str(&text).expect("version.json is JSON");
    let version = version["agent_version"].as_str().expect("it has the agent's version");
    let args = format!("vz.hostile={name} vz.version={version} vz.victim={victim}");
    // Answers that never come need not be waited for as long as usual; those of a guest that is busy with its lies do.
    let deadline = if matches!(name, "floods" | "forged-events") { 60 * patience() } else { 5 };
    let config = lab.configure(&format!("[guest]\nkernel_args = \"{args}\"\n[timeouts]\nagent_s = {deadline}\n"));
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
    let before = (rss_kib(shim), private_kib(vmm));
    let end = Instant::now() + Duration::from_secs(10);
    until("ten seconds of it", Duration::from_secs(20), || {
        assert_eq!(victim.exec(&["echo", "alive"]).run().ok(), "alive");
        (Instant::now() > end).then_some(())
    });
    let after = (rss_kib(shim), private_kib(vmm));
    println!("  shim {} -> {} KiB, vmm {} -> {} KiB", before.0, after.0, before.1, after.1);
    assert!(after.0 < before.0 + 32 * 1024, "the shim grew from {} to {} KiB", before.0, after.0);
    assert!(after.1 < before.1 + 32 * 1024, "the vmm grew from {} to {} KiB", before.1, after.1);
    // 4096 bytes of a message are kept, of a thousand records in ten seconds.
    let log = lab.log_position() - mark;
    let most = (begun.elapsed().as_secs() / 10 + 2) * 1000 * 4500;
    assert!(log < most, "the log grew by {log} bytes, of {most} that may be");
    liar.kill("SIGKILL");
    liar.wait();
    Ok(())
}
