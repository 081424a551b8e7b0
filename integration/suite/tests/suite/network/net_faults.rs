//! What goes wrong with networks: hooks, plugins, namespaces and links. Each is said, and nothing is left.

use std::{
    fs, thread,
    time::{Duration, Instant},
};

use rustix::process::Signal;
use serde_json::{Value, json};
use vz_suite::{
    Lab, Verdict,
    command::Program,
    host::{self, Role, await_process},
    lab::BUSYBOX,
    poll::{patience, until},
    tests,
};

tests![
    hooks_are_told_the_state_and_run_in_order,
    a_failing_hook_fails_the_creation_in_its_own_words,
    a_hook_that_hangs_is_ended_at_its_timeout,
    a_client_that_gives_up_during_a_hook_leaves_nothing,
    poststop_hooks_run_after_a_crash,
    a_missing_plugin_is_said,
    a_named_namespace_is_used_and_given_back,
    a_named_namespace_is_given_back_after_a_crash,
    a_namespace_that_is_removed_meanwhile_does_no_harm,
    links_of_other_kinds_are_connected,
    links_that_cannot_be_connected_are_named,
    the_shim_is_killed_while_it_connects,
    the_vmm_is_killed_while_it_connects,
    many_sandboxes_come_and_go,
];

/// A container of `ctr run --config`, which lets a test write the spec.
pub(crate) struct Custom<'l> {
    lab: &'l Lab,
    pub(crate) id: String,
    pub(crate) dir: tempfile::TempDir,
}

impl<'l> Custom<'l> {
    #[track_caller]
    pub(crate) fn new(lab: &'l Lab, what: &str) -> Self {
        let dir = lab.dir();
        let rootfs = dir.path().join("rootfs");
        fs::create_dir(&rootfs).expect("make a directory");
        lab.ctr(&["images", "mount", "--rw", BUSYBOX, &rootfs.display().to_string()]).run().ok();
        Self { lab, id: lab.id(what), dir }
    }

    /// A file of the host for hooks to write to.
    pub(crate) fn said(&self) -> String {
        self.dir.path().join("said").display().to_string()
    }

    /// `ctr run` with these hooks, of this script.
    #[track_caller]
    pub(crate) fn run(&self, flags: &[&str], hooks: &Value, script: &str) -> Program {
        self.run_edited(flags, script, |spec| spec["hooks"] = hooks.clone())
    }

    /// `ctr run` of this script, with changes to the spec.
    #[track_caller]
    pub(crate) fn run_edited(&self, flags: &[&str], script: &str, edit: impl FnOnce(&mut Value)) -> Program {
        let mut spec: Value = serde_json::from_str(&self.lab.ctr(&["oci", "spec"]).run().ok()).expect("a spec is JSON");
        spec["root"] = json!({ "path": self.dir.path().join("rootfs") });
        spec["process"]["args"] = json!(["sh", "-c", script]);
        spec["process"]["terminal"] = json!(false);
        edit(&mut spec);
        // Without an id, the client names the directory that all of its containers' cgroups are in.
        spec["linux"]["cgroupsPath"] = json!(format!("/default/{}", self.id));
        let config = self.dir.path().join("config.json");
        fs::write(&config, spec.to_string()).expect("write a spec");
        self.lab.ctr_run(flags).args(["--config", &config.display().to_string(), &self.id])
    }
}

impl Drop for Custom<'_> {
    fn drop(&mut self) {
        let quietly = |args: &[&str]| drop(self.lab.ctr(args).start().wait_at_most(Duration::from_secs(30)));
        quietly(&["task", "rm", "-f", &self.id]);
        quietly(&["containers", "rm", &self.id]);
        quietly(&["images", "unmount", "--rm", &self.dir.path().join("rootfs").display().to_string()]);
    }
}

/// A hook that is a shell's script.
pub(crate) fn hook(script: &str) -> Value {
    json!({ "path": "/bin/sh", "args": ["hook", "-c", script], "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin", "SAID=yes"] })
}

/// Writes the hook's name and the state's status, the network namespace of its pid, and whether the bundle has the
/// hooks.
fn reporting(name: &str, file: &str) -> Value {
    hook(&format!(
        "state=$(cat); field() {{ printf %s \"$state\" | jq -r \"$1\"; }}; pid=$(field .pid); \
         netns=$(readlink /proc/$pid/ns/net 2>/dev/null || echo none); [ \"$netns\" != \"$(readlink /proc/self/ns/net)\" ] || netns=host; \
         echo {name} $(field .status) $SAID $(jq -r '.hooks|has(\"createRuntime\")' \"$(field .bundle)/config.json\") ${{netns%%:*}} >>{file}"
    ))
}

