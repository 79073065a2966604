//! Port numbers and ranges as the rules and the command line write them.

use std::fmt;
use std::str::FromStr;

/// One port or a range, both ends included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct PortRange {
    first: u16,
    last: u16,
}

impl PortRange {
    /// A single port.
    pub const fn one(port: u16) -> Self {
        Self {
            first: port,
            last: port,
        }
    }

    /// How many entries of an iptables `multiport` match it takes: a range takes two.
    fn entries(self) -> usize {
        if self.first == self.last { 1 } else { 2 }
    }

    /// The port, or both ends with `separator` between them.
    pub(super) fn written(self, separator: char) -> String {
        let Self { first, last } = self;
        if first == last {
            return first.to_string();
        }
        format!("{first}{separator}{last}")
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.written('-'))
    }
}

impl FromStr for PortRange {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let port = |text: &str| match text.parse::<u16>() {
            Ok(0) => Err("port 0 does not exist".to_owned()),
            Ok(port) if text.bytes().all(|byte| byte.is_ascii_digit()) => Ok(port),
            _ => Err(format!(
                "`{text}` is not a port: write a number from 1 to 65535, or a range such as \
                 15020-15021"
            )),
        };
        let (first, last) = match text.split_once('-') {
            Some((first, last)) => (port(first)?, port(last)?),
            None => (port(text)?, port(text)?),
        };
        if first > last {
            return Err(format!("{text} runs backwards: write {last}-{first}"));
        }
        Ok(Self { first, last })
    }
}

/// A set of ports: sorted ranges that neither overlap nor touch.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Ports(Vec<PortRange>);

impl Ports {
    /// The entries of one iptables `multiport` match (`XT_MULTI_PORTS`).
    const MULTIPORT: usize = 15;

    /// The union of `ranges`.
    pub fn new(ranges: impl IntoIterator<Item = PortRange>) -> Self {
        let mut ranges: Vec<PortRange> = ranges.into_iter().collect();
        ranges.sort_unstable();
        let mut merged: Vec<PortRange> = Vec::with_capacity(ranges.len());
        for range in ranges {
            match merged.last_mut() {
                Some(before) if range.first <= before.last.saturating_add(1) => {
                    before.last = before.last.max(range.last);
                }
                _ => merged.push(range),
            }
        }
        Self(merged)
    }

    /// Whether there is no port.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The ranges in ascending order.
    pub fn ranges(&self) -> &[PortRange] {
        &self.0
    }

    /// Whether `port` is one of them.
    #[cfg(test)]
    pub(super) fn contain(&self, port: u16) -> bool {
        let holds = |range: &PortRange| (range.first..=range.last).contains(&port);
        self.0.iter().any(holds)
    }

    /// The same ports in pieces that each fit one `multiport` match.
    pub(super) fn multiport(&self) -> Vec<&[PortRange]> {
        let mut pieces = Vec::new();
        let (mut start, mut entries) = (0, 0);
        for (at, range) in self.0.iter().enumerate() {
            if entries + range.entries() > Self::MULTIPORT {
                pieces.push(&self.0[start..at]);
                (start, entries) = (at, 0);
            }
            entries += range.entries();
        }
        if start < self.0.len() {
            pieces.push(&self.0[start..]);
        }
        pieces
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ports(text: &str) -> Ports {
        Ports::new(text.split(',').map(|part| part.parse().expect(part)))
    }

    fn refused(text: &str) -> String {
        text.parse::<PortRange>().expect_err(text)
    }

    #[test]
    fn a_wrong_port_says_what_to_write() {
        assert_eq!(refused("0"), "port 0 does not exist");
        assert_eq!(refused("0-3"), "port 0 does not exist");
        assert_eq!(refused("9-3"), "9-3 runs backwards: write 3-9");
        for (text, wrong) in [
            ("http", "http"),
            ("65536", "65536"),
            ("+80", "+80"),
            ("", ""),
            ("1-", ""),
            ("1-2-3", "2-3"),
        ] {
            let expected = format!("`{wrong}` is not a port: write a number from 1 to 65535");
            assert!(refused(text).starts_with(&expected), "{}", refused(text));
        }
    }

    #[test]
    fn overlapping_and_touching_ranges_become_one() {
        let written = |text: &str| -> Vec<String> {
            ports(text)
                .ranges()
                .iter()
                .map(ToString::to_string)
                .collect()
        };
        assert_eq!(written("22"), ["22"]);
        assert_eq!(written("15021,22,15020"), ["22", "15020-15021"]);
        assert_eq!(written("10-20,15,18-30,32"), ["10-30", "32"]);
        assert_eq!(written("65535,1-65535"), ["1-65535"]);
    }

    #[test]
    fn a_multiport_piece_has_fifteen_entries_and_a_range_takes_two() {
        let sizes = |text: &str| -> Vec<usize> {
            let ports = ports(text);
            let pieces = ports.multiport();
            let joined: Vec<PortRange> = pieces.concat();
            assert_eq!(joined, ports.ranges(), "nothing is lost");
            pieces.iter().map(|piece| piece.len()).collect()
        };
        let singles = |count: u16| -> String {
            let all: Vec<String> = (1..=count).map(|n| (n * 2).to_string()).collect();
            all.join(",")
        };
        assert_eq!(sizes(&singles(15)), [15]);
        assert_eq!(sizes(&singles(16)), [15, 1]);
        assert_eq!(sizes(&format!("{},1000-1009", singles(14))), [14, 1]);
        assert_eq!(sizes(&format!("{},1000-1009", singles(13))), [14]);
        assert!(Ports::default().multiport().is_empty());
    }
}
