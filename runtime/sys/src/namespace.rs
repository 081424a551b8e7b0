//! Namespaces by descriptor.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

use nix::sched::CloneFlags;

/// `NS_GET_NSTYPE` of linux/nsfs.h.
const NS_GET_NSTYPE: libc::Ioctl = nix::request_code_none!(0xb7, 3) as libc::Ioctl;

/// What kind of namespace a descriptor is of; an error where it is of something else.
pub fn kind(fd: BorrowedFd<'_>) -> io::Result<CloneFlags> {
    // SAFETY: NS_GET_NSTYPE takes no argument.
    #[allow(unsafe_code)]
    let kind = unsafe { libc::ioctl(fd.as_raw_fd(), NS_GET_NSTYPE) };
    if kind < 0 { Err(io::Error::last_os_error()) } else { Ok(CloneFlags::from_bits_retain(kind)) }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, os::fd::AsFd};

    use super::*;

    #[test]
    fn a_namespace_is_told_from_a_file() {
        let own = File::open("/proc/self/ns/net").unwrap();
        assert_eq!(kind(own.as_fd()).unwrap(), CloneFlags::CLONE_NEWNET);
        assert!(kind(File::open("/dev/null").unwrap().as_fd()).is_err());
    }
}
