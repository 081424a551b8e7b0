//! The calling thread.

use std::ffi::CString;

/// Names it for `ps` and debuggers, cut to the 15 bytes that there is room for.
pub fn set_name(name: &str) {
    let short: Vec<u8> = name.bytes().filter(|byte| *byte != 0).take(15).collect();
    if let Ok(short) = CString::new(short) {
        // Fails for bad pointers only.
        let _ = nix::sys::prctl::set_name(&short);
    }
}
