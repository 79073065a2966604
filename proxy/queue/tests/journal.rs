//! The events of a store: complete, in order, over a restart, and bounded.

use bytes::Bytes;
use outrigger_core::time::UnixMillis;
use outrigger_queue::message::AttemptRecord;
use outrigger_queue::{
    Backlog, EmbeddedStore, Event, EventKind, Followed, Inspect as _, Journal as _, Lease,
    LeaseRequest, Message, MessageId, Options, PageRequest, QueueBackend as _, QueueLimits, Replay,
    Selection, Settle, TargetLimits,
};
use tempfile::TempDir;

const NOW: UnixMillis = UnixMillis(1_000);

fn followed(max: u64) -> Followed {
    Followed::from([("q".to_owned(), max)])
}

async fn open(dir: &TempDir, followed: Followed) -> EmbeddedStore {
    let options = Options {
        allow_ephemeral: true,
        headroom_bytes: Some(0),
        ballast_bytes: 0,
        followed,
        ..Options::default()
    };
    let store = EmbeddedStore::open(dir.path(), options).expect("threads");
    store.ready().await.expect("opens");
    store
}

fn id(n: u8) -> MessageId {
    MessageId::from_bytes([n; 16])
}

async fn enqueue(store: &EmbeddedStore, queue: &str, n: u8) {
    let message = Message::new(id(n), queue, "billing", Bytes::new(), NOW);
    let stored = store.enqueue(message, QueueLimits::NONE, NOW).await;
    assert!(stored.is_ok(), "{stored:?}");
}

async fn lease(store: &EmbeddedStore, now: UnixMillis) -> Lease {
    let request = LeaseRequest {
        queue: "q".to_owned(),
        max: 1,
        lease_for_ms: 1_000,
        now,
        limits: TargetLimits::default(),
    };
    let mut batch = store.lease(request).await.expect("leases");
    batch.leases.remove(0)
}

async fn settle(store: &EmbeddedStore, lease: &Lease, how: Settle) {
    store.settle(lease.id, how, NOW).await.expect("settles");
}

fn attempt(reason: Option<&str>) -> AttemptRecord {
    AttemptRecord {
        at: NOW,
        reason: reason.map(str::to_owned),
        ..AttemptRecord::default()
    }
}

fn retry(attempt: Option<AttemptRecord>, reason: &str) -> Settle {
    Settle::RetryAt {
        at: NOW,
        waiting: attempt.is_none(),
        attempt,
        reason: Some(reason.to_owned()),
    }
}

fn dead() -> Settle {
    Settle::Dead {
        reason: "refused".to_owned(),
        attempt: Some(attempt(Some("http_400"))),
        excerpt: Bytes::new(),
        retain_ms: None,
    }
}

/// The events that there are once everything is durable.
async fn events(store: &EmbeddedStore) -> Vec<Event> {
    // Any list waits for what is not written yet.
    let list = store.list("q", None, PageRequest::default()).await;
    list.expect("lists");
    store.events("q", 0, 1_000).await.expect("reads")
}

fn kinds(events: &[Event]) -> Vec<&'static str> {
    events.iter().map(|event| event.kind.as_str()).collect()
}

