//! The discovery server: HTTP/2 connections and the streams on them.
//!
//! Owns the listener, the connections and the pumping of one stream: requests into its
//! [`Session`], responses out of it. What to send is decided there. Stands on the life of a config
//! update.
//!
//! Two services with one method each, so the request path is matched by hand instead of by a router;
//! signing is `ca/service.rs`. The
//! response body pulls: a stream has no task and no queue of its own, it is compared with the
//! latest resources whenever the connection can take more. It is framed here and not by tonic,
//! whose encoder copies each message into a buffer of the stream and keeps the largest for good.
//!
//! A stream that stalls is found by either end: a connection that answers no ping is closed, and so
//! is one whose sidecar answers pings and no push.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures_util::Stream;
use futures_util::stream::unfold;
use http_body_util::StreamBody;
use hyper::body::{Frame, Incoming};
use hyper::header::{CONTENT_TYPE, HeaderMap, HeaderValue};
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use outrigger_config::bootstrap::Push as Pace;
use outrigger_config::signing::CREATE_CERTIFICATE_PATH;
use outrigger_config::units::DEFAULT_NAMESPACE;
use outrigger_config::wire::{DELTA_PATH, DeltaDiscoveryRequest, MAX_MESSAGE_BYTES};
use outrigger_core::backoff;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_rustls::TlsAcceptor;
use tonic::codec::Codec as _;
use tonic::{Status, Streaming};
use tonic_prost::ProstCodec;
use tracing::{debug, info, warn};

use super::registration;
use super::session::{Event, Push, Session};
use crate::app::App;
use crate::ca::credentials::Caller;
use crate::ca::service;
use crate::clock;
use crate::metrics::Counters;
use crate::proxies::{Proxies, Step};
use crate::scope::Who;
use crate::security::{Guard, Peer};
use crate::shown::Shown;
use crate::stop::Stop;

/// How many times as long as a ping a push may stay unanswered: sidecars answer at once, but for
/// the first documents, which wait 15 s for their endpoints.
const PUSH_PATIENCE: u32 = 3;

/// How long the streams of a connection that is to end may take; each ends at once unless its peer
/// reads nothing.
const RETIRE_WITHIN: Duration = Duration::from_secs(30);

/// A sidecar needs one connection; this bounds memory, not a mesh (2,000 sidecars per replica).
const MAX_CONNECTIONS: usize = 20_000;

/// A sidecar needs one stream.
const MAX_STREAMS: u32 = 16;

/// A stream that has not said who it is within this time is closed.
const HELLO_WITHIN: Duration = Duration::from_secs(10);

/// How long TLS may take.
const HANDSHAKE_WITHIN: Duration = Duration::from_secs(10);

/// What streams share.
#[derive(Clone)]
pub struct Hub {
    /// Who may use the listener.
    pub guard: Guard,
    /// What registrations change.
    pub app: Arc<App>,
    /// The latest resources; `None` until there is a config.
    pub resources: watch::Receiver<Option<Shown>>,
    /// Where progress is noted.
    pub proxies: Arc<Proxies>,
    /// Where pushes and answers are counted.
    pub counters: Arc<Counters>,
    /// When a connection is taken for dead, and when it has lived long enough.
    pub pace: Pace,
    /// When the process wants to end, streams end, and sidecars reconnect elsewhere.
    pub stop: Stop,
}

/// Accepts connections until shutdown, then ends all streams and returns when they are gone.
pub async fn serve(listener: TcpListener, hub: Hub) {
    let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut connections = JoinSet::new();
    let mut stop = hub.stop.clone();
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
            Ok((stream, addr)) => {
                let hub = hub.clone();
                connections.spawn(async move {
                    connection(stream, addr, hub).await;
                    drop(permit);
                });
            }
            Err(e) => {
                // Out of descriptors, most likely: existing streams go on, new ones wait.
                warn!(error = %e, "discovery connection not accepted");
                sleep(Duration::from_millis(100)).await;
            }
        }
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}

