//! News of links, addresses, routes and neighbours of a network namespace.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd},
};

use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

use crate::netns::Netns;

/// `RTNLGRP_*` of linux/rtnetlink.h: link, neighbours, IPv4 addresses and routes, IPv6 addresses and routes.
const GROUPS: [u32; 6] = [1, 3, 5, 7, 9, 11];

/// Readable when something has changed.
pub struct Watch(Socket);

impl std::fmt::Debug for Watch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Watch").field(&self.0.as_raw_fd()).finish()
    }
}

impl Watch {
    /// Watches a namespace from now on.
    pub fn start(netns: &Netns) -> io::Result<Self> {
        netns.run(|| {
            let mut socket = Socket::new(NETLINK_ROUTE)?;
            socket.bind(&SocketAddr::new(0, 0))?;
            socket.set_non_blocking(true)?;
            for group in GROUPS {
                socket.add_membership(group)?;
            }
            Ok(Self(socket))
        })?
    }

    /// Takes all news that there are: whether there were any. What exactly they say does not matter to somebody who
    /// then looks at everything, nor does it that some were lost.
    pub fn take(&self) -> io::Result<bool> {
        let mut any = false;
        let mut buffer = [0u8; 8192];
        loop {
            match self.0.recv(&mut buffer.as_mut_slice(), 0) {
                Ok(_) => any = true,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(any),
                Err(e) if e.raw_os_error() == Some(nix::libc::ENOBUFS) => any = true,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }
}

impl AsFd for Watch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Watch {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
