//! The shim's program, called the way containerd does.

use std::{fs, os::unix::net::UnixStream, path::Path, time::Duration};

use serde_json::json;
use vz_suite::{
    Lab, Verdict,
    command::Program,
    container::Task,
    host,
    lab::BUSYBOX,
    poll::{patiently, until},
    tests,
};

tests![
    the_version_is_told,
    info_is_protobuf_and_names_the_runtime,
    wrong_calls_are_refused_with_one_line,
    start_and_delete_by_hand,
    a_daemon_that_dies_before_anybody_calls_it_leaves_nothing,
    a_daemon_that_has_been_called_is_not_watched,
    start_of_a_broken_bundle_says_why,
    a_bundle_without_a_spec_waits_for_the_sandbox_api,
    delete_of_nothing_succeeds,
];

fn shim(lab: &Lab, args: &[&str]) -> Program {
    Program::new(lab.shim()).envs(lab.env()).args(args)
}

fn the_version_is_told(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    let said = shim(lab, &["-v"]).run().ok();
    assert!(said.starts_with("containerd-shim-vz-v2:") && said.contains("Version: "), "{said}");
    Ok(())
}

fn info_is_protobuf_and_names_the_runtime(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    let output = shim(lab, &["-info"]).run();
    output.exits(0);
    // RuntimeInfo: field 1 is the name, of 19 bytes; field 2 the version.
    let name = b"io.containerd.vz.v2";
    assert_eq!(&output.stdout[..2], [0x0a, 19], "{output}");
    assert_eq!(&output.stdout[2..21], name);
    assert_eq!(output.stdout[21], 0x12);
    // containerd's own reading of it.
    let said = lab.ctr(&["plugins", "inspect-runtime", "--runtime", lab.runtime()]).run().ok();
    assert!(said.contains("io.containerd.vz.v2"), "{said}");
    Ok(())
}

fn wrong_calls_are_refused_with_one_line(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    for args in [&["-no-such-flag"][..], &["start"], &["-namespace", "x", "-id", "y", "dance"], &["-id", "x", "delete"]]
    {
        let output = shim(lab, args).run();
        let said = output.fails();
        assert_eq!(said.lines().count(), 1, "{output}");
        assert!(output.stdout.is_empty(), "{output}");
    }
    Ok(())
}

/// A bundle with a root file system that holds nothing but an empty directory.
fn bundle(dir: &Path, config: &str) {
    fs::create_dir_all(dir.join("rootfs")).expect("make a rootfs");
    fs::write(dir.join("config.json"), config).expect("write a config.json");
}

fn config() -> String {
    json!({
        "ociVersion": "1.2.0",
        "process": { "user": { "uid": 0, "gid": 0 }, "args": ["/nothing"], "cwd": "/" },
        "root": { "path": "rootfs" },
        "linux": { "namespaces": [{ "type": "pid" }, { "type": "network" }, { "type": "mount" }] },
    })
    .to_string()
}

fn call<'a>(lab: &Lab, id: &'a str, more: &[&'a str]) -> Program {
    let address = lab.devbox().join("run/containerd.sock");
    let ttrpc = format!("{}.ttrpc", address.display());
    shim(
        lab,
        &[
            "-namespace",
            "vzt-cli",
            "-address",
            &address.display().to_string(),
            "-publish-binary",
            "/bin/true",
            "-id",
            id,
        ],
    )
    .args(more)
    .env("TTRPC_ADDRESS", &ttrpc)
}

/// Ends a sandbox that no containerd knows of.
struct Sandbox<'l>(&'l Lab, String);

impl Drop for Sandbox<'_> {
    fn drop(&mut self) {
        let dir = self.0.dir();
        let bundle = dir.path().display().to_string();
        drop(call(self.0, &self.1, &["-bundle", &bundle, "delete"]).start().wait_at_most(Duration::from_secs(20)));
    }
}

/// Starts a sandbox by hand: the path of its socket.
#[track_caller]
fn start(lab: &Lab, id: &str, bundle: &Path) -> String {
    let output = call(lab, id, &["start"]).dir(bundle).run();
    let reply: serde_json::Value = serde_json::from_str(&output.ok()).expect("the reply is JSON");
    assert_eq!((&reply["version"], &reply["protocol"]), (&json!(2), &json!("ttrpc")), "{output}");
    assert!(output.errors().is_empty(), "{output}");
    reply["address"].as_str().and_then(|a| a.strip_prefix("unix://")).expect("an address").to_owned()
}

