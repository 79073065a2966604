//! Serves one downstream HTTP/2 connection with hyper and hands every request to `forward`.
//!
//! Owns the wire limits of a connection (header bytes, streams, windows, resets, idle timeout) and
//! its graceful end. What a single stream may do is [`streams`](crate::http::streams)'. Knows
//! nothing of routes.
//!
//! Stands on the life of a request.

use std::convert::Infallible;
use std::future::Future;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;

use http::{Method, Request, Response, StatusCode, request};
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::{TokioIo, TokioTimer};
use tracing::debug;

use crate::clock;
use crate::error;
use crate::forward;
use crate::http::body::ResponseBody;
use crate::http::context::Connection;
use crate::http::incoming::Incoming;
use crate::http::streams::{Sent, Stream, StreamExecutor, Streams};
use crate::http::switch::{self, Switch};
use crate::io::Io;
use crate::listener::accept;
use crate::telemetry::limits::WireLimit;
use crate::upstream::connect::STREAM_WINDOW;
use crate::worker::Worker;

/// Resets a peer may have pending before the connection ends (CVE-2023-44487).
const PENDING_RESETS: usize = 64;
/// Resets we answer a peer's broken frames with before the connection ends (RUSTSEC-2024-0003).
const ERROR_RESETS: usize = 1024;
/// How long a peer may take to end an idle connection after it was told to.
const GOODBYE: Duration = Duration::from_secs(5);

/// What a peer may send unread by connection: room for 32 streams that are not being read.
const CONNECTION_WINDOW: u32 = 8 * 1024 * 1024;

/// Serves HTTP/2 with prior knowledge until the connection ends or drains.
pub async fn serve(worker: Rc<Worker>, stream: Io, connection: Rc<Connection>) {
    let wire = &worker.shared.wire;
    let streams = Streams::new(Rc::clone(&worker));
    let mut builder = http2::Builder::new(StreamExecutor(Rc::clone(&streams)));
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
    let service = service(&worker, &connection, &streams);
    let serving = builder.serve_connection(TokioIo::new(stream), service_fn(service));
    let graceful = http2::Connection::graceful_shutdown;
    match run(&worker, &connection, &streams, serving, graceful).await {
        End::Served(Ok(())) => {}
        End::Served(Err(error)) => {
            debug!(peer = %connection.peer, error = error::chain(&error), "connection ended");
        }
        End::Idle => debug!(peer = %connection.peer, "connection closed: idle"),
        End::Abused => {
            worker.shared.refusals.count(WireLimit::Resets);
            debug!(peer = %connection.peer, "connection closed: most requests abandoned");
        }
    }
}

fn service(
    worker: &Rc<Worker>,
    connection: &Rc<Connection>,
    streams: &Rc<Streams>,
) -> impl Fn(Request<hyper::body::Incoming>) -> Answer + use<> {
    let (worker, connection) = (Rc::clone(worker), Rc::clone(connection));
    let streams = Rc::clone(streams);
    move |request: Request<hyper::body::Incoming>| {
        let (mut head, body) = request.into_parts();
        let opened = (head.method == Method::CONNECT)
            .then(|| tunnel(&worker, &mut head))
            .flatten();
        let request = Request::from_parts(head, Incoming::Http2(body));
        let (worker, connection) = (Rc::clone(&worker), Rc::clone(&connection));
        let stream = streams.begin();
        Box::pin(async move {
            let mut response = forward::serve(&worker, &connection, request).await;
            if let Some(opened) = opened {
                response = carry(&worker, &stream, response, opened);
            }
            Ok(response.map(|body| stream.answer(body)))
        })
    }
}

/// Reads an extended CONNECT as the request that it stands for, and keeps hold of the stream of
/// any CONNECT.
fn tunnel(worker: &Worker, head: &mut request::Parts) -> Option<OnUpgrade> {
    let stream = head.extensions.remove::<OnUpgrade>();
    let mut key = [0; 16];
    worker.rng().fill(&mut key);
    if let Some(switch) = Switch::of_http2(head, key) {
        head.extensions.insert(switch);
    }
    stream
}

/// Carries the tunnel that an answer opens over the stream of its request.
fn carry(
    worker: &Rc<Worker>,
    request: &Stream,
    response: Response<ResponseBody>,
    stream: OnUpgrade,
) -> Response<ResponseBody> {
    let (mut head, mut body) = response.into_parts();
    let Some(tunnel) = body.take_tunnel() else {
        return Response::from_parts(head, body);
    };
    if head.status == StatusCode::SWITCHING_PROTOCOLS {
        switch::answer_http2(&mut head);
    }
    let worker = Rc::clone(worker);
    let open = request.outlasted();
    tokio::task::spawn_local(async move {
        // The connection is not idle meanwhile.
        let _open = open;
        // The stream comes when the answer's head has gone out; it may be reset before.
        if let Ok(stream) = stream.await {
            // Dropping a stream that broke off resets it.
            let _ = tunnel.run(&mut TokioIo::new(stream), &worker.wheel).await;
        }
    });
    Response::from_parts(head, body)
}

/// One allocation a request: the future is too large to live in hyper's dispatcher, and hyper's
/// h2 layer would allocate it anyway.
type Answer = Pin<Box<dyn Future<Output = Result<Response<Sent>, Infallible>>>>;

/// Why a connection ended.
enum End {
    /// By itself.
    Served(hyper::Result<()>),
    /// Without requests for `wire.idleTimeout`.
    Idle,
    /// Its peer abandons what it begins.
    Abused,
}

/// Polls the connection beside its timeouts and the drain.
async fn run<C>(
    worker: &Rc<Worker>,
    connection: &Rc<Connection>,
    streams: &Rc<Streams>,
    serving: C,
    graceful: impl Fn(Pin<&mut C>),
) -> End
where
    C: Future<Output = hyper::Result<()>>,
{
    let mut serving = pin!(serving);
    let mut draining = pin!(accept::closing(&worker.shared.drain, connection.direction));
    let mut drained = false;
    let mut farewell = false;
    let idle = worker.shared.wire.idle_timeout;
    let mut timer = worker.wheel.sleep_until(clock::now() + idle);
    std::future::poll_fn(|cx| {
        if let Poll::Ready(ended) = serving.as_mut().poll(cx) {
            return Poll::Ready(End::Served(ended));
        }
        if streams.are_abused() {
            return Poll::Ready(End::Abused);
        }
        let mut leave = !drained && draining.as_mut().poll(cx).is_ready();
        drained |= leave;
        while Pin::new(&mut timer).poll(cx).is_ready() {
            let now = clock::now();
            match streams.idle_since() {
                Some(_) if farewell => return Poll::Ready(End::Idle),
                Some(since) if since + idle <= now => {
                    (farewell, leave) = (true, true);
                    timer.reset(now + GOODBYE);
                }
                None if farewell => timer.reset(now + GOODBYE),
                since => timer.reset(since.unwrap_or(now) + idle),
            }
        }
        if leave {
            graceful(serving.as_mut());
            return serving.as_mut().poll(cx).map(End::Served);
        }
        Poll::Pending
    })
    .await
}
