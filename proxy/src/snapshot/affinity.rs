//! `algorithm: ConsistentHash`: what of a request decides its endpoint.
//!
//! Owns the settings, compiled, and how a request's key is read. Which endpoint the key leads to
//! is `outrigger-core`'s. Stands on the life of a request.

use std::fmt::Write as _;
use std::net::IpAddr;
use std::time::Duration;

use http::header::{COOKIE, HOST};
use http::{HeaderMap, HeaderName, HeaderValue};
use outrigger_core::balance::hash;

/// The settings of a service whose endpoints are picked by a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Affinity {
    /// What is hashed.
    pub key: HashKey,
    /// The most requests in flight to one endpoint, in percent of the mean; none is unlimited.
    pub max_load_percent: Option<u32>,
    /// Given to callers that come without it.
    pub session: Option<SessionCookie>,
}

/// What is hashed (`loadBalancer.hashKey`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HashKey {
    /// The value of a field.
    Header(HeaderName),
    /// The value of a cookie.
    Cookie(String),
    /// Who calls.
    Source,
}

/// A cookie that the sidecar sets (`loadBalancer.sessionCookie`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SessionCookie {
    name: String,
    attributes: String,
}

/// Where a request comes from.
#[derive(Debug, Clone, Copy)]
pub struct Source<'a> {
    /// The peer of its connection.
    pub peer: IpAddr,
    /// What we stand beside; every workload's application calls from the same loopback address.
    pub workload: &'a str,
}

impl Affinity {
    /// The hash of the request's key; none when it has none. `host` stands in for `Host`, which
    /// an HTTP/2 request does not carry.
    pub fn key(&self, fields: &HeaderMap, host: &str, source: Source<'_>) -> Option<u64> {
        match &self.key {
            HashKey::Header(name) if *name == HOST => Some(hash(host.as_bytes())),
            HashKey::Header(name) => Some(hash(fields.get(name)?.as_bytes())),
            HashKey::Cookie(name) => Some(hash(cookie(fields, name)?)),
            HashKey::Source => Some(source.hash(Some(fields))),
        }
    }
}

impl Source<'_> {
    /// An application behind which others stand names them in `X-Forwarded-For`, the first one
    /// first. Bytes that are not HTTP have no fields.
    pub fn hash(&self, fields: Option<&HeaderMap>) -> u64 {
        let forwarded = fields
            .and_then(|fields| fields.get("x-forwarded-for"))
            .and_then(|value| value.as_bytes().split(|byte| *byte == b',').next())
            .map(<[u8]>::trim_ascii)
            .filter(|address| !address.is_empty());
        match forwarded {
            Some(address) => hash(address),
            None if self.peer.is_loopback() => hash(self.workload.as_bytes()),
            None => hash(self.peer.to_canonical().to_string().as_bytes()),
        }
    }
}

impl SessionCookie {
    /// A cookie of this name, for this path; without a `ttl` it ends with the caller's session.
    pub fn new(name: &str, path: &str, ttl: Option<Duration>) -> Self {
        let mut attributes = format!("; Path={path}");
        if let Some(ttl) = ttl {
            // Writing to memory cannot fail.
            let _ = write!(attributes, "; Max-Age={}", ttl.as_secs().max(1));
        }
        attributes.push_str("; HttpOnly");
        Self {
            name: name.to_owned(),
            attributes,
        }
    }

    /// A new session: the hash of its key, and what to say in `Set-Cookie`.
    pub fn begin(&self, rng: &mut fastrand::Rng) -> Option<(u64, HeaderValue)> {
        let id = format!("{:032x}", rng.u128(..));
        let text = format!("{}={id}{}", self.name, self.attributes);
        // Name and path were checked.
        let value = HeaderValue::try_from(text).ok()?;
        Some((hash(id.as_bytes()), value))
    }
}

/// The value of a cookie; RFC 6265 §4.2.1. HTTP/2 may split them over several fields.
fn cookie<'a>(fields: &'a HeaderMap, name: &str) -> Option<&'a [u8]> {
    let all = fields.get_all(COOKIE).into_iter();
    all.flat_map(|field| field.as_bytes().split(|byte| *byte == b';'))
        .find_map(|pair| {
            let pair = pair.trim_ascii();
            let value = pair.strip_prefix(name.as_bytes())?.strip_prefix(b"=")?;
            (!value.is_empty()).then_some(value)
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn affinity(key: HashKey) -> Affinity {
        Affinity {
            key,
            max_load_percent: None,
            session: None,
        }
    }

    fn key(of: &HashKey, fields: &[(&'static str, &'static str)], peer: &str) -> Option<u64> {
        let mut map = HeaderMap::new();
        for (name, value) in fields {
            map.append(*name, HeaderValue::from_static(value));
        }
        let source = Source {
            peer: peer.parse().unwrap(),
            workload: "shop/web-1",
        };
        affinity(of.clone()).key(&map, "orders", source)
    }

    #[test]
    fn a_key_is_read_from_where_the_settings_say() {
        let check = |of: HashKey, fields: &[_], expected: Option<&str>| {
            let expected = expected.map(|text| hash(text.as_bytes()));
            assert_eq!(key(&of, fields, "10.0.0.9"), expected, "{of:?} {fields:?}");
        };
        let user = || HashKey::Header(HeaderName::from_static("x-user"));
        check(user(), &[("x-user", "7")], Some("7"));
        check(user(), &[], None);
        check(HashKey::Header(HOST), &[], Some("orders"));
        let session = || HashKey::Cookie("s".to_owned());
        check(session(), &[("cookie", "a=1; s=2; b=3")], Some("2"));
        check(
            session(),
            &[("cookie", "a=1"), ("cookie", "s=2")],
            Some("2"),
        );
        check(session(), &[("cookie", "ss=1; s=; s2=4")], None);
        check(HashKey::Source, &[], Some("10.0.0.9"));
        let forwarded = [("x-forwarded-for", "192.0.2.1, 10.0.0.1")];
        check(HashKey::Source, &forwarded, Some("192.0.2.1"));
    }

    #[test]
    fn the_application_on_loopback_is_known_by_its_workload() {
        let expected = Some(hash(b"shop/web-1"));
        assert_eq!(key(&HashKey::Source, &[], "127.0.0.1"), expected);
    }

    #[test]
    fn a_session_begins_with_a_key_of_its_own() {
        let cookie = SessionCookie::new("s", "/app", Some(Duration::from_secs(60)));
        let mut rng = fastrand::Rng::with_seed(1);
        let (key, value) = cookie.begin(&mut rng).unwrap();
        let text = value.to_str().unwrap();
        assert!(text.starts_with("s="), "{text}");
        assert!(
            text.ends_with("; Path=/app; Max-Age=60; HttpOnly"),
            "{text}"
        );
        let id = text["s=".len()..].split(';').next().unwrap();
        assert_eq!(hash(id.as_bytes()), key);
        assert_ne!(cookie.begin(&mut rng).unwrap().0, key);
    }
}
