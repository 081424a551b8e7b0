//! `vz ps CONTAINER`: a container's processes, as the host has them. Those that run in the VM are the guest's to show.

use std::process::{Command, Stdio};

use super::{args::Format, error::Error};

/// A list of these pids: numbers for programs; for people what ps(1) says with these options (`-ef` without any).
pub fn show(pids: &[i32], format: Format, options: &[String]) -> Result<String, Error> {
    if format == Format::Json {
        return Ok(format!("{}\n", serde_json::json!(pids)));
    }
    let usual = ["-ef".to_owned()];
    let options = if options.is_empty() { &usual } else { options };
    let done = Command::new("ps")
        .args(options)
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .map_err(Error::at("run", "ps"))?;
    if !done.status.success() {
        return Err(Error::Died { what: "ps", status: done.status.to_string() });
    }
    filter(&String::from_utf8_lossy(&done.stdout), pids)
}

/// The title of ps's output, and the lines of these pids.
fn filter(text: &str, pids: &[i32]) -> Result<String, Error> {
    let mut lines = text.lines();
    let title = lines.next().unwrap_or_default();
    let column = title
        .split_whitespace()
        .position(|name| name == "PID")
        .ok_or_else(|| Error::Option { option: "ps options".into(), why: "their output has no column PID" })?;
    let ours = |line: &&str| {
        let pid = line.split_whitespace().nth(column).and_then(|pid| pid.parse().ok());
        pid.is_some_and(|pid| pids.contains(&pid))
    };
    Ok(std::iter::once(title).chain(lines.filter(ours)).map(|line| format!("{line}\n")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_containers_lines_are_left() {
        let text = "UID   PID  PPID CMD\nroot    1     0 init\nroot   42     1 vz keep c1\nroot  421    42 other\n";
        assert_eq!(filter(text, &[42]).unwrap(), "UID   PID  PPID CMD\nroot   42     1 vz keep c1\n");
        assert!(filter("CMD\ninit\n", &[1]).is_err());
        let ours = show(&[i32::try_from(std::process::id()).unwrap()], Format::Table, &[]).unwrap();
        assert_eq!(ours.lines().count(), 2, "{ours}");
    }
}
