//! The accept loop of one listener on one worker.
//!
//! Stands at the head of the life of a request: permit, drain guard, original destination,
//! detection, then HTTP or opaque bytes.

use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use outrigger_config::model::AppProtocol;
use tokio::net::{TcpListener, TcpStream};
use tracing::{debug, warn};

use crate::clock;
use crate::destination;
use crate::drain::{Drain, Phase};
use crate::http::context::Connection;
use crate::http1;
use crate::http2;
use crate::identity::expiry::Expiry;
use crate::io::Io;
use crate::listener::detect::Detected;
use crate::listener::orig_dst::Refusal;
use crate::listener::tls::{Carried, Received};
use crate::listener::{Direction, detect, orig_dst, tls};
use crate::tcp;
use crate::telemetry::limits::WireLimit;
use crate::worker::Worker;

/// Pause after an accept that failed for want of file descriptors or memory: trying again at
/// once would spin, and connections wait in the backlog meanwhile.
const EXHAUSTED_PAUSE: Duration = Duration::from_millis(50);

/// Accepts until the drain reaches this direction's phase; then the socket closes, and open
/// connections finish by themselves.
pub async fn serve(worker: Rc<Worker>, listener: TcpListener, direction: Direction) {
    let drain = worker.shared.drain.clone();
    let mut closing = std::pin::pin!(closing(&drain, direction));
    loop {
        let accepted = tokio::select! {
            biased;
            () = &mut closing => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, peer)) => {
                // A listener of both families sees IPv4 peers as IPv6 ones.
                let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
                admit(&worker, stream, peer, direction);
            }
            Err(error) if transient(&error) => debug!(%error, "connection gone before accept"),
            Err(error) => {
                warn!(%error, direction = direction.as_str(), "accept failed");
                tokio::time::sleep(EXHAUSTED_PAUSE).await;
            }
        }
    }
}

/// Resolves when connections of this direction should finish.
pub async fn closing(drain: &Drain, direction: Direction) {
    let phase = match direction {
        Direction::Inbound => Phase::Draining,
        Direction::Outbound => Phase::Closing,
    };
    drain.reached(phase).await;
}

/// Resolves when a connection should finish: in a drain, or because its peer is known no more.
pub async fn leaving(worker: &Worker, connection: &Connection) {
    let closing = closing(&worker.shared.drain, connection.direction);
    let Some(leaves) = connection.leaves else {
        return closing.await;
    };
    // Boxed: connections without it are as small as before.
    Box::pin(async {
        tokio::select! {
            () = closing => {}
            () = worker.wheel.sleep_until(leaves) => {}
        }
    })
    .await;
}

fn admit(worker: &Rc<Worker>, stream: TcpStream, peer: SocketAddr, direction: Direction) {
    let shared = &worker.shared;
    let guard = shared.drain.guard(direction == Direction::Inbound);
    let (inbound, outbound) = shared.drain.open();
    let max = shared.wire.max_connections;
    if max > 0 && inbound + outbound > max {
        shared.refusals.count(WireLimit::Connections);
        debug!(max, %peer, "connection refused: wire.maxConnections reached");
        return;
    }
    // See `connect::tcp`: a socket that refuses this is dead already.
    let _ = stream.set_nodelay(true);
    let worker = Rc::clone(worker);
    tokio::task::spawn_local(async move {
        let _guard = guard;
        connection(worker, stream, peer, direction).await;
    });
}

