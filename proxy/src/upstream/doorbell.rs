//! The waker of an upstream connection's task, which can be muted.
//!
//! h2 wakes a connection's task when the last handle of a stream is dropped. After a request that
//! ended well there is nothing for it to do but, should the peer have said that it goes away, to
//! close: that can wait for the next request, or half a second. A task that runs for nothing costs
//! as much as a frame.
//!
//! Stands on the life of a request.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::task::{Context, Wake, Waker};

use futures_util::task::AtomicWaker;

use crate::home::Home;

/// The waker of a task of this thread.
pub struct Doorbell {
    bell: Arc<Bell>,
    waker: Waker,
}

struct Bell {
    task: AtomicWaker,
    muted: AtomicBool,
    /// It was rung while muted.
    owed: AtomicBool,
    home: Home,
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if self.muted.load(Relaxed) && self.home.is_here() {
            self.owed.store(true, Relaxed);
        } else {
            self.task.wake();
        }
    }
}

impl Default for Doorbell {
    fn default() -> Self {
        Self::new()
    }
}

impl Doorbell {
    /// One that wakes nobody yet.
    pub fn new() -> Self {
        let bell = Arc::new(Bell {
            task: AtomicWaker::new(),
            muted: AtomicBool::new(false),
            owed: AtomicBool::new(false),
            home: Home::here(),
        });
        let waker = Waker::from(Arc::clone(&bell));
        Self { bell, waker }
    }

    /// What the task is polled with; it is woken through `cx`.
    pub fn answer(&self, cx: &Context<'_>) -> Context<'_> {
        self.bell.task.register(cx.waker());
        self.bell.owed.store(false, Relaxed);
        Context::from_waker(&self.waker)
    }

    /// Does `quietly` what would ring; the ring is owed then.
    pub fn mute<T>(&self, quietly: impl FnOnce() -> T) -> T {
        self.bell.muted.store(true, Relaxed);
        let done = quietly();
        self.bell.muted.store(false, Relaxed);
        done
    }

    /// Rings if that is owed.
    pub fn settle(&self) {
        if self.bell.owed.load(Relaxed) {
            self.bell.owed.store(false, Relaxed);
            self.bell.task.wake();
        }
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
            self.0.fetch_add(1, Relaxed);
        }
    }

    #[test]
    fn a_muted_ring_is_owed_until_the_task_runs_or_it_is_settled() {
        let (count, bell) = (Arc::new(Count::default()), Doorbell::new());
        let task = Waker::from(Arc::clone(&count));
        let woken = || count.0.load(Relaxed);
        let visitor = bell.answer(&Context::from_waker(&task)).waker().clone();
        bell.mute(|| visitor.wake_by_ref());
        assert_eq!(woken(), 0);
        bell.settle();
        assert_eq!(woken(), 1);
        bell.settle();
        assert_eq!(woken(), 1, "owed once");
        let _ = bell.answer(&Context::from_waker(&task));
        visitor.wake_by_ref();
        assert_eq!(woken(), 2, "not muted any more");
        let _ = bell.answer(&Context::from_waker(&task));
        bell.mute(|| visitor.wake_by_ref());
        let _ = bell.answer(&Context::from_waker(&task));
        bell.settle();
        assert_eq!(woken(), 2, "the task ran meanwhile");
    }

    #[test]
    fn another_thread_rings_whatever_is_muted() {
        let (count, bell) = (Arc::new(Count::default()), Doorbell::new());
        let task = Waker::from(Arc::clone(&count));
        let visitor = bell.answer(&Context::from_waker(&task)).waker().clone();
        let rung = bell.mute(|| std::thread::spawn(move || visitor.wake()).join());
        rung.expect("it rang");
        assert_eq!(count.0.load(Relaxed), 1);
    }
}
