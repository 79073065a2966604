//! The writer thread: opens the file, commits in groups, reopens after a failure.
//!
//! Owns the file and everything that changes it. Stands on the message's life. A failure of any kind
//! (I/O, a panic of the engine below) drops the file and the memory of it, fails who waits, and
//! starts over from what is on disk; an fsync that failed is never tried again on the same handle.

use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use redb::Database;
use tracing::{debug, error, info, warn};

use super::engine::{Engine, Reads};
use super::medium::Medium;
use super::options::{OpenError, Options};
use super::recover::{FILE, Failed, open_file, rebuild};
use super::rows::Fault;
use super::shared::{Op, Phase, Reply, Shared};
use super::volume::{self, FileId};
use crate::backend::{ReplayReport, StoreError};
use crate::clock;
use crate::record::{later, weight_of};

/// Most operations in one commit; bounds how long the first of them waits.
const MAX_BATCH_OPS: usize = 4096;
/// Most request bytes in one commit.
const MAX_BATCH_BYTES: u64 = 8 << 20;
/// After so long without anything to do, the last commit is sealed.
const SEAL_AFTER: Duration = Duration::from_secs(1);
/// First pause before reopening; doubles up to [`MAX_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const MAX_PAUSE: Duration = Duration::from_secs(5);
/// A file smaller than this is not worth compacting, however full the disk is.
const COMPACT_FULL_ABOVE_BYTES: u64 = 4 << 20;
/// After a compaction the writer does other things for this many times as long as it took …
const COMPACT_SHARE: u32 = 10;
/// … and for at least this long when it gained less than a quarter of the file.
const COMPACT_PAUSE: Duration = Duration::from_secs(5);

pub(super) struct Writer {
    pub(super) dir: PathBuf,
    pub(super) options: Arc<Options>,
    pub(super) medium: Medium,
    pub(super) shared: Arc<Shared>,
    pub(super) ops: Receiver<Op>,
}

/// Why serving ended.
enum End {
    Closed(Option<Reply<()>>),
    Fault(Fault),
}

/// The file that is open, and which one it was then.
#[derive(Clone, Copy)]
struct Open<'a> {
    db: &'a Database,
    id: FileId,
}

impl Writer {
    /// Runs until the store is closed.
    pub(super) fn run(self) {
        let closed = match volume::prepare(&self.dir, &self.options) {
            Ok(lock) => self.open_and_serve(lock),
            Err(error) => self.refuse(error),
        };
        self.shared.phase.send_replace(Phase::Closed);
        self.shared.wake_all();
        if let Some(reply) = closed {
            answer(reply, ());
        }
    }

    fn open_and_serve(&self, mut lock: File) -> Option<Reply<()>> {
        let mut pause = FIRST_PAUSE;
        // Anywhere, so that a lease of an earlier store in this process is never current here.
        let mut last_token = fastrand::u64(..u64::MAX / 2);
        loop {
            let opened = self.keep_directory(&mut lock);
            let fault = match opened.and_then(|()| self.open(last_token)) {
                Ok((mut engine, file)) => {
                    pause = FIRST_PAUSE;
                    self.shared.phase.send_replace(Phase::Ready);
                    self.shared.wake_all();
                    let end = self.serve(&mut engine, file);
                    last_token = engine.last_token();
                    match end {
                        End::Closed(reply) => {
                            self.let_go();
                            return reply;
                        }
                        End::Fault(fault) => {
                            if self.check_file(file).is_err() {
                                self.report_loss(&engine);
                            }
                            fault
                        }
                    }
                }
                Err(Failed::Fault(fault)) => fault,
                Err(Failed::Fatal(error)) => return self.refuse(error),
            };
            warn!(
                error = fault.0,
                pause_ms = pause.as_millis(),
                "queue store failed; reopening"
            );
            self.stop_taking_work(&fault);
            self.let_go();
            self.shared.all_written();
            self.shared.wake_all();
            self.shared.figures.reopens.fetch_add(1, Relaxed);
            if let Some(reply) = self.sit_out(pause) {
                return reply;
            }
            pause = (pause * 2).min(MAX_PAUSE);
        }
    }

    /// Makes the directory again if it was removed, and takes it again for this process.
    fn keep_directory(&self, lock: &mut File) -> Result<(), Failed> {
        if !volume::is_held(&self.dir, lock) {
            *lock = volume::prepare(&self.dir, &self.options).map_err(|error| match error {
                OpenError::Directory { .. } => Failed::Fault(Fault(error.to_string())),
                other => Failed::Fatal(other),
            })?;
        }
        Ok(())
    }

    /// From here on, who waits for an answer that does not come is told why.
    fn stop_taking_work(&self, fault: &Fault) {
        let why = format!("recovering: {}", fault.0);
        self.shared.phase.send_replace(Phase::Opening(why));
    }

