//! Drives the embedded store and the reference with the same random life, reopenings included.

use std::sync::Arc;

use bytes::Bytes;
use outrigger_core::time::UnixMillis;
use outrigger_queue::message::{AttemptRecord, IdemKey, StoredResult};
use outrigger_queue::{
    DeadFilter, DeadLetter, EmbeddedStore, Inspect, Lease, LeaseRequest, MemoryQueue, Message,
    MessageId, Options, PageRequest, QueueBackend, QueueLimits, Quota, Replay, Retention,
    Selection, Settle, State, StatusView, TargetLimits,
};
use proptest::collection::vec;
use proptest::prelude::*;
use tempfile::TempDir;

const QUEUES: [&str; 2] = ["a", "b"];

#[derive(Debug, Clone)]
struct NewMessage {
    queue: usize,
    target: u8,
    key: Option<u8>,
    block_on_dead: bool,
    idem: Option<(u8, u8)>,
    copies: u16,
    delay: u64,
    expires: Option<u64>,
}

#[derive(Debug, Clone)]
enum Step {
    Enqueue(NewMessage),
    Lease {
        queue: usize,
        max: usize,
        lease_for: u64,
        skip: Option<u8>,
    },
    Settle {
        lease: usize,
        how: u8,
        delay: u64,
    },
    Extend {
        lease: usize,
    },
    Cancel(usize),
    Forget(usize),
    Replay(Select),
    Purge(Select),
    PurgePending(usize),
    Reap,
    Advance(u64),
    Reopen,
}

#[derive(Debug, Clone)]
enum Select {
    One(usize),
    Some {
        queue: usize,
        reason: bool,
        max: usize,
    },
}

fn select() -> impl Strategy<Value = Select> {
    prop_oneof![
        (0..40_usize).prop_map(Select::One),
        (0..2_usize, any::<bool>(), 0..4_usize).prop_map(|(queue, reason, max)| Select::Some {
            queue,
            reason,
            max
        }),
    ]
}

fn new_message() -> impl Strategy<Value = NewMessage> {
    (
        0..2_usize,
        0..3_u8,
        proptest::option::of(0..2_u8),
        any::<bool>(),
        proptest::option::weighted(0.3, (0..4_u8, 0..2_u8)),
        prop_oneof![6 => Just(0), 1 => 1..3_u16],
        prop_oneof![3 => Just(0), 1 => 1..200_u64],
        proptest::option::weighted(0.2, 1..300_u64),
    )
        .prop_map(
            |(queue, target, key, block_on_dead, idem, copies, delay, expires)| NewMessage {
                queue,
                target,
                key,
                block_on_dead,
                idem,
                copies,
                delay,
                expires,
            },
        )
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => new_message().prop_map(Step::Enqueue),
        6 => (0..2_usize, 0..4_usize, 1..150_u64, proptest::option::weighted(0.2, 0..3_u8))
            .prop_map(|(queue, max, lease_for, skip)| Step::Lease { queue, max, lease_for, skip }),
        8 => (0..40_usize, 0..7_u8, 0..100_u64)
            .prop_map(|(lease, how, delay)| Step::Settle { lease, how, delay }),
        1 => (0..40_usize).prop_map(|lease| Step::Extend { lease }),
        2 => (0..40_usize).prop_map(Step::Cancel),
        1 => (0..40_usize).prop_map(Step::Forget),
        2 => select().prop_map(Step::Replay),
        1 => select().prop_map(Step::Purge),
        1 => (0..2_usize).prop_map(Step::PurgePending),
        2 => Just(Step::Reap),
        4 => (1..120_u64).prop_map(Step::Advance),
        1 => Just(Step::Reopen),
    ]
}

fn retention() -> Retention {
    Retention {
        tombstone_ms: 400,
        dead_ms: 600,
        max_dead: 3,
    }
}