fn start_and_delete_by_hand(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    let dir = lab.dir();
    bundle(dir.path(), &config());
    let sandbox = Sandbox(lab, lab.id("hand"));
    let id = &sandbox.1;
    let socket = &start(lab, id, dir.path());
    UnixStream::connect(socket).expect("the shim listens");
    // The same id again is refused, and does no harm.
    call(lab, id, &["start"]).dir(dir.path()).run().fails_with(&[id, "runs already"]);
    // So is another containerd that has a container of the same name.
    call(lab, id, &["-address", "/run/another.sock", "start"]).dir(dir.path()).run().fails_with(&[id, "runs already"]);
    UnixStream::connect(socket).expect("the shim still listens");
    let bundle = dir.path().display().to_string();
    let output = call(lab, id, &["-bundle", &bundle, "delete"]).run();
    output.exits(0);
    // DeleteResponse: field 2 is the exit status, 137.
    assert!(output.stdout.windows(3).any(|bytes| bytes == [0x10, 0x89, 0x01]), "{:?}", output.stdout);
    until("the socket to go", Duration::from_secs(10), || (!Path::new(socket).exists()).then_some(()));
    Ok(())
}

fn a_daemon_that_dies_before_anybody_calls_it_leaves_nothing(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    let dir = lab.dir();
    bundle(dir.path(), &config());
    let sandbox = Sandbox(lab, lab.id("unknown"));
    let id = &sandbox.1;
    let socket = &start(lab, id, dir.path());
    let state = Path::new("/run/vz/vzt-cli").join(id);
    assert!(Path::new(socket).exists() && state.exists());
    // containerd would call `delete` for a shim that it has connected to, and nothing for this one.
    host::kill(&host::await_process(id, host::Role::Shim));
    until("the socket and the state directory to go", Duration::from_secs(20), || {
        (!Path::new(socket).exists() && !state.exists()).then_some(())
    });
    until("the watcher to end", Duration::from_secs(20), || watcher(id).is_none().then_some(()));
    Ok(())
}

fn a_daemon_that_has_been_called_is_not_watched(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    let task = Task::start(lab, "known", &[], BUSYBOX, &["sleep", "1000"]);
    until("the watcher to end", Duration::from_secs(20), || watcher(&task.id).is_none().then_some(()));
    Ok(())
}

/// The process that watches over a daemon until somebody has called it, or goes on where `delete` has given up.
pub(crate) fn watcher(id: &str) -> Option<host::Process> {
    let is = |p: &&host::Process| p.flag("-id") == Some(id) && p.args.last().is_some_and(|arg| arg == "watch");
    host::Processes::now().iter().find(is).cloned()
}

fn start_of_a_broken_bundle_says_why(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    let dir = lab.dir();
    for (config, said) in [("{ \"ociVersion\": ", &["config.json"][..]), ("{ \"process\": 7 }", &["config.json"])] {
        bundle(dir.path(), config);
        let output = call(lab, &lab.id("broken"), &["start"]).dir(dir.path()).run();
        output.fails_with(said);
        assert_eq!(output.errors().lines().count(), 1, "{output}");
    }
    Ok(())
}

fn a_bundle_without_a_spec_waits_for_the_sandbox_api(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    let dir = lab.dir();
    let id = lab.id("podless");
    call(lab, &id, &["start"]).dir(dir.path()).run().exits(0);
    assert!(host::find(&id, host::Role::Vmm).is_none(), "there is no VM before somebody says what it is to be");
    let shim = host::await_process(&id, host::Role::Shim);
    call(lab, &id, &["-bundle", &dir.path().display().to_string(), "delete"]).run().exits(0);
    until("the daemon to be gone", patiently(Duration::from_secs(10)), || {
        host::Processes::now().get(shim.pid).is_none().then_some(())
    });
    Ok(())
}

fn delete_of_nothing_succeeds(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    let dir = lab.dir();
    call(lab, &lab.id("nothing"), &["-bundle", &dir.path().display().to_string(), "delete"]).run().exits(0);
    Ok(())
}
