//! One life of a queue, cut short by the power at every write that it makes.
//!
//! A book says what the life has been told; what the file says afterwards must be one of the moments
//! since the last answer that promised durability.

use std::collections::BTreeMap;
use std::sync::Mutex;

use super::power::{Disk, Fate, open_on};
use super::*;
use crate::Lease;
use crate::signal::lock;

/// Things that happen in a life.
const ACTS: usize = 60;
/// Fewer writes than this would not be a life.
const LEAST_CUTS: u64 = 100;

/// What is known of a message.
#[derive(Debug, Clone)]
struct Line {
    key: Option<u64>,
    /// Its places in the order of its key: since it was sent, and since each replay.
    orders: Vec<usize>,
    /// Where it was since the last answer that promised durability; none is that it is not there.
    may_be: Vec<Option<State>>,
}

impl Line {
    fn now(&self) -> Option<State> {
        *self.may_be.last().expect("it began with one")
    }

    fn becomes(&mut self, state: State) {
        self.may_be.push(Some(state));
    }

    fn is_pending(&self) -> bool {
        self.now().is_some_and(|state| !state.is_final())
    }

    fn goes_before(&self, other: &Self) -> bool {
        self.key.is_some() && self.key == other.key && self.orders.last() < other.orders.last()
    }
}

#[derive(Debug, Default)]
struct Book {
    lines: BTreeMap<u64, Line>,
    open: Vec<(u64, LeaseId, State)>,
    lost: Vec<LeaseId>,
}

impl Book {
    /// An answer promised that everything until now is kept.
    fn is_durable(&mut self) {
        for line in self.lines.values_mut() {
            line.may_be = vec![line.now()];
        }
    }

    fn with_state(&self, state: State) -> Vec<u64> {
        let there = self.lines.iter();
        let there = there.filter(|(_, line)| line.now() == Some(state));
        there.map(|(n, _)| *n).collect()
    }

    /// Nothing with the same key and an earlier place waits.
    fn is_its_turn(&self, n: u64) -> bool {
        let line = &self.lines[&n];
        let mut others = self.lines.values();
        !others.any(|other| other.is_pending() && other.goes_before(line))
    }
}

fn sent(n: u64, key: Option<u64>) -> Message {
    let mut message = message(n, 0);
    message.ordering_key = key.map(|key| format!("key {key}"));
    message.body = Bytes::from(vec![n as u8; 1 + (n as usize * 97) % 900]);
    message
}

fn number(lease: &Lease) -> u64 {
    let low = lease.message.id.as_bytes()[8..].try_into().unwrap();
    u64::from_be_bytes(low)
}

