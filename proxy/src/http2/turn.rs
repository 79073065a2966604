//! The turn of a connection's task, in which wake-ups need no second turn.
//!
//! A stream that queues frames wakes the connection, and a connection that reads frames wakes
//! their streams; both are polled by the same task, which is running already. tokio would run it
//! once more for each such wake-up, to find nothing. And each of the two is polled only when it
//! was woken itself: asking an HTTP/2 connection that has nothing to do costs as much as a frame.
//!
//! Stands on the life of a request.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};

use futures_util::task::AtomicWaker;

use crate::clock;
use crate::home::Home;

/// How often a turn goes round before other tasks have theirs.
const ROUNDS: usize = 32;

/// One task that polls a connection and its requests.
pub struct Turn {
    shared: Arc<Shared>,
    /// The requests.
    pub requests: Part,
    /// The connection.
    pub connection: Part,
}

/// One of the things that a task polls.
pub struct Part {
    state: Arc<State>,
    waker: Waker,
}

struct Shared {
    task: AtomicWaker,
    running: AtomicBool,
    home: Home,
}

struct State {
    woken: AtomicBool,
    turn: Arc<Shared>,
}

impl Wake for State {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.woken.store(true, Ordering::Release);
        let turn = &self.turn;
        // From another thread the turn may end before it sees the flag: that is another turn.
        if !(turn.home.is_here() && turn.running.load(Ordering::Relaxed)) {
            turn.task.wake();
        }
    }
}

impl Part {
    fn of(turn: &Arc<Shared>) -> Self {
        let state = Arc::new(State {
            // Whoever has never been polled waits for nothing.
            woken: AtomicBool::new(true),
            turn: Arc::clone(turn),
        });
        let waker = Waker::from(Arc::clone(&state));
        Self { state, waker }
    }

    /// What to poll it with, if it was woken since it was polled last. It has to be polled until
    /// it is pending then.
    pub fn woken(&self) -> Option<Context<'_>> {
        let woken = self.is_woken();
        self.state.woken.store(false, Ordering::Relaxed);
        woken.then(|| Context::from_waker(&self.waker))
    }

    /// Has it polled in this turn, or the next.
    pub fn wake(&self) {
        self.state.woken.store(true, Ordering::Relaxed);
    }

    fn is_woken(&self) -> bool {
        self.state.woken.load(Ordering::Acquire)
    }
}

impl Default for Turn {
    fn default() -> Self {
        Self::new()
    }
}

impl Turn {
    /// Of a task of this thread.
    pub fn new() -> Self {
        let shared = Arc::new(Shared {
            task: AtomicWaker::new(),
            running: AtomicBool::new(false),
            home: Home::here(),
        });
        Self {
            requests: Part::of(&shared),
            connection: Part::of(&shared),
            shared,
        }
    }

    /// Calls `round` until it is ready or nobody was woken meanwhile.
    pub fn poll<T>(&self, cx: &mut Context<'_>, mut round: impl FnMut() -> Poll<T>) -> Poll<T> {
        let shared = &self.shared;
        shared.task.register(cx.waker());
        shared.running.store(true, Ordering::Relaxed);
        let time = clock::Turn::begin();
        for _ in 0..ROUNDS {
            time.go_on();
            let polled = round();
            if polled.is_ready() || !(self.requests.is_woken() || self.connection.is_woken()) {
                shared.running.store(false, Ordering::Relaxed);
                return polled;
            }
        }
        shared.running.store(false, Ordering::Relaxed);
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

    impl Count {
        fn get(&self) -> usize {
            self.0.load(Ordering::Relaxed)
        }
    }

    /// Polls once; `wakes` says of each round whether it wakes its part. Gives the rounds that
    /// were made and how often the task was woken.
    fn polled(wakes: impl Fn(usize) -> bool) -> (usize, usize) {
        let (count, turn) = (Arc::new(Count::default()), Turn::new());
        let waker = Waker::from(Arc::clone(&count));
        let mut rounds = 0;
        let polled = turn.poll(&mut Context::from_waker(&waker), || {
            rounds += 1;
            let _ = turn.connection.woken();
            if let Some(cx) = turn.requests.woken()
                && wakes(rounds)
            {
                cx.waker().wake_by_ref();
            }
            Poll::<()>::Pending
        });
        assert!(polled.is_pending());
        (rounds, count.get())
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
    fn each_part_is_polled_when_it_was_woken_itself() {
        let turn = Turn::new();
        let mut cx = Context::from_waker(Waker::noop());
        let mut seen = Vec::new();
        let mut round = |turn: &Turn| {
            turn.poll(&mut cx, || {
                // What wakes the connection comes before it is asked: that is no round of its own.
                let requests = turn.requests.woken().is_some();
                if requests {
                    turn.connection.waker.wake_by_ref();
                }
                seen.push((requests, turn.connection.woken().is_some()));
                Poll::<()>::Pending
            })
        };
        assert!(round(&turn).is_pending());
        assert!(round(&turn).is_pending());
        turn.connection.wake();
        assert!(round(&turn).is_pending());
        turn.requests.wake();
        assert!(round(&turn).is_pending());
        let expected = [(true, true), (false, false), (false, true), (true, true)];
        assert_eq!(seen, expected);
    }

    #[test]
    fn a_wake_up_between_turns_or_from_elsewhere_wakes_the_task() {
        let (count, turn) = (Arc::new(Count::default()), Turn::new());
        let waker = Waker::from(Arc::clone(&count));
        let elsewhere = turn.requests.waker.clone();
        let _ = turn.poll(&mut Context::from_waker(&waker), || {
            let (_, _) = (turn.requests.woken(), turn.connection.woken());
            let elsewhere = elsewhere.clone();
            let woken = std::thread::spawn(move || elsewhere.wake()).join();
            woken.expect("it woke");
            Poll::Ready(())
        });
        assert_eq!(count.get(), 1, "from another thread");
        turn.shared.task.register(&waker);
        turn.connection.waker.wake_by_ref();
        assert_eq!(count.get(), 2, "between turns");
    }
}
