//! `vz-linux-bench`: boots guest bundles and says where the time goes.

use std::{
    env,
    error::Error,
    fs,
    io::{self, IsTerminal, Write},
    path::PathBuf,
    process::ExitCode,
    time::Duration,
};

use clap::{CommandFactory, Parser};
use tokio::signal::unix::{SignalKind, signal};
use vz_linux::{KernelProfile, VERSION};
use vz_machine::control::MachineChoice;
use vz_sys::error::chain;

mod args;
mod boot;
mod cpio;
mod guest;
mod network;
mod phases;
mod plot;
mod report;
mod rootfs;
mod stats;
mod subject;
mod vm;

use args::{Args, Machine};
use boot::{Boot, Plan, Workshop};
use phases::Unit;
use report::{Report, Setting};
use subject::Subject;

type Failure = Box<dyn Error>;

fn main() -> ExitCode {
    // The process that runs the VM, see `vm`.
    if env::args_os().nth(1).is_some_and(|arg| arg == "vmm") {
        return vz_machine::vmm::main();
    }
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("vz-linux-bench: {}", chain(e.as_ref()));
            if let Some(console) = e.downcast_ref::<BootFailure>().and_then(|e| e.source.console()) {
                eprintln!("the last that the guest said:\n{console}");
            }
            ExitCode::FAILURE
        }
    }
}

/// A boot that was none.
#[derive(Debug, thiserror::Error)]
#[error("boot {number} of {}", subject.display())]
struct BootFailure {
    /// Which.
    number: String,
    /// Of what.
    subject: PathBuf,
    /// Why.
    source: boot::Error,
}

