//! Volumes: what of the host they show, and what they keep to themselves.

use std::{
    fs::{self, File},
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_bind_recursive, mount_change, unmount,
};
use vz_suite::{
    Lab, Skip, Verdict,
    container::Container,
    lab::{BUSYBOX, DEBIAN},
    poll::{patiently, until},
    tests,
};

tests![
    a_late_mount_appears_where_the_volume_is_a_slave_and_nowhere_else,
    a_shared_volume_is_refused_by_name,
    a_mount_below_a_read_only_volume_is_as_writable_as_it_is,
    a_volume_for_shared_memory_is_the_volume,
    a_device_node_of_an_image_opens_nothing,
    a_volume_that_hangs_holds_up_nobody_else,
];

/// A mount on the host, for as long as a test takes.
struct Mounted(PathBuf);

impl Mounted {
    fn tmpfs(path: &Path) -> Self {
        fs::create_dir_all(path).expect("make a mount point");
        mount("vzt", path, "tmpfs", MountFlags::empty(), None).expect("mount a tmpfs");
        Self(path.to_owned())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // One that the test has unmounted is gone.
        let _ = unmount(&self.0, UnmountFlags::DETACH);
    }
}

/// A directory of the host that is a shared mount by itself, as systemd has all of them.
fn shared(path: &Path) -> Mounted {
    mount_bind_recursive(path, path).expect("bind a directory to itself");
    mount_change(path, MountPropagationFlags::PRIVATE).expect("leave the peers");
    mount_change(path, MountPropagationFlags::SHARED).expect("share a mount");
    Mounted(path.to_owned())
}

fn a_late_mount_appears_where_the_volume_is_a_slave_and_nowhere_else(lab: &Lab) -> Verdict {
    let dir = lab.dir();
    let _shared = shared(dir.path());
    for name in ["early", "late"] {
        fs::create_dir(dir.path().join(name)).expect("make a directory");
    }
    let _early = Mounted::tmpfs(&dir.path().join("early"));
    fs::write(dir.path().join("early/file"), "early").expect("write a file");
    let start = |what: &str, propagation: &str| {
        let volume = format!("{}:/v:{propagation}", dir.path().display());
        Container::start(lab, what, &["-v", &volume, BUSYBOX, "sleep", "1000"])
    };
    let (slave, private) = (start("slave", "rslave"), start("private", "rprivate"));
    for container in [&slave, &private] {
        assert_eq!(container.sh("cat /v/early/file"), "early");
    }
    let late = Mounted::tmpfs(&dir.path().join("late"));
    fs::write(dir.path().join("late/file"), "late").expect("write a file");
    until("the late mount in the container", Duration::from_secs(5), || {
        (slave.sh("cat /v/late/file 2>/dev/null || echo none") == "late").then_some(())
    });
    assert_eq!(private.sh("cat /v/late/file 2>/dev/null || echo none"), "none");
    drop(late);
    until("the end of the late mount in the container", Duration::from_secs(5), || {
        (slave.sh("cat /v/late/file 2>/dev/null || echo none") == "none").then_some(())
    });
    Ok(())
}

fn a_shared_volume_is_refused_by_name(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    let dir = lab.dir();
    let _shared = shared(dir.path());
    let volume = format!("{}:/v:rshared", dir.path().display());
    lab.nerdctl_run(&["--rm", "-v", &volume, BUSYBOX, "true"]).run().fails_with(&["rshared of /v", "use rslave"]);
    Ok(())
}

fn a_mount_below_a_read_only_volume_is_as_writable_as_it_is(lab: &Lab) -> Verdict {
    let dir = lab.dir();
    let mounts = ["open", "open/deep", "closed"].map(|name| Mounted::tmpfs(&dir.path().join(name)));
    rustix::mount::mount_remount(&mounts[2].0, MountFlags::RDONLY, "").expect("remount read-only");
    let script = "for d in . open open/deep closed; do touch /v/$d/file 2>/dev/null && echo $d; done; true";
    let run = |option: &str| {
        let mount = format!("type=bind,src={},dst=/v,options=rbind:{option}", dir.path().display());
        let id = lab.id("below");
        lab.ctr_run(&["--rm", "--mount", &mount, BUSYBOX, &id, "sh", "-c", script]).run().ok()
    };
    assert_eq!(run("ro"), "open\nopen/deep");
    // Recursively read-only: Linux 5.12 and a runtime that knows it.
    assert_eq!(run("rro"), "");
    Ok(())
}

