//! Opaque connections: bytes of any protocol, passed through to an endpoint of a service.
//!
//! The endpoint is picked and watched as for requests (balance, ejection, `limits.maxInFlight`
//! with a connection counted like a request, `connection.connectTimeout` and `maxPerEndpoint`);
//! breaker and retry policy are about requests and play no part. A connect that fails is tried
//! again elsewhere, because nothing was sent.
//!
//! A connection that we cannot serve is reset, not closed: a proper end would read as an answer
//! of zero bytes. In a drain, connections go on until they end or the drain's bound cuts them;
//! these protocols have no word for "finish".
//!
//! Stands on the life of a request.

pub mod copy;
mod record;

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use outrigger_core::client_hello::ClientHello;
use outrigger_core::error_code::ErrorCode;
use outrigger_core::outcome::Observed;
use tracing::debug;

use crate::authorize;
use crate::clock;
use crate::destination::{self, Onward, Wish};
use crate::error::chain;
use crate::http::context::Connection;
use crate::identity::svid::MESH_TCP;
use crate::identity::{self, verify};
use crate::io::Io;
use crate::listener::Direction;
use crate::snapshot::{Algorithm, Service, affinity};
use crate::tcp::copy::{Ended, Idle, Side};
use crate::tcp::record::{Ending, Record};
use crate::telemetry::limits::WireLimit;
use crate::upstream::connect::{self, ConnectError};
use crate::upstream::endpoint::EndpointUse;
use crate::worker::Worker;

/// Endpoints that a connection tries at most.
const TRIES: usize = 3;

/// Passes the connection through to its end.
pub async fn serve(
    worker: &Rc<Worker>,
    mut stream: Io,
    connection: &Connection,
    hello: Option<ClientHello>,
) {
    let mut record = Record::start(worker, connection, hello.as_ref());
    let mut upstream = match open(worker, connection, hello.as_ref(), &mut record).await {
        Ok(upstream) => upstream,
        Err(refused) => {
            debug!(peer = %connection.peer, code = refused.code.as_str(), detail = refused.detail, "connection refused");
            stream.reset();
            return record.end(Ending::Refused, Some(refused.code));
        }
    };
    let idle = Idle {
        wheel: &worker.wheel,
        after: worker.shared.wire.tcp_idle_timeout,
    };
    let none = Bytes::new;
    let moved = |way, count| record.moved(way, count);
    let expiry = upstream.stream.expiry().cloned();
    let copying = copy::both_ways(
        &mut stream,
        none(),
        &mut upstream.stream,
        none(),
        idle,
        &moved,
    );
    let ended = match expiry {
        Some(expiry) => expiry.watch(&worker.wheel, copying).await,
        None => Some(copying.await),
    };
    let Some(ended) = ended else {
        stream.reset();
        upstream.stream.reset();
        return record.end(Ending::Cut, Some(ErrorCode::UpstreamReset));
    };
    if let Ended::Reset(_) = ended {
        stream.reset();
        upstream.stream.reset();
    }
    match ended {
        Ended::Complete => record.end(Ending::Complete, None),
        Ended::Idle => record.end(Ending::Idle, None),
        Ended::Reset(Side::A) => record.end(Ending::DownstreamReset, None),
        Ended::Reset(Side::B) => record.end(Ending::UpstreamReset, Some(ErrorCode::UpstreamReset)),
    }
}

/// A connection to an endpoint, with all that it counts against.
pub struct Upstream {
    stream: Io,
    held: Held,
}

impl Upstream {
    /// The socket, and what must be kept as long as it is open.
    pub fn into_parts(self) -> (Io, Held) {
        (self.stream, self.held)
    }
}

/// What a connection counts against until this is dropped.
pub struct Held {
    _endpoint: EndpointUse,
    _open: Open,
    _place: Place,
}

/// Why there is no connection.
pub struct Refused {
    /// As in metrics and logs.
    pub code: ErrorCode,
    /// One sentence for a person.
    pub detail: String,
}

impl Refused {
    fn new(code: ErrorCode, detail: impl Into<String>) -> Self {
        Self {
            code,
            detail: detail.into(),
        }
    }
}

async fn open(
    worker: &Rc<Worker>,
    connection: &Connection,
    hello: Option<&ClientHello>,
    record: &mut Record,
) -> Result<Upstream, Refused> {
    let snapshot = worker.snapshot();
    let onward = destination::opaque(worker, &snapshot, connection, hello)
        .map_err(|error| Refused::new(error.code, error.detail))?;
    drop(snapshot);
    record.routed(&onward.service);
    if connection.direction == Direction::Inbound {
        authorize::opaque(worker, connection, &onward.service)
            .map_err(|error| Refused::new(error.code, error.detail))?;
    }
    dial(worker, &onward, connection.peer, &mut |addr| {
        record.attempt(addr);
    })
    .await
}

