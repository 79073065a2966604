//! What only the embedded store can be asked: reopening, damage, a full disk, failures of the
//! engine below.

mod damage;
mod power;
mod steps;

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use tempfile::TempDir;

use super::*;
use crate::backend::{Replay, TargetLimits};
use crate::conformance::{QUEUE, at, attempt, id, message, run_all};

fn options() -> Options {
    Options {
        allow_ephemeral: true,
        headroom_bytes: Some(0),
        ballast_bytes: 0,
        ..Options::default()
    }
}

async fn open(dir: &Path) -> EmbeddedStore {
    open_with(dir, options()).await
}

async fn open_with(dir: &Path, options: Options) -> EmbeddedStore {
    let store = EmbeddedStore::open(dir, options).unwrap();
    store.ready().await.unwrap();
    store
}

async fn enqueue(store: &EmbeddedStore, n: u64) -> Result<EnqueueOutcome, EnqueueError> {
    store.enqueue(message(n, 0), QueueLimits::NONE, at(0)).await
}

async fn lease(store: &EmbeddedStore, max: usize, ms: u64) -> Vec<crate::Lease> {
    let limits = TargetLimits::default();
    let queue = QUEUE.to_owned();
    let request = LeaseRequest {
        queue,
        max,
        lease_for_ms: 1000,
        now: at(ms),
        limits,
    };
    store.lease(request).await.unwrap().leases
}

fn done() -> Settle {
    Settle::Done {
        result: None,
        attempt: attempt(200),
    }
}

#[tokio::test]
async fn the_embedded_store_conforms() {
    let dirs = std::sync::Mutex::new(Vec::new());
    run_all(|| async {
        let dir = TempDir::new().unwrap();
        let store = open(dir.path()).await;
        dirs.lock().unwrap().push(dir);
        Arc::new(store) as Arc<dyn QueueBackend>
    })
    .await;
}

#[tokio::test]
async fn reopening_finds_everything_and_counts_the_interrupted_attempt() {
    let dir = TempDir::new().unwrap();
    let store = open(dir.path()).await;
    for n in 1..=4 {
        enqueue(&store, n).await.unwrap();
    }
    let leased = lease(&store, 3, 0).await;
    store.settle(leased[0].id, done(), at(1)).await.unwrap();
    let dead = Settle::Dead {
        reason: "no".to_owned(),
        attempt: None,
        excerpt: Bytes::from_static(b"x"),
        retain_ms: None,
    };
    store.settle(leased[1].id, dead, at(1)).await.unwrap();
    store.close().await;
    assert!(matches!(store.health(), Health::Closed));
    let closed = store.settle(leased[2].id, done(), at(2)).await;
    assert_eq!(closed, Err(StoreError::Unavailable("closed".to_owned())));

    let store = open(dir.path()).await;
    let counts = store.counts(QUEUE, at(2)).await.unwrap();
    assert_eq!(
        (counts.enqueued_total, counts.succeeded_total, counts.dead),
        (4, 1, 1)
    );
    assert_eq!((counts.ready, counts.in_flight, counts.drift()), (2, 0, 0));
    let view = store.status(id(3)).await.unwrap().unwrap();
    assert_eq!((view.state, view.attempts_spent), (State::Retrying, 1));
    assert_eq!(view.attempts[0].reason.as_deref(), Some("interrupted"));
    let stale = store.settle(leased[2].id, done(), at(2)).await.unwrap();
    assert_eq!(
        stale,
        SettleOutcome::LeaseLost,
        "leases end with the process"
    );
    let leased = lease(&store, 9, 2).await;
    assert_eq!(leased.len(), 2);
    assert_eq!(leased[0].message.body, message(3, 0).body);
    let letter = store.dead_letter(id(2)).await.unwrap().unwrap();
    assert_eq!(letter.message.unwrap(), message(2, 0));
    store.close().await;
}

