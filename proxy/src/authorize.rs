//! Asks the policies of a service whether a call may be, and says why when it may not.
//!
//! The callee's sidecar asks before the application hears of a call. The caller's asks before a
//! call becomes a message, so that nobody is told 202 for what will be refused, and again when the
//! message is delivered; what only the callee can know is left to it. A message that is brought by
//! somebody else than who enqueued it needs the permission of both.
//!
//! Stands on the life of a request and on the life of a message.

use std::net::SocketAddr;

use http::HeaderValue;
use outrigger_config::model::MtlsMode;
use outrigger_core::authz::{self, Policies, Refused, Token, Verdict};
use outrigger_core::error_code::ErrorCode;
use outrigger_core::headers;
use outrigger_core::route::RequestView;
use outrigger_core::spiffe::SpiffeId;
use tracing::info;

use crate::call::Call;
use crate::clock;
use crate::error::ProxyError;
use crate::http::context::Connection;
use crate::identity::{jwt, statement};
use crate::snapshot::{Async, Route, Secrets, Service, When};
use crate::telemetry::metrics::Metrics;
use crate::worker::Worker;

/// Whether a call from elsewhere may reach the local application.
///
/// # Errors
/// `unauthorized`, naming the policy, or the mode that takes no plaintext; `unauthenticated` for a
/// token that is not good.
pub fn inbound(call: &mut Call, app: &Service) -> Result<(), ProxyError> {
    original_caller(call)?;
    let shared = &call.worker.shared;
    if shared.identity.configured() && call.caller.is_none() {
        // New connections are refused by the listener; this one was open when the mode changed.
        let port = call
            .original
            .or(shared.bootstrap.app)
            .map(|addr| addr.port());
        if app.mtls.at(port) == MtlsMode::Strict {
            let detail = "mtls.mode is Strict, and the call came in plaintext";
            return Err(ProxyError::local(ErrorCode::Unauthorized, detail));
        }
    }
    let claims = match &app.tokens {
        Some(issuers) => issuers.read(&call.parts.headers, clock::unix_now())?,
        None => None,
    };
    let Some(policies) = &app.authorization else {
        return Ok(());
    };
    let caller = call.caller.as_ref().map(|caller| &caller.id);
    let view = call.view();
    let asked = authz::Call {
        caller,
        address: Some(call.peer.ip()),
        token: claims.as_deref().map_or(Token::None, Token::Good),
        request: Some(view),
    };
    let metrics = &call.worker.shared.metrics;
    judge(policies, &asked, &app.name, Some(call.peer), metrics)?;
    let Some(original) = call.original_caller.as_deref() else {
        return Ok(());
    };
    let asked = authz::Call {
        caller: Some(original),
        ..asked
    };
    judge(policies, &asked, &app.name, Some(call.peer), metrics)
}

/// Whether a connection from elsewhere that is not HTTP may reach the local application.
///
/// # Errors
/// `unauthorized`, naming the policy.
pub fn opaque(worker: &Worker, connection: &Connection, app: &Service) -> Result<(), ProxyError> {
    let Some(policies) = &app.authorization else {
        return Ok(());
    };
    let caller = connection.caller.as_ref().map(|caller| &caller.id);
    let asked = authz::Call {
        caller,
        address: Some(connection.peer.ip()),
        token: Token::None,
        request: None,
    };
    let peer = Some(connection.peer);
    judge(policies, &asked, &app.name, peer, &worker.shared.metrics)
}

/// Whether a call of the local application may become a message for `service`, and for the
/// subscribers of the rule: refused when every service that could take it refuses, and when one
/// of the subscribers does, for all copies are stored or none.
///
/// # Errors
/// `unauthorized`, naming the policy.
pub fn message(call: &Call, service: &Service, route: &Route) -> Result<(), ProxyError> {
    let policy = route.asynchronous.as_ref();
    let kept = policy.is_none_or(|policy| policy.secrets == Secrets::Keep);
    let token = token_of(call, kept);
    any_target(call, service, route, None, token)?;
    // What a shadow's subscribers refuse is missing there, and nowhere else.
    let policy = policy.filter(|policy| policy.when != When::Shadow);
    let subscribers = policy.map_or(&[][..], |policy| &policy.subscribers);
    subscribers
        .iter()
        .try_for_each(|name| one_copy(call, name, token))
}

/// Whether a call of the local application may become a message for a subscriber.
///
/// # Errors
/// `unauthorized`, naming the policy.
pub fn copy(call: &Call, policy: &Async, subscriber: &str) -> Result<(), ProxyError> {
    one_copy(
        call,
        subscriber,
        token_of(call, policy.secrets == Secrets::Keep),
    )
}

fn one_copy(call: &Call, subscriber: &str, token: Token<'_>) -> Result<(), ProxyError> {
    match call.snapshot.service(subscriber) {
        Some(service) => one_message(call, service, None, token),
        // Found out when it is delivered: it may be in the config by then.
        None => Ok(()),
    }
}

/// Whether a message may still be delivered to `service`, or become one: whoever delivers it must
/// be allowed to, and so must its `original` caller. Refused when every service that could take it
/// refuses.
///
/// # Errors
/// `unauthorized`, naming the policy.
pub fn delivery(
    call: &Call,
    service: &Service,
    route: &Route,
    original: Option<&SpiffeId>,
) -> Result<(), ProxyError> {
    any_target(call, service, route, original, token_of(call, true))
}

