//! Tap devices, by the descriptor of one of their queues.
//!
//! None of these needs a privilege: whoever holds the descriptor may. See the kernel's
//! Documentation/networking/tuntap.rst and linux/if_tun.h.

use std::{
    io,
    os::fd::{AsFd, AsRawFd},
};

use nix::errno::Errno;

/// Ethernet frames, rather than packets.
pub const TAP: i32 = libc::IFF_TAP;
/// No header of the tap's own before each frame.
pub const NO_PI: i32 = libc::IFF_NO_PI;
/// A virtio-net header before each frame.
pub const VNET_HDR: i32 = libc::IFF_VNET_HDR;
/// A device that does not exist yet.
pub const EXCLUSIVE: i32 = libc::IFF_TUN_EXCL;
/// More than one queue.
pub const MULTI_QUEUE: i32 = libc::IFF_MULTI_QUEUE;

/// What the reader takes without a checksum.
pub const CSUM: u32 = libc::TUN_F_CSUM;
/// TCP over IPv4 that the reader takes in frames longer than the link's.
pub const TSO4: u32 = libc::TUN_F_TSO4;
/// TCP over IPv6, likewise.
pub const TSO6: u32 = libc::TUN_F_TSO6;
/// TCP with congestion notification, likewise.
pub const TSO_ECN: u32 = libc::TUN_F_TSO_ECN;
/// UDP over IPv4, likewise; together with [`USO6`] only, and since Linux 6.2.
pub const USO4: u32 = libc::TUN_F_USO4;
/// UDP over IPv6, likewise.
pub const USO6: u32 = libc::TUN_F_USO6;

fn request(flags: i32) -> io::Result<libc::ifreq> {
    // The last of the sixteen flags makes a negative number.
    let flags = u16::try_from(flags).map_err(|_| Errno::EINVAL)?.cast_signed();
    Ok(libc::ifreq { ifr_name: [0; libc::IFNAMSIZ], ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: flags } })
}

/// What the device is: a set of [`TAP`], [`NO_PI`], and so on. Fails with `EBADFD` for a queue that is detached.
pub fn flags(tap: impl AsFd) -> io::Result<i32> {
    let mut request = request(0)?;
    // SAFETY: the kernel writes one ifreq, which lives for the whole call.
    #[allow(unsafe_code)]
    let done = unsafe { libc::ioctl(tap.as_fd().as_raw_fd(), libc::TUNGETIFF, &raw mut request) };
    Errno::result(done)?;
    // SAFETY: the call has filled in the flags; all bits of a number are valid.
    #[allow(unsafe_code)]
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    Ok(i32::from(flags) & 0xffff)
}

/// Sets how many bytes the header before each frame has, for all queues: 10, or 12 where it counts buffers.
pub fn set_vnet_header(tap: impl AsFd, bytes: i32) -> io::Result<()> {
    // SAFETY: the kernel reads one int, which lives for the whole call.
    #[allow(unsafe_code)]
    let done = unsafe { libc::ioctl(tap.as_fd().as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const bytes) };
    Errno::result(done).map(drop).map_err(io::Error::from)
}

/// Sets what the reader takes, for all queues: [`CSUM`], and so on.
pub fn set_offload(tap: impl AsFd, offloads: u32) -> io::Result<()> {
    // SAFETY: the argument is a number.
    #[allow(unsafe_code)]
    let done = unsafe { libc::ioctl(tap.as_fd().as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(offloads)) };
    Errno::result(done).map(drop).map_err(io::Error::from)
}

/// Attaches a queue to its device, which then gives it frames, or detaches it. Fails with `EINVAL` where it is so
/// already.
pub fn set_queue(tap: impl AsFd, attached: bool) -> io::Result<()> {
    let request = request(if attached { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE })?;
    // SAFETY: the kernel reads one ifreq, which lives for the whole call.
    #[allow(unsafe_code)]
    let done = unsafe { libc::ioctl(tap.as_fd().as_raw_fd(), libc::TUNSETQUEUE, &raw const request) };
    Errno::result(done).map(drop).map_err(io::Error::from)
}

/// Opens a queue of a tap that is made if it does not exist, close-on-exec. `tun` is an open `/dev/net/tun`, which
/// becomes that queue. Fails with `EBUSY` for an [`EXCLUSIVE`] one that exists. Needs `CAP_NET_ADMIN` over the network
/// namespace.
pub fn attach(tun: impl AsFd, name: &str, flags: i32) -> io::Result<()> {
    let mut request = request(flags)?;
    // The last byte stays zero.
    if name.len() >= request.ifr_name.len() {
        return Err(Errno::ENAMETOOLONG.into());
    }
    for (place, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *place = libc::c_char::from_ne_bytes([byte]);
    }
    // SAFETY: the kernel reads and writes one ifreq, which lives for the whole call.
    #[allow(unsafe_code)]
    let done = unsafe { libc::ioctl(tun.as_fd().as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    Errno::result(done).map(drop).map_err(io::Error::from)
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn what_is_no_tap_is_refused() {
        let null = File::open("/dev/null").unwrap();
        let refused = |done: io::Result<()>| assert_eq!(done.unwrap_err().raw_os_error(), Some(libc::ENOTTY));
        refused(flags(&null).map(drop));
        refused(set_vnet_header(&null, 12));
        refused(set_offload(&null, CSUM));
        refused(set_queue(&null, true));
        refused(attach(&null, "tap0", TAP));
        assert_eq!(attach(&null, "0123456789abcdef", TAP).unwrap_err().raw_os_error(), Some(libc::ENAMETOOLONG));
    }
}
