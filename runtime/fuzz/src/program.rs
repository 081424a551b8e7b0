//! What a hostile driver does, step by step: mostly what a good one would, so that it gets somewhere.

use arbitrary::{Arbitrary, Unstructured};

use crate::{
    guest::{HIGH, LOW},
    values::{Bytes, Number},
};

#[derive(Debug)]
pub(crate) enum Step<D, H> {
    /// What a good driver does.
    Ask(D),
    Chain(Chain<D>),
    Notify(u8),
    Source(u8),
    Host(H),
    /// Puts any head into a ring.
    Head(u8, u16),
    /// Moves a ring's index.
    Index(u8, u16),
    Config(u8, Bytes),
    Reset(u64),
}

/// Mostly steps that lead further; few that end what was begun.
impl<'a, D: Arbitrary<'a>, H: Arbitrary<'a>> Arbitrary<'a> for Step<D, H> {
    fn arbitrary(u: &mut Unstructured<'a>) -> arbitrary::Result<Self> {
        Ok(match u8::arbitrary(u)? % 64 {
            0..=31 => Self::Ask(D::arbitrary(u)?),
            32..=43 => Self::Chain(Chain::arbitrary(u)?),
            44..=54 => Self::Host(H::arbitrary(u)?),
            55..=56 => Self::Notify(u.arbitrary()?),
            57..=58 => Self::Source(u.arbitrary()?),
            59..=60 => Self::Config(u.arbitrary()?, u.arbitrary()?),
            61 => Self::Head(u.arbitrary()?, u.arbitrary()?),
            62 => Self::Index(u.arbitrary()?, u.arbitrary()?),
            _ => Self::Reset(u.arbitrary()?),
        })
    }
}

/// A descriptor chain, mostly a good one.
#[derive(Debug, Arbitrary)]
pub(crate) struct Chain<D> {
    pub(crate) queue: u8,
    pub(crate) data: Option<D>,
    /// Lengths of the buffers that the data are in; the last one takes the rest.
    pub(crate) cuts: Few<u8>,
    pub(crate) room: Few<Room>,
    pub(crate) shape: Shape,
    pub(crate) wrong: Option<Wrong>,
    /// The device is told at once.
    pub(crate) notify: bool,
}

/// At most seven of them.
#[derive(Debug)]
pub(crate) struct Few<T>(pub(crate) Vec<T>);

impl<'a, T: Arbitrary<'a>> Arbitrary<'a> for Few<T> {
    fn arbitrary(u: &mut Unstructured<'a>) -> arbitrary::Result<Self> {
        let count = u8::arbitrary(u)? % 8;
        (0..count).map(|_| T::arbitrary(u)).collect::<arbitrary::Result<_>>().map(Self)
    }
}

#[derive(Debug, Arbitrary)]
pub(crate) enum Room {
    Small(u8),
    Medium(u16),
    Pages(u8),
}

impl Room {
    pub(crate) fn len(&self) -> u64 {
        match self {
            Self::Small(len) => (*len).into(),
            Self::Medium(len) => (*len).into(),
            Self::Pages(pages) => (u64::from(*pages) % 16 + 1) * 4096,
        }
    }
}

#[derive(Debug, Clone, Copy, Arbitrary, PartialEq, Eq)]
pub(crate) enum Shape {
    Plain,
    Indirect,
    /// What the device writes comes first.
    Backwards,
    Endless,
}

/// What is wrong with one of the descriptors.
#[derive(Debug, Arbitrary)]
pub(crate) enum Wrong {
    Address(u8, Place),
    Length(u8, Number),
    Flags(u8, u16),
    Next(u8, u16),
}

#[derive(Debug, Arbitrary)]
pub(crate) enum Place {
    EndOfLow(u8),
    Hole,
    EndOfHigh(u8),
    Rings(u16),
    Anywhere(Number),
    Top(u8),
}

impl Place {
    pub(crate) fn address(&self) -> u64 {
        match self {
            Self::EndOfLow(before) => LOW.end - u64::from(*before),
            Self::Hole => LOW.end,
            Self::EndOfHigh(before) => HIGH.end - u64::from(*before),
            Self::Rings(at) => (*at).into(),
            Self::Anywhere(address) => address.0,
            Self::Top(before) => u64::MAX - u64::from(*before),
        }
    }
}
