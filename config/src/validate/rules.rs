//! Checks of what a rule and a RoutePolicy have in common.

use std::time::Duration;

use super::{Checks, Subject};
use crate::document::Kind;
use crate::model::{
    AsyncSpec, CallbackSpec, ContractSpec, FallbackStep, FaultSpec, HeaderEdits, IdempotencySpec,
    MirrorSpec, RateLimitSpec, RetrySpec, TimeoutsSpec, ValueMatchType,
};
use crate::units::{Dur, KeySource, is_token};

impl Checks<'_> {
    pub(super) fn timeouts(&mut self, at: Subject<'_>, base: &str, spec: Option<&TimeoutsSpec>) {
        let Some(spec) = spec else { return };
        let limit = |value: Option<Dur>| value.and_then(Dur::enabled);
        if let (Some(per_try), Some(request)) = (limit(spec.per_try), limit(spec.request))
            && per_try > request
        {
            let message = format!(
                "perTry ({}) is longer than request ({})",
                Dur(per_try),
                Dur(request)
            );
            self.error(at, "E302", &format!("{base}.timeouts.perTry"), message);
        }
    }

    pub(super) fn retry(&mut self, at: Subject<'_>, base: &str, spec: Option<&RetrySpec>) {
        let Some(spec) = spec else { return };
        let keys = [("backoff", spec.backoff), ("maxBackoff", spec.max_backoff)];
        let defaults = [Duration::from_millis(25), Duration::from_millis(250)].map(Dur);
        self.ordered(at, &format!("{base}.retry"), keys, defaults);
    }

    pub(super) fn async_(&mut self, at: Subject<'_>, base: &str, spec: Option<&AsyncSpec>) {
        let Some(spec) = spec else { return };
        let base = format!("{base}.async");
        if let Some(queue) = &spec.queue {
            self.exists(
                at,
                "E202",
                &format!("{base}.queue"),
                Kind::Queue,
                &queue.target(),
            );
        }
        for (n, service) in spec.subscribers.iter().flatten().enumerate() {
            let path = format!("{base}.subscribers[{n}]");
            self.exists(at, "E201", &path, Kind::MeshService, &service.target());
        }
        if let Some(delivery) = &spec.delivery {
            let keys = [
                ("backoff", delivery.backoff),
                ("maxBackoff", delivery.max_backoff),
            ];
            let defaults = [Duration::from_secs(1), Duration::from_secs(300)].map(Dur);
            self.ordered(at, &format!("{base}.delivery"), keys, defaults);
        }
        use KeySource::{Cookie, Header, JsonPointer};
        if let Some(key) = &spec.ordering_key
            && !matches!(key, Header(_) | JsonPointer(_))
        {
            let message = format!(
                "expected header:NAME or jsonpointer:/POINTER, found {}",
                if matches!(key, Cookie(_)) {
                    "a cookie".to_owned()
                } else {
                    key.to_string()
                }
            );
            self.error(at, "E106", &format!("{base}.orderingKey"), message);
        }
        self.callback(at, &base, spec.callback.as_ref());
        if let Some(name) = &spec.grpc_response_type
            && !is_message_name(name)
        {
            let message =
                format!("expected a message's full name such as shop.Order, found {name}");
            self.error(at, "E106", &format!("{base}.grpcResponseType"), message);
        }
        self.idempotency(at, &base, spec.idempotency.as_ref());
        let on_unknown = spec.idempotency.as_ref().and_then(|keys| keys.on_unknown);
        if on_unknown.is_some() {
            let message = "has no effect on messages: one whose outcome is unknown is delivered \
                           again, and a repeat with its key is answered with the same message; it \
                           is for the rule's own idempotency";
            let path = format!("{base}.idempotency.onUnknown");
            self.warn(at, "W312", &path, message);
        }
    }

    fn callback(&mut self, at: Subject<'_>, base: &str, spec: Option<&CallbackSpec>) {
        const LONGEST: Duration = Duration::from_secs(30);
        let Some(spec) = spec else { return };
        let base = format!("{base}.callback");
        for (n, pattern) in spec.allow.iter().enumerate() {
            if !is_callback_pattern(pattern) {
                let message = format!(
                    "expected a scheme and a host, with * for a whole label and no path, such as \
                     https://*.shop.internal, found {pattern}"
                );
                self.error(at, "E106", &format!("{base}.allow[{n}]"), message);
            }
        }
        if let Some(timeout) = spec.timeout
            && (timeout.0.is_zero() || timeout.0 > LONGEST)
        {
            let message = format!("must be longer than 0s and at most {}", Dur(LONGEST));
            self.error(at, "E308", &format!("{base}.timeout"), message);
        }
    }

    pub(super) fn idempotency(
        &mut self,
        at: Subject<'_>,
        base: &str,
        spec: Option<&IdempotencySpec>,
    ) {
        if let Some(ttl) = spec.and_then(|spec| spec.ttl)
            && ttl.enabled().is_none()
        {
            self.error(
                at,
                "E308",
                &format!("{base}.idempotency.ttl"),
                "must be longer than 0s",
            );
        }
    }

    pub(super) fn rate_limit(&mut self, at: Subject<'_>, base: &str, spec: Option<&RateLimitSpec>) {
        let key = spec.and_then(|spec| spec.key.as_ref());
        if let Some(KeySource::Cookie(_) | KeySource::JsonPointer(_) | KeySource::Source) = key {
            let message = "expected Route, Identity or header:NAME";
            self.error(at, "E106", &format!("{base}.rateLimit.key"), message);
        }
    }

    pub(super) fn contract(&mut self, at: Subject<'_>, base: &str, spec: Option<&ContractSpec>) {
        if let Some(spec) = spec
            && spec.json_schema.is_some() == spec.descriptor_set.is_some()
        {
            let message = "exactly one of jsonSchema, descriptorSet must be set";
            self.error(at, "E105", &format!("{base}.contract"), message);
        }
    }

    pub(super) fn fallback(&mut self, at: Subject<'_>, base: &str, steps: Option<&[FallbackStep]>) {
        for (n, step) in steps.into_iter().flatten().enumerate() {
            if let Some(service) = &step.service {
                let path = format!("{base}.onUnavailable[{n}].service");
                self.exists(at, "E201", &path, Kind::MeshService, &service.target());
            }
            let path = format!("{base}.onUnavailable[{n}].respond");
            self.respond(at, &path, step.respond.as_ref());
        }
    }

    pub(super) fn mirror(&mut self, at: Subject<'_>, base: &str, spec: Option<&MirrorSpec>) {
        if let Some(spec) = spec {
            let path = format!("{base}.mirror.service");
            self.exists(at, "E201", &path, Kind::MeshService, &spec.service.target());
        }
    }

    pub(super) fn split_key(&mut self, at: Subject<'_>, base: &str, key: Option<&KeySource>) {
        if let Some(key) = key
            && !matches!(key, KeySource::Header(_) | KeySource::Cookie(_))
        {
            let message = format!("expected header:NAME or cookie:NAME, found {key}");
            self.error(at, "E106", &format!("{base}.splitKey"), message);
        }
    }

    pub(super) fn fault(&mut self, at: Subject<'_>, base: &str, spec: Option<&FaultSpec>) {
        let Some(spec) = spec else { return };
        for (n, header) in spec.headers.iter().enumerate() {
            if header.type_ == ValueMatchType::RegularExpression {
                let path = format!("{base}.fault.headers[{n}].value");
                self.regex(at, &path, &header.value);
            }
        }
        if let Some(abort) = &spec.abort
            && abort.status.is_some() == abort.grpc.is_some()
        {
            let message = "exactly one of status, grpc must be set";
            self.error(at, "E105", &format!("{base}.fault.abort"), message);
        }
        if let Some(bandwidth) = &spec.bandwidth
            && bandwidth.bytes_per_second.0 == 0
        {
            let path = format!("{base}.fault.bandwidth.bytesPerSecond");
            self.error(at, "E308", &path, "must be at least 1");
        }
    }

    pub(super) fn headers(&mut self, at: Subject<'_>, path: &str, edits: Option<&HeaderEdits>) {
        let Some(edits) = edits else { return };
        for (key, map) in [("set", &edits.set), ("add", &edits.add)] {
            for (name, value) in map {
                let path = format!("{path}.{key}.{name}");
                if !is_token(name) {
                    self.error(at, "E309", &path, "not a header name");
                }
                if value
                    .bytes()
                    .any(|byte| matches!(byte, 0..=8 | 10..=31 | 127))
                {
                    self.error(
                        at,
                        "E309",
                        &path,
                        "not a header value: it has control characters",
                    );
                }
            }
        }
        let names = edits
            .set
            .keys()
            .chain(edits.add.keys())
            .chain(&edits.remove);
        let owned: Vec<&String> = names.filter(|name| is_ours(name)).collect();
        for name in owned {
            let message = format!("\"{name}\" belongs to the connection or to the sidecar");
            self.error(at, "E309", path, message);
        }
    }
}

