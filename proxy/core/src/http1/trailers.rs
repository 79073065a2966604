//! Which fields a trailer section may carry.

use bytes::Bytes;
use http::HeaderMap;

use super::fields::{Keep, parse_fields};
use super::{Limits, Malformed};

/// Fields that frame, route, authenticate or steer the message, or say how to read its content:
/// whoever merges trailers into the head must not find them (RFC 9110 §6.5.1).
const FORBIDDEN: [&str; 36] = [
    "te",
    "age",
    "date",
    "host",
    "vary",
    "range",
    "cookie",
    "expect",
    "expires",
    "pragma",
    "trailer",
    "upgrade",
    "if-match",
    "if-range",
    "location",
    "forwarded",
    "connection",
    "keep-alive",
    "set-cookie",
    "retry-after",
    "content-type",
    "max-forwards",
    "authorization",
    "cache-control",
    "content-range",
    "if-none-match",
    "content-length",
    "content-encoding",
    "proxy-connection",
    "www-authenticate",
    "if-modified-since",
    "if-unmodified-since",
    "proxy-authentication-info",
    "transfer-encoding",
    "proxy-authenticate",
    "proxy-authorization",
];

/// Whether a field must not be in a trailer section.
pub(super) fn is_forbidden(name: &[u8]) -> bool {
    FORBIDDEN
        .iter()
        .any(|forbidden| name.eq_ignore_ascii_case(forbidden.as_bytes()))
}

/// Reads a complete trailer section without the forbidden fields.
pub(super) fn parse_trailers(section: &Bytes, limits: &Limits) -> Result<HeaderMap, Malformed> {
    parse_fields(section, 0, limits, |name, _| {
        Ok(match is_forbidden(name) {
            true => Keep::No,
            false => Keep::Yes,
        })
    })
}
