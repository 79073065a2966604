//! The per-worker timer wheel: request, per-try, idle and header timeouts.
//!
//! Nearly every timeout is registered and dropped without firing, so registering must be cheap
//! and must not wake the reactor: deadlines are rounded up to coarse ticks (see [`granularity`]),
//! timers of one tick share a list, and one tokio timer per worker sleeps until the earliest
//! tick that has ever been armed. It is not for delays that must be exact (retry backoff, queue
//! schedules): those use tokio's timer.
//!
//! Stands on the life of a request.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use outrigger_core::time::Mono;
use slab::Slab;
use tokio::sync::Notify;

use crate::clock;

const MILLI: u64 = 1_000_000;
const NONE: usize = usize::MAX;

/// How coarsely a timer that is `left` away is rounded up: 1 ms under 50 ms, 10 ms under 1 s,
/// 100 ms beyond. A timeout therefore fires late by at most a tenth of itself, never early.
pub fn granularity(left: Duration) -> Duration {
    match left.as_millis() {
        0..50 => Duration::from_millis(1),
        50..1_000 => Duration::from_millis(10),
        _ => Duration::from_millis(100),
    }
}

/// One worker's timers. Cheap to clone; all clones are the same wheel.
#[derive(Clone)]
pub struct Wheel {
    inner: Rc<Inner>,
}

struct Inner {
    state: RefCell<State>,
    /// Tells the driver that a timer earlier than the one it sleeps for was armed.
    earlier: Notify,
}

#[derive(Default)]
struct State {
    entries: Slab<Entry>,
    /// Tick in nanoseconds → first entry of a doubly linked list through `entries`.
    ticks: BTreeMap<u64, usize>,
    /// What the driver sleeps for; `u64::MAX` while it waits for a first timer.
    armed: u64,
}

struct Entry {
    tick: u64,
    prev: usize,
    next: usize,
    fired: bool,
    waker: Option<Waker>,
}

impl Default for Wheel {
    fn default() -> Self {
        Self::new()
    }
}

impl Wheel {
    /// An empty wheel. Nothing fires until [`Wheel::drive`] runs on the same thread.
    pub fn new() -> Self {
        let state = State {
            armed: u64::MAX,
            ..State::default()
        };
        Self {
            inner: Rc::new(Inner {
                state: RefCell::new(state),
                earlier: Notify::new(),
            }),
        }
    }

    /// A timer that is ready at or shortly after `deadline`.
    ///
    /// # Cancel safety
    /// Dropping the timer removes it from the wheel.
    pub fn sleep_until(&self, deadline: Mono) -> Sleep {
        Sleep {
            wheel: self.clone(),
            deadline,
            key: NONE,
        }
    }

    /// Runs the wheel; one task per worker. Never ends.
    pub async fn drive(self) {
        loop {
            let next = {
                let mut state = self.inner.state.borrow_mut();
                state.fire(clock::now().as_nanos());
                let next = state
                    .ticks
                    .first_key_value()
                    .map_or(u64::MAX, |(tick, _)| *tick);
                state.armed = next;
                next
            };
            let earlier = self.inner.earlier.notified();
            if next == u64::MAX {
                earlier.await;
            } else {
                tokio::select! {
                    () = earlier => {}
                    () = tokio::time::sleep_until(clock::instant(Mono::from_nanos(next))) => {}
                }
            }
        }
    }

    fn insert(&self, deadline: Mono, now: Mono, waker: Waker) -> usize {
        let left = deadline.saturating_since(now);
        let step = u64::try_from(granularity(left).as_nanos()).unwrap_or(MILLI);
        let tick = deadline.as_nanos().div_ceil(step).saturating_mul(step);
        let mut state = self.inner.state.borrow_mut();
        let key = state.link(tick, waker);
        if tick < state.armed {
            state.armed = tick;
            drop(state);
            self.inner.earlier.notify_one();
        }
        key
    }
}

impl State {
    fn link(&mut self, tick: u64, waker: Waker) -> usize {
        let head = self.ticks.get(&tick).copied().unwrap_or(NONE);
        let entry = Entry {
            tick,
            prev: NONE,
            next: head,
            fired: false,
            waker: Some(waker),
        };
        let key = self.entries.insert(entry);
        if head != NONE {
            self.entries[head].prev = key;
        }
        self.ticks.insert(tick, key);
        key
    }

