//! Pods through crictl. Each test is done in both ways of containerd, unless it is about one of them.

use std::{fs, path::PathBuf, time::Duration};

use serde_json::{Value, json};
use vz_suite::{
    Lab, Skip, Verdict,
    command::Program,
    host::{self, Role, find},
    lab::{BUSYBOX, LIMITS},
    poll::{patiently, until},
    tests,
};

tests![
    containers_share_network_shared_memory_and_hostname,
    a_pod_outlives_its_containers,
    processes_are_shared_where_a_pod_says_so,
    limits_change_while_a_container_runs,
    a_container_without_memory_is_oom_killed,
    a_pods_names_reach_its_containers,
    the_hosts_namespaces_are_refused,
    nothing_is_left_of_a_pod_whose_shim_is_killed,
    a_pod_ends_with_its_vm,
    a_pod_survives_containerds_restart,
];

/// containerd's names of both ways.
const HANDLERS: [&str; 2] = ["vz", "vz-sandbox"];
const SOON: Duration = Duration::from_secs(60);

/// A pod; dropping it removes it.
struct Pod<'l> {
    lab: &'l Lab,
    id: String,
    config: PathBuf,
    dir: tempfile::TempDir,
}

/// crictl, or why not.
fn crictl(lab: &Lab, args: &[&str]) -> Result<Program, Skip> {
    let path = lab.env().iter().rev().find(|(key, _)| key == "PATH").map_or("", |(_, value)| value.as_str());
    let there = path.split(':').any(|dir| std::path::Path::new(dir).join("crictl").exists());
    if !there {
        return Err(Skip("crictl is not built: integration/devbox tools --cri".into()));
    }
    Ok(lab.crictl(args))
}

/// Runs a test in both ways.
fn each(lab: &Lab, test: impl Fn(&'static str) -> Verdict) -> Verdict {
    lab.vz_only()?;
    HANDLERS.into_iter().try_for_each(test)
}

impl<'l> Pod<'l> {
    /// A pod's description for crictl, in a directory of its own.
    fn describe(lab: &'l Lab, change: impl FnOnce(&mut Value)) -> (Value, tempfile::TempDir) {
        let name = lab.id("pod");
        let dir = lab.dir();
        let mut config = json!({
            "metadata": { "name": name, "namespace": "vzt", "uid": name, "attempt": 1 },
            "hostname": "web", "log_directory": dir.path(), "linux": {},
        });
        change(&mut config);
        (config, dir)
    }

    fn try_run(lab: &'l Lab, handler: &str, change: impl FnOnce(&mut Value)) -> Result<Result<Self, String>, Skip> {
        let (config, dir) = Self::describe(lab, change);
        let file = dir.path().join("pod.json");
        fs::write(&file, config.to_string()).expect("write the pod's description");
        let said = crictl(lab, &["runp", "-T", "90s", "-r", handler, &file.display().to_string()])?.run();
        if said.code() != 0 {
            return Ok(Err(said.fails()));
        }
        Ok(Ok(Self { lab, id: said.text().trim().to_owned(), config: file, dir }))
    }

    fn run(lab: &'l Lab, handler: &str, change: impl FnOnce(&mut Value)) -> Result<Self, Skip> {
        Ok(Self::try_run(lab, handler, change)?.expect("run a pod"))
    }

    /// Starts a container of busybox with a shell's script; its id.
    fn container(&self, name: &str, script: &str, change: impl FnOnce(&mut Value)) -> String {
        let mut config = json!({
            "metadata": { "name": name }, "image": { "image": BUSYBOX }, "command": ["sh", "-c", script],
            "log_path": format!("{name}.log"), "linux": {},
        });
        change(&mut config);
        let file = self.dir.path().join(format!("{name}.json"));
        fs::write(&file, config.to_string()).expect("write the container's description");
        let (file, pod) = (file.display().to_string(), self.config.display().to_string());
        let id = self.lab.crictl(&["create", "-T", "60s", &self.id, &file, &pod]).run().ok().trim().to_owned();
        self.lab.crictl(&["start", &id]).run().ok();
        id
    }

    fn exec(&self, container: &str, script: &str) -> String {
        self.lab.crictl(&["exec", container, "sh", "-c", script]).run().ok().trim().to_owned()
    }

    fn inspect(&self, container: &str) -> Value {
        let said = self.lab.crictl(&["inspect", container]).run().ok();
        serde_json::from_str::<Value>(&said).expect("what crictl says")["status"].clone()
    }

    fn await_exit(&self, container: &str) -> Value {
        until("the container to end", patiently(SOON), || {
            let status = self.inspect(container);
            (status["state"] == "CONTAINER_EXITED").then_some(status)
        })
    }

    /// Its state; nothing while containerd does not know, as when it has just lost the shim.
    fn state(&self) -> Option<String> {
        let said = self.lab.crictl(&["inspectp", &self.id]).run();
        let said: Value = serde_json::from_str(&said.text()).ok()?;
        said["status"]["state"].as_str().map(str::to_owned)
    }

    fn is_ready(&self) -> bool {
        self.state().as_deref() == Some("SANDBOX_READY")
    }

    fn await_not_ready(&self) {
        until("the pod not to be ready", patiently(SOON), || {
            (self.state().as_deref() == Some("SANDBOX_NOTREADY")).then_some(())
        });
    }
}

impl Drop for Pod<'_> {
    fn drop(&mut self) {
        // Removal that fails shows as something that is left.
        drop(self.lab.crictl(&["rmp", "-f", &self.id]).run());
    }
}