#[tokio::test]
async fn everything_that_happens_to_a_message_is_told_in_order() {
    let dir = TempDir::new().unwrap();
    let store = open(&dir, followed(1_000)).await;
    enqueue(&store, "q", 1).await;
    enqueue(&store, "other", 2).await;
    settle(
        &store,
        &lease(&store, NOW).await,
        retry(Some(attempt(Some("http_503"))), ""),
    )
    .await;
    for _ in 0..3 {
        // Each look at a closed gate is no event.
        settle(
            &store,
            &lease(&store, NOW).await,
            retry(None, "circuit_open"),
        )
        .await;
    }
    settle(&store, &lease(&store, NOW).await, dead()).await;
    let replayed = store.replay(Selection::Ids(vec![id(1)]), Replay::default(), NOW);
    assert_eq!(replayed.await.unwrap().replayed, [id(1)]);
    let done = Settle::Done {
        result: None,
        attempt: attempt(None),
    };
    settle(&store, &lease(&store, NOW).await, done).await;
    enqueue(&store, "q", 3).await;
    store.cancel(id(3), NOW).await.unwrap();
    enqueue(&store, "q", 4).await;
    store.purge_pending("q", NOW).await.unwrap();
    let events = events(&store).await;
    assert_eq!(
        kinds(&events),
        [
            "enqueued",
            "attempted",
            "waiting",
            "attempted",
            "dead",
            "replayed",
            "attempted",
            "succeeded",
            "enqueued",
            "cancelled",
            "enqueued",
            "purged",
        ]
    );
    let numbers: Vec<u64> = events.iter().map(|event| event.seq).collect();
    assert_eq!(numbers, (1..=12).collect::<Vec<_>>());
    assert!(events[..8].iter().all(|event| event.message == id(1)));
    let tried = events[1].attempt.as_ref().unwrap();
    assert_eq!((tried.n, tried.reason.as_deref()), (1, Some("http_503")));
    assert_eq!(events[2].reason.as_deref(), Some("circuit_open"));
    assert_eq!(events[4].reason.as_deref(), Some("refused"));
    assert_eq!(events[7].replays, 1);
    store.close().await;
}

#[tokio::test]
async fn what_was_not_taken_is_there_after_a_restart_and_numbers_go_on() {
    let dir = TempDir::new().unwrap();
    let store = open(&dir, followed(1_000)).await;
    let mut changes = store.changes();
    enqueue(&store, "q", 1).await;
    changes.changed().await.unwrap();
    enqueue(&store, "q", 2).await;
    let leased = lease(&store, NOW).await;
    assert_eq!(leased.id.message, id(1));
    store.forget_events("q", 1).await.unwrap();
    store.close().await;

    // The try that the end of the process met is told, too.
    let store = open(&dir, followed(1_000)).await;
    let found = events(&store).await;
    assert_eq!(kinds(&found), ["enqueued", "attempted"]);
    assert_eq!(found[1].reason.as_deref(), Some("interrupted"));
    assert_eq!(
        found.iter().map(|event| event.seq).collect::<Vec<_>>(),
        [2, 3]
    );
    assert_eq!(
        store.backlog("q"),
        Backlog {
            held: 2,
            dropped: 0
        }
    );
    store.forget_events("q", 3).await.unwrap();
    store.close().await;

    // No number is given twice, even if no event is left to tell it.
    let store = open(&dir, followed(1_000)).await;
    assert!(events(&store).await.is_empty());
    enqueue(&store, "q", 3).await;
    assert_eq!(events(&store).await[0].seq, 4);
    store.close().await;
}

#[tokio::test]
async fn too_many_events_push_out_the_oldest_and_are_counted() {
    let dir = TempDir::new().unwrap();
    let store = open(&dir, followed(3)).await;
    for n in 1..=5 {
        enqueue(&store, "q", n).await;
    }
    let numbers = |events: Vec<Event>| events.iter().map(|event| event.seq).collect::<Vec<_>>();
    assert_eq!(numbers(events(&store).await), [3, 4, 5]);
    assert_eq!(
        store.backlog("q"),
        Backlog {
            held: 3,
            dropped: 2
        }
    );
    store.close().await;
    let store = open(&dir, followed(3)).await;
    enqueue(&store, "q", 6).await;
    assert_eq!(numbers(events(&store).await), [4, 5, 6]);
    store.close().await;
}

#[tokio::test]
async fn events_of_a_queue_that_nobody_follows_any_more_go() {
    let dir = TempDir::new().unwrap();
    let store = open(&dir, followed(1_000)).await;
    enqueue(&store, "q", 1).await;
    store.follow(Followed::new());
    enqueue(&store, "q", 2).await;
    assert_eq!(events(&store).await.len(), 1);
    while store.reap(NOW).await.unwrap() > 0 {}
    assert!(events(&store).await.is_empty());
    store.follow(followed(1_000));
    enqueue(&store, "q", 3).await;
    let found = events(&store).await;
    assert_eq!((found[0].message, found[0].seq), (id(3), 2));
    assert_eq!(found[0].kind, EventKind::Enqueued);
    store.close().await;
}