    fn unlink(&mut self, key: usize) {
        let Entry {
            tick,
            prev,
            next,
            fired,
            ..
        } = self.entries.remove(key);
        if fired {
            return;
        }
        if next != NONE {
            self.entries[next].prev = prev;
        }
        if prev != NONE {
            self.entries[prev].next = next;
        } else if next != NONE {
            self.ticks.insert(tick, next);
        } else {
            self.ticks.remove(&tick);
        }
    }

    fn fire(&mut self, now: u64) {
        while let Some((&tick, &head)) = self.ticks.first_key_value() {
            if tick > now {
                return;
            }
            self.ticks.remove(&tick);
            let mut key = head;
            while key != NONE {
                let entry = &mut self.entries[key];
                entry.fired = true;
                if let Some(waker) = entry.waker.take() {
                    waker.wake();
                }
                key = entry.next;
            }
        }
    }
}

/// A timer of a [`Wheel`]; made by [`Wheel::sleep_until`]. Registers itself when first polled.
pub struct Sleep {
    wheel: Wheel,
    deadline: Mono,
    key: usize,
}

impl Sleep {
    /// When this timer is due.
    pub fn deadline(&self) -> Mono {
        self.deadline
    }

    /// Moves the deadline; the timer may be ready again afterwards.
    pub fn reset(&mut self, deadline: Mono) {
        self.release();
        self.deadline = deadline;
    }

    fn release(&mut self) {
        if self.key != NONE {
            self.wheel.inner.state.borrow_mut().unlink(self.key);
            self.key = NONE;
        }
    }
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if self.key == NONE {
            let now = clock::now();
            if now >= self.deadline {
                return Poll::Ready(());
            }
            self.key = self.wheel.insert(self.deadline, now, cx.waker().clone());
            return Poll::Pending;
        }
        let mut state = self.wheel.inner.state.borrow_mut();
        let entry = &mut state.entries[self.key];
        if entry.fired {
            return Poll::Ready(());
        }
        match &mut entry.waker {
            Some(waker) => waker.clone_from(cx.waker()),
            none => *none = Some(cx.waker().clone()),
        }
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        self.release();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn local<F: Future>(future: F) -> F::Output {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build_local(tokio::runtime::LocalOptions::default())
            .unwrap();
        runtime.block_on(future)
    }

    #[test]
    fn a_timer_fires_never_early_and_within_its_granularity() {
        local(async {
            let wheel = Wheel::new();
            tokio::task::spawn_local(wheel.clone().drive());
            for millis in [1, 20, 60, 120] {
                let deadline = clock::now() + Duration::from_millis(millis);
                wheel.sleep_until(deadline).await;
                assert!(clock::now() >= deadline, "{millis} ms fired early");
            }
        });
    }

    #[test]
    fn an_earlier_timer_overtakes_one_already_armed() {
        local(async {
            let wheel = Wheel::new();
            tokio::task::spawn_local(wheel.clone().drive());
            let start = clock::now();
            let mut late = wheel.sleep_until(start + Duration::from_secs(3600));
            futures_util::future::poll_fn(|cx| {
                assert!(Pin::new(&mut late).poll(cx).is_pending());
                Poll::Ready(())
            })
            .await;
            wheel.sleep_until(start + Duration::from_millis(5)).await;
            assert!(clock::now() < start + Duration::from_secs(3600));
        });
    }

    #[test]
    fn dropped_timers_leave_nothing_behind() {
        local(async {
            let wheel = Wheel::new();
            let at = clock::now() + Duration::from_secs(10);
            let mut sleeps: Vec<_> = (0..100).map(|_| wheel.sleep_until(at)).collect();
            futures_util::future::poll_fn(|cx| {
                for sleep in &mut sleeps {
                    assert!(Pin::new(sleep).poll(cx).is_pending());
                }
                Poll::Ready(())
            })
            .await;
            assert_eq!(wheel.inner.state.borrow().entries.len(), 100);
            // Out of order, so that heads, tails and middles are all unlinked.
            while !sleeps.is_empty() {
                drop(sleeps.swap_remove(sleeps.len() / 2));
            }
            let state = wheel.inner.state.borrow();
            assert!(state.entries.is_empty() && state.ticks.is_empty());
        });
    }
}