fn hooks_are_told_the_state_and_run_in_order(lab: &Lab) -> Verdict {
    let custom = Custom::new(lab, "hooks");
    let file = custom.said();
    let hooks = json!({
        "prestart": [reporting("prestart", &file)],
        "createRuntime": [reporting("createRuntime", &file), reporting("another", &file)],
        "poststart": [reporting("poststart", &file)],
        "poststop": [reporting("poststop", &file)],
    });
    // It goes on for long enough to be there when the poststart hook looks.
    custom.run(&["--rm"], &hooks, "sleep 2; exit 7").run().exits(7);
    let said = fs::read_to_string(&file).expect("the hooks have written");
    let wanted = [
        "prestart creating yes true net",
        "createRuntime creating yes true net",
        "another creating yes true net",
        "poststart running yes true net",
        "poststop stopped yes true none",
    ];
    let said: Vec<_> = said.lines().collect();
    assert_eq!(said, wanted);
    Ok(())
}

fn a_failing_hook_fails_the_creation_in_its_own_words(lab: &Lab) -> Verdict {
    let custom = Custom::new(lab, "failing");
    let file = custom.said();
    let after = hook(&format!("echo after >>{file}"));
    let hooks = json!({
        "createRuntime": [hook("echo the bridge is out of order >&2; exit 3"), after],
        "poststop": [hook(&format!("echo poststop >>{file}"))],
    });
    custom.run(&["--rm"], &hooks, "true").run().fails_with(&["the bridge is out of order", "exit status"]);
    assert_eq!(fs::read_to_string(&file).expect("the hook has written"), "poststop\n");
    Ok(())
}

fn a_hook_that_hangs_is_ended_at_its_timeout(lab: &Lab) -> Verdict {
    let custom = Custom::new(lab, "hanging");
    let mut hanging = hook("exec sleep 1000");
    hanging["timeout"] = json!(2);
    let said = custom.run(&["--rm"], &json!({ "createRuntime": [hanging] }), "true").run().fails();
    if lab.is_vz() {
        assert!(said.contains("/bin/sh") && said.contains("2 s"), "{said}");
    }
    Ok(())
}

fn a_client_that_gives_up_during_a_hook_leaves_nothing(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    let custom = Custom::new(lab, "impatient");
    let file = custom.said();
    let hooks = json!({
        "createRuntime": [hook(&format!("echo hook >>{file}; sleep 5"))],
        "poststop": [hook(&format!("echo poststop >>{file}"))],
    });
    let client = custom.run(&[], &hooks, "sleep 1000").start();
    until("the hook to be run", Duration::from_secs(60), || fs::read_to_string(&file).ok());
    client.signal(Signal::KILL);
    client.wait();
    lab.remove_clients_fifos();
    until("the sandbox's end", Duration::from_secs(30), || {
        let hooks_ran = fs::read_to_string(&file).ok().as_deref() == Some("hook\npoststop\n");
        (hooks_ran && host::find(&custom.id, Role::Shim).is_none()).then_some(())
    });
    Ok(())
}

fn poststop_hooks_run_after_a_crash(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    let custom = Custom::new(lab, "crash");
    let file = custom.said();
    let hooks = json!({ "createRuntime": [hook("true")], "poststop": [reporting("poststop", &file)] });
    custom.run(&["-d"], &hooks, "sleep 1000").run().ok();
    host::kill(&await_process(&custom.id, Role::Shim));
    until("the hook to be run", Duration::from_secs(30), || {
        (fs::read_to_string(&file).ok().as_deref() == Some("poststop stopped yes true none\n")).then_some(())
    });
    lab.remove_clients_fifos();
    Ok(())
}

fn a_missing_plugin_is_said(lab: &Lab) -> Verdict {
    let name = lab.id("plugin");
    let config = lab.devbox().join("cni/nerdctl").join(format!("nerdctl-{name}.conflist"));
    let text = json!({
        "cniVersion": "1.0.0", "name": name, "nerdctlID": "0".repeat(64), "nerdctlLabels": {},
        "plugins": [{ "type": "no-such-plugin" }],
    });
    fs::write(&config, text.to_string()).expect("write a network");
    let container = lab.id("container");
    let args = ["run", "--rm", "--name", &container, "--runtime", lab.runtime(), "--net", &name, BUSYBOX, "true"];
    let run = lab.nerdctl(&args).run();
    fs::remove_file(&config).expect("remove the network");
    run.fails_with(&["no-such-plugin"]);
    lab.nerdctl(&["rm", "-f", &container]).run();
    Ok(())
}

