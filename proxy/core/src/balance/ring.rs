//! Consistent hashing: the same key to the same endpoint, whichever sidecar asks.
//!
//! A ring (Karger 1997) and not Maglev: when an endpoint leaves, the keys of no other move, and
//! what is unhealthy is passed over by walking on, without another table. Maglev moves a few keys
//! more and needs 65,537 slots per service however few endpoints there are. On the request's life.

use std::net::SocketAddr;

/// Points of the heaviest endpoint. With 160 (libketama's) the shares of equal endpoints stay
/// within some 10 % of each other.
const POINTS: usize = 160;

/// The most points of a ring; more endpoints have fewer points each. 2^18 are 4 MiB.
const MOST_POINTS: usize = 1 << 18;

/// The points of a set's endpoints, in the order of their hashes.
#[derive(Debug, Default)]
pub struct Ring(Box<[(u64, u32)]>);

impl Ring {
    /// The ring of endpoints with these addresses and weights. Weight 0 has no point.
    ///
    /// The points of an endpoint depend on its address, on its weight beside the heaviest and,
    /// above 1,600 endpoints, on their number.
    pub fn new(members: impl Iterator<Item = (SocketAddr, u32)> + Clone) -> Self {
        let heaviest = members.clone().map(|(_, weight)| weight).max().unwrap_or(0);
        let count = members.clone().count();
        let mut most = POINTS;
        while most > 1 && most * count > MOST_POINTS {
            most /= 2;
        }
        let mut points = Vec::with_capacity((most * count).min(MOST_POINTS));
        for (index, (addr, weight)) in members.enumerate() {
            let Ok(index) = u32::try_from(index) else {
                break;
            };
            let own = (most as u64 * u64::from(weight)).div_ceil(u64::from(heaviest.max(1)));
            let seed = hash(addr.to_string().as_bytes());
            points.extend((1..=own).map(|n| (mix(seed.wrapping_add(n.wrapping_mul(STEP))), index)));
        }
        points.sort_unstable();
        Self(points.into())
    }

    /// The endpoint of `key`: the first one from its place on that fits.
    pub(super) fn find(&self, key: u64, fits: impl Fn(usize) -> bool) -> Option<usize> {
        let start = self.0.partition_point(|(hash, _)| *hash < key);
        let (before, after) = self.0.split_at(start);
        let from_here = after.iter().chain(before);
        let mut passed = None;
        for (_, index) in from_here {
            // Neighbouring points are often the same endpoint's; ask it once.
            if passed == Some(*index) {
                continue;
            }
            if fits(*index as usize) {
                return Some(*index as usize);
            }
            passed = Some(*index);
        }
        None
    }
}

/// The step of splitmix64 (Steele 2014).
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

/// The hash of a key: FNV-1a, finished by splitmix64. The same in every version and on every
/// machine, so that all sidecars agree.
pub fn hash(key: &[u8]) -> u64 {
    let fnv = key.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    mix(fnv)
}

fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn addr(n: u16) -> SocketAddr {
        ([10, 0, (n >> 8) as u8, n as u8], 80).into()
    }

    fn ring(members: &[(u16, u32)]) -> Ring {
        Ring::new(members.iter().map(|(n, weight)| (addr(*n), *weight)))
    }

    fn owner(ring: &Ring, members: &[(u16, u32)], key: u64) -> u16 {
        members[ring.find(key, |_| true).unwrap()].0
    }

    proptest! {
        #[test]
        fn a_member_that_leaves_moves_its_own_keys_and_no_other(
            mut numbers in prop::collection::btree_set(0_u16..2_000, 2..40),
            leaves in 0_usize..40,
            keys in prop::collection::vec(any::<u64>(), 200),
        ) {
            let before: Vec<(u16, u32)> = numbers.iter().map(|n| (*n, 100)).collect();
            let gone = before[leaves % before.len()].0;
            numbers.remove(&gone);
            let after: Vec<(u16, u32)> = numbers.iter().map(|n| (*n, 100)).collect();
            let (old, new) = (ring(&before), ring(&after));
            for key in keys {
                let (was, is) = (owner(&old, &before, key), owner(&new, &after, key));
                prop_assert!(was == is || was == gone, "{key}: {was} → {is}, {gone} left");
            }
        }

        #[test]
        fn a_member_that_is_out_moves_its_own_keys_and_no_other(
            count in 2_u16..40,
            out in 0_u16..40,
            keys in prop::collection::vec(any::<u64>(), 200),
        ) {
            let members: Vec<(u16, u32)> = (0..count).map(|n| (n, 100)).collect();
            let (ring, out) = (ring(&members), usize::from(out % count));
            for key in keys {
                let was = ring.find(key, |_| true);
                let is = ring.find(key, |index| index != out);
                prop_assert!(was == is || was == Some(out));
                prop_assert_ne!(is, Some(out));
            }
        }
    }

    #[test]
    fn equal_members_share_about_evenly_and_others_by_weight() {
        let shares = |members: &[(u16, u32)]| {
            let ring = ring(members);
            let mut shares = vec![0_u32; members.len()];
            for n in 0..100_000_u32 {
                let key = hash(&n.to_be_bytes());
                shares[ring.find(key, |_| true).unwrap()] += 1;
            }
            shares
        };
        let even: Vec<(u16, u32)> = (0..10).map(|n| (n, 100)).collect();
        for share in shares(&even) {
            assert!((7_000..13_000).contains(&share), "{share}");
        }
        let light = shares(&[(1, 300), (2, 100), (3, 0)]);
        assert!((20_000..30_000).contains(&light[1]), "{light:?}");
        assert_eq!(light[2], 0);
    }

    #[test]
    fn keys_stay_where_they_are_from_version_to_version() {
        // Sidecars of two versions run side by side during an upgrade.
        assert_eq!(hash(b""), 0xf52a_15e9_a9b5_e89b);
        let members: Vec<(u16, u32)> = (0..5).map(|n| (n, 100)).collect();
        let ring = ring(&members);
        let owners: Vec<usize> = ["a", "b", "c", "d", "e", "f"]
            .iter()
            .map(|key| ring.find(hash(key.as_bytes()), |_| true).unwrap())
            .collect();
        assert_eq!(owners, [2, 0, 3, 3, 4, 1]);
    }

    #[test]
    fn thousands_of_members_make_a_bounded_ring() {
        let members: Vec<(u16, u32)> = (0..5_000).map(|n| (n, 100)).collect();
        assert!(ring(&members).0.len() <= MOST_POINTS);
        assert_eq!(ring(&[]).find(1, |_| true), None);
    }
}
