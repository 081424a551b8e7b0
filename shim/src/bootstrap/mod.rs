//! How containerd calls the shim: `start`, `delete`, `-info`, `-v`, in the forms of containerd 1.7 to 2.3.
//!
//! containerd reads stdout and stderr of `start` together: a failure is the only time that anything else is printed.

use std::{
    ffi::OsString,
    io::{self, IsTerminal, Read, Write},
    process::ExitCode,
};

use containerd_shim::parse;
use containerd_shim_protos::{
    protobuf::{Message, well_known_types::any::Any},
    types::introspection::{RuntimeInfo, RuntimeVersion},
};
use vz_sys::error::chain;

use crate::daemon;

pub mod delete;
pub mod error;
pub mod features;
pub mod parameters;
pub mod start;
pub mod watcher;

pub use error::Error;
use error::fail;

/// The runtime's name in containerd.
const RUNTIME: &str = "io.containerd.vz.v2";
/// Most bytes that are read from stdin; containerd's own limit.
const MAX_INPUT: u64 = 10 << 20;

/// The program, as containerd calls it.
pub fn main(args: &[OsString]) -> ExitCode {
    match run(args) {
        Ok(code) => code,
        Err(error) => {
            let text = chain(&error);
            // The one line that containerd shows to its client.
            drop(writeln!(io::stderr(), "{text}"));
            ExitCode::FAILURE
        }
    }
}

fn run(args: &[OsString]) -> Result<ExitCode, Error> {
    let flags = parse(args).map_err(Error::Flags)?;
    if flags.version {
        let text = format!("containerd-shim-vz-v2:\n  Version: {}\n  Runtime: {RUNTIME}\n", env!("CARGO_PKG_VERSION"));
        print(text.as_bytes())?;
        return Ok(ExitCode::SUCCESS);
    }
    if flags.info {
        return info();
    }
    for (name, value) in [("namespace", &flags.namespace), ("id", &flags.id)] {
        if value.is_empty() {
            return Err(Error::Missing(name));
        }
    }
    match flags.action.as_str() {
        "start" => {
            print(&start::start(&flags, &read_stdin()?)?)?;
            Ok(ExitCode::SUCCESS)
        }
        "delete" => {
            print(&delete::delete(&flags.namespace, &flags.id)?)?;
            Ok(ExitCode::SUCCESS)
        }
        watcher::ACTION => Ok(watcher::main(|| delete::go_on(&flags.namespace, &flags.id))),
        "" => Ok(daemon::main(&flags)),
        other => Err(Error::Action(other.to_owned())),
    }
}

fn info() -> Result<ExitCode, Error> {
    // What containerd sends along are options, none of which change what this runtime is.
    read_stdin()?;
    let mut version = RuntimeVersion::new();
    version.version = env!("CARGO_PKG_VERSION").into();
    let mut info = RuntimeInfo::new();
    info.name = RUNTIME.into();
    info.version = Some(version).into();
    let features = serde_json::to_vec(&features::features());
    let features = features.map_err(|e| fail("write features")(e.into()))?;
    info.features = Some(Any { type_url: features::TYPE_URL.into(), value: features, ..Default::default() }).into();
    print(&info.write_to_bytes().map_err(|source| Error::Message { what: "write runtime info", source })?)?;
    Ok(ExitCode::SUCCESS)
}

fn read_stdin() -> Result<Vec<u8>, Error> {
    let stdin = io::stdin();
    let mut input = Vec::new();
    // Nothing comes from somebody who tries this by hand.
    if !stdin.is_terminal() {
        stdin.lock().take(MAX_INPUT).read_to_end(&mut input).map_err(fail("read stdin"))?;
    }
    Ok(input)
}

fn print(bytes: &[u8]) -> Result<(), Error> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(bytes).and_then(|()| stdout.flush()).map_err(fail("write stdout"))
}
