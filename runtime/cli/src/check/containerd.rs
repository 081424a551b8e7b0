//! containerd: which one runs, and whether it can find the shim.

use std::{
    env,
    ffi::{OsStr, OsString},
    fs,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use super::{Check, Status, host::version_of};

const SHIM: &str = "containerd-shim-vz-v2";
/// What changes which configuration and bundle a shim uses.
const OURS: [&str; 2] = ["VZ_CONFIG", "VZ_LINUX_DIR"];

/// A containerd that runs.
#[derive(Debug)]
struct Daemon {
    pid: u32,
    /// Its program; none where we may not know.
    program: Option<PathBuf>,
    environment: Option<Vec<(OsString, OsString)>>,
}

pub(super) fn checks() -> Vec<Check> {
    let daemons = running(Path::new("/proc"));
    if daemons.is_empty() {
        let check = match installed() {
            Some(program) => {
                let version = version_of(&program).unwrap_or_else(|e| format!("--version: {e}"));
                let found = format!("does not run; {} is {}", program.display(), short(&version));
                Check::new("containerd", Status::Failed, found).advise("start it")
            }
            None => Check::new("containerd", Status::Failed, "neither runs nor is in PATH")
                .advise("install containerd 1.7 or later and start it"),
        };
        return vec![check];
    }
    let mut shims: Vec<Check> = daemons.iter().map(shim).collect();
    if shims.iter().any(|check| check.status == Status::Ok) {
        // The others are for other runtimes.
        for check in shims.iter_mut().filter(|check| check.status == Status::Failed) {
            check.status = Status::Warning;
        }
    }
    daemons.iter().map(describe).zip(shims).flat_map(|(daemon, shim)| [daemon, shim]).collect()
}

fn installed() -> Option<PathBuf> {
    find("containerd", &env::var_os("PATH")?)
}

fn describe(daemon: &Daemon) -> Check {
    let version = match &daemon.program {
        // Through /proc: the file may have been replaced, and what runs is what counts.
        Some(program) => match version_of(&PathBuf::from(format!("/proc/{}/exe", daemon.pid))) {
            Ok(version) => format!("{}, {}", short(&version), program.display()),
            Err(e) => format!("{} --version: {e}", program.display()),
        },
        None => "of unknown version".to_owned(),
    };
    let mut check = Check::new("containerd", Status::Ok, format!("{version}, pid {}", daemon.pid));
    for name in OURS {
        let theirs = daemon.get(name).filter(|value| !value.is_empty());
        if let Some(theirs) = theirs
            && env::var_os(name).as_deref() != Some(theirs)
        {
            check.status = Status::Info;
            check.advice = Some(format!(
                "it runs with {name}={}, which is not this check's: set it here too to check the same",
                theirs.display()
            ));
        }
    }
    check
}

fn shim(daemon: &Daemon) -> Check {
    let Some(program) = &daemon.program else {
        return Check::new("shim", Status::Warning, format!("whether pid {} finds it is not known", daemon.pid))
            .advise("run as root");
    };
    let found = daemon.get("PATH").and_then(|path| find(SHIM, path)).or_else(|| {
        // It also looks beside its own program.
        let beside = program.parent()?.join(SHIM);
        beside.is_file().then_some(beside)
    });
    match found {
        Some(path) => Check::new("shim", Status::Ok, path.display().to_string()),
        None => Check::new(
            "shim",
            Status::Failed,
            format!("{SHIM} is not in the PATH of containerd, pid {}", daemon.pid),
        )
        .advise(
            "install it there (make install PREFIX=/usr), or add its directory to the PATH of containerd's service",
        ),
    }
}

impl Daemon {
    fn get(&self, name: &str) -> Option<&OsStr> {
        let (_, value) = self.environment.as_ref()?.iter().find(|(key, _)| key == name)?;
        Some(value)
    }
}

/// All that are called containerd.
fn running(proc: &Path) -> Vec<Daemon> {
    let mut daemons = Vec::new();
    for entry in fs::read_dir(proc).into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let dir = entry.path();
        if fs::read_to_string(dir.join("comm")).is_ok_and(|name| name.trim_end() == "containerd") {
            let environment = fs::read(dir.join("environ")).ok().map(|text| pairs(&text));
            let program = environment.as_ref().and_then(|_| fs::read_link(dir.join("exe")).ok());
            daemons.push(Daemon { pid, program, environment });
        }
    }
    daemons.sort_by_key(|daemon| daemon.pid);
    daemons
}

/// `NAME=value` each, with a zero byte after each.
fn pairs(environ: &[u8]) -> Vec<(OsString, OsString)> {
    environ
        .split(|byte| *byte == 0)
        .filter_map(|pair| {
            let at = pair.iter().position(|byte| *byte == b'=')?;
            let text = |bytes: &[u8]| OsStr::from_bytes(bytes).to_owned();
            Some((text(&pair[..at]), text(&pair[at + 1..])))
        })
        .collect()
}

fn find(name: &str, path: &OsStr) -> Option<PathBuf> {
    vz_qemu::find(Path::new(name), Some(path)).ok()
}

/// The version from a line such as `containerd github.com/containerd/containerd/v2 2.3.4 revision`.
fn short(line: &str) -> String {
    let word = line.split_whitespace().find(|word| {
        let word = word.trim_start_matches('v');
        word.starts_with(|c: char| c.is_ascii_digit()) && word.contains('.')
    });
    word.map_or_else(|| line.to_owned(), |word| word.trim_start_matches('v').to_owned())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    #[test]
    fn a_version_is_found_in_the_line_that_containerd_prints() {
        assert_eq!(short("containerd github.com/containerd/containerd/v2 v2.3.4 abcdef"), "2.3.4");
        assert_eq!(short("containerd containerd.io 1.7.33 0123"), "1.7.33");
        assert_eq!(short("containerd unknown"), "containerd unknown");
    }

    #[test]
    fn a_running_containerd_and_its_search_path_are_found() {
        let dir = tempfile::tempdir().unwrap();
        let (proc, bin) = (dir.path().join("proc"), dir.path().join("bin"));
        fs::create_dir_all(&bin).unwrap();
        for (pid, comm) in [("12", "containerd\n"), ("7", "bash\n"), ("self", "containerd\n")] {
            fs::create_dir_all(proc.join(pid)).unwrap();
            fs::write(proc.join(pid).join("comm"), comm).unwrap();
        }
        let environ = format!("A=b\0PATH=/nowhere:{}\0VZ_CONFIG=/x=y\0", bin.display());
        fs::write(proc.join("12/environ"), environ).unwrap();
        symlink("/usr/bin/containerd", proc.join("12/exe")).unwrap();
        let daemons = running(&proc);
        assert_eq!(daemons.len(), 1);
        assert_eq!(daemons[0].get("VZ_CONFIG"), Some(OsStr::new("/x=y")));
        let check = shim(&daemons[0]);
        assert_eq!(check.status, Status::Failed);
        fs::write(bin.join(SHIM), "").unwrap();
        fs::set_permissions(bin.join(SHIM), fs::Permissions::from_mode(0o755)).unwrap();
        let check = shim(&daemons[0]);
        assert_eq!((check.status, check.found), (Status::Ok, bin.join(SHIM).display().to_string()));
        // What may not be read is not guessed.
        fs::remove_file(proc.join("12/environ")).unwrap();
        assert_eq!(shim(&running(&proc)[0]).status, Status::Warning);
    }
}
