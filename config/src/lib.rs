//! vz's configuration: `/etc/vz/config.toml`, its drop-ins, containerd's ConfigPath and a container's annotations, in
//! this order, into one validated [`Config`]. `config/vz.toml` is the commented default.

use std::{
    collections::HashMap,
    env, fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
pub use vz_linux::KernelProfile as LinuxProfile;

mod layer;

/// The main file.
pub const MAIN: &str = "/etc/vz/config.toml";
/// Its drop-ins.
pub const DROP_INS: &str = "/etc/vz/config.d";
/// Prefix of annotations that are for us.
pub const ANNOTATION: &str = "io.containerd.vz/";

/// Which machine a sandbox runs on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Machine {
    /// The best that works on this host.
    #[default]
    Auto,
    /// The built-in one, on KVM.
    Kvm,
    /// QEMU's `microvm` under software emulation.
    Qemu,
}

/// The whole configuration. Defaults are those of `config/vz.toml`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Which machine to use.
    pub machine: Machine,
    /// Which guest kernel is looked for where no bundle is configured.
    pub linux_profile: LinuxProfile,
    /// Annotations that a container may set, without [`ANNOTATION`].
    pub annotations: Vec<String>,
    /// Lowest level that is logged.
    pub log_level: LogLevel,
    /// The guest bundle.
    pub guest: Guest,
    /// Size of VMs.
    pub vm: Vm,
    /// Deadlines.
    pub timeouts: Timeouts,
    /// QEMU.
    pub qemu: Qemu,
    /// The vmm process.
    pub vmm: Vmm,
    /// The guest's console.
    pub console: Console,
}

/// A level of logging.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)]
pub enum LogLevel {
    Error,
    Warn,
    #[default]
    Info,
    Debug,
    Trace,
}

impl LogLevel {
    /// Its name, as in the configuration.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warn => "warn",
            Self::Info => "info",
            Self::Debug => "debug",
            Self::Trace => "trace",
        }
    }
}

/// `[guest]`
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Guest {
    /// The bundle's directory; empty means the first installed one of the profile, see [`Config::guest_bundle`].
    pub bundle: PathBuf,
    /// Appended to the kernel command line.
    pub kernel_args: String,
}

/// `[vm]`
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Vm {
    /// vCPUs without a limit.
    pub vcpus: u32,
    /// MiB without a limit.
    pub memory_mib: u64,
    /// MiB on top of a limit.
    pub memory_base_mib: u64,
    /// MiB that running a VM may take on the host, on top of its size.
    pub overhead_mib: u64,
    /// Most vCPUs; 0 means the host's.
    pub max_vcpus: u32,
    /// Most MiB; 0 means the host's.
    pub max_memory_mib: u64,
}

/// `[timeouts]`, in seconds.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Timeouts {
    /// From the VM's start to the agent's connection.
    pub boot_s: u64,
    /// For a request to the agent, its return after its connection was lost included.
    pub agent_s: u64,
    /// For the guest to confirm a SIGKILL, and then the removal of the container.
    pub kill_s: u64,
    /// For output after a process's end.
    pub drain_s: u64,
    /// For a hook whose spec sets no timeout.
    pub hook_s: u64,
    /// How long the host's file systems may take when a container's mounts are made or taken away.
    pub files_s: u64,
}

/// `[qemu]`
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Qemu {
    /// A name in `PATH`, or an absolute path.
    pub path: PathBuf,
}

/// `[vmm]`
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Vmm {
    /// Whether it is in a user namespace of its own.
    pub user_namespace: bool,
    /// What happens where it makes a system call that its filters deny.
    pub denied_calls: DeniedCalls,
}

/// What happens to a vmm process that makes a system call which its filters deny.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeniedCalls {
    /// The kernel kills it.
    #[default]
    Kill,
    /// It logs which call it was, and ends.
    Report,
}

/// `[console]`
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Console {
    /// KiB that are kept.
    pub limit_kib: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            machine: Machine::default(),
            linux_profile: LinuxProfile::Container,
            annotations: vec!["vcpus".into(), "memory-mib".into()],
            log_level: LogLevel::default(),
            guest: Guest::default(),
            vm: Vm::default(),
            timeouts: Timeouts::default(),
            qemu: Qemu::default(),
            vmm: Vmm::default(),
            console: Console::default(),
        }
    }
}

