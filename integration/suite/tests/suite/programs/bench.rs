//! `vz-linux-bench`: what it measures, what it asks of the guest, and what it says when a boot is none.

use std::{
    fs,
    io::{Read, Write},
    net::{Ipv4Addr, TcpListener},
    path::Path,
    thread,
    time::Duration,
};

use rustix::process::Signal;
use serde_json::Value;
use vz_suite::{Lab, Skip, Verdict, command::Program, poll::until, tests};

tests![
    every_boot_and_phase_is_told,
    instructions_up_to_init_are_the_same_in_every_boot,
    commands_run_and_urls_are_fetched_in_the_guest,
    a_root_file_system_of_the_hosts_is_booted,
    what_cannot_be_booted_is_named,
    a_boot_without_an_end_is_ended,
];

/// Of an agent's boot, in order.
const PHASES: [&str; 7] = ["host", "early", "core", "initcalls", "memory", "exec", "agent"];
/// A kernel that waits for its root file system for ever.
const HANGS: &str = "rdinit=/none root=/dev/none rootwait";

/// The program, on the bundle and machine that are tested, with temporary files in `dir`.
fn bench(lab: &Lab, dir: &Path, args: &[&str]) -> Program {
    let program = lab.shim().with_file_name("vz-linux-bench");
    assert!(program.exists(), "{} does not exist: run `make build`", program.display());
    let bundle = lab.bundle().display().to_string();
    let machine = lab.machine();
    let given = ["--bundle-dir", &bundle, "--machine", &machine];
    let place = |option: &str| args.contains(&option);
    let given = if place("--bundle-dir") || place("--instructions") { &given[..0] } else { &given[..] };
    Program::new(program).args(given).args(args).env("TMPDIR", dir)
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"))
}

/// Numbers of a phase or figure.
fn values(of: &Value, name: &str) -> Vec<u64> {
    let found = of.as_array().expect("a list").iter().find(|series| series["name"] == name);
    let found = found.unwrap_or_else(|| panic!("no {name} in {of:#}"));
    found["values"].as_array().expect("values").iter().map(|value| value.as_u64().expect("a number")).collect()
}

fn is_empty(dir: &Path) -> bool {
    fs::read_dir(dir).expect("list a directory").next().is_none()
}

fn every_boot_and_phase_is_told(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    let (dir, kernel, plot) = (lab.dir(), lab.dir(), lab.dir());
    // A kernel by itself, which is the bundle's.
    fs::copy(lab.bundle().join("vmlinux"), kernel.path().join("vmlinux")).expect("copy the kernel");
    let (compare, svg) = (kernel.path().display().to_string(), plot.path().join("p.svg").display().to_string());
    let args = ["--iterations", "2", "--json", "--compare", &compare, "--plot", &svg];
    let text = bench(lab, dir.path(), &args).run().ok();
    let report = json(&text);
    assert_eq!((&report["schema"], &report["unit"]), (&1.into(), &"ns".into()));
    assert!(report["machine"] == "qemu" || report["machine"] == "kvm", "{report:#}");
    let version = json(&fs::read_to_string(lab.bundle().join("version.json")).expect("read version.json"));
    let subjects = report["subjects"].as_array().expect("subjects");
    assert_eq!(subjects.len(), 2);
    assert_eq!(subjects[0]["kernel_version"], version["kernel_version"]);
    assert_eq!(subjects[1]["kernel_version"], Value::Null);
    for subject in subjects {
        let names: Vec<_> = subject["phases"].as_array().expect("phases").iter().map(|phase| &phase["name"]).collect();
        assert_eq!(names, PHASES);
        let sum = |index: usize| PHASES.iter().map(|name| values(&subject["phases"], name)[index]).sum::<u64>();
        let wall = values(&subject["figures"], "wall");
        assert_eq!(wall.len(), 2);
        for (index, wall) in wall.iter().enumerate() {
            // Phases do not overlap and leave nothing out, but for rounding.
            assert!(sum(index).abs_diff(*wall) < 1000, "{} {wall}", sum(index));
        }
        let init = values(&subject["figures"], "init");
        let hello = values(&subject["figures"], "hello");
        assert!(init.iter().zip(&hello).zip(&wall).all(|((init, hello), wall)| init < hello && hello < wall));
    }
    let figures: Vec<_> = report["compare"].as_array().expect("ratios").iter().map(|ratio| &ratio["figure"]).collect();
    assert_eq!(figures, ["wall", "init", "hello", "hello_without_agent"]);
    let drawn = fs::read_to_string(&svg).expect("read the drawing");
    assert!(drawn.starts_with("<svg ") && drawn.matches("<circle").count() == 4, "{drawn}");
    assert!(is_empty(dir.path()));
    Ok(())
}