fn containers_share_network_shared_memory_and_hostname(lab: &Lab) -> Verdict {
    each(lab, |handler| {
        // CONTAINER, which is what pods without shareProcessNamespace have.
        let own =
            |config: &mut Value| config["linux"]["security_context"] = json!({ "namespace_options": { "pid": 1 } });
        let pod = Pod::run(lab, handler, own)?;
        let one = pod.container("one", "echo from one >/dev/shm/word; nc -l -p 7000 -e cat; sleep 1000", own);
        let two = pod.container("two", "sleep 1000", own);
        assert_eq!(pod.exec(&two, "cat /dev/shm/word; hostname; cat /etc/hostname"), "from one\nweb\nweb");
        assert_eq!(pod.exec(&two, "echo hello | nc 127.0.0.1 7000"), "hello");
        for (kind, is_shared) in [("ipc", true), ("uts", true), ("net", true), ("pid", false), ("mnt", false)] {
            let namespace = |container: &str| pod.exec(container, &format!("readlink /proc/self/ns/{kind}"));
            assert_eq!(namespace(&one) == namespace(&two), is_shared, "{kind}");
        }
        Ok(())
    })
}

fn a_pod_outlives_its_containers(lab: &Lab) -> Verdict {
    each(lab, |handler| {
        let pod = Pod::run(lab, handler, |_| ())?;
        for attempt in 0..3 {
            let init = pod.container(&format!("init{attempt}"), &format!("exit {attempt}"), |_| ());
            assert_eq!(pod.await_exit(&init)["exitCode"], attempt);
            lab.crictl(&["rm", &init]).run().ok();
        }
        assert!(pod.is_ready());
        let main = pod.container("main", "sleep 1000", |_| ());
        assert_eq!(pod.exec(&main, "echo here"), "here");
        lab.crictl(&["stopp", &pod.id]).run().ok();
        assert!(!pod.is_ready());
        // Once more is no error.
        lab.crictl(&["stopp", &pod.id]).run().ok();
        Ok(())
    })
}

fn processes_are_shared_where_a_pod_says_so(lab: &Lab) -> Verdict {
    each(lab, |handler| {
        // POD, which is what shareProcessNamespace becomes.
        let shared = json!({ "namespace_options": { "pid": 0 } });
        let pod = Pod::run(lab, handler, |pod| pod["linux"]["security_context"] = shared.clone())?;
        let with = |container: &mut Value| container["linux"]["security_context"] = shared.clone();
        pod.container("one", "exec sleep 4321", with);
        let two = pod.container("two", "sleep 1000", with);
        assert!(pod.exec(&two, "ps").contains("sleep 4321"));
        // The pause container reaps what others leave behind.
        pod.exec(&two, "(sleep 0 & exec true) & sleep 1");
        assert_eq!(pod.exec(&two, "ps -o stat | grep -c ^Z || true"), "0");
        Ok(())
    })
}

