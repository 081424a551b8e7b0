//! Running to the end: kernels, exit codes, ends by signals.

use vz_suite::{
    Lab, Verdict,
    command::read,
    container::Task,
    host,
    lab::{BUSYBOX, DEBIAN},
    tests,
};

tests![
    the_containers_kernel_is_the_guests,
    exit_codes_reach_the_client,
    death_by_a_signal_is_128_and_its_number,
    a_fault_of_init_is_its_signal,
];

fn the_containers_kernel_is_the_guests(lab: &Lab) -> Verdict {
    let seen = lab.ctr_run(&["--rm", BUSYBOX, &lab.id("uname"), "uname", "-r"]).run().ok();
    if lab.is_vz() {
        let version: serde_json::Value =
            serde_json::from_slice(&read(lab.bundle().join("version.json"))).expect("version.json is JSON");
        assert_eq!(seen, version["kernel_version"].as_str().unwrap_or_default());
        assert_ne!(seen, host::kernel());
    } else {
        assert_eq!(seen, host::kernel());
    }
    Ok(())
}

fn exit_codes_reach_the_client(lab: &Lab) -> Verdict {
    lab.nerdctl_run(&["--rm", BUSYBOX, "sh", "-c", "exit 7"]).run().exits(7);
    lab.ctr_run(&["--rm", BUSYBOX, &lab.id("exit"), "sh", "-c", "exit 255"]).run().exits(255);
    lab.nerdctl_run(&["--rm", BUSYBOX, "true"]).run().exits(0);
    Ok(())
}

fn death_by_a_signal_is_128_and_its_number(lab: &Lab) -> Verdict {
    let task = Task::start(lab, "signal", &[], BUSYBOX, &["sleep", "1000"]);
    for signal in [1, 2, 6, 9, 10, 13, 15, 31] {
        let code = task.exec(&["sh", "-c", &format!("kill -{signal} $$; sleep 10")]).run().code();
        assert_eq!(code, 128 + signal, "signal {signal}");
    }
    // The kernel lets nothing but SIGKILL end a pid namespace's init that has no handler.
    task.kill("SIGKILL");
    task.wait().exits(137);
    Ok(())
}

fn a_fault_of_init_is_its_signal(lab: &Lab) -> Verdict {
    let script = "import ctypes; ctypes.string_at(1)";
    lab.nerdctl_run(&["--rm", DEBIAN, "python3", "-c", script]).run().exits(139);
    Ok(())
}
