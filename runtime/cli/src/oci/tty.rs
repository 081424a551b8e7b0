//! Terminals on the host's side. The guest's does all the work (echo, line editing, signals by keys), so that of the
//! host is raw: it carries bytes.

use std::{
    fs::{File, OpenOptions},
    io::{self, IoSlice, IsTerminal},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::Path,
};

use nix::sys::{
    socket::{ControlMessage, MsgFlags, sendmsg},
    termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr},
};

use super::error::Error;

/// Makes a raw pseudo terminal, and sends its master over the socket, as `--console-socket` asks for. Its slave.
pub fn to_socket(socket: &Path) -> Result<OwnedFd, Error> {
    let stream = UnixStream::connect(socket).map_err(Error::at("connect to console socket", socket))?;
    let open = || -> io::Result<(File, OwnedFd)> {
        let master = OpenOptions::new().read(true).write(true).open("/dev/ptmx")?;
        vz_sys::tty::unlock(&master)?;
        let slave = vz_sys::tty::open_slave(&master)?;
        // Before its master's new owner changes what is left to it.
        set_raw(slave.as_fd())?;
        Ok((master, slave))
    };
    let (master, slave) = open().map_err(Error::step("make terminal"))?;
    let fds = [master.as_raw_fd()];
    let rights = [ControlMessage::ScmRights(&fds)];
    sendmsg::<()>(stream.as_raw_fd(), &[IoSlice::new(b"/dev/ptmx")], &rights, MsgFlags::MSG_NOSIGNAL, None)
        .map_err(|e| Error::at("send terminal to console socket", socket)(e.into()))?;
    Ok(slave)
}

fn set_raw(terminal: BorrowedFd<'_>) -> io::Result<Termios> {
    let before = tcgetattr(terminal)?;
    let mut raw = before.clone();
    cfmakeraw(&mut raw);
    tcsetattr(terminal, SetArg::TCSANOW, &raw)?;
    Ok(before)
}

/// The caller's own terminal, raw until this is dropped.
#[derive(Debug)]
pub struct Raw {
    terminal: OwnedFd,
    before: Termios,
}

impl Raw {
    /// Standard input must be one.
    pub fn stdin() -> Result<Self, Error> {
        if !io::stdin().is_terminal() || !io::stdout().is_terminal() {
            return Err(Error::Option {
                option: "terminal".into(),
                why: "the process wants a terminal, and standard input and output are none: \
                      call it from one, or name a --console-socket and --detach",
            });
        }
        let terminal = io::stdin().as_fd().try_clone_to_owned().map_err(Error::step("duplicate terminal"))?;
        let before = set_raw(terminal.as_fd()).map_err(Error::step("make terminal raw"))?;
        Ok(Self { terminal, before })
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // A terminal that has gone has no settings to restore.
        let _ = tcsetattr(&self.terminal, SetArg::TCSANOW, &self.before);
    }
}
