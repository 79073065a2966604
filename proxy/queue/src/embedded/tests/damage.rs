//! One flipped bit anywhere in a closed file: noticed, or without effect; never delivered.

use std::collections::BTreeMap;

use super::*;
use crate::backend::ResultOutcome;
use crate::message::{IdemKey, StoredResult};

/// Bits that a run flips; each costs an opening. `OUTRIGGER_QUEUE_FLIPS=all` flips one in every page.
const FLIPS: usize = 48;
const PAGE: usize = 4096;
const OTHER: &str = "other";

/// Messages in every state, and everything that is kept about them.
pub(super) struct Story {
    statuses: BTreeMap<MessageId, StatusView>,
    bodies: BTreeMap<MessageId, Bytes>,
}

fn told(n: u64) -> Message {
    let mut message = message(n, 0);
    message.queue = if n.is_multiple_of(5) { OTHER } else { QUEUE }.to_owned();
    // Up to some that fill pages of their own.
    let len = if n.is_multiple_of(7) {
        20_000
    } else {
        10 + n as usize * 13
    };
    message.body = format!("the body of {n} ")
        .bytes()
        .cycle()
        .take(len)
        .collect::<Vec<u8>>()
        .into();
    message.headers = vec![("x-number".to_owned(), n.to_string().into_bytes())];
    message.ordering_key = n.is_multiple_of(3).then(|| format!("key {}", n % 4));
    message.idempotency_key = n.is_multiple_of(2).then(|| IdemKey {
        scope: "scope".to_owned(),
        key: format!("key of {n}"),
        fingerprint: [n as u8; 32],
        ttl_ms: 1_000_000,
    });
    message.result_ttl_ms = 1_000_000;
    message
}

fn told_result(n: u64) -> StoredResult {
    StoredResult {
        status: 201,
        headers: vec![("etag".to_owned(), n.to_string().into_bytes())],
        body: Bytes::from(vec![n as u8; 700]),
        trailers: None,
        finished_at: at(20),
        truncated: false,
    }
}

/// How many messages of the story there are: done below `DONE`, dead below `DEAD`, the rest wait.
const DONE: u64 = 20;
const DEAD: u64 = 35;
const ALL: u64 = 80;

impl Story {
    /// Lives through it in an empty store.
    pub(super) async fn write(store: &EmbeddedStore) {
        for n in 1..DEAD {
            let mut message = told(n);
            message.ordering_key = None;
            store
                .enqueue(message, QueueLimits::NONE, at(0))
                .await
                .unwrap();
        }
        for queue in [QUEUE, OTHER] {
            let request = LeaseRequest {
                queue: queue.to_owned(),
                max: usize::MAX,
                lease_for_ms: 1000,
                now: at(10),
                limits: TargetLimits::default(),
            };
            for lease in store.lease(request).await.unwrap().leases {
                let n = (1..DEAD).find(|n| id(*n) == lease.message.id).unwrap();
                let how = if n < DONE {
                    Settle::Done {
                        result: Some(told_result(n)),
                        attempt: attempt(201),
                    }
                } else {
                    Settle::Dead {
                        reason: "permanent_status".to_owned(),
                        attempt: Some(attempt(400)),
                        excerpt: Bytes::from_static(b"no"),
                        retain_ms: None,
                    }
                };
                store.settle(lease.id, how, at(20)).await.unwrap();
            }
        }
        for n in DEAD..ALL {
            store
                .enqueue(told(n), QueueLimits::NONE, at(30))
                .await
                .unwrap();
        }
    }

    /// What a sound store says about it.
    async fn remember(store: &EmbeddedStore) -> Self {
        let mut statuses = BTreeMap::new();
        for n in 1..ALL {
            let view = store.status(id(n)).await.unwrap().unwrap();
            statuses.insert(id(n), view);
        }
        Self {
            statuses,
            bodies: (1..ALL).map(|n| (id(n), told(n).body)).collect(),
        }
    }

