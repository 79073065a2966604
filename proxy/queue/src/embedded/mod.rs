//! The embedded store: one file on a local disk, durable before an enqueue resolves.
//!
//! Owns the handle: it passes what changes the store to the writer thread and what only reads it to
//! the reader thread, and answers `Unavailable` while there is no open file. Survives a crash of the
//! process or the machine, not the loss of the volume. One process owns the directory.
//!
//! | file | owns |
//! |---|---|
//! | `writer.rs` | the thread that commits in groups and reopens after a failure |
//! | `engine.rs` | what each verb changes |
//! | `index.rs` | what waits for what, in memory |
//! | `entries.rs` | what is in memory of one message |
//! | `journal.rs` | the events of followed queues, numbered and bounded |
//! | `rows.rs`, `codec.rs` | tables, checksums, bytes |
//! | `recover.rs` | opening and rebuilding |
//! | `reader.rs` | statuses, results and lists |
//! | `salvage.rs` | what can be read of a damaged file |
//! | `medium.rs` | the file's bytes, and the ballast for a full volume |
//! | `volume.rs` | the directory and its file system |

mod codec;
mod engine;
mod entries;
mod index;
mod journal;
mod medium;
mod options;
mod reader;
mod recover;
mod rows;
mod salvage;
mod shared;
mod volume;
mod writer;

#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use outrigger_core::time::UnixMillis;
use redb::{ReadTransaction, ReadableDatabase as _};
use tokio::sync::{oneshot, watch};

use medium::{Ballast, Medium};
pub use options::{FreeSpace, FreeSpaceProbe, OpenError, Options, default_headroom};
use rows::Fault;
use shared::{Op, Phase, Queued, Read, Reply, Shared};

use crate::backend::{
    CancelOutcome, Capabilities, Conclusion, Counts, DeadFilter, DueCursor, Durability,
    EnqueueError, EnqueueOutcome, ForgetOutcome, Health, Inspect, LeaseBatch, LeaseId,
    LeaseRequest, Page, PageRequest, QueueBackend, QueueLimits, Replay, ReplayReport,
    ResultOutcome, Selection, Settle, SettleOutcome, StoreError, StoreStats,
};
use crate::event::{Backlog, Event, Followed, Journal};
use crate::message::{DeadLetter, Exported, Message, MessageId, State, StatusView};
use crate::record::weight_of;

/// A durable queue in one file of a local directory. Share it in an `Arc`.
///
/// Call [`QueueBackend::close`] before the process ends; a store that is dropped closes by itself,
/// but a moment later, on its own thread. Leases that are open then count as attempts.
pub struct EmbeddedStore {
    shared: Arc<Shared>,
    max_unwritten_bytes: u64,
    ops: Sender<Op>,
    reads: Sender<Read>,
}

impl EmbeddedStore {
    /// Starts to open the store in `dir` on a thread of its own, and returns at once. Until it is
    /// open every call answers `Unavailable("recovering")`; see [`EmbeddedStore::ready`].
    ///
    /// # Errors
    /// When the system refuses a thread.
    pub fn open(dir: impl Into<PathBuf>, options: Options) -> std::io::Result<Self> {
        Self::open_on(dir.into(), options, medium::plain())
    }

    /// As [`EmbeddedStore::open`], on what `medium` makes of the file.
    fn open_on(dir: PathBuf, options: Options, medium: Medium) -> std::io::Result<Self> {
        let (ops, ops_rx) = channel();
        let (reads, reads_rx) = channel();
        let ballast = Ballast::new(&dir, options.ballast_bytes);
        let shared = Arc::new(Shared::new(ballast, options.followed.clone()));
        let max_unwritten_bytes = options.max_unwritten_bytes;
        let writer = writer::Writer {
            dir,
            options: Arc::new(options),
            medium,
            shared: Arc::clone(&shared),
            ops: ops_rx,
        };
        std::thread::Builder::new()
            .name("queue-writer".to_owned())
            .spawn(|| writer.run())?;
        let (reader_shared, faults) = (Arc::clone(&shared), ops.clone());
        let reader = move || reader::run(&reader_shared, &reads_rx, &faults);
        let spawned = std::thread::Builder::new()
            .name("queue-reader".to_owned())
            .spawn(reader);
        // Made first, so that a failure here closes the writer.
        let store = Self {
            shared,
            max_unwritten_bytes,
            ops,
            reads,
        };
        spawned.map(|_| store)
    }

