//! Sets of HTTP status codes, written as numbers and classes.
//!
//! Owns the set and the reading of one entry (`503`, `"5xx"`). On the config update's life when
//! it is built, on the request's and the message's when it is asked.

use std::fmt;

use http::StatusCode;

const FIRST: u16 = 100;
const LAST: u16 = 599;

/// A set of HTTP status codes from 100 to 599.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct CodeSet([u64; 8]);

/// A code entry is neither a number from 100 to 599 nor a class from `1xx` to `5xx`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadCode;

impl fmt::Display for BadCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a code is a number from 100 to 599 or a class such as \"5xx\"")
    }
}

impl std::error::Error for BadCode {}

impl CodeSet {
    /// The set without members.
    pub const EMPTY: CodeSet = CodeSet([0; 8]);

    /// A set of these codes; codes outside 100 to 599 are left out.
    pub const fn of(codes: &[u16]) -> CodeSet {
        let mut set = CodeSet::EMPTY;
        let mut i = 0;
        while i < codes.len() {
            set = set.with(codes[i]);
            i += 1;
        }
        set
    }

    /// All hundred codes of a class: `class(5)` is 500 to 599; empty outside 1 to 5.
    pub const fn class(class: u16) -> CodeSet {
        let mut set = CodeSet::EMPTY;
        let mut i = 0;
        while i < 100 {
            set = set.with(class.saturating_mul(100).saturating_add(i));
            i += 1;
        }
        set
    }

    /// The set with one more code.
    pub const fn with(mut self, code: u16) -> CodeSet {
        if code >= FIRST && code <= LAST {
            let bit = code - FIRST;
            self.0[(bit / 64) as usize] |= 1 << (bit % 64);
        }
        self
    }

    /// Adds one entry as the configuration writes it: a number or a class such as `5xx`.
    ///
    /// # Errors
    /// [`BadCode`] when the entry is neither; the set is then unchanged.
    pub fn insert_entry(&mut self, entry: &str) -> Result<(), BadCode> {
        let (digits, is_class) = match entry.strip_suffix("xx").or(entry.strip_suffix("XX")) {
            Some(class) => (class, true),
            None => (entry, false),
        };
        let digits_only = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
        let number: u16 = digits.parse().ok().filter(|_| digits_only).ok_or(BadCode)?;
        match (is_class, number) {
            (true, 1..=5) => *self = self.union(CodeSet::class(number)),
            (false, FIRST..=LAST) => *self = self.with(number),
            _ => return Err(BadCode),
        }
        Ok(())
    }

    /// Members of either set.
    pub fn union(self, other: CodeSet) -> CodeSet {
        CodeSet(std::array::from_fn(|i| self.0[i] | other.0[i]))
    }

    /// Members of this set that are not in `other` (the configuration's `except`).
    pub fn without(self, other: CodeSet) -> CodeSet {
        CodeSet(std::array::from_fn(|i| self.0[i] & !other.0[i]))
    }

    /// Whether the status is a member; never for one outside 100 to 599.
    pub fn contains(&self, status: StatusCode) -> bool {
        let code = status.as_u16();
        if !(FIRST..=LAST).contains(&code) {
            return false;
        }
        let bit = code - FIRST;
        self.0[usize::from(bit / 64)] & (1 << (bit % 64)) != 0
    }

    /// Whether nothing is a member.
    pub fn is_empty(&self) -> bool {
        *self == CodeSet::EMPTY
    }

    /// The members in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = u16> + '_ {
        (FIRST..=LAST).filter(|code| {
            let bit = code - FIRST;
            self.0[usize::from(bit / 64)] & (1 << (bit % 64)) != 0
        })
    }
}

impl fmt::Debug for CodeSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(entries: &[&str], expected: Result<&[u16], BadCode>) {
        let mut set = CodeSet::EMPTY;
        let read: Result<(), BadCode> =
            entries.iter().try_for_each(|entry| set.insert_entry(entry));
        let members: Vec<u16> = set.iter().collect();
        assert_eq!(read.map(|()| members.as_slice()), expected, "{entries:?}");
    }

    #[test]
    fn entries_are_numbers_or_classes() {
        check(&["503", "100", "599"], Ok(&[100, 503, 599]));
        check(&["600"], Err(BadCode));
        check(&["6xx"], Err(BadCode));
        check(&["xx"], Err(BadCode));
        check(&["+503"], Err(BadCode));
        check(&["5x"], Err(BadCode));
        check(&[""], Err(BadCode));
        check(&["99999999"], Err(BadCode));
    }

    #[test]
    fn a_class_holds_its_hundred_codes_and_except_takes_some_away() {
        let mut set = CodeSet::EMPTY;
        set.insert_entry("4xx").unwrap();
        assert_eq!(set.iter().count(), 100);
        let set = set.without(CodeSet::of(&[408, 425, 429]));
        assert_eq!(set.iter().count(), 97);
        assert!(!set.contains(StatusCode::TOO_MANY_REQUESTS));
        assert!(set.contains(StatusCode::NOT_FOUND));
        assert!(!set.contains(StatusCode::from_u16(999).unwrap()));
    }
}
