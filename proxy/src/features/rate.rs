//! Rate limits: what comes too often is refused before anything is done for it.
//!
//! Asked where a call leaves the application and, for the limits of its own service, where calls
//! arrive. The buckets are shared by all workers and outlive a reload. Stands on the life of a
//! request; a delivery was counted when it was queued.

use std::time::Duration;

use http::{HeaderMap, HeaderName, HeaderValue, Response};
use outrigger_core::error_code::ErrorCode;
use outrigger_core::rate::Room;

use crate::call::Call;
use crate::error::ProxyError;
use crate::http::body::ResponseBody;
use crate::listener::Direction;
use crate::snapshot::features::{RateKey, RateLimit};

/// draft-ietf-httpapi-ratelimit-headers-10.
const RATE_LIMIT: HeaderName = HeaderName::from_static("ratelimit");
const RATE_LIMIT_POLICY: HeaderName = HeaderName::from_static("ratelimit-policy");

/// What to tell the caller of its limit.
pub(super) struct Told(HeaderValue, HeaderValue);

impl Told {
    /// Says it, unless somebody nearer to the service has spoken of a limit already.
    pub(super) fn say(self, fields: &mut HeaderMap) {
        if !fields.contains_key(RATE_LIMIT) {
            fields.insert(RATE_LIMIT, self.0);
            fields.insert(RATE_LIMIT_POLICY, self.1);
        }
    }
}

/// Lets a call in, or answers it.
///
/// # Errors
/// The answer to a call that came too soon.
pub(super) fn admit(
    call: &mut Call,
    limit: &RateLimit,
) -> Result<Told, Box<Response<ResponseBody>>> {
    match take(call, limit) {
        Ok(room) => Ok(tell(limit, room)),
        Err(after) => {
            limit.limited.increment(1);
            let detail = format!("the limit of {} is used up", limit.whose);
            let error = ProxyError::local(ErrorCode::RateLimited, detail).retry_after(after);
            let mut response = call.refuse(&error);
            let none = Room {
                remaining: 0,
                full_in: after,
            };
            tell(limit, none).say(response.headers_mut());
            Err(Box::new(response))
        }
    }
}

/// The limits of the workload's own service.
///
/// # Errors
/// The answer to a call that came too soon.
pub fn admit_inbound(call: &mut Call) -> Result<(), Box<Response<ResponseBody>>> {
    let snapshot = std::sync::Arc::clone(&call.snapshot);
    let Some(limits) = &snapshot.inbound_limits else {
        return Ok(());
    };
    let found = limits.rules.find(&call.view());
    match found.and_then(|rule| limits.limits.get(rule)) {
        Some(Some(limit)) => admit(call, limit).map(drop),
        _ => Ok(()),
    }
}

fn take(call: &Call, limit: &RateLimit) -> Result<Room, Duration> {
    let rates = &limit.state.rates;
    let (params, now) = (&limit.params, call.start);
    let for_key = |key: &[u8]| rates.take_for(key, limit.max_keys, params, now);
    match &limit.key {
        RateKey::Route => rates.take(params, now),
        RateKey::Header(name) => {
            let value = call.parts.headers.get(name);
            for_key(value.map_or(b"", HeaderValue::as_bytes))
        }
        // All calls of our application are one caller's.
        RateKey::Identity if call.direction == Direction::Outbound => rates.take(params, now),
        // A peer without an identity is told by its address.
        RateKey::Identity if call.caller.is_some() => {
            let caller = call.caller.as_ref();
            for_key(caller.map_or(b"", |caller| caller.id.as_str().as_bytes()))
        }
        RateKey::Identity => match call.peer.ip().to_canonical() {
            std::net::IpAddr::V4(ip) => for_key(&ip.octets()),
            std::net::IpAddr::V6(ip) => for_key(&ip.octets()),
        },
    }
}

fn tell(limit: &RateLimit, room: Room) -> Told {
    let name = &limit.name;
    let seconds = room.full_in.as_secs() + u64::from(room.full_in.subsec_nanos() > 0);
    let text = format!("\"{name}\";r={};t={seconds}", room.remaining);
    // The name was made for a field.
    let value = HeaderValue::from_str(&text).unwrap_or(HeaderValue::from_static(""));
    Told(value, limit.policy.clone())
}
