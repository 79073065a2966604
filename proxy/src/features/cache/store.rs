//! The answers that are kept for one service, shared by all workers.
//!
//! Bounded by number and by bytes; what was not asked for since it was last looked at goes first.
//! One lock, held for a look-up or an insertion and never while anything is waited for. Remembers
//! who is fetching an answer, so that others wait for it instead of asking for the same.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, StatusCode};
use outrigger_core::cache::Kept;
use outrigger_core::time::Mono;
use tokio::sync::watch;

/// Answers to one target that differ by what they vary on, at most.
const MAX_VARIANTS: usize = 16;

/// How long nobody waits for an answer that turned out to be nobody else's.
const PASS: Duration = Duration::from_secs(10);

/// Targets that are remembered for that, at most.
const MAX_PASSES: usize = 4096;

/// What an entry costs beside its bytes.
const OVERHEAD: usize = 512;

/// An answer that is kept.
pub struct Stored {
    /// Its status.
    pub status: StatusCode,
    /// Its fields, as they came.
    pub fields: HeaderMap,
    /// Its body, whole.
    pub body: Bytes,
    /// How long it is good.
    pub kept: Kept,
    wanted: AtomicBool,
}

impl Stored {
    /// An answer that came whole.
    pub fn new(status: StatusCode, fields: HeaderMap, body: Bytes, kept: Kept) -> Self {
        Self {
            status,
            fields,
            body,
            kept,
            wanted: AtomicBool::new(false),
        }
    }

    fn bytes(&self) -> usize {
        let field = |(name, value): (&http::HeaderName, &http::HeaderValue)| {
            name.as_str().len() + value.len() + 32
        };
        OVERHEAD + self.body.len() + self.fields.iter().map(field).sum::<usize>()
    }
}

/// How much may be kept.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Answers.
    pub entries: usize,
    /// Bytes of them.
    pub bytes: usize,
}

/// The answers of one service, by host and target.
#[derive(Default)]
pub struct Cache(Mutex<State>);

#[derive(Default)]
struct State {
    known: HashMap<Arc<str>, Vec<(u64, Arc<Stored>)>>,
    /// Every answer once, the one to look at next first; those that are gone are passed over.
    order: VecDeque<(Arc<str>, u64)>,
    entries: usize,
    bytes: usize,
    next: u64,
    flights: HashMap<Arc<str>, watch::Receiver<()>>,
    passes: HashMap<Arc<str>, Mono>,
}

/// Who fetches an answer.
pub enum Flight {
    /// This call; others wait until this is dropped.
    Lead(Lead),
    /// Another: ends when that one has the answer, or none.
    Wait(watch::Receiver<()>),
    /// Everybody: what is answered there is not kept.
    Alone,
}

/// The right to fetch an answer for all that wait.
pub struct Lead {
    cache: Arc<Cache>,
    key: Arc<str>,
    _ended: watch::Sender<()>,
}

impl Lead {
    /// The answer is nobody else's: for a while nobody waits for another like it.
    pub fn pass(&self, now: Mono) {
        let mut state = self.cache.lock();
        if state.passes.len() >= MAX_PASSES {
            state.passes.retain(|_, until| *until > now);
        }
        if state.passes.len() < MAX_PASSES {
            state.passes.insert(Arc::clone(&self.key), now + PASS);
        }
    }
}

impl Drop for Lead {
    fn drop(&mut self) {
        self.cache.lock().flights.remove(&self.key);
    }
}

impl Cache {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing that is done under this lock can leave it half changed.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The answer for `key` that is chosen by what `request` says.
    pub fn find(&self, key: &str, request: &HeaderMap) -> Option<Arc<Stored>> {
        let state = self.lock();
        let mut variants = state.known.get(key)?.iter().rev();
        let (_, found) = variants.find(|(_, stored)| stored.kept.is_selected(request))?;
        found.wanted.store(true, Relaxed);
        Some(Arc::clone(found))
    }