#[tokio::test]
async fn a_second_opener_is_told_and_the_first_goes_on() {
    let dir = TempDir::new().unwrap();
    let first = open(dir.path()).await;
    let second = EmbeddedStore::open(dir.path(), options()).unwrap();
    assert_eq!(
        second.ready().await,
        Err(OpenError::Locked(dir.path().to_owned()))
    );
    assert!(matches!(second.health(), Health::Failed(_)));
    assert!(matches!(
        enqueue(&second, 1).await,
        Err(EnqueueError::Unavailable(_))
    ));
    second.close().await;
    assert!(enqueue(&first, 1).await.is_ok());
    first.close().await;
    let third = open(dir.path()).await;
    assert_eq!(third.counts(QUEUE, at(0)).await.unwrap().ready, 1);
    third.close().await;
}

#[tokio::test]
async fn a_volume_in_memory_is_refused() {
    let shm = Path::new("/dev/shm");
    let kind = rustix::fs::statfs(shm).map(|stat| stat.f_type);
    // Where there is no such mount, the table of magic numbers is what can be tested.
    if !matches!(kind, Ok(0x0102_1994)) {
        return;
    }
    let dir = TempDir::new_in(shm).unwrap();
    let store = EmbeddedStore::open(dir.path(), Options::default()).unwrap();
    let refused = store.ready().await;
    assert!(
        matches!(refused, Err(OpenError::Ephemeral { kind: "tmpfs", .. })),
        "{refused:?}"
    );
    store.close().await;
    open(dir.path()).await.close().await;
}

#[tokio::test]
async fn a_damaged_file_is_refused_not_replaced() {
    let dir = TempDir::new().unwrap();
    std::fs::write(dir.path().join(recover::FILE), vec![7; 100_000]).unwrap();
    let store = EmbeddedStore::open(dir.path(), options()).unwrap();
    let refused = store.ready().await;
    assert!(
        matches!(refused, Err(OpenError::Damaged { .. })),
        "{refused:?}"
    );
    store.close().await;
    assert_eq!(
        std::fs::metadata(dir.path().join(recover::FILE))
            .unwrap()
            .len(),
        100_000
    );
}

#[tokio::test]
async fn while_it_recovers_calls_are_refused_at_once() {
    let dir = TempDir::new().unwrap();
    let store = EmbeddedStore::open(dir.path(), options()).unwrap();
    let early = enqueue(&store, 1).await;
    if store.health() != Health::Ready {
        assert_eq!(
            early,
            Err(EnqueueError::Unavailable("recovering".to_owned()))
        );
    }
    store.ready().await.unwrap();
    assert!(enqueue(&store, 2).await.is_ok());
    store.close().await;
}

/// Flips one bit wherever `needle` is in the file.
fn flip(dir: &Path, needle: &[u8]) {
    let path = dir.join(recover::FILE);
    let mut bytes = std::fs::read(&path).unwrap();
    let found: Vec<usize> = (0..bytes.len() - needle.len())
        .filter(|i| bytes[*i..].starts_with(needle))
        .collect();
    assert!(!found.is_empty(), "the needle is stored as it is");
    for at in found {
        bytes[at] ^= 0x10;
    }
    std::fs::write(path, bytes).unwrap();
}

#[tokio::test]
async fn a_flipped_bit_in_a_request_quarantines_that_message_alone() {
    let dir = TempDir::new().unwrap();
    let store = open(dir.path()).await;
    for n in 1..=20 {
        let mut message = message(n, 0);
        message.body = Bytes::from(format!("the unmistakable body of number {n:04}"));
        store
            .enqueue(message, QueueLimits::NONE, at(0))
            .await
            .unwrap();
    }
    store.close().await;
    flip(dir.path(), b"the unmistakable body of number 0007");

    let store = open(dir.path()).await;
    let leased = lease(&store, 99, 1).await;
    let delivered: Vec<MessageId> = leased.iter().map(|l| l.message.id).collect();
    let expected: Vec<MessageId> = (1..=20).filter(|n| *n != 7).map(id).collect();
    assert_eq!(delivered, expected, "every other one, in order");
    for lease in &leased {
        assert!(
            lease
                .message
                .body
                .starts_with(b"the unmistakable body of number")
        );
    }
    let letter = store.dead_letter(id(7)).await.unwrap().unwrap();
    assert_eq!((letter.reason.as_str(), letter.message), ("corrupt", None));
    let raw = std::fs::read(dir.path().join(format!("quarantine/{}.bin", id(7)))).unwrap();
    let kept = raw.windows(12).any(|bytes| bytes == b" number 0007");
    assert!(kept, "the bytes are there for a human");
    let counts = store.counts(QUEUE, at(1)).await.unwrap();
    assert_eq!(
        (counts.dead, counts.corrupt_total, counts.drift()),
        (1, 1, 0)
    );
    let replay = store
        .replay(Selection::Ids(vec![id(7)]), Replay::default(), at(2))
        .await
        .unwrap();
    assert_eq!(replay.skipped, [id(7)], "nothing to deliver");
    store.close().await;
    let store = open(dir.path()).await;
    assert_eq!(store.counts(QUEUE, at(2)).await.unwrap().drift(), 0);
    store.close().await;
}