/// The two stores side by side.
struct Twins {
    memory: MemoryQueue,
    embedded: EmbeddedStore,
    dir: TempDir,
    now: UnixMillis,
    sent: u64,
    leases: Vec<(Lease, Lease)>,
}

fn id(n: u64) -> MessageId {
    MessageId::from_bytes(u128::from(n).to_be_bytes())
}

/// In memory where there is such a mount: what is compared here does not depend on the flush, and
/// hundreds of reopenings do on its speed.
fn scratch() -> TempDir {
    TempDir::new_in("/dev/shm")
        .or_else(|_| TempDir::new())
        .expect("a directory")
}

/// How many lives are tried; `PROPTEST_CASES` for a longer search.
fn cases() -> u32 {
    let wanted = std::env::var("PROPTEST_CASES").ok();
    wanted.and_then(|cases| cases.parse().ok()).unwrap_or(48)
}

async fn open(dir: &TempDir) -> EmbeddedStore {
    let options = Options {
        allow_ephemeral: true,
        headroom_bytes: Some(0),
        ballast_bytes: 0,
        retention: retention(),
        ..Options::default()
    };
    let store = EmbeddedStore::open(dir.path(), options).expect("threads");
    store.ready().await.expect("opens");
    store
}

impl Twins {
    async fn new() -> Self {
        let dir = scratch();
        let embedded = open(&dir).await;
        let memory = MemoryQueue::new(retention());
        Self {
            memory,
            embedded,
            dir,
            now: UnixMillis(1000),
            sent: 0,
            leases: Vec::new(),
        }
    }

    fn message(&mut self, new: &NewMessage) -> Message {
        self.sent += 1;
        let body = Bytes::from(format!("{new:?}"));
        let target = format!("t{}", new.target);
        let mut message = Message::new(id(self.sent), QUEUES[new.queue], &target, body, self.now);
        message.caller = format!("c{}", new.target % 2);
        message.ordering_key = new.key.map(|key| format!("k{key}"));
        message.block_on_dead = new.block_on_dead;
        message.not_before = UnixMillis(self.now.0 + new.delay);
        message.expires_at = new.expires.map(|ms| UnixMillis(self.now.0 + ms));
        message.result_ttl_ms = u64::from(new.target) * 100;
        message.idempotency_key = new.idem.map(|(key, fingerprint)| IdemKey {
            scope: "s".to_owned(),
            key: key.to_string(),
            fingerprint: [fingerprint; 32],
            ttl_ms: 250,
        });
        message
    }

    async fn step(&mut self, step: Step) {
        let now = self.now;
        match step {
            Step::Enqueue(new) => self.enqueue(&new).await,
            Step::Lease {
                queue,
                max,
                lease_for,
                skip,
            } => {
                self.lease(queue, max, lease_for, skip).await;
            }
            Step::Settle { lease, how, delay } => self.settle(lease, how, delay).await,
            Step::Extend { lease } => {
                let Some((m, e)) = self.leases.get(lease) else {
                    return;
                };
                let m = self.memory.extend(m.id, 100, now).await;
                assert_eq!(m, self.embedded.extend(e.id, 100, now).await);
            }
            Step::Cancel(n) => {
                let m = self.memory.cancel(id(n as u64), now).await;
                assert_eq!(m, self.embedded.cancel(id(n as u64), now).await);
            }
            Step::Forget(n) => {
                let m = self.memory.forget(id(n as u64)).await;
                assert_eq!(m, self.embedded.forget(id(n as u64)).await);
            }
            Step::Replay(which) => {
                let how = Replay {
                    to: self.now.0.is_multiple_of(2).then(|| "t9".to_owned()),
                    per_second: std::num::NonZeroU32::new((self.now.0 % 3 * 20) as u32),
                };
                let m = self
                    .memory
                    .replay(selection(&which), how.clone(), now)
                    .await;
                assert_eq!(m, self.embedded.replay(selection(&which), how, now).await);
            }
            Step::Purge(which) => {
                let m = self.memory.purge(selection(&which), now).await;
                assert_eq!(m, self.embedded.purge(selection(&which), now).await);
            }
            Step::PurgePending(queue) => {
                let m = self.memory.purge_pending(QUEUES[queue], now).await;
                assert_eq!(m, self.embedded.purge_pending(QUEUES[queue], now).await);
            }
            Step::Reap => {
                while self.memory.reap(now).await.expect("reap") > 0 {}
                while self.embedded.reap(now).await.expect("reap") > 0 {}
            }
            Step::Advance(ms) => self.now = UnixMillis(now.0 + ms),
            Step::Reopen => {
                self.embedded.close().await;
                self.embedded = open(&self.dir).await;
                self.memory.interrupt_all();
            }
        }
    }

