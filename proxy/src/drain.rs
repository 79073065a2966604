//! Leaving without breaking anything: one phase that everybody watches.
//!
//! `Running → Leaving → Draining → Closing → Gone`. Leaving: not ready, and the registry is told,
//! where the sidecar has registered its workload; everything is still served, for callers that have
//! not heard. Draining: inbound listeners take no more, their connections finish what is there;
//! outbound goes on, because the application still works. Closing: outbound listeners do the same.
//! Bounded by the one `drain` setting.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::watch;

/// Where the process stands between start and end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Taking work.
    Running,
    /// Not ready; new requests are about to go elsewhere.
    Leaving,
    /// Inbound takes no more work; outbound does.
    Draining,
    /// No listener takes work.
    Closing,
    /// Everything has ended; threads leave.
    Gone,
}

/// The phase and the count of what is still going on. Cheap to clone.
#[derive(Clone)]
pub struct Drain {
    phase: Arc<watch::Sender<Phase>>,
    inbound: Arc<AtomicUsize>,
    outbound: Arc<AtomicUsize>,
    deliveries: Arc<AtomicUsize>,
}

impl Default for Drain {
    fn default() -> Self {
        Self {
            phase: Arc::new(watch::Sender::new(Phase::Running)),
            inbound: Arc::default(),
            outbound: Arc::default(),
            deliveries: Arc::default(),
        }
    }
}

impl Drain {
    /// The phase now.
    pub fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    /// Moves on to `phase`; never back.
    pub fn advance(&self, phase: Phase) {
        self.phase.send_if_modified(|current| {
            let moved = phase > *current;
            *current = (*current).max(phase);
            moved
        });
    }

    /// Waits until `phase` is reached.
    ///
    /// # Cancel safety
    /// Nothing is lost by dropping it.
    pub async fn reached(&self, phase: Phase) {
        let mut watch = self.phase.subscribe();
        // The sender lives in `self`, so the channel cannot be closed here.
        let _ = watch.wait_for(|current| *current >= phase).await;
    }

    /// Counts a connection until the guard is dropped.
    pub fn guard(&self, inbound: bool) -> Guard {
        let count = Arc::clone(if inbound {
            &self.inbound
        } else {
            &self.outbound
        });
        count.fetch_add(1, Ordering::Relaxed);
        Guard { count }
    }

    /// Counts a delivery of the queue until the guard is dropped.
    pub fn delivery(&self) -> Guard {
        self.deliveries.fetch_add(1, Ordering::Relaxed);
        Guard {
            count: Arc::clone(&self.deliveries),
        }
    }

    /// Deliveries under way; after [`Phase::Closing`] none is added.
    pub fn deliveries(&self) -> usize {
        self.deliveries.load(Ordering::Relaxed)
    }

    /// Open downstream connections: (inbound, outbound).
    pub fn open(&self) -> (usize, usize) {
        (
            self.inbound.load(Ordering::Relaxed),
            self.outbound.load(Ordering::Relaxed),
        )
    }
}

/// One open connection; see [`Drain::guard`].
pub struct Guard {
    count: Arc<AtomicUsize>,
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.count.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_phase_moves_only_forward_and_wakes_those_who_wait() {
        let drain = Drain::default();
        let waiting = tokio::spawn({
            let drain = drain.clone();
            async move { drain.reached(Phase::Draining).await }
        });
        drain.advance(Phase::Closing);
        drain.advance(Phase::Draining);
        waiting.await.unwrap();
        assert_eq!(drain.phase(), Phase::Closing);
    }

    #[test]
    fn guards_count_each_side() {
        let drain = Drain::default();
        let (one, two) = (drain.guard(true), drain.guard(false));
        assert_eq!(drain.open(), (1, 1));
        drop((one, two));
        assert_eq!(drain.open(), (0, 0));
    }
}
