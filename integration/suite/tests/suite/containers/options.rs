//! What a client says about a process and its limits is what the process gets.

use std::time::Duration;

use vz_suite::{
    Lab, Verdict,
    container::Container,
    events::Recorder,
    lab::{BUSYBOX, DEBIAN},
    poll::until,
    tests,
};

tests![
    user_workdir_env_hostname_and_limits_are_set,
    capabilities_are_dropped_and_added,
    image_defaults_are_used,
    a_memory_limit_is_enforced,
    a_pids_limit_is_enforced,
    metrics_tell_use_and_limits,
];

fn user_workdir_env_hostname_and_limits_are_set(lab: &Lab) -> Verdict {
    let args = ["--rm", "--user", "1234:567", "--workdir", "/usr", "-e", "GREETING=hello you", "--hostname", "mine"];
    let more = ["--ulimit", "nofile=321:654", "--sysctl", "net.ipv4.ip_forward=1", "--label", "x=y"];
    let script =
        "id -u; id -g; pwd; echo $GREETING; hostname; ulimit -n; ulimit -Hn; cat /proc/sys/net/ipv4/ip_forward";
    let said = lab.nerdctl_run(&args).args(more).args([DEBIAN, "bash", "-c", script]).run().ok();
    assert_eq!(said, "1234\n567\n/usr\nhello you\nmine\n321\n654\n1");
    Ok(())
}

fn capabilities_are_dropped_and_added(lab: &Lab) -> Verdict {
    let script = "grep CapEff /proc/self/status; grep NoNewPrivs /proc/self/status; grep Seccomp: /proc/self/status";
    let effective = |flags: &[&str]| {
        let said = lab.nerdctl_run(&["--rm"]).args(flags).args([BUSYBOX, "sh", "-c", script]).run().ok();
        let value = |key: &str| {
            let line =
                said.lines().find_map(|line| line.strip_prefix(key)).unwrap_or_else(|| panic!("{key} in {said}"));
            u64::from_str_radix(line.trim(), 16).expect("a number")
        };
        (value("CapEff:"), value("NoNewPrivs:"), value("Seccomp:"))
    };
    // chown is 0, net_raw 13, sys_admin 21
    let (default, _, filter) = effective(&[]);
    assert_eq!((default & 1, default >> 13 & 1, default >> 21 & 1, filter), (1, 1, 0, 2));
    let (changed, ..) = effective(&["--cap-drop", "CHOWN", "--cap-add", "SYS_ADMIN"]);
    assert_eq!((changed & 1, changed >> 13 & 1, changed >> 21 & 1), (0, 1, 1));
    let (none, no_new_privileges, filter) = effective(&[
        "--cap-drop",
        "ALL",
        "--security-opt",
        "no-new-privileges",
        "--security-opt",
        "seccomp=unconfined",
    ]);
    assert_eq!((none, no_new_privileges, filter), (0, 1, 0));
    Ok(())
}

fn image_defaults_are_used(lab: &Lab) -> Verdict {
    let said = lab.nerdctl_run(&["--rm", "--entrypoint", "sh", BUSYBOX, "-c", "echo $PATH; pwd; id -un"]).run().ok();
    assert_eq!(said, "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\n/\nroot");
    Ok(())
}

fn a_memory_limit_is_enforced(lab: &Lab) -> Verdict {
    let events = Recorder::start(lab);
    // Little by little: a guest refuses at once what is more than all of its memory.
    let hog = "x = []\nwhile True: x.append(b'x' * (1 << 20))";
    let container = Container::start(lab, "oom", &["--memory", "64m", DEBIAN, "python3", "-c", hog]);
    assert_eq!(container.nerdctl("wait").ok(), "137");
    events.expect(&container.id, "/tasks/oom");
    container.remove();
    // Within the limit all is well.
    let modest = "x = bytearray(16 << 20); print(len(x))";
    let said = lab.nerdctl_run(&["--rm", "--memory", "64m", DEBIAN, "python3", "-c", modest]).run().ok();
    assert_eq!(said, "16777216");
    Ok(())
}

fn a_pids_limit_is_enforced(lab: &Lab) -> Verdict {
    let script = r"
import os
n = 0
try:
    for n in range(200):
        if os.fork() == 0:
            os.read(0, 1) or os.pause() if hasattr(os, 'pause') else __import__('signal').pause()
except OSError as e:
    print(n, e.strerror)
os.kill(0, 9)
";
    let output = lab.nerdctl_run(&["--rm", "-i", "--pids-limit", "20", DEBIAN, "python3", "-uc", script]).run();
    assert_eq!(output.text(), "19 Resource temporarily unavailable", "{output}");
    Ok(())
}

fn metrics_tell_use_and_limits(lab: &Lab) -> Verdict {
    let burn = "while :; do :; done & exec sleep 1000";
    let args = ["--memory", "64m", "--pids-limit", "50", BUSYBOX, "sh", "-c", burn];
    let container = Container::start(lab, "metrics", &args);
    let read = || {
        let text = lab.ctr(&["task", "metrics", "--format", "json", &container.id]).run().ok();
        serde_json::from_str::<serde_json::Value>(&text).unwrap_or_else(|e| panic!("{e}: {text}"))
    };
    let cpu = |metrics: &serde_json::Value| match &metrics["cpu"]["usage_usec"] {
        serde_json::Value::Null => metrics["cpu"]["usage"]["total"].as_u64().unwrap_or_default() / 1000,
        number => number.as_u64().unwrap_or_default(),
    };
    let first = read();
    until("CPU time to grow", Duration::from_secs(30), || (cpu(&read()) > cpu(&first) + 50_000).then_some(()));
    until("both processes", Duration::from_secs(10), || (read()["pids"]["current"] == 2).then_some(()));
    assert_eq!(first["pids"]["limit"], 50, "{first}");
    if lab.is_vz() {
        assert_eq!(first["memory"]["usage_limit"], 64 << 20, "{first}");
        assert!(first["memory"]["usage"].as_u64().is_some_and(|n| n > 4096), "{first}");
    }
    // The client prints zeros where it is slow to collect.
    until("what nerdctl makes of it", Duration::from_secs(10), || {
        let format = ["--format", "{{.MemUsage}} {{.PIDs}}", &container.name];
        let stats = lab.nerdctl(&["stats", "--no-stream"]).args(format).run().ok();
        (stats.contains("64MiB") && stats.ends_with(" 2")).then_some(())
    });
    Ok(())
}
