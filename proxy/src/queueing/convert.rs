//! What of a request is stored, and how it becomes a request again.
//!
//! Owns the choice of header fields, the fingerprint of a request, and what a caller may say about
//! the time of delivery. Pure. On the message's life.

use std::time::Duration;

use http::header::{AUTHORIZATION, COOKIE, HOST, PROXY_AUTHORIZATION, TE};
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Uri, request};
use outrigger_config::units::Dur;
use outrigger_core::error_code::ErrorCode;
use outrigger_core::headers::{self, StripPolicy, TraceContext};
use outrigger_core::time::UnixMillis;
use outrigger_queue::{Lease, Message};
use sha2::{Digest as _, Sha256};

use crate::error::ProxyError;
use crate::queueing::text;
use crate::snapshot::Secrets;

/// Header fields as a message keeps them.
pub type Fields = Vec<(String, Vec<u8>)>;

/// The note on a message: the version of the contract that it was checked by.
pub const CONTRACT: &str = "contract";

/// The fields with which a caller proves who it is.
const CREDENTIALS: [HeaderName; 3] = [AUTHORIZATION, COOKIE, PROXY_AUTHORIZATION];

/// Whether a request carries credentials.
pub fn has_credentials(fields: &HeaderMap) -> bool {
    CREDENTIALS.iter().any(|name| fields.contains_key(name))
}

/// The end-to-end fields of a request, in the order in which they came.
pub fn stored_fields(fields: &HeaderMap, secrets: Secrets) -> Fields {
    let mut kept = fields.clone();
    headers::strip_hop_by_hop(&mut kept);
    headers::strip_for_delivery(&mut kept);
    headers::strip_outrigger(&mut kept, StripPolicy::Untrusted);
    kept.remove(HOST); // the authority is kept beside the fields
    if secrets != Secrets::Keep {
        for name in CREDENTIALS {
            kept.remove(name);
        }
    }
    // Removing disturbs the order of a map, so the original gives the order.
    let in_order = fields
        .iter()
        .filter(|(name, _)| **name != TE && kept.contains_key(*name));
    let te = kept.get(TE).map(|value| (&TE, value));
    in_order
        .chain(te)
        .map(|(name, value)| owned(name, value))
        .collect()
}

/// Fields of an answer, or trailers, as a message keeps them.
pub fn owned_fields(fields: &HeaderMap) -> Fields {
    fields
        .iter()
        .map(|(name, value)| owned(name, value))
        .collect()
}

fn owned(name: &HeaderName, value: &HeaderValue) -> (String, Vec<u8>) {
    (name.as_str().to_owned(), value.as_bytes().to_vec())
}

/// Stored fields as a map. What is no field (a damaged store) is left out.
pub fn to_map(fields: &[(String, Vec<u8>)]) -> HeaderMap {
    let mut map = HeaderMap::with_capacity(fields.len());
    for (name, value) in fields {
        let name = HeaderName::from_bytes(name.as_bytes());
        if let (Ok(name), Ok(value)) = (name, HeaderValue::from_bytes(value)) {
            map.append(name, value);
        }
    }
    map
}

/// What makes two requests the same: SHA-256 over method, authority, path and query, content type
/// and body, each with its length before it.
pub fn fingerprint(
    method: &Method,
    authority: &str,
    path_and_query: &str,
    content_type: Option<&HeaderValue>,
    body: &[u8],
) -> [u8; 32] {
    let content_type = content_type.map_or(&b""[..], HeaderValue::as_bytes);
    let parts = [
        method.as_str().as_bytes(),
        authority.as_bytes(),
        path_and_query.as_bytes(),
        content_type,
    ];
    let mut hash = Sha256::new();
    for part in parts.into_iter().chain([body]) {
        hash.update((part.len() as u64).to_be_bytes());
        hash.update(part);
    }
    hash.finalize().into()
}

/// When a caller wants its message delivered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Timing {
    /// `outrigger-delay`: not before this has passed.
    pub delay: Duration,
    /// `outrigger-expires`: not after this has passed.
    pub expires: Option<Duration>,
}

