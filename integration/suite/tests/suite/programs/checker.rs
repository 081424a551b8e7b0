//! The checker for leaks finds what was planted.

use std::{fs, os::unix::net::UnixListener, path::Path, time::Duration};

use vz_suite::{
    Lab, Skip, Verdict,
    command::Program,
    leaks::{Item, Snapshot},
    tests,
};

tests![
    a_leaked_process_is_found,
    a_leaked_mount_is_found,
    a_leaked_network_is_found,
    a_leaked_cgroup_is_found,
    leaked_files_are_found,
    leaked_containers_are_found,
    what_ends_by_itself_is_waited_for,
];

/// Fails the test unless exactly these kinds of things are new.
#[track_caller]
fn finds(before: &Snapshot, lab: &Lab, kinds: &[&str]) -> Vec<Item> {
    let found = before.new_since(lab);
    for kind in kinds {
        assert!(found.iter().any(|item| item.kind == *kind), "no {kind} in {found:?}");
    }
    for item in &found {
        assert!(kinds.contains(&item.kind), "{item} was not planted");
    }
    found
}

fn a_leaked_process_is_found(lab: &Lab) -> Verdict {
    let dir = lab.dir();
    for name in ["containerd-shim-vz-v2", "qemu-system-x86_64", "vz-anchor"] {
        let before = Snapshot::take(lab);
        let program = dir.path().join(name);
        fs::copy("/bin/sleep", &program).expect("copy sleep");
        let planted = Program::new(&program).args(["1000"]).start();
        let found = finds(&before, lab, &["process"]);
        assert!(found[0].name.contains(name), "{found:?}");
        drop(planted);
        assert_eq!(before.new_since(lab), []);
    }
    Ok(())
}

fn a_leaked_mount_is_found(lab: &Lab) -> Verdict {
    let before = Snapshot::take(lab);
    let dir = lab.dir();
    Program::new("mount").args(["-t", "tmpfs", "planted"]).args([dir.path()]).run().ok();
    finds(&before, lab, &["mount"]);
    Program::new("umount").args([dir.path()]).run().ok();
    assert_eq!(before.new_since(lab), []);
    Ok(())
}

fn a_leaked_network_is_found(lab: &Lab) -> Verdict {
    let before = Snapshot::take(lab);
    Program::new("ip").args(["netns", "add", "vzt-planted"]).run().ok();
    // The name is a mount, too.
    finds(&before, lab, &["network namespace", "mount"]);
    Program::new("ip").args(["netns", "del", "vzt-planted"]).run().ok();
    let held = Program::new("unshare").args(["--net", "sleep", "1000"]).start();
    vz_suite::poll::until("the namespace", Duration::from_secs(10), || {
        before.new_since(lab).iter().any(|item| item.kind == "network namespace").then_some(())
    });
    drop(held);
    Program::new("ip").args(["link", "add", "vzt0", "type", "bridge"]).run().ok();
    finds(&before, lab, &["network link"]);
    Program::new("ip").args(["link", "del", "vzt0"]).run().ok();
    assert_eq!(before.new_since(lab), []);
    Ok(())
}

fn a_leaked_cgroup_is_found(lab: &Lab) -> Verdict {
    let pids = Path::new("/sys/fs/cgroup/pids");
    let root = if pids.is_dir() { pids } else { Path::new("/sys/fs/cgroup") };
    let before = Snapshot::take(lab);
    let planted = root.join("default/vzt-planted");
    fs::create_dir_all(&planted).expect("make a cgroup");
    let found = finds(&before, lab, &["cgroup"]);
    assert_eq!(found.len(), 1);
    fs::remove_dir(&planted).expect("remove a cgroup");
    assert_eq!(before.new_since(lab), []);
    Ok(())
}

fn leaked_files_are_found(lab: &Lab) -> Verdict {
    let before = Snapshot::take(lab);
    let task = lab.devbox().join("state/io.containerd.runtime.v2.task/default/vzt-planted");
    let fifo = Path::new("/run/containerd/fifo/vzt-planted");
    let state = Path::new("/run/vz/planted/vzt-planted");
    for dir in [&task, fifo, state] {
        fs::create_dir_all(dir).expect("make a directory");
    }
    Program::new("mkfifo").args([fifo.join("vzt-planted-stdout")]).run().ok();
    let socket = lab.devbox().join("run/s/vzt-planted");
    fs::create_dir_all(lab.devbox().join("run/s")).expect("make a directory");
    let listener = UnixListener::bind(&socket).expect("make a socket");
    fs::write("/dev/shm/vzt-planted", "").expect("make shared memory");
    finds(&before, lab, &["task directory", "fifo directory", "state directory", "socket", "shared memory"]);
    drop(listener);
    for file in [&socket, Path::new("/dev/shm/vzt-planted")] {
        fs::remove_file(file).expect("remove a file");
    }
    for dir in [&task, fifo, Path::new("/run/vz/planted")] {
        fs::remove_dir_all(dir).expect("remove a directory");
    }
    assert_eq!(before.new_since(lab), []);
    Ok(())
}

fn leaked_containers_are_found(lab: &Lab) -> Verdict {
    let before = Snapshot::take(lab);
    let id = lab.id("planted");
    lab.ctr(&["containers", "create", vz_suite::lab::BUSYBOX, &id]).run().ok();
    finds(&before, lab, &["container", "snapshot"]);
    lab.ctr(&["containers", "rm", &id]).run().ok();
    let (left, _) = before.settle(lab);
    assert_eq!(left, []);
    Ok(())
}

fn what_ends_by_itself_is_waited_for(lab: &Lab) -> Verdict {
    let dir = lab.dir();
    let program = dir.path().join("vz-ending");
    fs::copy("/bin/sleep", &program).map_err(|e| Skip(format!("copy sleep: {e}")))?;
    let before = Snapshot::take(lab);
    let planted = Program::new(&program).args(["1"]).start();
    assert_eq!(before.settle(lab).0, []);
    drop(planted);
    let planted = Program::new(&program).args(["1000"]).start();
    let (left, _) = before.settle_within(lab, Duration::from_millis(300));
    assert_eq!(left.len(), 1, "{left:?}");
    drop(planted);
    Ok(())
}
