//! The control connection with a limit on what the guest may send at a time.
//!
//! ttrpc takes a message of 4 MiB into memory before anybody can look at it, and any number of messages for a stream of
//! events into a queue. An answer of the agent is a few KiB, and an event a few hundred bytes: a message that is larger
//! than [`MOST`](vz_proto::bounds::MOST) ends the connection with its first bytes.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::UnixStream,
};
use vz_proto::bounds::Bounds;

/// A connection whose incoming messages are limited.
#[derive(Debug)]
pub struct Answers {
    stream: UnixStream,
    bounds: Bounds,
}

impl Answers {
    /// Limits a connection whose next bytes are ttrpc's.
    pub fn new(stream: UnixStream) -> Self {
        Self { stream, bounds: Bounds::default() }
    }
}

impl AsyncRead for Answers {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let Self { stream, bounds } = self.get_mut();
        let before = buf.filled().len();
        ready!(Pin::new(stream).poll_read(cx, buf))?;
        let passed = bounds.pass(buf.filled().get(before..).unwrap_or_default());
        if passed.is_err() {
            buf.set_filled(before);
        }
        Poll::Ready(passed.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error)))
    }
}

impl AsyncWrite for Answers {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write(cx, buf)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use vz_proto::bounds::HEADER;

    use super::*;

    #[tokio::test]
    async fn a_connection_ends_with_the_message_that_is_too_large() {
        let (ours, mut guest) = UnixStream::pair().unwrap();
        let mut answers = Answers::new(ours);
        let message = [3_u32.to_be_bytes().as_slice(), &[1; HEADER - 4], &[1; 3]].concat();
        guest.write_all(&message).await.unwrap();
        let mut good = vec![0; message.len()];
        answers.read_exact(&mut good).await.unwrap();
        assert_eq!(good, message);
        guest.write_all(&[0x7f; 4]).await.unwrap();
        let error = answers.read(&mut [0; 100]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        assert!(error.to_string().contains("2139062143 bytes"), "{error}");
    }
}
