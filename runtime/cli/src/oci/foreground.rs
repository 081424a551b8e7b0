//! A command that stays until its process ends: signals and changes of its terminal's size are passed on.

use std::os::fd::AsFd;

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        signal::{SigSet, Signal},
        signalfd::{SfdFlags, SignalFd},
        wait::WaitStatus,
    },
};
use vz_sys::process::Process;

use super::error::Error;

/// Signals that are the process's. SIGTSTP is not: it is the shell's way to stop this command.
const PASSED_ON: [Signal; 9] = [
    Signal::SIGHUP,
    Signal::SIGINT,
    Signal::SIGQUIT,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGALRM,
    Signal::SIGTERM,
    Signal::SIGCONT,
    Signal::SIGWINCH,
];

/// Signals that wait from now on, to be passed on.
#[derive(Debug)]
pub struct Signals(SignalFd);

impl Signals {
    /// Takes them over, for the rest of the command.
    pub fn take() -> Result<Self, Error> {
        let set: SigSet = PASSED_ON.into_iter().collect();
        let fail = Error::step::<Errno>;
        set.thread_block().map_err(fail("block signals"))?;
        SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
            .map(Self)
            .map_err(fail("take signals"))
    }

    /// Waits for the end of a keeper, and passes on to it whatever comes; the exit status.
    pub fn until_the_end(&self, keeper: &Process) -> Result<u8, Error> {
        let fail = Error::step::<Errno>;
        loop {
            let mut fds =
                [PollFd::new(keeper.as_fd(), PollFlags::POLLIN), PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
            match poll(&mut fds, PollTimeout::NONE) {
                Err(Errno::EINTR) => continue,
                other => other.map_err(fail("wait for process"))?,
            };
            let ended = fds[0].any().unwrap_or_default();
            while let Some(info) = self.0.read_signal().map_err(fail("take signals"))? {
                let signal = i32::try_from(info.ssi_signo).ok().and_then(|number| Signal::try_from(number).ok());
                if let Some(signal) = signal {
                    keeper.kill(signal).map_err(Error::step("pass a signal on"))?;
                }
            }
            if ended {
                return Ok(match keeper.wait().map_err(Error::step("wait for process"))? {
                    WaitStatus::Exited(_, code) => u8::try_from(code).unwrap_or(u8::MAX),
                    WaitStatus::Signaled(_, signal, _) => {
                        128_u8.saturating_add(u8::try_from(signal as i32).unwrap_or(0))
                    }
                    _ => u8::MAX,
                });
            }
        }
    }
}
