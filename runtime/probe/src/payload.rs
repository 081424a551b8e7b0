//! What the guest executes, and what its exits say.
//!
//! ```text
//! start: f3 48 0f b8 c3        popcnt rax, rbx             rbx: BITS
//!        e7 e0                 out 0xe0, eax
//!        b8 01 00 00 00        mov eax, 1
//!        ba 02 00 00 00        mov edx, 2
//!        bb 03 00 00 00        mov ebx, 3
//!        b9 04 00 00 00        mov ecx, 4
//!        f0 48 0f c7 0f        lock cmpxchg16b [rdi]       rdi: DATA, whose first 16 bytes are edx:eax
//!        0f 94 c0              sete al
//!        0f b6 c0              movzx eax, al
//!        e7 e1                 out 0xe1, eax
//!        f3 0f 6f 0f           movdqu xmm1, [rdi]          now ecx:ebx
//!        66 0f ef 4f 10        pxor xmm1, [rdi + 16]
//!        66 0f 7e c8           movd eax, xmm1
//!        e7 e2                 out 0xe2, eax
//! batch: 89 f1                 mov ecx, esi                esi: ITERATIONS
//! again: ff c9                 dec ecx
//!        75 fc                 jne again
//!        e7 e3                 out 0xe3, eax
//!        eb f6                 jmp batch                   until the host has seen enough
//! ```

use std::time::Duration;

use crate::{Speed, Unusable};

const CODE: [u8; 66] = [
    0xf3, 0x48, 0x0f, 0xb8, 0xc3, 0xe7, 0xe0, 0xb8, 1, 0, 0, 0, 0xba, 2, 0, 0, 0, 0xbb, 3, 0, 0, 0, 0xb9, 4, 0, 0, 0,
    0xf0, 0x48, 0x0f, 0xc7, 0x0f, 0x0f, 0x94, 0xc0, 0x0f, 0xb6, 0xc0, 0xe7, 0xe1, 0xf3, 0x0f, 0x6f, 0x0f, 0x66, 0x0f,
    0xef, 0x4f, 0x10, 0x66, 0x0f, 0x7e, 0xc8, 0xe7, 0xe2, 0x89, 0xf1, 0xff, 0xc9, 0x75, 0xfc, 0xe7, 0xe3, 0xeb, 0xf6,
    0xf4,
];
/// Where the loop begins in it.
const BATCH: usize = 0x37;
/// Instructions that a guest's kernel or programs have and emulators lack, with their bytes in [`CODE`].
const SPECIAL: [(&str, &[u8]); 3] = [
    ("popcnt", &[0xf3, 0x48, 0x0f, 0xb8, 0xc3]),
    ("cmpxchg16b", &[0xf0, 0x48, 0x0f, 0xc7, 0x0f]),
    ("pxor", &[0x66, 0x0f, 0xef, 0x4f, 0x10]),
];

/// `rbx` at the start: 32 bits are set.
pub(crate) const BITS: u64 = 0x00ff_00ff_0f0f_3355;
/// At `rdi`: what is compared, then what is xored with.
pub(crate) const DATA: [u64; 4] = [1, 2, MASK as u64, 0];
const MASK: u32 = 0x5a5a_a5a5;
/// `esi`: a processor needs some ten microseconds for this many, an emulator ten milliseconds.
pub(crate) const ITERATIONS: u32 = 10_000;
/// The fastest of these counts.
const BATCHES: u32 = 4;
/// More CPU time than this for an iteration is an emulator's. Emulators need 500 ns and more, processors less than one,
/// and processors that are emulated themselves some twenty.
const SLOWEST: Duration = Duration::from_nanos(300);

/// What the guest tells at which port, and what it must be.
const ANSWERS: [(u16, &str, u32); 3] =
    [(0xe0, "popcnt", BITS.count_ones()), (0xe1, "cmpxchg16b", 1), (0xe2, "pxor", 3 ^ MASK)];
const BATCH_PORT: u16 = 0xe3;

