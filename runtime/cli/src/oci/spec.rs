//! As much of a bundle's config.json as matters here; the daemon reads all of it.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

use serde::Deserialize;
use serde_json::{Value, json};

use super::{args, error::Error};

/// Sets of capabilities that `--cap` adds to, as runc does.
const SETS: [&str; 4] = ["bounding", "effective", "permitted", "ambient"];

/// A bundle.
#[derive(Debug)]
pub struct Bundle {
    /// Its directory.
    pub dir: PathBuf,
    /// What its config.json says.
    pub config: Config,
}

/// A config.json.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Config {
    /// The specification's version.
    pub oci_version: String,
    /// The root file system.
    pub root: Option<Root>,
    /// The first process.
    #[serde(default)]
    pub process: Value,
    /// Annotations.
    #[serde(default)]
    pub annotations: Option<BTreeMap<String, String>>,
    /// Mounts.
    #[serde(default)]
    pub mounts: Option<Vec<Mount>>,
}

/// A mount.
#[derive(Debug, Deserialize)]
pub struct Mount {
    /// Where the container sees it.
    pub destination: PathBuf,
    /// What is mounted.
    #[serde(default)]
    pub source: Option<PathBuf>,
    /// The type of file system.
    #[serde(default, rename = "type")]
    pub kind: Option<String>,
    /// Options.
    #[serde(default)]
    pub options: Option<Vec<String>>,
}

impl Mount {
    /// Whether it has an option.
    pub fn has(&self, name: &str) -> bool {
        self.options.iter().flatten().any(|option| option == name)
    }
}

/// A root file system.
#[derive(Debug, Deserialize)]
pub struct Root {
    /// Relative to the bundle, or not.
    pub path: PathBuf,
}

impl Bundle {
    /// Reads a bundle.
    pub fn read(dir: &Path) -> Result<Self, Error> {
        let dir = fs::canonicalize(dir).map_err(Error::at("find bundle", dir))?;
        let path = dir.join("config.json");
        let text = fs::read(&path).map_err(Error::at("read", &path))?;
        let config: Config =
            serde_json::from_slice(&text).map_err(|source| Error::Json { path: path.clone(), source })?;
        if config.root.is_none() {
            return Err(Error::at("read", path)(io::Error::other("it has no root")));
        }
        Ok(Self { dir, config })
    }

    /// Its root file system.
    pub fn rootfs(&self) -> PathBuf {
        self.config.root.as_ref().map(|root| self.dir.join(&root.path)).unwrap_or_default()
    }

    /// Whether its process has a terminal.
    pub fn terminal(&self) -> bool {
        self.config.process["terminal"] == true
    }
}

/// The process of an `exec`: that of a file, or the container's own with another command and what the options say.
pub fn exec_process(options: &args::Exec, bundle: &Path) -> Result<Value, Error> {
    let option = |option: &str, why| Error::Option { option: option.to_owned(), why };
    let mut process: Value = match &options.process {
        Some(path) => {
            let text = fs::read(path).map_err(Error::at("read", path))?;
            serde_json::from_slice(&text).map_err(|source| Error::Json { path: path.clone(), source })?
        }
        None if options.command.is_empty() => {
            return Err(option("COMMAND", "name one, or a file with --process"));
        }
        None => {
            let mut own = Bundle::read(bundle)?.config.process;
            own["args"] = json!(options.command);
            own["terminal"] = json!(false);
            own
        }
    };
    if !process.is_object() {
        return Err(option("--process", "it is not a process of a config.json"));
    }
    if options.tty {
        process["terminal"] = json!(true);
    }
    if let Some(cwd) = &options.cwd {
        process["cwd"] = json!(cwd);
    }
    if !options.env.is_empty() {
        let mut env = process["env"].as_array().cloned().unwrap_or_default();
        env.extend(options.env.iter().map(|variable| json!(variable)));
        process["env"] = env.into();
    }
    if let Some(user) = &options.user {
        let wrong = || option("--user", "UID or UID:GID, in numbers");
        let mut parts = user.splitn(2, ':').map(|part| part.parse::<u32>().map_err(|_| wrong()));
        let uid = parts.next().ok_or_else(wrong)??;
        process["user"]["uid"] = json!(uid);
        if let Some(gid) = parts.next() {
            process["user"]["gid"] = json!(gid?);
        }
    }
    if !options.additional_gids.is_empty() {
        let mut gids = process["user"]["additionalGids"].as_array().cloned().unwrap_or_default();
        gids.extend(options.additional_gids.iter().map(|gid| json!(gid)));
        process["user"]["additionalGids"] = gids.into();
    }
    if options.no_new_privs {
        process["noNewPrivileges"] = json!(true);
    }
    for cap in &options.cap {
        for set in SETS {
            let mut caps = process["capabilities"][set].as_array().cloned().unwrap_or_default();
            if !caps.iter().any(|there| there == cap) {
                caps.push(json!(cap));
            }
            process["capabilities"][set] = caps.into();
        }
    }
    Ok(process)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        exec: args::Exec,
    }

    fn exec(line: &[&str]) -> args::Exec {
        Line::parse_from(["exec"].iter().chain(line)).exec
    }

    fn bundle(config: &Value) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        dir
    }

    #[test]
    fn a_bundle_says_where_its_root_is() {
        let dir =
            bundle(&json!({ "ociVersion": "1.0.2", "root": { "path": "rootfs" }, "process": { "terminal": true } }));
        let read = Bundle::read(dir.path()).unwrap();
        assert_eq!((read.rootfs(), read.terminal()), (read.dir.join("rootfs"), true));
        let dir = bundle(&json!({ "ociVersion": "1.0.2", "root": { "path": "/elsewhere" }, "annotations": null }));
        let read = Bundle::read(dir.path()).unwrap();
        assert_eq!((read.rootfs(), read.terminal()), ("/elsewhere".into(), false));
    }

    #[test]
    fn a_broken_bundle_is_named() {
        for config in [json!({ "ociVersion": "1" }), json!([]), json!({ "root": { "path": "r" } })] {
            let error = Bundle::read(bundle(&config).path()).unwrap_err().to_string();
            assert!(error.contains("config.json"), "{error}");
        }
    }

    #[test]
    fn an_exec_is_the_containers_process_with_what_the_options_say() {
        let dir = bundle(&json!({
            "ociVersion": "1.0.2", "root": { "path": "r" },
            "process": { "terminal": true, "args": ["sh"], "cwd": "/", "env": ["A=1"], "user": { "uid": 0, "gid": 5 } },
        }));
        let line = ["-e", "B=2", "--cwd", "/x", "-u", "7", "-g", "9", "--cap", "CAP_KILL", "c1", "ls", "-l"];
        let process = exec_process(&exec(&line), dir.path()).unwrap();
        assert_eq!(
            (&process["args"], &process["cwd"], &process["env"], &process["terminal"]),
            (&json!(["ls", "-l"]), &json!("/x"), &json!(["A=1", "B=2"]), &json!(false))
        );
        assert_eq!(process["user"], json!({ "uid": 7, "gid": 5, "additionalGids": [9] }));
        assert_eq!(process["capabilities"]["ambient"], json!(["CAP_KILL"]));
        assert!(exec_process(&exec(&["-u", "root", "c1", "ls"]), dir.path()).is_err());
        assert!(exec_process(&exec(&["c1"]), dir.path()).is_err());
    }
}
