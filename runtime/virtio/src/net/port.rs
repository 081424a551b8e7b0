//! What a queue pair sends to and receives from: one queue of a tap, or what a test puts in its place.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use vz_sys::{fd::set_nonblocking, tap};

use super::{HEADER, feature};

/// A descriptor of which each read gives, and each write takes, one frame behind a header of [`HEADER`] bytes.
///
/// It does not block, and is readable and writable as epoll understands it.
pub trait Port: AsFd + Send + Sync {
    /// Whether UDP frames longer than the link's can be written.
    fn takes_long_udp(&self) -> bool;
    /// Sets, for all ports of the device, what the guest's driver accepted.
    fn configure(&self, acked: u64) -> io::Result<()>;
    /// Whether this port gets frames.
    fn enable(&self, enabled: bool) -> io::Result<()>;
}

/// Why a descriptor is no port.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// It cannot be asked.
    #[error("read flags of tap")]
    Flags(#[source] io::Error),
    /// It was made in another way.
    #[error("tap lacks flag {0}")]
    Lacks(&'static str),
    /// It cannot be set up.
    #[error("set tap's {0}")]
    Set(&'static str, #[source] io::Error),
}

/// One queue of a tap.
#[derive(Debug)]
pub struct Tap {
    queue: OwnedFd,
    long_udp: bool,
}

impl Tap {
    /// Checks how the tap was made and makes the queue non-blocking.
    ///
    /// Must be `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`, with `IFF_MULTI_QUEUE` where it is one of several, and attached.
    pub fn new(queue: OwnedFd, one_of_several: bool) -> Result<Self, TapError> {
        let flags = tap::flags(&queue).map_err(TapError::Flags)?;
        let wanted = [(tap::TAP, "IFF_TAP"), (tap::NO_PI, "IFF_NO_PI"), (tap::VNET_HDR, "IFF_VNET_HDR")];
        let several = one_of_several.then_some((tap::MULTI_QUEUE, "IFF_MULTI_QUEUE"));
        for (flag, name) in wanted.into_iter().chain(several) {
            if flags & flag == 0 {
                return Err(TapError::Lacks(name));
            }
        }
        set_nonblocking(&queue, true).map_err(|e| TapError::Set("non-blocking mode", e))?;
        // A kernel that cannot give such frames cannot take them either.
        let long_udp = tap::set_offload(&queue, tap::CSUM | tap::USO4 | tap::USO6).is_ok();
        tap::set_offload(&queue, 0).map_err(|e| TapError::Set("offloads", e))?;
        Ok(Self { queue, long_udp })
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.queue.as_fd()
    }
}

impl Port for Tap {
    fn takes_long_udp(&self) -> bool {
        self.long_udp
    }

    fn configure(&self, acked: u64) -> io::Result<()> {
        tap::set_vnet_header(&self.queue, i32::try_from(HEADER).unwrap_or(0))?;
        let offloads = [
            (feature::GUEST_CSUM, tap::CSUM),
            (feature::GUEST_TSO4, tap::TSO4),
            (feature::GUEST_TSO6, tap::TSO6),
            (feature::GUEST_ECN, tap::TSO_ECN),
        ];
        let taken = offloads.into_iter().filter(|(feature, _)| acked & feature != 0);
        let taken = taken.fold(0, |all, (_, offload)| all | offload);
        // Without the first, the kernel takes none of the others.
        tap::set_offload(&self.queue, if taken & tap::CSUM == 0 { 0 } else { taken })
    }

    fn enable(&self, enabled: bool) -> io::Result<()> {
        tap::set_queue(&self.queue, enabled)
    }
}
