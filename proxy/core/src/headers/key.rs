//! `Idempotency-Key`.
//!
//! Owns its reading (draft-ietf-httpapi-idempotency-key-header: an RFC 8941 string; bare values
//! are common and accepted).

use std::fmt;

use http::{HeaderMap, HeaderName};

const LONGEST: usize = 255;

/// The header is there but is no key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadKey;

impl fmt::Display for BadKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an idempotency key is one value of 1 to 255 visible ASCII characters")
    }
}

impl std::error::Error for BadKey {}

/// The key that a request carries in `name`; `"a"` in quotes and a bare `a` are the same key.
///
/// # Errors
/// [`BadKey`] for several fields, for more than one value, and for a key that is empty, longer than
/// 255 characters, or has others than visible ASCII (inside quotes also spaces).
pub fn idempotency_key(headers: &HeaderMap, name: &HeaderName) -> Result<Option<String>, BadKey> {
    let mut fields = headers.get_all(name).iter();
    let Some(field) = fields.next() else {
        return Ok(None);
    };
    if fields.next().is_some() {
        return Err(BadKey);
    }
    let text = field
        .to_str()
        .map_err(|_| BadKey)?
        .trim_matches([' ', '\t']);
    let key = match text.strip_prefix('"') {
        Some(quoted) => unquoted(quoted).ok_or(BadKey)?,
        None if text.bytes().all(|b| b.is_ascii_graphic() && b != b',') => text.to_owned(),
        None => return Err(BadKey),
    };
    if (1..=LONGEST).contains(&key.len()) {
        Ok(Some(key))
    } else {
        Err(BadKey)
    }
}

/// The string that starts after a quote (RFC 8941 §4.2.5). Parameters after it are passed over.
fn unquoted(text: &str) -> Option<String> {
    let mut key = String::new();
    let mut chars = text.chars();
    loop {
        match chars.next()? {
            '"' => break,
            '\\' => match chars.next()? {
                escaped @ ('"' | '\\') => key.push(escaped),
                _ => return None,
            },
            plain @ ' '..='~' => key.push(plain),
            _ => return None,
        }
    }
    let rest = chars.as_str();
    (rest.is_empty() || rest.starts_with(';')).then_some(key)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::headers::IDEMPOTENCY_KEY;
    use http::HeaderValue;

    fn check(values: &[&str], expected: Result<Option<&str>, BadKey>) {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(
                IDEMPOTENCY_KEY,
                HeaderValue::from_bytes(value.as_bytes()).unwrap(),
            );
        }
        let key = idempotency_key(&headers, &IDEMPOTENCY_KEY);
        assert_eq!(
            key.as_ref().map(Option::as_deref),
            expected.as_ref().copied(),
            "{values:?}"
        );
    }

    #[test]
    fn keys_are_quoted_or_bare() {
        check(&[], Ok(None));
        check(&["8e03978e"], Ok(Some("8e03978e")));
        check(&["\"8e03978e\""], Ok(Some("8e03978e")));
        check(&["  \"a b\" "], Ok(Some("a b")));
        check(&[r#""a\"b\\""#], Ok(Some(r#"a"b\"#)));
        check(&["\"a\";p=1"], Ok(Some("a")));
        check(&[&"k".repeat(255)], Ok(Some(&"k".repeat(255))));
    }

    #[test]
    fn what_is_no_key_is_refused() {
        let long = "k".repeat(256);
        for bad in [
            "", "\"\"", "\"a", "a b", "a,b", "\"a\"b", r#""a\n""#, "ü", &long,
        ] {
            check(&[bad], Err(BadKey));
        }
        check(&["a", "a"], Err(BadKey));
    }
}
