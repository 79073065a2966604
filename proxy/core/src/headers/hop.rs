//! Which header fields end at this hop.
//!
//! Owns hop-by-hop removal (RFC 9110 §7.6.1), who may send which `outrigger-*`, and what a stored
//! message does not keep.

use http::header::{
    AUTHORIZATION, CACHE_CONTROL, CONNECTION, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE,
    COOKIE, DATE, EXPECT, FORWARDED, HOST, SET_COOKIE, TE, TRAILER,
};
use http::{HeaderMap, HeaderName, HeaderValue};

use super::{
    CALLBACK, DEADLINE_MS, DELAY, EXPIRES, GRPC_MESSAGE, GRPC_STATUS, GRPC_TIMEOUT,
    IDEMPOTENCY_KEY, PREFER, PREFIX, TRACEPARENT, TRACESTATE, X_FORWARDED_CLIENT_CERT,
    X_FORWARDED_FOR, X_FORWARDED_HOST, X_FORWARDED_PROTO, X_REQUEST_ID,
};

/// Fields that `Connection` cannot nominate: to drop them on the sender's word would change what
/// the message is, who sent it, or how it is framed. RFC 9110 §7.6.1 forbids the sender to name
/// end-to-end fields; we ignore it where it would hurt.
#[allow(clippy::declare_interior_mutable_const)] // header names of static text never change
pub const PROTECTED: [HeaderName; 20] = [
    HOST,
    CONTENT_LENGTH,
    CONTENT_TYPE,
    CONTENT_ENCODING,
    AUTHORIZATION,
    COOKIE,
    SET_COOKIE,
    CACHE_CONTROL,
    DATE,
    FORWARDED,
    X_FORWARDED_FOR,
    X_FORWARDED_PROTO,
    X_FORWARDED_HOST,
    X_REQUEST_ID,
    IDEMPOTENCY_KEY,
    TRACEPARENT,
    TRACESTATE,
    GRPC_STATUS,
    GRPC_MESSAGE,
    GRPC_TIMEOUT,
];

/// Removes what is meant for this hop only, and every field that `Connection` nominates but
/// [`PROTECTED`] ones and `outrigger-*`.
///
/// `TE` is reduced to `trailers` where it said so, because gRPC wants it. `Upgrade` goes too: a
/// caller that switches protocols reads it first and puts it back. `Trailer` stays, it describes
/// the body.
pub fn strip_hop_by_hop(headers: &mut HeaderMap) {
    // One look at every name, as most requests have at most one of these.
    let mut found = [false; HOP_BY_HOP.len()];
    let mut any = false;
    for name in headers.keys() {
        if let Some(at) = hop_by_hop(name) {
            found[at] = true;
            any = true;
        }
    }
    if !any {
        return;
    }
    if found[AT_CONNECTION] {
        strip_nominated(headers);
    } else if found[AT_TE]
        && found.iter().filter(|found| **found).count() == 1
        && says_trailers(headers)
    {
        // gRPC: nothing to change.
        return;
    }
    let trailers =
        found[AT_TE] && tokens(headers, &TE).any(|token| token.eq_ignore_ascii_case("trailers"));
    for (name, _) in HOP_BY_HOP.iter().zip(found).filter(|(_, found)| *found) {
        headers.remove(*name);
    }
    if trailers {
        headers.insert(TE, HeaderValue::from_static("trailers"));
    }
}

/// Whether `TE` says what is left of it, and nothing else.
fn says_trailers(headers: &HeaderMap) -> bool {
    let mut values = headers.get_all(TE).iter();
    values.next().is_some_and(|value| value == "trailers") && values.next().is_none()
}

/// The fields that end at each hop.
const HOP_BY_HOP: [&str; 8] = [
    "connection",
    "te",
    "keep-alive",
    "proxy-connection",
    "proxy-authenticate",
    "proxy-authorization",
    "transfer-encoding",
    "upgrade",
];
const AT_CONNECTION: usize = 0;
const AT_TE: usize = 1;

