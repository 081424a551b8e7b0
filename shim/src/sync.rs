//! Locks of the standard library, for data that stays whole even if a holder panics.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks a mutex, whoever has panicked with it.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