    async fn enqueue(&mut self, new: &NewMessage) {
        let limits = QueueLimits {
            max_depth: 12,
            per_caller: Some(Quota {
                max_depth: 5,
                max_bytes: 1_000,
            }),
            ..QueueLimits::NONE
        };
        let message = self.message(new);
        let copies: Vec<Message> = (1..=new.copies)
            .map(|n| {
                self.sent += 1;
                Message {
                    id: id(self.sent),
                    target: format!("t{n}"),
                    idempotency_key: None,
                    ..message.clone()
                }
            })
            .collect();
        let (first, more) = (message.clone(), copies.clone());
        let m = self
            .memory
            .enqueue_with(first, more, limits, self.now)
            .await;
        let e = self
            .embedded
            .enqueue_with(message, copies, limits, self.now)
            .await;
        // They differ in how durable they are, and in nothing else.
        let plain = |out| format!("{out:?}").replace("Fsynced", "Memory");
        assert_eq!(plain(m), plain(e));
    }

    async fn lease(&mut self, queue: usize, max: usize, lease_for_ms: u64, skip: Option<u8>) {
        let request = LeaseRequest {
            queue: QUEUES[queue].to_owned(),
            max,
            lease_for_ms,
            now: self.now,
            limits: TargetLimits::skip(skip.map(|target| format!("t{target}"))),
        };
        let m = self
            .memory
            .lease(request.clone())
            .await
            .expect("lease")
            .leases;
        let e = self.embedded.lease(request).await.expect("lease").leases;
        assert_eq!(m.len(), e.len(), "memory {m:?}\nembedded {e:?}");
        for (m, e) in m.into_iter().zip(e) {
            assert_eq!(m.message, e.message);
            assert_eq!(
                (m.attempts_so_far, m.until, m.replays, m.created_at),
                (e.attempts_so_far, e.until, e.replays, e.created_at)
            );
            self.leases.push((m, e));
        }
    }

    async fn settle(&mut self, lease: usize, how: u8, delay: u64) {
        let last = self.leases.len().wrapping_sub(1).wrapping_sub(lease % 8);
        let Some((m, e)) = self.leases.get(last) else {
            return;
        };
        let how = settle(how, UnixMillis(self.now.0 + delay), self.now);
        let out = self.memory.settle(m.id, how.clone(), self.now).await;
        assert_eq!(out, self.embedded.settle(e.id, how, self.now).await);
    }

    async fn compare(&self) {
        let (m, e): (&dyn Inspect, &dyn Inspect) = (&self.memory, &self.embedded);
        assert_eq!(m.queues().await, e.queues().await);
        for queue in QUEUES {
            let counts = e.counts(queue, self.now).await.expect("counts");
            assert_eq!(counts.drift(), 0, "{counts:?}");
            assert_eq!(m.counts(queue, self.now).await, Ok(counts));
            for state in [None].into_iter().chain(State::ALL.map(Some)) {
                assert_eq!(listed(m, queue, state).await, listed(e, queue, state).await);
            }
            assert_eq!(buried(m, queue).await, buried(e, queue).await);
        }
        for n in 0..=self.sent {
            assert_eq!(m.status(id(n)).await, e.status(id(n)).await);
            assert_eq!(
                m.result(id(n), self.now).await,
                e.result(id(n), self.now).await
            );
            assert_eq!(m.dead_letter(id(n)).await, e.dead_letter(id(n)).await);
        }
        for key in ["0", "1", "2", "3"] {
            let known = m.by_idempotency("s", key, self.now).await;
            assert_eq!(known, e.by_idempotency("s", key, self.now).await);
        }
    }
}