/// Where a name stands in [`HOP_BY_HOP`]. Told by the length first: nearly all names end there.
fn hop_by_hop(name: &HeaderName) -> Option<usize> {
    let name = name.as_str();
    let candidates: &[usize] = match name.len() {
        2 => &[1],
        7 => &[7],
        10 => &[0, 2],
        16 => &[3],
        17 => &[6],
        18 => &[4],
        19 => &[5],
        _ => return None,
    };
    candidates
        .iter()
        .copied()
        .find(|at| HOP_BY_HOP[*at] == name)
}

fn strip_nominated(headers: &mut HeaderMap) {
    // By far the most frequent; neither is anything but an option of the connection.
    let plain = |value: &HeaderValue| value == "keep-alive" || value == "close";
    if headers.get_all(CONNECTION).iter().all(plain) {
        return;
    }
    let may_go = |name: &HeaderName| {
        !PROTECTED.contains(name) && *name != TE && *name != TRAILER && !is_ours(name)
    };
    let nominated: Vec<HeaderName> = tokens(headers, &CONNECTION)
        .filter_map(|token| HeaderName::from_bytes(token.as_bytes()).ok())
        .filter(may_go)
        .collect();
    for name in nominated {
        headers.remove(name);
    }
}

/// The members of a comma-separated list over all fields of a name; members that are not ASCII
/// are passed over.
fn tokens<'a>(headers: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'a str> {
    let members = |value: &'a HeaderValue| value.as_bytes().split(|b| *b == b',');
    headers
        .get_all(name)
        .into_iter()
        .flat_map(members)
        .filter_map(|member| std::str::from_utf8(member).ok())
        .map(str::trim)
        .filter(|member| !member.is_empty())
}

fn is_ours(name: &HeaderName) -> bool {
    name.as_str().starts_with(PREFIX)
}

/// Who sent the headers, and so which `outrigger-*` among them count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StripPolicy {
    /// Our application, outbound: keeps `outrigger-delay`, `-expires`, `-callback` and
    /// `-deadline-ms`.
    OutboundFromApp,
    /// A peer nobody vouches for, or an application's answer: keeps none.
    Untrusted,
    /// A verified sidecar of the mesh: keeps all.
    MeshPeer,
}

/// Removes the `outrigger-*` fields that the sender may not set, and from all but mesh peers the
/// identity header `x-forwarded-client-cert`.
pub fn strip_outrigger(headers: &mut HeaderMap, policy: StripPolicy) {
    if policy == StripPolicy::MeshPeer {
        return;
    }
    let from_app = policy == StripPolicy::OutboundFromApp;
    let kept =
        |name: &HeaderName| from_app && [DELAY, EXPIRES, CALLBACK, DEADLINE_MS].contains(name);
    remove_where(headers, |name| {
        (is_ours(name) && !kept(name)) || *name == X_FORWARDED_CLIENT_CERT
    });
}

/// Whether a message does not reproduce the field when it is delivered: `Prefer`, `Expect`,
/// `grpc-timeout`, and ours.
pub fn is_dropped_on_delivery(name: &HeaderName) -> bool {
    *name == PREFER || *name == EXPECT || *name == GRPC_TIMEOUT || is_ours(name)
}

/// Removes what a message does not reproduce when it is delivered.
pub fn strip_for_delivery(headers: &mut HeaderMap) {
    remove_where(headers, is_dropped_on_delivery);
}

