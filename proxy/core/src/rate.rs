//! Rates with a burst, one for a whole route or one for each key.
//!
//! Owns the state, which all workers share and a reload keeps; the parameters come with each call.
//! Keys are kept as hashes under a secret seed, so that a caller can neither read them out of
//! memory nor make two of them meet. What a key is, is the caller's. On the request's life.

use std::collections::HashMap;
use std::hash::{BuildHasher as _, BuildHasherDefault, Hasher, RandomState};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

pub use crate::limit::Room;
use crate::limit::{Rate, RateParams};
use crate::time::Mono;

/// So many tables, each with a lock of its own: workers rarely wait for each other.
const SHARDS: usize = 16;

/// A full table looks for keys that have rested at most this often.
const SWEEP: Duration = Duration::from_millis(250);

/// The rates of one route.
#[derive(Debug, Default)]
pub struct Rates {
    whole: Rate,
    keyed: OnceLock<Box<Keyed>>,
}

impl Rates {
    /// Takes one request out of the bucket of the route.
    ///
    /// # Errors
    /// How long until one fits, when none does.
    pub fn take(&self, params: &RateParams, now: Mono) -> Result<Room, Duration> {
        self.whole.try_take(params, now)?;
        Ok(self.whole.room(params, now))
    }

    /// Takes one request out of the bucket of `key`.
    ///
    /// At most `max_keys` have a bucket of their own. When there are more that have not rested,
    /// those that come on top share one, so that made-up keys cost neither memory nor the limit.
    ///
    /// # Errors
    /// How long until one fits, when none does.
    pub fn take_for(
        &self,
        key: &[u8],
        max_keys: usize,
        params: &RateParams,
        now: Mono,
    ) -> Result<Room, Duration> {
        let keyed = self.keyed.get_or_init(Box::default);
        let hash = keyed.seed.hash_one(key);
        let shard = &keyed.shards[(hash >> 32) as usize % SHARDS];
        let mut shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
        let rate = shard.find(hash, max_keys.div_ceil(SHARDS), now);
        let rate = rate.unwrap_or(&self.whole);
        rate.try_take(params, now)?;
        Ok(rate.room(params, now))
    }

    /// How many keys have a bucket of their own.
    pub fn keys(&self) -> usize {
        let shards = self.keyed.get().map(|keyed| &keyed.shards);
        let len = |shard: &Mutex<Shard>| {
            let shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
            shard.known.len()
        };
        shards.into_iter().flatten().map(len).sum()
    }
}

#[derive(Debug, Default)]
struct Keyed {
    seed: RandomState,
    shards: [Mutex<Shard>; SHARDS],
}

#[derive(Debug, Default)]
struct Shard {
    known: HashMap<u64, Rate, BuildHasherDefault<Hashed>>,
    swept: Mono,
}

impl Shard {
    /// The bucket of a key; none when there is no room for another.
    fn find(&mut self, key: u64, max: usize, now: Mono) -> Option<&Rate> {
        if !self.known.contains_key(&key) && self.known.len() >= max {
            if now.saturating_since(self.swept) < SWEEP && self.swept > Mono::ZERO {
                return None;
            }
            self.swept = now;
            self.known.retain(|_, rate| !rate.is_full(now));
            if self.known.len() >= max {
                return None;
            }
        }
        Some(self.known.entry(key).or_default())
    }
}

/// A key that is a hash already.
#[derive(Default)]
struct Hashed(u64);

impl Hasher for Hashed {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(*byte);
        }
    }

    fn write_u64(&mut self, hash: u64) {
        self.0 = hash;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PARAMS: RateParams = RateParams {
        per_second: 10.0,
        burst: 3,
    };

    fn at(millis: u64) -> Mono {
        Mono::ZERO + Duration::from_millis(1_000 + millis)
    }

    #[test]
    fn what_is_left_is_told() {
        let rates = Rates::default();
        let room = |remaining, millis| Room {
            remaining,
            full_in: Duration::from_millis(millis),
        };
        assert_eq!(rates.take(&PARAMS, at(0)), Ok(room(2, 100)));
        assert_eq!(rates.take(&PARAMS, at(0)), Ok(room(1, 200)));
        assert_eq!(rates.take(&PARAMS, at(0)), Ok(room(0, 300)));
        assert_eq!(rates.take(&PARAMS, at(0)), Err(Duration::from_millis(100)));
        assert_eq!(rates.take(&PARAMS, at(100)), Ok(room(0, 300)));
    }

    #[test]
    fn keys_have_buckets_of_their_own() {
        let rates = Rates::default();
        let take = |key: &str, now| rates.take_for(key.as_bytes(), 100, &PARAMS, now).is_ok();
        for key in ["a", "b"] {
            let let_in = (0..10).filter(|_| take(key, at(0))).count();
            assert_eq!(let_in, 3, "{key}");
        }
        assert!(take("a", at(100)) && !take("a", at(100)));
        assert_eq!(rates.keys(), 2);
    }

    #[test]
    fn made_up_keys_cost_neither_memory_nor_the_limit() {
        let rates = Rates::default();
        let max = 64;
        let take = |key: u32, now| {
            let key = key.to_be_bytes();
            rates.take_for(&key, max, &PARAMS, now).is_ok()
        };
        let let_in = (0..10_000).filter(|key| take(*key, at(0))).count();
        // One for each key with a bucket, and one burst for all that came on top.
        assert_eq!(let_in, max + 3);
        assert_eq!(rates.keys(), max);
        // Those that have rested make room.
        assert!(take(1_000_000, at(5_000)));
        assert!(rates.keys() <= max);
    }

    #[test]
    fn threads_share_the_buckets() {
        let rates = Rates::default();
        let params = RateParams {
            per_second: 1.0,
            burst: 150,
        };
        let let_in: usize = std::thread::scope(|scope| {
            let one = || {
                let take = |_: &u32| rates.take_for(b"k", 8, &params, at(0)).is_ok();
                (0..100).filter(take).count()
            };
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(one)).collect();
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap())
                .sum()
        });
        assert_eq!(let_in, 150);
    }
}
