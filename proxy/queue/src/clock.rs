//! The only place of this crate that reads a clock: the writer's own timers and commit times.
//!
//! Everything that a message sees (due, expiry, age) is the caller's `now`.

use std::time::Instant;

/// Reads the monotonic clock.
#[allow(clippy::disallowed_methods, reason = "the crate's one clock")]
pub(crate) fn instant() -> Instant {
    Instant::now()
}
