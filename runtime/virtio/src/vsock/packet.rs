//! The header of a vsock packet (virtio 1.3, section 5.10.6). Pure: bytes in, fields out, nothing believed.

use zerocopy::{FromBytes, Immutable, IntoBytes, transmute};

/// Bytes of a header.
pub const HEADER: usize = 44;

/// `VIRTIO_VSOCK_TYPE_STREAM`, the only type there is here.
pub const STREAM: u16 = 1;

/// What a packet is for; a number that is not listed is an operation that does not exist.
pub mod op {
    /// Connect.
    pub const REQUEST: u16 = 1;
    /// Accept a connection.
    pub const RESPONSE: u16 = 2;
    /// There is no such connection, or no longer.
    pub const RST: u16 = 3;
    /// No more data in the directions that the flags name.
    pub const SHUTDOWN: u16 = 4;
    /// Data.
    pub const RW: u16 = 5;
    /// How much the sender can take.
    pub const CREDIT_UPDATE: u16 = 6;
    /// Asks for a [`CREDIT_UPDATE`].
    pub const CREDIT_REQUEST: u16 = 7;
}

/// Flags of [`op::SHUTDOWN`]: the sender will receive no more.
pub const SHUTDOWN_RCV: u32 = 1;
/// The sender will send no more.
pub const SHUTDOWN_SEND: u32 = 2;
/// Both.
pub const SHUTDOWN_BOTH: u32 = SHUTDOWN_RCV | SHUTDOWN_SEND;

/// A header's fields: `struct virtio_vsock_hdr`, which is not padded to a multiple of 8 bytes.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
#[repr(C, packed(4))]
pub struct Header {
    /// Sender's context.
    pub src_cid: u64,
    /// Receiver's context.
    pub dst_cid: u64,
    /// Sender's port.
    pub src_port: u32,
    /// Receiver's port.
    pub dst_port: u32,
    /// Bytes of data that follow.
    pub len: u32,
    /// [`STREAM`].
    pub kind: u16,
    /// One of [`op`].
    pub op: u16,
    /// Depends on `op`.
    pub flags: u32,
    /// Bytes that the sender buffers for this connection.
    pub buf_alloc: u32,
    /// Bytes that the sender has taken out of its buffer since the connection was made, modulo 2^32.
    pub fwd_cnt: u32,
}

impl Header {
    /// Reads the fields.
    pub fn parse(bytes: [u8; HEADER]) -> Self {
        transmute!(bytes)
    }

    /// Writes the fields.
    pub fn encode(&self) -> [u8; HEADER] {
        transmute!(*self)
    }

    /// The packet that resets what this one belongs to.
    pub fn reset(&self) -> Self {
        Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            kind: self.kind,
            op: op::RST,
            ..Self::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_has_its_place() {
        let bytes: [u8; HEADER] = std::array::from_fn(|i| u8::try_from(i).unwrap() + 1);
        let header = Header::parse(bytes);
        assert_eq!(header.encode(), bytes);
        assert_eq!({ header.src_cid }, 0x0807_0605_0403_0201);
        assert_eq!(header.fwd_cnt, 0x2c2b_2a29);
        assert_eq!(header.op, 0x201f);
    }

    #[test]
    fn a_reset_goes_back_to_the_sender() {
        let header = Header {
            src_cid: 3,
            dst_cid: 2,
            src_port: 10,
            dst_port: 20,
            kind: STREAM,
            op: op::RW,
            len: 9,
            ..Header::default()
        };
        let reset = header.reset();
        assert_eq!((reset.src_cid, reset.dst_cid, reset.src_port, reset.dst_port), (2, 3, 20, 10));
        assert_eq!((reset.op, reset.len, reset.kind), (op::RST, 0, STREAM));
    }
}
