//! What the writer keeps in memory: every message that is not final, by what it waits for.
//!
//! Owns the order of delivery: due times, ordering keys, targets, leases. Rebuilt from the `live`
//! and `dead` tables at open; a record costs about half a kilobyte, its request stays on disk.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use outrigger_core::time::UnixMillis;

use crate::backend::Counts;
use crate::message::{HELD, MessageId, State};
use crate::record::{Record, Totals};
use crate::signal::{Signal, Signals};

type Place = (u64, MessageId);

/// A message that is not final.
#[derive(Debug)]
pub(super) struct Live {
    pub(super) record: Record,
    /// Token and end of the current lease.
    pub(super) lease: Option<(u64, UnixMillis)>,
}

/// What is remembered of a dead letter.
#[derive(Debug, Clone)]
struct Buried {
    queue: String,
    seq: u64,
    died_at: UnixMillis,
    weight: u64,
    held_lane: Option<String>,
}

/// All queues.
pub(super) struct Index {
    live: HashMap<MessageId, Live>,
    buried: HashMap<MessageId, Buried>,
    queues: BTreeMap<String, QueueIndex>,
    expiring: BTreeSet<(UnixMillis, MessageId)>,
    signals: Arc<Signals>,
    last_seq: u64,
}

/// One queue. Every pending message is in `pending`, and in one of `ready`, `delayed`, `in_flight`
/// unless an earlier one holds its key.
struct QueueIndex {
    ready: HashMap<String, BTreeSet<Place>>,
    /// Not due, or not looked at since it was placed.
    delayed: BTreeSet<(UnixMillis, u64, MessageId)>,
    in_flight: BTreeSet<(UnixMillis, MessageId)>,
    pending: BTreeSet<Place>,
    /// By [`Record::lane`].
    lanes: HashMap<String, BTreeSet<Place>>,
    dead: BTreeSet<(UnixMillis, u64, MessageId)>,
    waiting: u64,
    bytes: u64,
    dead_bytes: u64,
    totals: Totals,
    signal: Arc<Signal>,
}

impl QueueIndex {
    fn new(signal: Arc<Signal>) -> Self {
        Self {
            ready: HashMap::new(),
            delayed: BTreeSet::new(),
            in_flight: BTreeSet::new(),
            pending: BTreeSet::new(),
            lanes: HashMap::new(),
            dead: BTreeSet::new(),
            waiting: 0,
            bytes: 0,
            dead_bytes: 0,
            totals: Totals::default(),
            signal,
        }
    }

    fn is_head(&self, lane: Option<&str>, place: Place) -> bool {
        let Some(queue) = lane.and_then(|lane| self.lanes.get(lane)) else {
            return true;
        };
        queue.first() == Some(&place)
    }

    fn leave_lane(&mut self, lane: &str, place: Place) -> Option<MessageId> {
        let queue = self.lanes.get_mut(lane)?;
        let was_head = queue.first() == Some(&place);
        queue.remove(&place);
        let next = queue.first().map(|(_, id)| *id);
        if queue.is_empty() {
            self.lanes.remove(lane);
        }
        next.filter(|_| was_head)
    }
}

impl Index {
    pub(super) fn new(signals: Arc<Signals>) -> Self {
        Self {
            live: HashMap::new(),
            buried: HashMap::new(),
            queues: BTreeMap::new(),
            expiring: BTreeSet::new(),
            signals,
            last_seq: 0,
        }
    }

    pub(super) fn next_seq(&mut self) -> u64 {
        self.last_seq += 1;
        self.last_seq
    }

    fn queue(&mut self, name: &str) -> &mut QueueIndex {
        if !self.queues.contains_key(name) {
            let queue = QueueIndex::new(self.signals.of(name));
            self.queues.insert(name.to_owned(), queue);
        }
        self.queues.get_mut(name).expect("just inserted")
    }

    pub(super) fn totals(&mut self, queue: &str) -> &mut Totals {
        &mut self.queue(queue).totals
    }

    pub(super) fn names(&self) -> Vec<String> {
        self.queues.keys().cloned().collect()
    }

    pub(super) fn get(&self, id: MessageId) -> Option<&Live> {
        self.live.get(&id)
    }

    pub(super) fn is_dead(&self, id: MessageId) -> bool {
        self.buried.contains_key(&id)
    }

