//! Terminals, by descriptor.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
};

use rustix::{
    process::ioctl_tiocsctty,
    pty::{OpenptFlags, ioctl_tiocgptpeer, unlockpt},
    termios::{Winsize, tcgetwinsize, tcsetwinsize},
};

/// Sets the size of a terminal; either end of it will do.
pub fn set_size(terminal: impl AsFd, columns: u16, rows: u16) -> io::Result<()> {
    Ok(tcsetwinsize(terminal, Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 })?)
}

/// The size of a terminal: columns and rows.
pub fn size(terminal: impl AsFd) -> io::Result<(u16, u16)> {
    let size = tcgetwinsize(terminal)?;
    Ok((size.ws_col, size.ws_row))
}

/// Makes a terminal the controlling one of the calling session leader, which has none.
pub fn set_controlling(terminal: impl AsFd) -> io::Result<()> {
    Ok(ioctl_tiocsctty(terminal)?)
}

/// Unlocks a pseudo terminal's slave, given its master.
pub fn unlock(master: impl AsFd) -> io::Result<()> {
    Ok(unlockpt(master)?)
}

/// Opens a master's slave, close-on-exec and not as a controlling terminal, whatever mount namespace it is in.
pub fn open_slave(master: impl AsFd) -> io::Result<OwnedFd> {
    Ok(ioctl_tiocgptpeer(master, OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?)
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
