//! A guest without a kernel, which speaks raw virtio to the real vmm: out/metal, made of integration/metal.
//!
//! Whatever it sends, the vmm answers, ignores or ends its VM with a cause; it is not a mistake of the vmm's, nor a
//! denied system call, that ends it. Nothing outside of the share is there for it, and other sandboxes do not notice.

use std::{
    cell::RefCell,
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use nix::libc;
use vz_suite::{
    Lab, Skip, Verdict,
    container::Task,
    host::{Process, Role, await_process, find},
    lab::{BUSYBOX, Restore},
    poll::{patiently, until},
    tests,
    watch::Watch,
};

use super::escape::Nodes;

tests![
    names_lead_nowhere,
    the_shares_own_directories_are_the_hosts,
    directories_that_are_replaced_harm_nothing_of_the_host,
    device_nodes_of_an_image_are_not_opened,
    lengths_that_are_lies_change_nothing,
    chains_of_no_driver_are_borne,
    queues_that_are_nowhere_are_no_ones_trouble,
    registers_can_be_used_in_any_order,
    an_endless_guest_can_be_ended,
    a_silent_guest_ends_with_its_client,
];

/// How long a scene may take.
const SCENE: Duration = Duration::from_secs(120);
/// How long it takes to get rid of the guest, whatever it does.
const END: Duration = Duration::from_secs(20);

/// A sandbox's directory on the host.
fn state(id: &str) -> PathBuf {
    Path::new("/run/vz/default").join(id)
}

/// The guest that plays a scene, and another sandbox that must not notice.
struct Stage<'l> {
    lab: &'l Lab,
    victim: Task<'l>,
    metal: Task<'l>,
    vmm: Process,
    watch: Watch<'l>,
    mark: u64,
    console: RefCell<String>,
    dir: tempfile::TempDir,
}

impl<'l> Stage<'l> {
    fn set(lab: &'l Lab, scene: &str) -> Result<Self, Skip> {
        Self::of(lab, scene, BUSYBOX)
    }

