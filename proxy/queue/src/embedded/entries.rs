//! What is kept in memory of one message, and where.
//!
//! Owns the size of a deep queue: an entry is 80 bytes whatever its request, its attempts and its
//! names are. What is not here is read from the file when the message moves. Entries lie in pieces
//! that are given back when a queue has drained, and are found by a number that never moves.

use std::collections::{BTreeSet, HashMap};
use std::hash::{BuildHasher as _, RandomState};
use std::num::NonZeroU64;
use std::sync::Arc;

use hashbrown::HashTable;
use outrigger_core::time::UnixMillis;

use crate::message::{HELD, MessageId, State};

/// Entries of one piece: 40 KiB.
const PIECE: u16 = 512;
/// The `expires_at` of a message that does not expire.
pub(super) const NEVER: UnixMillis = UnixMillis(u64::MAX);

/// A message that is not final, or a dead letter.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    pub(super) id: MessageId,
    /// Enqueue order.
    pub(super) seq: u64,
    /// When it falls due; of a dead letter, when it died.
    pub(super) at: UnixMillis,
    pub(super) expires_at: UnixMillis,
    pub(super) enqueued_at: UnixMillis,
    pub(super) weight: u64,
    /// What its order is kept within, if it takes part in that.
    pub(super) lane: Option<Lane>,
    /// Which of the index's queues.
    pub(super) queue: u32,
    pub(super) target: Name,
    pub(super) caller: Name,
    pub(super) state: State,
}

impl Entry {
    /// True for a message that waits for another one's end, or to be concluded.
    pub(super) fn is_held(&self) -> bool {
        self.at == HELD && !self.state.is_final()
    }

    /// True for a message that may end as expired now; one that is being delivered may not.
    pub(super) fn is_overdue(&self, now: UnixMillis) -> bool {
        !self.state.is_final() && self.state != State::Delivering && self.expires_at <= now
    }
}

/// A target with an ordering key, as a keyed hash of both. Two that share one would be delivered
/// one after another, which is allowed, and among a million keys happens once in 37 million runs.
pub(super) type Lane = NonZeroU64;

/// Where an entry is.
pub(super) type Slot = u32;

/// All entries, by place and by id.
#[derive(Default)]
pub(super) struct Entries {
    pieces: Vec<Option<Piece>>,
    /// Pieces with room; the lowest is filled first, so that the others empty.
    roomy: BTreeSet<usize>,
    by_id: HashTable<Slot>,
    hasher: RandomState,
}

struct Piece {
    places: Box<[Option<Entry>]>,
    free: Vec<u16>,
}

impl Piece {
    fn new() -> Self {
        Self {
            places: (0..PIECE).map(|_| None).collect(),
            free: (0..PIECE).rev().collect(),
        }
    }
}

/// The piece of a slot, and the place in it.
fn place(slot: Slot) -> (usize, usize) {
    let piece = u32::from(PIECE);
    ((slot / piece) as usize, (slot % piece) as usize)
}

impl Entries {
    pub(super) fn get(&self, slot: Slot) -> Option<&Entry> {
        let (piece, place) = place(slot);
        self.pieces.get(piece)?.as_ref()?.places[place].as_ref()
    }

    pub(super) fn find(&self, id: MessageId) -> Option<Slot> {
        let is = |slot: &Slot| self.get(*slot).is_some_and(|entry| entry.id == id);
        self.by_id.find(self.hasher.hash_one(id), is).copied()
    }

    /// The hash by which lanes are told apart.
    pub(super) fn lane(&self, target: &str, key: &str) -> Lane {
        let hash = self.hasher.hash_one((target, key));
        NonZeroU64::new(hash).unwrap_or(NonZeroU64::MIN)
    }

    /// Adds an entry whose id is not there yet.
    pub(super) fn insert(&mut self, entry: Entry) -> Slot {
        let id = entry.id;
        let n = self.roomy.first().copied().unwrap_or_else(|| {
            self.pieces.push(None);
            self.roomy.insert(self.pieces.len() - 1);
            self.pieces.len() - 1
        });
        let piece = self.pieces[n].get_or_insert_with(Piece::new);
        let place = piece.free.pop().expect("it has room");
        piece.places[usize::from(place)] = Some(entry);
        if piece.free.is_empty() {
            self.roomy.remove(&n);
        }
        let slot = u32::try_from(n * usize::from(PIECE) + usize::from(place))
            .expect("memory ends before four thousand million entries");
        let mut by_id = std::mem::take(&mut self.by_id);
        by_id.insert_unique(self.hasher.hash_one(id), slot, |slot| self.hash(*slot));
        self.by_id = by_id;
        slot
    }