    /// Depth and bytes of what is not final.
    pub(super) fn load(&self, queue: &str) -> (u64, u64) {
        self.queues
            .get(queue)
            .map_or((0, 0), |q| (q.pending.len() as u64, q.bytes))
    }

    /// Weight of everything held in memory's view of the file.
    pub(super) fn stored_bytes(&self) -> u64 {
        self.queues.values().map(|q| q.bytes + q.dead_bytes).sum()
    }

    /// Files a message where its state says.
    pub(super) fn put(&mut self, live: Live) {
        let record = &live.record;
        let (id, place) = (record.id, (record.seq, record.id));
        self.last_seq = self.last_seq.max(record.seq);
        if let Some(at) = record.expires_at
            && live.lease.is_none()
        {
            self.expiring.insert((at, id));
        }
        let queue = self.queue(&record.queue);
        queue.pending.insert(place);
        queue.bytes += record.weight;
        queue.waiting += u64::from(record.state == State::Waiting);
        if let Some(lane) = record.lane() {
            queue.lanes.entry(lane).or_default().insert(place);
        }
        match live.lease {
            Some((_, until)) => {
                queue.in_flight.insert((until, id));
            }
            None => {
                queue.delayed.insert((record.not_before, record.seq, id));
                queue.signal.bump();
            }
        }
        self.live.insert(id, live);
    }

    /// Takes a message out of every list; the next one with its key may come forward.
    pub(super) fn take(&mut self, id: MessageId) -> Option<Live> {
        let live = self.live.remove(&id)?;
        let record = &live.record;
        let place = (record.seq, id);
        if let Some(at) = record.expires_at {
            self.expiring.remove(&(at, id));
        }
        let queue = self.queue(&record.queue);
        queue.pending.remove(&place);
        queue.bytes -= record.weight;
        queue.waiting -= u64::from(record.state == State::Waiting);
        queue.delayed.remove(&(record.not_before, record.seq, id));
        if let Some((until, _)) = live.lease.map(|(_, until)| (until, ())) {
            queue.in_flight.remove(&(until, id));
        }
        if let Some(ready) = queue.ready.get_mut(&record.target) {
            ready.remove(&place);
            if ready.is_empty() {
                queue.ready.remove(&record.target);
            }
        }
        let next = record
            .lane()
            .and_then(|lane| queue.leave_lane(&lane, place));
        self.unblock(next);
        Some(live)
    }

    /// Lets a message that a key held back be looked at again.
    fn unblock(&mut self, id: Option<MessageId>) {
        let Some(live) = id.and_then(|id| self.live.get(&id)) else {
            return;
        };
        if live.lease.is_some() {
            return;
        }
        let record = &live.record;
        if let Some(queue) = self.queues.get_mut(&record.queue) {
            queue
                .delayed
                .insert((record.not_before, record.seq, record.id));
            queue.signal.bump();
        }
    }

    /// Files a dead letter.
    pub(super) fn bury(&mut self, record: &Record) {
        let died_at = record.finished_at.unwrap_or_default();
        let held_lane = record.lane().filter(|_| record.holds_key());
        self.last_seq = self.last_seq.max(record.seq);
        let queue = self.queue(&record.queue);
        queue.dead.insert((died_at, record.seq, record.id));
        queue.dead_bytes += record.weight;
        if let Some(lane) = &held_lane {
            queue
                .lanes
                .entry(lane.clone())
                .or_default()
                .insert((record.seq, record.id));
        }
        let buried = Buried {
            queue: record.queue.clone(),
            seq: record.seq,
            died_at,
            weight: record.weight,
            held_lane,
        };
        self.buried.insert(record.id, buried);
    }

    /// Takes a dead letter out; the next one with its key may come forward.
    pub(super) fn unbury(&mut self, id: MessageId) {
        let Some(buried) = self.buried.remove(&id) else {
            return;
        };
        let queue = self.queue(&buried.queue);
        queue.dead.remove(&(buried.died_at, buried.seq, id));
        queue.dead_bytes -= buried.weight;
        let place = (buried.seq, id);
        let next = buried
            .held_lane
            .as_deref()
            .and_then(|lane| queue.leave_lane(lane, place));
        self.unblock(next);
    }

