//! A queue that grew deep: what it costs in memory, how it opens, and that it drains in order.
//!
//! Alone in its file, because the memory of the process is what it looks at.
//! `OUTRIGGER_DEEP_QUEUE=1000000` is the full depth; run that on a release build.
#![expect(
    clippy::disallowed_methods,
    reason = "prints how long each part took, and decides nothing by it"
)]

use std::time::Instant;

use bytes::Bytes;
use futures_util::future::join_all;
use outrigger_core::time::UnixMillis;
use outrigger_queue::message::AttemptRecord;
use outrigger_queue::{
    CancelOutcome, EmbeddedStore, Inspect as _, LeaseRequest, Message, MessageId, Options,
    QueueBackend as _, QueueLimits, Settle, State, TargetLimits,
};

/// How deep a queue is looked at without being asked for more.
const DEPTH: u64 = 60_000;
/// What may be resident for each message. An entry and its places in the order are about 160 bytes;
/// the rest is the allocator's, whole records would be over 900.
const MOST_BYTES_EACH: u64 = 450;
const NOW: UnixMillis = UnixMillis(1_700_000_000_000);
const BATCH: u64 = 4000;

fn id(n: u64) -> MessageId {
    MessageId::from_bytes((1_u128 << 100 | u128::from(n)).to_be_bytes())
}

/// What a sidecar stores for a small order: 1 KiB, and who sent it, by which route, in which trace.
fn message(n: u64) -> Message {
    let mut message = Message::new(id(n), "orders", "orders", Bytes::from(vec![7; 1024]), NOW);
    message.caller = "spiffe://example.org/ns/shop/sa/checkout".to_owned();
    message.route = "shop/orders-by-queue".to_owned();
    let trace = format!("00-{n:032x}-{n:016x}-01");
    message.trace_context = Some(trace);
    message.headers = vec![("content-type".to_owned(), b"application/json".to_vec())];
    message
}

/// Resident bytes of this process.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("of Linux");
    let line = status.lines().find(|line| line.starts_with("VmRSS:"));
    let kib = line.and_then(|line| line.split_whitespace().nth(1));
    kib.and_then(|kib| kib.parse::<u64>().ok())
        .expect("kibibytes")
        * 1024
}

async fn open(dir: &std::path::Path) -> EmbeddedStore {
    let options = Options {
        allow_ephemeral: true,
        headroom_bytes: Some(0),
        ballast_bytes: 0,
        // The page cache is bounded by its own setting; small here, to see the rest.
        cache_bytes: 2 << 20,
        ..Options::default()
    };
    let store = EmbeddedStore::open(dir, options).expect("threads");
    store.ready().await.expect("it opens");
    store
}

async fn enqueue(store: &EmbeddedStore, from: u64, to: u64) {
    for first in (from..to).step_by(BATCH as usize) {
        let batch = (first..to.min(first + BATCH))
            .map(|n| store.enqueue(message(n), QueueLimits::NONE, NOW));
        for out in join_all(batch).await {
            out.expect("there is room");
        }
    }
}

#[tokio::test]
async fn a_deep_queue_takes_little_memory_and_drains_in_order() {
    let depth = std::env::var("OUTRIGGER_DEEP_QUEUE").ok();
    let depth = depth.map_or(DEPTH, |depth| depth.parse().expect("a number"));
    let dir = tempfile::TempDir::new().expect("a directory");
    let store = open(dir.path()).await;
    // What the first batches leave in the allocator is there for the later ones.
    enqueue(&store, 0, 2 * BATCH).await;
    let few = resident();
    let began = Instant::now();
    enqueue(&store, 2 * BATCH, depth).await;
    let each = |now: u64| now.saturating_sub(few) / (depth - 2 * BATCH);
    let full = resident();
    println!(
        "{depth} messages in {:.1?}: {} KiB resident, {} before, {} bytes each",
        began.elapsed(),
        full / 1024,
        few / 1024,
        each(full)
    );
    assert!(each(full) <= MOST_BYTES_EACH, "{} bytes each", each(full));
    store.close().await;
    drop(store);

    let began = Instant::now();
    let store = open(dir.path()).await;
    let reopened = resident();
    println!(
        "opened again in {:.1?}: {} KiB resident, {} bytes each",
        began.elapsed(),
        reopened / 1024,
        each(reopened)
    );
    assert!(each(reopened) <= MOST_BYTES_EACH, "{}", each(reopened));

    // What is not in memory is still to be had.
    let middle = store.status(id(depth / 2)).await.expect("read");
    assert!(middle.is_some_and(|view| view.state == State::Queued && view.trace_context.is_some()));
    let cancelled = store.cancel(id(depth / 2), NOW).await.expect("asked");
    assert_eq!(cancelled, CancelOutcome::Cancelled);

    let began = Instant::now();
    let mut due = (0..depth).filter(|n| *n != depth / 2);
    loop {
        let request = LeaseRequest {
            queue: "orders".to_owned(),
            max: 256,
            lease_for_ms: 1000,
            now: NOW,
            limits: TargetLimits::default(),
        };
        let leases = store.lease(request).await.expect("lease").leases;
        if leases.is_empty() {
            break;
        }
        for lease in leases {
            assert_eq!(Some(lease.message.id), due.next().map(id), "in order");
            let how = Settle::Done {
                result: None,
                attempt: AttemptRecord::default(),
            };
            store.settle(lease.id, how, NOW).await.expect("settled");
        }
    }
    assert_eq!(due.next(), None, "all of them");
    let took = began.elapsed();
    println!(
        "drained in {took:.1?}, {:.0} a second: {} KiB resident",
        depth as f64 / took.as_secs_f64(),
        resident() / 1024
    );
    let counts = store.counts("orders", NOW).await.expect("counts");
    assert_eq!((counts.pending(), counts.drift()), (0, 0), "{counts:?}");
    assert_eq!(counts.succeeded_total, depth - 1);
    store.close().await;
}
