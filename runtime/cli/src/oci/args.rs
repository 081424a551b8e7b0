//! The command line of containers, which is runc's: what calls that can call this.

use std::path::PathBuf;

use clap::{ArgAction, Args, ValueEnum};

use super::state::ROOT;

/// What goes before the verb.
#[derive(Debug, Args)]
#[command(next_help_heading = "Options for containers")]
pub struct Global {
    /// Where the containers' state is.
    #[arg(long, value_name = "DIR", default_value = ROOT)]
    pub root: PathBuf,
    /// Write errors to this file too.
    #[arg(long, value_name = "FILE")]
    pub log: Option<PathBuf>,
    /// The form of --log.
    #[arg(long, value_name = "FORMAT", default_value = "text")]
    pub log_format: LogFormat,
    /// Write more into the log of a container's sandbox, shim.log in its directory below --root.
    #[arg(long)]
    pub debug: bool,
    /// Accepted for callers of runc: the cgroup is made where systemd would put it, without asking it.
    #[arg(long)]
    pub systemd_cgroup: bool,
}

/// How errors are logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// `time="..." level=error msg="..."`
    Text,
    /// One object for each.
    Json,
}

/// A new container.
#[derive(Debug, Args)]
pub struct New {
    /// Its name: letters, digits and _+-.
    #[arg(value_name = "CONTAINER")]
    pub id: String,
    /// The bundle: a directory with a config.json.
    #[arg(long, short, value_name = "DIR", default_value = ".")]
    pub bundle: PathBuf,
    /// A socket to send the terminal's master to.
    #[arg(long, value_name = "SOCKET")]
    pub console_socket: Option<PathBuf>,
    /// A file to write the pid to.
    #[arg(long, value_name = "FILE")]
    pub pid_file: Option<PathBuf>,
    /// The guest's kernel: developer is broad, container has what containers need. [default: as configured]
    #[arg(long, value_name = "PROFILE", value_parser = ["developer", "container"])]
    pub kernel_profile: Option<String>,
    /// Accepted for callers of runc: how the guest enters its root is its own matter.
    #[arg(long)]
    pub no_pivot: bool,
    /// Accepted for callers of runc: containers of two VMs have no keyring in common.
    #[arg(long)]
    pub no_new_keyring: bool,
    /// Descriptors do not cross a VM's boundary: 0 only.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub preserve_fds: u32,
}

/// `run`.
#[derive(Debug, Args)]
pub struct Run {
    /// The container.
    #[command(flatten)]
    pub new: New,
    /// Return once it runs.
    #[arg(long, short)]
    pub detach: bool,
    /// Keep its state after its end, until it is deleted.
    #[arg(long)]
    pub keep: bool,
    /// Accepted for callers of runc.
    #[arg(long)]
    pub no_subreaper: bool,
}

/// `exec`.
#[derive(Debug, Args)]
pub struct Exec {
    /// The container.
    #[arg(value_name = "CONTAINER")]
    pub id: String,
    /// The command, where --process does not say it.
    #[arg(value_name = "COMMAND", trailing_var_arg = true, allow_hyphen_values = true)]
    pub command: Vec<String>,
    /// A file with the process, as in a config.json.
    #[arg(long, short, value_name = "FILE")]
    pub process: Option<PathBuf>,
    /// Return once it runs.
    #[arg(long, short)]
    pub detach: bool,
    /// A file to write the pid to.
    #[arg(long, value_name = "FILE")]
    pub pid_file: Option<PathBuf>,
    /// Give it a terminal.
    #[arg(long, short)]
    pub tty: bool,
    /// A socket to send the terminal's master to.
    #[arg(long, value_name = "SOCKET")]
    pub console_socket: Option<PathBuf>,
    /// A variable, NAME=VALUE; may be given more than once.
    #[arg(long, short, value_name = "VARIABLE")]
    pub env: Vec<String>,
    /// Its working directory.
    #[arg(long, value_name = "DIR")]
    pub cwd: Option<PathBuf>,
    /// Its user, UID or UID:GID.
    #[arg(long, short, value_name = "USER")]
    pub user: Option<String>,
    /// A further group; may be given more than once.
    #[arg(long, short = 'g', value_name = "GID")]
    pub additional_gids: Vec<u32>,
    /// A capability more; may be given more than once.
    #[arg(long, short, value_name = "CAPABILITY")]
    pub cap: Vec<String>,
    /// It gets no new privileges.
    #[arg(long)]
    pub no_new_privs: bool,
    /// Accepted for callers of runc: AppArmor's profiles are the host's.
    #[arg(long, value_name = "PROFILE")]
    pub apparmor: Option<String>,
    /// Accepted for callers of runc: SELinux's labels are the host's.
    #[arg(long, value_name = "LABEL")]
    pub process_label: Option<String>,
    /// Descriptors do not cross a VM's boundary: 0 only.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub preserve_fds: u32,
}

/// `kill`.
#[derive(Debug, Args)]
pub struct Kill {
    /// The container.
    #[arg(value_name = "CONTAINER")]
    pub id: String,
    /// The signal, by name or number.
    #[arg(default_value = "SIGTERM")]
    pub signal: String,
    /// To all of its processes.
    #[arg(long, short)]
    pub all: bool,
}

/// `delete`.
#[derive(Debug, Args)]
pub struct Delete {
    /// The container.
    #[arg(value_name = "CONTAINER")]
    pub id: String,
    /// Kill it first, if it runs. One that is not there is no error.
    #[arg(long, short)]
    pub force: bool,
}

/// `list`.
#[derive(Debug, Args)]
pub struct List {
    /// table, or json.
    #[arg(long, short, value_name = "FORMAT", default_value = "table")]
    pub format: Format,
    /// Write JSON.
    #[arg(long, action = ArgAction::SetTrue, conflicts_with = "format")]
    pub json: bool,
    /// Write names only.
    #[arg(long, short)]
    pub quiet: bool,
}

/// What a list looks like.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people.
    Table,
    /// For programs.
    Json,
}

/// A container, and nothing else.
#[derive(Debug, Args)]
pub struct Named {
    /// The container.
    #[arg(value_name = "CONTAINER")]
    pub id: String,
}
