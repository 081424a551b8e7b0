//! Containers that run while a test looks at them.

use std::{
    cell::{Cell, RefCell},
    time::Duration,
};

use crate::{
    Lab,
    command::{Output, Program, Running},
    poll::try_until,
};

/// A container that nerdctl runs in the background; removed when dropped.
#[derive(Debug)]
pub struct Container<'l> {
    lab: &'l Lab,
    /// Its name.
    pub name: String,
    /// Its id.
    pub id: String,
    removed: Cell<bool>,
}

impl<'l> Container<'l> {
    /// `nerdctl run -d` with these arguments, the image among them.
    #[track_caller]
    pub fn start(lab: &'l Lab, what: &str, args: &[&str]) -> Self {
        let name = lab.id(what);
        let id = lab.nerdctl_run(&["-d", "--name", &name]).args(args).run().ok();
        Self { lab, name, id, removed: Cell::new(false) }
    }

    /// `nerdctl run -d` with these arguments, on the default network if they name no other.
    #[track_caller]
    pub fn connected(lab: &'l Lab, what: &str, args: &[&str]) -> Self {
        let name = lab.id(what);
        let run = lab.nerdctl(&["run", "--runtime", lab.runtime(), "-d", "--name", &name]);
        let id = run.args(args).run().ok();
        Self { lab, name, id, removed: Cell::new(false) }
    }

    /// Its address on its first network, as the host sees it.
    #[track_caller]
    pub fn address(&self) -> String {
        self.inspect(".NetworkSettings.IPAddress")
    }

    /// A program in its network namespace on the host.
    #[track_caller]
    pub fn beside(&self, args: &[&str]) -> Program {
        let pid = self.inspect(".State.Pid");
        Program::new("nsenter").args(["-t", &pid, "-n", "--"]).args(args)
    }

    /// `nerdctl ACTION NAME`, for actions that need no more.
    #[track_caller]
    pub fn nerdctl(&self, action: &str) -> Output {
        self.lab.nerdctl(&[action, &self.name]).run()
    }

    /// `nerdctl exec` of these arguments.
    pub fn exec(&self, args: &[&str]) -> Program {
        self.lab.nerdctl(&["exec", &self.name]).args(args)
    }

    /// Runs a shell's script in it; its output.
    #[track_caller]
    pub fn sh(&self, script: &str) -> String {
        self.exec(&["sh", "-c", script]).run().ok()
    }

    /// `nerdctl logs` of its standard output.
    #[track_caller]
    pub fn logs(&self) -> String {
        self.nerdctl("logs").ok()
    }

    /// A field of `nerdctl inspect`, by its Go template.
    #[track_caller]
    pub fn inspect(&self, field: &str) -> String {
        self.lab.nerdctl(&["inspect", "--format", &format!("{{{{{field}}}}}"), &self.name]).run().ok()
    }

    /// Removes it, running or not.
    #[track_caller]
    pub fn remove(&self) {
        self.removed.set(true);
        self.lab.nerdctl(&["rm", "-f", &self.name]).run().ok();
    }
}

impl Drop for Container<'_> {
    fn drop(&mut self) {
        if self.removed.get() {
            return;
        }
        // What cannot be removed is found by the checker.
        let mut removing = self.lab.nerdctl(&["rm", "-f", "-v", &self.name]).start();
        drop(removing.wait_at_most(Duration::from_secs(60)));
    }
}

/// A task that `ctr run` keeps in the foreground; removed when dropped.
#[derive(Debug)]
pub struct Task<'l> {
    lab: &'l Lab,
    /// Its id.
    pub id: String,
    client: RefCell<Option<Running>>,
}

impl<'l> Task<'l> {
    /// `ctr run` of an image and these arguments, once it runs.
    #[track_caller]
    pub fn start(lab: &'l Lab, what: &str, flags: &[&str], image: &str, args: &[&str]) -> Self {
        let task = Self::begin(lab, what, flags, image, args);
        let running = try_until(Duration::from_secs(60), || {
            let ended = task.client.borrow_mut().as_mut().and_then(|client| client.wait_at_most(Duration::ZERO));
            if let Some(output) = ended {
                panic!("the task ended: {output}");
            }
            (lab.status(&task.id).as_deref() == Some("RUNNING")).then_some(())
        });
        assert!(running.is_some(), "task {} does not run", task.id);
        task
    }

    /// The same, without waiting for it to run.
    #[track_caller]
    pub fn begin(lab: &'l Lab, what: &str, flags: &[&str], image: &str, args: &[&str]) -> Self {
        Self::begin_as(lab, lab.id(what), flags, image, args)
    }

    /// The same, under an id that the test has taken from [`Lab::id`].
    #[track_caller]
    pub fn begin_as(lab: &'l Lab, id: String, flags: &[&str], image: &str, args: &[&str]) -> Self {
        let client = lab.ctr_run(flags).args([image, &id]).args(args).start();
        Self { lab, id, client: RefCell::new(Some(client)) }
    }

    /// `ctr task ACTION ID`.
    pub fn ctr(&self, action: &str) -> Program {
        self.lab.ctr(&["task", action, &self.id])
    }

    /// `ctr task exec` of these arguments, under an id of its own.
    pub fn exec(&self, args: &[&str]) -> Program {
        self.lab.ctr(&["task", "exec", "--exec-id", &self.lab.id("exec"), &self.id]).args(args)
    }

    /// `ctr task kill` with a signal.
    #[track_caller]
    pub fn kill(&self, signal: &str) {
        self.lab.ctr(&["task", "kill", "-s", signal, &self.id]).run().ok();
    }

    /// What its client has written.
    pub fn stdout(&self) -> String {
        self.client.borrow().as_ref().map(Running::stdout).unwrap_or_default()
    }

    /// Waits until its client has written `wanted`.
    #[track_caller]
    pub fn expect(&self, wanted: &str) {
        self.client.borrow().as_ref().expect("the client runs").expect(wanted);
    }

    /// Waits for its client's end.
    #[track_caller]
    pub fn wait(&self) -> Output {
        let client = self.client.borrow_mut().take();
        client.expect("the client was waited for already").wait()
    }

    /// Ends its client the hard way, without its task.
    pub fn kill_client(&self) {
        drop(self.client.borrow_mut().take());
    }
}

impl Drop for Task<'_> {
    fn drop(&mut self) {
        let quietly = |args: &[&str]| drop(self.lab.ctr(args).start().wait_at_most(Duration::from_secs(60)));
        // A client that sees the end of its task removes its fifos.
        if let Some(mut client) = self.client.borrow_mut().take() {
            quietly(&["task", "kill", "-s", "KILL", &self.id]);
            drop(client.wait_at_most(Duration::from_secs(20)));
        }
        // Gone already where the test removed it; what cannot be removed is found by the checker.
        if self.lab.ctr(&["containers", "info", &self.id]).run().code() == 0 {
            quietly(&["task", "rm", "-f", &self.id]);
            quietly(&["containers", "rm", &self.id]);
        }
    }
}