    /// Moves what has come due to `ready`, unless its key is held.
    pub(super) fn promote(&mut self, queue: &str, now: UnixMillis) {
        let Some(queue) = self.queues.get_mut(queue) else {
            return;
        };
        while let Some(&(at, seq, id)) = queue.delayed.first()
            && at <= now
        {
            queue.delayed.pop_first();
            let Some(live) = self.live.get(&id) else {
                continue;
            };
            if queue.is_head(live.record.lane().as_deref(), (seq, id)) {
                let target = live.record.target.clone();
                queue.ready.entry(target).or_default().insert((seq, id));
            }
        }
    }

    /// The oldest ready message whose target passes.
    pub(super) fn next_ready(
        &self,
        queue: &str,
        passes: impl Fn(&str) -> bool,
    ) -> Option<MessageId> {
        let ready = &self.queues.get(queue)?.ready;
        let firsts = ready.iter().filter(|(target, _)| passes(target));
        firsts
            .filter_map(|(_, places)| places.first())
            .min()
            .map(|(_, id)| *id)
    }

    /// A message whose lease has run out.
    pub(super) fn next_overrun(&self, queue: &str, now: UnixMillis) -> Option<MessageId> {
        let (until, id) = self.queues.get(queue)?.in_flight.first()?;
        (*until <= now).then_some(*id)
    }

    /// A message that ends undelivered now.
    pub(super) fn next_overdue(&self, now: UnixMillis) -> Option<MessageId> {
        let (at, id) = self.expiring.first()?;
        (*at <= now).then_some(*id)
    }

    /// The next due time or lease end.
    pub(super) fn next_due(&self, queue: &str) -> Option<UnixMillis> {
        let queue = self.queues.get(queue)?;
        let due = queue.delayed.first().map(|(at, ..)| *at);
        let due = due.filter(|at| *at != HELD);
        let lease = queue.in_flight.first().map(|(until, _)| *until);
        [due, lease].into_iter().flatten().min()
    }

    /// Pending messages without a lease, in enqueue order.
    pub(super) fn idle(&self, queue: &str) -> Vec<MessageId> {
        let Some(queue) = self.queues.get(queue) else {
            return Vec::new();
        };
        let ids = queue.pending.iter().map(|(_, id)| *id);
        ids.filter(|id| self.live.get(id).is_some_and(|live| live.lease.is_none()))
            .collect()
    }

    /// Dead letters, oldest death first.
    pub(super) fn dead<'a>(&'a self, queue: &str) -> impl Iterator<Item = MessageId> + 'a {
        self.queues
            .get(queue)
            .into_iter()
            .flat_map(|q| q.dead.iter().map(|(_, _, id)| *id))
    }

    /// Dead letters beyond what a queue may keep, the oldest first.
    pub(super) fn beyond(&self, max_dead: u64) -> Vec<MessageId> {
        let max = usize::try_from(max_dead).unwrap_or(usize::MAX);
        let over = |q: &QueueIndex| q.dead.len().saturating_sub(max);
        let queues = self.queues.values();
        queues
            .flat_map(|q| q.dead.iter().take(over(q)).map(|(_, _, id)| *id))
            .collect()
    }

    pub(super) fn counts(&self, name: &str, now: UnixMillis) -> Counts {
        let Some(queue) = self.queues.get(name) else {
            return Counts::default();
        };
        let mut counts = queue.totals.into_counts();
        counts.in_flight = queue.in_flight.len() as u64;
        counts.waiting = queue.waiting;
        counts.delayed = queue
            .delayed
            .range(
                (
                    UnixMillis(now.0.saturating_add(1)),
                    0,
                    MessageId::from_bytes([0; 16]),
                )..,
            )
            .filter(|(_, _, id)| {
                self.live
                    .get(id)
                    .is_some_and(|live| live.record.state != State::Waiting)
            })
            .count() as u64;
        let pending = queue.pending.len() as u64;
        counts.ready = pending - counts.in_flight - counts.waiting - counts.delayed;
        counts.dead = queue.dead.len() as u64;
        counts.bytes = queue.bytes;
        counts.dead_bytes = queue.dead_bytes;
        let mut oldest_first = queue.pending.iter().filter_map(|(_, id)| self.live.get(id));
        counts.oldest_enqueued_at = oldest_first
            .find(|live| !live.record.is_held())
            .map(|live| live.record.enqueued_at);
        counts
    }
}
