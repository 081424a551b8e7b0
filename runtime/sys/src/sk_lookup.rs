//! A listener for all ports of a network namespace's loopback addresses, by a BPF program that chooses sockets
//! (`sk_lookup`).
//!
//! No port is taken and no firewall has a rule. The program is asked when a connection arrives, and is gone when its
//! descriptor is closed.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
};

use crate::bpf::Instruction;

/// Commands of bpf(2).
const MAP_CREATE: libc::c_int = 0;
const MAP_UPDATE: libc::c_int = 2;
const PROG_LOAD: libc::c_int = 5;
const LINK_CREATE: libc::c_int = 28;
/// `BPF_MAP_TYPE_SOCKMAP`, `BPF_PROG_TYPE_SK_LOOKUP` and the `BPF_SK_LOOKUP` to attach as.
const SOCKMAP: u32 = 15;
const SK_LOOKUP: u32 = 30;
const ATTACH_SK_LOOKUP: u32 = 36;
/// Functions that a program can call.
const MAP_LOOKUP: i32 = 1;
const SK_RELEASE: i32 = 86;
const SK_ASSIGN: i32 = 124;
/// Offsets in `struct bpf_sk_lookup`.
const FAMILY: i16 = 8;
const PROTOCOL: i16 = 12;
const LOCAL_IP4: i16 = 40;
const LOCAL_IP6: i16 = 44;

/// Connections to loopback addresses go to one listener while this lives.
#[derive(Debug)]
pub struct Steering {
    _link: OwnedFd,
}

/// Directs TCP connections to 127.0.0.0/8 and ::1, whatever their port, to a listener of the same network namespace.
/// For both families it must be of IPv6 and not for that only.
///
/// Listeners on those ports, if any, get no connections any more. `Unsupported` or `InvalidInput`: a kernel before 5.9.
pub fn loopback(netns: BorrowedFd<'_>, listener: BorrowedFd<'_>) -> io::Result<Steering> {
    let map = call(MAP_CREATE, &MapCreate { kind: SOCKMAP, key_size: 4, value_size: 8, entries: 1, flags: 0 })?;
    let (key, value) = (0u32, u64::try_from(listener.as_raw_fd()).unwrap_or_default());
    let update = MapUpdate {
        map: descriptor(map.as_fd()),
        pad: 0,
        key: (&raw const key) as u64,
        value: (&raw const value) as u64,
        flags: 0,
    };
    // SAFETY: the attribute and what it points to live for the whole call; the kernel only reads them.
    #[allow(unsafe_code)]
    let done = unsafe { libc::syscall(libc::SYS_bpf, MAP_UPDATE, &raw const update, size_of::<MapUpdate>()) };
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    let program = program(map.as_raw_fd());
    let load = Load {
        kind: SK_LOOKUP,
        count: u32::try_from(program.len()).unwrap_or_default(),
        instructions: program.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        unused: [0; 11],
        attach: ATTACH_SK_LOOKUP,
    };
    let program = call(PROG_LOAD, &load)?;
    let link = LinkCreate {
        program: descriptor(program.as_fd()),
        target: descriptor(netns),
        attach: ATTACH_SK_LOOKUP,
        flags: 0,
    };
    Ok(Steering { _link: call(LINK_CREATE, &link)? })
}

fn descriptor(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd().cast_unsigned()
}

#[repr(C)]
struct MapCreate {
    kind: u32,
    key_size: u32,
    value_size: u32,
    entries: u32,
    flags: u32,
}

#[repr(C)]
struct MapUpdate {
    map: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[repr(C)]
struct Load {
    kind: u32,
    count: u32,
    instructions: u64,
    license: u64,
    /// Log, kernel version, flags, name, interface.
    unused: [u32; 11],
    attach: u32,
}

#[repr(C)]
struct LinkCreate {
    program: u32,
    target: u32,
    attach: u32,
    flags: u32,
}

/// Calls of bpf(2) that make a descriptor.
fn call<T>(command: libc::c_int, attribute: &T) -> io::Result<OwnedFd> {
    // SAFETY: the attribute, and what it points to, live for the whole call; the kernel only reads them.
    #[allow(unsafe_code)]
    let fd = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attribute), size_of::<T>()) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    let raw = RawFd::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made this descriptor for us, close-on-exec.
    #[allow(unsafe_code)]
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

const fn instruction(code: u8, to: u8, from: u8, offset: i16, constant: i32) -> Instruction {
    Instruction { code, registers: to | from << 4, offset, constant }
}

/// Passes everything on (returns 1), after choosing the listener for what is meant for it.
fn program(map: RawFd) -> Vec<Instruction> {
    let load = |to, from, offset| instruction(0x61, to, from, offset, 0);
    let copy = |to, from| instruction(0xbf, to, from, 0, 0);
    let set = |to, constant| instruction(0xb7, to, 0, 0, constant);
    let call = |function| instruction(0x85, 0, 0, 0, function);
    let unless = |register, constant, skip| instruction(0x55, register, 0, skip, constant);
    let first = |byte: u8| i32::from_ne_bytes([byte, 0, 0, 0]);
    vec![
        copy(6, 1),
        load(0, 6, PROTOCOL),
        unless(0, libc::IPPROTO_TCP, 28),
        load(0, 6, FAMILY),
        unless(0, libc::AF_INET, 4),
        // 127.0.0.0/8
        load(0, 6, LOCAL_IP4),
        instruction(0x54, 0, 0, 0, first(0xff)),
        unless(0, first(127), 23),
        instruction(0x05, 0, 0, 8, 0),
        // ::1
        load(0, 6, LOCAL_IP6),
        unless(0, 0, 20),
        load(0, 6, LOCAL_IP6 + 4),
        unless(0, 0, 18),
        load(0, 6, LOCAL_IP6 + 8),
        unless(0, 0, 16),
        load(0, 6, LOCAL_IP6 + 12),
        unless(0, i32::from_ne_bytes([0, 0, 0, 1]), 14),
        // The listener, out of the map.
        instruction(0x62, 10, 0, -4, 0),
        copy(2, 10),
        instruction(0x07, 2, 0, 0, -4),
        instruction(0x18, 1, 1, 0, map),
        instruction(0, 0, 0, 0, 0),
        call(MAP_LOOKUP),
        instruction(0x15, 0, 0, 7, 0),
        copy(7, 0),
        copy(1, 6),
        copy(2, 7),
        set(3, 0),
        call(SK_ASSIGN),
        copy(1, 7),
        call(SK_RELEASE),
        set(0, 1),
        instruction(0x95, 0, 0, 0, 0),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_jump_that_gives_up_ends_at_the_same_place() {
        let program = program(9);
        let end = program.len() - 2;
        for (at, instruction) in program.iter().enumerate() {
            if matches!(instruction.code, 0x55 | 0x15) && instruction.offset > 4 {
                assert_eq!(at + 1 + usize::try_from(instruction.offset).unwrap(), end, "instruction {at}");
            }
        }
        // The other family, and past it.
        assert_eq!((program[4].offset, program[8].offset), (4, 8));
    }
}