    /// The same, with another image as the root of the guest's container.
    fn of(lab: &'l Lab, scene: &str, image: &str) -> Result<Self, Skip> {
        lab.vz_only()?;
        let bundle = lab.bundle().with_file_name("metal");
        if !bundle.join("version.json").is_file() {
            return Err(Skip(format!("no {}: 'make hostile' builds it", bundle.display())));
        }
        let victim = Task::start(lab, "victim", &[], BUSYBOX, &["sleep", "1000"]);
        let mark = lab.log_position();
        // There is no agent, and nobody is to end the guest before it has played.
        let (id, planted) = (lab.id("metal"), lab.planted().display());
        let args = format!("vz.metal={scene} vz.own={id} vz.victim={} vz.planted={planted}", victim.id);
        let text = format!("[guest]\nkernel_args = \"{args}\"\n[timeouts]\nboot_s = 600\nagent_s = 600\n");
        let guards: [Restore<'_>; 2] = [lab.configure(&text), lab.use_bundle(&bundle)];
        // A disk, so that there is one of each device.
        let dir = lab.dir();
        let disk = dir.path().join("disk");
        fs::File::create(&disk).and_then(|file| file.set_len(1 << 20)).expect("make a disk");
        // And of each volume; the guest knows them by the files in them.
        let mut mounts = vec![format!("type=ext4,src={},dst=/disk", disk.display())];
        for (name, options) in [("writable", "rbind:rw"), ("readonly", "rbind:ro"), ("file", "rbind:rw")] {
            let source = dir.path().join(name);
            if name == "file" {
                fs::write(&source, "a file by itself").expect("make a file");
            } else {
                fs::create_dir(&source).and_then(|()| fs::write(source.join(name), name)).expect("make a volume");
            }
            mounts.push(format!("type=bind,src={},dst=/{name},options={options}", source.display()));
        }
        let flags: Vec<&str> = mounts.iter().flat_map(|mount| ["--mount", mount]).collect();
        let metal = Task::begin_as(lab, id, &flags, image, &["true"]);
        let vmm = await_process(&metal.id, Role::Vmm);
        let console = state(&metal.id).join("console.log");
        until("the guest's first words", Duration::from_secs(60), || {
            fs::read_to_string(&console).ok().filter(|text| text.contains("metal: "))
        });
        drop(guards);
        let watch = Watch::start(lab, &metal.id);
        Ok(Self { lab, victim, metal, vmm, watch, mark, console: RefCell::default(), dir })
    }

    /// What the guest has said.
    fn said(&self) -> String {
        // It is gone with its VM.
        if let Ok(bytes) = fs::read(state(&self.metal.id).join("console.log")) {
            *self.console.borrow_mut() = String::from_utf8_lossy(&bytes).into_owned();
        }
        self.console.borrow().clone()
    }

    /// The vmm is who it was: nothing that the guest did has ended it.
    #[track_caller]
    fn vmm_lives(&self) {
        let now = find(&self.metal.id, Role::Vmm);
        if now.as_ref().map(|process| process.pid) != Some(self.vmm.pid) {
            panic!("the vmm has ended; the guest said:\n{}\n{}", tail(&self.said()), self.lab.log_since(self.mark));
        }
    }

    #[track_caller]
    fn victim_lives(&self) {
        self.lab.looked_at("another sandbox");
        assert_eq!(self.victim.exec(&["echo", "alive"]).run().ok(), "alive");
    }

    /// Waits until the guest has played, while the other sandbox goes on.
    #[track_caller]
    fn play(&self) -> String {
        let said = self.watch_it();
        nothing_is_wrong(&said);
        said
    }

    /// The same, whatever the guest has found.
    #[track_caller]
    fn watch_it(&self) -> String {
        until(&format!("the scene's end, after {}", tail(&self.said())), SCENE, || {
            self.vmm_lives();
            self.victim_lives();
            Some(self.said()).filter(|said| said.ends_with("metal: done\n"))
        })
    }

    /// The same, where the machine may have the guest's VM end; then it says why.
    #[track_caller]
    fn play_or_end(self) {
        let cause = || {
            let log = self.lab.log_lines_since(self.mark);
            log.lines().find(|line| line.contains("vm has ended")).map(str::to_owned)
        };
        let over = until(&format!("the scene's end, after {}", tail(&self.said())), SCENE, || {
            self.victim_lives();
            cause().or_else(|| Some(self.said()).filter(|said| said.ends_with("metal: done\n")))
        });
        assert!(!self.said().contains("WRONG"), "{}", self.said());
        if over.contains("vm has ended") {
            let why = over.split("why=").nth(1).and_then(|why| why.split("guest console").next()).unwrap_or(&over);
            println!("  ended: {why}");
            // Our end refuses what QEMU passes on, or QEMU itself gives up.
            let known = [["vhost-user connection of device", "failed to handle request"], ["QEMU was killed", "vhost"]];
            assert!(known.iter().any(|parts| parts.iter().all(|part| why.contains(part))), "{over}");
        } else {
            println!("  borne: {}", over.lines().rev().nth(1).unwrap_or_default());
            self.nothing_grew();
        }
        self.end();
    }

    /// What the host has spent on it is bounded.
    #[track_caller]
    fn nothing_grew(&self) {
        self.watch.is_bounded();
    }

    /// Ends the guest as a client does that has waited long enough. The checker looks for what is left.
    #[track_caller]
    fn end(self) {
        let begun = Instant::now();
        self.metal.kill_client();
        let id = &self.metal.id;
        self.lab.ctr(&["task", "rm", "-f", id]).run();
        until("the vmm's end", END, || find(id, Role::Vmm).is_none().then_some(()));
        until("the shim's end", END, || find(id, Role::Shim).is_none().then_some(()));
        println!("  ended in {:.1} s", begun.elapsed().as_secs_f64());
        assert!(begun.elapsed() < patiently(END), "it took {:?} to end the guest", begun.elapsed());
        let log = self.lab.log_lines_since(self.mark);
        for sign in ["panicked", "filter denies", "SIGSYS", "SIGSEGV"] {
            assert!(!log.contains(sign), "{sign}: {}", self.lab.log_since(self.mark));
        }
        self.victim_lives();
        self.lab.remove_clients_fifos();
        self.victim.kill("SIGKILL");
        self.victim.wait();
    }
}

impl Drop for Stage<'_> {
    /// A task that is not there yet can only be ended like this.
    fn drop(&mut self) {
        self.metal.kill_client();
    }
}

