//! The admin API: HTTP/1.1 for instances that register themselves, for programs and for people.
//!
//! Owns the listener and its limits. Who may change something is in `writers`, what there is to ask
//! in `routes`, how errors look in `problem`.

pub mod call;
mod instances;
pub mod openapi;
pub mod problem;
pub mod routes;
mod views;
pub mod writers;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, LengthLimitError, Limited};
use hyper::body::Incoming;
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
use writers::Writers;

/// An instance's registration is a few hundred bytes.
const MAX_BODY_BYTES: usize = 64 << 10;

/// Instances may keep their connection; this bounds memory.
const MAX_CONNECTIONS: usize = 10_000;

/// How long a request's head, and then its body, may take.
const READ_WITHIN: Duration = Duration::from_secs(10);

/// Serves until shutdown, then lets open requests finish.
pub async fn serve(listener: TcpListener, app: Arc<App>, writers: Arc<Writers>, mut stop: Stop) {
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
                let writers = writers.clone();
                connections.spawn(async move {
                    connection(stream, peer, app, writers, closing).await;
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

async fn connection(
    stream: TcpStream,
    peer: SocketAddr,
    app: Arc<App>,
    writers: Arc<Writers>,
    mut stop: Stop,
) {
    let _ = stream.set_nodelay(true);
    let service = service_fn(move |request| {
        let (app, writers) = (app.clone(), writers.clone());
        async move { Ok::<_, Infallible>(respond(&app, &writers, peer, request).await) }
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
    writers: &Writers,
    peer: SocketAddr,
    request: Request<Incoming>,
) -> Response<Full<Bytes>> {
    let (parts, body) = request.into_parts();
    let reads = parts.method == Method::GET || parts.method == Method::HEAD;
    let who = match reads {
        true => Ok(String::new()),
        false => writers.judge(peer, &parts.headers).await,
    };
    let who = match who {
        Ok(who) => who,
        Err(problem) => return problem.into_response(),
    };
    let body = match read_body(body).await {
        Ok(body) => body,
        Err(problem) => return problem.into_response(),
    };
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
