//! What the writer keeps in memory: an entry for every message that is not final and every dead
//! letter, by what it waits for.
//!
//! Owns the order of delivery: due times, ordering keys, targets, leases. Rebuilt from the `live`
//! and `dead` tables at open. A waiting message costs about 160 bytes, and 50 more with an ordering
//! key; records are in memory while their message is leased, and otherwise in the file.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use outrigger_core::time::UnixMillis;

use super::entries::{Entries, Entry, Lane, NEVER, Name, Names, Slot};
use crate::backend::Counts;
use crate::message::{HELD, MessageId, State};
use crate::record::{Record, Totals};
use crate::signal::{Signal, Signals};

/// A message that is being delivered.
#[derive(Debug)]
struct Leased {
    token: u64,
    until: UnixMillis,
    record: Record,
}

/// A message that was taken out, and what is known of it without its record.
#[derive(Debug)]
pub(super) struct Taken {
    /// There when it was leased.
    pub(super) record: Option<Record>,
    pub(super) id: MessageId,
    pub(super) seq: u64,
    pub(super) queue: Arc<str>,
    pub(super) target: Arc<str>,
    pub(super) caller: Arc<str>,
    pub(super) enqueued_at: UnixMillis,
}

/// All queues.
pub(super) struct Index {
    entries: Entries,
    names: Names,
    leased: HashMap<Slot, Leased>,
    queues: Vec<QueueIndex>,
    by_name: BTreeMap<Arc<str>, u32>,
    expiring: BTreeSet<(UnixMillis, Slot)>,
    signals: Arc<Signals>,
    last_seq: u64,
}

/// One queue. Every pending message is in `pending`, and in one of `ready`, `delayed`, `in_flight`
/// unless an earlier one holds its key.
struct QueueIndex {
    name: Arc<str>,
    ready: HashMap<Name, BTreeSet<(u64, Slot)>>,
    /// Not due, or not looked at since it was placed.
    delayed: BTreeSet<(UnixMillis, Slot)>,
    in_flight: BTreeSet<(UnixMillis, Slot)>,
    pending: BTreeSet<(u64, Slot)>,
    lanes: BTreeSet<(Lane, u64, Slot)>,
    dead: BTreeSet<(UnixMillis, u64, Slot)>,
    /// Messages and bytes that are not final, by caller.
    callers: HashMap<Name, (u64, u64)>,
    waiting: u64,
    bytes: u64,
    dead_bytes: u64,
    totals: Totals,
    signal: Arc<Signal>,
}

impl QueueIndex {
    fn new(name: Arc<str>, signal: Arc<Signal>) -> Self {
        Self {
            name,
            ready: HashMap::new(),
            delayed: BTreeSet::new(),
            in_flight: BTreeSet::new(),
            pending: BTreeSet::new(),
            lanes: BTreeSet::new(),
            dead: BTreeSet::new(),
            callers: HashMap::new(),
            waiting: 0,
            bytes: 0,
            dead_bytes: 0,
            totals: Totals::default(),
            signal,
        }
    }

    fn charge(&mut self, caller: Name, weight: u64) {
        let load = self.callers.entry(caller).or_default();
        *load = (load.0 + 1, load.1 + weight);
    }

    fn discharge(&mut self, caller: Name, weight: u64) {
        if let Some(load) = self.callers.get_mut(&caller) {
            *load = (load.0 - 1, load.1 - weight);
            if load.0 == 0 {
                self.callers.remove(&caller);
            }
        }
    }

    /// The message whose turn it is in a lane.
    fn head(&self, lane: Lane) -> Option<(u64, Slot)> {
        let (found, seq, slot) = self.lanes.range((lane, 0, 0)..).next()?;
        (*found == lane).then_some((*seq, *slot))
    }

    fn is_head(&self, entry: &Entry, slot: Slot) -> bool {
        let at = |lane| self.head(lane) == Some((entry.seq, slot));
        entry.lane.is_none_or(at)
    }

    /// Leaves its lane; returns whose turn it is then, if that was this one's.
    fn leave_lane(&mut self, entry: &Entry, slot: Slot) -> Option<Slot> {
        let lane = entry.lane?;
        let was_head = self.is_head(entry, slot);
        self.lanes.remove(&(lane, entry.seq, slot));
        let (_, next) = self.head(lane)?;
        was_head.then_some(next)
    }
}

impl Index {
    pub(super) fn new(signals: Arc<Signals>) -> Self {
        Self {
            entries: Entries::default(),
            names: Names::default(),
            leased: HashMap::new(),
            queues: Vec::new(),
            by_name: BTreeMap::new(),
            expiring: BTreeSet::new(),
            signals,
            last_seq: 0,
        }
    }

