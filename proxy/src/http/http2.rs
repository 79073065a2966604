//! Serves one downstream HTTP/2 connection with hyper and hands every request to `forward`.
//!
//! Owns the wire limits of a connection (header bytes, streams, windows, idle timeout) and its
//! graceful end. Knows nothing of routes.
//!
//! Stands on the life of a request.

use std::convert::Infallible;
use std::future::Future;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;

use http::{Method, Request, Response, request};
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpStream;
use tracing::debug;

use crate::clock;
use crate::error;
use crate::forward;
use crate::http::body::ResponseBody;
use crate::http::context::Connection;
use crate::http::incoming::Incoming;
use crate::http::switch::{self, Switch};
use crate::listener::accept;
use crate::upstream::connect::{CONNECTION_WINDOW, STREAM_WINDOW};
use crate::worker::{LocalExecutor, Worker};

/// Resets a peer may have pending before the connection ends (CVE-2023-44487).
const PENDING_RESETS: usize = 64;
/// Resets we answer a peer's broken frames with before the connection ends (RUSTSEC-2024-0003).
const ERROR_RESETS: usize = 1024;

/// Serves HTTP/2 with prior knowledge until the connection ends or drains.
pub async fn serve(worker: Rc<Worker>, stream: TcpStream, connection: Rc<Connection>) {
    let wire = &worker.shared.wire;
    // Not watched: between requests h2 peers talk about windows and pings, which begin no head.
    // The preface was seen, so there is no first head to wait for either.
    connection.greeted();
    let io = TokioIo::new(stream);
    let mut builder = http2::Builder::new(LocalExecutor);
    builder
        .timer(TokioTimer::new())
        .max_concurrent_streams(wire.max_streams)
        .max_header_list_size(u32::try_from(wire.max_header_bytes).unwrap_or(u32::MAX))
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .enable_connect_protocol()
        .max_pending_accept_reset_streams(PENDING_RESETS)
        .max_local_error_reset_streams(ERROR_RESETS)
        .keep_alive_interval(Duration::from_secs(60))
        .keep_alive_timeout(Duration::from_secs(20));
    let service = service(&worker, &connection);
    let serving = builder.serve_connection(io, service_fn(service));
    run(
        &worker,
        &connection,
        serving,
        http2::Connection::graceful_shutdown,
    )
    .await;
}

fn service(
    worker: &Rc<Worker>,
    connection: &Rc<Connection>,
) -> impl Fn(Request<hyper::body::Incoming>) -> Answer + use<> {
    let (worker, connection) = (Rc::clone(worker), Rc::clone(connection));
    move |request: Request<hyper::body::Incoming>| {
        let (mut head, body) = request.into_parts();
        let opened = (head.method == Method::CONNECT)
            .then(|| tunnel(&worker, &mut head))
            .flatten();
        let request = Request::from_parts(head, Incoming::Http2(body));
        let (worker, connection) = (Rc::clone(&worker), Rc::clone(&connection));
        let in_flight = connection.begin();
        Box::pin(async move {
            let mut response = forward::serve(&worker, &connection, request).await;
            if let Some(opened) = opened {
                response = carry(&worker, response, opened);
            }
            Ok(response.map(|body| body.until_sent(in_flight)))
        })
    }
}

/// Reads an extended CONNECT as the request that it stands for, and keeps hold of its stream.
fn tunnel(worker: &Worker, head: &mut request::Parts) -> Option<OnUpgrade> {
    let stream = head.extensions.remove::<OnUpgrade>();
    let mut key = [0; 16];
    worker.rng().fill(&mut key);
    let switch = Switch::of_http2(head, key)?;
    head.extensions.insert(switch);
    stream
}

/// Carries the tunnel that an answer opens over the stream of its request.
fn carry(
    worker: &Rc<Worker>,
    response: Response<ResponseBody>,
    stream: OnUpgrade,
) -> Response<ResponseBody> {
    let (mut head, mut body) = response.into_parts();
    let Some(tunnel) = body.take_tunnel() else {
        return Response::from_parts(head, body);
    };
    switch::answer_http2(&mut head);
    let worker = Rc::clone(worker);
    tokio::task::spawn_local(async move {
        // The stream comes when the answer's head has gone out; it may be reset before.
        if let Ok(stream) = stream.await {
            tunnel.run(TokioIo::new(stream), &worker.wheel).await;
        }
    });
    Response::from_parts(head, body)
}

/// One allocation a request: the future is too large to live in hyper's dispatcher, and hyper's
/// h2 layer would allocate it anyway.
type Answer = Pin<Box<dyn Future<Output = Result<Response<ResponseBody>, Infallible>>>>;

/// Polls the connection beside its timeouts and the drain.
async fn run<C>(
    worker: &Rc<Worker>,
    connection: &Rc<Connection>,
    serving: C,
    graceful: impl Fn(Pin<&mut C>),
) where
    C: Future<Output = hyper::Result<()>>,
{
    let mut serving = pin!(serving);
    let mut draining = pin!(accept::closing(&worker.shared.drain, connection.direction));
    let mut drained = false;
    let head = worker.shared.wire.header_timeout;
    let idle = worker.shared.wire.idle_timeout;
    let mut timer = worker.wheel.sleep_until(clock::now() + head);
    let ended = std::future::poll_fn(|cx| {
        if let Poll::Ready(ended) = serving.as_mut().poll(cx) {
            return Poll::Ready(Some(ended));
        }
        if !drained && draining.as_mut().poll(cx).is_ready() {
            drained = true;
            graceful(serving.as_mut());
            if let Poll::Ready(ended) = serving.as_mut().poll(cx) {
                return Poll::Ready(Some(ended));
            }
        }
        // A head that has just begun is due before what the timer was set for.
        if let Some(due) = connection.deadline(head, idle)
            && due < timer.deadline()
        {
            timer.reset(due);
        }
        while Pin::new(&mut timer).poll(cx).is_ready() {
            let now = clock::now();
            match connection.deadline(head, idle) {
                Some(due) if due <= now => return Poll::Ready(None),
                due => timer.reset(due.unwrap_or(now + idle)),
            }
        }
        Poll::Pending
    })
    .await;
    match ended {
        Some(Ok(())) => {}
        Some(Err(error)) => {
            debug!(peer = %connection.peer, error = error::chain(&error), "connection ended");
        }
        None => debug!(peer = %connection.peer, "connection closed: no progress"),
    }
}
