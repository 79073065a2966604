//! `Prefer` (RFC 7240).
//!
//! Owns its reading, as far as we act on it.

use std::time::Duration;

use http::{HeaderMap, HeaderValue};

use super::PREFER;

/// What the caller would like.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Prefer {
    /// `respond-async`: a receipt will do.
    pub respond_async: bool,
    /// `wait=n`: but up to so many seconds for the result.
    pub wait: Option<Duration>,
}

/// Reads all `Prefer` fields. Of a preference that is given twice the first counts; what is not
/// understood is ignored, as the RFC wants.
pub fn parse_prefer(headers: &HeaderMap) -> Prefer {
    let mut prefer = Prefer::default();
    let mut saw_wait = false;
    for field in headers.get_all(PREFER).iter().filter_map(text) {
        for preference in split_outside_quotes(field, ',') {
            let preference = split_outside_quotes(preference, ';')
                .next()
                .unwrap_or_default();
            let (name, value) = preference.split_once('=').unwrap_or((preference, ""));
            let (name, value) = (name.trim(), value.trim().trim_matches('"'));
            if name.eq_ignore_ascii_case("respond-async") {
                prefer.respond_async = true;
            } else if name.eq_ignore_ascii_case("wait") && !saw_wait {
                saw_wait = true;
                prefer.wait = seconds(value);
            }
        }
    }
    prefer
}

fn text(value: &HeaderValue) -> Option<&str> {
    value.to_str().ok()
}

fn seconds(value: &str) -> Option<Duration> {
    let is_number = !value.is_empty() && value.bytes().all(|b| b.is_ascii_digit());
    is_number.then(|| Duration::from_secs(value.parse().unwrap_or(u64::MAX)))
}

fn split_outside_quotes(text: &str, separator: char) -> impl Iterator<Item = &str> {
    let (mut quoted, mut escaped) = (false, false);
    text.split(move |c: char| {
        match c {
            _ if escaped => escaped = false,
            '\\' if quoted => escaped = true,
            '"' => quoted = !quoted,
            _ => {}
        }
        c == separator && !quoted
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(fields: &[&'static str], respond_async: bool, wait: Option<u64>) {
        let mut headers = HeaderMap::new();
        for field in fields {
            headers.append(PREFER, HeaderValue::from_static(field));
        }
        let expected = Prefer {
            respond_async,
            wait: wait.map(Duration::from_secs),
        };
        assert_eq!(parse_prefer(&headers), expected, "{fields:?}");
    }

    #[test]
    fn preferences_are_read_from_all_fields() {
        check(&[], false, None);
        check(&["respond-async"], true, None);
        check(&["respond-async, wait=2"], true, Some(2));
        check(&["Respond-Async;x=y , WAIT=\"10\""], true, Some(10));
        check(&["respond-async", "wait=5"], true, Some(5));
        check(&["wait=1", "wait=2"], false, Some(1));
        check(&["wait=99999999999999999999999"], false, Some(u64::MAX));
        check(&["wait=-1, wait=3"], false, None);
        check(&["wait"], false, None);
        check(&["return=minimal; a=\"x,respond-async\""], false, None);
        check(&["a=\"\\\", respond-async\""], false, None);
        check(&["", ",", ";;", "=,=\""], false, None);
    }
}
