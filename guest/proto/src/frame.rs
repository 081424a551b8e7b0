//! Length-prefixed frames around protobuf messages, and the header of a stdio stream.
//!
//! A frame is a 32-bit big-endian length and that many bytes, at most [`MAX_FRAME`].

use std::io;

use protobuf::Message;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use vz_sys::{hex, random};

/// Largest frame that is sent or accepted, in bytes.
pub const MAX_FRAME: u32 = 64 * 1024;
/// Length of a stream token, in bytes of ASCII.
pub const TOKEN_LEN: usize = 32;

/// Why a frame could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The transport failed or ended within a frame.
    #[error("transfer frame")]
    Io(#[from] io::Error),
    /// The peer announced more than [`MAX_FRAME`], or the message to send is larger.
    #[error("frame of {0} bytes, at most {MAX_FRAME} are allowed")]
    TooLarge(u64),
    /// The bytes are not the expected message.
    #[error("decode frame")]
    Decode(#[from] protobuf::Error),
    /// A stream began with something that is not a token.
    #[error("stream token is not {TOKEN_LEN} ASCII letters or digits")]
    Token,
}

/// Writes `message` as one frame.
pub async fn write<M: Message>(to: &mut (impl AsyncWrite + Unpin), message: &M) -> Result<(), Error> {
    let body = message.write_to_bytes()?;
    let len =
        u32::try_from(body.len()).ok().filter(|len| *len <= MAX_FRAME).ok_or(Error::TooLarge(body.len() as u64))?;
    let mut frame = Vec::with_capacity(body.len().saturating_add(4));
    frame.extend_from_slice(&len.to_be_bytes());
    frame.extend_from_slice(&body);
    to.write_all(&frame).await?;
    to.flush().await?;
    Ok(())
}

/// Reads one frame; `None` where the peer closed the stream between two frames.
pub async fn read<M: Message>(from: &mut (impl AsyncRead + Unpin)) -> Result<Option<M>, Error> {
    let mut header = [0u8; 4];
    match from.read(&mut header).await? {
        0 => return Ok(None),
        n => {
            if let Some(rest) = header.get_mut(n..) {
                from.read_exact(rest).await?;
            }
        }
    }
    let len = u32::from_be_bytes(header);
    if len > MAX_FRAME {
        return Err(Error::TooLarge(len.into()));
    }
    let mut body = vec![0; len as usize];
    from.read_exact(&mut body).await?;
    Ok(Some(M::parse_from_bytes(&body)?))
}

/// A new stream token: nobody in the guest can guess it.
pub fn new_token() -> io::Result<String> {
    let mut bytes = [0; TOKEN_LEN / 2];
    random::fill(&mut bytes)?;
    Ok(hex::encode(&bytes))
}

/// Opens a stdio stream: writes its token.
pub async fn write_token(to: &mut (impl AsyncWrite + Unpin), token: &str) -> Result<(), Error> {
    if !is_token(token.as_bytes()) {
        return Err(Error::Token);
    }
    to.write_all(token.as_bytes()).await?;
    Ok(())
}

/// Reads the token that opens a stdio stream.
pub async fn read_token(from: &mut (impl AsyncRead + Unpin)) -> Result<String, Error> {
    let mut token = [0u8; TOKEN_LEN];
    from.read_exact(&mut token).await?;
    if !is_token(&token) {
        return Err(Error::Token);
    }
    String::from_utf8(token.to_vec()).map_err(|_| Error::Token)
}

fn is_token(bytes: &[u8]) -> bool {
    bytes.len() == TOKEN_LEN && bytes.iter().all(u8::is_ascii_alphanumeric)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Hello;

    #[tokio::test]
    async fn a_frame_comes_back_as_it_was_sent() {
        let hello = Hello { agent_version: "1.2.3".into(), uptime_ns: 42, ..Default::default() };
        let mut wire = Vec::new();
        write(&mut wire, &hello).await.unwrap();
        let mut from = wire.as_slice();
        assert_eq!(read::<Hello>(&mut from).await.unwrap(), Some(hello));
        assert_eq!(read::<Hello>(&mut from).await.unwrap(), None);
    }

    #[tokio::test]
    async fn a_forged_length_allocates_nothing() {
        let wire = u32::MAX.to_be_bytes();
        assert!(matches!(read::<Hello>(&mut wire.as_slice()).await, Err(Error::TooLarge(_))));
    }

    #[tokio::test]
    async fn a_truncated_frame_is_an_error() {
        let mut wire = Vec::new();
        write(&mut wire, &Hello { agent_version: "x".into(), ..Default::default() }).await.unwrap();
        wire.pop();
        assert!(matches!(read::<Hello>(&mut wire.as_slice()).await, Err(Error::Io(_))));
    }

    #[test]
    fn a_new_token_is_one_and_another_each_time() {
        let tokens = [new_token().unwrap(), new_token().unwrap()];
        assert!(tokens.iter().all(|token| is_token(token.as_bytes())), "{tokens:?}");
        assert_ne!(tokens[0], tokens[1]);
    }

    #[tokio::test]
    async fn tokens_are_checked_on_both_sides() {
        let token = "0123456789abcdef0123456789abcdef";
        let mut wire = Vec::new();
        write_token(&mut wire, token).await.unwrap();
        assert_eq!(read_token(&mut wire.as_slice()).await.unwrap(), token);
        assert!(matches!(write_token(&mut wire, "../../etc/passwd").await, Err(Error::Token)));
        assert!(matches!(read_token(&mut [b'/'; TOKEN_LEN].as_slice()).await, Err(Error::Token)));
    }
}
