//! The turn of a connection's task, in which wake-ups need no second turn.
//!
//! A stream that queues frames wakes the connection, and a connection that reads frames wakes
//! their streams; both are polled by the same task, which is running already. tokio would run it
//! once more for each such wake-up, to find nothing.
//!
//! Stands on the life of a request.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};

use futures_util::task::AtomicWaker;

/// How often a turn goes round before other tasks have theirs.
const ROUNDS: usize = 32;

/// The waker of everything that one task polls.
pub struct Turn {
    shared: Arc<Shared>,
    waker: Waker,
}

#[derive(Default)]
struct Shared {
    task: AtomicWaker,
    running: AtomicBool,
    woken: AtomicBool,
}

impl Wake for Shared {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.woken.store(true, Ordering::Release);
        if !self.running.load(Ordering::Acquire) {
            self.task.wake();
        }
    }
}

impl Default for Turn {
    fn default() -> Self {
        Self::new()
    }
}

impl Turn {
    /// A waker that belongs to no task yet.
    pub fn new() -> Self {
        let shared = Arc::<Shared>::default();
        let waker = Waker::from(Arc::clone(&shared));
        Self { shared, waker }
    }

    /// Polls `round` until it is ready or nothing that it waits for has happened meanwhile.
    pub fn poll<T>(
        &self,
        cx: &mut Context<'_>,
        mut round: impl FnMut(&mut Context<'_>) -> Poll<T>,
    ) -> Poll<T> {
        let shared = &self.shared;
        shared.task.register(cx.waker());
        shared.running.store(true, Ordering::Release);
        let mut ours = Context::from_waker(&self.waker);
        for _ in 0..ROUNDS {
            shared.woken.store(false, Ordering::Release);
            let polled = round(&mut ours);
            if polled.is_ready() || !shared.woken.load(Ordering::Acquire) {
                shared.running.store(false, Ordering::Release);
                // Somebody on another thread may have come between the two.
                if polled.is_pending() && shared.woken.load(Ordering::Acquire) {
                    cx.waker().wake_by_ref();
                }
                return polled;
            }
        }
        shared.running.store(false, Ordering::Release);
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;

    #[derive(Default)]
    struct Count(AtomicUsize);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Polls once; `rounds` says of each round whether it wakes itself. Gives the rounds that
    /// were made and how often the task was woken.
    fn polled(wakes: impl Fn(usize) -> bool) -> (usize, usize) {
        let count = Arc::new(Count::default());
        let waker = Waker::from(Arc::clone(&count));
        let mut rounds = 0;
        let polled = Turn::new().poll(&mut Context::from_waker(&waker), |cx| {
            rounds += 1;
            if wakes(rounds) {
                cx.waker().wake_by_ref();
            }
            Poll::<()>::Pending
        });
        assert!(polled.is_pending());
        (rounds, count.0.load(Ordering::Relaxed))
    }

    #[test]
    fn a_wake_up_during_the_turn_is_another_round_of_it() {
        assert_eq!(polled(|_| false), (1, 0));
        assert_eq!(polled(|round| round < 3), (3, 0));
    }

    #[test]
    fn a_turn_that_never_ends_lets_others_have_theirs() {
        assert_eq!(polled(|_| true), (ROUNDS, 1));
    }

    #[test]
    fn a_wake_up_between_turns_wakes_the_task() {
        let count = Arc::new(Count::default());
        let waker = Waker::from(Arc::clone(&count));
        let turn = Turn::new();
        let mut kept = None;
        let _ = turn.poll(&mut Context::from_waker(&waker), |cx| {
            kept = Some(cx.waker().clone());
            Poll::<()>::Pending
        });
        assert_eq!(count.0.load(Ordering::Relaxed), 0);
        kept.expect("the round ran").wake();
        assert_eq!(count.0.load(Ordering::Relaxed), 1);
    }
}