    /// Resolves when the store takes work, or never will.
    ///
    /// # Errors
    /// [`OpenError`]: someone must act.
    ///
    /// # Cancel safety
    /// Safe.
    pub async fn ready(&self) -> Result<(), OpenError> {
        let mut phase = self.shared.phase.subscribe();
        loop {
            match &*phase.borrow_and_update() {
                Phase::Ready => return Ok(()),
                Phase::Failed(error) => return Err(error.clone()),
                Phase::Closed => return Err(OpenError::Closed),
                Phase::Opening(_) => {}
            }
            phase.changed().await.map_err(|_| OpenError::Closed)?;
        }
    }

    /// Asks the writer.
    async fn ask<T>(&self, op: impl FnOnce(Reply<T>) -> Op) -> Result<T, StoreError> {
        self.shared.gate().map_err(StoreError::Unavailable)?;
        let (reply, answer) = oneshot::channel();
        let _ = self.ops.send(op(reply));
        answer.await.map_err(|_| self.unavailable())
    }

    /// Asks the reader, after everything that `id` (none: any message) went through is durable.
    async fn read<T: Send + 'static>(
        &self,
        id: Option<MessageId>,
        look: impl FnOnce(&Shared, &ReadTransaction) -> Result<T, Fault> + Send + 'static,
    ) -> Result<T, StoreError> {
        if self.shared.is_unwritten(id) {
            self.ask(|reply| Op::Flush { reply }).await?;
        }
        self.committed(look).await
    }

    /// Asks the reader for what the last commit left.
    async fn committed<T: Send + 'static>(
        &self,
        look: impl FnOnce(&Shared, &ReadTransaction) -> Result<T, Fault> + Send + 'static,
    ) -> Result<T, StoreError> {
        self.shared.gate().map_err(StoreError::Unavailable)?;
        let (reply, answer) = oneshot::channel();
        let shared = Arc::clone(&self.shared);
        let job = Read::Run(Box::new(move |db| {
            let found = look(&shared, &db.begin_read()?)?;
            let _ = reply.send(found);
            Ok(())
        }));
        let _ = self.reads.send(job);
        answer.await.map_err(|_| self.unavailable())
    }

    /// Why an answer did not come.
    fn unavailable(&self) -> StoreError {
        let why = self.shared.gate().err();
        StoreError::Unavailable(why.unwrap_or_else(|| "the store was reopened".to_owned()))
    }
}

impl Drop for EmbeddedStore {
    fn drop(&mut self) {
        let _ = self.ops.send(Op::Close { reply: None });
        let _ = self.reads.send(Read::Stop);
    }
}

impl std::fmt::Debug for EmbeddedStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EmbeddedStore")
            .field("phase", &*self.shared.phase.borrow())
            .finish_non_exhaustive()
    }
}

