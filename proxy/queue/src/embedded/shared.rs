//! What the handle, the writer thread and the reader thread share.

use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, RwLock, RwLockReadGuard, RwLockWriteGuard};

use outrigger_core::time::UnixMillis;
use redb::Database;
use tokio::sync::{oneshot, watch};

use super::journal::Board;
use super::medium::{Ballast, Doubt};
use super::options::OpenError;
use super::rows::Fault;
use crate::backend::{
    CancelOutcome, Conclusion, Counts, EnqueueError, EnqueueOutcome, ForgetOutcome, LeaseBatch,
    LeaseId, LeaseRequest, QueueLimits, Replay, ReplayReport, Selection, Settle, SettleOutcome,
    StoreError, StoreStats,
};
use crate::event::Followed;
use crate::message::{Exported, Message, MessageId};
use crate::signal::{Signals, Watchers, lock};

/// Where the store is in its life.
///
/// ```text
/// Opening → Ready → Opening (after a fault) → Ready
///           Ready → Closed
/// Opening → Failed → Closed
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Phase {
    Opening(String),
    Ready,
    Failed(OpenError),
    Closed,
}

pub(super) struct Shared {
    pub(super) phase: watch::Sender<Phase>,
    /// The open file; none while opening, failed or closed.
    db: RwLock<Option<Database>>,
    pub(super) signals: Arc<Signals>,
    pub(super) watchers: Watchers,
    /// Messages with a change that is not committed.
    unwritten: Mutex<HashSet<MessageId>>,
    unwritten_bytes: AtomicU64,
    pub(super) ballast: Arc<Ballast>,
    pub(super) doubt: Doubt,
    pub(super) figures: Figures,
    pub(super) board: Board,
}

/// Counters for [`StoreStats`].
#[derive(Default)]
pub(super) struct Figures {
    pub(super) commits: AtomicU64,
    pub(super) committed_ops: AtomicU64,
    pub(super) commit_us: AtomicU64,
    pub(super) last_commit_us: AtomicU64,
    pub(super) corrupt: AtomicU64,
    pub(super) reopens: AtomicU64,
    pub(super) refused_disk_full: AtomicU64,
    pub(super) file_bytes: AtomicU64,
    pub(super) free_bytes: AtomicU64,
}

impl Figures {
    pub(super) fn read(&self) -> StoreStats {
        StoreStats {
            commits: self.commits.load(Relaxed),
            committed_ops: self.committed_ops.load(Relaxed),
            commit_us: self.commit_us.load(Relaxed),
            last_commit_us: self.last_commit_us.load(Relaxed),
            corrupt: self.corrupt.load(Relaxed),
            reopens: self.reopens.load(Relaxed),
            refused_disk_full: self.refused_disk_full.load(Relaxed),
            file_bytes: self.file_bytes.load(Relaxed),
            free_bytes: self.free_bytes.load(Relaxed),
            ballast_bytes: 0,
        }
    }
}

impl Shared {
    pub(super) fn new(ballast: Ballast, followed: Followed) -> Self {
        Self {
            phase: watch::Sender::new(Phase::Opening("recovering".to_owned())),
            db: RwLock::new(None),
            signals: Arc::default(),
            watchers: Watchers::default(),
            unwritten: Mutex::default(),
            unwritten_bytes: AtomicU64::new(0),
            ballast: Arc::new(ballast),
            doubt: Doubt::default(),
            figures: Figures::default(),
            board: Board::new(followed),
        }
    }

    /// Why the store takes no work now, if so.
    pub(super) fn gate(&self) -> Result<(), String> {
        match &*self.phase.borrow() {
            Phase::Ready => Ok(()),
            Phase::Opening(why) => Err(why.clone()),
            Phase::Failed(error) => Err(error.to_string()),
            Phase::Closed => Err("closed".to_owned()),
        }
    }

