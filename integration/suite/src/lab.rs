//! The suite's own devbox: brought up, asked, broken on purpose, and taken down.

use std::{
    env,
    fmt::Write as _,
    fs,
    io::{Read, Seek, SeekFrom},
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        Mutex, OnceLock, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use crate::{
    Skip, Verdict,
    command::Program,
    host, leaks, outside,
    poll::{patience, until},
    table::Notes,
    watch::Growth,
};

/// The small image.
pub const BUSYBOX: &str = "vz.test/busybox:1";
/// The image with Python.
pub const DEBIAN: &str = "vz.test/debian:12";
/// The image with a web server.
pub const NGINX: &str = "vz.test/nginx:1";
/// A script that prints a container's limits of memory and CPU, whether it has a cgroup namespace or not.
pub const LIMITS: &str = "d=/sys/fs/cgroup; [ -e $d/memory.max ] || d=$d$(cut -d: -f3 /proc/self/cgroup)
    cat $d/memory.max $d/cpu.max";
/// What all containers of the suite have in their names.
pub const PREFIX: &str = "vzt-";
/// The shim's own deadlines, in seconds.
const TIMEOUTS: [(&str, u32); 4] = [("boot_s", 30), ("agent_s", 30), ("kill_s", 4), ("drain_s", 10)];
/// Log lines that a failure quotes.
const LOG_LINES: usize = 25;

/// Why the suite cannot run.
#[derive(Debug)]
pub enum Unfit {
    /// It is not for this host.
    Skip(String),
    /// Something is missing that should be there.
    Broken(String),
}

/// The devbox, and what the tests do with it.
#[derive(Debug)]
pub struct Lab {
    env: Vec<(String, String)>,
    runtime: String,
    devbox: PathBuf,
    files: PathBuf,
    bundle: PathBuf,
    shim: PathBuf,
    soak: bool,
    take_down: bool,
    next: AtomicU32,
    planted: PathBuf,
    notes: Mutex<Notes>,
    chosen: OnceLock<String>,
}

fn variable(name: &str) -> Option<String> {
    env::var(name).ok().filter(|value| !value.is_empty())
}

fn repository() -> PathBuf {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    dir.canonicalize().unwrap_or(dir)
}

impl Lab {
    /// Brings the devbox up, with the shim as it was built last.
    pub fn set_up() -> Result<Self, Unfit> {
        if !rustix::process::geteuid().is_root() {
            return Err(Unfit::Skip("containers need root".into()));
        }
        let broken = |what: String| Unfit::Broken(what);
        let runtime = variable("VZ_TEST_RUNTIME").unwrap_or_else(|| "io.containerd.vz.v2".into());
        let repository = repository();
        let bin_dir = variable("VZ_BIN_DIR").map_or_else(|| repository.join("target/release"), PathBuf::from);
        let bundle = variable("VZ_LINUX_DIR").map_or_else(|| repository.join("out/container"), PathBuf::from);
        let shim = bin_dir.join("containerd-shim-vz-v2");
        if runtime.contains(".vz.") {
            for (file, target) in
                [(shim.clone(), "build"), (bin_dir.join("vz"), "build"), (bundle.join("version.json"), "bundle")]
            {
                if !file.exists() {
                    return Err(broken(format!("{} does not exist: run `make {target}`", file.display())));
                }
            }
        }
        let devbox = PathBuf::from(variable("VZ_TEST_DEVBOX").unwrap_or_else(|| "/var/tmp/vzt".into()));
        let files = devbox.with_extension("d");
        fs::create_dir_all(&files).map_err(|e| broken(format!("make {}: {e}", files.display())))?;
        let mut lab = Self {
            env: vec![
                ("VZ_DEVBOX".into(), devbox.display().to_string()),
                ("VZ_BIN_DIR".into(), bin_dir.display().to_string()),
                ("VZ_CONFIG".into(), files.join("config.toml").display().to_string()),
                ("VZ_LINUX_DIR".into(), files.join("linux").display().to_string()),
            ],
            runtime,
            bundle,
            shim,
            soak: variable("VZ_TEST_SOAK").is_some_and(|v| v != "0"),
            take_down: false,
            next: AtomicU32::new(1),
            planted: files.join("planted"),
            notes: Mutex::default(),
            chosen: OnceLock::new(),
            files,
            devbox,
        };
        lab.write_config("");
        lab.link_bundle(&lab.bundle);
        lab.plant().map_err(|e| broken(format!("fill {}: {e}", lab.planted.display())))?;
        let was_up = lab.devbox_command("status").stdout(Stdio::null()).stderr(Stdio::null()).status();
        let was_up = was_up.map_err(|e| broken(format!("run integration/devbox: {e}")))?.success();
        let keep = variable("VZ_TEST_KEEP").is_some_and(|v| v != "0");
        lab.take_down = !was_up && !keep;
        // containerd has to descend from us, and to have this environment.
        host::adopt_orphans();
        if was_up {
            lab.stop_containerd();
        }
        // Its progress is shown: the first time takes minutes.
        let up = lab.devbox_command("up").status().map_err(|e| broken(format!("run integration/devbox: {e}")))?;
        if !up.success() {
            return Err(broken("integration/devbox up failed; its own words are above".into()));
        }
        lab.learn_env()?;
        let left = lab.sweep();
        if !left.is_empty() {
            println!("removed what an earlier run left: {}", left.join(", "));
        }
        Ok(lab)
    }

    fn devbox_command(&self, action: &str) -> Command {
        let mut command = Command::new(repository().join("integration/devbox"));
        command.arg(action).envs(self.env.iter().map(|(name, value)| (name, value))).stdin(Stdio::null());
        command
    }

    fn learn_env(&mut self) -> Result<(), Unfit> {
        let script = "eval \"$(\"$0\" env)\"; env -0";
        let output = Command::new("bash")
            .args(["-c", script])
            .arg(repository().join("integration/devbox"))
            .envs(self.env.iter().map(|(name, value)| (name, value)))
            .env("CONTAINERD_NAMESPACE", "default")
            .output()
            .map_err(|e| Unfit::Broken(format!("run bash: {e}")))?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        for (name, value) in text.split('\0').filter_map(|pair| pair.split_once('=')) {
            let wanted = name == "PATH"
                || ["NERDCTL_TOML", "CRI_CONFIG_FILE"].contains(&name)
                || name.starts_with("CONTAINERD_");
            if wanted {
                self.env.push((name.into(), value.into()));
            }
        }
        let known = |name: &str| self.env.iter().any(|(key, _)| key == name);
        if known("PATH") && known("CONTAINERD_ADDRESS") {
            return Ok(());
        }
        Err(Unfit::Broken(format!("integration/devbox env: {}", String::from_utf8_lossy(&output.stderr))))
    }

    /// Stops the devbox, if the suite started it.
    pub fn take_down(&self) {
        if self.take_down && !self.devbox_command("down").status().is_ok_and(|status| status.success()) {
            println!("warning: integration/devbox down failed");
        }
    }

    // ---- what it is ----

    /// The runtime of all containers.
    pub fn runtime(&self) -> &str {
        &self.runtime
    }

    /// Whether that is vz.
    pub fn is_vz(&self) -> bool {
        self.runtime.contains(".vz.")
    }

    /// Skips a test of what only vz has.
    pub fn vz_only(&self) -> Verdict {
        if self.is_vz() { Ok(()) } else { Err(Skip(format!("about vz, and the runtime is {}", self.runtime))) }
    }

    /// The machine that the shim's configuration names; `auto` where it names none.
    pub fn machine(&self) -> String {
        variable("VZ_TEST_MACHINE").unwrap_or_else(|| "auto".into())
    }

    /// The machine that containers run on, as `vz check` says: `kvm` or `qemu`; empty with another runtime.
    pub fn chosen_machine(&self) -> &str {
        self.chosen.get_or_init(|| {
            if !self.is_vz() {
                return String::new();
            }
            let said = self.vz(&["check", "--json"]).run().text();
            let report: serde_json::Value = serde_json::from_str(&said).unwrap_or_default();
            report["machine"]["chosen"].as_str().unwrap_or_default().to_owned()
        })
    }

    /// `soak` repetitions with `VZ_TEST_SOAK=1`, else `quick` ones.
    pub fn times(&self, quick: usize, soak: usize) -> usize {
        if self.soak { soak } else { quick }
    }

    /// The devbox's directory.
    pub fn devbox(&self) -> &Path {
        &self.devbox
    }

    /// The guest bundle that is tested.
    pub fn bundle(&self) -> &Path {
        &self.bundle
    }

    /// The shim that is tested.
    pub fn shim(&self) -> &Path {
        &self.shim
    }

    /// The variables of all programs.
    pub fn env(&self) -> &[(String, String)] {
        &self.env
    }

    /// A name for a container that no other has.
    pub fn id(&self, what: &str) -> String {
        format!("{PREFIX}{what}-{}", self.next.fetch_add(1, Ordering::Relaxed))
    }

    /// An empty directory of a test's own.
    #[track_caller]
    pub fn dir(&self) -> tempfile::TempDir {
        tempfile::tempdir_in(&self.files).expect("make a temporary directory")
    }

    // ---- what a scene does to the host ----

    /// A directory of the host that is no sandbox's: a hostile guest may try what it likes with it, to no avail. What
    /// is in it is looked at after each scene.
    pub fn planted(&self) -> &Path {
        &self.planted
    }

    /// Fills it, whatever was in it.
    pub fn plant(&self) -> std::io::Result<()> {
        outside::plant(&self.planted)
    }

    /// Tells the suite's table what the test looks at on the host, beside what is looked at after every test.
    pub fn looked_at(&self, what: &'static str) {
        self.note(|notes| {
            notes.looked_at.insert(what);
        });
    }

    /// Tells it by how much a sandbox has grown.
    pub fn grew(&self, growth: Growth) {
        self.note(|notes| notes.growth = Some(notes.growth.unwrap_or_default().most(growth)));
    }

    fn note(&self, note: impl FnOnce(&mut Notes)) {
        note(&mut self.notes.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// What the last test has told.
    pub(crate) fn take_notes(&self) -> Notes {
        std::mem::take(&mut self.notes.lock().unwrap_or_else(PoisonError::into_inner))
    }

    // ---- its clients ----

    fn program(&self, name: &str) -> Program {
        // Looked up here: the search path of the child is not the one that starts it.
        let path = self.env.iter().rev().find(|(key, _)| key == "PATH").map_or("", |(_, value)| value.as_str());
        let found = path.split(':').map(|dir| Path::new(dir).join(name)).find(|file| file.exists());
        Program::new(found.unwrap_or_else(|| name.into())).envs(&self.env)
    }

    /// `ctr`.
    pub fn ctr(&self, args: &[&str]) -> Program {
        self.program("ctr").args(args)
    }

    /// `nerdctl`.
    pub fn nerdctl(&self, args: &[&str]) -> Program {
        self.program("nerdctl").args(args)
    }

    /// `crictl`.
    pub fn crictl(&self, args: &[&str]) -> Program {
        self.program("crictl").args(args)
    }

    /// `vz`, with the shim's configuration and guest bundle.
    pub fn vz(&self, args: &[&str]) -> Program {
        Program::new(self.shim.with_file_name("vz")).envs(&self.env).args(args)
    }

    /// `ctr run` with the runtime.
    pub fn ctr_run(&self, args: &[&str]) -> Program {
        self.ctr(&["run", "--runtime", &self.runtime]).args(args)
    }

    /// `nerdctl run` with the runtime, and no network.
    pub fn nerdctl_run(&self, args: &[&str]) -> Program {
        self.nerdctl(&["run", "--runtime", &self.runtime, "--net", "none"]).args(args)
    }

    /// Status of a task as containerd has it (`RUNNING`, `STOPPED`), if there is one.
    #[track_caller]
    pub fn status(&self, id: &str) -> Option<String> {
        let list = self.ctr(&["task", "ls"]).run().ok();
        list.lines()
            .map(str::split_whitespace)
            .find_map(|mut fields| (fields.next() == Some(id)).then(|| fields.nth(1).unwrap_or_default().to_owned()))
    }

    /// Waits until a task has a status.
    #[track_caller]
    pub fn await_status(&self, id: &str, wanted: &str) {
        until(&format!("task {id} to be {wanted}"), Duration::from_secs(60), || {
            (self.status(id).as_deref() == Some(wanted)).then_some(())
        });
    }

    // ---- breaking it ----

    fn write_config(&self, extra: &str) {
        let text = configuration(variable("VZ_TEST_MACHINE").as_deref(), patience(), extra);
        let path = self.files.join("config.toml");
        fs::write(&path, text).unwrap_or_else(|e| panic!("write {}: {e}", path.display()));
    }

    fn link_bundle(&self, target: &Path) {
        let (link, new) = (self.files.join("linux"), self.files.join("linux.new"));
        drop(fs::remove_file(&new));
        symlink(target, &new).and_then(|()| fs::rename(&new, &link)).expect("link the guest bundle");
    }

    /// Adds to the shim's configuration until the guard is dropped.
    #[track_caller]
    pub fn configure(&self, extra: &str) -> Restore<'_> {
        self.write_config(extra);
        Restore(self)
    }

    /// Has the shim use another guest bundle until the guard is dropped.
    #[track_caller]
    pub fn use_bundle(&self, dir: &Path) -> Restore<'_> {
        self.link_bundle(dir);
        Restore(self)
    }

    /// containerd's process.
    #[track_caller]
    pub fn containerd(&self) -> host::Process {
        let path = self.devbox.join("run/containerd.pid");
        let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("read {}: {e}", path.display()));
        let pid = text.trim().parse().expect("a pid is a number");
        host::Processes::now().get(pid).cloned().expect("containerd runs")
    }

    fn stop_containerd(&self) {
        let path = self.devbox.join("run/containerd.pid");
        let pid = fs::read_to_string(path).ok().and_then(|text| text.trim().parse().ok());
        if let Some(process) = pid.and_then(|pid| host::Processes::now().get(pid).cloned()) {
            host::kill(&process);
        }
    }

    /// Starts containerd again after it was killed.
    #[track_caller]
    pub fn start_containerd(&self) {
        let output = self.devbox_command("up").output().expect("run integration/devbox");
        assert!(output.status.success(), "integration/devbox up: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// Removes the fifos of clients whose task has vanished under them: ctr leaves them behind, whatever the runtime.
    pub fn remove_clients_fifos(&self) {
        for path in leaks::fifo_directories() {
            fs::remove_dir_all(&path).unwrap_or_else(|e| panic!("remove {}: {e}", path.display()));
        }
    }

    /// Removes all containers; the names of those that were there. containerd is started if it was killed.
    pub fn sweep(&self) -> Vec<String> {
        let mut left = Vec::new();
        let mut listed = self.ctr(&["containers", "ls", "-q"]).deadline(30).run();
        if listed.code() != 0 {
            self.start_containerd();
            listed = self.ctr(&["containers", "ls", "-q"]).deadline(30).run();
        }
        for id in listed.ok().split_whitespace() {
            left.push(id.to_owned());
            // A hung runtime must not keep the other tests from running: what does not work shows as a leak.
            for args in [&["rm", "-f", "-v", id][..], &["task", "rm", "-f", id], &["containers", "rm", id]] {
                let program = if args[0] == "rm" { self.nerdctl(args) } else { self.ctr(args) };
                drop(program.deadline(30).start().wait_at_most(Duration::from_secs(30)));
            }
        }
        left
    }

    // ---- its log ----

    fn log_path(&self) -> PathBuf {
        self.devbox.join("log/containerd.log")
    }

    /// How long containerd's log is.
    pub fn log_position(&self) -> u64 {
        fs::metadata(self.log_path()).map_or(0, |data| data.len())
    }

    /// All of containerd's log since then; what the shims say is in it.
    pub fn log_lines_since(&self, mark: u64) -> String {
        let Ok(mut file) = fs::File::open(self.log_path()) else { return String::new() };
        // A containerd that was started again has a new log.
        let start = if file.metadata().is_ok_and(|data| data.len() >= mark) { mark } else { 0 };
        let mut text = Vec::new();
        if file.seek(SeekFrom::Start(start)).and_then(|_| file.read_to_end(&mut text)).is_err() {
            return String::new();
        }
        String::from_utf8_lossy(&text).into_owned()
    }

    /// The warnings and errors in containerd's log since then, the last of them; a shim's are among them.
    pub fn log_since(&self, mark: u64) -> String {
        let text = self.log_lines_since(mark);
        let bad = |line: &&str| ["level=warn", "level=error", "level=fatal"].iter().any(|level| line.contains(level));
        let lines: Vec<_> = text.lines().filter(bad).collect();
        let shown = &lines[lines.len().saturating_sub(LOG_LINES)..];
        shown.iter().map(|line| format!("  {}\n", line.chars().take(600).collect::<String>())).collect()
    }
}

/// The shim's configuration: what this run is for, unless `extra` says otherwise, and `extra`.
fn configuration(machine: Option<&str>, patience: u32, extra: &str) -> String {
    let mut text = String::new();
    let says = |key: &str| extra.lines().any(|line| line.trim_start().starts_with(key));
    if let Some(machine) = machine.filter(|_| !says("machine")) {
        writeln!(text, "machine = {machine:?}").expect("write to a string");
    }
    if patience > 1 && !says("[timeouts]") {
        for (key, seconds) in TIMEOUTS {
            writeln!(text, "timeouts.{key} = {}", seconds * patience).expect("write to a string");
        }
    }
    text + extra
}

/// Puts the shim's configuration and guest bundle back.
#[derive(Debug)]
pub struct Restore<'l>(&'l Lab);

impl Drop for Restore<'_> {
    fn drop(&mut self) {
        self.0.write_config("");
        self.0.link_bundle(&self.0.bundle);
    }
}

#[cfg(test)]
mod tests {
    use super::configuration;

    #[test]
    fn a_tests_own_configuration_wins() {
        assert_eq!(configuration(None, 1, ""), "");
        assert_eq!(configuration(Some("kvm"), 1, "[vm]\n"), "machine = \"kvm\"\n[vm]\n");
        assert_eq!(configuration(Some("kvm"), 1, "machine = \"qemu\"\n"), "machine = \"qemu\"\n");
        assert!(configuration(Some("kvm"), 4, "").ends_with("timeouts.drain_s = 40\n"));
        assert_eq!(configuration(None, 4, "[timeouts]\nboot_s = 1\n"), "[timeouts]\nboot_s = 1\n");
    }
}
