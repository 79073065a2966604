//! How many requests are at one thing at a time, and who waits for a place.
//!
//! Owns the places of one service or one rule, and the line before them; both are shared by all
//! workers. The caps come with each call, so a reload moves them at once. Does not wait itself: a
//! place in the line is a future, and how long it may stand there is its owner's business. On the
//! request's life.
//!
//! While nobody waits, entering and leaving are one atomic step each and take no lock. Who comes
//! while others wait stands behind them; the line is first come, first served over all workers.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

/// The places of one service or rule.
///
/// Who leaves lowers `taken` and then looks at `pending`; who joins the line raises `pending` and
/// then tries `taken`. One of the two sees the other, so no place stays free beside a waiter.
#[derive(Debug, Default)]
pub struct Bulkhead {
    taken: AtomicU32,
    pending: AtomicU32,
    line: Mutex<Line>,
}

#[derive(Debug, Default)]
struct Line {
    next: u64,
    /// By ticket, the oldest first. Whoever is let in is taken out.
    waiting: BTreeMap<u64, Waker>,
}

impl Bulkhead {
    /// Nobody in it.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes a place if fewer than `max` are taken and nobody waits for one. Each success is
    /// paired with one [`Bulkhead::leave`].
    pub fn try_enter(&self, max: u32) -> bool {
        self.pending.load(SeqCst) == 0 && self.take(max)
    }

    /// Gives a place back. `max` decides how many of those who wait follow: one, unless the cap
    /// was raised meanwhile.
    pub fn leave(&self, max: u32) {
        let taken = self
            .taken
            .fetch_update(SeqCst, SeqCst, |taken| taken.checked_sub(1));
        debug_assert!(taken.is_ok(), "left more often than entered");
        if self.pending.load(SeqCst) > 0 {
            self.let_in(max);
        }
    }

    /// Stands in line for a place, behind at most `max_pending` others less one.
    ///
    /// # Errors
    /// [`LineFull`] when so many wait already.
    pub fn wait(&self, max: u32, max_pending: u32) -> Result<Waiting<'_>, LineFull> {
        let ticket = {
            let mut line = self.line();
            if line.waiting.len() >= max_pending as usize {
                return Err(LineFull);
            }
            let ticket = line.next;
            line.next += 1;
            line.waiting.insert(ticket, Waker::noop().clone());
            self.pending.fetch_add(1, SeqCst);
            ticket
        };
        self.let_in(max);
        Ok(Waiting {
            bulkhead: self,
            ticket,
            max,
            entered: false,
        })
    }

    /// Places taken now.
    pub fn current(&self) -> u32 {
        self.taken.load(SeqCst)
    }

    /// How many wait now.
    pub fn pending(&self) -> u32 {
        self.pending.load(SeqCst)
    }

    fn take(&self, max: u32) -> bool {
        self.taken
            .fetch_update(SeqCst, SeqCst, |taken| (taken < max).then(|| taken + 1))
            .is_ok()
    }

    /// Lets in whoever waits, the oldest first, as long as there are places. Wakes without the
    /// lock: who is woken may come here at once.
    fn let_in(&self, max: u32) {
        while let Some(waker) = self.let_one_in(max) {
            waker.wake();
        }
    }

    fn let_one_in(&self, max: u32) -> Option<Waker> {
        let mut line = self.line();
        let oldest = line.waiting.first_entry()?;
        if !self.take(max) {
            return None;
        }
        let waker = oldest.remove();
        self.pending.fetch_sub(1, SeqCst);
        Some(waker)
    }

    fn line(&self) -> MutexGuard<'_, Line> {
        // Nothing that is done under this lock can leave the line half changed.
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// As many wait as may.
#[derive(Debug, PartialEq, Eq)]
pub struct LineFull;

/// A place in line; ready once it is a place inside, which is then its owner's to
/// [leave](Bulkhead::leave).
///
/// # Cancel safety
/// Dropping it leaves the line, or passes on the place that had just come free.
#[derive(Debug)]
#[must_use = "dropping it leaves the line"]
pub struct Waiting<'a> {
    bulkhead: &'a Bulkhead,
    ticket: u64,
    max: u32,
    entered: bool,
}