#[tokio::test]
async fn a_flipped_bit_in_a_record_quarantines_that_message_alone() {
    let dir = TempDir::new().unwrap();
    let store = open(dir.path()).await;
    for n in 1..=9 {
        let mut message = message(n, 0);
        message.ordering_key = Some(format!("customer number {n}"));
        store
            .enqueue(message, QueueLimits::NONE, at(0))
            .await
            .unwrap();
    }
    store.close().await;
    // The key is in the record and in the request: both are damaged.
    flip(dir.path(), b"customer number 4");

    let store = open(dir.path()).await;
    assert_eq!(lease(&store, 99, 1).await.len(), 8);
    let letter = store.dead_letter(id(4)).await.unwrap().unwrap();
    assert_eq!(
        (letter.reason.as_str(), letter.status.queue.as_str()),
        ("corrupt", QUEUE)
    );
    let counts = store.counts(QUEUE, at(1)).await.unwrap();
    assert_eq!(
        (counts.dead, counts.corrupt_total, counts.drift()),
        (1, 1, 0)
    );
    store.close().await;
}

#[tokio::test]
async fn a_record_that_is_damaged_while_the_store_is_open_quarantines_that_message_alone() {
    let dir = TempDir::new().unwrap();
    let store = open(dir.path()).await;
    for n in 1..=5 {
        enqueue(&store, n).await.unwrap();
    }
    {
        let db = store.shared.db();
        let tx = db.as_ref().unwrap().begin_write().unwrap();
        let mut live = tx.open_table(rows::Table::Live.definition()).unwrap();
        live.insert(id(2).as_bytes().as_slice(), b"no record".as_slice())
            .unwrap();
        live.remove(id(4).as_bytes().as_slice()).unwrap();
        drop(live);
        tx.commit().unwrap();
    }
    let cancelled = store.cancel(id(4), at(1)).await.unwrap();
    assert_eq!(cancelled, CancelOutcome::NotCancellable(State::Dead));
    let leased = lease(&store, 9, 1).await;
    let delivered: Vec<MessageId> = leased.iter().map(|l| l.message.id).collect();
    assert_eq!(delivered, [id(1), id(3), id(5)]);
    for n in [2, 4] {
        let letter = store.dead_letter(id(n)).await.unwrap().unwrap();
        assert_eq!(letter.reason, "corrupt");
        assert_eq!(letter.message.unwrap(), message(n, 0), "it is whole");
    }
    let raw = std::fs::read(dir.path().join(format!("quarantine/{}.bin", id(2)))).unwrap();
    assert_eq!(raw, b"no record");
    let counts = store.counts(QUEUE, at(1)).await.unwrap();
    assert_eq!(
        (counts.dead, counts.corrupt_total, counts.drift()),
        (2, 2, 0)
    );
    store.close().await;
}