    pub(super) fn next_seq(&mut self) -> u64 {
        self.last_seq += 1;
        self.last_seq
    }

    /// The number of a queue; a new name gets one.
    fn number(&mut self, name: &str) -> u32 {
        if let Some(n) = self.by_name.get(name) {
            return *n;
        }
        let n = u32::try_from(self.queues.len()).expect("there are fewer queues than messages");
        let name: Arc<str> = name.into();
        let signal = self.signals.of(&name);
        self.queues.push(QueueIndex::new(Arc::clone(&name), signal));
        self.by_name.insert(name, n);
        n
    }

    fn queue(&self, name: &str) -> Option<&QueueIndex> {
        self.by_name.get(name).map(|n| &self.queues[*n as usize])
    }

    pub(super) fn totals(&mut self, queue: &str) -> &mut Totals {
        let n = self.number(queue);
        &mut self.queues[n as usize].totals
    }

    pub(super) fn names(&self) -> Vec<String> {
        self.by_name.keys().map(|name| name.to_string()).collect()
    }

    /// A message that is not final.
    pub(super) fn get(&self, id: MessageId) -> Option<&Entry> {
        let entry = self.entries.get(self.entries.find(id)?)?;
        (entry.state != State::Dead).then_some(entry)
    }

    pub(super) fn is_dead(&self, id: MessageId) -> bool {
        let entry = self
            .entries
            .find(id)
            .and_then(|slot| self.entries.get(slot));
        entry.is_some_and(|entry| entry.state == State::Dead)
    }

    /// Token and end of the lease of a message.
    pub(super) fn lease_of(&self, id: MessageId) -> Option<(u64, UnixMillis)> {
        let leased = self.leased.get(&self.entries.find(id)?)?;
        Some((leased.token, leased.until))
    }

    /// Depth and bytes of what is not final.
    pub(super) fn load(&self, queue: &str) -> (u64, u64) {
        let queue = self.queue(queue);
        queue.map_or((0, 0), |q| (q.pending.len() as u64, q.bytes))
    }

    /// Messages and bytes of one caller that are not final.
    pub(super) fn load_of(&self, queue: &str, caller: &str) -> (u64, u64) {
        let load = || self.queue(queue)?.callers.get(&self.names.find(caller)?);
        load().copied().unwrap_or_default()
    }

    /// Weight of everything held in memory's view of the file.
    pub(super) fn stored_bytes(&self) -> u64 {
        self.queues.iter().map(|q| q.bytes + q.dead_bytes).sum()
    }

    /// Adds an entry; one that a damaged file has twice is what it was said to be last.
    fn file(&mut self, record: &Record, at: UnixMillis) -> Slot {
        if let Some(slot) = self.entries.find(record.id) {
            let next = self.unfile(slot).and_then(|(.., next)| next);
            self.unblock(next);
        }
        self.last_seq = self.last_seq.max(record.seq);
        let key = record.ordering_key.as_deref();
        // At its target, so that a target that is down holds no other's messages.
        let lane = key
            .filter(|_| record.holds_key())
            .map(|key| self.entries.lane(&record.target, key));
        let entry = Entry {
            id: record.id,
            seq: record.seq,
            at,
            expires_at: record.expires_at.unwrap_or(NEVER),
            enqueued_at: record.enqueued_at,
            weight: record.weight,
            lane,
            queue: self.number(&record.queue),
            target: self.names.hold(&record.target),
            caller: self.names.hold(&record.caller),
            state: record.state,
        };
        let queue = entry.queue as usize;
        let slot = self.entries.insert(entry);
        if let Some(lane) = lane {
            self.queues[queue].lanes.insert((lane, record.seq, slot));
        }
        slot
    }

