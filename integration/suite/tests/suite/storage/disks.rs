//! Block devices and image files of the host as disks of the VM.

use std::path::Path;

use vz_suite::{Lab, Skip, Verdict, command::Program, lab::BUSYBOX, tests};

tests![
    an_image_is_mounted_and_left_clean,
    a_block_device_is_given_to_a_container,
    a_disk_that_is_in_use_is_refused,
    many_vcpus_write_to_one_disk,
];

/// An ext4 image with a file in it.
pub(crate) fn image(dir: &Path) -> String {
    let content = dir.join("content");
    std::fs::create_dir(&content).expect("make a directory");
    std::fs::write(content.join("greeting"), "from the host\n").expect("write a file");
    let image = dir.join("disk.img").display().to_string();
    let content = content.display().to_string();
    Program::new("mkfs.ext4").args(["-q", "-d", &content, &image, "64M"]).run().ok();
    image
}

/// What a file of an image that is not mounted holds.
fn content(image: &str, file: &str) -> String {
    Program::new("debugfs").args(["-R", &format!("cat {file}"), image]).run().ok()
}

/// A block device whose content is the file's, until it is dropped.
pub(crate) struct Loop(pub(crate) String);

impl Loop {
    pub(crate) fn attach(file: &str) -> Result<Self, Skip> {
        let output = Program::new("losetup").args(["-f", "--show", file]).run();
        if output.code() != 0 {
            return Err(Skip(format!("this host has no loop devices to spare: {}", output.errors())));
        }
        Ok(Self(output.ok()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        // Fails where somebody has left it open: losetup then only promises to detach it later.
        Program::new("losetup").args(["-d", &self.0]).run();
        let left = Program::new("losetup").args([&self.0]).run();
        if !std::thread::panicking() {
            assert_ne!(left.code(), 0, "somebody holds {}: {}", self.0, left.text());
        }
    }
}

fn mount(source: &str, options: &str) -> String {
    format!("type=ext4,src={source},dst=/data{options}")
}

fn an_image_is_mounted_and_left_clean(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    let dir = lab.dir();
    let image = image(dir.path());
    let script =
        "cat /data/greeting; seq 100000 >/data/numbers; grep -c ' /data ext4 ' /proc/mounts; ls -l /dev/vda 2>&1; true";
    let run = |options: &str, script: &str| {
        let (mount, id) = (mount(&image, options), lab.id("image"));
        lab.ctr_run(&["--rm", "--mount", &mount, BUSYBOX, &id, "sh", "-c", script]).run()
    };
    let said = run("", script).ok();
    // The mount is the container's, the device is not.
    assert!(said.starts_with("from the host\n1\n") && said.contains("No such file"), "{said}");
    let checked = Program::new("e2fsck").args(["-f", "-n", &image]).run();
    assert_eq!(checked.code(), 0, "{} {}", checked.text(), checked.errors());
    let features = Program::new("dumpe2fs").args(["-h", &image]).run().ok();
    assert!(!features.contains("needs_recovery"), "the image was not unmounted: {features}");
    assert_eq!(content(&image, "/numbers").lines().count(), 100_000);
    // Read-only it is for the whole VM.
    let before = std::fs::read(&image).expect("read the image");
    let said = run(",options=ro", "cat /data/greeting; echo x >/data/greeting").fails();
    assert!(said.contains("Read-only file system"), "{said}");
    assert!(std::fs::read(&image).expect("read the image") == before, "a read-only image was changed");
    Ok(())
}

fn a_block_device_is_given_to_a_container(lab: &Lab) -> Verdict {
    let dir = lab.dir();
    let file = dir.path().join("raw");
    std::fs::write(&file, [b'a'; 1 << 20]).expect("write a file");
    let device = Loop::attach(&file.display().to_string())?;
    let given = format!("{}:/dev/xvda", device.0);
    let script = "stat -c %F /dev/xvda; head -c 4 /dev/xvda; echo; wc -c </dev/xvda
        echo written | dd of=/dev/xvda bs=512 seek=3 conv=notrunc,sync 2>&1 | grep -c records; sync";
    let said = lab.nerdctl_run(&["--rm", "--device", &given, BUSYBOX, "sh", "-c", script]).run().ok();
    assert_eq!(said, "block special file\naaaa\n1048576\n2");
    let content = || std::fs::read(&file).expect("read the file");
    assert_eq!(&content()[3 * 512..3 * 512 + 8], b"written\n");
    // With -r, reading is all that it may.
    let script = "head -c 4 /dev/xvda; echo; echo x >/dev/xvda";
    let given = format!("{given}:r");
    let before = content();
    let said = lab.nerdctl_run(&["--rm", "--device", &given, BUSYBOX, "sh", "-c", script]).run();
    assert_eq!(said.text().trim(), "aaaa");
    assert!(said.fails().contains("Operation not permitted"), "{}", said.errors());
    assert!(content() == before, "a read-only device was written");
    Ok(())
}

fn a_disk_that_is_in_use_is_refused(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    let dir = lab.dir();
    let image = image(dir.path());
    let id = lab.id("holder");
    lab.ctr_run(&["-d", "--mount", &mount(&image, ""), BUSYBOX, &id, "sleep", "1000"]).run().ok();
    let other = lab.id("other");
    let refused = lab.ctr_run(&["--rm", "--mount", &mount(&image, ""), BUSYBOX, &other, "true"]).run();
    refused.fails_with(&[&image, "in use"]);
    lab.ctr(&["containers", "rm", &other]).run();
    lab.ctr(&["task", "rm", "-f", &id]).run().ok();
    lab.ctr(&["containers", "rm", &id]).run().ok();
    // What was killed has left it to the next one, whose kernel repairs it.
    let next = lab.id("next");
    let said =
        lab.ctr_run(&["--rm", "--mount", &mount(&image, ""), BUSYBOX, &next, "cat", "/data/greeting"]).run().ok();
    assert_eq!(said, "from the host");
    let device = Loop::attach(&image)?;
    let mounted = dir.path().join("mounted");
    std::fs::create_dir(&mounted).expect("make a directory");
    let mounted = mounted.display().to_string();
    Program::new("mount").args(["-o", "ro", &device.0, &mounted]).run().ok();
    let late = lab.id("late");
    let refused = lab.ctr_run(&["--rm", "--mount", &mount(&device.0, ",options=ro"), BUSYBOX, &late, "true"]).run();
    Program::new("umount").args([&mounted]).run().ok();
    refused.fails_with(&[&device.0, "in use"]);
    lab.ctr(&["containers", "rm", &late]).run();
    Ok(())
}

fn many_vcpus_write_to_one_disk(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    let dir = lab.dir();
    let image = image(dir.path());
    let (mount, id) = (mount(&image, ""), lab.id("many"));
    let script = "for i in 1 2 3 4; do seq $i 20000 >/data/$i & done; wait; sync; md5sum /data/[1-4]";
    let _config = lab.configure("[vm]\nmax_vcpus = 2\n");
    let annotation = ["--annotation", "io.containerd.vz/vcpus=2"];
    let said =
        lab.ctr_run(&["--rm", "--mount", &mount]).args(annotation).args([BUSYBOX, &id, "sh", "-c", script]).run().ok();
    for (index, line) in said.lines().enumerate() {
        let text: String = (index + 1..=20_000).map(|n| format!("{n}\n")).collect();
        let file = format!("/{}", index + 1);
        // debugfs' output is trimmed at its end.
        assert_eq!(content(&image, &file), text.trim_end());
        assert!(line.ends_with(&format!("/data{file}")), "{line}");
    }
    assert_eq!(said.lines().count(), 4, "{said}");
    Ok(())
}
