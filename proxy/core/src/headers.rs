//! The header fields of our own, and the rules for everybody's.
//!
//! Owns names, parsing and stripping. Does not decide what a value leads to. On the request's and
//! the message's life.

mod date;
mod forwarded;
mod hop;
mod key;
mod prefer;
mod present;
mod trace;
mod underscore;

use http::{HeaderMap, HeaderName};

pub use date::{parse_http_date, parse_retry_after, parse_retry_pushback};
pub use forwarded::{append_forwarded_for, ensure_request_id, set_forwarded_proto};
pub use hop::{
    PROTECTED, StripPolicy, is_dropped_on_delivery, strip_for_delivery, strip_hop_by_hop,
    strip_outrigger,
};
pub use key::{BadKey, idempotency_key};
pub use prefer::{Prefer, parse_prefer};
pub use present::{Field, Present};
pub use trace::TraceContext;
pub use underscore::{HasUnderscore, Underscores, screen_underscores};

macro_rules! names {
    ($( $(#[$doc:meta])* $constant:ident = $name:literal; )*) => {
        $( $(#[$doc])* pub const $constant: HeaderName = HeaderName::from_static($name); )*
    };
}

names! {
    /// The code of an error that we originate.
    ERROR = "outrigger-error";
    /// The number of the attempt, from 1.
    ATTEMPT = "outrigger-attempt";
    /// How the request was retried, or why it was not.
    RETRY = "outrigger-retry";
    /// Which step of the ladder answered.
    FALLBACK = "outrigger-fallback";
    /// Why a call did not become a message.
    ASYNC = "outrigger-async";
    /// On a copy of a request: the route that had it made.
    MIRROR = "outrigger-mirror";
    /// The message's id.
    MESSAGE_ID = "outrigger-message-id";
    /// The number of the delivery, from 1.
    DELIVERY_ATTEMPT = "outrigger-delivery-attempt";
    /// When the message was enqueued.
    ENQUEUED_AT = "outrigger-enqueued-at";
    /// Between sidecars: the signed word of whoever enqueued the message.
    CALLER_STATEMENT = "outrigger-caller-statement";
    /// From a caller: deliver no sooner.
    DELAY = "outrigger-delay";
    /// From a caller: deliver no later.
    EXPIRES = "outrigger-expires";
    /// From a caller: where to send the result.
    CALLBACK = "outrigger-callback";
    /// From a caller or the hop before: milliseconds that are left.
    DEADLINE_MS = "outrigger-deadline-ms";

    /// gRPC status.
    GRPC_STATUS = "grpc-status";
    /// gRPC message, percent-encoded.
    GRPC_MESSAGE = "grpc-message";
    /// When, or whether, a gRPC call may be tried again (gRFC A6).
    GRPC_RETRY_PUSHBACK = "grpc-retry-pushback-ms";
    /// gRPC deadline.
    GRPC_TIMEOUT = "grpc-timeout";

    /// RFC 7240.
    PREFER = "prefer";
    /// RFC 7240.
    PREFERENCE_APPLIED = "preference-applied";
    /// draft-ietf-httpapi-idempotency-key-header.
    IDEMPOTENCY_KEY = "idempotency-key";
    /// W3C Trace Context.
    TRACEPARENT = "traceparent";
    /// W3C Trace Context.
    TRACESTATE = "tracestate";

    /// The addresses a request came by.
    X_FORWARDED_FOR = "x-forwarded-for";
    /// The scheme the first hop was asked with.
    X_FORWARDED_PROTO = "x-forwarded-proto";
    /// The host the first hop was asked for.
    X_FORWARDED_HOST = "x-forwarded-host";
    /// Identity of a caller as Envoy writes it; never believed from outside.
    X_FORWARDED_CLIENT_CERT = "x-forwarded-client-cert";
    /// One id for a request through all hops.
    X_REQUEST_ID = "x-request-id";

    /// Not standard, but hop-by-hop in the wild.
    KEEP_ALIVE = "keep-alive";
    /// Not standard, but hop-by-hop in the wild.
    PROXY_CONNECTION = "proxy-connection";
}

/// Which attempt of a sidecar before us a request is, as it says; 0 when it says nothing. A delivery
/// counts as one that is tried again, for its queue does so.
///
/// Believed of anybody: who says so can only lose retries of his own call. It is not relayed, so a
/// third sidecar in a row hears of it only from a peer whose identity is known.
pub fn attempt_of_peer(fields: &HeaderMap) -> u32 {
    // Told by the length first: nearly all requests have neither, and nobody hashes two names then.
    let ours = [ATTEMPT.as_str().len(), DELIVERY_ATTEMPT.as_str().len()];
    if !fields
        .keys()
        .any(|name| ours.contains(&name.as_str().len()))
    {
        return 0;
    }
    let number = fields
        .get(ATTEMPT)
        .and_then(|value| value.to_str().ok()?.parse().ok())
        .unwrap_or(0);
    if fields.contains_key(DELIVERY_ATTEMPT) {
        return number.max(2);
    }
    number
}

/// What all our own header names begin with.
pub const PREFIX: &str = "outrigger-";
