//! The durable queue behind async calls: one trait, a memory reference and an embedded store.
//!
//! Owns: what a message is, what may happen to it, and where it is kept. Does not own: when to try
//! again, how often, and when to give up (the dispatcher's policy), nor HTTP or gRPC. Stands on the
//! message's life.
//!
//! * [`message`]: the nouns. [`MessageId`], [`Message`], [`StatusView`], [`DeadLetter`].
//! * [`backend`]: the verbs. [`QueueBackend`] and its facet [`Inspect`].
//! * [`event`]: what happened to messages, for readers elsewhere, and the facet [`Journal`].
//! * [`memory`]: the reference; nothing survives the process.
//! * [`embedded`]: one file on a local disk, fsynced before an enqueue resolves.
//! * `conformance` (feature `test-util`): the suite that every backend passes.

pub mod backend;
pub mod embedded;
pub mod event;
pub mod memory;
pub mod message;

#[cfg(any(test, feature = "test-util"))]
pub mod conformance;

mod clock;
mod id;
mod recent;
mod record;
mod signal;

pub use backend::{
    CancelOutcome, Capabilities, Conclusion, Counts, DeadFilter, DueCursor, Durability,
    EnqueueError, EnqueueOutcome, ForgetOutcome, Health, Inspect, Lease, LeaseBatch, LeaseId,
    LeaseRequest, Page, PageRequest, QueueBackend, QueueLimits, Quota, Receipt, Replay,
    ReplayReport, ResultOutcome, Retention, Selection, Settle, SettleOutcome, StoreError,
    StoreStats, TargetLimits, wait_final,
};
pub use embedded::{EmbeddedStore, OpenError, Options};
pub use event::{Backlog, Event, EventKind, Followed, Journal};
pub use id::{MessageId, ParseIdError};
pub use memory::MemoryQueue;
pub use message::{
    AttemptRecord, DeadLetter, Death, Exported, HELD, IdemKey, Message, State, StatusView,
    StoredResult,
};
