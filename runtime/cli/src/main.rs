//! `vz`: runs OCI bundles, checks a host for the runtime `io.containerd.vz.v2`, and shows what runs on it.

use std::{
    io::{self, Write},
    path::Path,
    process::ExitCode,
};

use clap::{CommandFactory, Parser};

mod args;
mod check;
mod linux;
mod oci;
mod progress;
mod sandboxes;
mod table;

use args::{Args, Command, System};
use oci::{Verb, args::Format};

fn main() -> ExitCode {
    if std::env::args_os().nth(1).is_some_and(|verb| verb == oci::keeper::VERB) {
        return oci::keeper::main();
    }
    let Args { containers, command } = Args::parse();
    let container = |verb| {
        let (text, status) = oci::run(&containers, verb)?;
        print(text.as_bytes()).map(|()| ExitCode::from(status))
    };
    let done = match command {
        Command::Run(options) => container(Verb::Run(options)),
        Command::Exec(options) => container(Verb::Exec(options)),
        Command::Create(options) => container(Verb::Create(options)),
        Command::Start(named) => container(Verb::Start(named)),
        Command::State(named) => container(Verb::State(named)),
        Command::Kill(options) => container(Verb::Kill(options)),
        Command::Delete(options) => container(Verb::Delete(options)),
        Command::List(options) => container(Verb::List(options)),
        Command::Pause(named) => container(Verb::Pause(named)),
        Command::Resume(named) => container(Verb::Resume(named)),
        Command::Features => container(Verb::Features),
        Command::Ps { container: Some(id), options, format, json } => {
            container(Verb::Ps(id, if json { Format::Json } else { format }, options))
        }
        Command::Check { probe, json } => check::run(probe, json),
        Command::Ps { container: None, format, json, .. } => sandboxes::list(json || format == Format::Json)
            .and_then(|text| print(text.as_bytes()))
            .map(|()| ExitCode::SUCCESS),
        Command::Logs { sandbox, .. } => {
            sandboxes::console(&sandbox).and_then(|text| print(&text)).map(|()| ExitCode::SUCCESS)
        }
        Command::Vm { system: System::Linux { verb } } => {
            linux::run(verb).and_then(|text| print(text.as_bytes())).map(|()| ExitCode::SUCCESS)
        }
        Command::Completions { shell } => {
            let mut text = Vec::new();
            clap_complete::generate(shell, &mut Args::command(), "vz", &mut text);
            print(&text).map(|()| ExitCode::SUCCESS)
        }
        Command::Man { dir } => man(&dir).map(|()| ExitCode::SUCCESS),
    };
    done.unwrap_or_else(|error| {
        eprintln!("vz: {error}");
        ExitCode::FAILURE
    })
}

/// Writes to standard output; a reader that has seen enough is no failure.
fn print(text: &[u8]) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(text).and_then(|()| stdout.flush()) {
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => other,
    }
}

fn man(dir: &Path) -> io::Result<()> {
    let context = |e: io::Error| io::Error::new(e.kind(), format!("write man pages into {}: {e}", dir.display()));
    std::fs::create_dir_all(dir).and_then(|()| clap_mangen::generate_to(Args::command(), dir)).map_err(context)
}
