//! Whether the payload is there: `cfg(payload)`.

use std::{env, path::Path, process::ExitCode};

/// What `mk/bundle/payload` makes.
const FILES: [&str; 9] = [
    "kernel.zst",
    "initramfs.zst",
    "agent.zst",
    "youki.zst",
    "busybox.zst",
    "sbom.zst",
    "version.json",
    "NOTICE",
    "NOTICE.busybox",
];

fn main() -> ExitCode {
    println!("cargo::rustc-check-cfg=cfg(payload)");
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=payload");
    // Cargo runs build scripts in the package's directory.
    let missing: Vec<&str> = FILES.into_iter().filter(|name| !Path::new("payload").join(name).is_file()).collect();
    if missing.is_empty() {
        println!("cargo::rustc-cfg=payload");
        return ExitCode::SUCCESS;
    }
    // Cargo runs this again for a file that is not there, however old the payload is that appears.
    println!("cargo::rerun-if-changed=payload/.never");
    if env::var_os("CARGO_FEATURE_REQUIRED").is_some() {
        println!("cargo::error=no guest bundle to embed ({} not there): run `make payload` first", missing.join(", "));
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}
