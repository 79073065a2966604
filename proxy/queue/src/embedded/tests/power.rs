//! A disk whose power fails: what was not flushed is gone, in part, in pages and in sectors.
//!
//! Only the bytes of the file are simulated, below the engine; what is flushed is what is on disk
//! after the cut. A disk that only says so is the control: there the loss must be seen.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::sync::Mutex;

use redb::{DatabaseError, StorageBackend};

use super::*;
use crate::signal::lock;

const ROUNDS: u64 = 50;
const PRODUCERS: u64 = 16;
const PAGE: usize = 4096;
const SECTOR: usize = 512;

/// What goes wrong, counted in operations from the opening on.
#[derive(Debug, Clone, Copy)]
pub(super) struct Fate {
    /// The power fails at this write.
    pub(super) cut_at_write: u64,
    /// This flush fails; what it should have written counts as clean and is not on disk.
    pub(super) fail_at_sync: Option<u64>,
    /// Flushes do nothing.
    pub(super) lies: bool,
}

#[derive(Debug)]
pub(super) struct Disk {
    /// What a power cut leaves.
    pub(super) durable: Vec<u8>,
    /// What is read.
    cache: Vec<u8>,
    dirty: BTreeSet<usize>,
    writes: u64,
    syncs: u64,
    pub(super) off: bool,
    fate: Fate,
    rng: fastrand::Rng,
}

impl Disk {
    pub(super) fn new(bytes: Vec<u8>, fate: Fate, seed: u64) -> Self {
        Self {
            durable: bytes.clone(),
            cache: bytes,
            dirty: BTreeSet::new(),
            writes: 0,
            syncs: 0,
            off: false,
            fate,
            rng: fastrand::Rng::with_seed(seed),
        }
    }

    fn powered(&self) -> io::Result<()> {
        if self.off {
            return Err(io::Error::other("the power is out"));
        }
        Ok(())
    }

    /// Puts a part of a page on disk; the file there grows with it.
    fn settle(&mut self, from: usize, to: usize) {
        let to = to.min(self.cache.len());
        if self.durable.len() < to {
            self.durable.resize(to, 0);
        }
        if from < to {
            self.durable[from..to].copy_from_slice(&self.cache[from..to]);
        }
    }

    /// Some of what was not flushed gets there all the same, some of it in part.
    pub(super) fn tear(&mut self) {
        if self.fate.lies {
            return;
        }
        for page in std::mem::take(&mut self.dirty) {
            let start = page * PAGE;
            match self.rng.u8(..4) {
                0 => self.settle(start, start + PAGE),
                1 => {
                    for sector in 0..PAGE / SECTOR {
                        if self.rng.bool() {
                            let from = start + sector * SECTOR;
                            self.settle(from, from + SECTOR);
                        }
                    }
                }
                _ => {}
            }
        }
        // The file's size may be that of before or after.
        if self.rng.bool() {
            let len = self.cache.len();
            self.durable.resize(len, 0);
        }
    }
}

#[derive(Debug)]
struct Plug(Arc<Mutex<Disk>>);

