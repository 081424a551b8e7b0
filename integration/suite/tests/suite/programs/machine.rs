//! The virtual machine itself: its size, its clock, and its end when the guest brings that about.

use std::time::Duration;

use vz_suite::{
    Lab, Verdict,
    container::{Container, Task},
    events::Recorder,
    host::{Role, await_process, find},
    lab::BUSYBOX,
    poll::until,
    tests,
};

tests![
    a_vm_has_the_vcpus_that_were_asked_for,
    a_vm_has_the_memory_that_was_asked_for,
    the_clock_is_the_one_of_the_machine,
    memory_that_the_guest_frees_goes_back_to_the_host,
    a_guest_that_powers_off_ends_its_containers,
    a_guest_whose_kernel_panics_says_why,
    a_guest_that_loops_can_be_removed,
];

fn annotated(key: &str, value: u64) -> [String; 2] {
    ["--annotation".into(), format!("io.containerd.vz/{key}={value}")]
}

fn a_vm_has_the_vcpus_that_were_asked_for(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    // More than some hosts have: without a bound of the configuration's, the host's is it.
    let _config = lab.configure("[vm]\nmax_vcpus = 4\n");
    for count in [1, 2, 4] {
        let script = "grep -c ^processor /proc/cpuinfo; nproc; cat /sys/devices/system/cpu/online";
        let said =
            lab.ctr_run(&["--rm"]).args(annotated("vcpus", count)).args([BUSYBOX, &lab.id("cpus"), "sh", "-c", script]);
        let online = if count == 1 { "0".to_owned() } else { format!("0-{}", count - 1) };
        assert_eq!(said.run().ok(), format!("{count}\n{count}\n{online}"));
    }
    Ok(())
}

fn a_vm_has_the_memory_that_was_asked_for(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    // The second has memory above the hole that devices leave below 4 GiB.
    for mib in [128, 6144] {
        let host = std::fs::read_to_string("/proc/meminfo").expect("read /proc/meminfo");
        if total_kib(&host) / 1024 < mib {
            return Err(vz_suite::Skip(format!("host has less than {mib} MiB, which no VM of it gets more than")));
        }
        let run = lab.ctr_run(&["--rm"]).args(annotated("memory-mib", mib));
        let said = run.args([BUSYBOX, &lab.id("memory"), "cat", "/proc/meminfo"]).run().ok();
        let found = total_kib(&said) / 1024;
        // The kernel keeps some for itself, before it counts.
        assert!((mib * 80 / 100..=mib).contains(&found), "{found} MiB of {mib}");
    }
    Ok(())
}

fn total_kib(meminfo: &str) -> u64 {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:")).expect("MemTotal");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

fn the_clock_is_the_one_of_the_machine(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    let wanted = match lab.chosen_machine() {
        "kvm" => "kvm-clock",
        // Its name until the kernel trusts it, a second later, is tsc-early.
        _ => "tsc",
    };
    let source = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
    let said = lab.ctr_run(&["--rm"]).args([BUSYBOX, &lab.id("clock"), "cat", source]).run().ok();
    assert!(said.starts_with(wanted), "{said}");
    Ok(())
}

/// What a sandbox costs the host, in MiB: its own memory, and its share of what it shares.
fn pss_mib(task: &str, role: Role) -> u64 {
    let process = await_process(task, role);
    let rollup = std::fs::read_to_string(format!("/proc/{}/smaps_rollup", process.pid)).expect("read smaps_rollup");
    let line = rollup.lines().find_map(|line| line.strip_prefix("Pss:")).expect("Pss");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") / 1024
}

fn memory_that_the_guest_frees_goes_back_to_the_host(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    let [option, annotation] = annotated("memory-mib", 2048);
    let tmpfs = "type=tmpfs,src=tmpfs,dst=/big,options=size=1200m";
    let task = Task::start(lab, "freed", &[&option, &annotation, "--mount", tmpfs], BUSYBOX, &["sleep", "1000"]);
    // Guest memory is the vmm's own, or QEMU's.
    let role = if find(&task.id, Role::Qemu).is_some() { Role::Qemu } else { Role::Vmm };
    let before = pss_mib(&task.id, role);
    let fill = task.exec(&["dd", "if=/dev/zero", "of=/big/file", "bs=1M", "count=1024"]);
    fill.deadline(300).run().ok();
    let full = pss_mib(&task.id, role);
    assert!(full >= before + 1000, "{before} MiB before, {full} MiB with a file of 1 GiB");
    task.exec(&["rm", "/big/file"]).run().ok();
    let begun = std::time::Instant::now();
    until("the memory to come back", Duration::from_secs(10), || {
        (pss_mib(&task.id, role) <= before + 100).then_some(())
    });
    println!(
        "  {before} MiB before, {} MiB {} ms after it was freed",
        pss_mib(&task.id, role),
        begun.elapsed().as_millis()
    );
    Ok(())
}

/// Waits for a task's end that its VM brought about, and returns what the log says about it since `mark`.
fn brought_down(lab: &Lab, events: &Recorder, id: &str, mark: u64) -> String {
    let exit = events.expect_where(id, "/tasks/exit", |event| event.text("id") == id);
    assert_eq!(exit.number("exit_status"), 137);
    lab.log_since(mark)
}

fn a_guest_that_powers_off_ends_its_containers(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    let (mark, events) = (lab.log_position(), Recorder::start(lab));
    // Software emulation has no power switch: there, a guest ends by a reset.
    let off = if lab.machine() == "kvm" { "poweroff" } else { "reboot" };
    let script = format!("sync; {off} -f; sleep 1000");
    // Among the VM's own processes, where the call is not about a namespace only.
    let container =
        Container::start(lab, "off", &["--pid", "host", "--cap-add", "SYS_BOOT", BUSYBOX, "sh", "-c", &script]);
    let log = brought_down(lab, &events, &container.id, mark);
    assert!(log.contains("guest shut down"), "{log}");
    Ok(())
}

fn a_guest_whose_kernel_panics_says_why(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    let (mark, events) = (lab.log_position(), Recorder::start(lab));
    let [option, annotation] = annotated("memory-mib", 128);
    let script = "mount -t proc proc /mnt && echo 2 >/mnt/sys/vm/panic_on_oom && tail /dev/zero; sleep 1000";
    let flags = ["--cap-add", "SYS_ADMIN", &option, &annotation, BUSYBOX, "sh", "-c", script];
    let container = Container::start(lab, "panic", &flags);
    let log = brought_down(lab, &events, &container.id, mark);
    assert!(log.contains("guest kernel panicked: Kernel panic - not syncing: Out of memory"), "{log}");
    Ok(())
}

fn a_guest_that_loops_can_be_removed(lab: &Lab) -> Verdict {
    let container = Container::start(lab, "loop", &[BUSYBOX, "sh", "-c", "while :; do :; done"]);
    until("an exec beside the loop", Duration::from_secs(60), || {
        (container.exec(&["true"]).run().code() == 0).then_some(())
    });
    container.remove();
    Ok(())
}
