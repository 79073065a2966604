//! Request targets and the `Host` field (RFC 9112 §3.2).

use std::net::Ipv6Addr;

use bytes::Bytes;
use http::uri::Authority;
use http::{Method, Uri};
use memchr::memchr;

use super::Malformed;
use super::fields::table;

/// Bytes of a registered name (RFC 3986 §3.2.2) but `%` and `,`: nobody names a host so, and a
/// list of hosts must not pass for one.
static HOST: [bool; 256] = table(b"-._~!$&'()*+;=");

/// Reads the target that goes with `method`.
pub(super) fn parse_target(method: &Method, target: Bytes) -> Result<Uri, Malformed> {
    if target.is_empty() {
        return Err(Malformed::Target("empty request target"));
    }
    if !target.is_ascii() {
        return Err(Malformed::Target("request target is not ASCII"));
    }
    if memchr(b'#', &target).is_some() {
        return Err(Malformed::Target("fragment in the request target"));
    }
    if method == Method::CONNECT {
        return connect_target(target);
    }
    match target[0] {
        b'/' => {}
        b'*' if target.len() == 1 && method == Method::OPTIONS => {}
        b'*' if target.len() == 1 => {
            return Err(Malformed::Target("asterisk target of a method but OPTIONS"));
        }
        _ => check_absolute(&target)?,
    }
    // Refuses whitespace and control characters.
    Uri::from_maybe_shared(target)
        .map_err(|_| Malformed::Target("invalid character in the request target, or too long"))
}

/// `host:port`, both of them (RFC 9110 §9.3.6).
fn connect_target(target: Bytes) -> Result<Uri, Malformed> {
    let authority = check_authority(&target)
        .filter(|port| port.is_some_and(|port| port != 0))
        .and_then(|_| Authority::from_maybe_shared(target).ok());
    authority
        .map(Uri::from)
        .ok_or(Malformed::Target("CONNECT target is not a host and a port"))
}

/// A scheme of ours and a valid authority; the rest is the URI parser's.
fn check_absolute(target: &[u8]) -> Result<(), Malformed> {
    let starts_with = |scheme: &[u8]| {
        target
            .get(..scheme.len())
            .is_some_and(|start| start.eq_ignore_ascii_case(scheme))
    };
    let rest = match () {
        () if starts_with(b"http://") => &target[7..],
        () if starts_with(b"https://") => &target[8..],
        () => return Err(Malformed::Target("request target of no known form")),
    };
    let end = rest.iter().position(|byte| matches!(byte, b'/' | b'?'));
    let authority = &rest[..end.unwrap_or(rest.len())];
    if check_authority(authority).is_none() {
        return Err(Malformed::Target("invalid authority in the request target"));
    }
    // Its path and query could not be written as the origin form of the next hop.
    match end.map(|end| rest[end]) {
        Some(b'?') => Err(Malformed::Target(
            "absolute target with a query and no path",
        )),
        _ => Ok(()),
    }
}

/// Checks the value of a `Host` field.
pub(super) fn check_host(value: &[u8]) -> Result<(), Malformed> {
    if value.is_empty() {
        return Err(Malformed::Host("empty Host"));
    }
    match check_authority(value) {
        Some(_) => Ok(()),
        None => Err(Malformed::Host("invalid Host")),
    }
}

/// A host and an optional port, without user information: its port, or `None` when it is none of
/// that. An empty port counts as none (RFC 3986 §3.2.3).
fn check_authority(authority: &[u8]) -> Option<Option<u16>> {
    let (host_end, port) = match authority.first()? {
        b'[' => {
            let end = memchr(b']', authority)?;
            let literal = std::str::from_utf8(&authority[1..end]).ok()?;
            literal.parse::<Ipv6Addr>().ok()?;
            (end + 1, &authority[end + 1..])
        }
        _ => {
            let end = authority
                .iter()
                .position(|&byte| !HOST[usize::from(byte)])
                .unwrap_or(authority.len());
            (end, &authority[end..])
        }
    };
    match port {
        _ if host_end == 0 => None,
        [] | [b':'] => Some(None),
        [b':', digits @ ..] => parse_port(digits).map(Some),
        _ => None,
    }
}

fn parse_port(digits: &[u8]) -> Option<u16> {
    if digits.len() > 5 {
        return None;
    }
    let port = digits.iter().try_fold(0_u32, |port, digit| {
        digit
            .is_ascii_digit()
            .then(|| port * 10 + u32::from(digit - b'0'))
    })?;
    u16::try_from(port).ok()
}
