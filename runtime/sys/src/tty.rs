//! Terminals, by descriptor.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
};

use nix::errno::Errno;

/// Sets the size of a terminal; either end of it will do.
pub fn set_size(terminal: impl AsFd, columns: u16, rows: u16) -> io::Result<()> {
    let size = libc::winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the kernel reads one winsize, which lives for the whole call.
    #[allow(unsafe_code)]
    let done = unsafe { libc::ioctl(terminal.as_fd().as_raw_fd(), libc::TIOCSWINSZ, &raw const size) };
    Errno::result(done).map(drop).map_err(io::Error::from)
}

/// The size of a terminal: columns and rows.
pub fn size(terminal: impl AsFd) -> io::Result<(u16, u16)> {
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the kernel writes one winsize, which lives for the whole call.
    #[allow(unsafe_code)]
    let done = unsafe { libc::ioctl(terminal.as_fd().as_raw_fd(), libc::TIOCGWINSZ, &raw mut size) };
    Errno::result(done).map_err(io::Error::from)?;
    Ok((size.ws_col, size.ws_row))
}

/// Makes a terminal the controlling one of the calling session leader, which has none.
pub fn set_controlling(terminal: impl AsFd) -> io::Result<()> {
    // SAFETY: the argument is a number.
    #[allow(unsafe_code)]
    let done = unsafe { libc::ioctl(terminal.as_fd().as_raw_fd(), libc::TIOCSCTTY, 0) };
    Errno::result(done).map(drop).map_err(io::Error::from)
}

/// Unlocks a pseudo terminal's slave, given its master.
pub fn unlock(master: impl AsFd) -> io::Result<()> {
    let locked: libc::c_int = 0;
    // SAFETY: the kernel reads one int, which lives for the whole call.
    #[allow(unsafe_code)]
    let done = unsafe { libc::ioctl(master.as_fd().as_raw_fd(), libc::TIOCSPTLCK, &raw const locked) };
    Errno::result(done).map(drop).map_err(io::Error::from)
}

/// Opens a master's slave, close-on-exec and not as a controlling terminal, whatever mount namespace it is in.
pub fn open_slave(master: impl AsFd) -> io::Result<OwnedFd> {
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: the argument is a number; the result is a new descriptor or an error.
    #[allow(unsafe_code)]
    unsafe {
        let raw = Errno::result(libc::ioctl(master.as_fd().as_raw_fd(), libc::TIOCGPTPEER, flags))?;
        Ok(OwnedFd::from_raw_fd(raw))
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        io::{Read, Write},
    };

    use super::*;

    #[test]
    fn a_slave_is_opened_by_its_master_and_carries_bytes() {
        let mut master = File::options().read(true).write(true).open("/dev/ptmx").unwrap();
        unlock(&master).unwrap();
        let mut slave = File::from(open_slave(&master).unwrap());
        set_size(&master, 132, 43).unwrap();
        assert_eq!(size(&slave).unwrap(), (132, 43));
        slave.write_all(b"hello").unwrap();
        let mut said = [0; 5];
        master.read_exact(&mut said).unwrap();
        assert_eq!(&said, b"hello");
    }

    #[test]
    fn what_is_no_terminal_has_no_size() {
        let null = File::open("/dev/null").unwrap();
        assert_eq!(set_size(&null, 80, 25).unwrap_err().raw_os_error(), Some(libc::ENOTTY));
    }
}
