//! Serves one downstream HTTP/2 connection and hands every request to `forward`.
//!
//! Owns the wire limits of a connection (header bytes, streams, windows, resets, idle timeout) and
//! its graceful end. Knows nothing of routes.
//!
//! Stands on the life of a request.

use std::future::Future;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use h2::server::{Builder, Connection as Driver};
use h2::{Ping, PingPong};
use tokio::io::{AsyncRead, AsyncWrite};
use tracing::debug;

use crate::clock;
use crate::http::context::Connection;
use crate::http2::exchange;
use crate::http2::streams::Streams;
use crate::http2::turn::Turn;
use crate::listener::accept;
use crate::telemetry::limits::WireLimit;
use crate::upstream::connect::STREAM_WINDOW;
use crate::wheel::Sleep;
use crate::worker::Worker;

/// Resets a peer may have pending before the connection ends (CVE-2023-44487).
const PENDING_RESETS: usize = 64;
/// Resets we answer a peer's broken frames with before the connection ends (RUSTSEC-2024-0003).
const ERROR_RESETS: usize = 1024;
/// How long a peer may take to end an idle connection after it was told to.
const GOODBYE: Duration = Duration::from_secs(5);
/// A peer that has begun nothing for this long is asked for a sign of life.
const PING_EVERY: Duration = Duration::from_secs(60);
/// The peer is gone when it gives none for this long.
const PONG_WITHIN: Duration = Duration::from_secs(20);

/// What a peer may send unread by connection: room for 32 streams that are not being read.
const CONNECTION_WINDOW: u32 = 8 * 1024 * 1024;

/// Serves HTTP/2 with prior knowledge until the connection ends or drains.
pub async fn serve<T>(worker: Rc<Worker>, stream: T, connection: Rc<Connection>)
where
    T: AsyncRead + AsyncWrite + Unpin,
{
    let peer = connection.peer;
    let Some(driver) = greet(&worker, stream).await else {
        debug!(%peer, "connection closed before its first request");
        return;
    };
    match run(&worker, &connection, driver).await {
        End::Served => {}
        End::Broken(error) => debug!(%peer, %error, "connection ended"),
        End::Idle => debug!(%peer, "connection closed: idle"),
        End::Silent => debug!(%peer, "connection closed: no sign of life"),
        End::Abused => {
            worker.shared.refusals.count(WireLimit::Resets);
            debug!(%peer, "connection closed: most requests abandoned");
        }
    }
}

/// Exchanges the first frames; none when the peer takes no part in it.
async fn greet<T>(worker: &Worker, stream: T) -> Option<Driver<T, Bytes>>
where
    T: AsyncRead + AsyncWrite + Unpin,
{
    let wire = &worker.shared.wire;
    let mut builder = Builder::new();
    builder
        .max_concurrent_streams(wire.max_streams)
        .max_header_list_size(u32::try_from(wire.max_header_bytes).unwrap_or(u32::MAX))
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .enable_connect_protocol()
        .max_pending_accept_reset_streams(PENDING_RESETS)
        .max_local_error_reset_streams(Some(ERROR_RESETS));
    let patience = worker.wheel.sleep_until(clock::now() + wire.header_timeout);
    tokio::select! {
        biased;
        driver = builder.handshake(stream) => driver.ok(),
        () = patience => None,
    }
}

/// Why a connection ended.
enum End {
    /// By itself.
    Served,
    /// By an error on either side.
    Broken(h2::Error),
    /// Without requests for `wire.idleTimeout`.
    Idle,
    /// Its peer does not answer any more.
    Silent,
    /// Its peer abandons what it begins.
    Abused,
}