impl Default for Vm {
    fn default() -> Self {
        Self { vcpus: 1, memory_mib: 1024, memory_base_mib: 128, overhead_mib: 384, max_vcpus: 0, max_memory_mib: 0 }
    }
}

impl Default for Timeouts {
    fn default() -> Self {
        Self { boot_s: 30, agent_s: 30, kill_s: 4, drain_s: 10, hook_s: 300, files_s: 20 }
    }
}

impl Default for Qemu {
    fn default() -> Self {
        Self { path: "qemu-system-x86_64".into() }
    }
}

impl Default for Vmm {
    fn default() -> Self {
        Self { user_namespace: true, denied_calls: DeniedCalls::default() }
    }
}

impl Default for Console {
    fn default() -> Self {
        Self { limit_kib: 256 }
    }
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file or directory could not be read.
    #[error("read configuration {path}")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file is not TOML, or has a key or value that is not known.
    #[error("configuration {path}: {source}")]
    Parse {
        /// Which.
        path: PathBuf,
        /// Where and what.
        source: Box<toml::de::Error>,
    },
    /// A value is out of its bounds.
    #[error("configuration: {key} is {found}, must be {wanted}")]
    Value {
        /// The key.
        key: &'static str,
        /// What it is.
        found: u64,
        /// What it may be.
        wanted: &'static str,
    },
    /// An annotation is not known, or not allowed by `annotations`.
    #[error("annotation {ANNOTATION}{key} is not {why}")]
    Annotation {
        /// The key.
        key: String,
        /// `known` or `allowed by the configuration's "annotations"`.
        why: &'static str,
    },
    /// An annotation's value is no number.
    #[error("annotation {ANNOTATION}{key}: {value:?} is not a number")]
    Number {
        /// The key.
        key: String,
        /// Its value.
        value: String,
    },
    /// An annotation asks for more than a VM may have.
    #[error("annotation {ANNOTATION}{key} is {value}, must be at most {bound}: {whose}")]
    Bound {
        /// The key.
        key: &'static str,
        /// Its value.
        value: u64,
        /// The most that it may be.
        bound: u64,
        /// Who says so.
        whose: String,
    },
}

/// The size of this host, which bounds VMs unless the configuration does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Host {
    /// Its processors.
    pub vcpus: u32,
    /// Its memory; `None` if it does not say.
    pub memory_mib: Option<u64>,
}

impl Config {
    /// Reads the host's configuration, with the file `extra` (containerd's ConfigPath) last where there is one.
    ///
    /// In the environment `VZ_CONFIG` names another main file, without drop-ins, and `VZ_LINUX_DIR` the guest bundle.
    pub fn load(extra: Option<&Path>) -> Result<Self, Error> {
        let mut config = match env::var_os("VZ_CONFIG") {
            Some(main) => Self::load_from(Path::new(&main), Path::new(""), extra)?,
            None => Self::load_from(Path::new(MAIN), Path::new(DROP_INS), extra)?,
        };
        if let Some(bundle) = env::var_os("VZ_LINUX_DIR") {
            config.guest.bundle = bundle.into();
        }
        Ok(config)
    }

    /// As [`Config::load`], from other places.
    pub fn load_from(main: &Path, drop_ins: &Path, extra: Option<&Path>) -> Result<Self, Error> {
        let mut files = Vec::new();
        if exists(main)? {
            files.push(main.to_owned());
        }
        files.extend(layer::drop_ins(drop_ins)?);
        files.extend(extra.map(Path::to_owned));
        let mut merged = toml::Table::new();
        for path in &files {
            let text = fs::read_to_string(path).map_err(|source| Error::Read { path: path.clone(), source })?;
            let parse = |source| Error::Parse { path: path.clone(), source: Box::new(source) };
            // Each file by itself first: the error then has its line.
            toml::from_str::<Self>(&text).map_err(parse)?;
            layer::merge(&mut merged, text.parse().map_err(parse)?);
        }
        let path = || files.last().cloned().unwrap_or_default();
        let config: Self =
            merged.try_into().map_err(|source| Error::Parse { path: path(), source: Box::new(source) })?;
        config.validate()?;
        Ok(config)
    }