    /// Keeps an answer in place of the one that was chosen by the same. One that is larger than
    /// all that may be kept is not.
    pub fn insert(&self, key: &Arc<str>, stored: Stored, bounds: Bounds) {
        let bytes = stored.bytes();
        if bytes > bounds.bytes || bounds.entries == 0 {
            return;
        }
        let state = &mut *self.lock();
        let same = |known: &Stored| known.kept.vary == stored.kept.vary;
        state.remove_where(key, same);
        let crowded = state
            .known
            .get(key)
            .is_some_and(|v| v.len() >= MAX_VARIANTS);
        if crowded {
            let oldest = state.known[key].first().map(|(id, _)| *id);
            state.remove(key, |id, _| Some(id) == oldest);
        }
        let id = state.next;
        state.next += 1;
        state.entries += 1;
        state.bytes += bytes;
        state.order.push_back((Arc::clone(key), id));
        let variants = state.known.entry(Arc::clone(key)).or_default();
        variants.push((id, Arc::new(stored)));
        while state.entries > bounds.entries || state.bytes > bounds.bytes {
            state.drop_one();
        }
        if state.order.len() > 2 * state.entries + 64 {
            state.tidy();
        }
    }

    /// Forgets the answers for `key`.
    pub fn invalidate(&self, key: &str) {
        self.lock().remove(key, |_, _| true);
    }

    /// Forgets the answers whose key holds; returns how many.
    pub fn purge(&self, holds: impl Fn(&str) -> bool) -> usize {
        let state = &mut *self.lock();
        let keys: Vec<Arc<str>> = state
            .known
            .keys()
            .filter(|key| holds(key))
            .cloned()
            .collect();
        let before = state.entries;
        for key in keys {
            state.remove(&key, |_, _| true);
        }
        before - state.entries
    }

    /// Answers and bytes that are kept.
    pub fn size(&self) -> (usize, usize) {
        let state = self.lock();
        (state.entries, state.bytes)
    }

    /// Who fetches the answer for `key`.
    pub fn flight(self: &Arc<Self>, key: &Arc<str>, now: Mono) -> Flight {
        let state = &mut *self.lock();
        if state.passes.get(key).is_some_and(|until| *until > now) {
            return Flight::Alone;
        }
        if let Some(waiting) = state.flights.get(key) {
            return Flight::Wait(waiting.clone());
        }
        let (ended, waiting) = watch::channel(());
        state.flights.insert(Arc::clone(key), waiting);
        Flight::Lead(Lead {
            cache: Arc::clone(self),
            key: Arc::clone(key),
            _ended: ended,
        })
    }
}

impl State {
    fn remove_where(&mut self, key: &str, gone: impl Fn(&Stored) -> bool) {
        self.remove(key, |_, stored| gone(stored));
    }

    fn remove(&mut self, key: &str, gone: impl Fn(u64, &Stored) -> bool) {
        let Some(variants) = self.known.get_mut(key) else {
            return;
        };
        let (mut entries, mut bytes) = (0, 0);
        variants.retain(|(id, stored)| {
            let gone = gone(*id, stored);
            if gone {
                entries += 1;
                bytes += stored.bytes();
            }
            !gone
        });
        if variants.is_empty() {
            self.known.remove(key);
        }
        self.entries -= entries;
        self.bytes -= bytes;
    }

    /// Lets the first go that nobody has asked for since it was last looked at.
    fn drop_one(&mut self) {
        while let Some((key, id)) = self.order.pop_front() {
            let variants = self.known.get(&key);
            let known = variants.and_then(|v| v.iter().find(|(known, _)| *known == id));
            let Some((_, stored)) = known else { continue };
            if stored.wanted.swap(false, Relaxed) {
                self.order.push_back((key, id));
            } else {
                return self.remove(&key, |known, _| known == id);
            }
        }
    }

