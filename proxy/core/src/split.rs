//! Which backend of a rule takes a request: by weight, at random or by a key.
//!
//! Owns the pick. What the key is, is the rule's. On the request's life.

/// The index of the backend that `point` falls on, a number below the sum of the weights; none
/// when it falls on none.
pub fn pick(weights: impl IntoIterator<Item = u32>, point: u32) -> Option<usize> {
    let mut at = point;
    weights.into_iter().position(|weight| {
        let here = at < weight;
        at = at.wrapping_sub(weight);
        here
    })
}

/// Where a key falls among weights that sum up to `total`: always the same place, in every sidecar
/// and every version. As the backends share the range in their order, a canary that stands last
/// and grows keeps the keys that it has.
pub fn point(key: &[u8], total: u32) -> u32 {
    // FNV-1a, and the finalizer of splitmix64, for keys that differ in their last letters.
    let mut hash = key.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    hash ^= hash >> 31;
    // The upper half, scaled: no modulo, so that weights in proportion keep their keys.
    let scaled = ((hash >> 32) * u64::from(total)) >> 32;
    u32::try_from(scaled).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn backend(user: u32, weights: [u32; 2]) -> usize {
        let key = format!("user-{user}");
        let total = weights.iter().sum();
        pick(weights, point(key.as_bytes(), total)).unwrap()
    }

    #[test]
    fn points_fall_on_the_backend_of_their_range() {
        for (point, expected) in [(0, Some(1)), (2, Some(1)), (3, Some(3)), (4, None)] {
            assert_eq!(pick([0, 3, 0, 1], point), expected, "{point}");
        }
    }

    #[test]
    fn keys_are_shared_out_by_weight() {
        let canary = (0..10_000)
            .filter(|user| backend(*user, [90, 10]) == 1)
            .count();
        assert!((900..1_100).contains(&canary), "{canary}");
    }

    #[test]
    fn a_growing_canary_keeps_its_keys() {
        for user in 0..1_000 {
            if backend(user, [90, 10]) == 1 {
                assert_eq!(backend(user, [80, 20]), 1, "{user}");
            }
            assert_eq!(backend(user, [90, 10]), backend(user, [9, 1]), "{user}");
        }
    }

    #[test]
    fn the_place_of_a_key_is_for_ever() {
        let places = ["", "a", "user-1"].map(|key| point(key.as_bytes(), 1_000_000));
        assert_eq!(places, PLACES);
    }

    /// With other values, callers would change sides when their sidecars are updated.
    const PLACES: [u32; 3] = [957_673, 10_753, 767_970];
}
