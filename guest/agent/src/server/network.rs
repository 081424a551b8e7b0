//! The containers' network: cards of the VM, made to look like the links that the host has for them.

use std::{path::Path, sync::Mutex};

use vz_net::{configure::Guest, netns::Netns};
use vz_proto::NETNS_PATH;
use vz_sys::sync::lock;

use super::error::{CallError, Result};
use crate::text;

/// The network of all containers of the VM.
#[derive(Debug, Default)]
pub struct Network(Mutex<Option<Guest>>);

impl Network {
    /// Makes it what the host describes. Takes as long as the kernel does, which is milliseconds.
    pub fn update(&self, description: &[u8]) -> Result<()> {
        let network = serde_json::from_slice(description)
            .map_err(|e| CallError::Invalid(format!("description of the network: {e}")))?;
        let failed =
            |e: vz_net::configure::Error| CallError::Failed(format!("set up the network: {}", text::chain(&e)));
        let mut guest = lock(&self.0);
        let guest = match &mut *guest {
            Some(guest) => guest,
            none => {
                let netns =
                    Netns::open(Path::new(NETNS_PATH)).map_err(CallError::io("open the containers' network"))?;
                none.insert(Guest::open(netns).map_err(failed)?)
            }
        };
        guest.configure(&network).map_err(failed)
    }
}
