//! One call from "a kernel of this profile" to a bundle that is there and good.

use std::{
    io,
    path::{Path, PathBuf},
};

use crate::{
    Bundle, Error, INITRAMFS, KERNEL, KernelProfile, VERSION, VersionInfo, YOUKI,
    install::{InstallError, Source, install, is_outdated},
    locate::{Places, in_base},
    profile::UnknownProfile,
};

/// Version of the agent that this crate's users speak to, which is that of the whole project.
pub const AGENT_VERSION: &str = env!("CARGO_PKG_VERSION");
/// Version of youki that belongs to it.
pub const YOUKI_VERSION: &str = "0.7.0";

/// A bundle whose files are what its `version.json` says, and which is what was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelBundle {
    /// Its directory.
    pub dir: PathBuf,
    /// Its profile.
    pub profile: KernelProfile,
    /// The uncompressed kernel.
    pub kernel: PathBuf,
    /// The initramfs.
    pub initramfs: PathBuf,
    /// The static youki program.
    pub youki: PathBuf,
    /// Its description.
    pub version: VersionInfo,
}

/// What is asked for; see [`ensure_kernel_bundle`].
#[derive(Debug, Clone, Copy, Default)]
pub struct KernelBundleOptions<'a> {
    /// Which kernel.
    pub profile: KernelProfile,
    /// The base directory to look through and to install in, instead of those of [`Places::from_env`].
    pub install_dir: Option<&'a Path>,
    /// Names of capabilities that the kernel must have, as in `version.json`.
    pub required_capabilities: &'a [&'a str],
    /// What is installed where there is no bundle; without it that is what [`embedded`] has, and if that is nothing,
    /// there being no bundle is an error.
    pub source: Option<&'a dyn Source>,
}