/// The token that a message has; only the callee reads it. None where it is not `kept`.
fn token_of(call: &Call, kept: bool) -> Token<'static> {
    match kept && jwt::has_bearer(&call.parts.headers) {
        true => Token::Unread,
        false => Token::None,
    }
}

fn any_target(
    call: &Call,
    service: &Service,
    route: &Route,
    original: Option<&SpiffeId>,
    token: Token<'_>,
) -> Result<(), ProxyError> {
    let mut refused = None;
    let backends = route.backends.iter().filter(|backend| backend.weight > 0);
    let mut targets = backends
        .filter_map(|backend| call.snapshot.services.get(backend.service))
        .map(|service| &**service)
        .peekable();
    if targets.peek().is_none() {
        return one_message(call, service, original, token);
    }
    for target in targets {
        match one_message(call, target, original, token) {
            Ok(()) => return Ok(()),
            Err(error) => refused = Some(error),
        }
    }
    refused.map_or(Ok(()), Err)
}

fn one_message(
    call: &Call,
    service: &Service,
    original: Option<&SpiffeId>,
    token: Token<'_>,
) -> Result<(), ProxyError> {
    let Some(policies) = &service.authorization else {
        return Ok(());
    };
    let known = service.spoken.mtls && service.spoken.peers.is_some();
    let svid = match known {
        true => call.worker.shared.identity.current(),
        false => None,
    };
    if known && svid.is_none() {
        // Who we are is not known now, and without a certificate nothing is sent to it: a message
        // must wait for one, not die of it.
        return Ok(());
    }
    let ask = |caller| {
        let asked = authz::Call {
            caller,
            address: None,
            token,
            request: Some(call.view()),
        };
        match policies.decide(&asked).refused {
            None => Ok(()),
            Some(refused) => Err(refusal(&refused, asked.caller, &service.name)),
        }
    };
    let us = svid.as_ref().map(|svid| &svid.id);
    ask(us)?;
    match original {
        // In plaintext nobody is shown who it was.
        Some(_) if us.is_some() && original != us => ask(original),
        _ => Ok(()),
    }
}

/// Who enqueued the message that a peer brings, if the peer shows it; the application is not shown
/// the proof.
///
/// # Errors
/// `unauthorized` when the proof is none.
fn original_caller(call: &mut Call) -> Result<(), ProxyError> {
    let Some(caller) = &call.caller else {
        // Whatever it says is taken out with all else that only a peer may say.
        return Ok(());
    };
    let fields = &mut call.parts.headers;
    let Some(shown) = fields.remove(headers::CALLER_STATEMENT) else {
        return Ok(());
    };
    let text = |value: &HeaderValue| value.to_str().unwrap_or_default().to_owned();
    let message = fields.get(headers::MESSAGE_ID).map(text);
    let believed = match call.worker.shared.identity.current() {
        Some(svid) => {
            let message = message.unwrap_or_default();
            statement::verify(&svid, &text(&shown), &message, clock::unix_now())
        }
        None => Err("this sidecar has no identity".to_owned()),
    };
    match believed {
        Ok(original) if original == caller.id => Ok(()),
        Ok(original) => {
            call.original_caller = Some(Box::new(original));
            Ok(())
        }
        Err(why) => {
            let detail = format!("who enqueued the message is not believed: {why}");
            Err(ProxyError::local(ErrorCode::Unauthorized, detail))
        }
    }
}

fn judge(
    policies: &Policies,
    asked: &authz::Call<'_>,
    service: &str,
    peer: Option<SocketAddr>,
    metrics: &Metrics,
) -> Result<(), ProxyError> {
    let Verdict { refused, audited } = policies.decide(asked);
    for policy in audited {
        audit(policy, asked, service, peer, metrics);
    }
    match refused {
        None => Ok(()),
        Some(refused) => Err(refusal(&refused, asked.caller, service)),
    }
}

fn refusal(refused: &Refused<'_>, caller: Option<&SpiffeId>, service: &str) -> ProxyError {
    let who = caller.map_or("a caller without identity", SpiffeId::as_str);
    let detail = match refused {
        Refused::Denied(policy) => format!("{policy} denies {who} this call to {service}"),
        Refused::NotAllowed(policies) => {
            let policies = policies.join(", ");
            format!("{policies} does not allow {who} this call to {service}")
        }
        Refused::Default => format!("the mesh allows nobody to call {service}: it has no policy"),
    };
    ProxyError::local(ErrorCode::Unauthorized, detail)
}

/// What an Audit policy meets is noted: it was asked for.
fn audit(
    policy: &str,
    asked: &authz::Call<'_>,
    service: &str,
    peer: Option<SocketAddr>,
    metrics: &Metrics,
) {
    let policy = if policy.is_empty() { "default" } else { policy };
    let labels = [("service", service), ("policy", policy)];
    metrics
        .counter("outrigger_authorization_audited_total", &labels)
        .increment(1);
    let caller = asked.caller.map_or("", SpiffeId::as_str);
    let request: Option<&RequestView<'_>> = asked.request.as_ref();
    let method = request.map_or("", |request| request.method.as_str());
    let path = request.map_or("", |request| request.path);
    info!(
        policy,
        service,
        caller,
        ?peer,
        method,
        path,
        "authorization audit"
    );
}