/// Fails the test with what the guest has found that a host must not do.
#[track_caller]
fn nothing_is_wrong(said: &str) {
    let wrong: Vec<&str> = said.lines().filter(|line| line.contains("WRONG")).collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// What each request was refused with, without what it was about.
fn refusals(said: &str) -> impl Iterator<Item = (&str, i32)> {
    let lines = said.lines().filter_map(|line| line.strip_prefix("metal: refused "));
    lines.map(|line| (line, line.rsplit(' ').next().and_then(|word| word.parse().ok()).unwrap_or_default()))
}

/// The last lines.
fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(10)..].join("\n")
}

fn names_lead_nowhere(lab: &Lab) -> Verdict {
    let stage = Stage::set(lab, "names")?;
    let own = listed(&state(&stage.metal.id));
    let others = listed(&state(&stage.victim.id));
    let said = stage.play();
    let count = |what: &str| said.lines().filter(|line| line.starts_with(&format!("metal: {what} "))).count();
    println!("  {} refused, {} dropped, {} fine", count("refused"), count("dropped"), count("fine"));
    assert!(count("refused") > 500 && count("fine") > 9, "{said}");
    // What each is refused with: no such thing may depend on what the host has.
    for (line, error) in refusals(&said) {
        let known = [libc::EPERM, libc::ENOENT, libc::EBADF, libc::EEXIST, libc::ENOTDIR, libc::EINVAL, libc::ELOOP];
        assert!(known.contains(&error) || error == libc::ENAMETOOLONG, "{line}");
        let named = ["/", "\"\"", "\"..\"", "\".\""].iter().any(|name| line.contains(name));
        assert!(!named || error == libc::EINVAL, "{line}");
    }
    stage.nothing_grew();
    assert_eq!((listed(&state(&stage.metal.id)), listed(&state(&stage.victim.id))), (own, others));
    // The vmm's root is the share.
    let share = PathBuf::from(format!("/proc/{}/root", stage.vmm.pid));
    let rootfs = share.join(&stage.metal.id).join("rootfs");
    assert_eq!(fs::read_to_string(rootfs.join("metal")).expect("the guest's file"), "metal was here.\n");
    for name in ["directory", "fds", "out", "up"] {
        assert!(fs::symlink_metadata(rootfs.join(name)).is_ok(), "{name} is not in the root file system");
    }
    assert_eq!(listed(&share), [stage.metal.id.as_str()]);
    stage.end();
    Ok(())
}

