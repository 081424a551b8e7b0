//! Short programs on a real KVM. They have no device and no interrupt, so that also a KVM that runs no kernel runs
//! them.

use std::{
    io::{self, Write},
    os::fd::AsFd,
    sync::mpsc,
    time::Duration,
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::*;

/// Where the programs are linked to be.
const AT: u64 = 0x100_0000;

/// An ELF file of one segment, which is entered at its first byte.
fn program(code: &[u8]) -> File {
    let mut elf = Vec::new();
    elf.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    for half in [2u16, 62] {
        elf.extend(half.to_le_bytes());
    }
    elf.extend(1u32.to_le_bytes());
    for long in [AT, 64, 0] {
        elf.extend(long.to_le_bytes());
    }
    elf.extend(0u32.to_le_bytes());
    for half in [64u16, 56, 1, 0, 0, 0] {
        elf.extend(half.to_le_bytes());
    }
    // Its only segment, to be loaded.
    elf.extend(1u32.to_le_bytes());
    elf.extend(7u32.to_le_bytes());
    let size = code.len() as u64;
    for long in [120, AT, AT, size, size, 4096] {
        elf.extend(long.to_le_bytes());
    }
    elf.extend(code);
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&elf).unwrap();
    file
}

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

/// Runs a program to its end; `None` where there is no KVM to run it.
fn run(code: &[u8]) -> Option<(End, Vec<u8>)> {
    if let Err(e) = Kvm::new() {
        vz_tally::skip!("open /dev/kvm: {e}");
        return None;
    }
    let (kernel, initramfs) = (program(code), tempfile::tempfile().unwrap());
    let config = Config { vcpus: 1, memory: 32 << 20, kernel: &kernel, initramfs: &initramfs, cmdline: "quiet" };
    let machine = Machine::new(&config).unwrap();
    let ending = machine.ending().clone();
    let (say, said) = mpsc::channel();
    let on_failure: OnFailure = Arc::new(|message| panic!("{message}"));
    let running = machine.start(Vec::new(), Box::new(Said(say)), [7; 16], &on_failure).unwrap();
    let mut fds = [PollFd::new(ending.as_fd(), PollFlags::POLLIN)];
    let limit = PollTimeout::try_from(Duration::from_secs(20)).unwrap();
    assert_eq!(poll(&mut fds, limit).unwrap(), 1, "the program does not end");
    let end = ending.reason().unwrap().clone();
    drop(running);
    Some((end, said.try_iter().collect()))
}

#[test]
fn a_program_powers_off() {
    // mov dx, 0x600; mov al, 0x34; out dx, al; hlt
    let Some((end, _)) = run(b"\x66\xba\x00\x06\xb0\x34\xee\xf4") else { return };
    assert_eq!(end, End::PowerOff);
}

#[test]
fn a_program_speaks_over_the_serial_port_and_resets() {
    // mov dx, 0x3f8; mov al, 'o'; out dx, al; mov al, 'k'; out dx, al; mov dx, 0x602; mov al, 1; out dx, al; hlt
    let code = b"\x66\xba\xf8\x03\xb0\x6f\xee\xb0\x6b\xee\x66\xba\x02\x06\xb0\x01\xee\xf4";
    let Some((end, said)) = run(code) else { return };
    assert_eq!((end, said.as_slice()), (End::Reset, b"ok".as_slice()));
}

#[test]
fn a_program_is_told_where_the_boot_parameters_are() {
    // mov eax, [rsi + 0x202]; mov dx, 0x3f8; then the four bytes: out dx, al; shr eax, 8; ...; and a reset
    let code = b"\x8b\x86\x02\x02\x00\x00\x66\xba\xf8\x03\xee\xc1\xe8\x08\xee\xc1\xe8\x08\xee\xc1\xe8\x08\xee\
        \x66\xba\x02\x06\xb0\x01\xee\xf4";
    let Some((end, said)) = run(code) else { return };
    assert_eq!((end, said.as_slice()), (End::Reset, b"HdrS".as_slice()));
}

#[test]
fn a_program_without_handlers_dies_of_its_first_exception() {
    // ud2
    let Some((end, _)) = run(b"\x0f\x0b") else { return };
    let End::TripleFault(at) = &end else { panic!("{end}") };
    assert_eq!((at.vcpu, at.cr3), (0, layout::PML4));
    assert!(!end.is_orderly() && end.to_string().contains("triple fault"));
}

#[test]
fn machines_of_impossible_sizes_are_refused() {
    let (kernel, initramfs) = (program(b"\xf4"), tempfile::tempfile().unwrap());
    for vcpus in [0, 255, 1000] {
        let config = Config { vcpus, memory: 32 << 20, kernel: &kernel, initramfs: &initramfs, cmdline: "" };
        assert!(matches!(Machine::new(&config), Err(Error::Vcpus(n)) if n == vcpus));
    }
}
