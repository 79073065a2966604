//! The only file of this crate that reads clocks; everything else receives `now`.

use std::sync::OnceLock;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use outrigger_core::time::Mono;

/// Time since this process first asked, never going back. For leases, ages and deadlines.
#[allow(clippy::disallowed_methods)]
pub fn monotonic() -> Duration {
    static START: OnceLock<Instant> = OnceLock::new();
    START.get_or_init(Instant::now).elapsed()
}

/// [`monotonic`] as `outrigger-core` counts it.
pub fn mono() -> Mono {
    Mono::ZERO + monotonic()
}

/// Milliseconds since 1970 by the wall clock. For what people and files see.
#[allow(clippy::disallowed_methods)]
pub fn wall_millis() -> u64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// Seconds since 1970 by the wall clock, as certificates count time.
pub fn wall_seconds() -> u64 {
    wall_millis() / 1000
}
