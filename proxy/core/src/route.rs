//! Which rule takes a request.
//!
//! Owns the rules of one host, compiled into Gateway API's order of precedence. Which host is
//! [`crate::host`]'s; what a rule then does is the snapshot's. Built on the config update's life,
//! asked on the request's.

mod matching;
mod precedence;
mod reason;

use std::borrow::Cow;

use http::{HeaderMap, Method};

pub use matching::{GrpcMatch, HeaderMatch, Match, PathMatch, Pattern, QueryMatch, ValueMatch};
pub use reason::{Considered, Reason, Verdict};

use precedence::Specificity;

/// What rules may look at.
#[derive(Clone, Copy, Debug)]
pub struct RequestView<'a> {
    /// Method.
    pub method: &'a Method,
    /// Host in normal form.
    pub host: &'a str,
    /// Path as sent, without the query; `*` for `OPTIONS *`, empty for CONNECT.
    pub path: &'a str,
    /// Query as sent, without the question mark.
    pub query: Option<&'a str>,
    /// Header fields.
    pub headers: &'a HeaderMap,
}

/// The rules of one host, ready to be asked.
#[derive(Clone, Debug, Default)]
pub struct RuleSet {
    /// Most specific first.
    entries: Vec<Entry>,
}

#[derive(Clone, Debug)]
struct Entry {
    specificity: Specificity,
    rule: usize,
    match_index: usize,
    on: Match,
}

impl RuleSet {
    /// Compiles rules. The outer index is the rule's number from here on; a rule takes a request
    /// when any of its matches does, and every request when it has none.
    pub fn new(rules: Vec<Vec<Match>>) -> Self {
        let mut entries = Vec::new();
        for (rule, matches) in rules.into_iter().enumerate() {
            let matches = if matches.is_empty() {
                vec![Match::default()]
            } else {
                matches
            };
            for (match_index, on) in matches.into_iter().enumerate() {
                let specificity = Specificity::of(&on);
                entries.push(Entry {
                    specificity,
                    rule,
                    match_index,
                    on,
                });
            }
        }
        // Stable: among equals the earlier rule, then its earlier match, stays in front.
        entries.sort_by_key(|entry| std::cmp::Reverse(entry.specificity));
        RuleSet { entries }
    }

    /// The rule that takes the request.
    ///
    /// Allocates only for a header that came in several fields and for an escaped query value.
    pub fn find(&self, request: &RequestView<'_>) -> Option<usize> {
        let taken = self
            .entries
            .iter()
            .find(|entry| entry.on.check(request).is_ok());
        taken.map(|entry| entry.rule)
    }

    /// Every match in the order it is tried, and what came of it.
    pub fn explain(&self, request: &RequestView<'_>) -> Vec<Considered> {
        let mut chosen = false;
        let consider = |entry: &Entry| {
            let verdict = match entry.on.check(request) {
                Err(missed) => Verdict::Missed(missed.describe(&entry.on, request)),
                Ok(()) if chosen => Verdict::LowerPrecedence,
                Ok(()) => {
                    chosen = true;
                    Verdict::Chosen
                }
            };
            Considered {
                rule: entry.rule,
                match_index: entry.match_index,
                verdict,
            }
        };
        self.entries.iter().map(consider).collect()
    }

    /// Whether there are no rules.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}

/// The value of a header as rules see it: several fields of one name are one list (RFC 9110 §5.3;
/// `Cookie` joins with a semicolon, RFC 9113 §8.2.3).
fn header_value<'a>(headers: &'a HeaderMap, name: &http::HeaderName) -> Option<Cow<'a, [u8]>> {
    let mut values = headers
        .get_all(name)
        .iter()
        .map(http::HeaderValue::as_bytes);
    let first = values.next()?;
    let Some(second) = values.next() else {
        return Some(Cow::Borrowed(first));
    };
    let separator: &[u8] = if *name == http::header::COOKIE {
        b"; "
    } else {
        b","
    };
    let mut joined = first.to_vec();
    for value in std::iter::once(second).chain(values) {
        joined.extend_from_slice(separator);
        joined.extend_from_slice(value);
    }
    Some(Cow::Owned(joined))
}

/// The first value of a query parameter, percent-decoded; empty for one without `=`.
fn query_value<'a>(query: Option<&'a str>, name: &str) -> Option<Cow<'a, [u8]>> {
    let pairs = query?
        .split('&')
        .map(|pair| pair.split_once('=').unwrap_or((pair, "")));
    let named = |(key, _): &(&str, &str)| percent_decoded(key).as_ref() == name.as_bytes();
    pairs
        .filter(|(key, _)| !key.is_empty())
        .find(named)
        .map(|(_, value)| percent_decoded(value))
}

/// Decodes `%XX`; anything else, a broken escape and `+` included, stays as it is (RFC 3986 §2.1).
fn percent_decoded(text: &str) -> Cow<'_, [u8]> {
    let bytes = text.as_bytes();
    if !bytes.contains(&b'%') {
        return Cow::Borrowed(bytes);
    }
    let hex = |b: u8| char::from(b).to_digit(16).map(|digit| digit as u8);
    let mut decoded = Vec::with_capacity(bytes.len());
    let mut rest = bytes;
    while let [first, tail @ ..] = rest {
        rest = tail;
        let escaped = match (first, tail) {
            (b'%', [high, low, ..]) => hex(*high).zip(hex(*low)),
            _ => None,
        };
        match escaped {
            Some((high, low)) => {
                decoded.push(high << 4 | low);
                rest = &tail[2..];
            }
            None => decoded.push(*first),
        }
    }
    Cow::Owned(decoded)
}

#[cfg(test)]
mod tests;