/// Names in a directory.
fn listed(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap_or_else(|e| panic!("list {}: {e}", dir.display()));
    let mut names: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

fn the_shares_own_directories_are_the_hosts(lab: &Lab) -> Verdict {
    let stage = Stage::set(lab, "share")?;
    let said = stage.watch_it();
    let share = PathBuf::from(format!("/proc/{}/root", stage.vmm.pid));
    let (top, own) = (listed(&share), listed(&share.join(&stage.metal.id)));
    let volumes = ["writable", "readonly"].map(|name| listed(&stage.dir.path().join(name)));
    stage.nothing_grew();
    let (id, refused): (_, Vec<_>) = (stage.metal.id.clone(), refusals(&said).collect());
    println!("  {} requests refused", refused.len());
    // First what it has done to the host, if anything.
    stage.end();
    nothing_is_wrong(&said);
    assert_eq!(top, [id]);
    assert!(own.iter().all(|name| name == "rootfs" || name.starts_with("mount")), "{own:?}");
    assert_eq!(volumes, [vec!["made", "moved", "writable"], vec!["readonly"]]);
    assert!(said.contains("volumes: 1 writable, 1 read-only, 1 files"), "{said}");
    let known = [libc::EROFS, libc::EPERM, libc::EXDEV];
    // A file without a name, and attributes of others than the user's, are refused wherever it is.
    let nowhere = [libc::EOPNOTSUPP, libc::ENOSYS, libc::EINVAL, libc::ENODATA, libc::EISDIR];
    // The size (8) of a directory is nobody's to change.
    let special = |line: &str| {
        ["tmpfile", "user.", "trusted.", "security.", "system.", "attribute 8"].iter().any(|what| line.contains(what))
    };
    let odd: Vec<_> = refused
        .iter()
        .filter(|(line, error)| !(known.contains(error) || special(line) && nowhere.contains(error)))
        .collect();
    assert!(odd.is_empty(), "{odd:?}");
    Ok(())
}

fn directories_that_are_replaced_harm_nothing_of_the_host(lab: &Lab) -> Verdict {
    for scene in ["swap", "swap-below"] {
        let stage = Stage::set(lab, scene)?;
        let said = stage.watch_it();
        stage.nothing_grew();
        // What the host does last with a share is what would harm it.
        stage.end();
        nothing_is_wrong(&said);
    }
    Ok(())
}

fn device_nodes_of_an_image_are_not_opened(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    let nodes = Nodes::make(lab)?;
    let stage = Stage::of(lab, "nodes", &nodes.image)?;
    let said = stage.play();
    for (line, error) in refusals(&said) {
        assert!([libc::EACCES, libc::EBADF, libc::EPERM, libc::EEXIST].contains(&error), "{line}");
    }
    stage.nothing_grew();
    stage.end();
    Ok(())
}

fn lengths_that_are_lies_change_nothing(lab: &Lab) -> Verdict {
    bear(lab, "lies")
}

fn chains_of_no_driver_are_borne(lab: &Lab) -> Verdict {
    bear(lab, "chains")
}

fn queues_that_are_nowhere_are_no_ones_trouble(lab: &Lab) -> Verdict {
    bear_or_end(lab, "places")
}

fn registers_can_be_used_in_any_order(lab: &Lab) -> Verdict {
    bear_or_end(lab, "registers")
}

/// A scene for which QEMU, which has the registers there, may end its VM: the built-in machine never does.
fn bear_or_end(lab: &Lab, scene: &str) -> Verdict {
    let stage = Stage::set(lab, scene)?;
    if find(&stage.metal.id, Role::Qemu).is_none() {
        stage.play();
        stage.nothing_grew();
        stage.end();
        return Ok(());
    }
    stage.end();
    // Each kind of device in a VM of its own: file system, vsock, disk, net, entropy, balloon.
    for device in [26, 19, 2, 1, 4, 5] {
        let stage = Stage::set(lab, &format!("{scene} vz.device={device}"))?;
        stage.play_or_end();
    }
    Ok(())
}

/// A scene that the guest itself judges, but for what it costs.
fn bear(lab: &Lab, scene: &str) -> Verdict {
    let stage = Stage::set(lab, scene)?;
    let said = stage.play();
    println!("  {} lines, the last: {}", said.lines().count(), said.lines().rev().nth(1).unwrap_or_default());
    stage.nothing_grew();
    stage.end();
    Ok(())
}

fn an_endless_guest_can_be_ended(lab: &Lab) -> Verdict {
    let stage = Stage::set(lab, "endless")?;
    until("its beginning", SCENE, || stage.said().contains("metal: endless").then_some(()));
    let end = Instant::now() + Duration::from_secs(10);
    until("ten seconds of it", Duration::from_secs(20), || {
        stage.vmm_lives();
        stage.victim_lives();
        (Instant::now() > end).then_some(())
    });
    let said = stage.said();
    assert!(!said.contains("WRONG"), "{said}");
    println!("  {}", said.lines().last().unwrap_or_default());
    stage.nothing_grew();
    let size = fs::metadata(state(&stage.metal.id).join("console.log")).expect("its console").len();
    assert!(size <= 256 * 1024, "console.log has {size} bytes");
    stage.end();
    Ok(())
}

fn a_silent_guest_ends_with_its_client(lab: &Lab) -> Verdict {
    // A scene that does not exist, and is over at once: nothing comes from this guest.
    let stage = Stage::set(lab, "none")?;
    until("its end", SCENE, || stage.said().ends_with("metal: done\n").then_some(()));
    stage.end();
    Ok(())
}
