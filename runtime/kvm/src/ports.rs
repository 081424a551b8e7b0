//! The few I/O ports of a PC that this machine has: a serial port, the keyboard controller's reset, ACPI's power
//! switch.

use std::{
    io::{self, Write},
    sync::Mutex,
};

use vm_superio::{Serial, Trigger, serial::NoEvents};
use vmm_sys_util::eventfd::EventFd;
use vz_sys::sync::lock;

use crate::{
    End, Error,
    acpi::{RESET_VALUE, SLEEP_OFF},
    layout::port,
};

/// Interrupt line of the first serial port of a PC.
pub(crate) const SERIAL_GSI: u32 = 4;
/// Registers of a serial port.
const SERIAL_SIZE: u16 = 8;
/// The keyboard controller's command that pulls the processor's reset line.
const PULSE_RESET: u8 = 0xfe;
/// `SLP_EN` of the sleep control register; the sleep type is left of bit 2.
const SLEEP_ENABLE: u8 = 1 << 5;

struct SerialLine(EventFd);

impl Trigger for SerialLine {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Where the serial port's bytes go. A reader that is slow loses some: the guest does not wait for it.
pub(crate) type Output = Box<dyn Write + Send>;

/// The ports.
pub(crate) struct Ports {
    serial: Mutex<Serial<SerialLine, NoEvents, Output>>,
}

impl std::fmt::Debug for Ports {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ports").finish_non_exhaustive()
    }
}

impl Ports {
    /// `line` is the serial port's interrupt.
    pub(crate) fn new(line: &EventFd, output: Output) -> Result<Self, Error> {
        let line = line.try_clone().map_err(Error::system("duplicate eventfd"))?;
        Ok(Self { serial: Mutex::new(Serial::new(SerialLine(line), output)) })
    }

    /// The guest reads; a port without a device reads as all ones.
    pub(crate) fn read(&self, port: u16, bytes: &mut [u8]) {
        bytes.fill(0xff);
        let [byte] = bytes else { return };
        if let Some(register) = serial_register(port) {
            *byte = lock(&self.serial).read(register);
        } else if matches!(port, port::SLEEP_CONTROL | port::SLEEP_STATUS | port::KEYBOARD) {
            // For the keyboard controller: its input buffer is empty, so it takes a command.
            *byte = 0;
        }
    }

    /// The guest writes; returns how that ends the machine, where it does.
    pub(crate) fn write(&self, port: u16, bytes: &[u8]) -> Option<End> {
        let [byte] = bytes else { return None };
        if let Some(register) = serial_register(port) {
            // What cannot be written is lost; see `Output`.
            drop(lock(&self.serial).write(register, *byte));
            return None;
        }
        match (port, *byte) {
            (port::KEYBOARD, PULSE_RESET) | (port::RESET, RESET_VALUE) => Some(End::Reset),
            (port::SLEEP_CONTROL, value) if value == SLEEP_ENABLE | SLEEP_OFF << 2 => Some(End::PowerOff),
            _ => None,
        }
    }
}

fn serial_register(port: u16) -> Option<u8> {
    let register = port.checked_sub(port::SERIAL).filter(|register| *register < SERIAL_SIZE)?;
    u8::try_from(register).ok()
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, mpsc};

    use super::*;

    struct Said(mpsc::Sender<u8>);

    impl Write for Said {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            for byte in bytes {
                self.0.send(*byte).map_err(io::Error::other)?;
            }
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn the_serial_port_says_what_is_written_to_it() {
        let (say, said) = mpsc::channel();
        let line = EventFd::new(0).unwrap();
        let ports = Arc::new(Ports::new(&line, Box::new(Said(say))).unwrap());
        for byte in b"hi" {
            assert_eq!(ports.write(port::SERIAL, &[*byte]), None);
        }
        assert_eq!(said.try_iter().collect::<Vec<_>>(), b"hi");
        // The line status says that there is room for more.
        let mut status = [0];
        ports.read(port::SERIAL + 5, &mut status);
        assert_eq!(status[0] & 0x60, 0x60);
    }

    #[test]
    fn a_guest_can_power_off_and_reset_and_nothing_else() {
        let ports = Ports::new(&EventFd::new(0).unwrap(), Box::new(io::sink())).unwrap();
        assert_eq!(ports.write(port::SLEEP_CONTROL, &[0x34]), Some(End::PowerOff));
        assert_eq!(ports.write(port::SLEEP_CONTROL, &[0x30]), None);
        assert_eq!(ports.write(port::RESET, &[1]), Some(End::Reset));
        assert_eq!(ports.write(port::KEYBOARD, &[0xfe]), Some(End::Reset));
        assert_eq!(ports.write(port::KEYBOARD, &[0xfe, 0xfe]), None);
        for port in 0..=u16::MAX {
            assert_eq!(ports.write(port, &[0]), None);
        }
        let mut bytes = [0; 4];
        ports.read(0x1234, &mut bytes);
        assert_eq!(bytes, [0xff; 4]);
    }
}
