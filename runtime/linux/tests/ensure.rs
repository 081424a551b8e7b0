//! Bundles that are installed by many processes at once, some of them killed; and what is refused, by name.
//!
//! The program starts itself as these processes, which is why it has no harness.

use std::{
    env, fs,
    io::{self, Write},
    path::{Path, PathBuf},
    process::{Child, Command, ExitCode, Stdio},
    thread,
    time::Duration,
};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use vz_linux::{
    AGENT_VERSION, Directory, EnsureError, InstallError, KernelBundle, KernelBundleOptions, KernelProfile, Source,
    YOUKI_VERSION, ensure_kernel_bundle, locate,
};

const CONTAINER: KernelProfile = KernelProfile::Container;
/// Makes this program a process that installs: directory of the source, base directory.
const WORK: &str = "VZ_TEST_INSTALL";
/// Makes this program a process that installs on a file system which has no room (`full`) or is read-only
/// (`read-only`).
const TMPFS: &str = "VZ_TEST_TMPFS";

fn main() -> ExitCode {
    if let Some(dirs) = env::var_os(WORK) {
        let dirs: Vec<PathBuf> = env::split_paths(&dirs).collect();
        let done = match dirs.as_slice() {
            [source, base] => ensure(&Slow(Directory(source.clone())), base),
            // Nothing but the base: from the program itself.
            dirs => ensure_kernel_bundle(&KernelBundleOptions {
                profile: CONTAINER,
                install_dir: Some(&dirs[0]),
                ..Default::default()
            }),
        };
        return match done {
            Ok(_) => ExitCode::SUCCESS,
            Err(e) => {
                eprintln!("{}", chain(&e));
                ExitCode::FAILURE
            }
        };
    }
    if let Some(how) = env::var_os(TMPFS) {
        return without_room(how.to_str().unwrap());
    }
    let tests: [(&str, fn()); 10] = [
        ("a_bundle_is_installed_once_and_found_then", a_bundle_is_installed_once_and_found_then),
        ("many_processes_and_kills_end_with_one_good_bundle", many_processes_and_kills_end_with_one_good_bundle),
        ("a_flipped_byte_is_refused_by_name", a_flipped_byte_is_refused_by_name),
        (
            "a_named_directory_without_a_bundle_is_named_with_the_profile",
            a_named_directory_without_a_bundle_is_named_with_the_profile,
        ),
        ("mixed_bundles_are_refused_by_name", mixed_bundles_are_refused_by_name),
        ("a_bad_source_leaves_nothing", a_bad_source_leaves_nothing),
        ("a_directory_that_cannot_be_written_is_named", a_directory_that_cannot_be_written_is_named),
        ("a_full_disk_and_a_read_only_home_are_named", a_full_disk_and_a_read_only_home_are_named),
        (
            "what_a_program_installed_is_replaced_by_its_next_version",
            what_a_program_installed_is_replaced_by_its_next_version,
        ),
        ("the_embedded_bundle_is_installed_by_many_processes", the_embedded_bundle_is_installed_by_many_processes),
    ];
    for (name, test) in tests {
        test();
        println!("test {name} ... ok");
    }
    ExitCode::SUCCESS
}

/// Takes its time, so that processes meet and are killed in between.
#[derive(Debug)]
struct Slow(Directory);

impl Source for Slow {
    fn name(&self) -> String {
        self.0.name()
    }

    fn version(&self) -> io::Result<Vec<u8>> {
        self.0.version()
    }

