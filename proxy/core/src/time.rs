//! The two times of the house: monotonic for what happens in this process, wall clock for what
//! is stored or shown.
//!
//! Owns the types and their arithmetic. Reads no clock: the sidecar does that in one file.
//! On all three lives.

use std::ops::Add;
use std::time::Duration;

fn nanos(of: Duration) -> u64 {
    u64::try_from(of.as_nanos()).unwrap_or(u64::MAX)
}

/// Monotonic nanoseconds since an arbitrary epoch of the process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mono(u64);

impl Mono {
    /// The epoch itself.
    pub const ZERO: Mono = Mono(0);

    /// Takes nanoseconds since the epoch.
    pub const fn from_nanos(nanos: u64) -> Self {
        Mono(nanos)
    }

    /// Nanoseconds since the epoch.
    pub const fn as_nanos(self) -> u64 {
        self.0
    }

    /// Time since `earlier`; zero when `earlier` is later.
    pub const fn saturating_since(self, earlier: Mono) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

impl Add<Duration> for Mono {
    type Output = Mono;

    /// Saturates at the end of time (584 years).
    fn add(self, by: Duration) -> Mono {
        Mono(self.0.saturating_add(nanos(by)))
    }
}

/// Wall-clock milliseconds since the Unix epoch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UnixMillis(pub u64);

impl UnixMillis {
    /// Milliseconds since the Unix epoch.
    pub const fn as_millis(self) -> u64 {
        self.0
    }

    /// Whole seconds since the Unix epoch.
    pub const fn as_secs(self) -> u64 {
        self.0 / 1000
    }

    /// Time since `earlier`; zero when `earlier` is later (a wall clock may step back).
    pub const fn saturating_since(self, earlier: UnixMillis) -> Duration {
        Duration::from_millis(self.0.saturating_sub(earlier.0))
    }
}

impl Add<Duration> for UnixMillis {
    type Output = UnixMillis;

    /// Saturates; a fraction of a millisecond is dropped.
    fn add(self, by: Duration) -> UnixMillis {
        let millis = u64::try_from(by.as_millis()).unwrap_or(u64::MAX);
        UnixMillis(self.0.saturating_add(millis))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addition_saturates_and_differences_never_go_below_zero() {
        assert_eq!(
            Mono::from_nanos(5) + Duration::MAX,
            Mono::from_nanos(u64::MAX)
        );
        assert_eq!(UnixMillis(5) + Duration::MAX, UnixMillis(u64::MAX));
        assert_eq!(
            Mono::from_nanos(1).saturating_since(Mono::from_nanos(2)),
            Duration::ZERO
        );
        assert_eq!(
            UnixMillis(1).saturating_since(UnixMillis(2)),
            Duration::ZERO
        );
        assert_eq!(UnixMillis(1_500).as_secs(), 1);
    }
}
