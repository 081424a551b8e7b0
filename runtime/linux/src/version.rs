//! `version.json`: what a bundle says of itself.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// The schema of `version.json` that this crate reads.
pub const SCHEMA: u32 = 1;

/// The JSON schema of `version.json`.
pub const VERSION_SCHEMA: &str = include_str!("../schema/version.schema.json");

/// A bundle's `version.json`. Unknown fields are allowed: newer bundles may say more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VersionInfo {
    /// Which form this file has; see [`SCHEMA`].
    pub schema: u32,
    /// Version of the bundle as a whole.
    pub bundle_version: String,
    /// Commit that it was built from; none outside of a repository.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub git_commit: Option<String>,
    /// Version of the guest agent in the initramfs; the agent says the same when it connects.
    pub agent_version: String,
    /// Version of the container runtime in the guest.
    pub youki_version: String,
    /// Version of the guest kernel.
    pub kernel_version: String,
    /// SHA-256 of the resolved kernel configuration.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel_config_sha256: Option<String>,
    /// Whose processor it is for, as `uname -m` names it; bundles once said nothing of it, and were for x86_64.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub architecture: Option<String>,
    /// `container` or `developer`.
    pub profile: String,
    /// How far the kernel is constrained.
    pub security_profile: String,
    /// What the kernel can do, derived from its configuration.
    #[serde(default)]
    pub capabilities: Vec<String>,
    /// Every other file of the bundle, by name.
    pub artifacts: BTreeMap<String, Artifact>,
}

/// One file of a bundle.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Artifact {
    /// SHA-256 of the content, lowercase hexadecimal.
    pub sha256: String,
    /// Length in bytes.
    #[serde(default)]
    pub size: Option<u64>,
}
