//! The only file of this crate that reads clocks.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Now, for measuring and for deadlines.
#[allow(clippy::disallowed_methods)]
pub(crate) fn now() -> Instant {
    Instant::now()
}

/// Milliseconds since 1970.
#[allow(clippy::disallowed_methods)]
pub(crate) fn wall_millis() -> u64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// A duration as people read it: `250ms`, `1.5s`, `3m12s`, `5h2m`.
pub(crate) fn short(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match seconds {
        0 => format!("{}ms", duration.as_millis()),
        1..60 => format!("{:.1}s", duration.as_secs_f64()),
        60..3600 => format!("{}m{}s", seconds / 60, seconds % 60),
        _ => format!("{}h{}m", seconds / 3600, seconds / 60 % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_short() {
        let check =
            |millis, expected: &str| assert_eq!(short(Duration::from_millis(millis)), expected);
        check(0, "0ms");
        check(999, "999ms");
        check(1_500, "1.5s");
        check(192_000, "3m12s");
        check(18_120_000, "5h2m");
    }
}