    /// Everything is there, whichever version wrote it.
    pub(super) async fn read_back(store: &EmbeddedStore, name: &str) {
        let story = Self::remember(store).await;
        assert_eq!(story.check(store).await, Vec::<String>::new(), "{name}");
        assert_eq!(
            (store.stats().corrupt, drift(store).await),
            (0, 0),
            "{name}"
        );
        let state = |n| story.statuses[&id(n)].state;
        assert!((1..DONE).all(|n| state(n) == State::Succeeded), "{name}");
        assert!((DONE..DEAD).all(|n| state(n) == State::Dead), "{name}");
        assert!((DEAD..ALL).all(|n| state(n) == State::Queued), "{name}");
    }

    /// What is missing of it; panics where something is wrong.
    async fn check(&self, store: &EmbeddedStore) -> Vec<String> {
        let mut missing = Vec::new();
        for n in 1..ALL {
            let (id, message) = (id(n), told(n));
            match store.status(id).await.unwrap() {
                None => missing.push(format!("status of {n}")),
                Some(view) if view.reason.as_deref() == Some("corrupt") => {
                    missing.push(format!("{n} is corrupt"));
                }
                Some(view) => assert_eq!(view, self.statuses[&id], "status of {n}"),
            }
            if let Some(key) = &message.idempotency_key {
                let known = store
                    .by_idempotency(&key.scope, &key.key, at(40))
                    .await
                    .unwrap();
                match known {
                    None => missing.push(format!("key of {n}")),
                    Some(known) => assert_eq!(known, id, "key of {n}"),
                }
            }
            if n < DONE {
                match store.result(id, at(40)).await.unwrap() {
                    ResultOutcome::Ready(result) => assert_eq!(result, told_result(n), "{n}"),
                    other => missing.push(format!("result of {n}: {other:?}")),
                }
            } else if n < DEAD {
                match store
                    .dead_letter(id)
                    .await
                    .unwrap()
                    .map(|letter| letter.message)
                {
                    Some(Some(message)) => assert_eq!(message.body, self.bodies[&id], "{n}"),
                    Some(None) => missing.push(format!("request of dead {n}")),
                    None => missing.push(format!("dead {n}")),
                }
            }
        }
        let mut waiting: Vec<u64> = (DEAD..ALL).collect();
        loop {
            let before = waiting.len();
            for queue in [QUEUE, OTHER] {
                let request = LeaseRequest {
                    queue: queue.to_owned(),
                    max: usize::MAX,
                    lease_for_ms: 1000,
                    now: at(40),
                    limits: TargetLimits::default(),
                };
                for lease in store.lease(request).await.unwrap().leases {
                    let n = waiting.iter().position(|n| id(*n) == lease.message.id);
                    let n = waiting.remove(n.expect("delivered once, and only what waits"));
                    let expected = Message {
                        enqueued_at: lease.message.enqueued_at,
                        ..told(n)
                    };
                    assert_eq!(lease.message, expected, "delivered {n}");
                    store.settle(lease.id, done(), at(41)).await.unwrap();
                }
            }
            if waiting.len() == before {
                break;
            }
        }
        missing.extend(waiting.iter().map(|n| format!("{n} is not delivered")));
        missing
    }
}

async fn drift(store: &EmbeddedStore) -> i64 {
    let mut drift = 0;
    for queue in store.queues().await.unwrap() {
        drift += store.counts(&queue, at(40)).await.unwrap().drift().abs();
    }
    drift
}

/// How a file came to be read with a bit flipped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ended {
    /// The store was closed.
    Closed,
    /// The process was killed while nothing happened.
    Killed,
    /// The process was killed right after a commit, which from the file alone could as well be one
    /// that the power did not let end.
    KilledAfterCommit,
}

#[tokio::test]
async fn a_bit_flipped_in_any_page_is_noticed_and_never_delivered() {
    flip_pages(Ended::Closed).await;
}

