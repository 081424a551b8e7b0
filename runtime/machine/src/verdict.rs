//! Whether this host's KVM can be used: probed once, remembered until something changes that it depends on.
//!
//! What is cheap and can change at any time (whether `/dev/kvm` can be opened, what it offers) is asked every time.
//! What a guest finds is kept in a file, with what it depends on: the boot, the kernel, KVM's modules with their
//! parameters, and this program.
//!
//! Invariant: the file is replaced as a whole, so a reader finds an old verdict or a new one. A file that cannot be
//! read or understood is none.

use std::{
    collections::BTreeMap,
    fs::{self, DirBuilder, File},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, PermissionsExt},
    path::{Path, PathBuf},
    time::Duration,
};

use nix::{
    fcntl::{Flock, FlockArg},
    time::{ClockId, clock_gettime},
};
use serde::{Deserialize, Serialize};
use vz_probe::{Kvm, Speed, Unusable};
use vz_state::ROOT;

/// Below [`ROOT`], what is known until the next boot. A namespace of containerd has no name with a dot in front.
const FILE: &str = ".kvm.json";
/// A VM's early end of KVM, after which no VM has come up.
const FAILURE: &str = ".kvm-failure.json";
const SCHEMA: u32 = 1;
/// How long a finding holds that may have been the moment's: long enough that a host on which probes never end does not
/// pay for one at every start.
const FLEETING: Duration = Duration::from_secs(300);

/// What is known of this host's KVM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// Whether it can be used.
    pub kvm: Result<Speed, Unusable>,
    /// How that is known.
    pub source: Source,
}

/// How a verdict came about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// By asking the device, which is done every time.
    Device,
    /// By a guest, right now.
    Probe,
    /// By a guest, earlier since the host was booted.
    Memory,
}

/// This host, as far as its KVM is concerned.
#[derive(Debug)]
pub struct Host {
    dir: PathBuf,
    key: Key,
    open: fn() -> Result<Kvm, Unusable>,
    probe: fn(&Kvm) -> Result<Speed, Unusable>,
}

/// What a verdict depends on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Key {
    boot_id: String,
    kernel: String,
    /// Each of KVM's modules: its version, where it has one, and its parameters.
    modules: BTreeMap<String, String>,
    program: String,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Remembered {
    schema: u32,
    key: Key,
    kvm: Result<Speed, Unusable>,
    /// Seconds since boot.
    at: u64,
}

/// An early end of a VM that KVM is to blame for.
#[derive(Debug, Serialize, Deserialize)]
struct Failure {
    key: Key,
    message: String,
    /// Milliseconds since boot.
    at_ms: u64,
}

/// What follows from an early end of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Consequence {
    /// The next VM tries KVM once more.
    TryAgain,
    /// `auto` does not use KVM any more.
    Unusable,
}

/// A VM has come up on KVM: an earlier VM's failure was its own.
pub fn came_up() {
    forget_failure(Path::new(ROOT));
}

fn forget_failure(dir: &Path) {
    match fs::remove_file(dir.join(FAILURE)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(%error, dir = %dir.display(), "failure of KVM is not forgotten");
        }
        _ => {}
    }
}

impl Host {
    /// This host as it is now.
    pub fn this() -> Self {
        Self { dir: ROOT.into(), key: Key::this(), open: Kvm::open, probe: Kvm::probe }
    }

    /// The verdict: the remembered one, or that of a probe, which is then remembered. For a process with one thread.
    ///
    /// Processes that ask at the same time wait for the first one's probe.
    pub fn kvm(&self) -> Verdict {
        let kvm = match (self.open)() {
            Ok(kvm) => kvm,
            Err(why) => return Verdict { kvm: Err(why), source: Source::Device },
        };
        if let Some(kvm) = self.recall() {
            return Verdict { kvm, source: Source::Memory };
        }
        let _lock = self.lock(FlockArg::LockExclusive);
        if let Some(kvm) = self.recall() {
            return Verdict { kvm, source: Source::Memory };
        }
        self.probe_and_remember(&kvm)
    }

    /// As [`Host::kvm`], by a new probe in any case.
    pub fn probe(&self) -> Verdict {
        match (self.open)() {
            Ok(kvm) => {
                let _lock = self.lock(FlockArg::LockExclusive);
                self.probe_and_remember(&kvm)
            }
            Err(why) => Verdict { kvm: Err(why), source: Source::Device },
        }
    }

