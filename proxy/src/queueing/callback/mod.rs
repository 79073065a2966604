//! The news of a message's end, told to a URL that its caller named (`outrigger-callback`).
//!
//! A callback is a message of its own, stored in the same commit as the one that it follows, held
//! until that one ends and released in the commit of that end: "done, but nobody was told" cannot
//! be. It waits in a queue beside (`<queue>/callbacks`), with its own tries and dead letters; what
//! becomes of it never changes what it tells of.
//!
//! Here: which callbacks are accepted and what is stored of them. [`event`] is what is told, [`sign`]
//! proves who tells it, [`send`] reaches the receiver, [`deliver`] decides what came of it, and
//! [`again`] follows replays. On the message's life.

pub(super) mod again;
mod deliver;
mod event;
pub(super) mod send;
mod sign;

use bytes::Bytes;
use http::HeaderMap;
use outrigger_core::callback::Url;
use outrigger_core::error_code::ErrorCode;
use outrigger_core::headers;
use outrigger_queue::{HELD, Inspect, Message, MessageId, State, StatusView, StoreError};

pub(super) use deliver::deliver;

use crate::error::ProxyError;
use crate::queueing::{convert, fan_out};
use crate::snapshot::{Async, Snapshot};

/// What a queue's name is followed by for its callbacks. Names of the config hold one slash.
const QUEUE: &str = "/callbacks";

/// The note on a message whose end will be told: to which URL.
const TO: &str = "callback";

/// The note on a callback: the message that it tells of.
const OF: &str = "callbackOf";

/// The queue of the callbacks of `queue`'s messages.
fn queue_of(queue: &str) -> String {
    format!("{queue}{QUEUE}")
}

/// The queue whose callbacks `queue` holds; none when it is no queue of callbacks.
pub fn parent(queue: &str) -> Option<&str> {
    queue
        .strip_suffix(QUEUE)
        .filter(|parent| parent.contains('/'))
}

/// The URL that a caller asks for, if its route allows it.
///
/// # Errors
/// `bad_request` for what is no URL, `callback_refused`.
pub(super) fn asked(fields: &HeaderMap, policy: &Async) -> Result<Option<Url>, ProxyError> {
    let mut values = fields.get_all(headers::CALLBACK).iter();
    let Some(value) = values.next() else {
        return Ok(None);
    };
    let refused = |detail| Err(ProxyError::local(ErrorCode::CallbackRefused, detail));
    let Some(callback) = &policy.callback else {
        return refused("the route allows no callbacks".to_owned());
    };
    let text = value.to_str().ok().filter(|_| values.next().is_none());
    let Some(url) = text.and_then(|text| Url::parse(text.trim()).ok()) else {
        let detail = "outrigger-callback: expected one URL such as https://hooks.example/done";
        return Err(ProxyError::downstream(ErrorCode::BadRequest, detail));
    };
    match callback.screen(&url) {
        Ok(()) => Ok(Some(url)),
        Err(why) => refused(why),
    }
}

/// The note that `message` has a callback, so that a replay has one too.
pub(super) fn note(url: &Url) -> (String, String) {
    (TO.to_owned(), text(url))
}

/// Whether this is such a note.
pub(super) fn is_note(name: &str) -> bool {
    name == TO
}

/// The URL that the end of `message` is told to.
pub(super) fn noted(message: &Message) -> Option<Url> {
    Url::parse(convert::note(message, TO)?).ok()
}

/// The callback that follows `message`, which was replayed so often before.
pub(super) fn follow(message: &Message, url: &Url, replays: u32) -> Message {
    let mut told = Message::new(
        message.id.follower(replays),
        &queue_of(&message.queue),
        &url.origin(),
        Bytes::new(),
        message.enqueued_at,
    );
    told.caller.clone_from(&message.caller);
    told.route.clone_from(&message.route);
    told.route_version.clone_from(&message.route_version);
    told.authority = url.authority();
    told.path_and_query.clone_from(&url.path_and_query);
    told.trace_context.clone_from(&message.trace_context);
    told.not_before = HELD;
    told.result_ttl_ms = 0;
    told.annotations = vec![note(url), (OF.to_owned(), message.id.to_string())];
    told
}

/// The message that this one tells of; none when it is no callback.
pub(super) fn subject(message: &Message) -> Option<MessageId> {
    convert::note(message, OF)?.parse().ok()
}

/// The callback of a message, when its route has callbacks.
///
/// # Errors
/// [`StoreError::Unavailable`].
pub(super) async fn of(
    snapshot: &Snapshot,
    inspect: &dyn Inspect,
    view: &StatusView,
) -> Result<Option<StatusView>, StoreError> {
    let policy = fan_out::accepting(snapshot, &view.route);
    match policy.is_some_and(|policy| policy.callback.is_some()) {
        true => inspect.status(view.id.follower(view.replays)).await,
        false => Ok(None),
    }
}

/// Whether a message is held: it is idle, and no time makes it due.
pub(super) fn is_held(view: &StatusView) -> bool {
    !view.state.is_final() && view.state != State::Delivering && view.next_attempt_at.is_none()
}

fn text(url: &Url) -> String {
    format!("{}{}", url.origin(), url.path_and_query)
}

#[cfg(test)]
mod tests {
    use outrigger_core::time::UnixMillis;

    use super::*;

    #[test]
    fn a_callback_is_held_beside_what_it_follows() {
        let id = MessageId::from_bytes([7; 16]);
        let mut message = Message::new(id, "shop/orders", "shop/o", Bytes::new(), UnixMillis(5));
        let url = Url::parse("https://hooks.shop:8443/done?t=1").unwrap();
        message.annotations.push(note(&url));
        assert_eq!(noted(&message), Some(url.clone()));
        let told = follow(&message, &url, 0);
        assert_eq!((told.not_before, subject(&told)), (HELD, Some(id)));
        assert_eq!(noted(&told), Some(url.clone()));
        assert_eq!(told.target, "https://hooks.shop:8443", "no token in lists");
        assert_eq!(parent(&told.queue), Some("shop/orders"));
        assert_ne!(follow(&message, &url, 1).id, told.id);
        assert_eq!(subject(&message), None);
        for queue in ["shop/orders", "shop/callbacks", "callbacks"] {
            assert_eq!(parent(queue), None, "{queue}");
        }
    }
}
