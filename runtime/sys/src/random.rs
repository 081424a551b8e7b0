//! The kernel's random number generator.

use std::{
    io,
    os::fd::{AsFd, AsRawFd},
};

use nix::errno::Errno;
use rustix::rand::{GetRandomFlags, getrandom};

/// Most bytes that [`credit`] takes.
pub const MAX_SEED: usize = 512;

#[repr(C)]
struct PoolInfo {
    entropy_count: libc::c_int,
    buf_size: libc::c_int,
    buf: [u8; MAX_SEED],
}

/// Mixes `seed` into the kernel's pool, credits all its bits and reseeds. `device` is an open `/dev/urandom`.
///
/// The caller vouches for the seed: it must come from a good source and be used once. Needs `CAP_SYS_ADMIN`.
pub fn credit(device: impl AsFd, seed: &[u8]) -> io::Result<()> {
    let too_long = || io::Error::from(io::ErrorKind::InvalidInput);
    let len = i32::try_from(seed.len()).map_err(|_| too_long())?;
    let mut info = PoolInfo { entropy_count: len.saturating_mul(8), buf_size: len, buf: [0; MAX_SEED] };
    info.buf.get_mut(..seed.len()).ok_or_else(too_long)?.copy_from_slice(seed);
    let device = device.as_fd().as_raw_fd();
    // SAFETY: rand_pool_info is two ints and buf_size bytes, all within `info`, which lives for the whole call.
    #[allow(unsafe_code)]
    let done = unsafe { libc::ioctl(device, RNDADDENTROPY, &raw const info) };
    Errno::result(done)?;
    // SAFETY: takes no argument.
    #[allow(unsafe_code)]
    let done = unsafe { libc::ioctl(device, RNDRESEEDCRNG, 0) };
    Errno::result(done).map(drop).map_err(io::Error::from)
}

/// Fills `bytes` with random ones.
pub fn fill(mut bytes: &mut [u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match getrandom(&mut *bytes, GetRandomFlags::empty()) {
            Ok(count) => bytes = bytes.get_mut(count..).unwrap_or_default(),
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

/// `_IOW('R', 0x03, int[2])` of linux/random.h.
const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
/// `_IO('R', 0x07)` of linux/random.h.
const RNDRESEEDCRNG: libc::c_ulong = 0x5207;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_is_filled() {
        let mut seen = [false; 1000];
        for _ in 0..8 {
            let mut bytes = [0; 1000];
            fill(&mut bytes).unwrap();
            for (seen, byte) in seen.iter_mut().zip(bytes) {
                *seen |= byte != 0;
            }
        }
        assert_eq!(seen, [true; 1000]);
        fill(&mut []).unwrap();
    }

    #[test]
    fn a_seed_that_is_too_long_is_refused() {
        let device = std::fs::File::open("/dev/null").unwrap();
        assert_eq!(credit(&device, &[0; MAX_SEED + 1]).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
}
