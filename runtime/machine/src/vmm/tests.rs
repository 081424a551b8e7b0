//! The main loop with a machine that does as it is told.

use std::{
    io::Write,
    os::{fd::AsFd, unix::net::UnixStream},
    sync::{Arc, Mutex},
    thread::JoinHandle,
};

use nix::fcntl::OFlag;
use vz_virtio::vsock::Vsock;

use super::*;
use crate::{
    Exit, Outputs,
    control::{MachineChoice, MachineKind},
};

/// Ends when its line is cut.
#[derive(Debug)]
struct Fake {
    ended: OwnedFd,
    line: Line,
    outputs: Outputs,
    exit: Exit,
}

type Line = Arc<Mutex<Option<OwnedFd>>>;

impl Machine for Fake {
    fn kind(&self) -> MachineKind {
        MachineKind::Qemu
    }
    fn outputs(&mut self) -> Outputs {
        std::mem::take(&mut self.outputs)
    }
    fn serve(&mut self, _: Devices, _: Alarm) -> Result<(), LaunchError> {
        Ok(())
    }
    fn ended(&self) -> std::os::fd::BorrowedFd<'_> {
        self.ended.as_fd()
    }
    fn wait(&mut self) -> io::Result<Exit> {
        Ok(self.exit.clone())
    }
    fn kill(&self) -> io::Result<()> {
        self.line.lock().unwrap().take();
        Ok(())
    }
}

struct Rig {
    shim: Channel,
    line: Line,
    console: UnixStream,
    complaints: UnixStream,
    alarm: Alarm,
    thread: JoinHandle<io::Result<()>>,
    dir: tempfile::TempDir,
}

fn config(deadline_ms: u64) -> BootConfig {
    BootConfig {
        sandbox: "test/loop".into(),
        machine: MachineChoice::default(),
        nics: Vec::new(),
        disks: Vec::new(),
        vcpus: 1,
        memory_mib: 1,
        guest_bundle: "/".into(),
        share: "/".into(),
        share_tag: "vz".into(),
        state_dir: "/".into(),
        guest_ports: vec![1024],
        boot_deadline_ms: deadline_ms,
        console_limit: 10_000,
        qemu: "qemu".into(),
        count_instructions: false,
        kernel_args: String::new(),
        report_denied_calls: false,
        log_level: "error".into(),
    }
}

fn rig(exit: Exit, deadline_ms: u64) -> Rig {
    let dir = tempfile::tempdir().unwrap();
    let (shim, ours) = Channel::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    let (ended, line) = nix::unistd::pipe2(OFlag::O_CLOEXEC).unwrap();
    let line = Arc::new(Mutex::new(Some(line)));
    let (console, guest) = UnixStream::pair().unwrap();
    let (complaints, machine) = UnixStream::pair().unwrap();
    let outputs = Outputs { console: Some(guest.into()), complaints: Some(machine.into()) };
    let machine = Box::new(Fake { ended, line: Arc::clone(&line), outputs, exit });
    let (vsock, handle) = Vsock::new(3, [1024]).unwrap();
    let (failures, alarm) = Failures::new().unwrap();
    let started = Started { machine, vsock: handle, console: Console::create(dir.path(), 10_000).unwrap(), cpu_us: 5 };
    let looped = run::Loop::new(&config(deadline_ms), started, failures, Outbox::new(ours)).unwrap();
    let thread = std::thread::spawn(move || {
        // Its wake-up is a descriptor of the device.
        let _vsock = vsock;
        looped.run()
    });
    Rig { shim, line, console, complaints, alarm, thread, dir }
}

impl Rig {
    fn event(&self) -> Event {
        control::decode(&self.shim.recv().unwrap().unwrap().bytes).unwrap()
    }

    fn ended(self) -> Ended {
        let launched = Event::Launched { machine: MachineKind::Qemu, cpu_us: 5 };
        assert_eq!(self.event(), launched);
        // A dial may have been answered in between.
        loop {
            if let Event::Ended(ended) = self.event() {
                self.thread.join().unwrap().unwrap();
                return ended;
            }
        }
    }

    /// The machine ends by itself, after its last words.
    fn end(self, console: &str, complaints: &str) -> Ended {
        (&self.console).write_all(console.as_bytes()).unwrap();
        (&self.complaints).write_all(complaints.as_bytes()).unwrap();
        self.line.lock().unwrap().take();
        self.ended()
    }
}

#[test]
fn a_guest_that_shuts_down() {
    let ended = rig(Exit::Guest, 60_000).end("booting\r\nbye\r\n", "");
    assert_eq!(ended.cause, Cause::Shutdown);
    assert_eq!(ended.message, "guest ended before its agent connected: see the guest's console");
    assert_eq!(ended.console, "booting\nbye");
}

#[test]
fn a_guest_whose_kernel_panics() {
    let console = "[    0.1] x\r\n[    0.2] Kernel panic - not syncing: Oh no\r\n[    0.3] CPU: 0\r\n";
    let ended = rig(Exit::Guest, 60_000).end(console, "");
    assert_eq!(ended.cause, Cause::Panic);
    assert_eq!(ended.message, "guest kernel panicked: Kernel panic - not syncing: Oh no");
}

#[test]
fn a_machine_that_says_no() {
    let failed = || Exit::Failed("QEMU exited with status 1".into());
    let ended = rig(failed(), 60_000).end("", "qemu: no such device\n");
    assert_eq!(ended.cause, Cause::Launch);
    assert_eq!(ended.message, "QEMU exited with status 1: qemu: no such device");
    let ended = rig(failed(), 60_000).end("a running guest", "");
    assert_eq!((ended.cause, ended.message.as_str()), (Cause::Machine, "QEMU exited with status 1"));
}

#[test]
fn a_kvm_that_cannot_run_the_guest() {
    let ended = rig(Exit::Unfit("KVM cannot run this guest: internal error 1".into()), 60_000).end("", "");
    assert_eq!((ended.cause, ended.message.as_str()), (Cause::Kvm, "KVM cannot run this guest: internal error 1"));
}

#[test]
fn a_guest_that_does_not_connect() {
    let rig = rig(Exit::Failed("QEMU was killed by SIGKILL".into()), 50);
    (&rig.console).write_all(b"stuck").unwrap();
    let ended = rig.ended();
    assert_eq!((ended.cause, ended.console.as_str()), (Cause::BootTimeout, "stuck"));
    assert!(ended.message.contains("did not connect within 0.1 s"), "{}", ended.message);
}

#[test]
fn a_shim_that_is_gone() {
    let Rig { shim, line, thread, dir, .. } = rig(Exit::Guest, 60_000);
    drop(shim);
    // Whether it noticed while it said hello or after, the machine does not outlive it.
    let _ = thread.join().unwrap();
    drop((line, dir));
}

#[test]
fn a_device_that_fails_while_the_machine_goes_on() {
    let rig = rig(Exit::Failed("QEMU was killed by SIGKILL".into()), 60_000);
    rig.alarm.raise("device thread fs-1 panicked: ouch".into());
    let ended = rig.ended();
    assert_eq!((ended.cause, ended.message.as_str()), (Cause::Machine, "device thread fs-1 panicked: ouch"));
}

#[test]
fn a_machine_that_takes_its_devices_with_it() {
    let rig = rig(Exit::Guest, 60_000);
    rig.alarm.raise("vhost-user connection broke".into());
    let ended = rig.end("[    0.2] Kernel panic - not syncing: first\n", "");
    assert_eq!(ended.cause, Cause::Panic);
}