impl StorageBackend for Plug {
    fn len(&self) -> io::Result<u64> {
        let disk = lock(&self.0);
        disk.powered()?;
        Ok(disk.cache.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let disk = lock(&self.0);
        disk.powered()?;
        let from = offset as usize;
        let found = disk.cache.get(from..from + out.len());
        out.copy_from_slice(found.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut disk = lock(&self.0);
        disk.powered()?;
        disk.cache.resize(len as usize, 0);
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut disk = lock(&self.0);
        disk.powered()?;
        disk.syncs += 1;
        let dirty = std::mem::take(&mut disk.dirty);
        if disk.fate.fail_at_sync == Some(disk.syncs) {
            return Err(io::Error::from_raw_os_error(5));
        }
        if !disk.fate.lies {
            for page in dirty {
                disk.settle(page * PAGE, (page + 1) * PAGE);
            }
            let len = disk.cache.len();
            disk.durable.resize(len, 0);
        }
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut disk = lock(&self.0);
        disk.powered()?;
        disk.writes += 1;
        if disk.writes >= disk.fate.cut_at_write {
            disk.off = true;
            return disk.powered();
        }
        let from = offset as usize;
        if disk.cache.len() < from + data.len() {
            disk.cache.resize(from + data.len(), 0);
        }
        disk.cache[from..from + data.len()].copy_from_slice(data);
        let pages = from / PAGE..(from + data.len()).div_ceil(PAGE);
        disk.dirty.extend(pages.clone());
        // The system writes some of it back before it is asked to.
        if !disk.fate.lies && disk.rng.u8(..32) == 0 {
            disk.settle(pages.start * PAGE, (pages.start + 1) * PAGE);
        }
        Ok(())
    }
}

pub(super) fn open_on(dir: &Path, disk: &Arc<Mutex<Disk>>) -> EmbeddedStore {
    let disk = Arc::clone(disk);
    let medium: Medium = Arc::new(move |_: File| {
        lock(&disk)
            .powered()
            .map_err(redb::StorageError::Io)
            .map_err(DatabaseError::Storage)?;
        Ok(Box::new(Plug(Arc::clone(&disk))))
    });
    EmbeddedStore::open_on(dir.to_owned(), options(), medium).unwrap()
}

fn number(round: u64, n: u64) -> u64 {
    round << 32 | n
}

async fn produce(
    store: Arc<EmbeddedStore>,
    disk: Arc<Mutex<Disk>>,
    round: u64,
    producer: u64,
) -> Vec<u64> {
    let mut acked = Vec::new();
    for n in 0.. {
        let n = number(round, n * PRODUCERS + producer);
        match enqueue(&store, n).await {
            Ok(EnqueueOutcome::Accepted(_)) => acked.push(n),
            Ok(other) => panic!("{other:?}"),
            Err(_) if lock(&disk).off => break,
            // It is being opened again.
            Err(EnqueueError::Unavailable(_)) => tokio::task::yield_now().await,
            Err(other) => panic!("{other}"),
        }
    }
    acked
}

/// Delivers some, so that rows go while others come.
async fn consume(store: Arc<EmbeddedStore>, disk: Arc<Mutex<Disk>>) {
    while !lock(&disk).off {
        let request = LeaseRequest {
            queue: QUEUE.to_owned(),
            max: 4,
            lease_for_ms: 1000,
            now: at(0),
            limits: TargetLimits::default(),
        };
        if let Ok(batch) = store.lease(request).await {
            for lease in batch.leases {
                let _ = store.settle(lease.id, done(), at(1)).await;
            }
        }
        tokio::task::yield_now().await;
    }
}

/// Runs a store until its power fails and leaves what is on the disk then in `dir`; returns what
/// was acknowledged.
async fn run_until_cut(dir: &Path, fate: Fate, round: u64, seed: u64) -> Vec<u64> {
    let file = dir.join(recover::FILE);
    let disk = Disk::new(std::fs::read(&file).unwrap(), fate, seed);
    let disk = Arc::new(Mutex::new(disk));
    let store = Arc::new(open_on(dir, &disk));
    let producers = (0..PRODUCERS)
        .map(|p| tokio::spawn(produce(Arc::clone(&store), Arc::clone(&disk), round, p)));
    let producers: Vec<_> = producers.collect();
    let consumer = tokio::spawn(consume(Arc::clone(&store), Arc::clone(&disk)));
    let mut acked = Vec::new();
    for producer in producers {
        acked.extend(producer.await.unwrap());
    }
    consumer.await.unwrap();
    store.close().await;
    let mut disk = lock(&disk);
    disk.tear();
    std::fs::write(&file, &disk.durable).unwrap();
    acked
}

/// Those of `acked` that the store in `dir` knows nothing of; delivers all that wait.
async fn lost(dir: &Path, acked: &[u64]) -> Vec<u64> {
    let store = open(dir).await;
    let mut lost = Vec::new();
    let mut waiting = BTreeSet::new();
    for n in acked {
        match store.status(id(*n)).await.unwrap().map(|view| view.state) {
            None => lost.push(*n),
            Some(State::Succeeded) => {}
            Some(State::Queued | State::Retrying) => drop(waiting.insert(id(*n))),
            Some(other) => panic!("{n} is {other}"),
        }
    }
    loop {
        let leases = lease(&store, 500, 0).await;
        if leases.is_empty() {
            break;
        }
        for lease in leases {
            let n = lease.message.id.as_bytes()[8..].try_into().unwrap();
            let expected = message(u64::from_be_bytes(n), 0);
            assert_eq!(lease.message.body, expected.body);
            waiting.remove(&lease.message.id);
            store.settle(lease.id, done(), at(1)).await.unwrap();
        }
    }
    assert!(waiting.is_empty(), "not delivered: {waiting:?}");
    let counts = store.counts(QUEUE, at(2)).await.unwrap();
    let stats = store.stats();
    assert_eq!((counts.drift(), stats.corrupt), (0, 0), "{counts:?}");
    store.close().await;
    lost
}

#[tokio::test]
async fn no_acknowledged_message_is_lost_when_the_power_fails() {
    let dir = TempDir::new().unwrap();
    open(dir.path()).await.close().await;
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut rng = fastrand::Rng::with_seed(seed);
    let (mut all, mut rounds_with_acks) = (0, 0);
    for round in 1..=ROUNDS {
        let fate = Fate {
            cut_at_write: rng.u64(1..600),
            fail_at_sync: rng.bool().then(|| rng.u64(1..40)),
            lies: false,
        };
        let acked = run_until_cut(dir.path(), fate, round, rng.u64(..)).await;
        let lost = lost(dir.path(), &acked).await;
        assert_eq!(lost, Vec::<u64>::new(), "round {round}, {fate:?}");
        all += acked.len();
        rounds_with_acks += u64::from(!acked.is_empty());
    }
    println!("{all} messages acknowledged in {ROUNDS} rounds");
    assert!(
        rounds_with_acks > ROUNDS / 3,
        "{rounds_with_acks} rounds got so far"
    );
}

#[tokio::test]
async fn the_simulated_disk_shows_a_loss_where_flushes_do_nothing() {
    let dir = TempDir::new().unwrap();
    open(dir.path()).await.close().await;
    let fate = Fate {
        cut_at_write: 400,
        fail_at_sync: None,
        lies: true,
    };
    let acked = run_until_cut(dir.path(), fate, 1, 7).await;
    assert!(!acked.is_empty(), "it got so far");
    assert_eq!(lost(dir.path(), &acked).await, acked);
}

#[tokio::test]
async fn a_flush_that_fails_acknowledges_nothing_and_the_store_goes_on() {
    let dir = TempDir::new().unwrap();
    open(dir.path()).await.close().await;
    let fate = Fate {
        cut_at_write: u64::MAX,
        fail_at_sync: None,
        lies: false,
    };
    let bytes = std::fs::read(dir.path().join(recover::FILE)).unwrap();
    let disk = Arc::new(Mutex::new(Disk::new(bytes, fate, 1)));
    let store = open_on(dir.path(), &disk);
    store.ready().await.unwrap();
    enqueue(&store, 1).await.unwrap();
    {
        let mut disk = lock(&disk);
        disk.fate.fail_at_sync = Some(disk.syncs + 1);
    }
    let refused = enqueue(&store, 2).await;
    assert!(
        matches!(&refused, Err(EnqueueError::Unavailable(why)) if why.contains("os error 5")),
        "{refused:?}"
    );
    reopened(&store, 1).await;
    enqueue(&store, 3).await.unwrap();
    let known = store.status(id(1)).await.unwrap();
    assert!(known.is_some_and(|view| view.state == State::Queued));
    // What the failed flush should have written reads as if it were there; it must be on disk
    // before anything is built on it.
    lock(&disk).off = true;
    store.close().await;
    std::fs::write(dir.path().join(recover::FILE), &lock(&disk).durable).unwrap();
    assert_eq!(lost(dir.path(), &[1, 3]).await, Vec::<u64>::new());
}
