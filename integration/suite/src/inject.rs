//! What a guest could do that has taken over a thread on the host: makes a thread of a running, released program make a
//! system call of our choice, by ptrace. The thread's confinement is all that stands in its way.

use std::{
    ffi::c_long,
    io,
    time::{Duration, Instant},
};

use nix::{
    sys::{
        ptrace::{self, Options},
        signal::Signal,
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::Pid,
};

/// What became of the call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It returned this: a value, or a negated errno.
    Returned(i64),
    /// The kernel killed the process for it.
    Killed(Signal),
}

impl Outcome {
    /// Whether it failed with an error.
    pub fn is_error(&self) -> bool {
        matches!(self, Self::Returned(-4095..=-1))
    }
}

/// An argument of a system call.
#[derive(Debug, Clone, Copy)]
pub enum Arg<'a> {
    /// A number.
    Number(i64),
    /// The address of a text that is put on the thread's stack.
    Text(&'a str),
}

/// How long a thread may take to wait for something, as all of them do in an idle sandbox.
const IDLE: Duration = Duration::from_secs(20);
/// The machine code of `syscall`.
const SYSCALL: c_long = 0x050f;
/// Below the stack pointer and what the ABI lets functions use there without saying so.
const BELOW_STACK: u64 = 2048;

/// Makes a thread, by its id, make a system call. Where it returns, the thread goes on as if nothing had happened.
pub fn call(tid: i32, number: i64, args: &[Arg<'_>]) -> Outcome {
    call_and_hold(tid, number, args, Duration::ZERO)
}

/// As [`call`], and holds on to the thread for so long before it is let go, dead or alive, as a debugger may.
pub fn call_and_hold(tid: i32, number: i64, args: &[Arg<'_>], hold: Duration) -> Outcome {
    let tid = Pid::from_raw(tid);
    let begun = Instant::now();
    loop {
        match attempt(tid, number, args, hold) {
            Ok(Some(outcome)) => return outcome,
            Ok(None) if begun.elapsed() < IDLE => std::thread::sleep(Duration::from_millis(10)),
            Ok(None) => panic!("thread {tid} is never idle"),
            Err(e) => panic!("trace thread {tid}: {e}"),
        }
    }
}

/// `None` where the thread was not in a system call.
fn attempt(tid: Pid, number: i64, args: &[Arg<'_>], hold: Duration) -> io::Result<Option<Outcome>> {
    ptrace::seize(tid, Options::empty())?;
    ptrace::interrupt(tid)?;
    waitpid(tid, Some(WaitPidFlag::__WALL))?;
    let saved = ptrace::getregs(tid)?;
    let instruction = saved.rip.wrapping_sub(2);
    if saved.orig_rax == u64::MAX || ptrace::read(tid, instruction as ptrace::AddressType)? & 0xffff != SYSCALL {
        ptrace::detach(tid, None)?;
        return Ok(None);
    }
    let mut regs = saved;
    let mut at = saved.rsp.wrapping_sub(BELOW_STACK);
    let mut values = [0u64; 6];
    for (value, arg) in values.iter_mut().zip(args) {
        *value = match arg {
            Arg::Number(number) => number.cast_unsigned(),
            Arg::Text(text) => {
                let start = at;
                for chunk in text.as_bytes().iter().copied().chain([0; 8]).collect::<Vec<_>>().chunks(8) {
                    let mut word = [0u8; 8];
                    word[..chunk.len()].copy_from_slice(chunk);
                    ptrace::write(tid, at as ptrace::AddressType, c_long::from_ne_bytes(word))?;
                    at = at.wrapping_add(8);
                }
                start
            }
        };
    }
    [regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8, regs.r9] = values;
    regs.rip = instruction;
    regs.rax = number.cast_unsigned();
    // Nothing to restart.
    regs.orig_rax = u64::MAX;
    ptrace::setregs(tid, regs)?;
    ptrace::step(tid, None)?;
    // Nothing tells that the others have not noticed: this is how long they could have.
    std::thread::sleep(hold);
    match waitpid(tid, Some(WaitPidFlag::__WALL))? {
        WaitStatus::Signaled(_, signal, _) => return Ok(Some(Outcome::Killed(signal))),
        WaitStatus::Stopped(_, Signal::SIGTRAP) => {}
        other => return Err(io::Error::other(format!("unexpected {other:?}"))),
    }
    let returned = ptrace::getregs(tid)?.rax.cast_signed();
    ptrace::setregs(tid, saved)?;
    ptrace::detach(tid, None)?;
    Ok(Some(Outcome::Returned(returned)))
}
