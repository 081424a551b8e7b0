//! Errors that are made of those of several parts.

/// So that the errors of a side's parts can be used with `?`, where the side is a variant of `Error`.
macro_rules! from_parts {
    ($side:ident: $($part:ty),* $(,)?) => {
        $(impl From<$part> for Error {
            fn from(error: $part) -> Self {
                Self::$side(error.into())
            }
        })*
    };
}

pub(crate) use from_parts;
