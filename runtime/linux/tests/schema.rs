//! What the build writes as `version.json` is what the published schema says, and what this crate reads.

use std::{
    fs,
    io::Write,
    path::Path,
    process::{Command, Stdio},
};

use serde_json::Value;
use vz_linux::{VERSION_SCHEMA, VersionInfo, YOUKI_VERSION};

fn root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
}

/// Which of these documents the schema accepts, by the words of Python's jsonschema; none where it is not installed.
/// (The Rust implementations bring sixty crates along.)
fn accepts(documents: &[Value]) -> Option<Vec<bool>> {
    const SCRIPT: &str = "
import json, sys
try:
    import jsonschema
except ImportError:
    sys.exit(3)
schema, documents = json.load(sys.stdin)
kind = jsonschema.validators.validator_for(schema, default=None)
kind.check_schema(schema)
validator = kind(schema)
json.dump([validator.is_valid(document) for document in documents], sys.stdout)
";
    let schema: Value = serde_json::from_str(VERSION_SCHEMA).expect("the schema is JSON");
    let mut python = Command::new("python3")
        .args(["-c", SCRIPT])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("run python3");
    let input = serde_json::to_vec(&(schema, documents)).unwrap();
    python.stdin.take().unwrap().write_all(&input).unwrap();
    let output = python.wait_with_output().unwrap();
    if output.status.code() == Some(3) {
        vz_tally::skip!("python3-jsonschema is not installed: run `make setup`");
        return None;
    }
    assert!(output.status.success());
    Some(serde_json::from_slice(&output.stdout).unwrap())
}

/// The version.json that `mk/bundle/assemble` writes for small files.
fn assembled() -> Value {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        let path = dir.path().join(name);
        fs::write(&path, text).unwrap();
        path
    };
    let output = dir.path().join("out/container");
    let patches = dir.path().join("patches");
    fs::create_dir(&patches).unwrap();
    fs::write(patches.join("0001-more.patch"), "more: it can do more\n\nCapability: more\n").unwrap();
    let config = "CONFIG_VIRTIO_FS=y\n# CONFIG_TUN is not set\nCONFIG_SMP=y\n";
    let done = Command::new(root().join("mk/bundle/assemble"))
        .arg("--output")
        .arg(&output)
        .arg("--vmlinux")
        .arg(file("kernel", "kernel"))
        .arg("--initramfs")
        .arg(file("initramfs", "initramfs"))
        .arg("--youki")
        .arg(file("program", "youki"))
        .arg("--kernel-config")
        .arg(file("config", config))
        .arg("--capabilities")
        .arg(root().join("kernel/capabilities"))
        .arg("--patches")
        .arg(patches)
        .args(["--kernel-version", "6.12.1", "--bundle-version", "1.2.3", "--agent-version", "1.2.3"])
        .args(["--youki-version", YOUKI_VERSION, "--profile", "container", "--security-profile", "constrained"])
        .args(["--git-commit", "0123456789abcdef0123456789abcdef01234567-dirty"])
        .output()
        .expect("run mk/bundle/assemble");
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    serde_json::from_slice(&fs::read(output.join("version.json")).unwrap()).unwrap()
}

#[test]
fn what_is_assembled_is_what_the_schema_says() {
    let version = assembled();
    if let Some(accepted) = accepts(std::slice::from_ref(&version)) {
        assert_eq!(accepted, [true], "{version:#}");
    }
    let read: VersionInfo = serde_json::from_value(version.clone()).unwrap();
    assert_eq!(read.capabilities, ["more", "smp", "virtiofs"]);
    assert_eq!(read.artifacts["youki"].size, Some(5));
    // Nothing is written that is not published.
    let published: Value = serde_json::from_str(VERSION_SCHEMA).unwrap();
    for member in version.as_object().unwrap().keys() {
        assert!(!published["properties"][member].is_null(), "{member} is not in the schema");
    }
}

#[test]
fn what_is_wrong_is_found_by_the_schema() {
    let good = assembled();
    let changes: [fn(&mut Value); 8] = [
        |v| v["schema"] = 2.into(),
        |v| v["profile"] = "broad".into(),
        |v| v["capabilities"] = vec!["virtiofs", "virtiofs"].into(),
        |v| v["artifacts"]["vmlinux"]["sha256"] = "ABC".into(),
        |v| drop(v["artifacts"].as_object_mut().unwrap().remove("youki")),
        |v| v["artifacts"]["../x"] = v["artifacts"]["youki"].clone(),
        |v| drop(v.as_object_mut().unwrap().remove("agent_version")),
        |v| v["git_commit"] = "".into(),
    ];
    let mut documents: Vec<Value> = changes
        .into_iter()
        .map(|change| {
            let mut bad = good.clone();
            change(&mut bad);
            bad
        })
        .collect();
    let mut newer = good;
    newer["new_member"] = true.into();
    documents.push(newer);
    let Some(accepted) = accepts(&documents) else { return };
    let (last, others) = accepted.split_last().unwrap();
    assert!(last, "a member that is not known is refused");
    for (document, accepted) in documents.iter().zip(others) {
        assert!(!accepted, "what is wrong is not found: {document:#}");
    }
}

#[test]
fn youkis_version_is_that_of_the_build() {
    let text = |path: &str| fs::read_to_string(root().join(path)).unwrap();
    assert!(text("Cargo.toml").contains(&format!("libcontainer = {{ version = \"={YOUKI_VERSION}\"")));
    assert!(text("mk/bundle.mk").contains(&format!("YOUKI_VERSION ?= {YOUKI_VERSION}\n")));
}
