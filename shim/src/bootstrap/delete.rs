//! `delete`: takes away what a dead shim has left.

use std::{
    io::{self, Write},
    path::Path,
    time::{Duration, SystemTime},
};

use containerd_shim_protos::{api::DeleteResponse, protobuf::Message};
use vz_config::Config;
use vz_sys::{error::chain, fork::KILLED};

use super::{
    error::{Error, fail},
    watcher,
};
use crate::host::{
    hooks,
    unwind::{self, Unwound},
};

/// How long processes and cgroups may take to end. containerd gives `delete` five seconds in all.
const DELETE_DEADLINE: Duration = Duration::from_secs(4);
/// The same where nobody waits.
const WATCHER_DEADLINE: Duration = Duration::from_secs(60);

/// Takes away everything that the sandbox in `dir` owns, and runs the hooks that are due then. What is left is the
/// error.
pub fn take_away(dir: &Path, time: Duration) -> Result<(), Error> {
    let Unwound { result, due } = unwind::unwind_within(time, dir);
    if due.is_empty() {
        return Ok(result?);
    }
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(fail("start runtime for hooks"))?;
    // This process is where its caller has started it. A configuration that is wrong by now must not keep anything
    // here.
    let limit = Config::load(None).unwrap_or_default().timeouts.hook_s;
    let launch = hooks::Launch { surroundings: None, limit: Duration::from_secs(limit) };
    runtime.block_on(due.run(&launch));
    runtime.shutdown_background();
    Ok(result?)
}

/// Takes away whatever a dead shim has left. The reply for containerd.
///
/// What cannot be taken away is no failure: containerd would keep a task whose `delete` fails, and its id, for good. It
/// logs what is said here. The journal has what is left: a watcher goes on with it, and the next `start` with this id
/// tries again.
pub fn delete(namespace: &str, id: &str) -> Result<Vec<u8>, Error> {
    if let Err(error) = take_away(&vz_state::dir(namespace, id), DELETE_DEADLINE) {
        drop(writeln!(io::stderr(), "{}", chain(&error)));
        if let Err(error) = watcher::go_on(namespace, id) {
            drop(writeln!(io::stderr(), "{}", chain(&error)));
        }
    }
    let mut response = DeleteResponse::new();
    response.set_exit_status(KILLED);
    response.set_exited_at(SystemTime::now().into());
    response.write_to_bytes().map_err(|source| Error::Message { what: "write reply", source })
}

/// The same where nobody waits, or is there to be told. What cannot be taken away stays in the journal for the next
/// `start`.
pub fn go_on(namespace: &str, id: &str) {
    drop(take_away(&vz_state::dir(namespace, id), WATCHER_DEADLINE));
}