    /// Says what went with a file that was removed under the store.
    fn report_loss(&self, engine: &Engine) {
        let (pending, dead) = engine.held();
        error!(
            file = %self.dir.join(FILE).display(),
            pending,
            dead,
            "the queue store's file was removed while it was open; \
             the messages in it are lost, and what is there now is opened in its place"
        );
    }

    /// Fails unless the next start would find the file that is open; notes its size.
    fn check_file(&self, open: FileId) -> Result<(), Fault> {
        let gone = |why: &str| Err(Fault(format!("the store's file is gone: {why}")));
        match std::fs::metadata(self.dir.join(FILE)) {
            Ok(meta) if FileId::of(&meta) == open => {
                let size = &self.shared.figures.file_bytes;
                size.store(meta.len(), Relaxed);
                Ok(())
            }
            Ok(_) => gone("another one has its name"),
            Err(error) => gone(&error.to_string()),
        }
    }

    /// Opens the file; a panic over it means that it is damaged.
    fn open(&self, last_token: u64) -> Result<(Engine, FileId), Failed> {
        if let Err(error) = self.shared.ballast.find() {
            warn!(%error, "the ballast of the queue's volume is not to be had");
        }
        let shared = Arc::clone(&self.shared);
        let mut engine = Engine::new(
            Arc::clone(&self.options),
            self.dir.clone(),
            shared,
            last_token,
        );
        let opened = catch_unwind(AssertUnwindSafe(|| {
            let (mut db, id) = open_file(&self.dir, &self.options, &self.medium, &self.shared)?;
            rebuild(&mut db, &mut engine, &self.dir, &self.shared)?;
            engine.look_at_disk()?;
            Ok((db, id))
        }));
        let (db, id) = opened.unwrap_or_else(|_| {
            let error = "reading it panicked".to_owned();
            let file = self.dir.join(FILE);
            Err(Failed::Fatal(OpenError::Damaged { file, error }))
        })?;
        *self.shared.db_mut() = Some(db);
        Ok((engine, id))
    }

    /// Lets go of the file, whatever state it is in.
    fn let_go(&self) {
        let db = self.shared.db_mut().take();
        let closed = catch_unwind(AssertUnwindSafe(|| db.map(Database::close)));
        match closed {
            Ok(None | Some(Ok(()))) => {}
            Ok(Some(Err(error))) => warn!(%error, "queue file did not close cleanly"),
            Err(_) => warn!("queue file did not close cleanly: panic"),
        }
    }

    /// Answers nobody until closed: someone must act.
    fn refuse(&self, error: OpenError) -> Option<Reply<()>> {
        debug!(%error, "queue store is not available");
        self.shared.phase.send_replace(Phase::Failed(error));
        self.shared.wake_all();
        loop {
            match self.ops.recv() {
                Ok(Op::Close { reply }) => return reply,
                Ok(_) => {}
                Err(_) => return None,
            }
        }
    }

    /// Drops what is asked for a while; a dropped reply reads as unavailable.
    fn sit_out(&self, pause: Duration) -> Option<Option<Reply<()>>> {
        let until = clock::instant() + pause;
        loop {
            let left = until.saturating_duration_since(clock::instant());
            match self.ops.recv_timeout(left) {
                Ok(Op::Close { reply }) => return Some(reply),
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => return None,
                Err(RecvTimeoutError::Disconnected) => return Some(None),
            }
        }
    }

    fn serve(&self, engine: &mut Engine, file: FileId) -> End {
        let mut compact_from = None;
        loop {
            if engine.take_wants_room()
                && let Err(fault) = self.make_room(engine, file, &mut compact_from)
            {
                return End::Fault(fault);
            }
            let batch = self.collect(engine);
            let guard = self.shared.db();
            let Some(db) = guard.as_ref() else {
                return End::Fault(Fault("the file is gone".to_owned()));
            };
            let mut close = None;
            let ran = catch_unwind(AssertUnwindSafe(|| {
                self.work(engine, Open { db, id: file }, batch, &mut close)
            }));
            drop(guard);
            let fault = match ran {
                Ok(Ok(())) => None,
                Ok(Err(fault)) => Some(fault),
                Err(_) => Some(Fault("the store panicked".to_owned())),
            };
            match (close, fault) {
                (None, None) => {}
                (None, Some(fault)) => return End::Fault(fault),
                (Some(reply), None) => return End::Closed(reply),
                (Some(reply), Some(fault)) => {
                    error!(error = fault.0, "queue store failed while closing");
                    return End::Closed(reply);
                }
            }
        }
    }

