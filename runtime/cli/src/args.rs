//! The command line. Completions and man pages are made from these definitions, so what is written here is what people
//! read there.

use std::path::PathBuf;

use clap::{Parser, Subcommand};
use clap_complete::Shell;

/// Containers in microVMs: checks this host, and shows what runs on it.
///
/// Containers are run with containerd's clients (ctr, nerdctl, crictl) and the runtime io.containerd.vz.v2.
#[derive(Debug, Parser)]
#[command(name = "vz", version, max_term_width = 100)]
pub struct Args {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Say whether containers can run on this host, in which machine, and what to do if they cannot.
    ///
    /// The exit status is 0 if they can, 1 if they cannot, 2 if the command line is wrong. The configuration and the guest
    /// bundle are those that containerd's environment would name: VZ_CONFIG and VZ_LINUX_DIR are read here too.
    Check {
        /// Try KVM with a small guest even if the result of an earlier try is known, and remember the new one.
        #[arg(long)]
        probe: bool,
        /// Write JSON.
        #[arg(long)]
        json: bool,
    },
    /// List the sandboxes that live on this host, with their machines and processes.
    Ps {
        /// Write JSON.
        #[arg(long)]
        json: bool,
    },
    /// Print what a sandbox's guest said.
    ///
    /// What the shim and the vmm process of a sandbox say is in containerd's log.
    Logs {
        /// The sandbox, as `vz ps` shows it.
        #[arg(value_name = "NAMESPACE/ID")]
        sandbox: String,
        /// The guest's console, as much of it as is kept.
        #[arg(long, required = true)]
        console: bool,
    },
    /// Write a shell's completions to standard output.
    Completions {
        /// The shell.
        shell: Shell,
    },
    /// Write man pages into a directory.
    #[command(hide = true)]
    Man {
        /// The directory; it is made if there is none.
        dir: PathBuf,
    },
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_definitions_agree_with_each_other() {
        Args::command().debug_assert();
    }

    #[test]
    fn every_shell_gets_completions() {
        for shell in [Shell::Bash, Shell::Elvish, Shell::Fish, Shell::PowerShell, Shell::Zsh] {
            let mut text = Vec::new();
            clap_complete::generate(shell, &mut Args::command(), "vz", &mut text);
            assert!(String::from_utf8(text).unwrap().contains("probe"), "{shell}");
        }
    }
}
