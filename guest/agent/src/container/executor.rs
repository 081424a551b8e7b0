//! The last steps of a container's process before it becomes the container's program, in words that clients know.

use std::{
    env,
    ffi::CString,
    fs, io,
    os::unix::fs::FileTypeExt,
    path::{Path, PathBuf},
};

use libcontainer::{
    oci_spec::runtime::Spec,
    workload::{Executor, ExecutorError, ExecutorValidationError},
};
use nix::{
    errno::Errno,
    fcntl::{AT_FDCWD, AtFlags},
    sys::signal::{SigSet, Signal},
    unistd::{AccessFlags, execv, faccessat},
};

use super::seccomp::Late;

/// Where programs are looked for if the process has no `PATH`.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// libcontainer's hook into the container's process. Both methods run in that process, as the container's user, in the
/// container's root and working directory.
#[derive(Clone)]
pub struct Program {
    /// Whether standard input is a terminal that is to become the controlling one.
    pub terminal: bool,
    /// Whether the process reports a failing exec over its own stderr, for want of anybody who waits for it.
    pub speaks: bool,
    /// What libcontainer leaves undone in an exec.
    pub late: Option<Late>,
    /// Whether there is no program: the process itself keeps a pod's namespaces.
    pub pauses: bool,
}

impl Executor for Program {
    fn validate(&self, spec: &Spec) -> Result<(), ExecutorValidationError> {
        let refuse = ExecutorValidationError::ArgValidationError;
        if self.pauses {
            return Ok(());
        }
        let name = name(spec).ok_or_else(|| refuse("process has no args".into()))?;
        // The environment is still the agent's.
        let env = spec.process().as_ref().and_then(|p| p.env().as_ref()).map(Vec::as_slice).unwrap_or_default();
        let path = env.iter().find_map(|e| e.strip_prefix("PATH=")).unwrap_or(DEFAULT_PATH);
        find(name, path).map_err(refuse)?;
        if self.terminal {
            vz_sys::tty::set_controlling(io::stdin())
                .map_err(|e| refuse(format!("set the controlling terminal: {e}")))?;
        }
        if let Some(late) = &self.late {
            late.apply().map_err(refuse)?;
        }
        Ok(())
    }

    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        if self.pauses {
            let error = pause();
            return Err(ExecutorError::Other(format!("wait for a signal: {}", strerror(error))));
        }
        let error = execute(spec);
        if self.speaks {
            // As runc does: the client has its answer to start, and reads the container's output.
            eprintln!("{error}");
        }
        Err(ExecutorError::Other(error))
    }
}

/// Waits for SIGTERM or SIGINT, which end the process. The kernel reaps what the containers of a shared PID namespace
/// leave behind, since nobody wants to know.
fn pause() -> Errno {
    vz_sys::thread::set_name("pause");
    if let Err(error) = vz_sys::fork::reap_nobody() {
        return error;
    }
    let mut ends = SigSet::empty();
    ends.add(Signal::SIGTERM);
    ends.add(Signal::SIGINT);
    if let Err(error) = ends.thread_block() {
        return error;
    }
    match ends.wait() {
        Ok(_) => std::process::exit(0),
        Err(error) => error,
    }
}

/// Becomes the program; what comes back is why not.
fn execute(spec: &Spec) -> String {
    let args = spec.process().as_ref().and_then(|p| p.args().as_ref()).map(Vec::as_slice).unwrap_or_default();
    let Some(name) = args.first() else { return "process has no args".into() };
    let path = env::var("PATH").unwrap_or_else(|_| DEFAULT_PATH.into());
    let program = match find(name, &path) {
        Ok(program) => program,
        Err(e) => return e,
    };
    let strings = args.iter().map(|a| CString::new(a.as_bytes())).collect::<Result<Vec<_>, _>>();
    let (Ok(file), Ok(strings)) = (CString::new(program.as_os_str().as_encoded_bytes()), strings) else {
        return format!("exec {name:?}: argument with a NUL byte");
    };
    vz_sys::fork::default_sigpipe();
    match execv(&file, &strings) {
        Err(e) => format!("exec {}: {}", program.display(), strerror(e)),
        Ok(never) => match never {},
    }
}

fn name(spec: &Spec) -> Option<&String> {
    spec.process().as_ref()?.args().as_ref()?.first()
}

/// The file to execute for `name`, looked up as a shell does; the error is in runc's words.
fn find(name: &str, path: &str) -> Result<PathBuf, String> {
    if name.contains('/') {
        return match executable(Path::new(name)) {
            Ok(()) => Ok(name.into()),
            Err(Errno::ENOENT) => Err(format!("exec: {name:?}: stat {name}: no such file or directory")),
            Err(e) => Err(format!("exec: {name:?}: {}", strerror(e))),
        };
    }
    let mut refused = None;
    for directory in path.split(':') {
        // An empty entry is the working directory.
        let file = Path::new(if directory.is_empty() { "." } else { directory }).join(name);
        match executable(&file) {
            Ok(()) => return Ok(file),
            Err(Errno::ENOENT | Errno::ENOTDIR) => {}
            Err(e) => refused = refused.or(Some(e)),
        }
    }
    match refused {
        Some(e) if !name.is_empty() => Err(format!("exec: {name:?}: {}", strerror(e))),
        _ => Err(format!("exec: {name:?}: executable file not found in $PATH")),
    }
}

fn executable(file: &Path) -> Result<(), Errno> {
    let metadata = fs::metadata(file).map_err(|e| Errno::from_raw(e.raw_os_error().unwrap_or(0)))?;
    let kind = metadata.file_type();
    if kind.is_dir() {
        return Err(Errno::EISDIR);
    }
    if kind.is_char_device() || kind.is_block_device() || kind.is_fifo() || kind.is_socket() {
        return Err(Errno::EACCES);
    }
    match faccessat(AT_FDCWD, file, AccessFlags::X_OK, AtFlags::AT_EACCESS) {
        // A seccomp profile may forbid the question; the kernel will ask itself.
        Err(Errno::EPERM | Errno::ENOSYS) | Ok(()) => Ok(()),
        Err(e) => Err(e),
    }
}

fn strerror(e: Errno) -> String {
    e.desc().to_lowercase()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn programs_are_found_like_a_shell_does() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
        for (name, mode) in [("run", 0o700), ("data", 0o600)] {
            fs::write(at(name), "").unwrap();
            fs::set_permissions(at(name), fs::Permissions::from_mode(mode)).unwrap();
        }
        let path = format!("/nonexistent:{}", dir.path().display());
        assert_eq!(find("run", &path).unwrap(), dir.path().join("run"));
        assert_eq!(find(&at("run"), "").unwrap(), dir.path().join("run"));
        assert_eq!(find("none", &path).unwrap_err(), r#"exec: "none": executable file not found in $PATH"#);
        assert_eq!(find("", &path).unwrap_err(), r#"exec: "": executable file not found in $PATH"#);
        assert_eq!(find("data", &path).unwrap_err(), r#"exec: "data": permission denied"#);
        assert_eq!(find("/", &path).unwrap_err(), r#"exec: "/": is a directory"#);
        let missing = find("/no/such", &path).unwrap_err();
        assert_eq!(missing, r#"exec: "/no/such": stat /no/such: no such file or directory"#);
    }
}
