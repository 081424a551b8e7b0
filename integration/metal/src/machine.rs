//! The hardware: ports, memory by its address, the counter of cycles. All that is unsafe is here and in `boot`.

use core::{
    arch::asm,
    fmt::{self, Write},
    sync::atomic::{AtomicU32, Ordering, fence as atomic_fence},
};

/// First register of the first serial port, and offset of its line status; the status's bit for "takes a byte".
const SERIAL: u16 = 0x3f8;
const LINE_STATUS: u16 = 5;
const TAKES_BYTE: u8 = 0x20;
/// The keyboard controller's port and its command that pulls the processor's reset line, which ends the VM.
const KEYBOARD: u16 = 0x64;
const RESET: u8 = 0xfe;

/// Memory that is the scenes' own: above this program, below where a machine puts an initramfs.
pub const MEMORY: u64 = 32 << 20;
pub const MEMORY_END: u64 = 96 << 20;
/// Where both machines have devices, and no memory.
pub const DEVICES: u64 = 0xc000_0000;
pub const DEVICES_END: u64 = 0x1_0000_0000;

fn write_port(port: u16, value: u8) {
    // SAFETY: ports change devices, not memory.
    #[allow(unsafe_code)]
    unsafe {
        asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags));
    }
}

fn read_port(port: u16) -> u8 {
    let value;
    // SAFETY: as above.
    #[allow(unsafe_code)]
    unsafe {
        asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack, preserves_flags));
    }
    value
}

/// Ends the VM.
pub fn end() -> ! {
    loop {
        write_port(KEYBOARD, RESET);
    }
}

/// What begins with this is said of a mistake of the host's, and counted: its console keeps the last lines only.
const WRONG: &str = "WRONG";
static WRONGS: AtomicU32 = AtomicU32::new(0);

/// How many there were.
pub fn wrongs() -> u32 {
    WRONGS.load(Ordering::Relaxed)
}

/// The serial port.
pub struct Console;

impl Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        if text.starts_with(WRONG) {
            WRONGS.fetch_add(1, Ordering::Relaxed);
        }
        for byte in text.bytes() {
            while read_port(SERIAL + LINE_STATUS) & TAKES_BYTE == 0 {}
            write_port(SERIAL, byte);
        }
        Ok(())
    }
}

/// Writes a line to the console.
macro_rules! say {
    ($($arg:tt)*) => {{
        use core::fmt::Write as _;
        // The console takes everything.
        let _ = writeln!($crate::machine::Console, "metal: {}", format_args!($($arg)*));
    }};
}
pub(crate) use say;

/// Cycles since the machine began.
pub fn cycles() -> u64 {
    // SAFETY: reads a counter.
    #[allow(unsafe_code)]
    unsafe {
        core::arch::x86_64::_rdtsc()
    }
}

/// A number as memory and registers hold it.
pub trait Number: Copy {
    /// Reads with one instruction, at any alignment.
    ///
    /// # Safety
    ///
    /// Nothing at the address is an object of this program.
    #[allow(unsafe_code)]
    unsafe fn load(address: u64) -> Self;

    /// Writes, in the same way.
    ///
    /// # Safety
    ///
    /// As for [`Number::load`].
    #[allow(unsafe_code)]
    unsafe fn store(self, address: u64);
}

macro_rules! number {
    ($type:ty, $class:ident, $register:literal) => {
        #[allow(unsafe_code)]
        impl Number for $type {
            unsafe fn load(address: u64) -> Self {
                let value: $type;
                // SAFETY: the caller's; everything is mapped.
                unsafe {
                    asm!(concat!("mov ", $register, ", [{at}]"), at = in(reg) address, value = out($class) value,
                        options(nostack, preserves_flags));
                }
                value
            }

            unsafe fn store(self, address: u64) {
                // SAFETY: the caller's; everything is mapped.
                unsafe {
                    asm!(concat!("mov [{at}], ", $register), at = in(reg) address, value = in($class) self,
                        options(nostack, preserves_flags));
                }
            }
        }
    };
}

number!(u8, reg_byte, "{value}");
number!(u16, reg, "{value:x}");
number!(u32, reg, "{value:e}");
number!(u64, reg, "{value:r}");

/// The address, unless something of this program might be there.
fn checked<T>(address: u64) -> u64 {
    let end = address.saturating_add(size_of::<T>() as u64);
    let own = (MEMORY..MEMORY_END).contains(&address) && end <= MEMORY_END;
    let device = (DEVICES..DEVICES_END).contains(&address) && end <= DEVICES_END;
    assert!(own || device, "address {address:#x}");
    address
}

/// Reads memory of the scenes, or a device's register.
pub fn peek<T: Number>(address: u64) -> T {
    // SAFETY: `checked` lets pass what no object of this program is in.
    #[allow(unsafe_code)]
    unsafe {
        T::load(checked::<T>(address))
    }
}

/// Writes memory of the scenes, or a device's register.
pub fn poke<T: Number>(address: u64, value: T) {
    // SAFETY: as for `peek`.
    #[allow(unsafe_code)]
    unsafe {
        value.store(checked::<T>(address));
    }
}

/// Writes bytes.
pub fn poke_bytes(address: u64, bytes: &[u8]) {
    for (at, byte) in (address..).zip(bytes) {
        poke(at, *byte);
    }
}

/// Fills memory with zeros.
pub fn clear(address: u64, bytes: u64) {
    for at in (address..address + bytes).step_by(8) {
        poke(at, 0u64);
    }
}

/// Everything that was written before is seen by devices before what is written after.
pub fn fence() {
    atomic_fence(Ordering::SeqCst);
}

/// Waits for an interrupt; there is none.
pub fn halt() {
    // SAFETY: changes nothing.
    #[allow(unsafe_code)]
    unsafe {
        asm!("hlt", options(nomem, nostack, preserves_flags));
    }
}
