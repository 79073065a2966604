//! Waking those who wait: dispatchers for a due message, readers for a change of status.
//!
//! Owns no queue state; a wake-up may be spurious and the woken look for themselves.

use std::collections::HashMap;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use outrigger_core::time::UnixMillis;
use tokio::sync::Notify;

use crate::backend::DueCursor;
use crate::message::MessageId;

/// Counts the events that can make a message of one queue due.
#[derive(Debug, Default)]
pub(crate) struct Signal {
    generation: AtomicU64,
    notify: Notify,
}

impl Signal {
    /// Something may be due that was not.
    pub(crate) fn bump(&self) {
        self.generation.fetch_add(1, Ordering::Release);
        self.notify.notify_waiters();
    }

    pub(crate) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// Sleeps until the generation passes the cursor's or its due time comes.
    pub(crate) async fn wait(&self, cursor: DueCursor, now: UnixMillis) {
        let mut notified = pin!(self.notify.notified());
        notified.as_mut().enable();
        if self.generation() != cursor.generation {
            return;
        }
        match cursor.next_due {
            None => notified.await,
            Some(due) => {
                let sleep = Duration::from_millis(due.0.saturating_sub(now.0));
                // Elapsed and notified mean the same to the caller: look again.
                let _ = tokio::time::timeout(sleep, notified).await;
            }
        }
    }
}

/// The signals of all queues; they outlive a reopening of the store.
#[derive(Debug, Default)]
pub(crate) struct Signals(Mutex<HashMap<String, Arc<Signal>>>);

impl Signals {
    pub(crate) fn of(&self, queue: &str) -> Arc<Signal> {
        let mut signals = lock(&self.0);
        if let Some(signal) = signals.get(queue) {
            return Arc::clone(signal);
        }
        Arc::clone(signals.entry(queue.to_owned()).or_default())
    }

    pub(crate) fn bump_all(&self) {
        for signal in lock(&self.0).values() {
            signal.bump();
        }
    }
}

/// Who waits for a change of which message.
#[derive(Debug, Default)]
pub(crate) struct Watchers(Mutex<HashMap<MessageId, Arc<Notify>>>);

impl Watchers {
    pub(crate) fn watch(&self, id: MessageId) -> Watch<'_> {
        let notify = Arc::clone(lock(&self.0).entry(id).or_default());
        Watch {
            watchers: self,
            id,
            notify,
        }
    }

    pub(crate) fn wake(&self, id: MessageId) {
        if let Some(notify) = lock(&self.0).get(&id) {
            notify.notify_waiters();
        }
    }

    pub(crate) fn wake_all(&self) {
        for notify in lock(&self.0).values() {
            notify.notify_waiters();
        }
    }
}

/// A registration with [`Watchers`]; the last one for a message removes the entry.
pub(crate) struct Watch<'a> {
    watchers: &'a Watchers,
    id: MessageId,
    pub(crate) notify: Arc<Notify>,
}

impl Drop for Watch<'_> {
    fn drop(&mut self) {
        let mut map = lock(&self.watchers.0);
        // The map's and ours: nobody else waits, and nobody can join without the lock.
        if Arc::strong_count(&self.notify) <= 2 {
            map.remove(&self.id);
        }
    }
}

/// Locks a mutex whose data is never left half changed.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
