//! Values that are worth trying.

use arbitrary::{Arbitrary, Result, Unstructured};

/// Bytes: some that the fuzzer chose, or many of one kind.
#[derive(Debug, Clone)]
pub(crate) struct Bytes(pub(crate) Vec<u8>);

impl<'a> Arbitrary<'a> for Bytes {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        let len = u8::arbitrary(u)?;
        Ok(Self(match len {
            0..=0xef => u.bytes(usize::from(len).min(u.len()))?.to_vec(),
            _ => vec![len; usize::from(u16::arbitrary(u)?)],
        }))
    }

    fn size_hint(_depth: usize) -> (usize, Option<usize>) {
        (1, None)
    }
}

/// A number that is small, on an edge, or any.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Number(pub(crate) u64);

impl<'a> Arbitrary<'a> for Number {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        let small = u8::arbitrary(u)?;
        Ok(Self(match small {
            0..=0xdf => small.into(),
            0xe0..=0xe7 => 1 << (8 * u32::from(small - 0xe0)),
            0xe8..=0xef => (1u64 << (8 * u32::from(small - 0xe8))).wrapping_sub(1),
            0xf0..=0xf7 => u64::from(u16::arbitrary(u)?),
            0xf8..=0xfb => u64::from(u32::arbitrary(u)?),
            0xfc..=0xfd => u64::MAX,
            _ => u64::arbitrary(u)?,
        }))
    }

    fn size_hint(_depth: usize) -> (usize, Option<usize>) {
        (1, Some(9))
    }
}

impl Number {
    pub(crate) fn u32(self) -> u32 {
        u32::try_from(self.0 & 0xffff_ffff).unwrap()
    }

    pub(crate) fn u16(self) -> u16 {
        u16::try_from(self.0 & 0xffff).unwrap()
    }
}