/// A named network namespace with a veth `eth0` in it, whose other end is in another; removed when dropped.
struct Named(String);

impl Named {
    #[track_caller]
    fn new(lab: &Lab) -> Self {
        let named = Self(lab.id("ns"));
        let name = &named.0;
        script(&format!(
            "ip netns add {name}; ip netns add {name}-far; ip -n {name} link set lo up
             ip -n {name} link add eth0 type veth peer name far netns {name}-far
             ip -n {name} addr add 192.0.2.2/24 dev eth0; ip -n {name} link set eth0 up
             ip -n {name}-far addr add 192.0.2.1/24 dev far; ip -n {name}-far link set far up"
        ));
        named
    }

    fn flag(&self) -> String {
        format!("network:/run/netns/{}", self.0)
    }

    /// What the sandbox has put into it.
    #[track_caller]
    fn traces(&self) -> String {
        script(&format!("ip netns exec {0} tc qdisc show dev eth0 ingress; ip -n {0} -br link show type tun", self.0))
    }
}

impl Drop for Named {
    fn drop(&mut self) {
        for name in [self.0.clone(), format!("{}-far", self.0)] {
            drop(Program::new("ip").args(["netns", "del", &name]).start().wait_at_most(Duration::from_secs(10)));
        }
    }
}

#[track_caller]
fn script(text: &str) -> String {
    Program::new("sh").args(["-ec", text]).run().ok()
}

fn a_named_namespace_is_used_and_given_back(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    let named = Named::new(lab);
    let script = "ip -4 -o addr show eth0; ping -c 2 -w 10 192.0.2.1 >/dev/null && echo answers";
    for _ in 0..2 {
        let id = lab.id("named");
        let said = lab.ctr_run(&["--rm", "--with-ns", &named.flag(), BUSYBOX, &id, "sh", "-c", script]).run().ok();
        assert!(said.contains("inet 192.0.2.2/24") && said.ends_with("answers"), "{said}");
        until("the namespace to be given back", Duration::from_secs(10), || named.traces().is_empty().then_some(()));
    }
    // While one sandbox has it, another has not.
    let first = lab.id("first");
    lab.ctr_run(&["-d", "--with-ns", &named.flag(), BUSYBOX, &first, "sleep", "1000"]).run().ok();
    let second = lab.id("second");
    let refused = lab.ctr_run(&["--rm", "--with-ns", &named.flag(), BUSYBOX, &second, "true"]).run();
    refused.fails_with(&["used by another sandbox"]);
    for id in [&first, &second] {
        lab.ctr(&["task", "rm", "-f", id]).run();
        lab.ctr(&["containers", "rm", id]).run();
    }
    until("the namespace to be given back", Duration::from_secs(10), || named.traces().is_empty().then_some(()));
    Ok(())
}

fn a_named_namespace_is_given_back_after_a_crash(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    let named = Named::new(lab);
    let id = lab.id("crash");
    lab.ctr_run(&["-d", "--with-ns", &named.flag(), BUSYBOX, &id, "sleep", "1000"]).run().ok();
    assert!(named.traces().contains("lovz0"), "{}", named.traces());
    host::kill(&await_process(&id, Role::Shim));
    until("the namespace to be given back", Duration::from_secs(30), || named.traces().is_empty().then_some(()));
    lab.remove_clients_fifos();
    lab.ctr(&["task", "rm", "-f", &id]).run();
    lab.ctr(&["containers", "rm", &id]).run().ok();
    Ok(())
}

fn a_namespace_that_is_removed_meanwhile_does_no_harm(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    let named = Named::new(lab);
    let id = lab.id("removed");
    lab.ctr_run(&["-d", "--with-ns", &named.flag(), BUSYBOX, &id, "sleep", "1000"]).run().ok();
    drop(named);
    let exec = |script: &str| lab.ctr(&["task", "exec", "--exec-id", &lab.id("exec"), &id, "sh", "-c", script]).run();
    assert_eq!(exec("ping -c 1 -w 5 127.0.0.1 >/dev/null && echo well").ok(), "well");
    lab.ctr(&["task", "rm", "-f", &id]).run().ok();
    lab.ctr(&["containers", "rm", &id]).run().ok();
    Ok(())
}