/// A guest's program, position-independent.
#[derive(Debug, Clone, Copy)]
pub struct Payload<'a> {
    code: &'a [u8],
    answers: usize,
}

impl Default for Payload<'_> {
    fn default() -> Self {
        Self { code: &CODE, answers: ANSWERS.len() }
    }
}

impl<'a> Payload<'a> {
    /// Only the part whose time is taken.
    pub fn timing() -> Self {
        Self { code: CODE.get(BATCH..).unwrap_or_default(), answers: 0 }
    }

    /// A program of the caller's, at most a page long, that is expected to time the loop as the last part of the
    /// default one does.
    pub fn new(code: &'a [u8]) -> Self {
        Self { code, answers: 0 }
    }

    pub(crate) fn code(&self) -> &'a [u8] {
        self.code
    }

    /// Whoever judges its exits.
    pub(crate) fn judge(&self) -> Judge {
        let answers = ANSWERS.get(ANSWERS.len().saturating_sub(self.answers)..).unwrap_or_default();
        Judge { answers, batches: 0, begun: Duration::ZERO, fastest: None }
    }
}

/// The name of one of the special instructions, from its first bytes.
pub(crate) fn name(bytes: &[u8]) -> Option<&'static str> {
    SPECIAL.iter().find(|(_, code)| bytes.starts_with(code)).map(|(name, _)| *name)
}

/// `bytes` without what follows the first instruction, where that is a special one.
pub(crate) fn whole(bytes: &[u8]) -> &[u8] {
    SPECIAL.iter().find(|(_, code)| bytes.starts_with(code)).map_or(bytes, |(_, code)| code)
}

/// Why a guest was left.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Exit {
    /// It wrote to a port.
    Out { port: u16, value: u32 },
    /// KVM gave up.
    Internal { suberror: u32, bytes: Vec<u8> },
    /// Triple fault.
    Shutdown,
    /// It could not be entered.
    FailEntry { reason: u64, cpu: u32 },
    /// Anything else.
    Other(String),
}

/// Follows a guest from exit to exit.
#[derive(Debug)]
pub(crate) struct Judge {
    /// Those that are still to come.
    answers: &'static [(u16, &'static str, u32)],
    batches: u32,
    begun: Duration,
    fastest: Option<Duration>,
}

impl Judge {
    /// Takes an exit, at this much CPU time of the vCPU. `None` is to go on.
    pub(crate) fn take(&mut self, exit: Exit, at: Duration) -> Option<Result<Speed, Unusable>> {
        let (port, found) = match exit {
            Exit::Out { port, value } => (port, value),
            Exit::Internal { suberror, bytes } => {
                return Some(Err(Unusable::InternalError { suberror, bytes: whole(&bytes).to_vec() }));
            }
            Exit::Shutdown => return Some(Err(Unusable::TripleFault)),
            Exit::FailEntry { reason, cpu } => return Some(Err(Unusable::Entry { reason, cpu })),
            Exit::Other(exit) => return Some(Err(Unusable::Exit { exit })),
        };
        match self.answers {
            [(expected, instruction, wanted), rest @ ..] if port == *expected => {
                if found != *wanted {
                    let instruction = (*instruction).to_owned();
                    return Some(Err(Unusable::Wrong { instruction, wanted: *wanted, found }));
                }
                self.answers = rest;
            }
            [] if port == BATCH_PORT => {
                let took = at.saturating_sub(self.begun);
                self.fastest = Some(self.fastest.map_or(took, |fastest| fastest.min(took)));
                self.batches = self.batches.saturating_add(1);
                if self.batches >= BATCHES {
                    return Some(speed(self.fastest.unwrap_or(took)));
                }
            }
            _ => return Some(Err(Unusable::Exit { exit: format!("write of {found:#x} to port {port:#x}") })),
        }
        self.begun = at;
        None
    }

    /// The guest is entered for the first time, at this much CPU time.
    pub(crate) fn begin(&mut self, at: Duration) {
        self.begun = at;
    }
}

