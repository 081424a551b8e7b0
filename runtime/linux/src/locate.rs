//! Where bundles are kept.
//!
//! A *base* directory has a directory for each profile in it: `BASE/container`, `BASE/developer`. It may also be a
//! bundle itself, which then counts for the profile that its `version.json` names: so the developer's bundle was kept
//! once, and so a directory that was just built can be named.

use std::{
    env,
    ffi::OsString,
    path::{Path, PathBuf},
};

use crate::{Bundle, KernelProfile, VERSION};

/// Names another base directory, which is then the only one.
pub const DIR_VARIABLE: &str = "VZ_LINUX_DIR";
/// Where bundles are installed for everybody, the most important first.
pub const SYSTEM: [&str; 2] = ["/usr/local/share/vz/linux", "/usr/share/vz/linux"];
/// Where root's programs put the bundle that is in them; used by everybody who has none elsewhere.
pub const STATE: &str = "/var/lib/vz/linux";

/// The base directories that are looked through, the first one first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Places {
    /// `$VZ_LINUX_DIR`; nothing else counts where it is set.
    pub named: Option<PathBuf>,
    /// `~/.vz/linux`; none where the user has no home.
    pub user: Option<PathBuf>,
    /// [`SYSTEM`] and [`STATE`].
    pub system: Vec<PathBuf>,
    /// Where an embedded bundle is installed unless `named` is set; none where the user has no home.
    pub install: Option<PathBuf>,
}

impl Places {
    /// Those of this process's environment.
    pub fn from_env() -> Self {
        Self::from_variables(env::var_os(DIR_VARIABLE), env::var_os("HOME"))
    }

    fn from_variables(named: Option<OsString>, home: Option<OsString>) -> Self {
        let set = |value: Option<OsString>| value.filter(|value| !value.is_empty()).map(PathBuf::from);
        // Service managers often set no HOME.
        let home = set(home).or_else(|| Some(nix::unistd::User::from_uid(nix::unistd::geteuid()).ok()??.dir));
        let user = home.filter(|home| home.is_absolute()).map(|home| home.join(".vz/linux"));
        let install = if nix::unistd::geteuid().is_root() { Some(STATE.into()) } else { user.clone() };
        Self {
            named: set(named),
            user,
            system: SYSTEM.into_iter().chain([STATE]).map(PathBuf::from).collect(),
            install,
        }
    }

    /// The base directory in which an embedded bundle is installed.
    pub fn install(&self) -> Option<&Path> {
        self.named.as_deref().or(self.install.as_deref())
    }

    /// The base directories that count.
    pub fn bases(&self) -> Vec<&Path> {
        match &self.named {
            Some(named) => vec![named],
            None => self.user.iter().chain(&self.system).map(PathBuf::as_path).collect(),
        }
    }

    /// The first bundle of this profile; whether it is good is another question.
    pub fn find(&self, profile: KernelProfile) -> Option<PathBuf> {
        self.bases().into_iter().find_map(|base| in_base(base, profile))
    }
}

/// The bundle of this profile in a base directory.
pub fn in_base(base: &Path, profile: KernelProfile) -> Option<PathBuf> {
    let own = base.join(profile.name());
    // Broken links and directories that may not be searched count: whoever opens them says what is wrong.
    if own.join(VERSION).symlink_metadata().is_ok() {
        return Some(own);
    }
    let itself = Bundle::describe(base).is_ok_and(|version| version.profile == profile.name());
    itself.then(|| base.to_owned())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn bundle(dir: &Path, profile: &str) {
        fs::create_dir_all(dir).unwrap();
        let version = serde_json::json!({
            "schema": 1, "bundle_version": "1", "agent_version": "1", "youki_version": "1", "kernel_version": "6",
            "profile": profile, "security_profile": "x", "artifacts": {},
        });
        fs::write(dir.join(VERSION), version.to_string()).unwrap();
    }

    #[test]
    fn a_base_has_profiles_in_it_or_is_one() {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path();
        assert_eq!(in_base(base, KernelProfile::Container), None);
        bundle(base, "developer");
        assert_eq!(in_base(base, KernelProfile::Developer).as_deref(), Some(base));
        assert_eq!(in_base(base, KernelProfile::Container), None);
        bundle(&base.join("container"), "container");
        bundle(&base.join("developer"), "developer");
        assert_eq!(in_base(base, KernelProfile::Container), Some(base.join("container")));
        assert_eq!(in_base(base, KernelProfile::Developer), Some(base.join("developer")));
    }

    #[test]
    fn a_named_place_is_the_only_one_and_the_user_comes_first() {
        let dir = tempfile::tempdir().unwrap();
        let (user, system, named) = (dir.path().join("user"), dir.path().join("system"), dir.path().join("named"));
        let mut places = Places { named: None, user: Some(user.clone()), system: vec![system.clone()], install: None };
        bundle(&system.join("container"), "container");
        assert_eq!(places.find(KernelProfile::Container), Some(system.join("container")));
        bundle(&user.join("container"), "container");
        assert_eq!(places.find(KernelProfile::Container), Some(user.join("container")));
        places.named = Some(named.clone());
        assert_eq!(places.find(KernelProfile::Container), None);
        bundle(&named, "container");
        assert_eq!(places.find(KernelProfile::Container), Some(named));
    }

    #[test]
    fn places_come_from_the_environment() {
        let places = Places::from_variables(Some("/b".into()), Some("/home/u".into()));
        assert_eq!(places.bases(), [Path::new("/b")]);
        let places = Places::from_variables(Some("".into()), Some("/home/u".into()));
        assert_eq!(places.bases()[0], Path::new("/home/u/.vz/linux"));
        assert_eq!(places.bases().len(), 4);
        let own = if nix::unistd::geteuid().is_root() { STATE } else { "/home/u/.vz/linux" };
        assert_eq!(places.install(), Some(Path::new(own)));
        // As the system knows this user.
        assert!(Places::from_variables(None, None).user.is_some_and(|user| user.ends_with(".vz/linux")));
    }
}