    /// Gives the unused part of a file that is mostly empty back to a full volume. The file keeps
    /// its size when messages leave it, so nothing else would ever end the refusals. `from` is the
    /// earliest moment for it: who works through a backlog on a full volume shall not compact at
    /// every refusal.
    fn make_room(
        &self,
        engine: &Engine,
        file: FileId,
        from: &mut Option<Instant>,
    ) -> Result<(), Fault> {
        let began = clock::instant();
        self.check_file(file)?;
        let before = self.shared.figures.file_bytes.load(Relaxed);
        let mostly_empty = engine.index.stored_bytes() < before / 2;
        if before < COMPACT_FULL_ABOVE_BYTES
            || !mostly_empty
            || from.is_some_and(|from| began < from)
        {
            return Ok(());
        }
        let mut guard = self.shared.db_mut();
        let Some(db) = guard.as_mut() else {
            return Err(Fault("the file is gone".to_owned()));
        };
        let compacted = catch_unwind(AssertUnwindSafe(|| db.compact()));
        drop(guard);
        compacted.map_err(|_| Fault("compacting the store panicked".to_owned()))??;
        self.check_file(file)?;
        let after = self.shared.figures.file_bytes.load(Relaxed);
        let took = began.elapsed();
        let least = if after > before / 4 * 3 {
            COMPACT_PAUSE
        } else {
            Duration::ZERO
        };
        *from = Some(clock::instant() + least.max(took * COMPACT_SHARE));
        info!(
            before,
            after,
            took_ms = took.as_millis(),
            "queue file compacted: its volume is nearly full"
        );
        Ok(())
    }

    /// Waits for something to do, then takes what else is there. Empty: the ride-along is due, or
    /// the last commit is to be sealed.
    fn collect(&self, engine: &Engine) -> Vec<Op> {
        let patience = match engine.dirty_since() {
            Some(since) => {
                let due = since + self.options.ride_along;
                Some(due.saturating_duration_since(clock::instant()))
            }
            None => engine.is_unsealed().then_some(SEAL_AFTER),
        };
        let received = match patience {
            None => self.ops.recv().map_err(RecvTimeoutError::from),
            Some(patience) => self.ops.recv_timeout(patience),
        };
        let first = match received {
            Ok(op) => op,
            Err(RecvTimeoutError::Timeout) => return Vec::new(),
            Err(RecvTimeoutError::Disconnected) => Op::Close { reply: None },
        };
        let mut bytes = weight(&first);
        let mut batch = vec![first];
        while batch.len() < MAX_BATCH_OPS
            && bytes < MAX_BATCH_BYTES
            && let Ok(op) = self.ops.try_recv()
        {
            bytes += weight(&op);
            batch.push(op);
        }
        batch
    }

    /// Does a batch: changes first, one commit if somebody waits for it, then what only looks or
    /// leases, so that nothing is delivered before it is durable. Sets `close` when asked to.
    fn work(
        &self,
        engine: &mut Engine,
        file: Open<'_>,
        batch: Vec<Op>,
        close: &mut Option<Option<Reply<()>>>,
    ) -> Result<(), Fault> {
        let mut reads = Reads::new(file.db);
        let mut after_commit: Vec<Box<dyn FnOnce()>> = Vec::new();
        let mut rest = Vec::new();
        let mut disk = None;
        let mut must_commit = false;
        let failed = |fault: &Fault| self.stop_taking_work(fault);
        let nothing_to_do = batch.is_empty() && !engine.is_dirty();
        for op in batch {
            match op {
                Op::Enqueue {
                    message,
                    copies,
                    limits,
                    now,
                    queued,
                    reply,
                } => {
                    let disk = match &disk {
                        Some(disk) => disk,
                        None => disk.insert(engine.check_disk().inspect_err(failed)?),
                    };
                    let out = engine.enqueue(&mut reads, &message, &copies, limits, disk, now)?;
                    must_commit |= out.is_ok();
                    after_commit.push(Box::new(move || {
                        drop(queued);
                        answer(reply, out);
                    }));
                }
                Op::Restore {
                    exported,
                    now,
                    queued,
                    reply,
                } => {
                    let disk = match &disk {
                        Some(disk) => disk,
                        None => disk.insert(engine.check_disk().inspect_err(failed)?),
                    };
                    let out = match disk {
                        Ok(()) => Ok(engine.restore(&mut reads, &exported, now)?),
                        Err(full) => Err(StoreError::Unavailable(full.to_string())),
                    };
                    must_commit |= out.is_ok();
                    after_commit.push(Box::new(move || {
                        drop(queued);
                        answer(reply, out);
                    }));
                }
                Op::Settle {
                    lease,
                    settle,
                    now,
                    reply,
                } => {
                    answer(reply, engine.settle(&mut reads, lease, *settle, now)?);
                }
                Op::Extend {
                    lease,
                    lease_for_ms,
                    now,
                    reply,
                } => {
                    answer(reply, engine.extend(lease, later(now, lease_for_ms)));
                }
                Op::Cancel { id, now, reply } => {
                    let out = engine.cancel(&mut reads, id, now)?;
                    must_commit = true;
                    after_commit.push(Box::new(move || answer(reply, out)));
                }
                Op::Forget { id, reply } => {
                    let out = engine.forget(reads.tx()?, id)?;
                    must_commit = true;
                    after_commit.push(Box::new(move || answer(reply, out)));
                }
                Op::ForgetEvents { queue, seq, reply } => {
                    engine.forget_events(&queue, seq);
                    answer(reply, ());
                }
                Op::Conclude {
                    id,
                    how,
                    now,
                    reply,
                } => {
                    let out = engine.conclude(&mut reads, id, *how, now)?;
                    must_commit = true;
                    after_commit.push(Box::new(move || answer(reply, out)));
                }
                Op::Flush { reply } => {
                    must_commit = true;
                    after_commit.push(Box::new(move || answer(reply, ())));
                }
                Op::Fault(why) => return Err(Fault(why)),
                Op::Close { reply } => *close = Some(reply),
                other => rest.push(other),
            }
        }
        let ride_along_due = engine
            .dirty_since()
            .is_some_and(|since| since.elapsed() >= self.options.ride_along);
        if must_commit || ride_along_due || close.is_some() {
            self.commit(engine, file, &mut reads).inspect_err(failed)?;
        }
        if nothing_to_do {
            engine.seal(file.db).inspect_err(failed)?;
        }
        after_commit.into_iter().for_each(|done| done());
        for op in rest {
            self.look(engine, file, &mut reads, op)?;
        }
        if close.is_some() {
            self.commit(engine, file, &mut reads)?;
        }
        Ok(())
    }