fn instructions_up_to_init_are_the_same_in_every_boot(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    if lab.machine() == "kvm" {
        return Err(Skip("instructions are counted by QEMU's emulation, and the machine is kvm".into()));
    }
    let dir = lab.dir();
    let bundle = lab.bundle().display().to_string();
    let args = ["--bundle-dir", &bundle, "--instructions", "--iterations", "3", "--json"];
    let report = json(&bench(lab, dir.path(), &args).run().ok());
    assert_eq!((&report["unit"], &report["machine"]), (&"instructions".into(), &"qemu".into()));
    let figures = &report["subjects"][0]["figures"];
    let init = values(figures, "init");
    assert!(init.iter().all(|count| *count == init[0]), "{init:?}");
    let without_agent = values(figures, "hello_without_agent");
    assert!(without_agent.iter().all(|count| (1_000_000..200_000_000).contains(count)), "{without_agent:?}");
    Ok(())
}

fn needs_busybox() -> Verdict {
    if Path::new("/bin/busybox").exists() { Ok(()) } else { Err(Skip("there is no /bin/busybox for the guest".into())) }
}

fn commands_run_and_urls_are_fetched_in_the_guest(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    needs_busybox()?;
    let dir = lab.dir();
    // Refuses the first connection: a server that is not ready yet.
    let server = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("listen");
    let port = server.local_addr().expect("a port").port();
    let served = thread::spawn(move || {
        drop(server.accept().expect("the first connection"));
        for _ in 0..2 {
            let (mut client, _) = server.accept().expect("a connection");
            let mut request = [0; 4096];
            let length = client.read(&mut request).expect("a request");
            let request = String::from_utf8_lossy(&request[..length]).into_owned();
            assert!(request.starts_with("GET /a%20b?c=d HTTP/1.1\r\n"), "{request}");
            let body = "x".repeat(12_345);
            write!(client, "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}", body.len())
                .expect("answer");
        }
    });
    let url = format!("http://127.0.0.1:{port}/a%20b?c=d");
    let command = "uname -r; dmesg | grep -c 'Linux version'; echo \"it's\" on stderr >&2; exit 7";
    let args = [
        "--iterations",
        "1",
        "--json",
        "--guest-logs=5",
        "--guest-log-command",
        command,
        "--http-smoke-url",
        &url,
        "--retry-log-every",
        "1",
    ];
    let output = bench(lab, dir.path(), &args).run();
    let report = json(&output.ok());
    served.join().expect("the server");
    let subject = &report["subjects"][0];
    let boot = &subject["boots"][0];
    assert_eq!(boot["command"]["status"], 7);
    let said = format!("{}\n1\nit's on stderr\n", subject["kernel_version"].as_str().expect("a version"));
    assert_eq!(boot["command"]["output"], said);
    // The boot that warms up has met the server that was not ready.
    assert_eq!((&boot["fetch"]["bytes"], &boot["fetch"]["attempts"]), (&12_345.into(), &1.into()));
    let told = output.errors();
    assert!(told.contains("attempt 1: wget"), "{told}");
    assert!(told.contains("the end of the kernel's log") && told.contains("]     /init"), "{told}");
    assert_eq!(values(&subject["figures"], "fetch").len(), 1);
    // A command that does not end is ended.
    let args = ["--iterations", "1", "--timeout-secs", "8", "--guest-log-command", "sleep 1000"];
    bench(lab, dir.path(), &args).run().exits(1).fails_with(&["took longer than 8 s (--timeout-secs)"]);
    Ok(())
}