impl Timing {
    /// Reads `outrigger-delay` and `outrigger-expires` (durations of GEP-2257).
    ///
    /// # Errors
    /// `bad_request` for what is no duration, and for a message that could never be delivered:
    /// expired or, with a `max_age`, dead of age before it is due.
    pub fn read(fields: &HeaderMap, max_age: Duration) -> Result<Self, ProxyError> {
        let delay = duration(fields, &headers::DELAY)?.unwrap_or_default();
        let expires = duration(fields, &headers::EXPIRES)?;
        let bad = |detail| Err(ProxyError::downstream(ErrorCode::BadRequest, detail));
        if expires.is_some_and(|expires| expires <= delay) {
            return bad("outrigger-expires: the message would expire before it is due");
        }
        if delay >= max_age {
            return bad("outrigger-delay: longer than the route's delivery.maxAge");
        }
        Ok(Self { delay, expires })
    }
}

fn duration(fields: &HeaderMap, name: &HeaderName) -> Result<Option<Duration>, ProxyError> {
    let mut values = fields.get_all(name).iter();
    let Some(value) = values.next() else {
        return Ok(None);
    };
    let text = value.to_str().ok().filter(|_| values.next().is_none());
    match text.and_then(|text| text.trim().parse::<Dur>().ok()) {
        Some(duration) => Ok(Some(duration.0)),
        None => {
            let detail = format!("{name}: expected one duration such as 10s or 1h30m");
            Err(ProxyError::downstream(ErrorCode::BadRequest, detail))
        }
    }
}

/// The head of a delivery. None when what is stored is no request.
///
/// Adds what only a delivery has: the message's id, the number of the try, when it was enqueued,
/// a span of its own in the message's trace (after a replay a trace of its own), and the id as
/// `Idempotency-Key` where the caller gave none.
pub fn delivery_head(lease: &Lease, rng: &mut fastrand::Rng) -> Option<request::Parts> {
    let message = &lease.message;
    let mut parts = http::Request::new(()).into_parts().0;
    parts.method = Method::from_bytes(message.method.as_bytes()).ok()?;
    let mut uri = http::uri::Parts::default();
    uri.path_and_query = Some(PathAndQuery::try_from(message.path_and_query.as_str()).ok()?);
    parts.uri = Uri::from_parts(uri).ok()?;
    parts.headers = to_map(&message.headers);
    let fields = &mut parts.headers;
    fields.insert(HOST, HeaderValue::from_str(&message.authority).ok()?);
    let id = unique(&message.id.to_string())?;
    if !fields.contains_key(headers::IDEMPOTENCY_KEY) {
        fields.insert(headers::IDEMPOTENCY_KEY, id.clone());
    }
    fields.insert(headers::MESSAGE_ID, id);
    let attempt = HeaderValue::from(lease.attempts_so_far.saturating_add(1));
    fields.insert(headers::DELIVERY_ATTEMPT, attempt);
    fields.insert(
        headers::ENQUEUED_AT,
        unique(&text::rfc3339(lease.created_at))?,
    );
    fields.insert(headers::TRACEPARENT, trace(lease, rng).to_header());
    if lease.replays > 0 {
        fields.remove(headers::TRACESTATE); // it belongs to the old trace
    }
    Some(parts)
}

fn trace(lease: &Lease, rng: &mut fastrand::Rng) -> TraceContext {
    let enqueued = lease
        .message
        .trace_context
        .as_deref()
        .and_then(TraceContext::parse);
    match enqueued {
        Some(context) if lease.replays == 0 => context.child(rng),
        other => TraceContext::new_root(other.is_some_and(|context| context.is_sampled()), rng),
    }
}

/// A value that never repeats has no place in HPACK's tables.
fn unique(text: &str) -> Option<HeaderValue> {
    let mut value = HeaderValue::from_str(text).ok()?;
    value.set_sensitive(true);
    Some(value)
}