/// Why there is no such bundle.
#[derive(Debug, thiserror::Error)]
pub enum EnsureError {
    /// There is none, and nothing to install.
    #[error(
        "no guest bundle of profile {profile} in {searched}: install one with `vz vm linux init --kernel-profile {profile} --from DIR`, or name its directory with VZ_LINUX_DIR, for containers also with `guest.bundle` in the configuration"
    )]
    NotFound {
        /// The profile.
        profile: KernelProfile,
        /// Where it was looked for.
        searched: String,
    },
    /// There is none of this profile in the directory that was named.
    #[error(
        "no guest bundle of profile {profile} in {dir} (no version.json): install one with `vz vm linux init --kernel-profile {profile} --dir {dir} --from DIR`, or name another directory where this one was named: with --dir, VZ_LINUX_DIR, or `guest.bundle` in the configuration",
        dir = dir.display()
    )]
    NotInDir {
        /// The profile.
        profile: KernelProfile,
        /// The directory.
        dir: PathBuf,
    },
    /// There is none, and no place to install one.
    #[error("no guest bundle of profile {profile}, and no home directory to install one in: set HOME or VZ_LINUX_DIR")]
    NoHome {
        /// The profile.
        profile: KernelProfile,
    },
    /// There is one, and it is not good.
    #[error(transparent)]
    Bundle(#[from] Error),
    /// It is of another profile.
    #[error("guest bundle {dir} has profile {found}, not {wanted}", dir = dir.display())]
    Profile {
        /// The bundle's directory.
        dir: PathBuf,
        /// What is wanted.
        wanted: KernelProfile,
        /// What it is.
        found: String,
    },
    /// Its profile is none that this program knows.
    #[error("guest bundle {dir}: profile in version.json", dir = dir.display())]
    UnknownProfile {
        /// The bundle's directory.
        dir: PathBuf,
        /// Which.
        source: UnknownProfile,
    },
    /// It is for another processor.
    #[error("guest bundle {dir} is for {found}, this machine is {wanted}; install the bundle for it", dir = dir.display(), wanted = std::env::consts::ARCH)]
    Architecture {
        /// The bundle's directory.
        dir: PathBuf,
        /// What it is for.
        found: String,
    },
    /// A program in it is of another version.
    #[error("guest bundle {dir} has {program} {found}, this program needs {wanted}; install the bundle that belongs to it", dir = dir.display())]
    Program {
        /// The bundle's directory.
        dir: PathBuf,
        /// `agent` or `youki`.
        program: &'static str,
        /// What is wanted.
        wanted: &'static str,
        /// What it is.
        found: String,
    },
    /// Its kernel lacks something.
    #[error("guest bundle {dir} has a kernel without {names}; profile developer has more than container", dir = dir.display(), names = names.join(", "))]
    Capabilities {
        /// The bundle's directory.
        dir: PathBuf,
        /// What it lacks.
        names: Vec<String>,
    },
    /// It could not be installed.
    #[error(transparent)]
    Install(#[from] InstallError),
}

impl KernelBundle {
    /// Checks the bundle in `dir`: every file by its checksum, whatever is remembered of earlier checks, and its
    /// programs' versions.
    pub fn verify(dir: &Path) -> Result<Self, EnsureError> {
        Self::check(dir, None)
    }

    fn check(dir: &Path, cache: Option<&Path>) -> Result<Self, EnsureError> {
        let version = Bundle::verify_all(dir, cache)?;
        let profile =
            version.profile.parse().map_err(|source| EnsureError::UnknownProfile { dir: dir.to_owned(), source })?;
        if let Some(found) = version.architecture.clone().filter(|found| found != std::env::consts::ARCH) {
            return Err(EnsureError::Architecture { dir: dir.to_owned(), found });
        }
        let programs =
            [("agent", AGENT_VERSION, &version.agent_version), ("youki", YOUKI_VERSION, &version.youki_version)];
        for (program, wanted, found) in programs {
            if wanted != found {
                return Err(EnsureError::Program { dir: dir.to_owned(), program, wanted, found: found.clone() });
            }
        }
        let file = |name| dir.join(name);
        let (kernel, initramfs, youki) = (file(KERNEL), file(INITRAMFS), file(YOUKI));
        Ok(Self { dir: dir.to_owned(), profile, kernel, initramfs, youki, version })
    }
}

/// The developer's bundle; see [`ensure_kernel_bundle`].
pub fn ensure_kernel() -> Result<KernelBundle, EnsureError> {
    ensure_kernel_profile(KernelProfile::default())
}

/// The bundle of a profile; see [`ensure_kernel_bundle`].
pub fn ensure_kernel_profile(profile: KernelProfile) -> Result<KernelBundle, EnsureError> {
    ensure_kernel_bundle(&KernelBundleOptions { profile, ..Default::default() })
}

/// Finds the first bundle of the profile, or installs one, checks it, and returns it.
///
/// A bundle that is there and not good is an error, never passed over: it names the file that is not what
/// `version.json` says. Any number of processes may call this at the same time; those that are killed leave nothing
/// that later ones mind.
///
/// ```
/// use vz_linux::{EnsureError, KernelBundleOptions, KernelProfile, ensure_kernel_bundle};
///
/// let options = KernelBundleOptions {
///     profile: KernelProfile::Container,
///     required_capabilities: &["virtiofs", "vsock"],
///     ..Default::default()
/// };
/// match ensure_kernel_bundle(&options) {
///     Ok(bundle) => println!("boot {} (Linux {})", bundle.kernel.display(), bundle.version.kernel_version),
///     Err(EnsureError::NotFound { searched, .. }) => println!("nothing in {searched}"),
///     Err(e) => println!("{e}"),
/// }
/// ```
pub fn ensure_kernel_bundle(options: &KernelBundleOptions<'_>) -> Result<KernelBundle, EnsureError> {
    let profile = options.profile;
    let mut places = Places::from_env();
    if let Some(dir) = options.install_dir {
        places.named = Some(dir.to_owned());
    }
    let dir = obtain(&places, profile, options.source.or_else(|| embedded(profile)))?;
    let bundle = KernelBundle::check(&dir, crate::bundle::cache().as_deref())?;
    if bundle.profile != profile {
        return Err(EnsureError::Profile { dir, wanted: profile, found: bundle.profile.to_string() });
    }
    let lacks = |name: &&&str| !bundle.version.capabilities.iter().any(|has| has == **name);
    let names: Vec<String> =
        options.required_capabilities.iter().filter(lacks).map(|name| (*name).to_owned()).collect();
    if names.is_empty() { Ok(bundle) } else { Err(EnsureError::Capabilities { dir, names }) }
}

/// The directory of the bundle that a configuration asks for: `configured` where it is set, which is a bundle or a base
/// directory, else the first one of this profile. What is in it has not been looked at.
pub fn locate(configured: Option<&Path>, profile: KernelProfile) -> Result<PathBuf, EnsureError> {
    match configured {
        Some(dir) => match in_base(dir, profile) {
            Some(bundle) => Ok(bundle),
            None if dir.join(VERSION).symlink_metadata().is_err_and(|e| e.kind() == io::ErrorKind::NotFound) => {
                Err(EnsureError::NotInDir { profile, dir: dir.to_owned() })
            }
            // Whoever opens it says what is wrong with it.
            None => Ok(dir.to_owned()),
        },
        None => {
            let places = Places::from_env();
            places.find(profile).ok_or_else(|| not_found(profile, &places))
        }
    }
}

/// The same, but where nothing is configured and there is none, the embedded bundle of this profile is installed, if
/// there is one; and one that an older version of the program has installed so is replaced. This is what a runtime
/// calls at every start: where the bundle is there it costs a few `stat` calls.
pub fn find_or_install(configured: Option<&Path>, profile: KernelProfile) -> Result<PathBuf, EnsureError> {
    match configured {
        Some(_) => locate(configured, profile),
        None => obtain(&Places::from_env(), profile, embedded(profile)),
    }
}

/// The bundle of this profile that is in the program itself, compiled in by the feature `embedded`.
pub fn embedded(profile: KernelProfile) -> Option<&'static dyn Source> {
    #[cfg(feature = "embedded")]
    if profile == KernelProfile::Container {
        return Some(&crate::embedded::Embedded);
    }
    let _ = profile;
    None
}

/// The directory of the first bundle of the profile, installed from `source` if there is none or an outdated one of it.
fn obtain(places: &Places, profile: KernelProfile, source: Option<&dyn Source>) -> Result<PathBuf, EnsureError> {
    let found = places.find(profile);
    let Some(source) = source else { return found.ok_or_else(|| not_found(profile, places)) };
    let outdated = |dir: &Path| is_outdated(dir, source);
    let base = match &found {
        // Somebody else's is left alone: whoever checks it says if it is too old.
        Some(dir) if !outdated(dir) || dir.parent() != places.install() => return Ok(dir.clone()),
        _ => places.install(),
    };
    let base = base.ok_or(EnsureError::NoHome { profile })?;
    // Somebody else may have been faster.
    Ok(install(source, base, profile, |dir| dir.join(VERSION).exists() && !outdated(dir))?)
}

fn not_found(profile: KernelProfile, places: &Places) -> EnsureError {
    let searched: Vec<String> = places.bases().iter().map(|base| base.display().to_string()).collect();
    EnsureError::NotFound { profile, searched: searched.join(", ") }
}
