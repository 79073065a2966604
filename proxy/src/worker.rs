//! One worker thread: everything that is not shared.
//!
//! A worker owns its runtime, listeners, upstream connections, timers and randomness; nothing of
//! it is `Send`. What must mean the same with any number of workers (breakers, budgets, limits,
//! endpoint state) is in [`Shared`](crate::app::Shared).

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use http::HeaderValue;
use metrics::Counter;

use crate::app::Shared;
use crate::clock;
use crate::identity::expiry::Outlived;
use crate::listener::Direction;
use crate::snapshot::Snapshot;
use crate::telemetry::access_log;
use crate::unknown::Names;
use crate::upstream::connect::Limits;
use crate::upstream::pool::Pools;
use crate::wheel::Wheel;

/// How often connections are swept and the access log is handed over.
const HOUSEKEEPING: Duration = Duration::from_millis(500);

/// The state of one worker thread.
pub struct Worker {
    /// What all workers share.
    pub shared: Arc<Shared>,
    /// This worker's timers.
    pub wheel: Wheel,
    /// This worker's upstream connections.
    pub pools: Pools,
    /// What is done with connections that outlive their peer's certificate.
    pub outlived: BothWays,
    /// This worker's view of names outside the mesh.
    pub names: Names,
    rng: RefCell<fastrand::Rng>,
    snapshot: RefCell<arc_swap::Cache<Arc<ArcSwap<Snapshot>>, Arc<Snapshot>>>,
    counters: RefCell<Counters>,
    log: RefCell<Vec<u8>>,
    date: Cell<[u8; 29]>,
    date_value: RefCell<HeaderValue>,
    requests: Cell<u64>,
    under_way: Cell<u32>,
}

/// The same for both directions.
pub struct BothWays {
    /// Of connections that peers open.
    pub inbound: Outlived,
    /// Of connections to peers.
    pub outbound: Outlived,
}

/// Counter handles by packed labels, forgotten when the snapshot changes.
#[derive(Default)]
struct Counters {
    generation: u64,
    known: HashMap<(u32, u64), Counter, foldhash::fast::RandomState>,
}

impl Worker {
    /// A worker over `shared`; `seed` makes its randomness differ from the other workers'.
    pub fn new(shared: Arc<Shared>, seed: u64) -> Rc<Self> {
        let wheel = Wheel::new();
        let limits = Limits {
            max_headers: shared.wire.max_headers,
            max_header_bytes: shared.wire.max_header_bytes,
        };
        let outlived = |direction| {
            let drain = shared.bootstrap.drain();
            Outlived::new(&shared.metrics, direction, drain)
        };
        let outlived = BothWays {
            inbound: outlived(Direction::Inbound),
            outbound: outlived(Direction::Outbound),
        };
        let snapshot = arc_swap::Cache::new(shared.store.cell());
        let date = clock::http_date();
        Rc::new(Self {
            pools: Pools::new(wheel.clone(), limits, outlived.outbound.clone()),
            outlived,
            wheel,
            names: Names::default(),
            rng: RefCell::new(fastrand::Rng::with_seed(seed)),
            snapshot: RefCell::new(snapshot),
            counters: RefCell::default(),
            log: RefCell::default(),
            date: Cell::new(date),
            date_value: RefCell::new(date_value(&date)),
            requests: Cell::new(0),
            under_way: Cell::new(0),
            shared,
        })
    }

    /// The mesh config in force. A request asks once and keeps what it got.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        Arc::clone(self.snapshot.borrow_mut().load())
    }

    /// This worker's randomness.
    pub fn rng(&self) -> std::cell::RefMut<'_, fastrand::Rng> {
        self.rng.borrow_mut()
    }

    /// The counter for packed labels `(family and route, rest)`, made by `make` when it is new.
    pub fn counter(
        &self,
        generation: u64,
        labels: (u32, u64),
        make: impl FnOnce() -> Counter,
    ) -> Counter {
        let mut counters = self.counters.borrow_mut();
        if counters.generation != generation {
            *counters = Counters {
                generation,
                known: HashMap::default(),
            };
        }
        counters.known.entry(labels).or_insert_with(make).clone()
    }

    /// Counts a request and says whether it is one that the access log samples.
    pub fn sampled(&self) -> bool {
        let count = self.requests.get().wrapping_add(1);
        self.requests.set(count);
        let every = self.shared.access_log.every();
        every > 0 && count.is_multiple_of(every)
    }

    /// A request begins here.
    pub fn begin(&self) {
        self.under_way.set(self.under_way.get() + 1);
    }

    /// A request that began here has ended.
    pub fn end(&self) {
        self.under_way.set(self.under_way.get().saturating_sub(1));
    }

    /// Requests under way on this worker.
    pub fn under_way(&self) -> u32 {
        self.under_way.get()
    }

    /// Today's `Date`, half a second old at most.
    pub fn date(&self) -> [u8; 29] {
        self.date.get()
    }

    /// The same as the value of a field.
    pub fn date_value(&self) -> HeaderValue {
        self.date_value.borrow().clone()
    }

    /// Appends one line to the access log.
    pub fn log_line(&self, write: impl FnOnce(&mut Vec<u8>)) {
        let mut buffer = self.log.borrow_mut();
        write(&mut buffer);
        if buffer.len() >= access_log::CHUNK {
            self.shared.access_log.write(std::mem::take(&mut *buffer));
        }
    }

    /// Hands over what the access log has gathered.
    pub fn flush_log(&self) {
        let buffer = std::mem::take(&mut *self.log.borrow_mut());
        if !buffer.is_empty() {
            self.shared.access_log.write(buffer);
        }
    }

    /// Sweeps connections and hands over the access log, for ever.
    pub async fn keep_house(self: Rc<Self>) {
        let mut ticks = tokio::time::interval(HOUSEKEEPING);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            self.pools.sweep(self.shared.identity.generation());
            let date = clock::http_date();
            self.date.set(date);
            *self.date_value.borrow_mut() = date_value(&date);
            self.flush_log();
        }
    }
}

fn date_value(date: &[u8; 29]) -> HeaderValue {
    HeaderValue::from_bytes(date).expect("a date is visible ASCII")
}
