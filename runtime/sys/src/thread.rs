//! The calling thread.

use std::{ffi::CString, io, mem, ptr};

use nix::unistd::{Pid, getpid, gettid};

/// Names it for `ps` and debuggers, cut to the 15 bytes that there is room for.
pub fn set_name(name: &str) {
    let short: Vec<u8> = name.bytes().filter(|byte| *byte != 0).take(15).collect();
    if let Ok(short) = CString::new(short) {
        // Fails for bad pointers only.
        let _ = nix::sys::prctl::set_name(&short);
    }
}

/// What interrupts a system call: nothing else uses it, and by default it would end the process.
const INTERRUPT: libc::c_int = libc::SIGUSR1;

/// Lets threads of this process be interrupted: once, before the first of them is.
pub fn allow_interrupts() -> io::Result<()> {
    extern "C" fn nothing(_signal: libc::c_int) {}
    // SAFETY: sigaction is plain data, whose empty value is all zero; the handler does nothing. No flag: a call that it
    // interrupts is not restarted.
    #[allow(unsafe_code)]
    let done = unsafe {
        let mut action: libc::sigaction = mem::zeroed();
        action.sa_sigaction = nothing as *const () as usize;
        libc::sigemptyset(&raw mut action.sa_mask);
        libc::sigaction(INTERRUPT, &raw const action, ptr::null_mut())
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// A thread of this process whose system call another one can interrupt.
#[derive(Debug, Clone, Copy)]
pub struct Interruptible(Pid);

impl Interruptible {
    /// The calling thread.
    pub fn here() -> Self {
        Self(gettid())
    }

    /// Makes the call that it waits in fail with EINTR. It is lost on a thread that does not wait, or has ended.
    pub fn interrupt(&self) {
        // SAFETY: it takes numbers only, and the signal of this process's own has a handler that does nothing.
        #[allow(unsafe_code)]
        unsafe {
            libc::syscall(libc::SYS_tgkill, getpid().as_raw(), self.0.as_raw(), INTERRUPT);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, sync::mpsc, time::Duration};

    use super::*;

    #[test]
    fn a_call_that_waits_is_interrupted() {
        allow_interrupts().unwrap();
        let file = std::env::temp_dir().join(format!("vz-interrupt-{}", std::process::id()));
        let held = File::create(&file).unwrap();
        held.lock().unwrap();
        let wants = File::open(&file).unwrap();
        std::fs::remove_file(&file).unwrap();
        let (tell, told) = mpsc::channel();
        let waiter = std::thread::spawn(move || {
            tell.send(Interruptible::here()).unwrap();
            wants.lock().unwrap_err().kind()
        });
        let waiting = told.recv().unwrap();
        while !waiter.is_finished() {
            waiting.interrupt();
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(waiter.join().unwrap(), io::ErrorKind::Interrupted);
        // Nobody is there any more.
        waiting.interrupt();
    }
}
