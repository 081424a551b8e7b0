//! `vz vm linux`: guest bundles, installed, verified, shown and built.

use std::{
    error::Error,
    fs, io,
    path::{Path, PathBuf},
    process::Command,
};

use serde::Serialize;
use serde_json::json;
use vz_linux::{
    Bundle, Directory, EnsureError, KernelBundle, KernelBundleOptions, KernelProfile, Places, Source, VERSION,
    ensure_kernel_bundle, in_base, install, locate,
};

use crate::{
    args::{Linux, Place},
    check::chain,
    progress::Progress,
    table::{Style, colours, columns},
};

/// Does it; what is to be printed.
pub fn run(verb: Linux) -> io::Result<String> {
    match verb {
        Linux::Init { place, from } => init(&place, from.as_deref()),
        Linux::Verify { place } => {
            let bundle = KernelBundle::verify(&find(&place)?).map_err(failed)?;
            described(&place, "verified", &bundle)
        }
        Linux::Info { place } => info(&place),
        Linux::List { dir, json } => list(dir.as_deref(), json),
        Linux::Build { place, source } => build(&place, &source),
    }
}

/// With its causes: whoever prints it prints one line.
fn failed(e: impl Error) -> io::Error {
    io::Error::other(chain(&e))
}

fn profile(place: &Place) -> io::Result<KernelProfile> {
    place.kernel_profile.parse().map_err(failed)
}

fn find(place: &Place) -> io::Result<PathBuf> {
    locate(place.dir.as_deref(), profile(place)?).map_err(failed)
}

fn init(place: &Place, from: Option<&Path>) -> io::Result<String> {
    let profile = profile(place)?;
    let _progress = Progress::begin(&format!("install {profile} bundle"));
    let Some(from) = from else {
        let options =
            KernelBundleOptions { profile, install_dir: place.dir.as_deref(), ..KernelBundleOptions::default() };
        return described(place, "is there", &ensure_kernel_bundle(&options).map_err(failed)?);
    };
    put(place, profile, &Directory(from.to_owned()))
}

/// Installs a bundle, unless the very same one is there.
fn put(place: &Place, profile: KernelProfile, from: &dyn Source) -> io::Result<String> {
    let places = Places::from_env();
    let base = place.dir.clone().or(places.named).or(places.user);
    let base = base.ok_or_else(|| failed(EnsureError::NoHome { profile }))?;
    let wanted = from.version().ok();
    let same = |dir: &Path| wanted.is_some() && fs::read(dir.join(VERSION)).ok() == wanted;
    let dir = install(from, &base, profile, |dir| same(dir) && KernelBundle::verify(dir).is_ok()).map_err(failed)?;
    described(place, "installed", &KernelBundle::verify(&dir).map_err(failed)?)
}

#[derive(Serialize)]
struct Described<'a> {
    dir: &'a Path,
    profile: KernelProfile,
    kernel: &'a Path,
    initramfs: &'a Path,
    youki: &'a Path,
    version: &'a vz_linux::VersionInfo,
}

fn described(place: &Place, what: &str, bundle: &KernelBundle) -> io::Result<String> {
    let KernelBundle { dir, profile, kernel, initramfs, youki, version } = bundle;
    if place.json {
        let described = Described { dir, profile: *profile, kernel, initramfs, youki, version };
        return Ok(format!("{}\n", serde_json::to_string_pretty(&described)?));
    }
    let (dir, kernel) = (dir.display(), &version.kernel_version);
    Ok(format!("{dir}: {what} (profile {profile}, Linux {kernel}, vz {})\n", version.bundle_version))
}