/// Headers that describe one hop (RFC 9110 §7.6.1) or are the mesh's own.
fn is_ours(name: &str) -> bool {
    const HOP: [&str; 9] = [
        "connection",
        "content-length",
        "host",
        "keep-alive",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    ];
    let name = name.to_ascii_lowercase();
    HOP.contains(&name.as_str()) || name.starts_with("outrigger-")
}

/// `https://*.shop.internal:8443`: no path, no user, and a star for a whole label only.
fn is_callback_pattern(text: &str) -> bool {
    let rest = text
        .strip_prefix("https://")
        .or_else(|| text.strip_prefix("http://"));
    let Some(rest) = rest.map(|rest| rest.strip_suffix('/').unwrap_or(rest)) else {
        return false;
    };
    if let Some(address) = rest.strip_prefix('[') {
        let Some((address, port)) = address.split_once(']') else {
            return false;
        };
        return address.parse::<std::net::Ipv6Addr>().is_ok()
            && (port.is_empty() || port.strip_prefix(':').is_some_and(is_port));
    }
    let (host, port) = match rest.split_once(':') {
        Some((host, port)) => (host, Some(port)),
        None => (rest, None),
    };
    let label = |label: &str| {
        let known = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_');
        label == "*" || (!label.is_empty() && label.chars().all(known))
    };
    host.split('.').all(label) && port.is_none_or(is_port)
}

fn is_port(text: &str) -> bool {
    text.parse::<u16>().is_ok_and(|port| port > 0)
}

/// `shop.v1.Order`, without a dot before it.
fn is_message_name(text: &str) -> bool {
    let part = |part: &str| {
        let known = |c: char| c.is_ascii_alphanumeric() || c == '_';
        part.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_') && part.chars().all(known)
    };
    text.split('.').all(part)
}
