//! Boots a guest the way the shim does, without the shim: for work on the vmm process.
//!
//!     boot [--bundle DIR] [--vcpus N] [--memory MIB] [--append ARGS] [--machine kvm|qemu] [--qemu PATH]
//!          [--deadline MS] [--bind DIR] [--stdin FILE] [--run COMMAND]... [--parallel N] [--wait]
//!
//! The guest's init must dial port 1024 and run, for each connection to its port 1026, the command in the first line
//! with the connection as standard input and output. With `--parallel`, all commands run N times at once. Without
//! `--wait` the VM is killed after the last command.

use std::{
    env,
    error::Error,
    ffi::CString,
    fs,
    io::{self, Read, Write},
    net::Shutdown,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::{Path, PathBuf},
    process::ExitCode,
    time::Instant,
};

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};
use vz_machine::{
    control::{self, BootConfig, CONTROL_FD, Event, MachineChoice, Request},
    vmm,
};
use vz_sys::{channel::Channel, process::Command};

struct Options {
    config: BootConfig,
    bind: Option<PathBuf>,
    stdin: Option<PathBuf>,
    run: Vec<String>,
    parallel: usize,
    wait: bool,
}

fn options(dir: &Path) -> Result<Options, Box<dyn Error>> {
    let mut options = Options {
        config: BootConfig {
            sandbox: "test/boot".into(),
            machine: MachineChoice::Qemu,
            nics: Vec::new(),
            disks: Vec::new(),
            vcpus: 1,
            memory_mib: 256,
            guest_bundle: "out/container".into(),
            share: dir.join("share"),
            share_tag: vz_proto::SHARE_TAG.into(),
            state_dir: dir.join("state"),
            guest_ports: vec![vz_proto::CONTROL_PORT, vz_proto::LOG_PORT],
            boot_deadline_ms: 60_000,
            console_limit: 1 << 20,
            qemu: "qemu-system-x86_64".into(),
            kernel_args: String::new(),
            count_instructions: false,
            report_denied_calls: true,
            log_level: "info".into(),
        },
        bind: None,
        stdin: None,
        run: Vec::new(),
        parallel: 0,
        wait: false,
    };
    let mut args = env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().ok_or_else(|| format!("{arg} needs a value"));
        match arg.as_str() {
            "--bundle" => options.config.guest_bundle = value()?.into(),
            "--vcpus" => options.config.vcpus = value()?.parse()?,
            "--memory" => options.config.memory_mib = value()?.parse()?,
            "--append" => options.config.kernel_args = value()?,
            "--machine" => options.config.machine = serde_json::from_value(value()?.into())?,
            "--qemu" => options.config.qemu = value()?.into(),
            "--deadline" => options.config.boot_deadline_ms = value()?.parse()?,
            "--level" => options.config.log_level = value()?,
            "--bind" => options.bind = Some(value()?.into()),
            "--stdin" => options.stdin = Some(value()?.into()),
            "--run" => options.run.push(value()?),
            "--parallel" => options.parallel = value()?.parse()?,
            "--wait" => options.wait = true,
            other => return Err(format!("unknown option {other}").into()),
        }
    }
    options.config.guest_bundle = fs::canonicalize(&options.config.guest_bundle).unwrap_or(options.config.guest_bundle);
    Ok(options)
}

fn main() -> ExitCode {
    if env::args().nth(1).as_deref() == Some("vmm") {
        return vmm::main();
    }
    match drive() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("boot: {e}");
            ExitCode::FAILURE
        }
    }
}

fn drive() -> Result<(), Box<dyn Error>> {
    let dir = env::temp_dir().join(format!("vz-boot-{}", std::process::id()));
    let options = options(&dir)?;
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)?;
    fs::create_dir_all(&options.config.share)?;
    fs::create_dir_all(&options.config.state_dir)?;
    let share = &options.config.share;
    mount(Some(share), share, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
    mount(None::<&str>, share, None::<&str>, MsFlags::MS_SHARED, None::<&str>)?;
    fs::write(share.join("file"), "from the host\n")?;

    let start = Instant::now();
    let (ours, theirs) = Channel::pair()?;
    let process = Command {
        program: c"/proc/self/exe".into(),
        args: vec![c"boot".into(), c"vmm".into()],
        env: vec![CString::new(format!("PATH={}", env::var("PATH")?))?],
        fds: vec![(theirs.as_fd(), CONTROL_FD)],
        namespaces: CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWPID | CloneFlags::CLONE_NEWIPC,
        outlives_parent: false,
    }
    .spawn()?;
    drop(theirs);
    control::send(&ours, &Request::Boot(Box::new(options.config.clone())), &[])?;
    let result = talk(&ours, &options, start);
    drop(ours);
    eprintln!("{:8.3} vmm ended: {:?}", start.elapsed().as_secs_f64(), process.wait()?);
    let console = fs::read_to_string(options.config.state_dir.join("console.log"));
    eprintln!("console.log:\n{}", console.unwrap_or_default());
    nix::mount::umount2(share, nix::mount::MntFlags::MNT_DETACH)?;
    fs::remove_dir_all(&dir)?;
    result
}

