//! The only place of the sidecar that reads a clock.
//!
//! Monotonic time ([`now`]) is for everything inside the process, wall-clock time
//! ([`unix_now`]) for everything that is stored or shown. Decisions receive both as arguments.
#![allow(clippy::disallowed_methods)]

use std::sync::OnceLock;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use outrigger_core::time::{Mono, UnixMillis};

static EPOCH: OnceLock<Instant> = OnceLock::new();

fn epoch() -> Instant {
    *EPOCH.get_or_init(Instant::now)
}

/// Monotonic time since the first reading in this process.
pub fn now() -> Mono {
    let nanos = epoch().elapsed().as_nanos();
    Mono::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
}

/// The instant that `at` stands for, for tokio's timers.
pub fn instant(at: Mono) -> tokio::time::Instant {
    tokio::time::Instant::from_std(epoch() + Duration::from_nanos(at.as_nanos()))
}

/// Wall-clock time in milliseconds since the Unix epoch; 0 if the clock stands before it.
pub fn unix_now() -> UnixMillis {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    UnixMillis(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

/// Wall-clock time in seconds since the Unix epoch, as Prometheus wants timestamps.
pub fn unix_seconds() -> f64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs_f64()
}

/// The time as `Date` writes it (RFC 9110 §5.6.7).
pub fn http_date() -> [u8; 29] {
    let mut date = [b' '; 29];
    let text = httpdate::fmt_http_date(SystemTime::now());
    let length = text.len().min(date.len());
    date[..length].copy_from_slice(&text.as_bytes()[..length]);
    date
}