#[tokio::test]
async fn a_full_disk_stops_enqueues_while_deliveries_go_on() {
    let dir = TempDir::new().unwrap();
    let free = Arc::new(AtomicU64::new(100 << 20));
    let probe = Arc::clone(&free);
    let options = Options {
        headroom_bytes: Some(64 << 20),
        free_space: Arc::new(move |_| {
            Ok(FreeSpace {
                total: 1 << 30,
                available: probe.load(Ordering::Relaxed),
            })
        }),
        ..options()
    };
    let store = open_with(dir.path(), options).await;
    enqueue(&store, 1).await.unwrap();
    free.store(63 << 20, Ordering::Relaxed);
    let refused = enqueue(&store, 2).await;
    let full = EnqueueError::DiskFull {
        free: 63 << 20,
        required: 64 << 20,
    };
    assert_eq!(refused, Err(full));
    assert_eq!(store.stats().refused_disk_full, 1);
    let known = enqueue(&store, 1).await.unwrap();
    assert!(
        matches!(known, EnqueueOutcome::Duplicate { .. }),
        "a repeat is still answered"
    );
    let leased = lease(&store, 9, 1).await;
    let settled = store.settle(leased[0].id, done(), at(2)).await.unwrap();
    assert_eq!(settled, SettleOutcome::Settled);
    assert_eq!(
        store.status(id(1)).await.unwrap().unwrap().state,
        State::Succeeded
    );
    free.store(64 << 20, Ordering::Relaxed);
    enqueue(&store, 2).await.unwrap();
    store.close().await;
}

#[tokio::test]
async fn the_ballast_is_made_where_there_is_room_and_goes_with_its_key() {
    const BALLAST: u64 = 1 << 20;
    let dir = TempDir::new().unwrap();
    let file = dir.path().join(medium::BALLAST);
    let available = Arc::new(AtomicU64::new(BALLAST + 99));
    let probe = Arc::clone(&available);
    let with = |ballast_bytes| Options {
        headroom_bytes: Some(100),
        ballast_bytes,
        free_space: {
            let probe = Arc::clone(&probe);
            Arc::new(move |_| {
                let available = probe.load(Ordering::Relaxed);
                Ok(FreeSpace {
                    total: 1 << 30,
                    available,
                })
            })
        },
        ..options()
    };
    let store = open_with(dir.path(), with(BALLAST)).await;
    assert!(!file.exists(), "a byte short of room");
    available.store(BALLAST + 100, Ordering::Relaxed);
    enqueue(&store, 1).await.unwrap();
    assert_eq!(std::fs::metadata(&file).unwrap().len(), BALLAST);
    assert_eq!(store.stats().ballast_bytes, BALLAST);
    store.close().await;

    available.store(0, Ordering::Relaxed);
    let store = open_with(dir.path(), with(BALLAST)).await;
    assert_eq!(store.stats().ballast_bytes, BALLAST, "found again");
    store.close().await;
    let store = open_with(dir.path(), with(0)).await;
    assert!(!file.exists() && store.stats().ballast_bytes == 0);
    store.close().await;
}

#[test]
fn the_default_headroom_has_both_bounds() {
    for (total, expected) in [(0, 64 << 20), (4 << 30, 4 << 30), (1 << 40, 1 << 30)] {
        let expected: u64 = if total == 4 << 30 {
            total / 20
        } else {
            expected
        };
        assert_eq!(default_headroom(total), expected, "{total}");
    }
}

#[tokio::test]
async fn a_file_of_a_newer_version_is_left_alone() {
    let dir = TempDir::new().unwrap();
    let store = open(dir.path()).await;
    enqueue(&store, 1).await.unwrap();
    store.close().await;
    let file = dir.path().join(recover::FILE);
    rows::stage_schema(&file, 99);
    let store = EmbeddedStore::open(dir.path(), options()).unwrap();
    let refused = store.ready().await;
    assert!(
        matches!(refused, Err(OpenError::Newer { version: 99, .. })),
        "{refused:?}"
    );
    store.close().await;
    let beside = std::fs::read_dir(dir.path()).unwrap().count();
    assert_eq!(beside, 2, "the file and the lock: nothing was set aside");
    rows::stage_schema(&file, rows::SCHEMA);
    let store = open(dir.path()).await;
    assert_eq!(store.counts(QUEUE, at(0)).await.unwrap().ready, 1);
    store.close().await;
}

/// The files of the layouts, each as its own version wrote it, made by
/// `write_a_file_of_this_layout`: whoever changes the layout adds one.
const LAYOUTS: [(u64, &[u8]); 2] = [
    (1, include_bytes!("../../tests/data/queue-v1.redb")),
    (2, include_bytes!("../../tests/data/queue-v2.redb")),
];