/// Connects to an endpoint for a caller at `peer`; `tried` is told of each that is tried.
///
/// # Errors
/// `overloaded`, `limit_reached`, `no_endpoints`, `connect_failed`.
///
/// # Cancel safety
/// Dropping the future closes a half-open socket and gives everything back.
pub async fn dial(
    worker: &Rc<Worker>,
    onward: &Onward,
    peer: SocketAddr,
    tried: &mut dyn FnMut(SocketAddr),
) -> Result<Upstream, Refused> {
    if worker.shared.overload.is_shedding() {
        worker.shared.refusals.count(WireLimit::Memory);
        return Err(Refused::new(ErrorCode::Overloaded, "overload.maxMemory"));
    }
    let place = Place::take(&onward.service)
        .ok_or_else(|| Refused::new(ErrorCode::LimitReached, "limits.maxInFlight"))?;
    let (stream, endpoint, open) = connect(worker, onward, peer, tried).await?;
    let held = Held {
        _endpoint: endpoint,
        _open: open,
        _place: place,
    };
    Ok(Upstream { stream, held })
}

async fn connect(
    worker: &Rc<Worker>,
    onward: &Onward,
    peer: SocketAddr,
    attempted: &mut dyn FnMut(SocketAddr),
) -> Result<(Io, EndpointUse, Open), Refused> {
    let service = &onward.service;
    let params = &service.connection;
    let key = key(worker, service, peer);
    let mut refused = Refused::new(ErrorCode::NoEndpoints, "no endpoint takes connections");
    let mut tried: Vec<SocketAddr> = Vec::new();
    while tried.len() < TRIES {
        let wish = Wish {
            fixed: onward.fixed.as_ref(),
            labels: None,
            key,
        };
        let Some(mut endpoint) = destination::pick(worker, service, wish, &tried, clock::now())
        else {
            break;
        };
        let addr = endpoint.addr();
        if tried.contains(&addr) {
            // There is no other.
            break;
        }
        service.metrics.attempts.increment(1);
        attempted(addr);
        if !tried.is_empty() {
            let labels = [("service", &*service.name), ("outcome", "retried")];
            let counter = worker
                .shared
                .metrics
                .counter("outrigger_retries_total", &labels);
            counter.increment(1);
        }
        tried.push(addr);
        let Some(open) = Open::take(&endpoint.state().connections, params.max_per_endpoint) else {
            refused = Refused::new(ErrorCode::LimitReached, "connection.maxPerEndpoint");
            continue;
        };
        match open_one(worker, &endpoint, params.connect_timeout).await {
            Ok(stream) => {
                endpoint.connected(clock::now());
                return Ok((stream, endpoint, open));
            }
            Err(error) => {
                endpoint.finish(&Observed::ConnectFailed, clock::now());
                let code = match error.is_tls() {
                    true => ErrorCode::TlsFailed,
                    false => ErrorCode::ConnectFailed,
                };
                refused = Refused::new(code, chain(&error));
            }
        }
    }
    Err(refused)
}

/// What decides the endpoint of a caller's connections where the service hashes: who calls, for
/// bytes have no header and no cookie.
fn key(worker: &Worker, service: &Service, peer: SocketAddr) -> Option<u64> {
    let Algorithm::ConsistentHash(_) = &service.algorithm else {
        return None;
    };
    let source = affinity::Source {
        peer: peer.ip(),
        workload: &worker.shared.workload,
    };
    Some(source.hash(None))
}

/// One connection; with mutual TLS where the endpoint has an identity.
async fn open_one(
    worker: &Worker,
    endpoint: &EndpointUse,
    timeout: Duration,
) -> Result<Io, ConnectError> {
    let (wheel, addr) = (&worker.wheel, endpoint.addr());
    let due = connect::due(timeout);
    let Some(peers) = endpoint.peers() else {
        let stream = connect::tcp(wheel, addr, endpoint.source(), timeout).await?;
        return Ok(Io::Plain(stream));
    };
    let failed = |refused| ConnectError::Tls { addr, refused };
    let opened = match worker.shared.identity.current() {
        None => Err(failed(worker.shared.identity.missing())),
        Some(svid) => match svid.client(peers, &[MESH_TCP]) {
            Err(error) => Err(failed(verify::Refused::Protocol(error.to_string()))),
            Ok(config) => {
                let stream = connect::tcp(wheel, addr, endpoint.source(), timeout).await?;
                let outlived = &worker.outlived.outbound;
                connect::tls(wheel, addr, stream, config, outlived, due).await
            }
        },
    };
    if let Err(ConnectError::Tls { refused, .. }) = &opened {
        identity::count_refusal(&worker.shared.metrics, Direction::Outbound, refused);
    }
    opened
}

/// A place under `limits.maxInFlight`.
struct Place(Arc<Service>);

impl Place {
    fn take(service: &Arc<Service>) -> Option<Self> {
        let max = service.limits.max_in_flight;
        if service.state.bulkhead.try_enter(max) {
            return Some(Self(Arc::clone(service)));
        }
        service.metrics.refused.in_flight.increment(1);
        None
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.state.bulkhead.leave(self.0.limits.max_in_flight);
    }
}

/// One of the endpoint's connections.
struct Open(Arc<AtomicUsize>);

impl Open {
    fn take(open: &Arc<AtomicUsize>, max: Option<usize>) -> Option<Self> {
        let taken = Self(Arc::clone(open));
        let before = open.fetch_add(1, Ordering::Relaxed);
        max.is_none_or(|max| before < max).then_some(taken)
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