    fn copy(&self, name: &str, to: &mut dyn Write) -> io::Result<()> {
        let mut bytes = Vec::new();
        self.0.copy(name, &mut bytes)?;
        for part in bytes.chunks(4096) {
            to.write_all(part)?;
            thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }
}

/// A bundle of small files.
fn make(dir: &Path, change: impl FnOnce(&mut Value)) {
    fs::create_dir_all(dir).unwrap();
    let mut artifacts = serde_json::Map::new();
    for name in ["vmlinux", "initramfs.img", "youki"] {
        let bytes: Vec<u8> = name.bytes().cycle().take(20_000).collect();
        fs::write(dir.join(name), &bytes).unwrap();
        artifacts.insert(name.into(), json!({ "sha256": digest(&bytes), "size": bytes.len() }));
    }
    let mut version = json!({
        "schema": 1, "bundle_version": AGENT_VERSION, "agent_version": AGENT_VERSION, "youki_version": YOUKI_VERSION,
        "kernel_version": "6.12", "kernel_config_sha256": digest(b""), "profile": "container",
        "security_profile": "constrained", "capabilities": ["virtiofs", "vsock"], "artifacts": artifacts,
    });
    change(&mut version);
    fs::write(dir.join("version.json"), version.to_string()).unwrap();
}

fn digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn ensure(source: &dyn Source, base: &Path) -> Result<KernelBundle, EnsureError> {
    let options =
        KernelBundleOptions { profile: CONTAINER, install_dir: Some(base), source: Some(source), ..Default::default() };
    ensure_kernel_bundle(&options)
}

/// An error with its causes.
fn chain(e: &dyn std::error::Error) -> String {
    match e.source() {
        Some(cause) => format!("{e}: {}", chain(cause)),
        None => e.to_string(),
    }
}

struct Dirs {
    _all: tempfile::TempDir,
    source: PathBuf,
    base: PathBuf,
}

fn dirs() -> Dirs {
    let all = tempfile::tempdir().unwrap();
    let (source, base) = (all.path().join("source"), all.path().join("home/.vz/linux"));
    make(&source, |_| ());
    Dirs { _all: all, source, base }
}

fn names(dir: &Path) -> Vec<String> {
    let name = |entry: io::Result<fs::DirEntry>| entry.unwrap().file_name().to_string_lossy().into_owned();
    let mut names: Vec<String> = fs::read_dir(dir).unwrap().map(name).collect();
    names.sort();
    names
}

fn a_bundle_is_installed_once_and_found_then() {
    let Dirs { source, base, _all } = dirs();
    let options = KernelBundleOptions { profile: CONTAINER, install_dir: Some(&base), ..Default::default() };
    if vz_linux::embedded(CONTAINER).is_none() {
        let missing = ensure_kernel_bundle(&options).unwrap_err();
        assert!(
            matches!(&missing, EnsureError::NotFound { searched, .. } if searched.contains(".vz/linux")),
            "{missing}"
        );
    }
    let bundle = ensure(&Directory(source.clone()), &base).unwrap();
    assert_eq!((bundle.dir.clone(), bundle.profile), (base.join("container"), CONTAINER));
    assert_eq!(names(&bundle.dir), ["initramfs.img", "version.json", "vmlinux", "youki"]);
    // From here on there is no need of a source.
    assert_eq!(ensure_kernel_bundle(&options).unwrap(), bundle);
    let options = KernelBundleOptions { required_capabilities: &["vsock", "nfsd"], ..options };
    let lacking = ensure_kernel_bundle(&options).unwrap_err().to_string();
    assert!(lacking.contains("without nfsd;"), "{lacking}");
    let options = KernelBundleOptions { profile: KernelProfile::Developer, required_capabilities: &[], ..options };
    assert!(matches!(ensure_kernel_bundle(&options), Err(EnsureError::NotFound { .. })));
    let source = Directory(source);
    let options = KernelBundleOptions { source: Some(&source), ..options };
    let other = ensure_kernel_bundle(&options).unwrap_err().to_string();
    assert!(other.contains("has profile container, not developer"), "{other}");
}

fn many_processes_and_kills_end_with_one_good_bundle() {
    let Dirs { source, base, _all } = dirs();
    let start = || start(&[&source, &base]);
    // An installation takes some 40 ms, so these end at every stage of one.
    let mut half_done = 0;
    for round in 0..20 {
        let mut children: Vec<Child> = (0..3).map(|_| start()).collect();
        thread::sleep(Duration::from_millis(round * 4));
        for child in &mut children {
            child.kill().unwrap();
        }
        for mut child in children {
            child.wait().unwrap();
        }
        if base.join("container").exists() {
            // Whole, whenever it is there.
            KernelBundle::verify(&base.join("container")).unwrap();
            fs::remove_dir_all(base.join("container")).unwrap();
        }
        half_done += usize::from(base.is_dir() && names(&base).iter().any(|name| name.starts_with(".container.")));
    }
    println!("  {half_done} of 20 installations were left half done");
    assert!(half_done > 0);
    twenty(start);
    KernelBundle::verify(&base.join("container")).unwrap();
    assert_eq!(names(&base), [".lock", "container"]);
}

/// This program as a process that installs.
fn start(dirs: &[&Path]) -> Child {
    Command::new(env::current_exe().unwrap())
        .env(WORK, env::join_paths(dirs).unwrap())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Twenty processes at once, five of them killed; the others succeed.
fn twenty(start: impl Fn() -> Child) {
    let mut children: Vec<Child> = (0..20).map(|_| start()).collect();
    for child in children.iter_mut().take(5) {
        child.kill().unwrap();
    }
    let (killed, good) = children.into_iter().enumerate().partition::<Vec<_>, _>(|(number, _)| *number < 5);
    for (_, mut child) in killed {
        child.wait().unwrap();
    }
    for (_, child) in good {
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}

fn the_embedded_bundle_is_installed_by_many_processes() {
    let Some(embedded) = vz_linux::embedded(CONTAINER) else {
        vz_tally::skip!(
            test: "ensure::the_embedded_bundle_is_installed_by_many_processes",
            "no bundle is in this program: run `make check-payload`"
        );
        return;
    };
    let all = tempfile::tempdir().unwrap();
    let base = all.path().join("home/.vz/linux");
    // Killed at every stage; an installation takes some 300 ms.
    for round in 1..8 {
        let mut children: Vec<Child> = (0..3).map(|_| start(&[&base])).collect();
        thread::sleep(Duration::from_millis(round * 40));
        for child in &mut children {
            child.kill().unwrap();
        }
        for mut child in children {
            child.wait().unwrap();
        }
        if base.join("container").exists() {
            KernelBundle::verify(&base.join("container")).unwrap();
            fs::remove_dir_all(base.join("container")).unwrap();
        }
    }
    twenty(|| start(&[&base]));
    let bundle = KernelBundle::verify(&base.join("container")).unwrap();
    assert_eq!(fs::read(bundle.dir.join("version.json")).unwrap(), embedded.version().unwrap());
    assert_eq!(names(&base), [".lock", "container"]);
}

/// A directory as what is in a program.
#[derive(Debug)]
struct Program(Directory);

impl Source for Program {
    fn name(&self) -> String {
        "this program".into()
    }

    fn version(&self) -> io::Result<Vec<u8>> {
        self.0.version()
    }

    fn copy(&self, name: &str, to: &mut dyn Write) -> io::Result<()> {
        self.0.copy(name, to)
    }

    fn belongs_to_program(&self) -> bool {
        true
    }
}

fn what_a_program_installed_is_replaced_by_its_next_version() {
    let Dirs { source, base, _all } = dirs();
    let next = _all.path().join("next");
    make(&next, |v| v["git_commit"] = "0123456789".into());
    let (old, next) = (Program(Directory(source.clone())), Program(Directory(next)));
    let commit = |program: &Program| ensure(program, &base).unwrap().version.git_commit;
    assert_eq!(commit(&old), None);
    assert_eq!(commit(&next).as_deref(), Some("0123456789"));
    assert_eq!(names(&base), [".lock", "container"]);
    // A changed file is refused, not replaced: that is not an older version.
    fs::write(base.join("container/youki"), "evil").unwrap();
    let said = chain(&ensure(&next, &base).unwrap_err());
    assert!(said.contains("youki does not match"), "{said}");
    // What somebody else has put there stays.
    fs::remove_dir_all(base.join("container")).unwrap();
    assert_eq!(ensure(&Directory(source), &base).unwrap().version.git_commit, None);
    assert_eq!(commit(&next), None);
}

fn a_full_disk_and_a_read_only_home_are_named() {
    if !nix::unistd::geteuid().is_root() {
        vz_tally::skip!(
            test: "ensure::a_full_disk_and_a_read_only_home_are_named",
            "mounting a small tmpfs needs root"
        );
        return;
    }
    for how in ["full", "read-only"] {
        let output = Command::new(env::current_exe().unwrap()).env(TMPFS, how).output().unwrap();
        assert!(output.status.success(), "{how}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

/// In a process of its own, whose mounts end with it.
fn without_room(how: &str) -> ExitCode {
    use nix::mount::{MsFlags, mount};

    let Dirs { source, _all, .. } = dirs();
    let home = _all.path().join("small");
    fs::create_dir(&home).unwrap();
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
    let flags = if how == "full" { MsFlags::empty() } else { MsFlags::MS_RDONLY };
    mount(Some("tmpfs"), &home, Some("tmpfs"), flags, Some("size=32k")).unwrap();
    let base = home.join(".vz/linux");
    let refused = ensure(&Directory(source), &base).unwrap_err();
    assert!(matches!(refused, EnsureError::Install(InstallError::System { .. })), "{refused:?}");
    let said = chain(&refused);
    let wanted = if how == "full" { "No space left on device" } else { "Read-only file system" };
    assert!(said.contains(wanted) && said.contains(base.to_str().unwrap()) && said.contains("VZ_LINUX_DIR"), "{said}");
    if how == "full" {
        assert_eq!(names(&base), [".lock"], "something is left");
    }
    // Before the directory that it is mounted in is removed.
    nix::mount::umount(&home).unwrap();
    ExitCode::SUCCESS
}

fn a_flipped_byte_is_refused_by_name() {
    for name in ["vmlinux", "initramfs.img", "youki"] {
        let Dirs { source, base, _all } = dirs();
        let bundle = ensure(&Directory(source.clone()), &base).unwrap();
        let path = bundle.dir.join(name);
        let mut bytes = fs::read(&path).unwrap();
        bytes[10_000] ^= 1;
        fs::write(&path, bytes).unwrap();
        let said = chain(&ensure(&Directory(source), &base).unwrap_err());
        assert!(said.contains(name) && said.contains("does not match") && said.contains("container"), "{said}");
        assert!(KernelBundle::verify(&bundle.dir).is_err());
    }
}

fn a_named_directory_without_a_bundle_is_named_with_the_profile() {
    let Dirs { source, base, _all } = dirs();
    ensure(&Directory(source), &base).unwrap();
    let there = locate(Some(&base), CONTAINER).unwrap();
    assert_eq!(there, base.join("container"));
    for (dir, profile) in [(&base, KernelProfile::Developer), (&base.join("no"), CONTAINER)] {
        let said = chain(&locate(Some(dir), profile).unwrap_err());
        let advice = format!("--kernel-profile {profile} --dir {} --from DIR", dir.display());
        assert!(said.contains(&format!("profile {profile} in {}", dir.display())) && said.contains(&advice), "{said}");
    }
    // What a bundle itself is, is said by whoever opens it.
    assert_eq!(locate(Some(&there), KernelProfile::Developer).unwrap(), there);
}

fn mixed_bundles_are_refused_by_name() {
    let refused = |change: fn(&mut Value)| {
        let dir = tempfile::tempdir().unwrap();
        make(dir.path(), change);
        chain(&KernelBundle::verify(dir.path()).unwrap_err())
    };
    for (said, part) in [
        (refused(|v| v["agent_version"] = "9.9.9".into()), "has agent 9.9.9"),
        (refused(|v| v["youki_version"] = "0.5.0".into()), "has youki 0.5.0"),
        (refused(|v| v["profile"] = "broad".into()), "profile in version.json: \"broad\" is no kernel profile"),
        (refused(|v| v["architecture"] = "m68k".into()), "is for m68k, this machine is"),
        (refused(|v| v["schema"] = 7.into()), "schema 7"),
        (refused(|v| v["artifacts"]["youki"]["sha256"] = digest(b"other").into()), "youki does not match"),
        (refused(|v| drop(v["artifacts"].as_object_mut().unwrap().remove("youki"))), "no checksum for youki"),
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }
}

fn a_bad_source_leaves_nothing() {
    let Dirs { source, base, _all } = dirs();
    make(&source, |v| v["artifacts"]["vmlinux"]["sha256"] = digest(b"other").into());
    let refused = ensure(&Directory(source.clone()), &base).unwrap_err();
    assert!(matches!(refused, EnsureError::Install(InstallError::Mismatch { ref name, .. }) if name == "vmlinux"));
    make(&source, |v| v["artifacts"]["../escape"] = json!({ "sha256": digest(b""), "size": 0 }));
    let refused = ensure(&Directory(source.clone()), &base).unwrap_err();
    assert!(matches!(refused, EnsureError::Install(InstallError::Name { .. })), "{refused}");
    make(&source, |_| ());
    fs::remove_file(source.join("youki")).unwrap();
    let refused = chain(&ensure(&Directory(source), &base).unwrap_err());
    assert!(refused.contains("read youki of") && refused.contains("No such file"), "{refused}");
    assert_eq!(names(&base), [".lock"]);
}

fn a_directory_that_cannot_be_written_is_named() {
    let Dirs { source, base: _, _all } = dirs();
    // Not even by root.
    let refused = chain(&ensure(&Directory(source), Path::new("/proc/vz")).unwrap_err());
    assert!(refused.contains("/proc/vz") && refused.contains("VZ_LINUX_DIR"), "{refused}");
}
