//! The host's side of a control connection's first two frames: the guest's [`Hello`], and the [`Welcome`] back.
//!
//! Both wait for the guest: the caller has a deadline for them.

use std::{io, time::SystemTime};

use tokio::io::{AsyncRead, AsyncWrite};
use vz_sys::random;

use crate::{Hello, Welcome, frame};

/// Bytes of entropy that the guest gets.
const SEED: usize = 64;

/// Why the agent's connection is not used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A frame could not be read or written.
    #[error("exchange hello with the guest agent")]
    Frame(#[from] frame::Error),
    /// It closed the connection.
    #[error("the guest agent closed its connection without a hello")]
    Closed,
    /// It is not the agent of the bundle.
    #[error(
        "the guest agent has version {found:?}, the guest bundle names {wanted:?}: build or install the bundle again"
    )]
    Version {
        /// The agent's version.
        found: String,
        /// The version that version.json names.
        wanted: String,
    },
    /// No entropy for the guest.
    #[error("read entropy for the guest")]
    Entropy(#[source] io::Error),
}

/// Reads the hello of an agent, which must have this version.
pub async fn hello(from: &mut (impl AsyncRead + Unpin), wanted: &str) -> Result<Hello, Error> {
    let hello: Hello = frame::read(from).await?.ok_or(Error::Closed)?;
    if hello.agent_version != wanted {
        return Err(Error::Version { found: hello.agent_version, wanted: wanted.to_owned() });
    }
    Ok(hello)
}

/// Answers it: the settings, with fresh entropy and the host's time added to them.
pub async fn welcome(to: &mut (impl AsyncWrite + Unpin), settings: Welcome) -> Result<(), Error> {
    let mut seed = vec![0; SEED];
    random::fill(&mut seed).map_err(Error::Entropy)?;
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let realtime_ns = u64::try_from(now.as_nanos()).unwrap_or_default();
    frame::write(to, &Welcome { seed, realtime_ns, ..settings }).await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn said(version: &str) -> Vec<u8> {
        let mut wire = Vec::new();
        frame::write(&mut wire, &Hello { agent_version: version.into(), ..Default::default() }).await.unwrap();
        wire
    }

    #[tokio::test]
    async fn an_agent_of_another_version_is_refused() {
        let wire = said("1.2.3").await;
        assert_eq!(hello(&mut wire.as_slice(), "1.2.3").await.unwrap().agent_version, "1.2.3");
        let error = hello(&mut wire.as_slice(), "1.2.4").await.unwrap_err();
        assert!(matches!(&error, Error::Version { found, wanted } if found == "1.2.3" && wanted == "1.2.4"), "{error}");
        assert!(matches!(hello(&mut [].as_slice(), "1.2.3").await, Err(Error::Closed)));
    }

    #[tokio::test]
    async fn a_welcome_has_settings_entropy_and_time() {
        let mut wire = Vec::new();
        welcome(&mut wire, Welcome { hostname: "h".into(), ..Default::default() }).await.unwrap();
        let read: Welcome = frame::read(&mut wire.as_slice()).await.unwrap().unwrap();
        assert_eq!((read.hostname.as_str(), read.seed.len()), ("h", SEED));
        assert!(read.realtime_ns > 0 && read.seed.iter().any(|byte| *byte != 0));
    }
}