    fn commit(
        &self,
        engine: &mut Engine,
        file: Open<'_>,
        reads: &mut Reads<'_>,
    ) -> Result<(), Fault> {
        if engine.is_dirty() {
            reads.renew();
            engine.commit(file.db)?;
        }
        // Also without a change: a repeat is told that its message is stored.
        self.check_file(file.id)
    }

    fn look(
        &self,
        engine: &mut Engine,
        file: Open<'_>,
        reads: &mut Reads<'_>,
        op: Op,
    ) -> Result<(), Fault> {
        match op {
            Op::Lease { request, reply } => answer(reply, engine.lease(reads, &request)?),
            Op::Counts { queue, now, reply } => answer(reply, engine.counts(&queue, now)),
            Op::Queues { reply } => answer(reply, engine.index.names()),
            Op::Replay {
                selection,
                how,
                now,
                reply,
            } => {
                self.commit(engine, file, reads)?;
                let ids = engine.select(reads, selection)?;
                let mut report = ReplayReport::default();
                for ids in ids.chunks(MAX_BATCH_OPS) {
                    engine.replay(reads, ids, &how, now, &mut report)?;
                    self.commit(engine, file, reads)?;
                }
                answer(reply, report);
            }
            Op::Purge {
                selection,
                now,
                reply,
            } => {
                self.commit(engine, file, reads)?;
                let mut purged = 0;
                for ids in engine.select(reads, selection)?.chunks(MAX_BATCH_OPS) {
                    purged += engine.purge(reads, ids, now)?;
                    self.commit(engine, file, reads)?;
                }
                answer(reply, purged);
            }
            Op::PurgePending { queue, now, reply } => {
                let mut purged = 0;
                while let Some(some) = engine.purge_pending(reads, &queue, now, MAX_BATCH_OPS)? {
                    purged += some;
                    self.commit(engine, file, reads)?;
                }
                answer(reply, purged);
            }
            Op::Reap { now, reply } => {
                self.commit(engine, file, reads)?;
                answer(reply, engine.reap(reads, now)?);
            }
            // Done before the commit.
            Op::Enqueue { .. }
            | Op::Restore { .. }
            | Op::Settle { .. }
            | Op::Extend { .. }
            | Op::Cancel { .. }
            | Op::Conclude { .. }
            | Op::Forget { .. }
            | Op::ForgetEvents { .. }
            | Op::Flush { .. }
            | Op::Fault(_)
            | Op::Close { .. } => {}
        }
        Ok(())
    }
}

/// Answers; one who went away needs none.
fn answer<T>(reply: Reply<T>, out: T) {
    let _ = reply.send(out);
}

fn weight(op: &Op) -> u64 {
    match op {
        Op::Enqueue {
            message, copies, ..
        } => message.weight() + weight_of(copies),
        Op::Restore { exported, .. } => exported.message.weight(),
        _ => 0,
    }
}
