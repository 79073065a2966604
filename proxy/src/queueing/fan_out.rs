//! One call, several targets: the copies for a route's subscribers.
//!
//! A copy is a message like any other, with its own id, attempts and dead letter; the accepting
//! route's policy governs it, for the subscriber's own routes say nothing about it. That all copies
//! are stored together is the queue's. On the message's life.

use std::sync::Arc;

use outrigger_core::error_code::ErrorCode;
use outrigger_queue::{Inspect, Message, StatusView, StoreError};

use crate::call::Call;
use crate::error::ProxyError;
use crate::queueing::callback;
use crate::snapshot::{Async, Route, Snapshot};

/// The note on a copy: the id of the message it is a copy of.
const COPY_OF: &str = "copyOf";

/// What `message` is for each of `subscribers`.
pub(super) fn copies(message: &Message, subscribers: &[Arc<str>]) -> Vec<Message> {
    let copy = |(n, target): (u16, &Arc<str>)| {
        let note = (COPY_OF.to_owned(), message.id.to_string());
        // The end of the message itself is told, not that of each copy.
        let kept = message.annotations.iter();
        let kept = kept.filter(|(name, _)| !callback::is_note(name));
        Message {
            id: message.id.nth(n),
            target: target.to_string(),
            idempotency_key: None,
            annotations: kept.cloned().chain([note]).collect(),
            ..message.clone()
        }
    };
    (1..).zip(subscribers).map(copy).collect()
}

/// Whether every subscriber takes a body of this length, as its `limits.maxRequestBody` says.
///
/// # Errors
/// `request_too_large`, naming one that does not.
pub(super) fn screen(call: &Call, policy: &Async, length: usize) -> Result<(), ProxyError> {
    for name in &policy.subscribers {
        let Some(service) = call.snapshot.service(name) else {
            continue;
        };
        let most = service.max_request_body.unwrap_or(u64::MAX);
        if length as u64 > most {
            service.metrics.refused.body.increment(1);
            let detail = format!(
                "the body is longer than the {most} bytes of limits.maxRequestBody of the \
                 subscriber {name}"
            );
            return Err(ProxyError::downstream(ErrorCode::RequestTooLarge, detail));
        }
    }
    Ok(())
}

/// Whether a message is a copy.
pub(super) fn is_copy(message: &Message) -> bool {
    message.annotations.iter().any(|(name, _)| name == COPY_OF)
}

/// The policy that governs a message whose request the rule `found` takes now.
pub(super) fn policy<'a>(
    snapshot: &'a Snapshot,
    message: &Message,
    found: Option<&'a Route>,
) -> Option<&'a Async> {
    if is_copy(message) {
        return accepting(snapshot, &message.route);
    }
    found?.asynchronous.as_ref()
}

/// The policy of the route of this name.
pub(super) fn accepting<'a>(snapshot: &'a Snapshot, route: &str) -> Option<&'a Async> {
    let mut routes = snapshot.services.iter().flat_map(|service| &service.routes);
    let route = routes.find(|known| *known.name == *route)?;
    route.asynchronous.as_ref()
}

/// The copies of a message, as far as its route still has subscribers.
///
/// # Errors
/// [`StoreError::Unavailable`].
pub(super) async fn of(
    snapshot: &Snapshot,
    inspect: &dyn Inspect,
    view: &StatusView,
) -> Result<Vec<StatusView>, StoreError> {
    let subscribed = accepting(snapshot, &view.route).map_or(0, |policy| policy.subscribers.len());
    let mut copies = Vec::new();
    for n in (1..).take(subscribed) {
        match inspect.status(view.id.nth(n)).await? {
            Some(copy) => copies.push(copy),
            None => break,
        }
    }
    Ok(copies)
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use outrigger_core::time::UnixMillis;
    use outrigger_queue::{IdemKey, MessageId};

    use super::*;

    #[test]
    fn a_copy_differs_in_id_and_target_and_has_no_idempotency_key() {
        let id = MessageId::from_bytes([7; 16]);
        let body = Bytes::from_static(b"body");
        let mut message = Message::new(id, "q", "shop/orders", body, UnixMillis(1));
        message.ordering_key = Some("42".to_owned());
        message.idempotency_key = Some(IdemKey {
            scope: "s".to_owned(),
            key: "k".to_owned(),
            fingerprint: [1; 32],
            ttl_ms: 1,
        });
        let copies = copies(&message, &["shop/stock".into(), "shop/mail".into()]);
        let targets: Vec<&str> = copies.iter().map(|copy| &*copy.target).collect();
        assert_eq!(targets, ["shop/stock", "shop/mail"]);
        assert!(!is_copy(&message));
        for (n, copy) in (1..).zip(copies) {
            assert!(is_copy(&copy));
            let same = Message {
                id,
                target: message.target.clone(),
                idempotency_key: message.idempotency_key.clone(),
                annotations: Vec::new(),
                ..copy.clone()
            };
            assert_eq!((copy.id, copy.idempotency_key), (id.nth(n), None));
            assert_eq!(same, message);
        }
    }
}