    /// Applies a container's annotations; those that are not for us are passed over.
    ///
    /// What a VM may have at most binds them too: as they are exact, more than that is an error and not made less.
    pub fn annotate(mut self, annotations: &HashMap<String, String>, host: Host) -> Result<Self, Error> {
        let mut ours: Vec<_> =
            annotations.iter().filter_map(|(key, value)| Some((key.strip_prefix(ANNOTATION)?, value))).collect();
        ours.sort();
        for (key, value) in ours {
            let number = || value.parse::<u32>().map_err(|_| Error::Number { key: key.into(), value: value.clone() });
            let allowed = self.annotations.iter().any(|name| name == key);
            match key {
                "vcpus" | "memory-mib" if !allowed => {
                    return Err(Error::Annotation {
                        key: key.into(),
                        why: "allowed by the configuration's \"annotations\"",
                    });
                }
                "vcpus" => {
                    self.vm.vcpus = number()?;
                    let (most, host) = (u64::from(self.vm.max_vcpus), Some(host.vcpus.into()));
                    bound("vcpus", self.vm.vcpus.into(), ("max_vcpus", most), ("processors", host))?;
                }
                "memory-mib" => {
                    self.vm.memory_mib = number()?.into();
                    let most = self.vm.max_memory_mib;
                    bound("memory-mib", self.vm.memory_mib, ("max_memory_mib", most), ("MiB", host.memory_mib))?;
                }
                _ => return Err(Error::Annotation { key: key.into(), why: "known" }),
            }
        }
        self.validate()?;
        Ok(self)
    }

    /// The guest bundle's directory, or one that has a directory for each profile; none where one is to be looked for.
    pub fn guest_bundle(&self) -> Option<&Path> {
        Some(self.guest.bundle.as_path()).filter(|dir| !dir.as_os_str().is_empty())
    }

    fn validate(&self) -> Result<(), Error> {
        let check = |key, found: u64, least: u64, most: u64, wanted| {
            if (least..=most).contains(&found) { Ok(()) } else { Err(Error::Value { key, found, wanted }) }
        };
        check("vm.vcpus", self.vm.vcpus.into(), 1, 254, "from 1 to 254")?;
        check("vm.memory_mib", self.vm.memory_mib, 64, 1 << 22, "from 64 to 4194304")?;
        check("vm.memory_base_mib", self.vm.memory_base_mib, 64, 1 << 22, "from 64 to 4194304")?;
        check("vm.overhead_mib", self.vm.overhead_mib, 64, 1 << 22, "from 64 to 4194304")?;
        check("timeouts.boot_s", self.timeouts.boot_s, 1, 3600, "from 1 to 3600")?;
        check("timeouts.agent_s", self.timeouts.agent_s, 1, 3600, "from 1 to 3600")?;
        check("timeouts.kill_s", self.timeouts.kill_s, 1, 3600, "from 1 to 3600")?;
        check("timeouts.drain_s", self.timeouts.drain_s, 0, 3600, "at most 3600")?;
        check("timeouts.hook_s", self.timeouts.hook_s, 1, 86_400, "from 1 to 86400")?;
        check("timeouts.files_s", self.timeouts.files_s, 1, 3600, "from 1 to 3600")?;
        check("console.limit_kib", self.console.limit_kib, 4, 1 << 20, "from 4 to 1048576")
    }
}

/// Refuses what is over the configured bound, or over what the host has if none is configured.
fn bound(
    key: &'static str,
    value: u64,
    (name, configured): (&str, u64),
    (unit, has): (&str, Option<u64>),
) -> Result<(), Error> {
    let (bound, whose) = match (configured, has) {
        (0, None) => return Ok(()),
        (0, Some(has)) => {
            (has, format!("the host has as many {unit}, and vm.{name} in the configuration sets no other bound"))
        }
        (configured, _) => (configured, format!("vm.{name} in the configuration says so")),
    };
    if value > bound { Err(Error::Bound { key, value, bound, whose }) } else { Ok(()) }
}

