//! The admin API of a sidecar, on the control thread: health, metrics, and what it knows.
//!
//! `listen.probes` serves only health and metrics. Writes and everything that shows messages are
//! for loopback peers only. A thin layer: each resource is made by the module that owns it.

mod cache;
mod standing;
mod views;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http::header::CONTENT_TYPE;
use http::{HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use serde_json::{Value, json};
use tracing::warn;

use crate::app::Shared;
use crate::drain::Phase;
use crate::queueing;

/// The largest body of a request to the admin API.
const MAX_BODY: usize = 1024 * 1024;
/// Messages that are taken in at a time; one alone may have 16 MiB, and more as base64.
const MAX_IMPORT: usize = 64 << 20;

/// What a listener serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// Everything.
    Whole,
    /// `/livez`, `/readyz`, `/startupz` and `/metrics`.
    Probes,
}

type Answer = Response<Full<Bytes>>;

/// Serves one listener until the process ends.
pub async fn serve(shared: Arc<Shared>, socket: std::net::TcpListener, scope: Scope) {
    let listener = match tokio::net::TcpListener::from_std(socket) {
        Ok(listener) => listener,
        Err(error) => return warn!(%error, "admin listener lost"),
    };
    loop {
        let (stream, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                warn!(%error, "admin accept failed");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let shared = Arc::clone(&shared);
        tokio::task::spawn_local(async move {
            let service = service_fn(move |request| {
                let shared = Arc::clone(&shared);
                async move { Ok::<_, Infallible>(answer(&shared, peer, scope, request).await) }
            });
            // What a broken admin client did is of no interest.
            let _ = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(Duration::from_secs(10))
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
    }
}

async fn answer(
    shared: &Arc<Shared>,
    peer: SocketAddr,
    scope: Scope,
    request: Request<Incoming>,
) -> Answer {
    let path = request.uri().path().trim_end_matches('/').to_owned();
    let method = request.method().clone();
    match (&method, path.as_str()) {
        (&Method::GET | &Method::HEAD, "/livez") => return text(StatusCode::OK, "ok\n"),
        (&Method::GET | &Method::HEAD, "/readyz") => return readiness(shared),
        (&Method::GET | &Method::HEAD, "/startupz") => return startup(shared),
        (&Method::GET, "/metrics") => return metrics(shared).await,
        _ if scope == Scope::Probes => {
            return problem(
                StatusCode::NOT_FOUND,
                "this listener serves health and metrics only",
            );
        }
        (&Method::GET, "" | "/index.html") => return text(StatusCode::OK, views::INDEX),
        (&Method::GET, "/config") => return json_ok(&views::config(shared)),
        (&Method::GET, "/asyncapi.json") => return json_ok(&views::asyncapi(shared)),
        (&Method::GET, "/routes") => return json_ok(&views::routes(shared)),
        (&Method::GET, "/endpoints") => return json_ok(&views::endpoints(shared)),
        (&Method::GET, "/identity") => return json_ok(&views::identity(shared)),
        (&Method::GET, "/breakers") => return json_ok(&views::breakers(shared)),
        (&Method::GET, "/cache") => return json_ok(&cache::view(shared)),
        _ => {}
    }
    if !peer.ip().to_canonical().is_loopback() {
        return problem(
            StatusCode::FORBIDDEN,
            "only loopback peers may see messages or change anything",
        );
    }
    let query: Vec<(String, String)> =
        queueing::text::query_pairs(request.uri().query().unwrap_or("")).collect();
    let get = |key: &str| {
        query
            .iter()
            .find(|(name, _)| name == key)
            .map(|(_, value)| value.clone())
    };
    match (&method, path.as_str()) {
        (&Method::GET, "/queues") => outcome(queueing::inspect::queues(shared).await),
        (&Method::GET, "/queues/export") => outcome(queueing::export::export(shared, &get).await),
        (&Method::POST, "/queues/import") => match body_within(request, MAX_IMPORT).await {
            Ok(body) => outcome(queueing::export::import(shared, &body).await),
            Err(refused) => refused,
        },
        (&Method::GET, "/messages") => outcome(queueing::inspect::messages(shared, &get).await),
        (&Method::GET, "/dead") => outcome(queueing::inspect::dead(shared, &get).await),
        (&Method::GET, "/dead/groups") => outcome(queueing::inspect::groups(shared, &get).await),
        (&Method::GET, "/dead/audit") => json_ok(&queueing::inspect::audit(shared, &get).await),
        (&Method::POST, "/dead/replay") => match body(request).await {
            Ok(body) => outcome(queueing::inspect::replay(shared, &body).await),
            Err(refused) => refused,
        },
        (&Method::POST, "/dead/purge") => match body(request).await {
            Ok(body) => outcome(queueing::inspect::purge(shared, &body).await),
            Err(refused) => refused,
        },
        (&Method::POST, "/cache/purge") => match body(request).await {
            Ok(body) => outcome(cache::purge(shared, &body)),
            Err(refused) => refused,
        },
        (&Method::POST, "/drain") => {
            shared.drain.advance(Phase::Leaving);
            json_response(StatusCode::ACCEPTED, &json!({"draining": true}))
        }
        (&Method::PUT | &Method::POST, "/log") => match body(request).await {
            Ok(body) => match crate::cli::set_log(body["level"].as_str().unwrap_or_default()) {
                Ok(()) => json_ok(&json!({"level": body["level"]})),
                Err(problem_text) => problem(StatusCode::BAD_REQUEST, &problem_text),
            },
            Err(refused) => refused,
        },
        (&Method::GET, path) => match path.split('/').collect::<Vec<_>>().as_slice() {
            ["", "messages", id] => outcome(queueing::inspect::message(shared, id).await),
            ["", "dead", id] => outcome(queueing::inspect::dead_letter(shared, id).await),
            _ => problem(StatusCode::NOT_FOUND, "no such resource; GET / lists them"),
        },
        _ => problem(StatusCode::NOT_FOUND, "no such resource; GET / lists them"),
    }
}

/// Ready: a mesh config is in force, and an identity where one is to come, and nothing drains.
fn readiness(shared: &Shared) -> Answer {
    match not_ready(shared) {
        Some(why) => text(StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")),
        None => text(StatusCode::OK, "ok\n"),
    }
}

/// Why the sidecar is not ready; none when it is.
pub fn not_ready(shared: &Shared) -> Option<String> {
    if shared.drain.phase() != Phase::Running {
        return Some("draining".to_owned());
    }
    if !shared.store.load().configured() {
        return Some("no mesh config yet".to_owned());
    }
    if shared.identity.configured() && shared.identity.current().is_none() {
        let what = match shared.identity.generation() {
            0 => "no identity yet",
            _ => "the certificate has expired",
        };
        let why = shared.identity.problem();
        let why = why.map_or_else(String::new, |why| format!(": {why}"));
        return Some(format!("{what}{why}"));
    }
    None
}

fn startup(shared: &Shared) -> Answer {
    if shared.store.load().configured() {
        text(StatusCode::OK, "ok\n")
    } else {
        text(StatusCode::SERVICE_UNAVAILABLE, "no mesh config yet\n")
    }
}

async fn metrics(shared: &Arc<Shared>) -> Answer {
    views::refresh_metrics(shared);
    cache::refresh_metrics(shared);
    queueing::inspect::refresh_metrics(shared).await;
    let mut response = Response::new(Full::from(shared.metrics.render()));
    let format = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    response.headers_mut().insert(CONTENT_TYPE, format);
    response
}

async fn body(request: Request<Incoming>) -> Result<Value, Answer> {
    body_within(request, MAX_BODY).await
}

async fn body_within(request: Request<Incoming>, max: usize) -> Result<Value, Answer> {
    let collected = Limited::new(request.into_body(), max).collect().await;
    let Ok(collected) = collected else {
        return Err(problem(
            StatusCode::PAYLOAD_TOO_LARGE,
            "the body is too large or broke off",
        ));
    };
    let bytes = collected.to_bytes();
    if bytes.is_empty() {
        return Ok(json!({}));
    }
    serde_json::from_slice(&bytes)
        .map_err(|error| problem(StatusCode::BAD_REQUEST, &format!("not JSON: {error}")))
}

fn outcome(result: Result<Value, (StatusCode, String)>) -> Answer {
    match result {
        Ok(value) => json_ok(&value),
        Err((status, detail)) => problem(status, &detail),
    }
}

fn json_ok(value: &Value) -> Answer {
    json_response(StatusCode::OK, value)
}

fn json_response(status: StatusCode, value: &Value) -> Answer {
    let mut response = Response::new(Full::from(format!("{value:#}\n")));
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

fn problem(status: StatusCode, detail: &str) -> Answer {
    let title = status.canonical_reason().unwrap_or("error");
    let value = json!({"title": title, "status": status.as_u16(), "detail": detail});
    let mut response = json_response(status, &value);
    let kind = HeaderValue::from_static("application/problem+json");
    response.headers_mut().insert(CONTENT_TYPE, kind);
    response
}

fn text(status: StatusCode, text: impl Into<Bytes>) -> Answer {
    let mut response = Response::new(Full::new(text.into()));
    *response.status_mut() = status;
    let plain = HeaderValue::from_static("text/plain; charset=utf-8");
    response.headers_mut().insert(CONTENT_TYPE, plain);
    response
}