async fn connection(stream: TcpStream, addr: SocketAddr, hub: Hub) {
    let _ = stream.set_nodelay(true);
    let Some(config) = hub.guard.tls() else {
        let peer = Peer {
            addr,
            chain: Vec::new(),
            secure: false,
        };
        return exchange(stream, peer, hub).await;
    };
    let mut stop = hub.stop.clone();
    let handshake = timeout(HANDSHAKE_WITHIN, TlsAcceptor::from(config).accept(stream));
    let session = tokio::select! {
        session = handshake => session,
        () = stop.requested() => return,
    };
    match session {
        Ok(Ok(session)) => {
            let chain = session.get_ref().1.peer_certificates().unwrap_or_default();
            let peer = Peer {
                addr,
                chain: chain.to_vec(),
                secure: true,
            };
            exchange(session, peer, hub).await;
        }
        Ok(Err(e)) => debug!(error = %e, %addr, "no TLS on the discovery listener"),
        Err(_) => debug!(%addr, "TLS on the discovery listener did not end in time"),
    }
}

async fn exchange(stream: impl AsyncRead + AsyncWrite + Unpin, peer: Peer, hub: Hub) {
    let mut stop = hub.stop.clone();
    let addr = peer.addr;
    let (peer, pace) = (Arc::new(peer), hub.pace);
    let retires = retires(&pace, Instant::now(), &mut fastrand::Rng::new());
    let unanswered = Arc::new(Unanswered::default());
    let watched = Arc::clone(&unanswered);
    let service = service_fn(move |request| {
        let place = Place {
            peer: Arc::clone(&peer),
            retires,
            unanswered: Arc::clone(&watched),
        };
        respond(request, place, hub.clone())
    });
    let mut http2 = http2::Builder::new(TokioExecutor::new());
    http2.timer(TokioTimer::new());
    if let Some(every) = pace.keep_alive {
        http2.keep_alive_interval(every).keep_alive_timeout(every);
    }
    let connection = http2
        .max_concurrent_streams(MAX_STREAMS)
        .max_header_list_size(16 << 10)
        .max_pending_accept_reset_streams(32)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = pin!(connection);
    let result = tokio::select! {
        result = connection.as_mut() => result,
        () = stop.requested() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
        () = at(retires) => {
            debug!(%addr, "discovery connection is old enough; its sidecar connects anew");
            connection.as_mut().graceful_shutdown();
            let end = timeout(RETIRE_WITHIN, connection).await;
            end.unwrap_or(Ok(()))
        }
        () = unanswered.overdue(pace.keep_alive) => {
            warn!(%addr, "a push was not answered in time; the connection is closed");
            return;
        }
    };
    if let Err(e) = result {
        debug!(error = %e, "discovery connection ended");
    }
}

/// When a connection that begins `now` has lived long enough: its age ± 10 %, so that connections
/// that began together do not end together.
fn retires(pace: &Pace, now: Instant, rng: &mut fastrand::Rng) -> Option<Instant> {
    let age = pace.max_connection_age?;
    now.checked_add(backoff::spread(age * 9 / 10, age * 11 / 10, rng))
}

async fn at(moment: Option<Instant>) {
    match moment {
        Some(moment) => sleep_until(moment).await,
        None => std::future::pending().await,
    }
}

/// Since when each stream of a connection waits for an answer.
#[derive(Debug, Default)]
struct Unanswered(Mutex<BTreeMap<u64, Instant>>);

impl Unanswered {
    /// Stream `id` waits, or does not.
    fn note(&self, id: u64, waits: bool) {
        let mut since = self.lock();
        if waits {
            since.entry(id).or_insert_with(Instant::now);
        } else {
            since.remove(&id);
        }
    }

