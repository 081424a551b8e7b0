//! Which devices a container may use: the spec's rules as a BPF program on its cgroup, as runc does it.
//!
//! libcontainer can do this only with libbpf, which is larger than all of it.

use std::{fs::File, io, path::Path};

use libcontainer::oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType, Spec};
use vz_sys::bpf::{Instruction, attach_device_filter, load_device_filter};

/// `BPF_DEVCG_ACC_*` of linux/bpf.h.
const MKNOD: u8 = 1;
const READ: u8 = 2;
const WRITE: u8 = 4;
const ALL: u8 = MKNOD | READ | WRITE;

/// One rule. A later one outweighs an earlier one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Rule {
    allow: bool,
    kind: Kind,
    /// `None` is any.
    major: Option<i32>,
    minor: Option<i32>,
    access: u8,
}

/// `BPF_DEVCG_DEV_*`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Any = 0,
    Block = 1,
    Char = 2,
}

const fn allowed(kind: Kind, major: Option<i32>, minor: Option<i32>, access: u8) -> Rule {
    Rule { allow: true, kind, major, minor, access }
}

/// What every container may use, as with runc: make nodes of any device, and use the harmless ones.
const ALWAYS: [Rule; 10] = [
    allowed(Kind::Char, None, None, MKNOD),
    allowed(Kind::Block, None, None, MKNOD),
    allowed(Kind::Char, Some(1), Some(3), ALL),
    allowed(Kind::Char, Some(1), Some(8), ALL),
    allowed(Kind::Char, Some(1), Some(7), ALL),
    allowed(Kind::Char, Some(5), Some(0), ALL),
    allowed(Kind::Char, Some(1), Some(5), ALL),
    allowed(Kind::Char, Some(1), Some(9), ALL),
    // Terminals and their multiplexer.
    allowed(Kind::Char, Some(136), None, ALL),
    allowed(Kind::Char, Some(5), Some(2), ALL),
];

/// Restricts a created container's cgroup to the devices of its spec.
pub fn restrict(spec: &Spec, cgroup: &Path) -> io::Result<()> {
    let given = spec.linux().as_ref().and_then(|l| l.resources().as_ref()).and_then(|r| r.devices().as_ref());
    let rules: Vec<_> = given.into_iter().flatten().map(rule).chain(ALWAYS).collect();
    attach_device_filter(File::open(cgroup)?, load_device_filter(&program(&rules))?)
}

fn rule(given: &LinuxDeviceCgroup) -> Rule {
    let number = |n: Option<i64>| n.filter(|n| *n >= 0).and_then(|n| i32::try_from(n).ok());
    let access = given.access().as_deref().unwrap_or("rwm");
    let bit = |letter, bit| if access.contains(letter) { bit } else { 0 };
    Rule {
        allow: given.allow(),
        kind: match given.typ() {
            Some(LinuxDeviceType::B) => Kind::Block,
            Some(LinuxDeviceType::C | LinuxDeviceType::U) => Kind::Char,
            _ => Kind::Any,
        },
        major: number(given.major()),
        minor: number(given.minor()),
        access: bit('m', MKNOD) | bit('r', READ) | bit('w', WRITE),
    }
}

// Registers: 0 is the answer, 1 the context at first and scratch afterwards, 2 the device's kind, 3 the access, 4 and 5
// major and minor number.
const LOAD_WORD: u8 = 0x61;
const MOVE: u8 = 0xbc;
const MOVE_CONSTANT: u8 = 0xb4;
const AND_CONSTANT: u8 = 0x54;
const SHIFT_RIGHT: u8 = 0x74;
const JUMP_UNEQUAL: u8 = 0x5e;
const JUMP_UNEQUAL_CONSTANT: u8 = 0x56;
const JUMP_EQUAL_CONSTANT: u8 = 0x16;
const EXIT: u8 = 0x95;

fn instruction(code: u8, to: u8, from: u8, offset: i16, constant: i32) -> Instruction {
    Instruction { code, registers: to | from.wrapping_shl(4), offset, constant }
}

