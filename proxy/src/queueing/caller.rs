//! Whose a message is, and who may see it.
//!
//! Owns the name that messages and idempotency keys of a caller are stored under. What calls on the
//! outbound listener is the application beside this sidecar, so its name is the sidecar's identity.
//! A state directory may outlive an identity, and then it holds what others sent: they are the ones
//! that this keeps out, and whoever reaches the listener from another machine. Operators ask the
//! admin API, which shows everything. On the message's life.

use outrigger_core::error_code::ErrorCode;
use outrigger_core::spiffe::SpiffeId;
use outrigger_queue::StatusView;

use crate::call::Call;
use crate::error::ProxyError;
use crate::worker::Worker;

/// The caller that this sidecar speaks for while it has no identity: its own application.
pub const LOCAL: &str = "local";

/// The name of whoever calls here.
pub(crate) fn name(worker: &Worker) -> String {
    let id = worker.shared.identity.workload();
    id.map_or_else(|| LOCAL.to_owned(), |id| id.as_str().to_owned())
}

/// The scope in which an idempotency key of `caller` is unique.
pub(crate) fn scope(caller: &str, route: &str) -> String {
    format!("{caller} {route}")
}

/// The scopes in which a caller may have a key: its own, and that of the time before it had a name.
pub(super) fn scopes(worker: &Worker, route: &str) -> Vec<String> {
    let own = name(worker);
    let mut scopes = vec![scope(&own, route)];
    if own != LOCAL {
        scopes.push(scope(LOCAL, route));
    }
    scopes
}

/// Whether a call may ask for messages at all: it comes from this machine, directly or redirected.
///
/// # Errors
/// `unauthorized`.
pub(super) fn screen(call: &Call) -> Result<(), ProxyError> {
    if call.original.is_some() || call.peer.ip().to_canonical().is_loopback() {
        return Ok(());
    }
    let detail = format!(
        "messages are shown to the application beside the sidecar, over loopback, and not to {}",
        call.peer.ip()
    );
    Err(ProxyError::downstream(ErrorCode::Unauthorized, detail))
}

/// Whether a message is the caller's.
///
/// # Errors
/// `unauthorized`.
pub(super) fn check(call: &Call, view: &StatusView) -> Result<(), ProxyError> {
    let own = call.worker.shared.identity.workload();
    if owns(own.as_deref(), &view.caller) {
        return Ok(());
    }
    let detail = format!("message {} was sent by another caller", view.id);
    Err(ProxyError::downstream(ErrorCode::Unauthorized, detail))
}

/// Whether what `caller` sent is `own`'s. What was sent before the sidecar had an identity was sent
/// by the same application.
pub(super) fn owns(own: Option<&SpiffeId>, caller: &str) -> bool {
    caller == LOCAL || own.is_some_and(|own| own.as_str() == caller)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_its_senders_and_one_without_a_name_the_applications() {
        let web = SpiffeId::parse("spiffe://shop.local/ns/shop/sa/web").unwrap();
        let check = |own: Option<&SpiffeId>, caller: &str, expected: bool| {
            assert_eq!(owns(own, caller), expected, "{own:?} {caller}");
        };
        check(Some(&web), "spiffe://shop.local/ns/shop/sa/web", true);
        check(Some(&web), "spiffe://shop.local/ns/shop/sa/web2", false);
        check(Some(&web), "spiffe://shop.local/ns/shop/sa/mailer", false);
        check(Some(&web), LOCAL, true);
        check(None, LOCAL, true);
        check(None, "spiffe://shop.local/ns/shop/sa/web", false);
    }
}
