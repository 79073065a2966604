//! The admin API: HTTP/1.1 for instances that register themselves, for programs and for people.
//!
//! Owns the listener, its limits and the guard of everything that changes state. What there is to
//! ask is in `routes`, how errors look in `problem`.

pub mod call;
mod instances;
pub mod openapi;
pub mod problem;
pub mod routes;
mod views;

use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, LengthLimitError, Limited};
use hyper::body::Incoming;
use hyper::header::{HOST, HeaderMap, ORIGIN};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tracing::{debug, warn};

use crate::app::App;
use crate::stop::Stop;
use problem::Problem;

/// An instance's registration is a few hundred bytes.
const MAX_BODY_BYTES: usize = 64 << 10;

/// Instances may keep their connection; this bounds memory.
const MAX_CONNECTIONS: usize = 10_000;

/// How long a request's head, and then its body, may take.
const READ_WITHIN: Duration = Duration::from_secs(10);

/// Serves until shutdown, then lets open requests finish.
pub async fn serve(listener: TcpListener, app: Arc<App>, mut stop: Stop) {
    let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut connections = JoinSet::new();
    let closing = stop.clone();
    let mut stopping = pin!(stop.requested());
    loop {
        let accept = async {
            let permit = permits.clone().acquire_owned().await;
            (
                permit.expect("the semaphore is never closed"),
                listener.accept().await,
            )
        };
        let (permit, accepted) = tokio::select! {
            () = &mut stopping => break,
            Some(_) = connections.join_next() => continue,
            accepted = accept => accepted,
        };
        match accepted {
            Ok((stream, peer)) => {
                let (app, closing) = (app.clone(), closing.clone());
                connections.spawn(async move {
                    connection(stream, peer, app, closing).await;
                    drop(permit);
                });
            }
            Err(e) => {
                warn!(error = %e, "admin connection not accepted");
                sleep(Duration::from_millis(100)).await;
            }
        }
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}

async fn connection(stream: TcpStream, peer: SocketAddr, app: Arc<App>, mut stop: Stop) {
    let _ = stream.set_nodelay(true);
    let service = service_fn(move |request| {
        let app = app.clone();
        async move { Ok::<_, Infallible>(respond(&app, peer, request).await) }
    });
    let mut connection = pin!(
        http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(READ_WITHIN)
            .max_buf_size(64 << 10)
            .serve_connection(TokioIo::new(stream), service)
    );
    let result = tokio::select! {
        result = connection.as_mut() => result,
        () = stop.requested() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(e) = result {
        debug!(error = %e, "admin connection ended");
    }
}

async fn respond(
    app: &Arc<App>,
    peer: SocketAddr,
    request: Request<Incoming>,
) -> Response<Full<Bytes>> {
    let (parts, body) = request.into_parts();
    let reads = parts.method == Method::GET || parts.method == Method::HEAD;
    if !reads && let Err(problem) = may_write(peer, &parts.headers) {
        return problem.into_response();
    }
    let body = match read_body(body).await {
        Ok(body) => body,
        Err(problem) => return problem.into_response(),
    };
    let who = peer.ip().to_canonical().to_string();
    let head = (&parts.method, &parts.uri, parts.headers);
    match routes::answer(app, who, head, body).await {
        Ok(response) => response,
        Err(problem) => problem.into_response(),
    }
}

pub(crate) async fn read_body(body: Incoming) -> Result<Bytes, Problem> {
    match timeout(READ_WITHIN, Limited::new(body, MAX_BODY_BYTES).collect()).await {
        Ok(Ok(collected)) => Ok(collected.to_bytes()),
        Ok(Err(e)) if e.is::<LengthLimitError>() => Err(Problem::too_large(MAX_BODY_BYTES)),
        Ok(Err(_)) => Err(Problem::bad_request("the body broke off")),
        Err(_) => Err(Problem::bad_request("the body did not arrive in time")),
    }
}

/// Nobody is authenticated yet, so only this machine may change anything; and not a web page that
/// happens to be open in a browser on it, by its own origin or by a name that points here.
fn may_write(peer: SocketAddr, headers: &HeaderMap) -> Result<(), Problem> {
    if !peer.ip().to_canonical().is_loopback() {
        return Err(Problem::unauthorized(
            "changes are accepted from this machine only",
        ));
    }
    let text = |name| headers.get(name).and_then(|v| v.to_str().ok());
    let host = text(HOST).unwrap_or_default();
    if !is_own_name(host) {
        return Err(Problem::unauthorized(
            "address the control plane by IP address or localhost",
        ));
    }
    match text(ORIGIN) {
        Some(origin) if origin.strip_prefix("http://") != Some(host) => Err(Problem::unauthorized(
            "changes are not accepted from web pages of other origins",
        )),
        _ => Ok(()),
    }
}

fn is_own_name(host: &str) -> bool {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name,
        _ => host,
    };
    let bare = name
        .strip_prefix('[')
        .and_then(|n| n.strip_suffix(']'))
        .unwrap_or(name);
    name.eq_ignore_ascii_case("localhost") || bare.parse::<IpAddr>().is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_this_machine_and_no_foreign_page_may_write() {
        let check = |peer: &str, host: &'static str, origin: Option<&'static str>, ok: bool| {
            let mut headers = HeaderMap::new();
            headers.insert(HOST, host.parse().expect("a value"));
            if let Some(origin) = origin {
                headers.insert(ORIGIN, origin.parse().expect("a value"));
            }
            let peer = SocketAddr::new(peer.parse().expect("an address"), 1);
            assert_eq!(
                may_write(peer, &headers).is_ok(),
                ok,
                "{peer} {host} {origin:?}"
            );
        };
        check("127.0.0.1", "127.0.0.1:15011", None, true);
        check("::1", "[::1]:15011", None, true);
        check("::ffff:127.0.0.1", "localhost", None, true);
        check("127.0.0.1", "localhost:1", Some("http://localhost:1"), true);
        check("10.0.0.1", "127.0.0.1:15011", None, false);
        check("127.0.0.1", "rebound.example:15011", None, false);
        check(
            "127.0.0.1",
            "localhost:1",
            Some("http://evil.example"),
            false,
        );
        check("127.0.0.1", "localhost:1", Some("null"), false);
    }
}
