//! File systems: the root, volumes, tmpfs, and what the host sees of them.

use std::{fs, os::unix::fs::MetadataExt};

use vz_suite::{
    Lab, Verdict,
    container::Container,
    lab::{BUSYBOX, DEBIAN},
    poll::until,
    tests,
};

tests![
    python_computes_writes_and_forks,
    commit_and_cp_see_what_the_container_wrote,
    a_stopped_containers_files_are_committed,
    a_read_only_volume_cannot_be_written_by_root,
    a_volume_is_shared_both_ways,
    a_bound_file_shows_live_changes,
    tmpfs_and_shm_have_their_sizes,
    a_read_only_root_is_read_only,
    file_owners_and_modes_are_kept,
];

/// Computes, writes and reads files, and runs 200 child processes.
const PYTHON: &str = r#"
import hashlib, os, sys
assert sum(i * i for i in range(100000)) == 333328333350000
data = bytes(range(256)) * 4096
os.makedirs("/data/deep/er")
for i in range(20):
    with open(f"/data/deep/er/{i}", "wb") as f:
        f.write(data)
os.rename("/data/deep/er/19", "/data/renamed")
digests = {hashlib.sha256(open(f"/data/deep/er/{i}", "rb").read()).hexdigest() for i in range(19)}
assert len(digests) == 1, digests
assert len(os.listdir("/data/deep/er")) == 19
pids = []
for i in range(200):
    pid = os.fork()
    if pid == 0:
        os._exit(i % 100)
    pids.append(pid)
codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
assert codes == [i % 100 for i in range(200)], codes
print("all is well", digests.pop()[:16])
"#;

fn python_computes_writes_and_forks(lab: &Lab) -> Verdict {
    let said = lab.nerdctl_run(&["--rm", DEBIAN, "python3", "-c", PYTHON]).deadline(180).run().ok();
    let wanted = sha256(&(0..=255).collect::<Vec<u8>>().repeat(4096));
    assert_eq!(said, format!("all is well {}", &wanted[..16]));
    Ok(())
}

