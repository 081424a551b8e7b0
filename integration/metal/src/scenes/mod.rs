//! What the guest does.

pub mod chains;
pub mod endless;
pub mod lies;
pub mod names;
pub mod places;
pub mod registers;
