//! Message ids: 48 bits of wall-clock milliseconds, then 80 random bits, as a ULID.
//!
//! Owns the id's layout and its text. An id is hard to guess but is not a capability: readers are
//! authorised by identity.

use std::fmt;
use std::str::FromStr;

use outrigger_core::time::UnixMillis;

/// Crockford's base 32: no I, L, O or U, so that an id survives being read aloud.
const ALPHABET: &[u8; 32] = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ";
/// Characters of an id's text: 128 bits at 5 bits each, rounded up.
const TEXT_LEN: usize = 26;

/// The id of a message; sorts by the millisecond of its creation, in bytes and as text.
///
/// Layout and text follow the ULID specification; within one millisecond ids are in random order,
/// the enqueue order is the store's own.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MessageId([u8; 16]);

impl MessageId {
    /// Makes a new id from the wall clock and 80 random bits.
    #[must_use]
    pub fn new(now: UnixMillis, rng: &mut fastrand::Rng) -> Self {
        let mut bytes = [0; 16];
        bytes[..6].copy_from_slice(&now.0.to_be_bytes()[2..]);
        rng.fill(&mut bytes[6..]);
        Self(bytes)
    }

    /// The 16 bytes, most significant first.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }

    /// The id with these 16 bytes, most significant first.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// The id of the `n`th message that belongs to this one, such as a copy for another target.
    /// From its id alone, so that the one leads to the other without a row that says so.
    #[must_use]
    pub const fn nth(self, n: u16) -> Self {
        let bits = u128::from_be_bytes(self.0);
        // Of 64 random bits, so that it meets no other id of its millisecond.
        let low = (bits as u64).wrapping_add(n as u64);
        Self((bits >> 64 << 64 | low as u128).to_be_bytes())
    }

    /// The id of the message that follows this one when it ends: see
    /// [`HELD`](crate::message::HELD). `replays` is how often this one was replayed before, since
    /// it may end again after each. Meets the [`nth`](Self::nth) of no message.
    #[must_use]
    pub const fn follower(self, replays: u32) -> Self {
        const FOLLOWER: u64 = 1 << 63;
        let bits = u128::from_be_bytes(self.0);
        let low = (bits as u64).wrapping_add(FOLLOWER | (replays as u64) << 16);
        Self((bits >> 64 << 64 | low as u128).to_be_bytes())
    }

    /// The millisecond in which the id was made.
    #[must_use]
    pub fn created_at(&self) -> UnixMillis {
        let mut ms = [0; 8];
        ms[2..].copy_from_slice(&self.0[..6]);
        UnixMillis(u64::from_be_bytes(ms))
    }
}

impl fmt::Display for MessageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bits = u128::from_be_bytes(self.0);
        let mut text = [0; TEXT_LEN];
        for (i, c) in text.iter_mut().enumerate() {
            let shift = 5 * (TEXT_LEN - 1 - i);
            *c = ALPHABET[(bits >> shift) as usize & 31];
        }
        f.pad(std::str::from_utf8(&text).expect("the alphabet is ASCII"))
    }
}

impl fmt::Debug for MessageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The text is not a message id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("parse a message id: want 26 characters of Crockford's base 32")]
pub struct ParseIdError;

impl FromStr for MessageId {
    type Err = ParseIdError;

    /// Reads an id, upper or lower case.
    ///
    /// # Errors
    /// [`ParseIdError`] for another length, another alphabet, or more than 128 bits.
    fn from_str(text: &str) -> Result<Self, ParseIdError> {
        if text.len() != TEXT_LEN {
            return Err(ParseIdError);
        }
        let mut bits: u128 = 0;
        for (i, c) in text.bytes().enumerate() {
            let upper = c.to_ascii_uppercase();
            let digit = ALPHABET
                .iter()
                .position(|a| *a == upper)
                .ok_or(ParseIdError)?;
            if i == 0 && digit > 7 {
                return Err(ParseIdError);
            }
            bits = bits << 5 | digit as u128;
        }
        Ok(Self(bits.to_be_bytes()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_round_trips_and_sorts_like_the_bytes() {
        let mut rng = fastrand::Rng::with_seed(7);
        let mut last = None;
        for ms in [0, 1, 1_700_000_000_000, (1 << 48) - 1] {
            let id = MessageId::new(UnixMillis(ms), &mut rng);
            let text = id.to_string();
            assert_eq!(text.len(), 26);
            assert_eq!(text.parse(), Ok(id));
            assert_eq!(text.to_lowercase().parse(), Ok(id));
            assert_eq!(id.created_at(), UnixMillis(ms));
            assert!(last.is_none_or(|l| l < text), "{text}");
            last = Some(text);
        }
    }

    #[test]
    fn what_belongs_to_an_id_is_of_its_millisecond() {
        let id = MessageId::from_bytes([0xff; 16]);
        assert_eq!(id.nth(0), id);
        assert_ne!(id.nth(1), id.nth(2));
        for n in [1, 2, u16::MAX] {
            assert_eq!(id.nth(n).as_bytes()[..8], id.as_bytes()[..8], "{n}");
        }
    }

    #[test]
    fn a_follower_is_no_copy_and_no_other_follower() {
        let id = MessageId::from_bytes([0xff; 16]);
        let of = |n, replays| id.nth(n).follower(replays);
        let mut all: Vec<_> = (0..3).map(|n| id.nth(n)).collect();
        for n in [0, 1, 2, u16::MAX] {
            all.extend([0, 1, 2, u32::MAX].map(|replays| of(n, replays)));
        }
        let count = all.len();
        all.sort();
        all.dedup();
        assert_eq!(all.len(), count);
        assert_eq!(of(1, 1).as_bytes()[..8], id.as_bytes()[..8]);
    }

    #[test]
    fn text_that_is_no_id_is_refused() {
        for text in [
            "",
            "01J9",
            "01J9ZZZZZZZZZZZZZZZZZZZZZU",
            "80000000000000000000000000",
            "0000000000000000000000000é",
            "000000000000000000000000000",
        ] {
            assert_eq!(text.parse::<MessageId>(), Err(ParseIdError), "{text}");
        }
    }
}
