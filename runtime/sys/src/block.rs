//! Block devices.

use std::{
    io,
    os::fd::{AsFd, AsRawFd},
};

use nix::errno::Errno;

/// How a block device wants to be used; in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Topology {
    /// The smallest that can be addressed.
    pub logical_block: u32,
    /// The smallest that is written without reading first.
    pub physical_block: u32,
    /// What is best not gone below.
    pub min_io: u32,
    /// What is best used, or 0.
    pub best_io: u32,
    /// Where the first physical block that is a whole one starts.
    pub alignment: u32,
}

/// `_IO(0x12, 120)` and following, of linux/fs.h.
const BLKIOMIN: libc::Ioctl = 0x1278;
const BLKIOOPT: libc::Ioctl = 0x1279;
const BLKALIGNOFF: libc::Ioctl = 0x127a;
const BLKPBSZGET: libc::Ioctl = 0x127b;

/// Asks a block device.
pub fn topology(device: impl AsFd) -> io::Result<Topology> {
    let ask = |request| -> io::Result<u32> {
        let mut answer: libc::c_uint = 0;
        // SAFETY: for each of the requests below the kernel writes one int, which lives for the whole call.
        #[allow(unsafe_code)]
        let done = unsafe { libc::ioctl(device.as_fd().as_raw_fd(), request, &raw mut answer) };
        Errno::result(done)?;
        Ok(answer)
    };
    Ok(Topology {
        logical_block: ask(libc::BLKSSZGET)?,
        physical_block: ask(BLKPBSZGET)?,
        min_io: ask(BLKIOMIN)?,
        best_io: ask(BLKIOOPT)?,
        // -1 is for a device that is put together of others that do not fit.
        alignment: ask(BLKALIGNOFF).map(|offset| i32::from_ne_bytes(offset.to_ne_bytes()))?.try_into().unwrap_or(0),
    })
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn what_is_no_block_device_has_no_topology() {
        let null = File::open("/dev/null").unwrap();
        assert_eq!(topology(&null).unwrap_err().raw_os_error(), Some(libc::ENOTTY));
    }
}