    /// Takes an entry out of every list; also says whose turn it is in its lane then.
    fn unfile(&mut self, slot: Slot) -> Option<(Entry, Option<Leased>, Option<Slot>)> {
        let entry = self.entries.remove(slot)?;
        let leased = self.leased.remove(&slot);
        let queue = &mut self.queues[entry.queue as usize];
        if entry.state == State::Dead {
            queue.dead.remove(&(entry.at, entry.seq, slot));
            queue.dead_bytes -= entry.weight;
        } else {
            let place = (entry.seq, slot);
            self.expiring.remove(&(entry.expires_at, slot));
            queue.pending.remove(&place);
            queue.bytes -= entry.weight;
            queue.discharge(entry.caller, entry.weight);
            queue.waiting -= u64::from(entry.state == State::Waiting);
            match &leased {
                Some(leased) => {
                    queue.in_flight.remove(&(leased.until, slot));
                }
                None => {
                    queue.delayed.remove(&(entry.at, slot));
                    if let Some(ready) = queue.ready.get_mut(&entry.target) {
                        ready.remove(&place);
                        if ready.is_empty() {
                            queue.ready.remove(&entry.target);
                        }
                    }
                }
            }
        }
        let next = queue.leave_lane(&entry, slot);
        self.names.release(entry.target);
        self.names.release(entry.caller);
        Some((entry, leased, next))
    }

    fn file_pending(&mut self, record: &Record) -> (Slot, &mut QueueIndex) {
        let slot = self.file(record, record.not_before);
        let caller = self.entries.get(slot).map(|entry| entry.caller);
        let n = self.number(&record.queue);
        let queue = &mut self.queues[n as usize];
        queue.pending.insert((record.seq, slot));
        queue.bytes += record.weight;
        queue.charge(caller.expect("just filed"), record.weight);
        queue.waiting += u64::from(record.state == State::Waiting);
        (slot, queue)
    }

    /// Files a message that waits for its time.
    pub(super) fn put(&mut self, record: &Record) {
        let (slot, queue) = self.file_pending(record);
        queue.delayed.insert((record.not_before, slot));
        queue.signal.bump();
        if let Some(at) = record.expires_at {
            self.expiring.insert((at, slot));
        }
    }

    /// Files a message that is being delivered.
    pub(super) fn put_leased(&mut self, record: Record, token: u64, until: UnixMillis) {
        let (slot, queue) = self.file_pending(&record);
        queue.in_flight.insert((until, slot));
        let leased = Leased {
            token,
            until,
            record,
        };
        self.leased.insert(slot, leased);
    }

    /// Makes a lease end at another time.
    pub(super) fn extend(&mut self, id: MessageId, until: UnixMillis) {
        let Some(slot) = self.entries.find(id) else {
            return;
        };
        let (Some(entry), Some(leased)) = (self.entries.get(slot), self.leased.get_mut(&slot))
        else {
            return;
        };
        let queue = &mut self.queues[entry.queue as usize];
        queue.in_flight.remove(&(leased.until, slot));
        queue.in_flight.insert((until, slot));
        leased.until = until;
    }

    /// Takes a message out that is not final; the next one with its key may come forward.
    pub(super) fn take(&mut self, id: MessageId) -> Option<Taken> {
        let slot = self.entries.find(id)?;
        let entry = self.entries.get(slot)?;
        if entry.state == State::Dead {
            return None;
        }
        let queue = Arc::clone(&self.queues[entry.queue as usize].name);
        let target = Arc::clone(self.names.get(entry.target));
        let caller = Arc::clone(self.names.get(entry.caller));
        let (entry, leased, next) = self.unfile(slot)?;
        self.unblock(next);
        Some(Taken {
            record: leased.map(|leased| leased.record),
            id,
            seq: entry.seq,
            queue,
            target,
            caller,
            enqueued_at: entry.enqueued_at,
        })
    }

    /// Lets a message that a key held back be looked at again.
    fn unblock(&mut self, slot: Option<Slot>) {
        let Some((slot, entry)) = slot.and_then(|slot| Some((slot, self.entries.get(slot)?)))
        else {
            return;
        };
        if entry.state == State::Dead || self.leased.contains_key(&slot) {
            return;
        }
        let queue = &mut self.queues[entry.queue as usize];
        queue.delayed.insert((entry.at, slot));
        queue.signal.bump();
    }

    /// Files a dead letter.
    pub(super) fn bury(&mut self, record: &Record) {
        let died_at = record.finished_at.unwrap_or_default();
        let slot = self.file(record, died_at);
        let n = self.number(&record.queue);
        let queue = &mut self.queues[n as usize];
        queue.dead.insert((died_at, record.seq, slot));
        queue.dead_bytes += record.weight;
    }

    /// Takes a dead letter out; the next one with its key may come forward.
    pub(super) fn unbury(&mut self, id: MessageId) {
        if self.is_dead(id)
            && let Some(slot) = self.entries.find(id)
            && let Some((.., next)) = self.unfile(slot)
        {
            self.unblock(next);
        }
    }