/// When a message with this timing is due, and when it ends undelivered.
pub fn schedule(timing: Timing, now: UnixMillis) -> (UnixMillis, Option<UnixMillis>) {
    (
        now + timing.delay,
        timing.expires.map(|expires| now + expires),
    )
}

/// A note that the mesh made on a message.
pub fn note<'a>(message: &'a Message, name: &str) -> Option<&'a str> {
    let mut notes = message.annotations.iter();
    let found = notes.find(|(known, _)| known == name);
    found.map(|(_, value)| value.as_str())
}

/// Whether a field's value is hidden from operators.
pub fn is_secret(name: &str) -> bool {
    let marked = [
        "token",
        "secret",
        "password",
        "api-key",
        "apikey",
        "signature",
    ];
    CREDENTIALS.iter().any(|known| known == name)
        || name == "set-cookie"
        || marked.iter().any(|mark| name.contains(mark))
}

/// The shape of a message's weight that matters to its reader: nothing of the body.
pub fn describe(message: &Message) -> String {
    let path = message.path_and_query.split('?').next().unwrap_or_default();
    format!("{} {}{}", message.method, message.authority, path)
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use outrigger_queue::{LeaseId, MessageId};

    use super::*;

    fn map(fields: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut map = HeaderMap::new();
        for (name, value) in fields {
            map.append(*name, HeaderValue::from_static(value));
        }
        map
    }

    #[test]
    fn end_to_end_fields_are_kept_in_order_with_their_duplicates() {
        let fields = map(&[
            ("host", "orders"),
            ("x-b", "1"),
            ("prefer", "respond-async"),
            ("x-a", "2"),
            ("outrigger-delay", "1s"),
            ("x-a", "3"),
            ("connection", "x-hop"),
            ("x-hop", "4"),
            ("expect", "100-continue"),
            ("grpc-timeout", "1S"),
            ("content-type", "text/plain"),
            ("authorization", "Bearer x"),
        ]);
        let names = |secrets| {
            let kept = stored_fields(&fields, secrets);
            kept.into_iter()
                .map(|(name, value)| format!("{name}={}", text(&value)))
                .collect::<Vec<_>>()
        };
        let text_only = ["x-b=1", "x-a=2", "x-a=3", "content-type=text/plain"];
        assert_eq!(names(Secrets::Drop), text_only);
        assert_eq!(
            names(Secrets::Keep).last().unwrap(),
            "authorization=Bearer x"
        );
    }

    fn text(value: &[u8]) -> String {
        String::from_utf8_lossy(value).into_owned()
    }

    #[test]
    fn bytes_that_are_no_text_survive_storage() {
        let mut fields = HeaderMap::new();
        fields.insert(
            "x-raw",
            HeaderValue::from_bytes(&[0xff, b'a', 0x80]).unwrap(),
        );
        let back = to_map(&stored_fields(&fields, Secrets::Reject));
        assert_eq!(back, fields);
    }

    #[test]
    fn every_part_of_a_request_counts_in_its_fingerprint() {
        let json = HeaderValue::from_static("application/json");
        let of = |method: &Method, authority, path, content_type, body| {
            fingerprint(method, authority, path, content_type, body)
        };
        let base = of(&Method::POST, "orders", "/v1?a=1", Some(&json), b"{}");
        assert_eq!(
            base,
            of(&Method::POST, "orders", "/v1?a=1", Some(&json), b"{}")
        );
        for other in [
            of(&Method::PUT, "orders", "/v1?a=1", Some(&json), b"{}"),
            of(&Method::POST, "orders2", "/v1?a=1", Some(&json), b"{}"),
            of(&Method::POST, "orders", "/v1?a=2", Some(&json), b"{}"),
            of(&Method::POST, "orders", "/v1?a=1", None, b"{}"),
            of(&Method::POST, "orders", "/v1?a=1", Some(&json), b"{} "),
            of(&Method::POST, "orders/", "v1?a=1", Some(&json), b"{}"),
        ] {
            assert_ne!(base, other);
        }
    }

    #[test]
    fn delay_and_expiry_are_durations_that_leave_time_to_deliver() {
        let day = Duration::from_secs(86_400);
        let check = |fields: &[(&'static str, &'static str)],
                     expected: Option<(u64, Option<u64>)>| {
            let read = Timing::read(&map(fields), day).ok();
            let seconds = read.map(|t| (t.delay.as_secs(), t.expires.map(|e| e.as_secs())));
            assert_eq!(seconds, expected, "{fields:?}");
        };
        check(&[], Some((0, None)));
        check(&[("outrigger-delay", "10s")], Some((10, None)));
        check(
            &[("outrigger-delay", "1m"), ("outrigger-expires", "1h30m")],
            Some((60, Some(5400))),
        );
        check(&[("outrigger-delay", "10")], None);
        check(&[("outrigger-delay", "-1s")], None);
        check(
            &[("outrigger-delay", "1s"), ("outrigger-delay", "2s")],
            None,
        );
        check(&[("outrigger-expires", "0s")], None);
        check(
            &[("outrigger-delay", "1h"), ("outrigger-expires", "1h")],
            None,
        );
        check(&[("outrigger-delay", "24h")], None);
    }

    fn lease(replays: u32) -> Lease {
        let mut rng = fastrand::Rng::with_seed(1);
        let id = MessageId::new(UnixMillis(1), &mut rng);
        let mut message = Message::new(id, "q", "shop/orders", Bytes::new(), UnixMillis(1_000));
        message.path_and_query = "/v1/orders?a=%20b".to_owned();
        message.authority = "orders:80".to_owned();
        message.trace_context =
            Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".to_owned());
        Lease {
            id: LeaseId {
                message: id,
                token: 1,
            },
            message,
            attempts_so_far: 2,
            created_at: UnixMillis(0),
            until: UnixMillis(9_000),
            replays,
        }
    }

    #[test]
    fn a_delivery_says_what_it_is() {
        let mut rng = fastrand::Rng::with_seed(2);
        let lease = lease(0);
        let head = delivery_head(&lease, &mut rng).unwrap();
        assert_eq!(head.uri.to_string(), "/v1/orders?a=%20b");
        assert_eq!(head.headers["host"], "orders:80");
        assert_eq!(
            head.headers["outrigger-message-id"],
            lease.message.id.to_string()
        );
        assert_eq!(
            head.headers["idempotency-key"],
            lease.message.id.to_string()
        );
        assert_eq!(head.headers["outrigger-delivery-attempt"], "3");
        assert_eq!(
            head.headers["outrigger-enqueued-at"],
            "1970-01-01T00:00:00.000Z"
        );
        let trace = head.headers["traceparent"].to_str().unwrap();
        assert!(
            trace.starts_with("00-0af7651916cd43dd8448eb211c80319c-"),
            "{trace}"
        );
        assert!(!trace.contains("b7ad6b7169203331"), "{trace}");
    }

    #[test]
    fn a_replay_starts_a_trace_and_a_callers_key_stays() {
        let mut rng = fastrand::Rng::with_seed(2);
        let mut replay = lease(1);
        replay.message.headers = vec![("idempotency-key".to_owned(), b"\"k\"".to_vec())];
        let head = delivery_head(&replay, &mut rng).unwrap();
        assert_eq!(head.headers["idempotency-key"], "\"k\"");
        let trace = head.headers["traceparent"].to_str().unwrap();
        assert!(
            !trace.contains("0af7651916cd43dd8448eb211c80319c"),
            "{trace}"
        );
    }

    #[test]
    fn what_is_no_request_is_not_sent() {
        let mut rng = fastrand::Rng::with_seed(2);
        let mut broken = lease(0);
        broken.message.path_and_query = "not a path".to_owned();
        assert!(delivery_head(&broken, &mut rng).is_none());
    }

    #[test]
    fn secrets_are_told_from_other_fields() {
        for name in ["authorization", "cookie", "x-api-key", "x-auth-token"] {
            assert!(is_secret(name), "{name}");
        }
        for name in ["content-type", "idempotency-key", "x-request-id"] {
            assert!(!is_secret(name), "{name}");
        }
    }
}