/// Polls the connection and its requests beside their timeouts and the drain.
async fn run<T>(worker: &Rc<Worker>, connection: &Rc<Connection>, driver: Driver<T, Bytes>) -> End
where
    T: AsyncRead + AsyncWrite + Unpin,
{
    let mut driver = driver;
    let streams = Streams::new();
    let mut running = FuturesUnordered::new();
    let mut draining = pin!(accept::leaving(worker, connection));
    let mut drained = false;
    let mut watch = Watch::new(worker, driver.ping_pong());
    let turn = Turn::new();
    std::future::poll_fn(|cx| {
        let mut leave = !drained && draining.as_mut().poll(cx).is_ready();
        drained |= leave;
        match watch.poll(cx, &streams) {
            None => {}
            Some(Due::Farewell) => leave = true,
            Some(Due::End(end)) => return Poll::Ready(end),
        }
        if leave {
            driver.graceful_shutdown();
            turn.connection.wake();
        }
        turn.poll(cx, || {
            // First what answers, so that it leaves with the reading that follows.
            if let Some(mut cx) = turn.requests.woken() {
                while let Poll::Ready(Some(())) = running.poll_next_unpin(&mut cx) {}
                if streams.are_abused() {
                    return Poll::Ready(End::Abused);
                }
            }
            let Some(mut cx) = turn.connection.woken() else {
                return Poll::Pending;
            };
            loop {
                match driver.poll_accept(&mut cx) {
                    Poll::Ready(Some(Ok((request, respond)))) => {
                        let (worker, connection) = (Rc::clone(worker), Rc::clone(connection));
                        let stream = streams.begin();
                        let exchange =
                            exchange::serve(worker, connection, stream, request, respond);
                        running.push(exchange);
                        // It has to be polled once before anything wakes it.
                        turn.requests.wake();
                    }
                    Poll::Ready(Some(Err(error))) => return Poll::Ready(End::Broken(error)),
                    Poll::Ready(None) => return Poll::Ready(End::Served),
                    Poll::Pending => return Poll::Pending,
                }
            }
        })
    })
    .await
}

/// The times at which something is due though nothing happens.
struct Watch {
    idle: Sleep,
    idle_timeout: Duration,
    /// The peer was told to leave.
    farewell: bool,
    pings: Option<PingPong>,
    ping: Sleep,
    /// The peer was asked for a sign of life.
    asked: bool,
}

/// What is due.
enum Due {
    /// The peer should be told to leave.
    Farewell,
    /// The connection's end.
    End(End),
}

impl Watch {
    fn new(worker: &Worker, pings: Option<PingPong>) -> Self {
        let (wheel, now) = (&worker.wheel, clock::now());
        let idle_timeout = worker.shared.wire.idle_timeout;
        Self {
            idle: wheel.sleep_until(now + idle_timeout),
            idle_timeout,
            farewell: false,
            pings,
            ping: wheel.sleep_until(now + PING_EVERY),
            asked: false,
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>, streams: &Streams) -> Option<Due> {
        self.poll_idle(cx, streams)
            .or_else(|| self.poll_ping(cx, streams).map(Due::End))
    }

    fn poll_idle(&mut self, cx: &mut Context<'_>, streams: &Streams) -> Option<Due> {
        let mut due = None;
        while Pin::new(&mut self.idle).poll(cx).is_ready() {
            let now = clock::now();
            match streams.idle_since() {
                Some(_) if self.farewell => return Some(Due::End(End::Idle)),
                Some(since) if since + self.idle_timeout <= now => {
                    self.farewell = true;
                    due = Some(Due::Farewell);
                    self.idle.reset(now + GOODBYE);
                }
                None if self.farewell => self.idle.reset(now + GOODBYE),
                since => self.idle.reset(since.unwrap_or(now) + self.idle_timeout),
            }
        }
        due
    }

    fn poll_ping(&mut self, cx: &mut Context<'_>, streams: &Streams) -> Option<End> {
        let pings = self.pings.as_mut()?;
        if self.asked && pings.poll_pong(cx).is_ready() {
            self.asked = false;
            self.ping.reset(clock::now() + PING_EVERY);
        }
        while Pin::new(&mut self.ping).poll(cx).is_ready() {
            if self.asked {
                return Some(End::Silent);
            }
            let (now, due) = (clock::now(), streams.last_begun() + PING_EVERY);
            if due > now {
                self.ping.reset(due);
                continue;
            }
            self.asked = pings.send_ping(Ping::opaque()).is_ok();
            let next = if self.asked { PONG_WITHIN } else { PING_EVERY };
            self.ping.reset(now + next);
            if self.asked {
                // Registers for the answer.
                let _ = pings.poll_pong(cx);
            }
        }
        None
    }
}
