//! What a host lacks that tests need, in the words of the list.

use std::{env, fs, fs::File, path::Path};

/// What is true of a host.
#[derive(Debug, Clone, Default)]
pub struct Host(Vec<&'static str>);

/// All words, beside `anywhere`.
pub const WORDS: [&str; 10] =
    ["no-kvm", "no-root", "no-tun", "no-loop", "no-cgroups", "no-overlay", "slow", "runc", ON_KVM, ON_QEMU];
/// Which machine containers run on; [`Host::look`] does not know.
const ON_KVM: &str = "on-kvm";
const ON_QEMU: &str = "on-qemu";

impl Host {
    /// This host.
    pub fn look() -> Self {
        let kvm = File::options().read(true).write(true).open("/dev/kvm").is_ok();
        let variable = |name: &str| env::var(name).unwrap_or_default();
        let facts = [
            !kvm,
            !is_root(),
            !Path::new("/dev/net/tun").exists(),
            !Path::new("/dev/loop-control").exists(),
            !Path::new("/sys/fs/cgroup/cgroup.controllers").exists() && !Path::new("/sys/fs/cgroup/memory").exists(),
            !fs::read_to_string("/proc/filesystems").unwrap_or_default().contains("overlay"),
            variable("VZ_PATIENCE").parse().is_ok_and(|times: u32| times > 1),
            variable("VZ_TEST_RUNTIME").contains("runc"),
            false,
            false,
        ];
        Self::of(WORDS.into_iter().zip(facts).filter_map(|(word, is)| is.then_some(word)))
    }

    /// One of which these words are true.
    pub fn of(words: impl IntoIterator<Item = &'static str>) -> Self {
        Self(words.into_iter().collect())
    }

    /// Adds a word that is true of it.
    pub fn add(&mut self, word: &'static str) {
        self.0.push(word);
    }

    /// Whether a word is true of it.
    pub fn is(&self, word: &str) -> bool {
        word == "anywhere" || self.0.contains(&word)
    }
}

/// By the effective user id, the second number.
fn is_root() -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ids = status.lines().find_map(|line| line.strip_prefix("Uid:")).unwrap_or_default();
    ids.split_whitespace().nth(1) == Some("0")
}