fn talk(channel: &Channel, options: &Options, start: Instant) -> Result<(), Box<dyn Error>> {
    let commands: Vec<String> = match options.parallel {
        0 => options.run.clone(),
        n => options.run.iter().cycle().take(n * options.run.len()).cloned().collect(),
    };
    let mut next = 0;
    let mut threads = Vec::new();
    while let Some(message) = channel.recv()? {
        let event: Event = control::decode(&message.bytes)?;
        let mut fd = message.fds.into_iter().next();
        eprintln!("{:9.6} {event:?} {fd:?}", start.elapsed().as_secs_f64());
        match event {
            Event::Launched { .. } => continue,
            Event::Accepted { .. } => {
                let mut hello = [0; 100];
                let mut stream = stream(fd.take())?;
                let count = stream.read(&mut hello)?;
                eprint!("{}", String::from_utf8_lossy(&hello[..count]));
                if let Some(bind) = &options.bind {
                    let target = options.config.share.join("bound");
                    fs::create_dir(&target)?;
                    mount(Some(bind), &target, None::<&str>, MsFlags::MS_BIND | MsFlags::MS_REC, None::<&str>)?;
                }
                if options.parallel > 0 {
                    for id in 0..commands.len() {
                        dial(channel, id)?;
                    }
                    next = commands.len();
                    if next > 0 {
                        continue;
                    }
                }
            }
            Event::Dialed { error: Some(_), .. } => {}
            Event::Dialed { id, .. } => {
                let command = commands[usize::try_from(id)?].clone();
                let (stream, stdin) = (stream(fd.take())?, options.stdin.clone());
                let now = Instant::now();
                let thread = std::thread::spawn(move || match run(stream, &command, stdin.as_deref()) {
                    Ok(count) => {
                        let seconds = now.elapsed().as_secs_f64();
                        let rate = count as f64 / 1e6 / seconds;
                        eprintln!("$ {command}: {count} bytes in {seconds:.3} s, {rate:.1} MB/s");
                    }
                    Err(e) => eprintln!("$ {command}: {e}"),
                });
                threads.push(thread);
                if options.parallel > 0 && threads.len() < commands.len() {
                    continue;
                }
                for thread in threads.drain(..) {
                    thread.join().map_err(|_| "reader panicked")?;
                }
            }
            Event::Ended(ended) => {
                eprintln!("{}\n{}", ended.message, ended.console);
                return Ok(());
            }
        }
        if next < commands.len() {
            dial(channel, next)?;
            next += 1;
        } else if !options.wait {
            // The vmm ends the VM with its channel.
            return Ok(());
        }
    }
    Err("vmm closed its channel without a word".into())
}

fn dial(channel: &Channel, id: usize) -> Result<(), Box<dyn Error>> {
    let dial = Request::Dial { id: u64::try_from(id)?, port: vz_proto::STREAM_PORT };
    Ok(control::send(channel, &dial, &[])?)
}

fn stream(fd: Option<OwnedFd>) -> Result<UnixStream, Box<dyn Error>> {
    Ok(fd.ok_or("event without descriptor")?.into())
}

fn run(mut stream: UnixStream, command: &str, stdin: Option<&Path>) -> io::Result<usize> {
    writeln!(stream, "{command}")?;
    let mut writer = stream.try_clone()?;
    let input = stdin.map(fs::File::open).transpose()?;
    let feed = std::thread::spawn(move || -> io::Result<()> {
        if let Some(mut input) = input {
            io::copy(&mut input, &mut writer)?;
        }
        writer.shutdown(Shutdown::Write)
    });
    let mut count = 0;
    let mut bytes = vec![0; 1 << 16];
    loop {
        match stream.read(&mut bytes)? {
            0 => break,
            n => {
                io::stdout().write_all(&bytes[..n])?;
                count += n;
            }
        }
    }
    if let Err(e) = feed.join().map_err(|_| io::Error::other("writer panicked"))? {
        eprintln!("input: {e}");
    }
    Ok(count)
}