async fn connection(worker: Rc<Worker>, stream: TcpStream, peer: SocketAddr, direction: Direction) {
    let shared = &worker.shared;
    let original = orig_dst::original(&stream);
    let has_app = shared.bootstrap.app.is_some();
    if let Err(refusal) = orig_dst::judge(direction, original, has_app, &shared.listeners) {
        return refuse(&worker, &stream, peer, direction, original, refusal);
    }
    let mut connection = Connection::new(peer, direction, original);
    let declared = destination::declared(&worker, &worker.snapshot(), &connection);
    let mut stream = stream;
    if direction == Direction::Inbound && shared.identity.configured() {
        // Boxed: a handshake is large, and over when requests come.
        let receiving = tls::receive(&worker, stream, &mut connection, declared);
        match Box::pin(receiving).await {
            Received::Plain(plain) => stream = plain,
            Received::Secure(io, carried) => {
                return secure(worker, io, carried, connection).await;
            }
            Received::Refused(stream, refusal) => {
                return refuse(&worker, &stream, peer, direction, original, refusal);
            }
            Received::Over => return,
        }
    }
    let connection = Rc::new(connection);
    if let Some(AppProtocol::Tcp | AppProtocol::Tls) = declared {
        // Nothing is waited for: the server may be the one that speaks first.
        return Box::pin(tcp::serve(&worker, Io::Plain(stream), &connection, None)).await;
    }
    let Some(told) = first_bytes(&worker, &stream, &connection, declared.is_some()).await else {
        return;
    };
    match told {
        // Boxed like the others: the task of an idle HTTP/1.1 connection is as small as it can be.
        Detected::Http2 => {
            Box::pin(http2::server::serve(worker, Io::Plain(stream), connection)).await;
        }
        // What is declared wins: whatever else it is, it is answered as broken HTTP.
        Detected::Http1 | Detected::Tls(_) | Detected::Opaque
            if declared.is_some() || told == Detected::Http1 =>
        {
            http1::server::serve(worker, Io::Plain(stream), connection).await;
        }
        Detected::Tls(hello) => {
            Box::pin(tcp::serve(&worker, Io::Plain(stream), &connection, hello)).await;
        }
        _ if direction == Direction::Outbound && original.is_none() => {
            let refusal = Refusal::NoDestination;
            refuse(&worker, &stream, peer, direction, original, refusal);
        }
        _ => Box::pin(tcp::serve(&worker, Io::Plain(stream), &connection, None)).await,
    }
}

/// Serves what a verified peer carries within TLS.
async fn secure(worker: Rc<Worker>, io: Io, carried: Carried, connection: Connection) {
    let expiry = io.expiry().cloned();
    let connection = Rc::new(Connection {
        leaves: expiry.as_ref().map(Expiry::at),
        ..connection
    });
    let wheel = worker.wheel.clone();
    // Each in a box: they are large, and of different sizes.
    let serving = async {
        match carried {
            Carried::Http2 => Box::pin(http2::server::serve(worker, io, connection)).await,
            Carried::Http1 => Box::pin(http1::server::serve(worker, io, connection)).await,
            Carried::Tcp => Box::pin(tcp::serve(&worker, io, &connection, None)).await,
        }
    };
    match expiry {
        Some(expiry) => {
            expiry.watch(&wheel, serving).await;
        }
        None => serving.await,
    }
}

/// What the peer speaks; none when the connection is over before that is known.
///
/// A peer that stays silent waits for its server to speak first, if there is one to pass the
/// connection on to; else it has as long as a head may take.
async fn first_bytes(
    worker: &Worker,
    stream: &TcpStream,
    connection: &Connection,
    http: bool,
) -> Option<Detected> {
    let wire = &worker.shared.wire;
    let explicit = connection.direction == Direction::Outbound && connection.original.is_none();
    let may_pass = !http && !explicit;
    let patience = match wire.detect_timeout {
        Some(detect) if may_pass => detect.min(wire.header_timeout),
        _ => wire.header_timeout,
    };
    let peer = connection.peer;
    tokio::select! {
        biased;
        detected = detect::detect(stream) => match detected {
            Ok(detected) => Some(detected),
            Err(error) => {
                debug!(%peer, %error, "connection closed before its first request");
                None
            }
        },
        () = worker.wheel.sleep_until(clock::now() + patience) => {
            (may_pass && wire.detect_timeout.is_some()).then_some(Detected::Opaque)
        }
        () = closing(&worker.shared.drain, connection.direction) => None,
    }
}

fn refuse(
    worker: &Worker,
    stream: &TcpStream,
    peer: SocketAddr,
    direction: Direction,
    original: Option<SocketAddr>,
    refusal: Refusal,
) {
    let reason = refusal.as_str();
    debug!(%peer, ?original, direction = direction.as_str(), reason, "connection refused");
    let labels = [("direction", direction.as_str()), ("reason", reason)];
    let metrics = &worker.shared.metrics;
    metrics
        .counter("outrigger_connections_refused_total", &labels)
        .increment(1);
    // A proper end would read as an answer of zero bytes.
    let _ = stream.set_zero_linger();
}

fn transient(error: &std::io::Error) -> bool {
    use std::io::ErrorKind as Kind;
    matches!(
        error.kind(),
        Kind::ConnectionAborted | Kind::ConnectionReset | Kind::Interrupted | Kind::WouldBlock
    )
}
