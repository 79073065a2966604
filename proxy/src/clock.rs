//! The only place of the sidecar that reads a clock.
//!
//! Monotonic time ([`now`]) is for everything inside the process, wall-clock time
//! ([`unix_now`]) for everything that is stored or shown. Decisions receive both as arguments.
//!
//! A request asks for the time a dozen times in the two turns that it takes of its connection's
//! task, so a turn reads the clock once: time stands still while one runs.
#![allow(clippy::disallowed_methods)]

use std::cell::Cell;
use std::future::Future;
use std::pin::pin;
use std::sync::OnceLock;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use outrigger_core::time::{Mono, UnixMillis};

static EPOCH: OnceLock<Instant> = OnceLock::new();

fn epoch() -> Instant {
    *EPOCH.get_or_init(Instant::now)
}

thread_local! {
    /// The reading of the turn that this thread is in, in nanoseconds.
    static READING: Cell<u64> = const { Cell::new(NO_TURN) };
}

/// No turn that stands still: every reading is a new one.
const NO_TURN: u64 = u64::MAX;
/// A turn that has not been asked for the time.
const UNREAD: u64 = u64::MAX - 1;

/// Monotonic time since the first reading in this process: in a [`Turn`], when it was first asked
/// for.
pub fn now() -> Mono {
    let nanos = match READING.get() {
        NO_TURN => read(),
        UNREAD => {
            let nanos = read();
            READING.set(nanos);
            nanos
        }
        nanos => nanos,
    };
    Mono::from_nanos(nanos)
}

fn read() -> u64 {
    let nanos = epoch().elapsed().as_nanos();
    u64::try_from(nanos).map_or(UNREAD - 1, |nanos| nanos.min(UNREAD - 1))
}

/// A stretch of work without a wait, during which time stands still on this thread. Over before
/// whoever holds it waits: what runs in between would see the same time.
///
/// What is measured from one turn to another begins and ends with what woke them, so that the
/// queue inside a turn counts for those who wait in it.
pub struct Turn {
    before: u64,
    /// It belongs to its thread.
    _local: std::marker::PhantomData<*const ()>,
}

impl Turn {
    /// Begins one.
    pub fn begin() -> Self {
        Self {
            before: READING.replace(UNREAD),
            _local: std::marker::PhantomData,
        }
    }

    /// Lets time go on: the next reading is a new one.
    pub fn go_on(&self) {
        READING.set(UNREAD);
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        READING.set(self.before);
    }
}

/// Runs `work` with a [`Turn`] for each poll.
///
/// # Cancel safety
/// That of `work`.
pub async fn in_turns<F: Future>(work: F) -> F::Output {
    let mut work = pin!(work);
    std::future::poll_fn(|cx| {
        let _turn = Turn::begin();
        work.as_mut().poll(cx)
    })
    .await
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

#[cfg(test)]
mod tests {
    use std::task::{Context, Poll, Waker};

    use super::*;

    /// Waits until the clock of the machine has moved.
    fn pass() {
        let before = read();
        while read() == before {
            std::hint::spin_loop();
        }
    }

    #[test]
    fn time_stands_still_in_a_turn_and_goes_on_after_it() {
        let before = now();
        let turn = Turn::begin();
        pass();
        let first = now();
        assert!(first > before, "the first reading of a turn is a new one");
        pass();
        assert_eq!(now(), first);
        turn.go_on();
        let second = now();
        assert!(second > first);
        drop(turn);
        pass();
        assert!(now() > second);
    }

    #[test]
    fn what_runs_between_two_polls_has_its_own_time() {
        let readings = std::cell::RefCell::new(Vec::new());
        let mut work = pin!(in_turns(async {
            readings.borrow_mut().push(now());
            pass();
            readings.borrow_mut().push(now());
            tokio::task::yield_now().await;
            readings.borrow_mut().push(now());
        }));
        let mut cx = Context::from_waker(Waker::noop());
        assert!(work.as_mut().poll(&mut cx).is_pending());
        pass();
        let between = now();
        pass();
        assert!(now() > between, "no turn is left behind");
        assert_eq!(work.as_mut().poll(&mut cx), Poll::Ready(()));
        let [first, again, after] = readings.borrow()[..] else {
            panic!("three readings")
        };
        assert!(first == again && again < between && between < after);
    }
}
