//! The accept loop of one listener on one worker.
//!
//! Stands at the head of the life of a request: permit, drain guard, detection, then HTTP.

use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use outrigger_core::sniff::Protocol;
use tokio::net::{TcpListener, TcpStream};
use tracing::{debug, warn};

use crate::clock;
use crate::drain::{Drain, Phase};
use crate::http::context::Connection;
use crate::http::http2;
use crate::http1;
use crate::listener::{Direction, detect};
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
            Ok((stream, peer)) => admit(&worker, stream, peer, direction),
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

fn admit(worker: &Rc<Worker>, stream: TcpStream, peer: SocketAddr, direction: Direction) {
    let shared = &worker.shared;
    let guard = shared.drain.guard(direction == Direction::Inbound);
    let (inbound, outbound) = shared.drain.open();
    let max = shared.wire.max_connections;
    if max > 0 && inbound + outbound > max {
        shared.refusals.count(WireLimit::Connections);
        warn!(max, %peer, "connection refused: wire.maxConnections reached");
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
    let deadline = clock::now() + worker.shared.wire.header_timeout;
    let detected = tokio::select! {
        biased;
        detected = detect::detect(&stream) => detected,
        () = worker.wheel.sleep_until(deadline) => return,
        () = closing(&worker.shared.drain, direction) => return,
    };
    let connection = Rc::new(Connection::new(peer, direction));
    match detected {
        Ok(Protocol::Http1) => http1::server::serve(worker, stream, connection).await,
        Ok(Protocol::Http2) => http2::serve(worker, stream, connection).await,
        Ok(other) => debug!(%peer, protocol = ?other, "connection refused: not HTTP"),
        Err(error) => debug!(%peer, %error, "connection closed before its first request"),
    }
}

fn transient(error: &std::io::Error) -> bool {
    use std::io::ErrorKind as Kind;
    matches!(
        error.kind(),
        Kind::ConnectionAborted | Kind::ConnectionReset | Kind::Interrupted | Kind::WouldBlock
    )
}