#[tokio::test]
async fn a_bit_flipped_in_a_file_that_was_not_closed_is_noticed_and_never_delivered() {
    flip_pages(Ended::Killed).await;
    flip_pages(Ended::KilledAfterCommit).await;
}

async fn flip_pages(ended: Ended) {
    let dir = TempDir::new().unwrap();
    let store = open(dir.path()).await;
    Story::write(&store).await;
    let story = Story::remember(&store).await;
    let file = dir.path().join(recover::FILE);
    let mut last = 9000;
    let sound = match ended {
        Ended::Closed => {
            store.close().await;
            std::fs::read(&file).unwrap()
        }
        // Reads of the file do not go through the writer, who seals it when it has nothing to do.
        Ended::Killed => {
            let sealed = async {
                loop {
                    let bytes = std::fs::read(&file).unwrap();
                    if is_sealed(&bytes) {
                        return bytes;
                    }
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            };
            let patience = Duration::from_secs(60);
            tokio::time::timeout(patience, sealed).await.unwrap()
        }
        // One more that nothing else speaks of, copied before there is time to seal it.
        Ended::KilledAfterCommit => loop {
            last += 1;
            enqueue(&store, last).await.unwrap();
            let bytes = std::fs::read(&file).unwrap();
            if !is_sealed(&bytes) {
                break bytes;
            }
            store.cancel(id(last), at(30)).await.unwrap();
        },
    };
    store.close().await;

    let seed = fastrand::u64(..);
    println!("{ended:?}: seed {seed}");
    let mut rng = fastrand::Rng::with_seed(seed);
    let used = |n: &usize| sound[n * PAGE..].iter().take(PAGE).any(|byte| *byte != 0);
    let mut pages: Vec<usize> = (0..sound.len() / PAGE).filter(used).collect();
    let in_use = pages.len();
    if std::env::var_os("OUTRIGGER_QUEUE_FLIPS").is_none_or(|flips| flips != "all") {
        rng.shuffle(&mut pages);
        pages.truncate(FLIPS);
    }
    let (mut refused, mut reported, mut taken_back, mut harmless) = (0, 0, 0, 0);
    for page in &pages {
        let bit = page * PAGE * 8 + rng.usize(..PAGE * 8);
        let dir = TempDir::new().unwrap();
        let mut bytes = sound.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        std::fs::write(dir.path().join(recover::FILE), &bytes).unwrap();
        let store = EmbeddedStore::open(dir.path(), options()).unwrap();
        match store.ready().await {
            Err(OpenError::Damaged { .. }) => refused += 1,
            Err(other) => panic!("bit {bit}: {other}"),
            Ok(()) => {
                let known = store.status(id(last)).await.unwrap();
                let last_is_lost = ended == Ended::KilledAfterCommit && known.is_none();
                store.cancel(id(last), at(40)).await.unwrap();
                let drift = drift(&store).await;
                let missing = story.check(&store).await;
                if store.stats().corrupt > 0 {
                    reported += 1;
                } else {
                    assert_eq!(
                        (missing, drift),
                        (Vec::new(), 0),
                        "{ended:?}: bit {bit} in page {page}"
                    );
                    taken_back += u64::from(last_is_lost);
                    harmless += u64::from(!last_is_lost);
                }
            }
        }
        store.close().await;
    }
    let flipped = pages.len();
    println!(
        "{flipped} of {in_use} pages: {reported} reported, {refused} files refused, \
         {taken_back} times the last commit taken back, {harmless} without effect"
    );
    assert!(reported > refused, "most of a damaged file is read on");
    assert!(reported + refused > 0, "pages in use are among them");
}

/// Whether the file says that its last commit was made in two phases: the third bit behind the
/// engine's magic number.
fn is_sealed(file: &[u8]) -> bool {
    file[9] & 4 != 0
}
