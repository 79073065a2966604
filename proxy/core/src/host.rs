//! Host names: reading them from requests, and finding what serves them.
//!
//! Owns normalisation and the table of exact names and wildcards. Rules within a host are
//! [`crate::route`]'s. The table is built on the config update's life and asked on the request's.

use std::borrow::Cow;
use std::collections::HashMap;
use std::net::Ipv6Addr;

use foldhash::fast::RandomState;

/// DNS allows 253 characters.
const LONGEST: usize = 253;

/// The host of an authority in its one normal form: lower case, without port and trailing dot; an
/// IPv6 literal keeps its brackets. `None` when it is no host.
///
/// Borrows when there is nothing to lower.
pub fn normalize_host(authority: &str) -> Option<Cow<'_, str>> {
    parse_authority(authority).map(|(host, _)| host)
}

/// Like [`normalize_host`], with the port. An empty port (`orders:`) counts as none (RFC 3986
/// §3.2.3). User information (`user@`) is refused.
pub fn parse_authority(authority: &str) -> Option<(Cow<'_, str>, Option<u16>)> {
    let (host, port) = split_port(authority)?;
    if let Some(literal) = host.strip_prefix('[') {
        let address: Ipv6Addr = literal.strip_suffix(']')?.parse().ok()?;
        let normal = format!("[{address}]");
        let host = if normal == host {
            Cow::Borrowed(host)
        } else {
            Cow::Owned(normal)
        };
        return Some((host, port));
    }
    let host = host.strip_suffix('.').unwrap_or(host);
    // Labels of at least one character: no dot follows another, or the beginning, or ends it.
    let (mut previous, mut upper) = (b'.', false);
    for byte in host.bytes() {
        match byte {
            b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' => {}
            b'A'..=b'Z' => upper = true,
            b'.' if previous != b'.' => {}
            _ => return None,
        }
        previous = byte;
    }
    if previous == b'.' || host.len() > LONGEST {
        return None;
    }
    let host = match upper {
        true => Cow::Owned(host.to_ascii_lowercase()),
        false => Cow::Borrowed(host),
    };
    Some((host, port))
}

fn split_port(authority: &str) -> Option<(&str, Option<u16>)> {
    let host_end = match authority.starts_with('[') {
        true => authority.find(']')? + 1,
        false => authority.find(':').unwrap_or(authority.len()),
    };
    let (host, rest) = authority.split_at(host_end);
    let port = match rest {
        "" | ":" => None,
        _ => {
            let digits = rest.strip_prefix(':')?;
            if !digits.bytes().all(|b| b.is_ascii_digit()) {
                return None;
            }
            Some(digits.parse().ok()?)
        }
    };
    Some((host, port))
}

/// A host pattern that the table cannot hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadHost;

impl std::fmt::Display for BadHost {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a host is a DNS name, an address, \"*.\" before a name, or \"*\"")
    }
}

impl std::error::Error for BadHost {}

/// What serves which host: exact names, `*.suffix` wildcards, and `*` for all.
///
/// An exact name wins over wildcards, a longer suffix over a shorter, and under one name an entry
/// with the request's port over one without. `*.example.org` matches `a.b.example.org` and not
/// `example.org` (Gateway API, Hostname).
#[derive(Clone, Debug)]
pub struct HostTable<T> {
    exact: HashMap<Box<str>, Ports<T>, RandomState>,
    /// By the suffix after `*.`; the empty suffix is `*`.
    wildcards: HashMap<Box<str>, Ports<T>, RandomState>,
}

#[derive(Clone, Debug)]
struct Ports<T> {
    any: Option<T>,
    by_port: Vec<(u16, T)>,
}

impl<T> Default for HostTable<T> {
    fn default() -> Self {
        HostTable {
            exact: HashMap::default(),
            wildcards: HashMap::default(),
        }
    }
}

impl<T> HostTable<T> {
    /// A table without hosts.
    pub fn new() -> Self {
        Self::default()
    }

    /// Enters a host, for one port or for every port; returns what stood there before.
    ///
    /// # Errors
    /// [`BadHost`] when the pattern is none.
    pub fn insert(
        &mut self,
        pattern: &str,
        port: Option<u16>,
        value: T,
    ) -> Result<Option<T>, BadHost> {
        let ports = if pattern == "*" {
            self.wildcards.entry("".into()).or_default()
        } else if let Some(suffix) = pattern.strip_prefix("*.") {
            let (suffix, None) = parse_authority(suffix).ok_or(BadHost)? else {
                return Err(BadHost);
            };
            self.wildcards.entry(suffix.into()).or_default()
        } else {
            let (host, None) = parse_authority(pattern).ok_or(BadHost)? else {
                return Err(BadHost);
            };
            self.exact.entry(host.into()).or_default()
        };
        Ok(ports.insert(port, value))
    }

    /// What serves a host in normal form ([`normalize_host`]), asked for on this port.
    ///
    /// Without a port only entries for every port are found; pass the scheme's default.
    pub fn get(&self, host: &str, port: Option<u16>) -> Option<&T> {
        if let Some(found) = self.exact.get(host).and_then(|ports| ports.get(port)) {
            return Some(found);
        }
        if self.wildcards.is_empty() {
            return None;
        }
        let mut rest = host;
        while let Some((_, suffix)) = rest.split_once('.') {
            if let Some(found) = self.wildcards.get(suffix).and_then(|ports| ports.get(port)) {
                return Some(found);
            }
            rest = suffix;
        }
        self.wildcards.get("").and_then(|ports| ports.get(port))
    }

