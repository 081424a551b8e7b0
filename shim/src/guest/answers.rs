//! The control connection with a limit on what the guest may send at a time.
//!
//! ttrpc takes a message of 4 MiB into memory before anybody can look at it, and any number of messages for a stream of
//! events into a queue. An answer of the agent is a few KiB, and an event a few hundred bytes: a message that is larger
//! than [`MOST`] ends the connection with its first bytes.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::UnixStream,
};

/// Largest message, in bytes.
const MOST: u32 = 128 << 10;
/// Length of ttrpc's message header, which begins with that of the message, four bytes in network byte order.
const HEADER: usize = 10;

/// A connection whose incoming messages are limited.
#[derive(Debug)]
pub struct Answers {
    stream: UnixStream,
    bounds: Bounds,
}

/// Where in a message the stream is.
#[derive(Debug, Default)]
struct Bounds {
    /// What has come of a header.
    header: Vec<u8>,
    /// What is to come of a message.
    left: usize,
}

impl Bounds {
    /// Goes on by these bytes.
    fn pass(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            if self.left > 0 {
                let (message, rest) = bytes.split_at(self.left.min(bytes.len()));
                self.left = self.left.saturating_sub(message.len());
                bytes = rest;
                continue;
            }
            let missing = HEADER.saturating_sub(self.header.len());
            let (header, rest) = bytes.split_at(missing.min(bytes.len()));
            self.header.extend_from_slice(header);
            bytes = rest;
            if let Some(length) = self.header.first_chunk().map(|length| u32::from_be_bytes(*length))
                && length > MOST
            {
                let text = format!("the guest agent sends a message of {length} bytes, at most {MOST} are taken");
                return Err(io::Error::new(io::ErrorKind::InvalidData, text));
            }
            if self.header.len() == HEADER {
                let length = self.header.first_chunk().map(|length| u32::from_be_bytes(*length));
                self.left = length.and_then(|length| usize::try_from(length).ok()).unwrap_or(0);
                self.header.clear();
            }
        }
        Ok(())
    }
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
        Poll::Ready(passed)
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

    use super::*;

    fn message(length: u32, fill: u8) -> Vec<u8> {
        let mut bytes = length.to_be_bytes().to_vec();
        bytes.extend([fill; HEADER - 4]);
        bytes.extend(vec![fill; usize::try_from(length.min(MOST)).unwrap()]);
        bytes
    }

    #[test]
    fn messages_pass_however_they_are_cut() {
        // The bodies look like headers of 4 GiB.
        let all = [message(0, 0xff), message(7, 0xff), message(MOST, 0xff), message(1, 0xff)].concat();
        for size in [1, 3, 10, 11, 4096, all.len()] {
            let mut bounds = Bounds::default();
            for part in all.chunks(size) {
                bounds.pass(part).unwrap();
            }
            assert_eq!((bounds.header.len(), bounds.left), (0, 0), "in parts of {size}");
        }
    }

    #[test]
    fn a_message_that_is_too_large_is_refused_by_its_length() {
        let mut bounds = Bounds::default();
        bounds.pass(&message(7, 0)).unwrap();
        let length = (MOST + 1).to_be_bytes();
        bounds.pass(&length[..3]).unwrap();
        assert_eq!(bounds.pass(&length[3..]).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }

    #[tokio::test]
    async fn a_connection_ends_with_the_message_that_is_too_large() {
        let (ours, mut guest) = UnixStream::pair().unwrap();
        let mut answers = Answers::new(ours);
        guest.write_all(&message(3, 1)).await.unwrap();
        let mut good = vec![0; HEADER + 3];
        answers.read_exact(&mut good).await.unwrap();
        assert_eq!(good, message(3, 1));
        guest.write_all(&[0x7f; 4]).await.unwrap();
        assert!(answers.read(&mut [0; 100]).await.is_err());
    }
}