fn run(args: &Args) -> Result<(), Failure> {
    if let Some(dir) = &args.man {
        fs::create_dir_all(dir)?;
        return Ok(clap_mangen::generate_to(Args::command(), dir)?);
    }
    if !nix::unistd::geteuid().is_root() {
        return Err("this needs root, for the confinement of the VM's process: run it with sudo".into());
    }
    let plan = plan(args)?;
    let bundle = match &args.bundle_dir {
        // One that has been named is taken, whatever its profile.
        Some(dir) if dir.join(VERSION).symlink_metadata().is_ok() => dir.clone(),
        dir => vz_linux::locate(dir.as_deref(), KernelProfile::Container)?,
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    // Whoever is told to end ends its VM and its files first, of which there are none yet.
    let (mut interrupt, mut terminate) = {
        let _entered = runtime.enter();
        (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?)
    };
    let workshop = Workshop::new()?;
    let more = more(args, &plan)?;
    let mut subjects = vec![Subject::bundle(&bundle, more.as_deref(), &workshop.path("first"))?];
    if let Some(other) = &args.compare {
        subjects.push(Subject::other(other, &bundle, more.as_deref(), &workshop.path("second"))?);
    }
    let results = runtime.block_on(async {
        tokio::select! {
            results = all(args, &plan, &workshop, &subjects) => results,
            _ = interrupt.recv() => Err("interrupted".into()),
            _ = terminate.recv() => Err("terminated".into()),
        }
    })?;
    let setting = Setting {
        unit: plan.unit,
        machine: results.iter().flatten().find_map(|boot| boot.machine),
        vcpus: plan.vcpus,
        memory_mib: plan.memory_mib,
        kernel_args: plan.kernel_args,
    };
    let report = Report::new(setting, subjects.iter().zip(results).collect());
    if let Some(file) = &args.plot {
        fs::write(file, plot::svg(&report)).map_err(|e| format!("write {}: {e}", file.display()))?;
    }
    print(&if args.json { serde_json::to_string_pretty(&report)? + "\n" } else { report.text() })?;
    Ok(())
}

fn plan(args: &Args) -> Result<Plan, Failure> {
    let machine = match (args.machine, args.instructions) {
        (Machine::Kvm, true) => {
            return Err("--instructions are counted by QEMU: leave --machine kvm out, or the other".into());
        }
        (Machine::Qemu, _) | (_, true) => MachineChoice::Qemu,
        (Machine::Kvm, false) => MachineChoice::Kvm,
        (Machine::Auto, false) => MachineChoice::Auto,
    };
    if args.instructions && args.vcpus.get() != 1 {
        return Err("--instructions are those of one vCPU: leave --vcpus out".into());
    }
    let rootfs = match &args.rootfs_dir {
        None => None,
        Some(dir) if dir.is_dir() => Some(fs::canonicalize(dir)?),
        Some(dir) => return Err(format!("--rootfs-dir {} is no directory", dir.display()).into()),
    };
    Ok(Plan {
        machine,
        unit: if args.instructions { Unit::Instructions } else { Unit::Time },
        vcpus: args.vcpus.get(),
        memory_mib: args.memory_mib.get().into(),
        kernel_args: args.append.clone(),
        qemu: args.qemu.clone(),
        timeout: Duration::from_secs(args.timeout_secs.get().into()),
        command: args.guest_log_command.clone(),
        url: args.http_smoke_url.clone(),
        retry_log_every: args.retry_log_every.get(),
        rootfs,
    })
}

/// What is to be added to the initramfs.
fn more(args: &Args, plan: &Plan) -> Result<Option<Vec<u8>>, subject::Error> {
    let hosts = format!("127.0.0.1 localhost\n{}", plan.url.as_ref().map_or("", |url| url.hosts.as_str()));
    let init = rootfs::init(plan.command.as_deref());
    let mut files = Vec::new();
    if plan.rootfs.is_some() {
        files.push(("init", 0o755, init.as_str()));
        files.extend(plan.command.as_deref().map(|command| ("command", 0o644, command)));
    } else if plan.command.is_none() && plan.url.is_none() {
        return Ok(None);
    }
    subject::busybox(&args.busybox, &hosts, &files).map(Some)
}

/// All boots, alternating between the subjects; those of each together.
async fn all(args: &Args, plan: &Plan, workshop: &Workshop, subjects: &[Subject]) -> Result<Vec<Vec<Boot>>, Failure> {
    let mut results: Vec<Vec<Boot>> = subjects.iter().map(|_| Vec::new()).collect();
    let iterations = args.iterations.get();
    let first = u32::from(args.instructions);
    let mut progress = Progress::new();
    for number in first..=iterations {
        for (subject, boots) in subjects.iter().zip(&mut results) {
            let name = if number == 0 { "to warm up".into() } else { format!("{number} of {iterations}") };
            progress.show(&format!("{}: boot {name}", subject.name.display()));
            let made = boot::boot(workshop, subject, plan).await;
            progress.clear();
            let made = made.map_err(|source| BootFailure { number: name, subject: subject.name.clone(), source })?;
            if number == 0 {
                continue;
            }
            tell(args, subject, number, &made);
            boots.push(made);
        }
    }
    Ok(results)
}

/// What is printed after each boot.
fn tell(args: &Args, subject: &Subject, number: u32, boot: &Boot) {
    let name = subject.name.display();
    if let Some(count) = args.guest_logs {
        eprintln!("{name}: boot {number}: the end of the kernel's log");
        for line in boot.log.iter().skip(boot.log.len().saturating_sub(count)) {
            eprintln!("  {line}");
        }
    }
    if let Some(output) = &boot.output {
        eprintln!("{name}: boot {number}: the command's exit code is {}", output.status);
        for line in output.text.lines() {
            eprintln!("  {line}");
        }
    }
    if let Some(fetch) = boot.fetch {
        eprintln!("{name}: boot {number}: {} bytes were fetched at attempt {}", fetch.bytes, fetch.attempts);
    }
}

/// What is being done, on one line of a terminal.
struct Progress {
    shown: bool,
}

impl Progress {
    fn new() -> Self {
        Self { shown: io::stderr().is_terminal() }
    }

    fn show(&mut self, what: &str) {
        if self.shown {
            eprint!("\r\x1b[K{what}");
            drop(io::stderr().flush());
        }
    }

    fn clear(&mut self) {
        self.show("");
    }
}

/// Writes to standard output; a reader that has seen enough is no failure.
fn print(text: &str) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => other,
    }
}