    /// A VM on KVM that has run for this long has ended early, and `message` says how.
    ///
    /// One failure may be the moment's: it is noted, and the next VM tries KVM again. If that fails too, with no VM
    /// that has [come up](came_up) in between, `auto` does not use KVM any more until the next boot or `vz check
    /// --probe`. VMs that were started before the first failure do not count, whatever broke may have hit them all.
    ///
    /// Only for a VM whose agent has never connected: until then it ran programs that were verified, and what it made
    /// of KVM is KVM's doing. After that whoever is in the guest could bring such a failure about, and with this would
    /// slow down everybody else's containers on the host.
    pub fn failed_early(&self, message: &str, ran: Duration) -> Consequence {
        // Does not wait for whoever probes, whose finding is the newer one.
        let _lock = self.lock(FlockArg::LockExclusiveNonblock);
        let now = ms_since_boot();
        match self.failure() {
            Some(first) if first.at_ms <= now.saturating_sub(ms(ran)) => {
                self.remember(&Err(Unusable::Boot { message: message.to_owned() }));
                forget_failure(&self.dir);
                return Consequence::Unusable;
            }
            Some(_) => {}
            None => {
                let failure = Failure { key: self.key.clone(), message: message.to_owned(), at_ms: now };
                if let Err(error) = self.write(FAILURE, &failure) {
                    tracing::warn!(%error, dir = %self.dir.display(), "failure of KVM is not remembered");
                }
            }
        }
        Consequence::TryAgain
    }

    fn failure(&self) -> Option<Failure> {
        let text = fs::read(self.dir.join(FAILURE)).ok()?;
        serde_json::from_slice(&text).ok().filter(|found: &Failure| found.key == self.key)
    }

    fn probe_and_remember(&self, kvm: &Kvm) -> Verdict {
        let kvm = (self.probe)(kvm);
        match &kvm {
            Ok(speed) => tracing::info!(loop_ps = speed.loop_ps, "KVM works on this host"),
            Err(why) => tracing::info!("KVM cannot be used on this host: {why}; {}", why.advice()),
        }
        self.remember(&kvm);
        Verdict { kvm, source: Source::Probe }
    }

    /// Held by whoever probes. Without it, several may.
    fn lock(&self, how: FlockArg) -> Option<Flock<File>> {
        self.make_dir().ok()?;
        Flock::lock(File::open(&self.dir).ok()?, how).ok()
    }

    fn make_dir(&self) -> io::Result<()> {
        DirBuilder::new().recursive(true).mode(0o711).create(&self.dir)
    }

    fn recall(&self) -> Option<Result<Speed, Unusable>> {
        let text = fs::read(self.dir.join(FILE)).ok()?;
        let found: Remembered = serde_json::from_slice(&text).ok()?;
        let holds = match &found.kvm {
            Err(why) if !why.is_lasting() => since_boot().saturating_sub(found.at) < FLEETING.as_secs(),
            _ => true,
        };
        (found.schema == SCHEMA && found.key == self.key && holds).then_some(found.kvm)
    }

    fn remember(&self, kvm: &Result<Speed, Unusable>) {
        let remembered = Remembered { schema: SCHEMA, key: self.key.clone(), kvm: kvm.clone(), at: since_boot() };
        if let Err(error) = self.write(FILE, &remembered) {
            tracing::warn!(%error, dir = %self.dir.display(), "verdict on KVM is not remembered");
        }
    }

    fn write(&self, name: &str, content: &impl Serialize) -> io::Result<()> {
        self.make_dir()?;
        let mut file = tempfile::Builder::new().prefix(name).tempfile_in(&self.dir)?;
        file.write_all(&serde_json::to_vec(content)?)?;
        // Whoever asks `vz check` may read it.
        file.as_file().set_permissions(fs::Permissions::from_mode(0o644))?;
        file.persist(self.dir.join(name))?;
        Ok(())
    }
}

