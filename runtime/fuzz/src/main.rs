//! The fuzzer. `VZ_FUZZ_TARGET` names the target; the arguments are libFuzzer's.

#![no_main]
// libFuzzer finds its function by name, which the macro exports.
#![allow(unsafe_code)]

use std::sync::LazyLock;

use nix::sys::signal::{SigSet, Signal};

static TARGET: LazyLock<vz_fuzz::Target> = LazyLock::new(|| {
    let name = std::env::var("VZ_FUZZ_TARGET").expect("VZ_FUZZ_TARGET names the target");
    vz_fuzz::target(&name).expect("VZ_FUZZ_TARGET is one of the targets")
});

static SIGPIPE: LazyLock<SigSet> = LazyLock::new(|| SigSet::from(Signal::SIGPIPE));

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    // A program in Rust ignores it, which this is not: main is libFuzzer's.
    SIGPIPE.thread_block().expect("signals can be blocked");
    TARGET(bytes).expect("the target runs here");
});
