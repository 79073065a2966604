//! Serves one downstream connection with hyper and hands every request to `forward`.
//!
//! Owns the wire limits of a connection (header count and bytes, streams, windows, head and idle
//! timeouts) and its graceful end. Knows nothing of routes.
//!
//! Stands on the life of a request.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use http::{Request, Response};
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tracing::debug;

use crate::clock;
use crate::error;
use crate::forward;
use crate::http::body::ResponseBody;
use crate::http::context::Connection;
use crate::listener::accept;
use crate::upstream::connect::{CONNECTION_WINDOW, STREAM_WINDOW};
use crate::worker::{LocalExecutor, Worker};

/// Resets a peer may have pending before the connection ends (CVE-2023-44487).
const PENDING_RESETS: usize = 64;
/// Resets we answer a peer's broken frames with before the connection ends (RUSTSEC-2024-0003).
const ERROR_RESETS: usize = 1024;

/// Serves HTTP/1.1 until the connection ends or drains.
pub async fn http1(worker: Rc<Worker>, stream: TcpStream, connection: Rc<Connection>) {
    let wire = &worker.shared.wire;
    let io = TokioIo::new(Watched {
        stream,
        connection: Rc::clone(&connection),
    });
    let mut builder = http1::Builder::new();
    builder
        // A client that closes its sending side is gone, as nginx and Envoy see it: the upstream
        // is freed at once.
        .half_close(false)
        .max_headers(wire.max_headers)
        .max_header_size(wire.max_header_bytes)
        .header_read_timeout(None);
    let service = service(&worker, &connection);
    let serving = builder.serve_connection(io, service_fn(service));
    run(
        &worker,
        &connection,
        serving,
        http1::Connection::graceful_shutdown,
    )
    .await;
}

/// Serves HTTP/2 with prior knowledge until the connection ends or drains.
pub async fn http2(worker: Rc<Worker>, stream: TcpStream, connection: Rc<Connection>) {
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
) -> impl Fn(Request<Incoming>) -> Answer + use<> {
    let (worker, connection) = (Rc::clone(worker), Rc::clone(connection));
    move |request| {
        let (worker, connection) = (Rc::clone(&worker), Rc::clone(&connection));
        let in_flight = connection.begin();
        Box::pin(async move {
            let response = forward::serve(&worker, &connection, request).await;
            Ok(response.map(|body| body.until_sent(in_flight)))
        })
    }
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

/// A socket that tells its connection when bytes arrive.
struct Watched {
    stream: TcpStream,
    connection: Rc<Connection>,
}

impl AsyncRead for Watched {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let polled = Pin::new(&mut self.stream).poll_read(cx, buf);
        if buf.filled().len() > before {
            self.connection.note_read();
        }
        polled
    }
}

impl AsyncWrite for Watched {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}