/// A whole list, page by page; where a page ends is the backend's own affair.
async fn listed(inspect: &dyn Inspect, queue: &str, state: Option<State>) -> Vec<StatusView> {
    let (mut all, mut after) = (Vec::new(), None);
    loop {
        let page = PageRequest { after, limit: 3 };
        let page = inspect.list(queue, state, page).await.expect("list");
        all.extend(page.items);
        after = page.next;
        if after.is_none() {
            return all;
        }
    }
}

async fn buried(inspect: &dyn Inspect, queue: &str) -> Vec<DeadLetter> {
    let (mut all, mut after) = (Vec::new(), None);
    loop {
        let page = PageRequest { after, limit: 3 };
        let page = inspect
            .dead(queue, DeadFilter::default(), page)
            .await
            .expect("dead");
        all.extend(page.items);
        after = page.next;
        if after.is_none() {
            return all;
        }
    }
}

fn selection(which: &Select) -> Selection {
    match which {
        Select::One(n) => Selection::Ids(vec![id(*n as u64)]),
        Select::Some { queue, reason, max } => {
            let reason = reason.then(|| "no".to_owned());
            let filter = DeadFilter {
                reason,
                ..DeadFilter::default()
            };
            Selection::Matching {
                queue: QUEUES[*queue].to_owned(),
                filter,
                max: *max,
            }
        }
    }
}

fn settle(how: u8, at: UnixMillis, now: UnixMillis) -> Settle {
    let attempt = AttemptRecord {
        status: Some(503),
        at: now,
        ..AttemptRecord::default()
    };
    let result = StoredResult {
        status: 200,
        headers: Vec::new(),
        body: Bytes::from_static(b"ok"),
        trailers: None,
        finished_at: now,
        truncated: false,
    };
    let excerpt = Bytes::from_static(b"oh");
    match how {
        0 => Settle::Done {
            result: Some(result),
            attempt,
        },
        1 => Settle::Done {
            result: None,
            attempt,
        },
        2 => Settle::RetryAt {
            at,
            attempt: Some(attempt),
            waiting: false,
            reason: None,
        },
        3 => {
            let reason = Some("circuit_open".to_owned());
            Settle::RetryAt {
                at,
                attempt: None,
                waiting: true,
                reason,
            }
        }
        4 => Settle::Dead {
            reason: "no".to_owned(),
            attempt: Some(attempt),
            excerpt,
            retain_ms: None,
        },
        5 => Settle::Dead {
            reason: "max_age".to_owned(),
            attempt: None,
            excerpt,
            // Other than the default, and by turns longer and shorter.
            retain_ms: Some(at.0.saturating_sub(now.0) * 12),
        },
        6 if at.0.is_multiple_of(2) => Settle::Expired,
        _ => Settle::Release,
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), ..ProptestConfig::default() })]

    #[test]
    fn the_embedded_store_lives_like_the_reference(steps in vec(step(), 1..90)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()
            .expect("a runtime");
        runtime.block_on(async {
            let mut twins = Twins::new().await;
            for (n, step) in steps.into_iter().enumerate() {
                twins.step(step).await;
                if n % 10 == 9 {
                    twins.compare().await;
                }
            }
            twins.compare().await;
            twins.embedded.close().await;
        });
    }
}

#[test]
fn a_backend_is_shared_as_an_object() {
    fn takes(_: Arc<dyn QueueBackend>) {}
    takes(Arc::new(MemoryQueue::default()));
}
