//! What a system call filter denied, said aloud.

use std::{
    ffi::{c_int, c_void},
    io, mem, ptr,
};

/// The exit status of a process that was denied a system call: what a shell says of one that SIGSYS killed.
const STATUS: c_int = 128 + libc::SIGSYS;

/// Makes the calling process say on its stderr which system call was denied to which of its threads, and exit, where a
/// filter answers with SIGSYS.
pub fn report_and_exit() -> io::Result<()> {
    // SAFETY: sigaction is plain data, whose empty value is all zero; the handler is async-signal-safe.
    #[allow(unsafe_code)]
    let done = unsafe {
        let mut action: libc::sigaction = mem::zeroed();
        action.sa_sigaction = report as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        libc::sigemptyset(&raw mut action.sa_mask);
        libc::sigaction(libc::SIGSYS, &raw const action, ptr::null_mut())
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// No allocation, no lock, and no system call that a filter could deny but prctl(PR_GET_NAME), which all allow.
extern "C" fn report(_signal: c_int, info: *mut libc::siginfo_t, _context: *mut c_void) {
    let mut line = Line { bytes: [0; 160], len: 0 };
    let mut name = [0u8; 16];
    // SAFETY: the kernel passed a siginfo_t; for SIGSYS the call's number follows its address, which comes 16 bytes in
    // (sigaction(2), struct siginfo in the kernel's siginfo.h). The name's buffer has the 16 bytes that prctl writes.
    #[allow(unsafe_code)]
    let number = unsafe {
        libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr());
        info.cast::<u8>().add(24).cast::<c_int>().read_unaligned()
    };
    line.push(b"level=error msg=\"thread ");
    line.push(name.split(|byte| *byte == 0).next().unwrap_or_default());
    line.push(b" made a system call that its filter denies: ");
    let call = usize::try_from(number).ok().and_then(syscalls::Sysno::new);
    line.push(call.map_or("unknown", |call| call.name()).as_bytes());
    line.push(b"\" number=");
    line.push_number(number.unsigned_abs());
    line.push(b"\n");
    // SAFETY: the bytes are ours; _exit does not return.
    #[allow(unsafe_code)]
    unsafe {
        libc::write(libc::STDERR_FILENO, line.bytes.as_ptr().cast(), line.len);
        libc::_exit(STATUS);
    }
}

/// Text in a buffer of fixed size; what does not fit is left out.
struct Line {
    bytes: [u8; 160],
    len: usize,
}

impl Line {
    fn push(&mut self, text: &[u8]) {
        for byte in text {
            if let Some(place) = self.bytes.get_mut(self.len) {
                *place = *byte;
                self.len += 1;
            }
        }
    }

    fn push_number(&mut self, number: u32) {
        let mut divisor = 1_000_000_000;
        while divisor > 1 && number < divisor {
            divisor /= 10;
        }
        while divisor > 0 {
            let digit = u8::try_from(number / divisor % 10).unwrap_or_default();
            self.push(&[b'0' + digit]);
            divisor /= 10;
        }
    }
}
