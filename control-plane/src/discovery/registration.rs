//! Sidecars that announce their own workload, on the listener and with the credentials of their
//! stream: the admin API takes changes from its own machine only.
//!
//! Owns who may announce which service. The requests themselves are the registry's part of
//! `admin/routes.rs`.

use std::sync::Arc;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::{Method, Request, Response};
use tonic::body::Body;
use tracing::warn;

use crate::admin::call::service_of;
use crate::admin::problem::Problem;
use crate::admin::{read_body, routes};
use crate::app::App;
use crate::ca::Refused;
use crate::security::Peer;

/// Whether a request is one of these: nothing else of the admin API is served here.
pub fn is_one(method: &Method, path: &str) -> bool {
    let segments: Vec<&str> = path.split('/').skip(1).collect();
    match segments.as_slice() {
        ["v1", "services", _, "instances"] => method == Method::POST,
        ["v1", "services", _, "instances", _] => method == Method::DELETE,
        ["v1", "services", _, "instances", _, "heartbeat" | "state"] => method == Method::PUT,
        _ => false,
    }
}

/// Answers one of them.
pub async fn answer(app: &Arc<App>, peer: &Peer, request: Request<Incoming>) -> Response<Body> {
    let answer = match try_answer(app, peer, request).await {
        Ok(response) => response,
        Err(problem) => problem.into_response(),
    };
    answer.map(Body::new)
}

async fn try_answer(
    app: &Arc<App>,
    peer: &Peer,
    request: Request<Incoming>,
) -> Result<Response<Full<Bytes>>, Problem> {
    let (parts, body) = request.into_parts();
    let caller = app.guard.subscriber(peer, &parts.headers).await;
    let caller = caller.map_err(|refused| match refused {
        Refused::Unable(why) => Problem::unavailable("unavailable", why),
        refused => Problem::unauthorized(refused.to_string()),
    })?;
    let service = service_of(&parts.uri)?;
    let denied = |why: &str| {
        warn!(service, peer = %peer.addr, why, "registration refused");
        Err(Problem::unauthorized(why))
    };
    if !caller.is_known() && !peer.addr.ip().to_canonical().is_loopback() {
        return denied("instances are registered by who has a certificate of ours or a join token");
    }
    // A service that nobody may claim an identity for belongs to its namespace.
    let accounts = app.accounts(&service);
    let may = match service.split_once('/') {
        _ if !accounts.is_empty() => accounts
            .iter()
            .any(|(namespace, account)| caller.may_be(namespace, account).is_ok()),
        Some((namespace, _)) => caller.may_be_in(namespace),
        None => false,
    };
    if !may {
        return denied("the caller is none of the service's workloads (identity.serviceAccounts)");
    }
    let body = read_body(body).await?;
    let head = (&parts.method, &parts.uri, parts.headers);
    routes::answer(app, caller.credential(), head, body).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_but_instances_is_served() {
        let check = |method: Method, path: &str, expected| {
            assert_eq!(is_one(&method, path), expected, "{method} {path}");
        };
        check(Method::POST, "/v1/services/shop%2Fa/instances", true);
        check(Method::DELETE, "/v1/services/a/instances/1", true);
        check(Method::PUT, "/v1/services/a/instances/1/heartbeat", true);
        check(Method::PUT, "/v1/services/a/instances/1/state", true);
        check(Method::GET, "/v1/services/a/instances", false);
        check(Method::POST, "/v1/services/a/confirm", false);
        check(Method::GET, "/v1/proxies", false);
        check(Method::POST, "/v1/rollouts", false);
        check(Method::PUT, "/v1/services/a/instances/1/", false);
    }
}
