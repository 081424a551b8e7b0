//! Where messages of ttrpc begin and end in a stream, and that none is larger than [`MOST`].
//!
//! The host reads what the guest sends through this before ttrpc takes any of it: see `guest/answers.rs` of the shim.

/// Largest message of the guest's, in bytes: its answers have a few KiB, its events a few hundred bytes.
pub const MOST: u32 = 128 << 10;
/// Length of ttrpc's message header, which begins with that of the message, four bytes in network byte order.
pub const HEADER: usize = 10;

/// The guest announces a message that is too large.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the guest agent sends a message of {0} bytes, at most {MOST} are taken")]
pub struct TooLarge(pub u32);

/// Where in a message the stream is.
#[derive(Debug, Default)]
pub struct Bounds {
    /// Inside a header: its bytes so far.
    header: Vec<u8>,
    /// Inside a message: bytes that are left.
    left: usize,
}

impl Bounds {
    /// Goes on by these bytes. A message that is too large is refused with the last byte of its length, and nothing may
    /// be passed after it.
    pub fn pass(&mut self, mut bytes: &[u8]) -> Result<(), TooLarge> {
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
            let length = self.header.first_chunk().map(|length| u32::from_be_bytes(*length));
            if let Some(length) = length.filter(|length| *length > MOST) {
                return Err(TooLarge(length));
            }
            if self.header.len() == HEADER {
                self.left = length.and_then(|length| usize::try_from(length).ok()).unwrap_or(0);
                self.header.clear();
            }
        }
        Ok(())
    }

    /// Whether the stream is between two messages.
    pub fn is_between(&self) -> bool {
        self.header.is_empty() && self.left == 0
    }
}

#[cfg(test)]
mod tests {
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
            assert!(bounds.is_between(), "in parts of {size}");
        }
    }

    #[test]
    fn a_message_that_is_too_large_is_refused_by_its_length() {
        let mut bounds = Bounds::default();
        bounds.pass(&message(7, 0)).unwrap();
        let length = (MOST + 1).to_be_bytes();
        bounds.pass(&length[..3]).unwrap();
        assert!(!bounds.is_between());
        assert_eq!(bounds.pass(&length[3..]), Err(TooLarge(MOST + 1)));
    }
}
