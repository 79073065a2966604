//! Who enqueued a message: written down with it, and shown to its target.
//!
//! A sidecar without an identity speaks for its own application and has nothing to show. Stands on
//! the life of a message.

use http::HeaderValue;
use outrigger_core::spiffe::SpiffeId;
use outrigger_queue::Message;

use crate::identity::statement;
use crate::queueing::convert;
use crate::worker::Worker;

/// The note on a message: the word of whoever enqueued it.
const STATEMENT: &str = "callerStatement";

/// Writes down who enqueues each of these, and has it signed.
pub(super) fn sign<'a>(worker: &Worker, messages: impl IntoIterator<Item = &'a mut Message>) {
    let Some(svid) = worker.shared.identity.current() else {
        return;
    };
    for message in messages {
        let id = message.id.to_string();
        let Some(text) = statement::sign(&svid, &id, message.enqueued_at) else {
            return;
        };
        svid.id.as_str().clone_into(&mut message.caller);
        message.annotations.push((STATEMENT.to_owned(), text));
    }
}

/// Who enqueued a message; none when that is not written down.
pub(super) fn caller(message: &Message) -> Option<SpiffeId> {
    SpiffeId::parse(&message.caller)
}

/// What its target is shown of that.
pub(super) fn shown(message: &Message) -> Option<Box<HeaderValue>> {
    let text = convert::note(message, STATEMENT)?;
    let mut value = HeaderValue::from_str(text).ok()?;
    // Never the same again: it would drive out of HPACK's tables what is.
    value.set_sensitive(true);
    Some(Box::new(value))
}