impl Key {
    fn this() -> Self {
        let read = |path: &str| fs::read_to_string(path).map(|text| text.trim().to_owned()).unwrap_or_default();
        Self {
            boot_id: read("/proc/sys/kernel/random/boot_id"),
            kernel: format!("{} {}", read("/proc/sys/kernel/osrelease"), read("/proc/sys/kernel/version")),
            modules: modules(Path::new("/sys/module")),
            program: env!("CARGO_PKG_VERSION").to_owned(),
        }
    }
}

/// KVM's modules, or what is built in of it.
fn modules(root: &Path) -> BTreeMap<String, String> {
    let mut modules = BTreeMap::new();
    for entry in fs::read_dir(root).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name == "kvm" || name.starts_with("kvm_") {
            modules.insert(name, describe(&entry.path()));
        }
    }
    modules
}

fn describe(module: &Path) -> String {
    let read = |path: PathBuf| fs::read_to_string(path).map(|text| text.trim().to_owned());
    let mut words: Vec<String> =
        ["version", "srcversion"].iter().filter_map(|name| read(module.join(name)).ok()).collect();
    let mut parameters: Vec<String> = fs::read_dir(module.join("parameters"))
        .into_iter()
        .flatten()
        .flatten()
        // Some are root's to read; what cannot be read stays the same.
        .map(|entry| format!("{}={}", entry.file_name().to_string_lossy(), read(entry.path()).unwrap_or_default()))
        .collect();
    parameters.sort();
    words.append(&mut parameters);
    words.join(" ")
}

fn since_boot() -> u64 {
    ms_since_boot() / 1000
}

fn ms_since_boot() -> u64 {
    ms(clock_gettime(ClockId::CLOCK_BOOTTIME).map(Duration::from).unwrap_or_default())
}