#[tokio::test]
async fn files_of_every_layout_are_read_and_brought_up() {
    assert_eq!(
        LAYOUTS.last().map(|(version, _)| *version),
        Some(rows::SCHEMA)
    );
    for (version, bytes) in LAYOUTS {
        let dir = TempDir::new().unwrap();
        let file = dir.path().join(recover::FILE);
        std::fs::write(&file, bytes).unwrap();
        assert_eq!(rows::marked_schema(&file), Some(version));
        let store = open(dir.path()).await;
        damage::Story::read_back(&store, &format!("layout {version}")).await;
        store.close().await;
        assert_eq!(rows::marked_schema(&file), Some(rows::SCHEMA));
    }
}

/// Writes the file of the test above anew when asked to.
#[tokio::test]
async fn write_a_file_of_this_layout() {
    let Some(to) = std::env::var_os("OUTRIGGER_WRITE_QUEUE_FILE") else {
        return;
    };
    let dir = TempDir::new().unwrap();
    let store = open(dir.path()).await;
    damage::Story::write(&store).await;
    store.shared.db_mut().as_mut().unwrap().compact().unwrap();
    store.close().await;
    std::fs::copy(dir.path().join(recover::FILE), to).unwrap();
}

#[tokio::test]
async fn a_disk_that_the_store_filled_is_given_back_when_it_is_empty() {
    const VOLUME: u64 = 100 << 20;
    const REQUIRED: u64 = 64 << 20;
    let dir = TempDir::new().unwrap();
    // A volume on which there is nothing but the store.
    let free_space: FreeSpaceProbe = Arc::new(|dir| {
        let used = std::fs::metadata(dir.join(recover::FILE))?.len();
        Ok(FreeSpace {
            total: VOLUME,
            available: VOLUME.saturating_sub(used),
        })
    });
    let options = Options {
        headroom_bytes: Some(REQUIRED),
        free_space,
        ..options()
    };
    let large = |n| {
        let mut message = message(n, 0);
        message.body = Bytes::from(vec![b'x'; 900_000]);
        message
    };
    let store = open_with(dir.path(), options).await;
    let (mut n, refused) = (0, async |n| {
        let out = store.enqueue(large(n), QueueLimits::NONE, at(0)).await;
        assert!(
            matches!(out, Ok(_) | Err(EnqueueError::DiskFull { .. })),
            "{out:?}"
        );
        out.is_err()
    });
    while !refused(n).await {
        n += 1;
        assert!(n < 100, "the volume is not that large");
    }
    let leased = lease(&store, usize::MAX, 0).await;
    assert_eq!(leased.len() as u64, n);
    for lease in leased.iter().skip(2) {
        store.settle(lease.id, done(), at(1)).await.unwrap();
    }
    // A refusal makes room for the next one.
    let patience = tokio::time::timeout(Duration::from_secs(20), async {
        while refused(n).await {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
    patience.await.expect("the file is mostly empty");
    store.close().await;
    let store = open(dir.path()).await;
    let counts = store.counts(QUEUE, at(1)).await.unwrap();
    assert_eq!((counts.ready, counts.drift()), (3, 0));
    let leased = lease(&store, 9, 1).await;
    assert!(leased.iter().all(|l| l.message.body.len() == 900_000));
    store.close().await;
}

/// Waits until the store works again after its nth failure.
async fn reopened(store: &EmbeddedStore, n: u64) {
    while store.stats().reopens < n {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    store.ready().await.unwrap();
}

#[tokio::test]
async fn a_failure_below_reopens_the_store_and_loses_nothing() {
    let dir = TempDir::new().unwrap();
    let store = open(dir.path()).await;
    enqueue(&store, 1).await.unwrap();
    let leased = lease(&store, 1, 0).await;
    store
        .ops
        .send(Op::Fault("the disk went away".to_owned()))
        .unwrap();
    let failed = store.counts(QUEUE, at(1)).await;
    assert!(
        matches!(failed, Err(StoreError::Unavailable(_))),
        "{failed:?}"
    );
    reopened(&store, 1).await;
    let stale = store.settle(leased[0].id, done(), at(1)).await.unwrap();
    assert_eq!(stale, SettleOutcome::LeaseLost);
    let leased = lease(&store, 9, 1).await;
    assert_eq!(leased.len(), 1, "delivered again");
    assert_eq!(store.counts(QUEUE, at(1)).await.unwrap().drift(), 0);
    store.close().await;
}

#[tokio::test]
async fn nothing_is_acknowledged_into_a_file_that_was_removed() {
    let parent = TempDir::new().unwrap();
    let dir = parent.path().join("state/queue");
    let store = open(&dir).await;
    enqueue(&store, 1).await.unwrap();
    std::fs::remove_dir_all(parent.path().join("state")).unwrap();
    let refused = enqueue(&store, 2).await;
    assert!(
        matches!(&refused, Err(EnqueueError::Unavailable(why)) if why.contains("is gone")),
        "{refused:?}"
    );
    reopened(&store, 1).await;
    enqueue(&store, 3).await.unwrap();
    let second = EmbeddedStore::open(&dir, options()).unwrap();
    assert_eq!(second.ready().await, Err(OpenError::Locked(dir.clone())));
    second.close().await;

    // The file alone, and a repeat that changes nothing.
    std::fs::remove_file(dir.join(recover::FILE)).unwrap();
    let refused = enqueue(&store, 3).await;
    assert!(
        matches!(&refused, Err(EnqueueError::Unavailable(why)) if why.contains("is gone")),
        "{refused:?}"
    );
    reopened(&store, 2).await;
    enqueue(&store, 4).await.unwrap();
    store.close().await;
    let store = open(&dir).await;
    assert_eq!(store.counts(QUEUE, at(0)).await.unwrap().ready, 1);
    store.close().await;
}

#[tokio::test]
async fn a_panic_on_either_thread_is_contained() {
    let dir = TempDir::new().unwrap();
    let armed = Arc::new(AtomicBool::new(false));
    let trap = Arc::clone(&armed);
    let free_space: FreeSpaceProbe = Arc::new(move |_| {
        assert!(!trap.swap(false, Ordering::Relaxed), "a staged panic");
        Ok(FreeSpace {
            total: 1,
            available: 1,
        })
    });
    let store = open_with(
        dir.path(),
        Options {
            free_space,
            ..options()
        },
    )
    .await;
    enqueue(&store, 1).await.unwrap();
    armed.store(true, Ordering::Relaxed);
    assert!(matches!(
        enqueue(&store, 2).await,
        Err(EnqueueError::Unavailable(_))
    ));
    reopened(&store, 1).await;
    let read = store
        .read::<()>(None, |_, _| panic!("a staged panic"))
        .await;
    assert!(matches!(read, Err(StoreError::Unavailable(_))));
    reopened(&store, 2).await;
    assert_eq!(store.counts(QUEUE, at(0)).await.unwrap().ready, 1);
    store.close().await;
}

#[tokio::test]
async fn many_enqueues_share_a_commit() {
    let dir = TempDir::new().unwrap();
    let store = open(dir.path()).await;
    let before = store.stats().commits;
    let all = join_all((0..500).map(|n| enqueue(&store, n))).await;
    assert!(all.iter().all(Result::is_ok));
    let commits = store.stats().commits - before;
    assert!(commits < 50, "{commits} commits for 500 messages");
    store.close().await;
}

#[tokio::test]
async fn what_nobody_waits_for_is_written_soon() {
    let dir = TempDir::new().unwrap();
    let store = open(dir.path()).await;
    enqueue(&store, 1).await.unwrap();
    let commits = store.stats().commits;
    let leased = lease(&store, 1, 0).await;
    store.settle(leased[0].id, done(), at(1)).await.unwrap();
    while store.stats().commits == commits {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert!(!store.shared.is_unwritten(None));
    store.close().await;
}

#[tokio::test]
async fn a_backlog_of_unwritten_bytes_is_bounded() {
    let dir = TempDir::new().unwrap();
    let options = Options {
        max_unwritten_bytes: 1000,
        ..options()
    };
    let store = open_with(dir.path(), options).await;
    let all = join_all((0..100).map(|n| enqueue(&store, n))).await;
    let refused = all.iter().filter(|out| out.is_err()).count();
    assert!(refused > 0 && refused < 100, "{refused} refused");
    assert_eq!(store.shared.unwritten_bytes(), 0);
    store.close().await;
}
