//! The two kinds of guest kernel.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// Which kernel a bundle has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KernelProfile {
    /// Broad: what developers' VMs need, such as nested virtualization, TUN/TAP, NFS and device mapper.
    #[default]
    Developer,
    /// Constrained: what containers need and nothing else.
    Container,
}

impl KernelProfile {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Developer, Self::Container];

    /// Its name: in `version.json`, on command lines, and of its directory.
    pub fn name(self) -> &'static str {
        match self {
            Self::Developer => "developer",
            Self::Container => "container",
        }
    }
}

impl fmt::Display for KernelProfile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Not the name of a profile.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no kernel profile: there are developer and container")]
pub struct UnknownProfile(String);

impl FromStr for KernelProfile {
    type Err = UnknownProfile;

    fn from_str(name: &str) -> Result<Self, UnknownProfile> {
        Self::ALL.into_iter().find(|profile| profile.name() == name).ok_or_else(|| UnknownProfile(name.to_owned()))
    }
}