fn links_of_other_kinds_are_connected(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    for kind in ["macvlan mode bridge", "ipvlan mode l2"] {
        let named = Named::new(lab);
        // On the far side: a cable, whose one end has an address, and on whose other end the link is.
        let made = Program::new("sh")
            .args(["-c", &format!(
                "set -e; far={0}-far; ip -n $far link add cable type veth peer name end; ip -n $far addr add 198.51.100.1/24 dev end; \
                 ip -n $far link set cable up; ip -n $far link set end up; \
                 ip -n $far link add link cable name other netns {0} type {kind}; \
                 ip -n {0} addr add 198.51.100.2/24 dev other; ip -n {0} link set other up",
                named.0
            )])
            .run();
        if made.code() != 0 {
            return Err(vz_suite::Skip(format!("the host has no links of the type {kind}: {made}")));
        }
        let id = lab.id("kind");
        let look = "ip -4 -o addr show other; ping -c 2 -w 10 198.51.100.1 >/dev/null && echo answers";
        let said = lab.ctr_run(&["--rm", "--with-ns", &named.flag(), BUSYBOX, &id, "sh", "-c", look]).run().ok();
        assert!(said.contains("inet 198.51.100.2/24") && said.ends_with("answers"), "{kind}: {said}");
    }
    Ok(())
}

fn links_that_cannot_be_connected_are_named(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    let named = Named::new(lab);
    let run = || {
        let id = lab.id("refused");
        let said = lab.ctr_run(&["--rm", "--with-ns", &named.flag(), BUSYBOX, &id, "true"]).run().fails();
        lab.ctr(&["containers", "rm", &id]).run();
        said
    };
    script(&format!("ip -n {0} link add br7 type bridge; ip -n {0} link set br7 up", named.0));
    let said = run();
    assert!(said.contains("br7 (bridge)") && said.contains("veth"), "{said}");
    script(&format!("ip -n {} link del br7", named.0));
    for number in 1..=6 {
        script(&format!(
            "ip -n {0} link add eth{number} type veth peer name p{number} netns {0}-far; ip -n {0} link set eth{number} up",
            named.0
        ));
    }
    let said = run();
    assert!(said.contains("no network card is left for link eth4"), "{said}");
    Ok(())
}

/// At several points of a creation with a network: what CNI has made is taken away by the hooks.
fn killed_while_connecting(lab: &Lab, role: Role) -> Verdict {
    lab.vz_only()?;
    for delay in [0, 50, 100, 150, 200, 300, 700] {
        let name = lab.id("killed");
        let args = [
            "run",
            "-d",
            "--name",
            &name,
            "--runtime",
            lab.runtime(),
            "-p",
            "127.0.0.1:18090:80",
            BUSYBOX,
            "sleep",
            "1000",
        ];
        let run = lab.nerdctl(&args).start();
        let id = until("the container", Duration::from_secs(20), || {
            let list = lab.ctr(&["containers", "ls", "-q"]).run().ok();
            list.lines().find(|id| id.len() == 64).map(str::to_owned)
        });
        let process = await_process(&id, role);
        // Not to wait for anything: to be at another point of the creation each time.
        thread::sleep(Duration::from_millis(delay));
        host::kill(&process);
        run.wait();
        until("the container to be removed", Duration::from_secs(30), || {
            lab.nerdctl(&["rm", "-f", &name]).run();
            (lab.ctr(&["containers", "info", &id]).run().code() != 0).then_some(())
        });
    }
    Ok(())
}

fn the_shim_is_killed_while_it_connects(lab: &Lab) -> Verdict {
    if patience() > 1 {
        // Killed in the middle of its work, a plugin leaves what nobody else knows of.
        return Err(vz_suite::Skip(
            "on a host this slow a CNI plugin takes longer than the 3 s it has after its shim".into(),
        ));
    }
    killed_while_connecting(lab, Role::Shim)
}

fn the_vmm_is_killed_while_it_connects(lab: &Lab) -> Verdict {
    killed_while_connecting(lab, Role::Vmm)
}

/// With `VZ_TEST_SOAK=1` a hundred: nothing is left of any. It prints what the first and the last took.
fn many_sandboxes_come_and_go(lab: &Lab) -> Verdict {
    let times = lab.times(5, 100);
    let took: Vec<Duration> = (0..times)
        .map(|_| {
            let begun = Instant::now();
            let name = lab.id("many");
            let args = ["run", "--rm", "--name", &name, "--runtime", lab.runtime(), BUSYBOX, "ip", "route"];
            let said = lab.nerdctl(&args).run().ok();
            assert!(said.contains("default via"), "{said}");
            begun.elapsed()
        })
        .collect();
    let median = |part: &[Duration]| {
        let mut part = part.to_vec();
        part.sort();
        part[part.len() / 2]
    };
    let part = times.div_ceil(5);
    println!(
        "  {times} sandboxes: {} ms at first, {} ms at last",
        median(&took[..part]).as_millis(),
        median(&took[times - part..]).as_millis()
    );
    Ok(())
}