fn sha256(bytes: &[u8]) -> String {
    use sha2::Digest;
    sha2::Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn commit_and_cp_see_what_the_container_wrote(lab: &Lab) -> Verdict {
    let image = format!("vz.test/{}:1", lab.id("commit"));
    let container = Container::start(lab, "commit", &[BUSYBOX, "sleep", "1000"]);
    container.sh("mkdir -p /made/by && echo guest >/made/by/who && rm /bin/wc && ln -s who /made/by/link");
    // out
    let dir = lab.dir();
    let out = dir.path().join("who");
    lab.nerdctl(&["cp", &format!("{}:/made/by/who", container.name), &out.display().to_string()]).run().ok();
    assert_eq!(fs::read_to_string(&out).expect("read the copied file"), "guest\n");
    // in
    let inside = dir.path().join("in");
    fs::write(&inside, "from the host\n").expect("write a file");
    lab.nerdctl(&["cp", &inside.display().to_string(), &format!("{}:/made/in", container.name)]).run().ok();
    assert_eq!(container.sh("cat /made/in"), "from the host");
    // The host's root is another.
    assert!(!fs::exists("/made").expect("look at /made"));
    lab.nerdctl(&["commit", "--pause=false", &container.name, &image]).run().ok();
    container.remove();
    let script = "cat /made/by/link /made/in; test ! -e /bin/wc && echo gone";
    let said = lab.nerdctl_run(&["--rm", &image, "sh", "-c", script]).run();
    lab.nerdctl(&["rmi", "-f", &image]).run().ok();
    assert_eq!(said.ok(), "guest\nfrom the host\ngone");
    Ok(())
}

fn a_stopped_containers_files_are_committed(lab: &Lab) -> Verdict {
    let image = format!("vz.test/{}:1", lab.id("commit"));
    let container = Container::start(lab, "commit", &[BUSYBOX, "sh", "-c", "head -c 3000000 /dev/zero >/big"]);
    container.nerdctl("wait").ok();
    lab.nerdctl(&["commit", &container.name, &image]).run().ok();
    container.remove();
    let said = lab.nerdctl_run(&["--rm", &image, "stat", "-c", "%s", "/big"]).run();
    lab.nerdctl(&["rmi", "-f", &image]).run().ok();
    assert_eq!(said.ok(), "3000000");
    Ok(())
}

fn a_read_only_volume_cannot_be_written_by_root(lab: &Lab) -> Verdict {
    let dir = lab.dir();
    let path = dir.path().display();
    fs::write(dir.path().join("kept"), "kept").expect("write a file");
    let container =
        Container::start(lab, "ro", &["--cap-add", "ALL", "-v", &format!("{path}:/v:ro"), BUSYBOX, "sleep", "1000"]);
    assert_eq!(container.sh("id -u; cat /v/kept"), "0\nkept");
    let attempts = ["echo changed >/v/kept", "touch /v/new", "rm -f /v/kept", "mkdir /v/dir", "chmod 777 /v/kept"];
    for attempt in attempts {
        let said = container.exec(&["sh", "-c", attempt]).run().fails();
        assert!(said.contains("Read-only file system"), "{attempt}: {said}");
    }
    if lab.is_vz() {
        // Root of a guest may do to the guest what it likes: the host's side is what counts.
        container.exec(&["mount", "-o", "remount,rw,bind", "/v"]).run();
        for attempt in attempts {
            container.exec(&["sh", "-c", attempt]).run().fails();
        }
    }
    container.remove();
    assert_eq!(fs::read_to_string(dir.path().join("kept")).expect("read a file"), "kept");
    assert_eq!(fs::read_dir(dir.path()).expect("list a directory").count(), 1);
    Ok(())
}

fn a_volume_is_shared_both_ways(lab: &Lab) -> Verdict {
    let dir = lab.dir();
    let path = dir.path().display();
    let container = Container::start(lab, "rw", &["-v", &format!("{path}:/v"), BUSYBOX, "sleep", "1000"]);
    container.sh("mkdir /v/sub; echo guest >/v/sub/file; chmod 640 /v/sub/file; chown 12:34 /v/sub/file");
    let file = dir.path().join("sub/file");
    let data = fs::metadata(&file).expect("the container's file is on the host");
    assert_eq!((data.uid(), data.gid(), data.mode() & 0o7777), (12, 34, 0o640));
    assert_eq!(fs::read_to_string(&file).expect("read a file"), "guest\n");
    fs::write(dir.path().join("host"), "host\n").expect("write a file");
    assert_eq!(container.sh("cat /v/host; rm /v/host"), "host");
    assert!(!dir.path().join("host").exists());
    Ok(())
}

fn a_bound_file_shows_live_changes(lab: &Lab) -> Verdict {
    let dir = lab.dir();
    let file = dir.path().join("file");
    let secret = dir.path().join("secret");
    fs::write(&file, "one\n").expect("write a file");
    fs::write(&secret, "secret\n").expect("write a file");
    let volume = format!("{}:/etc/bound", file.display());
    let container = Container::start(lab, "file", &["-v", &volume, BUSYBOX, "sleep", "1000"]);
    assert_eq!(container.sh("cat /etc/bound"), "one");
    // In place: another file under the name would not be seen in any container.
    fs::write(&file, "two, and longer\n").expect("write a file");
    until("the change to be seen", std::time::Duration::from_secs(10), || {
        (container.sh("cat /etc/bound") == "two, and longer").then_some(())
    });
    container.sh("echo three >>/etc/bound");
    assert_eq!(fs::read_to_string(&file).expect("read a file"), "two, and longer\nthree\n");
    // The directory that it is in is not there.
    assert_eq!(container.sh("grep -rl '^secret$' /etc /run /tmp 2>/dev/null || true"), "");
    Ok(())
}

fn tmpfs_and_shm_have_their_sizes(lab: &Lab) -> Verdict {
    let args = ["--tmpfs", "/t:size=3m,mode=1770", "--shm-size", "7m", DEBIAN, "sleep", "1000"];
    let container = Container::start(lab, "tmpfs", &args);
    let sizes = container.sh("df -k /t /dev/shm | awk 'NR > 1 { print $2, $6 }'; stat -c %a /t /dev/shm");
    assert_eq!(sizes, "3072 /t\n7168 /dev/shm\n1770\n1777");
    container.exec(&["sh", "-c", "head -c 4000000 /dev/zero >/t/big"]).run().fails_with(&["No space left on device"]);
    container.sh("head -c 2000000 /dev/zero >/dev/shm/fits; rm /dev/shm/fits");
    Ok(())
}

fn a_read_only_root_is_read_only(lab: &Lab) -> Verdict {
    let args = ["--rm", "--read-only", "--tmpfs", "/tmp", BUSYBOX, "sh", "-c"];
    let script = "echo x >/tmp/x && cat /tmp/x; touch /new";
    let output = lab.nerdctl_run(&args).args([script]).run();
    output.fails_with(&["Read-only file system"]);
    assert_eq!(output.text(), "x");
    Ok(())
}

fn file_owners_and_modes_are_kept(lab: &Lab) -> Verdict {
    let container = Container::start(lab, "modes", &[DEBIAN, "sleep", "1000"]);
    let said = container.sh(
        "cd /var/tmp; umask 027; touch a; chown 1000:2000 a; chmod 4751 a; ln a hard; ln -s a soft; mkfifo fifo; \
         mkdir dir; chmod 1777 dir; truncate -s 5G sparse; setfattr -n user.k -v v a 2>/dev/null; \
         stat -c '%n %F %a %u %g %h %s' a soft fifo sparse; stat -c '%n %F %a %u %g' dir; test a -ef hard && echo same",
    );
    // How large a directory is, is its file system's business.
    let wanted = "a regular empty file 4751 1000 2000 2 0\nsoft symbolic link 777 0 0 1 1\nfifo fifo 640 0 0 1 0\n\
                  sparse regular file 640 0 0 1 5368709120\ndir directory 1777 0 0\nsame";
    assert_eq!(said, wanted);
    // A stopped container keeps its files for its next start.
    container.nerdctl("stop").ok();
    container.nerdctl("start").ok();
    assert_eq!(container.sh("stat -c '%a %u' /var/tmp/a"), "4751 1000");
    Ok(())
}