impl Future for Waiting<'_> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        {
            let mut line = self.bulkhead.line();
            if let Some(waker) = line.waiting.get_mut(&self.ticket) {
                waker.clone_from(cx.waker());
                return Poll::Pending;
            }
        }
        self.entered = true;
        Poll::Ready(())
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if self.entered {
            return;
        }
        let waited = self.bulkhead.line().waiting.remove(&self.ticket);
        match waited {
            Some(_) => {
                self.bulkhead.pending.fetch_sub(1, SeqCst);
            }
            None => self.bulkhead.leave(self.max),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicUsize;
    use std::task::Wake;

    use super::*;

    /// Counts how often it is woken, and wakes its thread.
    struct Count(AtomicUsize, std::thread::Thread);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, SeqCst);
            self.1.unpark();
        }
    }

    fn count() -> Arc<Count> {
        Arc::new(Count(AtomicUsize::new(0), std::thread::current()))
    }

    fn ready(waiting: &mut Waiting<'_>, count: &Arc<Count>) -> bool {
        let waker = Waker::from(Arc::clone(count));
        let mut cx = Context::from_waker(&waker);
        Pin::new(waiting).poll(&mut cx).is_ready()
    }

    #[test]
    fn no_more_than_the_maximum_are_let_in() {
        let bulkhead = Bulkhead::new();
        assert!(bulkhead.try_enter(2) && bulkhead.try_enter(2));
        assert!(!bulkhead.try_enter(2));
        assert!(bulkhead.try_enter(3), "the cap may move between calls");
        assert_eq!(bulkhead.current(), 3);
        bulkhead.leave(2);
        bulkhead.leave(2);
        assert!(bulkhead.try_enter(2));
        assert!(!Bulkhead::new().try_enter(0));
    }

    #[test]
    fn a_place_goes_to_whoever_has_waited_longest_and_to_no_newcomer() {
        let (bulkhead, count) = (Bulkhead::new(), count());
        assert!(bulkhead.try_enter(1));
        let mut first = bulkhead.wait(1, 2).unwrap();
        let mut second = bulkhead.wait(1, 2).unwrap();
        assert_eq!(bulkhead.wait(1, 2).err(), Some(LineFull));
        assert!(!ready(&mut second, &count) && !ready(&mut first, &count));
        assert_eq!(bulkhead.pending(), 2);
        bulkhead.leave(1);
        assert_eq!(count.0.load(SeqCst), 1);
        assert!(!bulkhead.try_enter(5), "others wait");
        assert!(ready(&mut first, &count) && !ready(&mut second, &count));
        bulkhead.leave(1);
        assert!(ready(&mut second, &count));
        assert_eq!((bulkhead.current(), bulkhead.pending()), (1, 0));
    }

    #[test]
    fn whoever_leaves_the_line_holds_nobody_up() {
        let (bulkhead, count) = (Bulkhead::new(), count());
        assert!(bulkhead.try_enter(1));
        let impatient = bulkhead.wait(1, 9).unwrap();
        let mut patient = bulkhead.wait(1, 9).unwrap();
        drop(impatient);
        let unlucky = bulkhead.wait(1, 9).unwrap();
        bulkhead.leave(1);
        assert!(ready(&mut patient, &count));
        bulkhead.leave(1);
        // It was let in and never heard of it: the place goes on.
        drop(unlucky);
        assert_eq!((bulkhead.current(), bulkhead.pending()), (0, 0));
    }

    #[test]
    fn a_raised_cap_lets_in_as_many_as_fit() {
        let (bulkhead, count) = (Bulkhead::new(), count());
        assert!(bulkhead.try_enter(1));
        let mut line: Vec<_> = (0..3).map(|_| bulkhead.wait(1, 9).unwrap()).collect();
        bulkhead.leave(3);
        assert!(line.iter_mut().all(|waiting| ready(waiting, &count)));
        assert_eq!(bulkhead.current(), 3);
    }

    #[test]
    fn threads_neither_exceed_the_cap_nor_lose_a_wake_up() {
        const MAX: u32 = 3;
        let (bulkhead, inside) = (Bulkhead::new(), AtomicUsize::new(0));
        let served = AtomicUsize::new(0);
        let one = |impatient: bool| {
            for round in 0..2_000 {
                if !bulkhead.try_enter(MAX) {
                    let count = count();
                    let mut waiting = bulkhead.wait(MAX, 100).expect("there is room");
                    if impatient && round % 3 == 0 {
                        continue; // dropped, whether let in or not
                    }
                    while !ready(&mut waiting, &count) {
                        std::thread::park();
                    }
                }
                assert!(inside.fetch_add(1, SeqCst) < MAX as usize);
                served.fetch_add(1, SeqCst);
                inside.fetch_sub(1, SeqCst);
                bulkhead.leave(MAX);
            }
        };
        std::thread::scope(|scope| {
            let one = &one;
            (0..8).for_each(|n| drop(scope.spawn(move || one(n % 2 == 0))));
        });
        assert_eq!((bulkhead.current(), bulkhead.pending()), (0, 0));
        assert!(served.load(SeqCst) >= 4 * 2_000);
    }
}