    pub(super) fn remove(&mut self, slot: Slot) -> Option<Entry> {
        let (n, place) = place(slot);
        let hash = self.hash(slot);
        let piece = self.pieces.get_mut(n)?.as_mut()?;
        let entry = piece.places[place].take()?;
        piece.free.push(place as u16);
        let empty = piece.free.len() == usize::from(PIECE);
        self.roomy.insert(n);
        if let Ok(found) = self.by_id.find_entry(hash, |other| *other == slot) {
            found.remove();
        }
        if empty {
            self.give_back(n);
        }
        Some(entry)
    }

    fn hash(&self, slot: Slot) -> u64 {
        self.get(slot)
            .map_or(0, |entry| self.hasher.hash_one(entry.id))
    }

    fn give_back(&mut self, n: usize) {
        self.pieces[n] = None;
        while let Some(None) = self.pieces.last() {
            self.pieces.pop();
            self.roomy.remove(&self.pieces.len());
        }
        let mut by_id = std::mem::take(&mut self.by_id);
        if by_id.len() < by_id.capacity() / 8 {
            by_id.shrink_to(by_id.len() * 2, |slot| self.hash(*slot));
        }
        self.by_id = by_id;
    }
}

/// A name that many entries share.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Name(u32);

/// Names and how many entries each has; one without goes.
#[derive(Default)]
pub(super) struct Names {
    all: Vec<(Arc<str>, u32)>,
    free: Vec<Name>,
    by_text: HashMap<Arc<str>, Name>,
}

impl Names {
    pub(super) fn get(&self, name: Name) -> &Arc<str> {
        &self.all[name.0 as usize].0
    }

    pub(super) fn find(&self, text: &str) -> Option<Name> {
        self.by_text.get(text).copied()
    }

    pub(super) fn hold(&mut self, text: &str) -> Name {
        if let Some(name) = self.by_text.get(text) {
            self.all[name.0 as usize].1 += 1;
            return *name;
        }
        let text: Arc<str> = text.into();
        let named = (Arc::clone(&text), 1);
        let name = if let Some(name) = self.free.pop() {
            self.all[name.0 as usize] = named;
            name
        } else {
            self.all.push(named);
            Name(self.all.len() as u32 - 1)
        };
        self.by_text.insert(text, name);
        name
    }

    pub(super) fn release(&mut self, name: Name) {
        let (text, held) = &mut self.all[name.0 as usize];
        *held -= 1;
        if *held == 0 {
            self.by_text.remove(text);
            *text = Arc::from("");
            self.free.push(name);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(n: u64, names: &mut Names) -> Entry {
        Entry {
            id: MessageId::from_bytes(u128::from(n).to_be_bytes()),
            seq: n,
            at: UnixMillis(0),
            expires_at: NEVER,
            enqueued_at: UnixMillis(0),
            weight: 1,
            lane: None,
            queue: 0,
            target: names.hold("t"),
            caller: names.hold("c"),
            state: State::Queued,
        }
    }

    #[test]
    fn an_entry_costs_what_the_module_says() {
        assert_eq!(size_of::<Option<Entry>>(), 80);
    }

    #[test]
    fn entries_are_found_while_others_come_and_go_and_pieces_are_given_back() {
        let mut rng = fastrand::Rng::with_seed(7);
        let (mut entries, mut names) = (Entries::default(), Names::default());
        let mut there: HashMap<u64, Slot> = HashMap::new();
        for n in 0..20_000 {
            let new = entry(n, &mut names);
            there.insert(n, entries.insert(new));
            let drain = if n % 4000 < 2000 { 0 } else { 2 };
            for _ in 0..drain {
                let gone = rng.u64(..=n);
                if let Some(slot) = there.remove(&gone) {
                    assert_eq!(entries.remove(slot).map(|entry| entry.seq), Some(gone));
                }
                let id = MessageId::from_bytes(u128::from(gone).to_be_bytes());
                assert_eq!(entries.find(id), None);
            }
        }
        for (n, slot) in &there {
            let id = MessageId::from_bytes(u128::from(*n).to_be_bytes());
            assert_eq!(entries.find(id), Some(*slot));
        }
        let last = *there.keys().max().unwrap();
        for (n, slot) in &there {
            if *n != last {
                entries.remove(*slot);
            }
        }
        assert!(
            entries.by_id.capacity() < 100,
            "{}",
            entries.by_id.capacity()
        );
        let pieces = entries.pieces.iter().flatten().count();
        assert_eq!(pieces, 1, "one entry is left");
        entries.remove(there[&last]);
        assert!(entries.pieces.is_empty() && entries.roomy.is_empty());
    }

    #[test]
    fn a_name_goes_with_its_last_entry() {
        let mut names = Names::default();
        let (a, b) = (names.hold("a"), names.hold("b"));
        assert_eq!(names.hold("a"), a);
        names.release(a);
        assert_eq!(&**names.get(a), "a");
        names.release(a);
        let c = names.hold("c");
        assert_eq!(names.all.len(), 2, "its place is used again");
        assert_eq!((&**names.get(b), &**names.get(c)), ("b", "c"));
        assert_ne!(names.hold("a"), c);
    }
}