    /// Every value, in no order.
    pub fn values(&self) -> impl Iterator<Item = &T> {
        let ports = self.exact.values().chain(self.wildcards.values());
        ports.flat_map(|ports| {
            ports
                .any
                .iter()
                .chain(ports.by_port.iter().map(|(_, value)| value))
        })
    }
}

impl<T> Default for Ports<T> {
    fn default() -> Self {
        Ports {
            any: None,
            by_port: Vec::new(),
        }
    }
}

impl<T> Ports<T> {
    fn insert(&mut self, port: Option<u16>, value: T) -> Option<T> {
        let Some(port) = port else {
            return self.any.replace(value);
        };
        if let Some((_, old)) = self.by_port.iter_mut().find(|(known, _)| *known == port) {
            return Some(std::mem::replace(old, value));
        }
        self.by_port.push((port, value));
        None
    }

    fn get(&self, port: Option<u16>) -> Option<&T> {
        let for_port = |port| self.by_port.iter().find(|(known, _)| *known == port);
        port.and_then(for_port)
            .map(|(_, value)| value)
            .or(self.any.as_ref())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn authorities_have_one_normal_form() {
        let check = |text: &str, expected: Option<(&str, Option<u16>)>| {
            let read = parse_authority(text);
            assert_eq!(
                read.as_ref().map(|(h, p)| (h.as_ref(), *p)),
                expected,
                "{text:?}"
            );
        };
        check("orders", Some(("orders", None)));
        check("Orders.Shop:80", Some(("orders.shop", Some(80))));
        check("orders.", Some(("orders", None)));
        check("orders.:8080", Some(("orders", Some(8080))));
        check("orders:", Some(("orders", None)));
        check("10.0.0.1:80", Some(("10.0.0.1", Some(80))));
        check("[::1]:80", Some(("[::1]", Some(80))));
        check("[0:0::1]", Some(("[::1]", None)));
        check("my_service", Some(("my_service", None)));
        check("", None);
        check(".", None);
        check("a..b", None);
        check(".a", None);
        check("a b", None);
        check("a/b", None);
        check("user@orders", None);
        check("orders:99999", None);
        check("orders:+80", None);
        check("orders:80:80", None);
        check("::1", None);
        check("[::1", None);
        check("[::1]x", None);
        check("bücher", None);
        check(&"a".repeat(254), None);
    }

    #[test]
    fn nothing_is_allocated_for_a_normal_host() {
        assert!(matches!(
            normalize_host("orders.shop.svc:80"),
            Some(Cow::Borrowed(_))
        ));
    }

    fn table(entries: &[(&'static str, Option<u16>)]) -> HostTable<String> {
        let mut table = HostTable::new();
        for (host, port) in entries {
            let name = format!(
                "{host}{}",
                port.map(|p| format!(":{p}")).unwrap_or_default()
            );
            table.insert(host, *port, name).unwrap();
        }
        table
    }

    #[test]
    fn the_most_specific_entry_wins() {
        let table = table(&[
            ("orders.shop", None),
            ("orders.shop", Some(8080)),
            ("*.shop", None),
            ("*.eu.shop", None),
            ("*.eu.shop", Some(443)),
            ("*.us.shop", Some(443)),
        ]);
        let check = |host, port, expected: Option<&str>| {
            assert_eq!(
                table.get(host, port).map(String::as_str),
                expected,
                "{host} {port:?}"
            );
        };
        check("orders.shop", None, Some("orders.shop"));
        check("orders.shop", Some(80), Some("orders.shop"));
        check("orders.shop", Some(8080), Some("orders.shop:8080"));
        check("mail.shop", None, Some("*.shop"));
        check("a.eu.shop", Some(80), Some("*.eu.shop"));
        check("a.b.eu.shop", Some(443), Some("*.eu.shop:443"));
        check("a.us.shop", Some(80), Some("*.shop"));
        check("eu.shop", None, Some("*.shop"));
        check("shop", None, None);
        check("elsewhere", None, None);
    }

    #[test]
    fn a_star_takes_everything_else_and_bad_patterns_are_refused() {
        let mut table = table(&[("*", None)]);
        assert_eq!(
            table.get("anything", Some(1)).map(String::as_str),
            Some("*")
        );
        for bad in ["", "*.", "a:80", "*.a:80", "a.*", "*a", "a b"] {
            assert_eq!(
                table.insert(bad, None, String::new()),
                Err(BadHost),
                "{bad:?}"
            );
        }
        assert_eq!(table.insert("*", None, "new".into()), Ok(Some("*".into())));
        assert_eq!(table.values().count(), 1);
    }

    proptest! {
        #[test]
        fn normalising_twice_changes_nothing(text in "[a-zA-Z0-9.:_\\[\\]-]{0,20}") {
            if let Some(once) = normalize_host(&text) {
                let twice = normalize_host(&once);
                prop_assert_eq!(twice.as_deref(), Some(once.as_ref()));
            }
        }
    }
}