    /// Until one of them has waited for too long.
    async fn overdue(&self, keep_alive: Option<Duration>) {
        let Some(patience) = keep_alive.map(|every| every * PUSH_PATIENCE) else {
            return std::future::pending().await;
        };
        loop {
            let now = Instant::now();
            // Whoever begins to wait from now on is overdue no sooner than that.
            let first = self.lock().values().min().copied().unwrap_or(now) + patience;
            if first <= now {
                return;
            }
            sleep_until(first).await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Instant>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The connection that a request came on.
struct Place {
    peer: Arc<Peer>,
    /// When its streams end.
    retires: Option<Instant>,
    unanswered: Arc<Unanswered>,
}

async fn respond(
    request: hyper::Request<Incoming>,
    place: Place,
    hub: Hub,
) -> Result<hyper::Response<tonic::body::Body>, Infallible> {
    if registration::is_one(request.method(), request.uri().path()) {
        return Ok(registration::answer(&hub.app, &place.peer, request).await);
    }
    if request.method() != hyper::Method::POST {
        return Ok(Status::invalid_argument("gRPC requests are POSTs").into_http());
    }
    let peer = &place.peer;
    match request.uri().path() {
        DELTA_PATH => {}
        CREATE_CERTIFICATE_PATH => {
            let caller = hub.guard.caller(peer, request.headers()).await;
            let from = peer.addr.to_string();
            return Ok(service::create(hub.guard, from, caller, request).await);
        }
        _ => {
            let text = "this control plane serves DeltaAggregatedResources and CreateCertificate";
            return Ok(Status::unimplemented(text).into_http());
        }
    }
    let caller = match hub.guard.subscriber(peer, request.headers()).await {
        Ok(caller) => caller,
        Err(refused) => {
            warn!(peer = %peer.addr, reason = %refused, "discovery stream refused");
            return Ok(service::status(&refused).into_http());
        }
    };
    static STREAMS: AtomicU64 = AtomicU64::new(1);
    // Compression was not offered, so whoever compresses is told by its stream's end.
    let decoder = ProstCodec::<(), DeltaDiscoveryRequest>::default().decoder();
    let body = request.into_body();
    let pump = Pump {
        id: STREAMS.fetch_add(1, Ordering::Relaxed),
        hub,
        caller,
        requests: Streaming::new_request(decoder, body, None, Some(MAX_MESSAGE_BYTES)),
        session: Session::default(),
        who: None,
        hello_by: Instant::now() + HELLO_WITHIN,
        retires: place.retires,
        unanswered: place.unanswered,
    };
    let mut response = hyper::Response::new(tonic::body::Body::new(StreamBody::new(frames(pump))));
    let grpc = HeaderValue::from_static("application/grpc");
    response.headers_mut().insert(CONTENT_TYPE, grpc);
    Ok(response)
}

/// The responses as frames of the body: two each, then the status.
fn frames(pump: Pump) -> impl Stream<Item = Result<Frame<Bytes>, Infallible>> {
    unfold(Some((pump, None)), |open| async {
        let (mut pump, begun) = open?;
        if let Some(rest) = begun {
            return Some((Ok(Frame::data(rest)), Some((pump, None))));
        }
        let status = match pump.next().await {
            Ok(Some(push)) => {
                let [head, rest] = push.frames();
                return Some((Ok(Frame::data(head)), Some((pump, Some(rest)))));
            }
            Ok(None) => Status::ok(""),
            Err(status) => status,
        };
        let mut trailers = HeaderMap::new();
        // It fails for texts that no header can hold; tonic encodes ours.
        let _ = status.add_header(&mut trailers);
        Some((Ok(Frame::trailers(trailers)), None))
    })
}

/// One open stream. Dropping it is how the stream ends, however that comes about.
struct Pump {
    id: u64,
    hub: Hub,
    /// Who opened it; the node must be that.
    caller: Caller,
    requests: Streaming<DeltaDiscoveryRequest>,
    session: Session,
    /// Known after the first request.
    who: Option<Who>,
    hello_by: Instant,
    /// When the stream ends, so that the sidecar opens another.
    retires: Option<Instant>,
    unanswered: Arc<Unanswered>,
}

impl Pump {
    /// The next response; `None` when the stream ends in order.
    async fn next(&mut self) -> Result<Option<Push>, Status> {
        loop {
            let latest = self.hub.resources.borrow_and_update().clone();
            let id = self.session.node().map_or("", |node| &node.id);
            let shown = latest.as_ref().map(|shown| shown.to(id));
            let seen = shown.and_then(|all| all.seen_by(self.who.as_ref()?));
            if let Some(resources) = seen.as_ref().or(shown)
                && let Some(response) = self.session.next(resources)
            {
                self.note(
                    &response.type_url,
                    &response.system_version_info,
                    Step::Sent,
                );
                self.unanswered.note(self.id, true);
                return Ok(Some(response));
            }
            let silent = self.session.node().is_none();
            let request = tokio::select! {
                biased;
                () = self.hub.stop.requested() => return Ok(None),
                request = self.requests.message() => request,
                changed = self.hub.resources.changed() => match changed {
                    Ok(()) => continue,
                    Err(_) => return Ok(None),
                },
                () = at(self.retires) => return Ok(None),
                () = sleep_until(self.hello_by), if silent => {
                    return Err(Status::deadline_exceeded("no request on this stream"));
                }
            };
            match request {
                Ok(Some(request)) => self.on_request(request)?,
                Ok(None) => return Ok(None),
                Err(status) => {
                    debug!(error = %status, "discovery stream broke");
                    return Ok(None);
                }
            }
        }
    }

    fn on_request(&mut self, request: DeltaDiscoveryRequest) -> Result<(), Status> {
        let new = self.session.node().is_none();
        if let (true, Some(node)) = (new, &request.node) {
            let text = |key| node.metadata_text(key).unwrap_or(DEFAULT_NAMESPACE);
            let may_be = self
                .caller
                .may_be(text("namespace"), text("serviceAccount"));
            may_be.map_err(|why| {
                warn!(node = node.id, why, "discovery stream refused");
                Status::permission_denied(why)
            })?;
            self.who = Some(Who {
                namespace: text("namespace").to_owned(),
                account: text("serviceAccount").to_owned(),
                service: node.cluster.clone(),
            });
        }
        let event = self.session.on_request(request).map_err(|e| {
            warn!(error = %e, "discovery stream refused");
            Status::invalid_argument(e.to_string())
        })?;
        self.unanswered.note(self.id, self.session.is_waiting());
        if new && let Some(node) = self.session.node() {
            info!(node = node.id, service = node.cluster, "sidecar connected");
            self.hub
                .proxies
                .connected(self.id, node, clock::wall_millis());
        }
        match event {
            Event::Subscribed | Event::Stale => {}
            Event::Unreachable => {
                if let Some(node) = self.session.node() {
                    let names = self.session.unreachable();
                    self.hub.proxies.unreachable(self.id, &node.id, names);
                }
            }
            Event::Acked { type_url, version } => self.note(&type_url, &version, Step::Acked),
            Event::Refused {
                type_url,
                version,
                reason,
            } => {
                self.note(&type_url, &version, Step::Refused(reason));
            }
        }
        Ok(())
    }

    /// Counts, lists and, where someone should act, logs what happened to a push.
    fn note(&self, type_url: &str, version: &str, step: Step) {
        let Some(node) = self.session.node() else {
            return;
        };
        self.hub.counters.push(type_url, &step);
        if let Step::Refused(reason) = &step {
            warn!(
                node = node.id,
                version, reason, "sidecar refused a push and keeps what it had"
            );
        } else {
            debug!(node = node.id, version, type_url, ?step, "push");
        }
        self.hub.proxies.step(
            self.id,
            &node.id,
            type_url,
            version,
            step,
            clock::wall_millis(),
        );
    }
}

impl Drop for Pump {
    fn drop(&mut self) {
        self.unanswered.note(self.id, false);
        if let Some(node) = self.session.node() {
            info!(
                node = node.id,
                service = node.cluster,
                "sidecar disconnected"
            );
            let (now, wall) = (clock::monotonic(), clock::wall_millis());
            self.hub.proxies.disconnected(self.id, &node.id, now, wall);
        }
    }
}