    /// Moves what has come due to `ready`, unless its key is held.
    pub(super) fn promote(&mut self, queue: &str, now: UnixMillis) {
        let Some(n) = self.by_name.get(queue) else {
            return;
        };
        let queue = &mut self.queues[*n as usize];
        while let Some(&(at, slot)) = queue.delayed.first()
            && at <= now
        {
            queue.delayed.pop_first();
            let Some(entry) = self.entries.get(slot) else {
                continue;
            };
            if queue.is_head(entry, slot) {
                let ready = queue.ready.entry(entry.target).or_default();
                ready.insert((entry.seq, slot));
            }
        }
    }

    /// The oldest ready message whose target passes.
    pub(super) fn next_ready(
        &self,
        queue: &str,
        passes: impl Fn(&str) -> bool,
    ) -> Option<MessageId> {
        let ready = &self.queue(queue)?.ready;
        let firsts = ready
            .iter()
            .filter(|(target, _)| passes(self.names.get(**target)));
        let (_, slot) = firsts.filter_map(|(_, places)| places.first()).min()?;
        self.id(*slot)
    }

    fn id(&self, slot: Slot) -> Option<MessageId> {
        self.entries.get(slot).map(|entry| entry.id)
    }

    /// A message whose lease has run out.
    pub(super) fn next_overrun(&self, queue: &str, now: UnixMillis) -> Option<MessageId> {
        let (until, slot) = self.queue(queue)?.in_flight.first()?;
        (*until <= now).then(|| self.id(*slot))?
    }

    /// A message that ends undelivered now.
    pub(super) fn next_overdue(&self, now: UnixMillis) -> Option<MessageId> {
        let (at, slot) = self.expiring.first()?;
        (*at <= now).then(|| self.id(*slot))?
    }

    /// The next due time or lease end.
    pub(super) fn next_due(&self, queue: &str) -> Option<UnixMillis> {
        let queue = self.queue(queue)?;
        let due = queue.delayed.first().map(|(at, _)| *at);
        let due = due.filter(|at| *at != HELD);
        let lease = queue.in_flight.first().map(|(until, _)| *until);
        [due, lease].into_iter().flatten().min()
    }

    /// The first pending messages without a lease, in enqueue order.
    pub(super) fn idle(&self, queue: &str, most: usize) -> Vec<MessageId> {
        let Some(queue) = self.queue(queue) else {
            return Vec::new();
        };
        let slots = queue.pending.iter().map(|(_, slot)| *slot);
        slots
            .filter(|slot| !self.leased.contains_key(slot))
            .filter_map(|slot| self.id(slot))
            .take(most)
            .collect()
    }

    /// Dead letters, oldest death first.
    pub(super) fn dead<'a>(&'a self, queue: &str) -> impl Iterator<Item = MessageId> + 'a {
        let dead = self.queue(queue).into_iter().flat_map(|q| &q.dead);
        dead.filter_map(|(_, _, slot)| self.id(*slot))
    }

    /// Some of the dead letters beyond what a queue may keep, the oldest of each first.
    pub(super) fn beyond(&self, max_dead: u64, most: usize) -> Vec<MessageId> {
        let max = usize::try_from(max_dead).unwrap_or(usize::MAX);
        let over = |q: &QueueIndex| q.dead.len().saturating_sub(max);
        let slots = self.queues.iter().flat_map(|q| q.dead.iter().take(over(q)));
        slots
            .filter_map(|(_, _, slot)| self.id(*slot))
            .take(most)
            .collect()
    }

    pub(super) fn counts(&self, name: &str, now: UnixMillis) -> Counts {
        let Some(queue) = self.queue(name) else {
            return Counts::default();
        };
        let mut counts = queue.totals.into_counts();
        counts.in_flight = queue.in_flight.len() as u64;
        counts.waiting = queue.waiting;
        let later = (UnixMillis(now.0.saturating_add(1)), 0);
        let entry = |slot: &Slot| self.entries.get(*slot);
        counts.delayed = queue
            .delayed
            .range(later..)
            .filter(|(_, slot)| entry(slot).is_some_and(|entry| entry.state != State::Waiting))
            .count() as u64;
        let pending = queue.pending.len() as u64;
        counts.ready = pending - counts.in_flight - counts.waiting - counts.delayed;
        counts.dead = queue.dead.len() as u64;
        counts.bytes = queue.bytes;
        counts.dead_bytes = queue.dead_bytes;
        let mut oldest_first = queue.pending.iter().filter_map(|(_, slot)| entry(slot));
        counts.oldest_enqueued_at = oldest_first
            .find(|entry| !entry.is_held())
            .map(|entry| entry.enqueued_at);
        counts
    }
}