impl QueueBackend for EmbeddedStore {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            durability: Durability::Fsynced,
            delay: true,
            key_order: true,
            dedup: true,
        }
    }

    fn health(&self) -> Health {
        match &*self.shared.phase.borrow() {
            Phase::Ready => Health::Ready,
            Phase::Opening(why) => Health::Recovering(why.clone()),
            Phase::Failed(error) => Health::Failed(error.to_string()),
            Phase::Closed => Health::Closed,
        }
    }

    fn enqueue_with(
        &self,
        message: Message,
        copies: Vec<Message>,
        limits: QueueLimits,
        now: UnixMillis,
    ) -> BoxFuture<'_, Result<EnqueueOutcome, EnqueueError>> {
        async move {
            let weight = message.weight() + weight_of(&copies);
            let waiting = self.shared.unwritten_bytes();
            // Alone it always passes: the bound is on what piles up, not on one message.
            if waiting > 0 && waiting.saturating_add(weight) > self.max_unwritten_bytes {
                return Err(EnqueueError::Unavailable(
                    "the disk does not keep up".to_owned(),
                ));
            }
            let queued = Queued::new(&self.shared, weight);
            let message = Box::new(message);
            let asked = self.ask(|reply| Op::Enqueue {
                message,
                copies,
                limits,
                now,
                queued,
                reply,
            });
            asked
                .await
                .unwrap_or_else(|StoreError::Unavailable(why)| Err(EnqueueError::Unavailable(why)))
        }
        .boxed()
    }

    fn lease(&self, request: LeaseRequest) -> BoxFuture<'_, Result<LeaseBatch, StoreError>> {
        self.ask(|reply| Op::Lease { request, reply }).boxed()
    }

    fn settle(
        &self,
        lease: LeaseId,
        settle: Settle,
        now: UnixMillis,
    ) -> BoxFuture<'_, Result<SettleOutcome, StoreError>> {
        let settle = Box::new(settle);
        self.ask(move |reply| Op::Settle {
            lease,
            settle,
            now,
            reply,
        })
        .boxed()
    }

    fn extend(
        &self,
        lease: LeaseId,
        lease_for_ms: u64,
        now: UnixMillis,
    ) -> BoxFuture<'_, Result<SettleOutcome, StoreError>> {
        self.ask(move |reply| Op::Extend {
            lease,
            lease_for_ms,
            now,
            reply,
        })
        .boxed()
    }

    fn conclude(
        &self,
        id: MessageId,
        how: Conclusion,
        now: UnixMillis,
    ) -> BoxFuture<'_, Result<bool, StoreError>> {
        let how = Box::new(how);
        self.ask(move |reply| Op::Conclude {
            id,
            how,
            now,
            reply,
        })
        .boxed()
    }

    fn restore(
        &self,
        exported: Exported,
        now: UnixMillis,
    ) -> BoxFuture<'_, Result<bool, StoreError>> {
        async move {
            let queued = Queued::new(&self.shared, exported.message.weight());
            let exported = Box::new(exported);
            let asked = self.ask(|reply| Op::Restore {
                exported,
                now,
                queued,
                reply,
            });
            asked.await?
        }
        .boxed()
    }

    fn wait_due<'a>(
        &'a self,
        queue: &'a str,
        cursor: DueCursor,
        now: UnixMillis,
    ) -> BoxFuture<'a, ()> {
        async move { self.shared.signals.of(queue).wait(cursor, now).await }.boxed()
    }

    fn inspect(&self) -> Option<&dyn Inspect> {
        Some(self)
    }

    fn journal(&self) -> Option<&dyn Journal> {
        Some(self)
    }

    fn reap(&self, now: UnixMillis) -> BoxFuture<'_, Result<usize, StoreError>> {
        self.ask(move |reply| Op::Reap { now, reply }).boxed()
    }

    fn stats(&self) -> StoreStats {
        StoreStats {
            ballast_bytes: self.shared.ballast.held(),
            ..self.shared.figures.read()
        }
    }

    fn close(&self) -> BoxFuture<'_, ()> {
        async move {
            let (reply, answer) = oneshot::channel();
            let _ = self.ops.send(Op::Close { reply: Some(reply) });
            // An error means that it was closed before.
            let _ = answer.await;
            let _ = self.reads.send(Read::Stop);
        }
        .boxed()
    }
}

impl Journal for EmbeddedStore {
    fn follow(&self, queues: Followed) {
        self.shared.board.follow(queues);
    }

    fn events<'a>(
        &'a self,
        queue: &'a str,
        after: u64,
        max: usize,
    ) -> BoxFuture<'a, Result<Vec<Event>, StoreError>> {
        let queue = queue.to_owned();
        // What is not written yet comes with the next change.
        self.committed(move |shared, tx| journal::read(shared, tx, &queue, after, max))
            .boxed()
    }

    fn forget_events<'a>(
        &'a self,
        queue: &'a str,
        seq: u64,
    ) -> BoxFuture<'a, Result<(), StoreError>> {
        let queue = queue.to_owned();
        self.ask(move |reply| Op::ForgetEvents { queue, seq, reply })
            .boxed()
    }

    fn changes(&self) -> watch::Receiver<u64> {
        self.shared.board.written.subscribe()
    }

    fn backlog(&self, queue: &str) -> Backlog {
        self.shared.board.backlog(queue)
    }
}

