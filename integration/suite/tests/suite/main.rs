//! The integration tests; see the crate's documentation for how they are run.

use std::process::ExitCode;

mod bench;
mod check;
mod checker;
mod cli;
mod crash;
mod disks;
mod endings;
mod errors;
mod escape;
mod events;
mod exec;
mod files;
mod host_side;
mod hostile;
mod lifecycle;
mod linux;
mod locks;
mod machine;
mod metal;
mod net;
mod net_faults;
mod net_same;
mod oci;
mod options;
mod run;
mod stdio;
mod volumes;

fn main() -> ExitCode {
    vz_suite::harness::main(&[
        checker::TESTS,
        check::TESTS,
        linux::TESTS,
        bench::TESTS,
        run::TESTS,
        files::TESTS,
        volumes::TESTS,
        locks::TESTS,
        disks::TESTS,
        options::TESTS,
        stdio::TESTS,
        exec::TESTS,
        lifecycle::TESTS,
        events::TESTS,
        errors::TESTS,
        escape::TESTS,
        hostile::TESTS,
        endings::TESTS,
        host_side::TESTS,
        metal::TESTS,
        cli::TESTS,
        oci::TESTS,
        machine::TESTS,
        crash::TESTS,
        net::TESTS,
        net_faults::TESTS,
        net_same::TESTS,
    ])
}