fn limits_change_while_a_container_runs(lab: &Lab) -> Verdict {
    each(lab, |handler| {
        let pod = Pod::run(lab, handler, |_| ())?;
        let limit = json!({ "memory_limit_in_bytes": 64 << 20, "cpu_period": 100_000, "cpu_quota": 50_000 });
        let id = pod.container("main", "sleep 1000", |container| container["linux"]["resources"] = limit);
        let figures = || pod.exec(&id, LIMITS);
        assert_eq!(figures(), format!("{}\n50000 100000", 64 << 20));
        let (more, quota) = ((128 << 20).to_string(), "80000".to_owned());
        lab.crictl(&["update", "--memory", &more, "--cpu-quota", &quota, "--cpu-period", "100000", &id]).run().ok();
        assert_eq!(figures(), format!("{more}\n80000 100000"));
        let huge = (1_u64 << 40).to_string();
        lab.crictl(&["update", "--memory", &huge, &id])
            .run()
            .fails_with(&["memory limit of 1048576 MiB", "vm.memory_mib"]);
        assert_eq!(figures(), format!("{more}\n80000 100000"));
        Ok(())
    })
}

fn a_container_without_memory_is_oom_killed(lab: &Lab) -> Verdict {
    each(lab, |handler| {
        let pod = Pod::run(lab, handler, |_| ())?;
        let script = "x=a; while :; do x=$x$x; done";
        let limit = json!({ "memory_limit_in_bytes": 32 << 20 });
        let id = pod.container("main", script, |container| container["linux"]["resources"] = limit);
        let status = pod.await_exit(&id);
        assert_eq!((&status["reason"], &status["exitCode"]), (&json!("OOMKilled"), &json!(137)), "{status}");
        assert!(pod.is_ready());
        Ok(())
    })
}

fn a_pods_names_reach_its_containers(lab: &Lab) -> Verdict {
    each(lab, |handler| {
        let dns = json!({ "servers": ["10.9.8.7"], "searches": ["a.test"], "options": ["ndots:5"] });
        let pod = Pod::run(lab, handler, |pod| {
            pod["dns_config"] = dns;
            pod["linux"]["sysctls"] = json!({ "net.core.somaxconn": "123", "kernel.shmmax": "65536" });
        })?;
        let id = pod.container("main", "sleep 1000", |_| ());
        assert_eq!(pod.exec(&id, "cat /etc/resolv.conf"), "search a.test\nnameserver 10.9.8.7\noptions ndots:5");
        let sysctls = "cat /proc/sys/net/core/somaxconn /proc/sys/kernel/shmmax";
        assert_eq!(pod.exec(&id, sysctls), "123\n65536");
        assert!(pod.exec(&id, "cat /etc/hosts").contains("localhost"));
        Ok(())
    })
}

fn the_hosts_namespaces_are_refused(lab: &Lab) -> Verdict {
    each(lab, |handler| {
        let refused = Pod::try_run(lab, handler, |pod| {
            pod["linux"]["security_context"] = json!({ "namespace_options": { "network": 2 } });
        })?;
        let error = refused.err().expect("a pod in the host's network is refused");
        assert!(error.contains("network") && error.contains("VM"), "{error}");
        Ok(())
    })
}

fn nothing_is_left_of_a_pod_whose_shim_is_killed(lab: &Lab) -> Verdict {
    each(lab, |handler| {
        let pod = Pod::run(lab, handler, |_| ())?;
        let containers = ["one", "two"].map(|name| pod.container(name, "sleep 1000", |_| ()));
        let shim = find(&pod.id, Role::Shim).expect("the pod's shim");
        host::kill(&shim);
        pod.await_not_ready();
        until("the VM to end", patiently(SOON), || find(&pod.id, Role::Vmm).is_none().then_some(()));
        for container in &containers {
            pod.await_exit(container);
        }
        Ok(())
    })
}

fn a_pod_ends_with_its_vm(lab: &Lab) -> Verdict {
    each(lab, |handler| {
        let pod = Pod::run(lab, handler, |_| ())?;
        let id = pod.container("main", "sleep 1000", |_| ());
        host::kill(&find(&pod.id, Role::Vmm).expect("the pod's vmm"));
        assert_eq!(pod.await_exit(&id)["exitCode"], 137);
        pod.await_not_ready();
        Ok(())
    })
}

fn a_pod_survives_containerds_restart(lab: &Lab) -> Verdict {
    each(lab, |handler| {
        let pod = Pod::run(lab, handler, |_| ())?;
        let id = pod.container("main", "sleep 1000", |_| ());
        host::kill(&lab.containerd());
        lab.start_containerd();
        assert!(pod.is_ready());
        assert_eq!(pod.exec(&id, "hostname"), "web");
        let more = pod.container("more", "sleep 1000", |_| ());
        assert_eq!(pod.exec(&more, "hostname"), "web");
        Ok(())
    })
}
