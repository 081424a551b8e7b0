//! The command line. Completions and man pages are made from these definitions, so what is written here is what people
//! read there.

use std::path::PathBuf;

use clap::{Parser, Subcommand};
use clap_complete::Shell;

use crate::oci::args as oci;

/// Containers in microVMs: runs OCI bundles, checks this host, and shows what runs on it.
///
/// With containerd, containers are run by its clients (ctr, nerdctl, crictl) and the runtime io.containerd.vz.v2.
/// Without it, by `vz run`, and by whatever calls runc: the command line is the same (podman --runtime).
#[derive(Debug, Parser)]
#[command(name = "vz", version, max_term_width = 100)]
pub struct Args {
    /// For containers.
    #[command(flatten)]
    pub containers: oci::Global,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Say whether containers can run on this host, in which machine, and what to do if they cannot.
    ///
    /// The exit status is 0 if they can, 1 if they cannot, 2 if the command line is wrong. The configuration and the
    /// guest bundle are those that containerd's environment would name: VZ_CONFIG and VZ_LINUX_DIR are read here too.
    Check {
        /// Try KVM with a small guest even if the result of an earlier try is known, and remember the new one.
        #[arg(long)]
        probe: bool,
        /// Write JSON.
        #[arg(long)]
        json: bool,
    },
    /// Run a container from a bundle, without containerd, and end with its exit status.
    ///
    /// The container gets this command's standard streams and signals. Its bundle is a directory with a config.json and
    /// a root file system, such as `runc spec` and `umoci unpack` make.
    Run(oci::Run),
    /// Run a further process in a running container.
    Exec(oci::Exec),
    /// Make a container from a bundle, ready to be started.
    Create(oci::New),
    /// Start a container that has been made.
    Start(oci::Named),
    /// Write what a container is, as JSON.
    State(oci::Named),
    /// Send a signal to a container.
    Kill(oci::Kill),
    /// Take away a container that has ended, or was never started.
    Delete(oci::Delete),
    /// List the containers of `vz run` and `vz create`.
    #[command(visible_alias = "ls")]
    List(oci::List),
    /// Stop all processes of a container for a while.
    #[command(hide = true)]
    Pause(oci::Named),
    /// Let a container's processes go on.
    #[command(hide = true)]
    Resume(oci::Named),
    /// Write what this runtime can do, as JSON.
    Features,
    /// List the sandboxes that live on this host, with their machines and processes; or a container's processes.
    ///
    /// A sandbox can be containerd's, or one of `vz run` and `vz create`. Of a container those processes are shown that
    /// it has on the host: one for its first process, one for each of `vz exec`.
    Ps {
        /// A container of `vz run` or `vz create`.
        container: Option<String>,
        /// Options for ps(1), `-ef` without any.
        #[arg(value_name = "PS_OPTION", requires = "container", trailing_var_arg = true, allow_hyphen_values = true)]
        options: Vec<String>,
        /// table, or json; of a container's processes that is their pids.
        #[arg(long, short, value_name = "FORMAT", default_value = "table")]
        format: oci::Format,
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
    /// Guest bundles, for VMs of one's own as well as for containers.
    Vm {
        /// Of which system.
        #[command(subcommand)]
        system: System,
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

/// What a VM runs.
#[derive(Debug, Subcommand)]
pub enum System {
    /// Linux: a kernel, an initramfs with the agent, and youki.
    ///
    /// Bundles are looked for in $VZ_LINUX_DIR, or where that is not set in ~/.vz/linux, /usr/local/share/vz/linux,
    /// /usr/share/vz/linux and /var/lib/vz/linux: each has a directory for each profile, or is a bundle itself. The
    /// first one counts.
    Linux {
        /// What to do.
        #[command(subcommand)]
        verb: Linux,
    },
}

/// What can be done with bundles.
#[derive(Debug, Subcommand)]
pub enum Linux {
    /// Install a bundle, as a whole or not at all, and verify it.
    ///
    /// Without --from it is enough that there is one; where there is none, the one that this program brings along is
    /// installed: an installed vz has the container's, in /var/lib/vz/linux for root, in ~/.vz/linux for others. With
    /// --from the place is --dir, or $VZ_LINUX_DIR, or ~/.vz/linux.
    Init {
        /// Which and where.
        #[command(flatten)]
        place: Place,
        /// The bundle to install, a directory; it replaces another one.
        #[arg(long, value_name = "DIR")]
        from: Option<PathBuf>,
    },
    /// Check every file of a bundle by its checksum, and that its programs are of this version.
    Verify {
        /// Which and where.
        #[command(flatten)]
        place: Place,
    },
    /// Show what a bundle says of itself.
    Info {
        /// Which and where.
        #[command(flatten)]
        place: Place,
    },
    /// List all bundles.
    List {
        /// Where to look instead of the usual places.
        #[arg(long, value_name = "DIR")]
        dir: Option<PathBuf>,
        /// Write JSON.
        #[arg(long)]
        json: bool,
    },
    /// Build a bundle from vz's source, with make, and install it.
    Build {
        /// Which and where.
        #[command(flatten)]
        place: Place,
        /// vz's source.
        #[arg(long, value_name = "DIR", default_value = ".")]
        source: PathBuf,
    },
}

/// A bundle's profile and place.
#[derive(Debug, clap::Args)]
pub struct Place {
    /// developer: a broad kernel. container: what containers need and nothing else.
    #[arg(long, value_name = "PROFILE", default_value = "developer", value_parser = ["developer", "container"])]
    pub kernel_profile: String,
    /// A bundle, or a directory that has a directory for each profile, instead of the usual places.
    #[arg(long, value_name = "DIR")]
    pub dir: Option<PathBuf>,
    /// Write JSON.
    #[arg(long)]
    pub json: bool,
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