fn exists(path: &Path) -> Result<bool, Error> {
    path.try_exists().map_err(|source| Error::Read { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(main: &str, drop_ins: &[(&str, &str)]) -> Result<Config, Error> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config.toml");
        fs::write(&file, main).unwrap();
        let sub = dir.path().join("config.d");
        fs::create_dir(&sub).unwrap();
        for (name, text) in drop_ins {
            fs::write(sub.join(name), text).unwrap();
        }
        Config::load_from(&file, &sub, None)
    }

    #[test]
    fn the_commented_file_is_the_default() {
        assert_eq!(load(include_str!("../vz.toml"), &[]).unwrap(), Config::default());
    }

    #[test]
    fn no_file_at_all_is_the_default() {
        let dir = tempfile::tempdir().unwrap();
        let none = dir.path().join("none");
        assert_eq!(Config::load_from(&none, &none, None).unwrap(), Config::default());
        assert!(matches!(Config::load_from(&none, &none, Some(&none)), Err(Error::Read { .. })));
    }

    #[test]
    fn drop_ins_replace_single_values_in_the_order_of_their_names() {
        let config = load(
            "[vm]\nvcpus = 2\nmemory_mib = 512",
            &[("20.toml", "vm.vcpus = 4"), ("10.toml", "vm.vcpus = 3"), ("x.bak", "nonsense")],
        )
        .unwrap();
        assert_eq!((config.vm.vcpus, config.vm.memory_mib), (4, 512));
    }

    #[test]
    fn an_unknown_key_is_an_error_with_file_and_line() {
        let error = load("[vm]\nvcpus = 2\nvcpu = 2", &[]).unwrap_err().to_string();
        assert!(error.contains("config.toml") && error.contains("line 3") && error.contains("vcpu"), "{error}");
    }

    #[test]
    fn values_have_bounds() {
        assert!(load("vm.vcpus = 0", &[]).unwrap_err().to_string().contains("vm.vcpus is 0"));
    }

    #[test]
    fn annotations_are_applied_where_allowed() {
        let set = |key: &str, value: &str| HashMap::from([(format!("{ANNOTATION}{key}"), value.to_owned())]);
        let config = Config::default();
        assert_eq!(config.clone().annotate(&set("vcpus", "3"), HOST).unwrap().vm.vcpus, 3);
        assert!(config.clone().annotate(&set("vcpus", "many"), HOST).is_err());
        assert!(config.clone().annotate(&set("colour", "red"), HOST).is_err());
        let strict = Config { annotations: Vec::new(), ..config };
        assert!(strict.clone().annotate(&set("vcpus", "3"), HOST).unwrap_err().to_string().contains("allowed"));
        assert!(strict.annotate(&HashMap::from([("other/vcpus".into(), "3".into())]), HOST).is_ok());
    }

    const HOST: Host = Host { vcpus: 4, memory_mib: Some(8192) };

    #[test]
    fn annotations_are_bound_by_what_a_vm_may_have() {
        let ask = |config: &Config, key: &str, value: &str| {
            let set = HashMap::from([(format!("{ANNOTATION}{key}"), value.to_owned())]);
            config.clone().annotate(&set, HOST).map_err(|error| error.to_string())
        };
        let mut config = Config::default();
        for (key, most, more) in [("vcpus", "4", "5"), ("memory-mib", "8192", "8193")] {
            assert!(ask(&config, key, most).is_ok());
            let said = ask(&config, key, more).unwrap_err();
            let wanted = format!("annotation io.containerd.vz/{key} is {more}, must be at most {most}: the host has");
            assert!(said.starts_with(&wanted), "{said}");
        }
        // The configuration's word counts before the host's, in both directions.
        (config.vm.max_vcpus, config.vm.max_memory_mib) = (2, 16_384);
        assert!(ask(&config, "vcpus", "2").is_ok());
        let said = ask(&config, "vcpus", "3").unwrap_err();
        assert_eq!(
            said,
            "annotation io.containerd.vz/vcpus is 3, must be at most 2: vm.max_vcpus in the configuration says so"
        );
        assert!(ask(&config, "memory-mib", "16384").is_ok());
        assert!(ask(&config, "memory-mib", "16385").unwrap_err().contains("vm.max_memory_mib"));
        let unknown = Host { memory_mib: None, ..HOST };
        let huge = HashMap::from([(format!("{ANNOTATION}memory-mib"), "100000".to_owned())]);
        assert!(Config::default().annotate(&huge, unknown).is_ok());
    }
}