/// The last rule that matches decides; without one the answer is no.
fn program(rules: &[Rule]) -> Vec<Instruction> {
    // struct bpf_cgroup_dev_ctx: kind and access in one word, major, minor.
    let mut program = vec![
        instruction(LOAD_WORD, 2, 1, 0, 0),
        instruction(AND_CONSTANT, 2, 0, 0, 0xffff),
        instruction(LOAD_WORD, 3, 1, 0, 0),
        instruction(SHIFT_RIGHT, 3, 0, 0, 16),
        instruction(LOAD_WORD, 4, 1, 4, 0),
        instruction(LOAD_WORD, 5, 1, 8, 0),
    ];
    for rule in rules.iter().rev() {
        let mut tests = Vec::new();
        if rule.kind != Kind::Any {
            tests.push(instruction(JUMP_UNEQUAL_CONSTANT, 2, 0, 0, rule.kind as i32));
        }
        if rule.access != ALL {
            tests.push(instruction(MOVE, 1, 3, 0, 0));
            tests.push(instruction(AND_CONSTANT, 1, 0, 0, rule.access.into()));
            // Allowed is what is allowed altogether, denied what is denied in part.
            tests.push(if rule.allow {
                instruction(JUMP_UNEQUAL, 1, 3, 0, 0)
            } else {
                instruction(JUMP_EQUAL_CONSTANT, 1, 0, 0, 0)
            });
        }
        for (register, number) in [(4, rule.major), (5, rule.minor)] {
            tests.extend(number.map(|n| instruction(JUMP_UNEQUAL_CONSTANT, register, 0, 0, n)));
        }
        let always = tests.is_empty();
        // A test that fails goes on behind this rule: over the tests that follow it, and its two last instructions.
        for (index, test) in tests.iter_mut().rev().enumerate() {
            if matches!(test.code, JUMP_UNEQUAL | JUMP_UNEQUAL_CONSTANT | JUMP_EQUAL_CONSTANT) {
                test.offset = i16::try_from(index).unwrap_or(i16::MAX).saturating_add(2);
            }
        }
        program.extend(tests);
        program.push(instruction(MOVE_CONSTANT, 0, 0, 0, rule.allow.into()));
        program.push(instruction(EXIT, 0, 0, 0, 0));
        if always {
            // The kernel refuses a program with code that is never reached.
            return program;
        }
    }
    program.push(instruction(MOVE_CONSTANT, 0, 0, 0, 0));
    program.push(instruction(EXIT, 0, 0, 0, 0));
    program
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the kernel would answer.
    fn run(program: &[Instruction], kind: Kind, major: i32, minor: i32, access: u8) -> bool {
        let mut r = [0i32; 6];
        let mut at = 0usize;
        loop {
            let i = program[at];
            let (to, from) = (usize::from(i.registers & 15), usize::from(i.registers >> 4));
            at += 1;
            let jump = match i.code {
                LOAD_WORD => {
                    r[to] =
                        [kind as i32 | i32::from(access) << 16, major, minor][usize::try_from(i.offset).unwrap() / 4];
                    false
                }
                MOVE => {
                    r[to] = r[from];
                    false
                }
                MOVE_CONSTANT => {
                    r[to] = i.constant;
                    false
                }
                AND_CONSTANT => {
                    r[to] &= i.constant;
                    false
                }
                SHIFT_RIGHT => {
                    r[to] >>= i.constant;
                    false
                }
                JUMP_UNEQUAL => r[to] != r[from],
                JUMP_UNEQUAL_CONSTANT => r[to] != i.constant,
                JUMP_EQUAL_CONSTANT => r[to] == i.constant,
                EXIT => return r[0] != 0,
                other => panic!("{other:#x}"),
            };
            if jump {
                at += usize::try_from(i.offset).unwrap();
            }
        }
    }

    fn of(json: &str) -> Vec<Instruction> {
        let given: Vec<LinuxDeviceCgroup> = serde_json::from_str(json).unwrap();
        program(&given.iter().map(rule).chain(ALWAYS).collect::<Vec<_>>())
    }

    #[test]
    fn the_usual_container_has_the_harmless_devices_only() {
        let program = of(r#"[{"allow":false,"access":"rwm"}]"#);
        assert!(run(&program, Kind::Char, 1, 3, READ | WRITE));
        assert!(run(&program, Kind::Char, 136, 7, READ | WRITE));
        assert!(run(&program, Kind::Block, 254, 0, MKNOD));
        assert!(!run(&program, Kind::Block, 254, 0, READ));
        assert!(!run(&program, Kind::Char, 1, 1, READ));
        assert!(!run(&program, Kind::Char, 10, 229, MKNOD | WRITE));
    }

    #[test]
    fn later_rules_outweigh_earlier_ones() {
        let program = of(r#"[{"allow":false,"access":"rwm"},{"allow":true,"type":"b","major":254,"access":"rwm"},
                {"allow":false,"type":"b","major":254,"minor":1,"access":"w"}]"#);
        assert!(run(&program, Kind::Block, 254, 0, READ | WRITE));
        assert!(run(&program, Kind::Block, 254, 1, READ));
        assert!(!run(&program, Kind::Block, 254, 1, READ | WRITE));
        assert!(!run(&program, Kind::Char, 254, 0, READ));
    }

    #[test]
    fn everything_may_be_allowed() {
        let program = of(r#"[{"allow":false,"access":"rwm"},{"allow":true,"access":"rwm"}]"#);
        assert!(run(&program, Kind::Block, 8, 0, ALL));
        assert!(!run(&of("[]"), Kind::Block, 8, 0, READ));
    }
}