fn a_volume_for_shared_memory_is_the_volume(lab: &Lab) -> Verdict {
    let dir = lab.dir();
    fs::write(dir.path().join("mine"), "mine").expect("write a file");
    let volume = format!("{}:/dev/shm", dir.path().display());
    let script = "cat /dev/shm/mine; echo theirs >/dev/shm/theirs";
    assert_eq!(lab.nerdctl_run(&["--rm", "-v", &volume, BUSYBOX, "sh", "-c", script]).run().ok(), "mine");
    assert_eq!(fs::read_to_string(dir.path().join("theirs")).expect("read a file"), "theirs\n");
    // What clients make for shared memory is the guest's, of the size that was asked for.
    let df = "df -k /dev/shm | tail -n 1 | awk '{ print $2 }'";
    for ipc in ["private", "shareable"] {
        let said = lab.nerdctl_run(&["--rm", "--ipc", ipc, "--shm-size", "8m", BUSYBOX, "sh", "-c", df]).run().ok();
        assert_eq!(said, "8192", "--ipc {ipc}");
    }
    Ok(())
}

fn a_device_node_of_an_image_opens_nothing(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    let container = Container::start(lab, "node", &[BUSYBOX, "sleep", "1000"]);
    // As an image brings it: a node in the root file system, of a device that every host has, /dev/kmsg.
    let node = PathBuf::from(format!("/proc/{}/root/node", container.inspect(".State.Pid")));
    let number = rustix::fs::makedev(1, 11);
    rustix::fs::mknodat(rustix::fs::CWD, &node, rustix::fs::FileType::CharacterDevice, 0o666.into(), number)
        .expect("make a device node");
    // The host's side refuses whoever comes by it: the mount that the guest's server has is nodev.
    let refused = File::open(&node).expect_err("a device of the host opens through the container's root");
    assert_eq!(refused.raw_os_error(), Some(nix::libc::EACCES), "{refused}");
    Ok(())
}

/// A file system whose server never answers.
struct Hung {
    mounted: Option<Mounted>,
    _server: File,
}

impl Hung {
    fn mount(path: &Path) -> Result<Self, Skip> {
        let server = File::options().read(true).write(true).open("/dev/fuse");
        let server = server.map_err(|e| Skip(format!("no FUSE on this host: {e}")))?;
        fs::create_dir(path).expect("make a mount point");
        let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", server.as_raw_fd());
        let options = std::ffi::CString::new(options).expect("options have no NUL");
        mount("vzt", path, "fuse", MountFlags::empty(), Some(options.as_c_str()))
            .map_err(|e| Skip(format!("no FUSE on this host: {e}")))?;
        Ok(Self { mounted: Some(Mounted(path.to_owned())), _server: server })
    }
}

impl Drop for Hung {
    fn drop(&mut self) {
        // Before its server, whose end would answer everything with an error.
        drop(self.mounted.take());
    }
}

fn a_volume_that_hangs_holds_up_nobody_else(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    let dir = lab.dir();
    let path = dir.path().join("hung");
    let other = Container::start(lab, "other", &[BUSYBOX, "sleep", "1000"]);
    let config = lab.configure("[timeouts]\nfiles_s = 3\n");
    let hung = Hung::mount(&path)?;
    let name = lab.id("hung");
    let volume = format!("type=bind,src={},dst=/v,options=rbind:ro", path.display());
    let mut run = lab.ctr_run(&["--rm", "--mount", &volume, BUSYBOX, &name, "true"]).start();
    assert_eq!(other.sh("echo alive"), "alive");
    let output = run.wait_at_most(patiently(Duration::from_secs(30))).expect("the creation ends");
    output.fails_with(&[&path.display().to_string(), "did not answer for 3 s"]);
    let begun = Instant::now();
    lab.ctr(&["containers", "rm", &name]).run();
    assert!(begun.elapsed() < patiently(Duration::from_secs(10)), "removed after {:?}", begun.elapsed());
    assert_eq!(other.sh("echo alive"), "alive");
    drop(hung);
    drop(config);
    // The same path once more, with a file system that answers.
    let volume = format!("{}:/v", dir.path().display());
    assert_eq!(lab.nerdctl_run(&["--rm", "-v", &volume, DEBIAN, "ls", "/v"]).run().ok(), "hung");
    Ok(())
}
