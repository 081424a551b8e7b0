//! What is wrong is said, at the client, with what to do; and nothing is left.

use std::{fs, os::unix::fs::MetadataExt, path::Path, thread};

use vz_suite::{Lab, Skip, Verdict, command::Program, container::Container, lab::BUSYBOX, tests};

tests![
    a_changed_kernel_is_refused_by_name,
    a_short_initramfs_is_refused_by_name,
    a_bundle_without_version_is_refused,
    a_missing_bundle_is_refused,
    no_qemu_is_said,
    an_unknown_setting_is_said,
    a_kernel_that_does_not_boot_is_said,
    a_rootfs_that_is_not_there_is_said,
    a_full_state_directory_is_said,
    networks_of_others_are_refused_by_name,
    devices_and_host_namespaces_are_refused_by_name,
    a_volume_that_is_not_there_is_said,
    annotations_are_checked,
];

/// `ctr run` of a container that must not come to be; what it says.
#[track_caller]
fn refused(lab: &Lab, flags: &[&str], parts: &[&str]) -> String {
    let id = lab.id("refused");
    let output = lab.ctr_run(&["--rm"]).args(flags).args([BUSYBOX, &id, "true"]).run();
    let said = output.fails_with(parts);
    // The container's own record is the client's to remove, and --rm does not after a failure of this kind.
    lab.ctr(&["containers", "rm", &id]).run();
    said
}

/// A copy of the guest bundle, to be broken.
fn copied_bundle(lab: &Lab) -> tempfile::TempDir {
    let dir = lab.dir();
    for name in ["vmlinux", "initramfs.img", "youki", "version.json"] {
        fs::copy(lab.bundle().join(name), dir.path().join(name)).expect("copy the guest bundle");
    }
    dir
}

fn a_changed_kernel_is_refused_by_name(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    let bundle = copied_bundle(lab);
    let guard = lab.use_bundle(bundle.path());
    // The copy is good: what is found next is the change.
    lab.ctr_run(&["--rm", BUSYBOX, &lab.id("good"), "true"]).run().ok();
    let path = bundle.path().join("vmlinux");
    let mut bytes = fs::read(&path).expect("read the kernel");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&path, bytes).expect("write the kernel");
    let said = refused(lab, &[], &["vmlinux", "sha256"]);
    // What is wanted and what was found: two digests.
    let digests = said.split(|c: char| !c.is_ascii_hexdigit()).filter(|word| word.len() == 64).count();
    assert_eq!(digests, 2, "{said}");
    drop(guard);
    lab.ctr_run(&["--rm", BUSYBOX, &lab.id("good"), "true"]).run().ok();
    Ok(())
}

fn a_short_initramfs_is_refused_by_name(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    let bundle = copied_bundle(lab);
    let _guard = lab.use_bundle(bundle.path());
    let file = fs::File::options().write(true).open(bundle.path().join("initramfs.img")).expect("open the initramfs");
    let size = file.metadata().expect("look at the initramfs").size();
    file.set_len(size - 100).expect("cut the initramfs");
    refused(lab, &[], &["initramfs.img", "does not match"]);
    fs::remove_file(bundle.path().join("initramfs.img")).expect("remove the initramfs");
    refused(lab, &[], &["initramfs.img", "No such file"]);
    Ok(())
}

fn a_bundle_without_version_is_refused(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    let bundle = copied_bundle(lab);
    let _guard = lab.use_bundle(bundle.path());
    let version = bundle.path().join("version.json");
    for text in ["{ \"schema\": 1", "{}", "{ \"schema\": 99 }"] {
        fs::write(&version, text).expect("write version.json");
        refused(lab, &[], &["version.json"]);
    }
    fs::remove_file(&version).expect("remove version.json");
    refused(lab, &[], &["no guest bundle", "no version.json", "vz vm linux init"]);
    Ok(())
}

fn a_missing_bundle_is_refused(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    let _guard = lab.use_bundle(Path::new("/nonexistent/bundle"));
    refused(lab, &[], &["no guest bundle", "vz vm linux init"]);
    Ok(())
}

fn no_qemu_is_said(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    for path in ["/nonexistent/qemu", "qemu-of-no-such-name"] {
        let _guard = lab.configure(&format!("machine = \"qemu\"\n[qemu]\npath = \"{path}\"\n"));
        refused(lab, &[], &[path]);
    }
    // A program that is not QEMU.
    let _guard = lab.configure("machine = \"qemu\"\n[qemu]\npath = \"/bin/false\"\n");
    refused(lab, &[], &["QEMU exited with status 1"]);
    Ok(())
}

fn an_unknown_setting_is_said(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    for (text, parts) in [
        ("\nno_such_key = 1\n", &["config.toml", "no_such_key"][..]),
        ("[vm]\nvcpus = \"many\"\n", &["config.toml", "vcpus"]),
        ("[vm]\nvcpus = 0\n", &["vm.vcpus", "1 to 254"]),
        ("[vm\n", &["config.toml"]),
    ] {
        let _guard = lab.configure(text);
        refused(lab, &[], parts);
    }
    Ok(())
}

fn a_kernel_that_does_not_boot_is_said(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    // Nothing to start as the first process: the kernel panics, and says so on its console.
    let _guard =
        lab.configure("[guest]\nkernel_args = \"rdinit=/no-such-init init=/no-such-init\"\n[timeouts]\nboot_s = 15\n");
    let said = refused(lab, &[], &["guest console"]);
    assert!(said.contains("panic") || said.contains("no-such-init"), "{said}");
    Ok(())
}