fn speed(batch: Duration) -> Result<Speed, Unusable> {
    let ps = batch.as_nanos().saturating_mul(1000) / u128::from(ITERATIONS);
    let loop_ps = u64::try_from(ps).unwrap_or(u64::MAX);
    if u128::from(loop_ps) > SLOWEST.as_nanos().saturating_mul(1000) {
        return Err(Unusable::TooSlow { loop_ps });
    }
    Ok(Speed { loop_ps })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn out(port: u16, value: u32) -> Exit {
        Exit::Out { port, value }
    }

    /// Takes exits, each this long after the one before.
    fn judge(payload: &Payload<'_>, each: Duration, exits: &[Exit]) -> Option<Result<Speed, Unusable>> {
        let mut judge = payload.judge();
        judge.begin(MS);
        let mut at = MS;
        exits.iter().find_map(|exit| {
            at += each;
            judge.take(exit.clone(), at)
        })
    }

    fn answers() -> Vec<Exit> {
        vec![out(0xe0, 32), out(0xe1, 1), out(0xe2, 3 ^ MASK)]
    }

    #[test]
    fn the_code_has_its_parts_where_they_are_said_to_be() {
        assert_eq!(CODE[BATCH..BATCH + 2], [0x89, 0xf1]);
        for (name, code) in SPECIAL {
            assert_eq!(CODE.windows(code.len()).filter(|window| *window == code).count(), 1, "{name}");
        }
        assert_eq!(BITS.count_ones(), 32);
    }

    #[test]
    fn a_processor_is_told_from_an_emulator() {
        let exits = [answers(), vec![out(0xe3, 0); 4]].concat();
        // 3 us for 10000 iterations.
        let found = judge(&Payload::default(), Duration::from_micros(3), &exits);
        assert_eq!(found, Some(Ok(Speed { loop_ps: 300 })));
        let found = judge(&Payload::default(), 14 * MS, &exits);
        assert_eq!(found, Some(Err(Unusable::TooSlow { loop_ps: 1_400_000 })));
        assert_eq!(judge(&Payload::timing(), 3 * MS, &exits[3..]), Some(Ok(Speed { loop_ps: 300_000 })));
    }

    #[test]
    fn the_fastest_batch_counts() {
        let mut judge = Payload::timing().judge();
        judge.begin(Duration::ZERO);
        for at in [10, 20, 21] {
            assert_eq!(judge.take(out(0xe3, 0), at * MS), None);
        }
        assert_eq!(judge.take(out(0xe3, 0), 40 * MS), Some(Ok(Speed { loop_ps: 100_000 })));
    }

    #[test]
    fn each_exit_has_its_reason() {
        let first = |exit| judge(&Payload::default(), MS, &[exit]);
        assert_eq!(first(out(0xe0, 32)), None);
        assert_eq!(first(Exit::Shutdown), Some(Err(Unusable::TripleFault)));
        assert_eq!(first(Exit::FailEntry { reason: 7, cpu: 1 }), Some(Err(Unusable::Entry { reason: 7, cpu: 1 })));
        let internal = Exit::Internal { suberror: 1, bytes: vec![0xf3] };
        assert_eq!(first(internal), Some(Err(Unusable::InternalError { suberror: 1, bytes: vec![0xf3] })));
        assert_eq!(first(Exit::Other("Hlt".into())), Some(Err(Unusable::Exit { exit: "Hlt".into() })));
    }

    #[test]
    fn a_wrong_answer_and_one_out_of_turn_are_found() {
        let wrong = judge(&Payload::default(), MS, &[out(0xe0, 31)]);
        assert_eq!(wrong, Some(Err(Unusable::Wrong { instruction: "popcnt".into(), wanted: 32, found: 31 })));
        assert!(matches!(judge(&Payload::default(), MS, &[out(0xe3, 0)]), Some(Err(Unusable::Exit { .. }))));
        assert!(matches!(judge(&Payload::timing(), MS, &[out(0xe0, 32)]), Some(Err(Unusable::Exit { .. }))));
    }
}