impl Inspect for EmbeddedStore {
    fn status(&self, id: MessageId) -> BoxFuture<'_, Result<Option<StatusView>, StoreError>> {
        self.read(Some(id), move |shared, tx| reader::status(shared, tx, id))
            .boxed()
    }

    fn result(
        &self,
        id: MessageId,
        now: UnixMillis,
    ) -> BoxFuture<'_, Result<ResultOutcome, StoreError>> {
        self.read(Some(id), move |shared, tx| {
            reader::result(shared, tx, id, now)
        })
        .boxed()
    }

    fn by_idempotency<'a>(
        &'a self,
        scope: &'a str,
        key: &'a str,
        now: UnixMillis,
    ) -> BoxFuture<'a, Result<Option<MessageId>, StoreError>> {
        let (scope, key) = (scope.to_owned(), key.to_owned());
        self.read(None, move |shared, tx| {
            reader::by_idempotency(shared, tx, &scope, &key, now)
        })
        .boxed()
    }

    fn cancel(
        &self,
        id: MessageId,
        now: UnixMillis,
    ) -> BoxFuture<'_, Result<CancelOutcome, StoreError>> {
        self.ask(move |reply| Op::Cancel { id, now, reply }).boxed()
    }

    fn forget(&self, id: MessageId) -> BoxFuture<'_, Result<ForgetOutcome, StoreError>> {
        self.ask(move |reply| Op::Forget { id, reply }).boxed()
    }

    fn list<'a>(
        &'a self,
        queue: &'a str,
        state: Option<State>,
        page: PageRequest,
    ) -> BoxFuture<'a, Result<Page<StatusView>, StoreError>> {
        let queue = queue.to_owned();
        self.read(None, move |_, tx| reader::list(tx, &queue, state, page))
            .boxed()
    }

    fn dead<'a>(
        &'a self,
        queue: &'a str,
        filter: DeadFilter,
        page: PageRequest,
    ) -> BoxFuture<'a, Result<Page<DeadLetter>, StoreError>> {
        let queue = queue.to_owned();
        self.read(None, move |_, tx| reader::dead(tx, &queue, &filter, page))
            .boxed()
    }

    fn dead_letter(&self, id: MessageId) -> BoxFuture<'_, Result<Option<DeadLetter>, StoreError>> {
        self.read(Some(id), move |shared, tx| {
            reader::dead_letter(shared, tx, id)
        })
        .boxed()
    }

    fn export(&self, id: MessageId) -> BoxFuture<'_, Result<Option<Exported>, StoreError>> {
        self.read(Some(id), move |shared, tx| reader::export(shared, tx, id))
            .boxed()
    }

    fn replay(
        &self,
        selection: Selection,
        how: Replay,
        now: UnixMillis,
    ) -> BoxFuture<'_, Result<ReplayReport, StoreError>> {
        self.ask(move |reply| Op::Replay {
            selection,
            how,
            now,
            reply,
        })
        .boxed()
    }

    fn purge(
        &self,
        selection: Selection,
        now: UnixMillis,
    ) -> BoxFuture<'_, Result<u64, StoreError>> {
        self.ask(move |reply| Op::Purge {
            selection,
            now,
            reply,
        })
        .boxed()
    }

    fn purge_pending<'a>(
        &'a self,
        queue: &'a str,
        now: UnixMillis,
    ) -> BoxFuture<'a, Result<u64, StoreError>> {
        let queue = queue.to_owned();
        self.ask(move |reply| Op::PurgePending { queue, now, reply })
            .boxed()
    }

    fn counts<'a>(
        &'a self,
        queue: &'a str,
        now: UnixMillis,
    ) -> BoxFuture<'a, Result<Counts, StoreError>> {
        let queue = queue.to_owned();
        self.ask(move |reply| Op::Counts { queue, now, reply })
            .boxed()
    }

    fn queues(&self) -> BoxFuture<'_, Result<Vec<String>, StoreError>> {
        self.ask(|reply| Op::Queues { reply }).boxed()
    }

    fn wait_change(
        &self,
        id: MessageId,
        seen: u64,
    ) -> BoxFuture<'_, Result<Option<StatusView>, StoreError>> {
        async move {
            let watch = self.shared.watchers.watch(id);
            loop {
                let mut notified = pin!(watch.notify.notified());
                notified.as_mut().enable();
                match self.status(id).await? {
                    Some(view) if view.version <= seen => notified.await,
                    other => return Ok(other),
                }
            }
        }
        .boxed()
    }
}
