//! The integration tests; see the crate's documentation for how they are run.

use std::process::ExitCode;

mod boundary;
mod containers;
mod kubernetes;
mod network;
mod programs;
mod storage;

fn main() -> ExitCode {
    // In this order: what others rely on first.
    vz_suite::harness::main(&[
        programs::checker::TESTS,
        programs::check::TESTS,
        programs::linux::TESTS,
        programs::bench::TESTS,
        containers::run::TESTS,
        storage::files::TESTS,
        storage::volumes::TESTS,
        storage::locks::TESTS,
        storage::disks::TESTS,
        containers::options::TESTS,
        containers::stdio::TESTS,
        containers::exec::TESTS,
        containers::lifecycle::TESTS,
        containers::events::TESTS,
        containers::errors::TESTS,
        boundary::escape::TESTS,
        boundary::hostile::TESTS,
        boundary::endings::TESTS,
        boundary::host_side::TESTS,
        boundary::metal::TESTS,
        kubernetes::pods::TESTS,
        programs::cli::TESTS,
        containers::oci::TESTS,
        programs::machine::TESTS,
        containers::crash::TESTS,
        network::net::TESTS,
        network::net_faults::TESTS,
        network::net_same::TESTS,
    ])
}