fn a_rootfs_that_is_not_there_is_said(lab: &Lab) -> Verdict {
    let id = lab.id("rootfs");
    lab.ctr_run(&["--rm", "--rootfs", "/nonexistent/rootfs", &id, "true"])
        .run()
        .fails_with(&["/nonexistent/rootfs", "o such file"]);
    lab.ctr(&["containers", "rm", &id]).run();
    Ok(())
}

fn a_full_state_directory_is_said(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    let root = Path::new("/run/vz");
    fs::create_dir_all(root).expect("make /run/vz");
    let busy = fs::read_dir(root)
        .expect("list /run/vz")
        .flatten()
        .any(|entry| entry.path().is_dir() && entry.file_name() != ".verified");
    if busy {
        return Err(Skip("somebody else's sandboxes are in /run/vz, which would be covered".into()));
    }
    struct Mounted<'p>(&'p Path);
    impl Drop for Mounted<'_> {
        fn drop(&mut self) {
            Program::new("umount").args([self.0]).run().ok();
        }
    }
    for option in ["size=4k,nr_inodes=100", "nr_inodes=1"] {
        Program::new("mount").args(["-t", "tmpfs", "-o", option, "vzt-full"]).args([root]).run().ok();
        let _mounted = Mounted(root);
        // One page, or the root's inode: nothing is left.
        let filled = fs::write(root.join("fill"), [0; 4096]);
        assert_eq!(filled.is_ok(), option.starts_with("size"), "{filled:?}");
        refused(lab, &[], &["/run/vz", "No space left on device"]);
    }
    lab.ctr_run(&["--rm", BUSYBOX, &lab.id("good"), "true"]).run().ok();
    Ok(())
}

fn networks_of_others_are_refused_by_name(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    let refused = |network: &str, parts: &[&str]| {
        let name = lab.id("refused");
        let args = ["run", "--rm", "--name", &name, "--runtime", lab.runtime(), "--net", network, BUSYBOX, "true"];
        lab.nerdctl(&args).run().fails_with(parts);
        lab.nerdctl(&["rm", "-f", &name]).run();
    };
    refused("host", &["the host's network", "--net none", "-p"]);
    let other = Container::start(lab, "other", &[BUSYBOX, "sleep", "1000"]);
    refused(&format!("container:{}", other.name), &["another container", "nerdctl network create"]);
    drop(other);
    self::refused(lab, &["--net-host"], &["the host's network"]);
    self::refused(
        lab,
        &["--with-ns", &format!("network:/proc/{}/ns/net", std::process::id())],
        &["the host's network"],
    );
    self::refused(lab, &["--with-ns", "network:/nonexistent/netns"], &["/nonexistent/netns", "o such file"]);
    self::refused(lab, &["--with-ns", "network:/dev/null"], &["/dev/null", "not a network namespace"]);
    Ok(())
}

fn devices_and_host_namespaces_are_refused_by_name(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    let refused = |flags: &[&str], parts: &[&str]| {
        let name = lab.id("device");
        lab.nerdctl_run(&["--rm", "--name", &name]).args(flags).args([BUSYBOX, "true"]).run().fails_with(parts);
        lab.nerdctl(&["rm", "-f", &name]).run();
    };
    refused(&["--device", "/dev/loop-control"], &["/dev/loop-control"]);
    refused(&["-v", "/dev/loop-control:/dev/x"], &["/dev/loop-control", "VM"]);
    // Those that every Linux has are the guest's own.
    lab.nerdctl_run(&["--rm", "--device", "/dev/null", BUSYBOX, "true"]).run().ok();
    Ok(())
}

fn a_volume_that_is_not_there_is_said(lab: &Lab) -> Verdict {
    refused(
        lab,
        &["--mount", "type=bind,src=/nonexistent/volume,dst=/v,options=rbind:ro"],
        &["/nonexistent/volume", "o such file"],
    );
    Ok(())
}

fn annotations_are_checked(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    let annotate = |key: &str, value: &str| format!("io.containerd.vz/{key}={value}");
    refused(lab, &["--annotation", &annotate("vcpus", "many")], &["io.containerd.vz/vcpus", "many"]);
    refused(lab, &["--annotation", &annotate("no-such-key", "1")], &["io.containerd.vz/no-such-key", "known"]);
    refused(
        lab,
        &["--annotation", &annotate("vcpus", "1000")],
        &["io.containerd.vz/vcpus is 1000, must be at most", "max_vcpus"],
    );
    let processors = thread::available_parallelism().map_or(1, |count| count.get().min(2)).to_string();
    let size = ["--annotation", &annotate("vcpus", &processors), "--annotation", &annotate("memory-mib", "300")];
    let script = "grep -c ^processor /proc/cpuinfo; awk '/MemTotal/ { print int($2 / 1024) }' /proc/meminfo";
    let said = lab.ctr_run(&["--rm"]).args(size).args([BUSYBOX, &lab.id("size"), "sh", "-c", script]).run().ok();
    let (cpus, memory) = said.split_once('\n').expect("two lines");
    let memory: u32 = memory.parse().expect("a number");
    assert!(cpus == processors && (200..=300).contains(&memory), "{said}");
    {
        let _guard = lab.configure("[vm]\nmax_memory_mib = 200\n");
        refused(
            lab,
            &["--annotation", &annotate("memory-mib", "300")],
            &["io.containerd.vz/memory-mib is 300, must be at most 200", "vm.max_memory_mib"],
        );
    }
    let _guard = lab.configure("annotations = []\n");
    refused(lab, &["--annotation", &annotate("vcpus", "1")], &["io.containerd.vz/vcpus", "allowed"]);
    Ok(())
}