    fn tidy(&mut self) {
        let known = &self.known;
        self.order.retain(|(key, id)| {
            let variants = known.get(key);
            variants.is_some_and(|v| v.iter().any(|(known, _)| known == id))
        });
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;
    use outrigger_core::time::UnixMillis;

    use super::*;

    const BOUNDS: Bounds = Bounds {
        entries: 4,
        bytes: 100_000,
    };

    fn answer(body: &str, vary: Option<&str>) -> Stored {
        let mut fields = HeaderMap::new();
        fields.insert("cache-control", HeaderValue::from_static("max-age=60"));
        let mut request = HeaderMap::new();
        if let Some(language) = vary {
            fields.insert("vary", HeaderValue::from_static("accept-language"));
            request.insert("accept-language", language.parse().unwrap());
        }
        let now = UnixMillis(1_767_225_600_000);
        let kept = Kept::judge(&request, StatusCode::OK, &fields, now).unwrap();
        Stored::new(StatusCode::OK, fields, Bytes::from(body.to_owned()), kept)
    }

    fn has(cache: &Cache, key: &str) -> bool {
        cache.find(key, &HeaderMap::new()).is_some()
    }

    #[test]
    fn what_nobody_asks_for_goes_first_and_the_bounds_hold() {
        let cache = Cache::default();
        for key in ["a", "b", "c", "d"] {
            cache.insert(&Arc::from(key), answer(key, None), BOUNDS);
        }
        assert!(has(&cache, "a"));
        cache.insert(&Arc::from("e"), answer("e", None), BOUNDS);
        let state = cache.lock();
        let mut keys: Vec<&str> = state.known.keys().map(|key| &**key).collect();
        keys.sort_unstable();
        assert_eq!(keys, ["a", "c", "d", "e"]);
        drop(state);
        let large = "x".repeat(60_000);
        cache.insert(&Arc::from("f"), answer(&large, None), BOUNDS);
        cache.insert(&Arc::from("g"), answer(&large, None), BOUNDS);
        let (entries, bytes) = cache.size();
        assert!(entries <= 4 && bytes <= BOUNDS.bytes, "{entries} {bytes}");
        assert!(has(&cache, "g") && !has(&cache, "f"));
        cache.insert(&Arc::from("h"), answer(&"x".repeat(200_000), None), BOUNDS);
        assert!(!has(&cache, "h"));
    }

    #[test]
    fn a_key_replaced_for_ever_leaves_nothing_behind() {
        let cache = Cache::default();
        let key: Arc<str> = Arc::from("a");
        for _ in 0..10_000 {
            cache.insert(&key, answer("a", None), BOUNDS);
        }
        assert_eq!(cache.size().0, 1);
        assert!(cache.lock().order.len() < 100);
        assert_eq!(cache.purge(|key| key == "a"), 1);
        assert_eq!(cache.size(), (0, 0));
    }

    #[test]
    fn variants_stand_beside_each_other_up_to_their_bound() {
        let cache = Cache::default();
        let key: Arc<str> = Arc::from("a");
        let bounds = Bounds {
            entries: 1_000,
            ..BOUNDS
        };
        for n in 0..100 {
            cache.insert(&key, answer("a", Some(&format!("l{n}"))), bounds);
        }
        assert_eq!(cache.size().0, MAX_VARIANTS);
        let mut request = HeaderMap::new();
        request.insert("accept-language", "l99".parse().unwrap());
        assert!(cache.find("a", &request).is_some());
        request.insert("accept-language", "l0".parse().unwrap());
        assert!(cache.find("a", &request).is_none());
    }

    #[tokio::test]
    async fn one_fetches_and_the_others_wait_for_its_end() {
        let cache = Arc::new(Cache::default());
        let key: Arc<str> = Arc::from("a");
        let now = Mono::from_nanos(1);
        let Flight::Lead(lead) = cache.flight(&key, now) else {
            panic!("nobody was first");
        };
        let Flight::Wait(mut waiting) = cache.flight(&key, now) else {
            panic!("two were first");
        };
        drop(lead);
        assert!(waiting.changed().await.is_err());
        let Flight::Lead(lead) = cache.flight(&key, now) else {
            panic!("nobody followed");
        };
        lead.pass(now);
        drop(lead);
        assert!(matches!(cache.flight(&key, now), Flight::Alone));
        assert!(matches!(cache.flight(&key, now + PASS), Flight::Lead(_)));
    }
}