/// Lives until the power fails; false when it did not.
async fn live(store: &EmbeddedStore, disk: &Mutex<Disk>, book: &mut Book, seed: u64) -> bool {
    let mut rng = fastrand::Rng::with_seed(seed);
    while store.health() != Health::Ready {
        if lock(disk).off {
            return true;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    for act in 0..ACTS {
        if act_once(store, book, &mut rng, act).await.is_err() {
            assert!(lock(disk).off, "nothing else makes it fail");
            return true;
        }
    }
    false
}

async fn act_once(
    store: &EmbeddedStore,
    book: &mut Book,
    rng: &mut fastrand::Rng,
    act: usize,
) -> Result<(), StoreError> {
    match rng.u8(..12) {
        0..=3 => {
            let n = act as u64 + 1;
            let key = rng.bool().then(|| rng.u64(..2));
            let line = Line {
                key,
                orders: vec![act],
                may_be: vec![None, Some(State::Queued)],
            };
            book.lines.insert(n, line);
            let out = store.enqueue(sent(n, key), QueueLimits::NONE, at(0)).await;
            match out {
                Ok(EnqueueOutcome::Accepted(_)) => book.is_durable(),
                Err(EnqueueError::Unavailable(why)) => return Err(StoreError::Unavailable(why)),
                other => panic!("{other:?}"),
            }
        }
        4 | 5 => {
            let request = LeaseRequest {
                queue: QUEUE.to_owned(),
                max: rng.usize(1..4),
                lease_for_ms: 1000,
                now: at(0),
                limits: TargetLimits::default(),
            };
            for lease in store.lease(request).await?.leases {
                let n = number(&lease);
                let line = &book.lines[&n];
                assert_eq!(lease.message, sent(n, line.key));
                let before = line.now().filter(|state| !state.is_final());
                let before = before.expect("only what waits is delivered");
                assert_ne!(before, State::Delivering, "{n} is delivered already");
                assert!(book.is_its_turn(n), "{n} overtook its key");
                // Where the process ends, so does the lease, and the try counts.
                book.lines.get_mut(&n).unwrap().becomes(State::Retrying);
                book.lines.get_mut(&n).unwrap().becomes(State::Delivering);
                book.open.push((n, lease.id, before));
            }
        }
        6 | 7 if !book.open.is_empty() => {
            let (n, lease, before) = book.open.swap_remove(rng.usize(..book.open.len()));
            let (how, then) = match rng.u8(..4) {
                0 => (done(), State::Succeeded),
                1 => (Settle::Release, before),
                2 => {
                    let how = Settle::RetryAt {
                        at: at(0),
                        attempt: Some(attempt(503)),
                        waiting: false,
                        reason: None,
                    };
                    (how, State::Retrying)
                }
                _ => {
                    let how = Settle::Dead {
                        reason: "no".to_owned(),
                        attempt: Some(attempt(400)),
                        excerpt: Bytes::new(),
                        retain_ms: None,
                    };
                    (how, State::Dead)
                }
            };
            book.lines.get_mut(&n).unwrap().becomes(then);
            let settled = store.settle(lease, how, at(1)).await?;
            assert_eq!(settled, SettleOutcome::Settled);
            book.lost.push(lease);
        }
        8 => {
            let Some(n) = book.with_state(State::Queued).pop() else {
                return Ok(());
            };
            book.lines.get_mut(&n).unwrap().becomes(State::Cancelled);
            let out = store.cancel(id(n), at(1)).await?;
            assert_eq!(out, CancelOutcome::Cancelled);
            book.is_durable();
        }
        9 => {
            let Some(n) = book.with_state(State::Dead).pop() else {
                return Ok(());
            };
            let line = book.lines.get_mut(&n).unwrap();
            line.becomes(State::Queued);
            line.orders.push(act);
            let which = Selection::Ids(vec![id(n)]);
            let report = store.replay(which, Replay::default(), at(1)).await?;
            assert_eq!(report.replayed, [id(n)]);
            book.is_durable();
        }
        _ => {
            // What a reader is told is kept, too; most of all what was not promised before.
            let news = book.lines.iter().find(|(_, line)| line.may_be.len() > 1);
            let Some((n, line)) = news.or_else(|| book.lines.iter().next_back()) else {
                return Ok(());
            };
            let view = store.status(id(*n)).await?;
            assert_eq!(view.map(|view| view.state), line.now(), "status of {n}");
            let n = *n;
            let line = book.lines.get_mut(&n).unwrap();
            line.may_be = vec![line.now()];
        }
    }
    Ok(())
}

/// What is on the disk is a moment that the book allows, and goes on from there.
async fn check(dir: &Path, book: &Book, cut: u64) {
    let store = open(dir).await;
    let mut waiting = BTreeMap::new();
    for (n, line) in &book.lines {
        let view = store.status(id(*n)).await.unwrap();
        let replays = view.as_ref().map_or(0, |view| view.replays as usize);
        let state = view.map(|view| view.state);
        let interrupted = line.may_be.contains(&Some(State::Delivering));
        let allowed = line.may_be.contains(&state) && state != Some(State::Delivering)
            || interrupted && state == Some(State::Retrying);
        assert!(allowed, "cut {cut}: {n} is {state:?}, {line:?}");
        if state.is_some_and(|state| !state.is_final()) {
            let mut line = line.clone();
            line.orders.truncate(replays + 1);
            waiting.insert(*n, line);
        }
    }
    let counts = store.counts(QUEUE, at(1)).await.unwrap();
    let corrupt = store.stats().corrupt;
    assert_eq!((counts.drift(), corrupt), (0, 0), "cut {cut}: {counts:?}");
    let open = book.open.iter().map(|(_, lease, _)| lease);
    for lease in open.chain(&book.lost) {
        let late = store.settle(*lease, done(), at(1)).await.unwrap();
        assert_eq!(late, SettleOutcome::LeaseLost, "cut {cut}");
    }
    loop {
        let leases = lease(&store, 2, 1).await;
        if leases.is_empty() {
            break;
        }
        for lease in leases {
            let n = number(&lease);
            let line = waiting.remove(&n).expect("waits, and comes once");
            let overtook = waiting.values().any(|other| other.goes_before(&line));
            assert!(!overtook, "cut {cut}: {n} overtook its key");
            store.settle(lease.id, done(), at(1)).await.unwrap();
        }
    }
    assert!(waiting.is_empty(), "cut {cut}: not delivered: {waiting:?}");
    store.close().await;
}

#[tokio::test]
async fn a_life_that_is_cut_at_any_write_keeps_what_it_was_told() {
    let seed = std::env::var("OUTRIGGER_QUEUE_LIFE").ok();
    let seed = seed.map_or_else(|| fastrand::u64(..), |seed| seed.parse().unwrap());
    println!("seed {seed}");
    let dir = TempDir::new().unwrap();
    open(dir.path()).await.close().await;
    let file = dir.path().join(recover::FILE);
    let empty = std::fs::read(&file).unwrap();
    let (mut told, mut cuts) = (0, 0);
    for cut in 1.. {
        let fate = Fate {
            cut_at_write: cut,
            fail_at_sync: None,
            lies: false,
        };
        let disk = Disk::new(empty.clone(), fate, seed ^ cut);
        let disk = Arc::new(Mutex::new(disk));
        let mut book = Book::default();
        let store = open_on(dir.path(), &disk);
        let failed = live(&store, &disk, &mut book, seed).await;
        lock(&disk).off = true;
        store.close().await;
        lock(&disk).tear();
        std::fs::write(&file, &lock(&disk).durable).unwrap();
        check(dir.path(), &book, cut).await;
        cuts = cut;
        told += book.lines.len();
        if !failed {
            break;
        }
    }
    println!("cut at each of {cuts} writes, {told} messages sent");
    assert!(cuts > LEAST_CUTS, "{cuts} writes");
}

#[tokio::test]
async fn an_upgrade_that_is_cut_at_any_write_begins_again() {
    let [(_, old), ..] = LAYOUTS;
    let (dir, aside) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let file = dir.path().join(recover::FILE);
    // To look at the file would mend it.
    let copy = aside.path().join(recover::FILE);
    let (mut before, mut after) = (0, 0);
    for cut in 1.. {
        let fate = Fate {
            cut_at_write: cut,
            fail_at_sync: None,
            lies: false,
        };
        std::fs::write(&file, old).unwrap();
        let disk = Arc::new(Mutex::new(Disk::new(old.to_vec(), fate, cut)));
        let store = open_on(dir.path(), &disk);
        while store.health() != Health::Ready && !lock(&disk).off {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let done = !lock(&disk).off;
        lock(&disk).off = true;
        store.close().await;
        lock(&disk).tear();
        std::fs::write(&file, &lock(&disk).durable).unwrap();
        std::fs::copy(&file, &copy).unwrap();
        match rows::marked_schema(&copy) {
            Some(rows::SCHEMA) => after += 1,
            _ => before += 1,
        }
        let store = open(dir.path()).await;
        damage::Story::read_back(&store, &format!("cut {cut}")).await;
        store.close().await;
        assert_eq!(rows::marked_schema(&file), Some(rows::SCHEMA), "cut {cut}");
        if done {
            break;
        }
    }
    println!("cut {before} times before the new layout was on the disk, {after} times after");
    assert!(before > 1 && after > 0);
}
