//! Kills a process that enqueues, at random moments, and looks for every message that it had been
//! told was accepted.
//!
//! The child is this test binary again: it runs `child` with a directory in its environment, prints
//! a line per acknowledged message and dies by SIGKILL. A kill keeps the page cache, so this proves
//! the order of acknowledge and commit and the recovery, not the flush; see the store's docs.

use std::collections::BTreeSet;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use outrigger_core::time::UnixMillis;
use outrigger_queue::message::AttemptRecord;
use outrigger_queue::{
    EmbeddedStore, EnqueueOutcome, Inspect as _, LeaseRequest, Message, MessageId, Options,
    QueueBackend as _, QueueLimits, Settle, State, TargetLimits,
};
use tempfile::TempDir;

const DIR: &str = "OUTRIGGER_QUEUE_CRASH_DIR";
const ROUND: &str = "OUTRIGGER_QUEUE_CRASH_ROUND";
/// Rounds of a run, unless `OUTRIGGER_CRASH_ROUNDS` says otherwise.
const ROUNDS: u64 = 8;
const PRODUCERS: u64 = 16;
const NOW: UnixMillis = UnixMillis(1_700_000_000_000);

fn id(round: u64, n: u64) -> MessageId {
    MessageId::from_bytes((u128::from(round) << 64 | u128::from(n)).to_be_bytes())
}

/// A body that tells whose it is, of 1 to 3000 bytes.
fn body(id: MessageId) -> Bytes {
    let n = u128::from_be_bytes(*id.as_bytes());
    let len = 1 + (n.wrapping_mul(2_654_435_761) % 3000) as usize;
    id.to_string()
        .bytes()
        .cycle()
        .take(len)
        .collect::<Vec<u8>>()
        .into()
}

async fn open(dir: &Path) -> EmbeddedStore {
    let options = Options {
        allow_ephemeral: true,
        headroom_bytes: Some(0),
        ballast_bytes: 0,
        ..Options::default()
    };
    let store = EmbeddedStore::open(dir, options).expect("threads");
    store.ready().await.expect("opens after a crash");
    store
}

fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}")
        .and_then(|()| out.flush())
        .expect("the parent listens");
}

/// Not a test of its own: the process that is killed.
#[test]
fn child() {
    let (Ok(dir), Ok(round)) = (std::env::var(DIR), std::env::var(ROUND)) else {
        return;
    };
    let round: u64 = round.parse().expect("a number");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    runtime.expect("a runtime").block_on(async {
        let store = Arc::new(open(Path::new(&dir)).await);
        say("ready");
        let producers = (0..PRODUCERS).map(|p| tokio::spawn(produce(Arc::clone(&store), round, p)));
        let _producers: Vec<_> = producers.collect();
        consume(&store).await;
    });
}

async fn produce(store: Arc<EmbeddedStore>, round: u64, producer: u64) {
    for n in 0.. {
        let id = id(round, n * PRODUCERS + producer);
        let message = Message::new(id, "q", "t", body(id), NOW);
        let out = store
            .enqueue(message, QueueLimits::NONE, NOW)
            .await
            .expect("enqueue");
        assert!(matches!(out, EnqueueOutcome::Accepted(_)));
        say(&format!("acked {id}"));
    }
}

/// Delivers about half, so that records move and rows go while the process dies.
async fn consume(store: &EmbeddedStore) {
    loop {
        let request = LeaseRequest {
            queue: "q".to_owned(),
            max: 4,
            lease_for_ms: 1000,
            now: NOW,
            limits: TargetLimits::default(),
        };
        for lease in store.lease(request).await.expect("lease").leases {
            assert_eq!(lease.message.body, body(lease.message.id));
            let attempt = AttemptRecord::default();
            let how = Settle::Done {
                result: None,
                attempt,
            };
            store.settle(lease.id, how, NOW).await.expect("settle");
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// Runs a child until it dies; returns what it had acknowledged.
fn run_and_kill(dir: &Path, round: u64, after: Duration) -> Vec<MessageId> {
    let mut child = Command::new(std::env::current_exe().expect("this binary"))
        .args(["--exact", "child", "--nocapture", "--test-threads=1"])
        .env(DIR, dir)
        .env(ROUND, round.to_string())
        .stdout(Stdio::piped())
        .spawn()
        .expect("a child");
    let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
    // The harness begins the line with the name of the test.
    while !lines
        .next()
        .expect("the child lives")
        .expect("text")
        .ends_with("ready")
    {}
    let killer = std::thread::spawn(move || {
        std::thread::sleep(after);
        child.kill().expect("SIGKILL");
        child.wait().expect("it ends");
    });
    let acked = lines
        .map_while(Result::ok)
        .filter_map(|line| line.strip_prefix("acked ").and_then(|id| id.parse().ok()))
        .collect();
    killer.join().expect("the killer");
    acked
}

#[test]
fn no_acknowledged_message_is_lost_when_the_process_is_killed() {
    let dir = TempDir::new().expect("a directory");
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut rng = fastrand::Rng::with_seed(seed);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let runtime = runtime.expect("a runtime");
    let mut acked = BTreeSet::new();
    let rounds = std::env::var("OUTRIGGER_CRASH_ROUNDS").ok();
    let rounds = rounds.map_or(ROUNDS, |rounds| rounds.parse().expect("a number"));
    for round in 1..=rounds {
        let after = Duration::from_millis(rng.u64(20..300));
        acked.extend(run_and_kill(dir.path(), round, after));
        runtime.block_on(verify(dir.path(), &acked));
    }
    println!("{} messages acknowledged", acked.len());
    assert!(
        acked.len() > 100,
        "the children did something: {}",
        acked.len()
    );
}

async fn verify(dir: &Path, acked: &BTreeSet<MessageId>) {
    let store = open(dir).await;
    let mut pending = BTreeSet::new();
    for id in acked {
        let view = store.status(*id).await.expect("status");
        let state = view
            .unwrap_or_else(|| panic!("{id} was acknowledged and is lost"))
            .state;
        match state {
            State::Succeeded => {}
            State::Queued | State::Retrying => drop(pending.insert(*id)),
            other => panic!("{id} is {other}"),
        }
    }
    let counts = store.counts("q", NOW).await.expect("counts");
    assert_eq!((counts.drift(), counts.corrupt_total), (0, 0), "{counts:?}");
    let request = LeaseRequest {
        queue: "q".to_owned(),
        max: usize::MAX,
        lease_for_ms: 1,
        now: NOW,
        limits: TargetLimits::default(),
    };
    for lease in store.lease(request).await.expect("lease").leases {
        assert_eq!(lease.message.body, body(lease.message.id));
        pending.remove(&lease.message.id);
        store
            .settle(lease.id, Settle::Release, NOW)
            .await
            .expect("settle");
    }
    assert!(pending.is_empty(), "pending but not delivered: {pending:?}");
    store.close().await;
}