fn ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    fn key(boot_id: &str) -> Key {
        Key { boot_id: boot_id.into(), kernel: "6.12".into(), modules: BTreeMap::new(), program: "1".into() }
    }

    fn host(dir: &Path, boot_id: &str) -> Host {
        Host {
            dir: dir.join("vz"),
            key: key(boot_id),
            open: || Err(Unusable::Missing),
            probe: |_| Err(Unusable::TripleFault),
        }
    }

    const SLOW: Unusable = Unusable::TooSlow { loop_ps: 1_400_000 };

    #[test]
    fn what_is_remembered_is_recalled_until_something_changes() {
        let dir = tempfile::tempdir().unwrap();
        let mut host = host(dir.path(), "boot1");
        assert_eq!(host.recall(), None);
        host.remember(&Err(SLOW));
        assert_eq!(host.recall(), Some(Err(SLOW)));
        host.remember(&Ok(Speed { loop_ps: 300 }));
        assert_eq!(host.recall(), Some(Ok(Speed { loop_ps: 300 })));
        for change in [
            |key: &mut Key| key.boot_id.push('x'),
            |key: &mut Key| key.kernel.push('x'),
            |key: &mut Key| key.program.push('x'),
            |key: &mut Key| drop(key.modules.insert("kvm".into(), "nested=N".into())),
        ] {
            host.key = key("boot1");
            change(&mut host.key);
            assert_eq!(host.recall(), None);
        }
        // Nothing else is left there.
        assert_eq!(fs::read_dir(&host.dir).unwrap().count(), 1);
        let mode = fs::metadata(host.dir.join(FILE)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o644);
    }

    #[test]
    fn what_is_no_verdict_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let host = host(dir.path(), "boot1");
        host.remember(&Err(SLOW));
        let path = host.dir.join(FILE);
        let text = fs::read_to_string(&path).unwrap();
        for text in ["", "{", &text[..text.len() / 2], &text.replace("\"schema\":1", "\"schema\":2")] {
            fs::write(&path, text).unwrap();
            assert_eq!(host.recall(), None, "{text}");
        }
        fs::write(&path, text).unwrap();
        assert_eq!(host.recall(), Some(Err(SLOW)));
    }

    #[test]
    fn a_moments_failure_is_forgotten_after_a_while() {
        let dir = tempfile::tempdir().unwrap();
        let host = host(dir.path(), "boot1");
        let late = Err(Unusable::Deadline { ms: 700 });
        let remember = |age: u64, kvm: &Result<Speed, Unusable>| {
            let at = since_boot().saturating_sub(age);
            host.write(FILE, &Remembered { schema: SCHEMA, key: host.key.clone(), kvm: kvm.clone(), at }).unwrap();
        };
        remember(0, &late);
        assert_eq!(host.recall(), Some(late.clone()));
        remember(FLEETING.as_secs(), &late);
        assert_eq!(host.recall(), (since_boot() < FLEETING.as_secs()).then_some(late));
        remember(FLEETING.as_secs(), &Err(SLOW));
        assert_eq!(host.recall(), Some(Err(SLOW)));
    }

    #[test]
    fn the_second_early_failure_in_a_row_marks_the_host() {
        const SHORT: Duration = Duration::ZERO;
        let dir = tempfile::tempdir().unwrap();
        let host = host(dir.path(), "boot1");
        let works = Some(Ok(Speed { loop_ps: 300 }));
        host.remember(&Ok(Speed { loop_ps: 300 }));
        assert_eq!(host.failed_early("internal error 1", SHORT), Consequence::TryAgain);
        assert_eq!(host.recall(), works);
        // Another one that was on its way at the time of the first is no second try.
        assert_eq!(host.failed_early("internal error 2", Duration::from_secs(60)), Consequence::TryAgain);
        // One that has come up clears the host.
        forget_failure(&host.dir);
        assert_eq!(host.failed_early("internal error 3", SHORT), Consequence::TryAgain);
        assert_eq!(host.recall(), works);
        assert_eq!(host.failed_early("internal error 4", SHORT), Consequence::Unusable);
        assert_eq!(host.recall(), Some(Err(Unusable::Boot { message: "internal error 4".into() })));
        // Probed again, it starts anew.
        host.remember(&Ok(Speed { loop_ps: 300 }));
        assert_eq!(host.failed_early("internal error 5", SHORT), Consequence::TryAgain);
        // What has failed before the host was booted again is not the same.
        let booted = Host { key: key("boot2"), ..self::host(dir.path(), "boot2") };
        assert_eq!(booted.failed_early("internal error 6", SHORT), Consequence::TryAgain);
    }

    #[test]
    fn the_device_is_asked_every_time() {
        let dir = tempfile::tempdir().unwrap();
        let host = host(dir.path(), "boot1");
        host.remember(&Ok(Speed { loop_ps: 300 }));
        assert_eq!(host.kvm(), Verdict { kvm: Err(Unusable::Missing), source: Source::Device });
    }

    #[test]
    fn one_probe_is_enough_for_all() {
        static PROBES: AtomicU32 = AtomicU32::new(0);
        // Whatever this is, it is open and no KVM is asked anything of it.
        let Ok(_) = Kvm::open() else {
            vz_tally::skip!("no usable /dev/kvm");
            return;
        };
        let dir = tempfile::tempdir().unwrap();
        let host = Host {
            open: Kvm::open,
            probe: |_| {
                PROBES.fetch_add(1, Ordering::Relaxed);
                Err(SLOW)
            },
            ..host(dir.path(), "boot1")
        };
        let sources: Vec<Source> = std::thread::scope(|scope| {
            let asking: Vec<_> = (0..8).map(|_| scope.spawn(|| host.kvm().source)).collect();
            asking.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert_eq!(PROBES.load(Ordering::Relaxed), 1);
        assert_eq!(sources.iter().filter(|source| **source == Source::Probe).count(), 1);
        assert_eq!(host.probe().source, Source::Probe);
        assert_eq!(PROBES.load(Ordering::Relaxed), 2);
    }

    #[test]
    fn modules_are_told_apart_by_version_and_parameters() {
        let dir = tempfile::tempdir().unwrap();
        let parameters = dir.path().join("kvm_amd/parameters");
        fs::create_dir_all(&parameters).unwrap();
        fs::create_dir(dir.path().join("loop")).unwrap();
        fs::write(dir.path().join("kvm_amd/srcversion"), "ABC\n").unwrap();
        fs::write(parameters.join("npt"), "Y\n").unwrap();
        fs::write(parameters.join("avic"), "N\n").unwrap();
        assert_eq!(modules(dir.path()), BTreeMap::from([("kvm_amd".into(), "ABC avic=N npt=Y".into())]));
        fs::write(parameters.join("npt"), "N\n").unwrap();
        assert_eq!(modules(dir.path())["kvm_amd"], "ABC avic=N npt=N");
    }
}