fn info(place: &Place) -> io::Result<String> {
    let dir = find(place)?;
    let version = Bundle::describe(&dir).map_err(failed)?;
    if place.json {
        return Ok(format!("{}\n", serde_json::to_string_pretty(&json!({ "dir": dir, "version": version }))?));
    }
    let mut rows = vec![
        ("directory", dir.display().to_string()),
        ("profile", version.profile),
        ("security profile", version.security_profile),
        ("bundle", version.bundle_version),
        ("architecture", version.architecture.unwrap_or_else(|| "unknown".into())),
        ("commit", version.git_commit.unwrap_or_else(|| "unknown".into())),
        ("kernel", version.kernel_version),
        ("agent", version.agent_version),
        ("youki", version.youki_version),
        ("capabilities", version.capabilities.join(" ")),
    ];
    for (name, artifact) in &version.artifacts {
        let size = artifact.size.map_or_else(String::new, |size| format!("{size} bytes, "));
        rows.push((name, format!("{size}sha256 {}", artifact.sha256)));
    }
    let rows: Vec<_> =
        rows.into_iter().map(|(name, value)| vec![(name.to_owned(), Style::Dim), (value, Style::Plain)]).collect();
    Ok(columns(&rows, colours()))
}

/// A bundle in a list.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Listed {
    dir: PathBuf,
    profile: KernelProfile,
    kernel_version: Option<String>,
    /// Whether it is the one that is used for its profile.
    used: bool,
    /// What is wrong with it; none if nothing is.
    problem: Option<String>,
}

fn list(dir: Option<&Path>, json: bool) -> io::Result<String> {
    let mut places = Places::from_env();
    if let Some(dir) = dir {
        places.named = Some(dir.to_owned());
    }
    let found = listed(&places);
    if json {
        return Ok(format!("{}\n", serde_json::to_string_pretty(&found)?));
    }
    let cell = |text: String| (text, Style::Plain);
    let heads = ["PROFILE", "KERNEL", "USED", "STATE", "DIRECTORY"];
    let mut rows = vec![heads.map(|head| (head.to_owned(), Style::Dim)).to_vec()];
    for bundle in found {
        let state = match &bundle.problem {
            None => ("good".to_owned(), Style::Good),
            Some(problem) => (problem.clone(), Style::Bad),
        };
        let used = if bundle.used { "yes" } else { "no" }.to_owned();
        let kernel = bundle.kernel_version.unwrap_or_else(|| "-".into());
        let dir = bundle.dir.display().to_string();
        rows.push(vec![cell(bundle.profile.to_string()), cell(kernel), cell(used), state, cell(dir)]);
    }
    Ok(columns(&rows, colours()))
}

fn listed(places: &Places) -> Vec<Listed> {
    let mut found = Vec::new();
    for profile in KernelProfile::ALL {
        for (number, dir) in places.bases().into_iter().filter_map(|base| in_base(base, profile)).enumerate() {
            let kernel_version = Bundle::describe(&dir).ok().map(|version| version.kernel_version);
            let problem = KernelBundle::verify(&dir).err().map(|e| chain(&e));
            found.push(Listed { dir, profile, kernel_version, used: number == 0, problem });
        }
    }
    found
}

fn build(place: &Place, source: &Path) -> io::Result<String> {
    let profile = profile(place)?;
    let makefile = source.join("mk/bundle.mk");
    if !makefile.is_file() {
        let what = format!("{} is not vz's source (it has no mk/bundle.mk): name it with --source", source.display());
        return Err(io::Error::new(io::ErrorKind::NotFound, what));
    }
    let out = fs::canonicalize(source)?.join("out");
    // Its words are about progress, and standard output is for the result.
    let mut make = Command::new("make");
    make.arg("-C")
        .arg(source)
        .arg("bundle")
        .arg(format!("KERNEL_PROFILE={profile}"))
        .arg(format!("OUT={}", out.display()));
    let done = Progress::begin(&format!("build {profile} bundle"))
        .run(&mut make)
        .map_err(|e| io::Error::new(e.kind(), format!("run make: {e}")))?;
    if !done.success() {
        return Err(io::Error::other(format!("make bundle KERNEL_PROFILE={profile} failed: {done}")));
    }
    // As mk/bundle.mk says.
    let made = match profile {
        KernelProfile::Container => out.join(profile.name()),
        KernelProfile::Developer => out,
    };
    put(place, profile, &Directory(made))
}