    /// The open file for as long as the guard lives; keep it short.
    pub(super) fn db(&self) -> RwLockReadGuard<'_, Option<Database>> {
        self.db
            .read()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Waits for the readers, then hands out the place of the open file.
    pub(super) fn db_mut(&self) -> RwLockWriteGuard<'_, Option<Database>> {
        self.db
            .write()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    pub(super) fn mark_unwritten(&self, id: MessageId) {
        lock(&self.unwritten).insert(id);
    }

    pub(super) fn all_written(&self) {
        lock(&self.unwritten).clear();
    }

    pub(super) fn is_unwritten(&self, id: Option<MessageId>) -> bool {
        let unwritten = lock(&self.unwritten);
        id.map_or(!unwritten.is_empty(), |id| unwritten.contains(&id))
    }

    /// Everybody who waits for something looks again.
    pub(super) fn wake_all(&self) {
        self.signals.bump_all();
        self.watchers.wake_all();
    }

    pub(super) fn unwritten_bytes(&self) -> u64 {
        self.unwritten_bytes.load(Relaxed)
    }
}

/// Bytes that wait for the writer; given back when dropped, wherever the message ends.
pub(super) struct Queued {
    shared: Arc<Shared>,
    bytes: u64,
}

impl Queued {
    pub(super) fn new(shared: &Arc<Shared>, bytes: u64) -> Self {
        shared.unwritten_bytes.fetch_add(bytes, Relaxed);
        Self {
            shared: Arc::clone(shared),
            bytes,
        }
    }
}

impl Drop for Queued {
    fn drop(&mut self) {
        self.shared.unwritten_bytes.fetch_sub(self.bytes, Relaxed);
    }
}

pub(super) type Reply<T> = oneshot::Sender<T>;

/// What the writer is asked. A reply that is dropped means that the store failed.
pub(super) enum Op {
    Enqueue {
        message: Box<Message>,
        copies: Vec<Message>,
        limits: QueueLimits,
        now: UnixMillis,
        queued: Queued,
        reply: Reply<Result<EnqueueOutcome, EnqueueError>>,
    },
    Restore {
        exported: Box<Exported>,
        now: UnixMillis,
        queued: Queued,
        reply: Reply<Result<bool, StoreError>>,
    },
    Lease {
        request: LeaseRequest,
        reply: Reply<LeaseBatch>,
    },
    Settle {
        lease: LeaseId,
        settle: Box<Settle>,
        now: UnixMillis,
        reply: Reply<SettleOutcome>,
    },
    Extend {
        lease: LeaseId,
        lease_for_ms: u64,
        now: UnixMillis,
        reply: Reply<SettleOutcome>,
    },
    Cancel {
        id: MessageId,
        now: UnixMillis,
        reply: Reply<CancelOutcome>,
    },
    Conclude {
        id: MessageId,
        how: Box<Conclusion>,
        now: UnixMillis,
        reply: Reply<bool>,
    },
    Replay {
        selection: Selection,
        how: Replay,
        now: UnixMillis,
        reply: Reply<ReplayReport>,
    },
    Purge {
        selection: Selection,
        now: UnixMillis,
        reply: Reply<u64>,
    },
    Forget {
        id: MessageId,
        reply: Reply<ForgetOutcome>,
    },
    ForgetEvents {
        queue: String,
        seq: u64,
        reply: Reply<()>,
    },
    PurgePending {
        queue: String,
        now: UnixMillis,
        reply: Reply<u64>,
    },
    Counts {
        queue: String,
        now: UnixMillis,
        reply: Reply<Counts>,
    },
    Queues {
        reply: Reply<Vec<String>>,
    },
    Reap {
        now: UnixMillis,
        reply: Reply<usize>,
    },
    /// Commit what is unwritten.
    Flush {
        reply: Reply<()>,
    },
    /// The reader thread met a failure of the engine.
    Fault(String),
    Close {
        reply: Option<Reply<()>>,
    },
}

type Job = dyn FnOnce(&Database) -> Result<(), Fault> + Send;

/// What the reader is asked.
pub(super) enum Read {
    Run(Box<Job>),
    Stop,
}