pub(super) fn remove_where(headers: &mut HeaderMap, gone: impl Fn(&HeaderName) -> bool) {
    let names: Vec<HeaderName> = headers.keys().filter(|name| gone(name)).cloned().collect();
    for name in names {
        headers.remove(name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn map(fields: &[(&str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in fields {
            headers.append(name.parse::<HeaderName>().unwrap(), value.parse().unwrap());
        }
        headers
    }

    fn names(headers: &HeaderMap) -> Vec<&str> {
        let mut names: Vec<_> = headers.keys().map(HeaderName::as_str).collect();
        names.sort_unstable();
        names
    }

    fn check(fields: &[(&str, &str)], left: &[&str]) {
        let mut headers = map(fields);
        strip_hop_by_hop(&mut headers);
        assert_eq!(names(&headers), left, "{fields:?}");
    }

    #[test]
    fn what_ends_at_this_hop() {
        check(&[("keep-alive", "5"), ("x-a", "1")], &["x-a"]);
        check(
            &[("connection", "close, X-A"), ("x-a", "1"), ("x-b", "2")],
            &["x-b"],
        );
        check(
            &[
                ("connection", "x-a"),
                ("connection", "x-b"),
                ("x-a", "1"),
                ("x-b", "2"),
            ],
            &[],
        );
        check(
            &[("transfer-encoding", "chunked"), ("upgrade", "websocket")],
            &[],
        );
        check(
            &[("proxy-authorization", "x"), ("proxy-connection", "close")],
            &[],
        );
        check(&[("te", "gzip"), ("trailer", "x-sum")], &["trailer"]);
        check(&[("te", "gzip, Trailers")], &["te"]);
        check(&[("connection", "te"), ("te", "trailers")], &["te"]);
    }

    #[test]
    fn connection_cannot_take_away_what_matters() {
        check(
            &[
                (
                    "connection",
                    "host, content-length, authorization, x-forwarded-for, outrigger-attempt",
                ),
                ("host", "orders"),
                ("content-length", "5"),
                ("authorization", "x"),
                ("x-forwarded-for", "10.0.0.1"),
                ("outrigger-attempt", "2"),
            ],
            &[
                "authorization",
                "content-length",
                "host",
                "outrigger-attempt",
                "x-forwarded-for",
            ],
        );
    }

    #[test]
    fn who_may_send_which_of_ours() {
        let fields = [
            ("outrigger-delay", "10s"),
            ("outrigger-expires", "1h"),
            ("outrigger-callback", "https://a"),
            ("outrigger-deadline-ms", "5"),
            ("outrigger-attempt", "2"),
            ("outrigger-message-id", "1"),
            ("outrigger-made-up", "1"),
            ("x-forwarded-client-cert", "me"),
            ("x-a", "1"),
        ];
        let check = |policy, left: usize| {
            let mut headers = map(&fields);
            strip_outrigger(&mut headers, policy);
            assert_eq!(headers.len(), left, "{policy:?}");
        };
        check(StripPolicy::MeshPeer, 9);
        check(StripPolicy::OutboundFromApp, 5);
        check(StripPolicy::Untrusted, 1);
    }

    #[test]
    fn what_a_delivery_leaves_out() {
        let mut headers = map(&[
            ("prefer", "respond-async"),
            ("expect", "100-continue"),
            ("grpc-timeout", "1S"),
            ("outrigger-delay", "1s"),
            ("content-type", "text/plain"),
            ("te", "trailers"),
        ]);
        strip_for_delivery(&mut headers);
        assert_eq!(names(&headers), ["content-type", "te"]);
    }

    proptest! {
        #[test]
        fn no_nominated_field_is_left(
            nominated in prop::collection::vec("[a-zA-Z][a-zA-Z-]{0,8}", 0..6),
            separator in "[ \t]{0,2},[ \t,]{0,2}",
        ) {
            let mut headers = map(&[("connection", &nominated.join(&separator)), ("host", "h")]);
            for name in &nominated {
                headers.append(name.parse::<HeaderName>().unwrap(), HeaderValue::from_static("1"));
            }
            strip_hop_by_hop(&mut headers);
            let protected = |name: &HeaderName| {
                PROTECTED.contains(name) || *name == TE || *name == TRAILER || is_ours(name)
            };
            for name in nominated.iter().map(|name| name.parse::<HeaderName>().unwrap()) {
                prop_assert!(protected(&name) || !headers.contains_key(&name), "{}", name);
            }
            prop_assert!(headers.contains_key(HOST));
        }

        #[test]
        fn no_bytes_panic(value in prop::collection::vec(any::<u8>(), 0..40)) {
            if let Ok(value) = HeaderValue::from_bytes(&value) {
                let mut headers = HeaderMap::new();
                headers.insert(CONNECTION, value.clone());
                headers.insert(TE, value);
                strip_hop_by_hop(&mut headers);
                prop_assert!(!headers.contains_key(CONNECTION));
            }
        }
    }
}
