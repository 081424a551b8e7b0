//! Limits of a container, as callers of runc say them and libcontainer takes them.

use oci_spec::runtime::LinuxResources;

use super::error::{CallError, Result};

/// Parses what an update asks for.
pub fn parse(bytes: &[u8]) -> Result<LinuxResources> {
    let mut resources =
        serde_json::from_slice(bytes).map_err(|e| CallError::Invalid(format!("resources of an update: {e}")))?;
    as_runc_takes_them(&mut resources);
    Ok(resources)
}

/// Says the same in libcontainer's words, where these differ from what callers of runc say.
pub fn as_runc_takes_them(resources: &mut LinuxResources) {
    // No limit, whereas libcontainer would let no process be made.
    if resources.pids().as_ref().is_some_and(|p| p.limit() == 0) {
        resources.set_pids(None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_limit_of_processes_is_none_at_all() {
        assert_eq!(parse(br#"{"pids":{"limit":0}}"#).unwrap().pids(), &None);
        assert!(parse(br#"{"pids":{"limit":7}}"#).unwrap().pids().is_some());
        assert!(matches!(parse(b"{"), Err(CallError::Invalid(_))));
    }
}