fn a_root_file_system_of_the_hosts_is_booted(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    needs_busybox()?;
    let (dir, root) = (lab.dir(), lab.dir());
    fs::write(root.path().join("from-the-host"), "here\n").expect("write a file");
    let rootfs = root.path().display().to_string();
    // The directory has no shell of its own.
    let command = "cat /from-the-host; echo new >/written && cat /written; id -u";
    let args = ["--iterations", "2", "--json", "--rootfs-dir", &rootfs, "--guest-log-command", command];
    let report = json(&bench(lab, dir.path(), &args).run().ok());
    let subject = &report["subjects"][0];
    let names: Vec<_> = subject["phases"].as_array().expect("phases").iter().map(|phase| &phase["name"]).collect();
    assert_eq!(names, ["core", "initcalls", "memory", "exec", "mount", "chroot"]);
    let total: u64 = names.iter().map(|name| values(&subject["phases"], name.as_str().expect("a name"))[0]).sum();
    assert_eq!(total, values(&subject["figures"], "chroot")[0]);
    for boot in subject["boots"].as_array().expect("boots") {
        assert_eq!((&boot["command"]["status"], &boot["command"]["output"]), (&0.into(), &"here\nnew\n0\n".into()));
    }
    let left: Vec<_> =
        fs::read_dir(root.path()).expect("list").map(|entry| entry.expect("entry").file_name()).collect();
    assert_eq!(left, ["from-the-host"]);
    assert!(is_empty(dir.path()));
    // What init cannot do is said in its own words.
    fs::write(root.path().join("dev"), "no directory").expect("write a file");
    let said = bench(lab, dir.path(), &["--iterations", "1", "--rootfs-dir", &rootfs]).run();
    said.exits(1).fails_with(&["make directories in the root file system", "root/dev"]);
    Ok(())
}

fn what_cannot_be_booted_is_named(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    let (dir, bad) = (lab.dir(), lab.dir());
    let path = bad.path().display().to_string();
    let none = ["--bundle-dir", &path, "--iterations", "1"];
    bench(lab, dir.path(), &none).run().exits(1).fails_with(&["no guest bundle"]);
    for name in ["vmlinux", "initramfs.img", "youki", "version.json"] {
        fs::copy(lab.bundle().join(name), bad.path().join(name)).expect("copy the bundle");
    }
    let initramfs = bad.path().join("initramfs.img");
    let mut content = fs::read(&initramfs).expect("read the initramfs");
    content[100_000] ^= 1;
    fs::write(&initramfs, content).expect("write the initramfs");
    bench(lab, dir.path(), &none).run().exits(1).fails_with(&["initramfs.img", "sha256"]);
    let empty = dir.path().display().to_string();
    let args = ["--iterations", "1", "--compare", &empty];
    bench(lab, dir.path(), &args).run().exits(1).fails_with(&[&empty, "neither a guest bundle", "bzImage"]);
    let args = ["--guest-log-command", "true", "--busybox", "/etc/passwd"];
    bench(lab, dir.path(), &args).run().exits(1).fails_with(&["/etc/passwd", "static"]);
    for wrong in [
        &["--iterations", "0"][..],
        &["--http-smoke-url", "gopher://x"],
        &["--http-smoke-url", "http://x", "--rootfs-dir", "/"],
    ] {
        bench(lab, dir.path(), wrong).run().exits(2).fails_with(&[wrong[0]]);
    }
    bench(lab, dir.path(), &["--instructions", "--vcpus", "2"]).run().exits(1).fails_with(&["--vcpus"]);
    assert!(is_empty(dir.path()));
    Ok(())
}

fn a_boot_without_an_end_is_ended(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    let dir = lab.dir();
    let args = ["--iterations", "1", "--timeout-secs", "6", "--append", HANGS];
    let output = bench(lab, dir.path(), &args).run();
    let said = output.exits(1).fails_with(&["boot to warm up", "did not connect within 6.0 s"]);
    assert!(said.contains("the last that the guest said:"), "{said}");
    // Told to end, it ends its VM and its files.
    let running = bench(lab, dir.path(), &["--iterations", "1", "--timeout-secs", "80", "--append", HANGS]).start();
    let begun = || (!is_empty(dir.path())).then_some(());
    until("the boot to begin", Duration::from_secs(20), begun);
    running.signal(Signal::TERM);
    running.wait().exits(1).fails_with(&["terminated"]);
    assert!(is_empty(dir.path()));
    Ok(())
}
