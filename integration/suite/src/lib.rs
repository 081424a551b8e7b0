//! The integration suite's tools: a private containerd, programs run with deadlines, and a checker for what they leave.
//!
//! The tests are in `tests/suite`; `cargo test -p vz-suite` runs them, as root. They drive built programs only: ctr and
//! nerdctl against a real containerd, which starts the shim. What they look at:
//!
//! | variable | meaning | default |
//! | --- | --- | --- |
//! | `VZ_TEST_RUNTIME` | the runtime of all containers; `io.containerd.runc.v2` tells a wrong test from a wrong shim | `io.containerd.vz.v2` |
//! | `VZ_TEST_MACHINE` | `machine` of the shim's configuration | the shim's own default |
//! | `VZ_PATIENCE` | how many times longer than usual everything may take: for an emulated host; the devbox has it too | `1` |
//! | `VZ_TEST_SOAK` | `1`: more repetitions where races are looked for | off |
//! | `VZ_TEST_KEEP` | `1`: leave the devbox up | off, if the suite started it |
//! | `VZ_TEST_DEVBOX` | the devbox's directory; the suite's own files are next to it | `/var/tmp/vzt` |
//! | `VZ_BIN_DIR` | directory of `containerd-shim-vz-v2` | `target/release` |
//! | `VZ_LINUX_DIR` | the guest bundle | `out/container` |

pub mod command;
pub mod container;
pub mod events;
pub mod harness;
pub mod host;
pub mod inject;
pub mod lab;
pub mod leaks;
pub mod outside;
pub mod poll;
pub mod pty;
pub mod table;
pub mod watch;

pub use harness::{Skip, Test, Verdict};
pub use lab::Lab;

/// Lists a module's tests: `tests![first, second]` makes the constant `TESTS`.
#[macro_export]
macro_rules! tests {
    ($($test:ident),* $(,)?) => {
        /// The tests of this module.
        pub const TESTS: &[$crate::Test] = &[$($crate::Test {
            module: module_path!(),
            name: stringify!($test),
            run: $test,
        }),*];
    };
}
