//! The discovery server: HTTP/2 connections and the streams on them.
//!
//! Owns the listener, the connections and the pumping of one stream: requests into its
//! [`Session`], responses out of it. What to send is decided there. Stands on the life of a config
//! update.
//!
//! Two services with one method each, so the request path is matched by hand instead of by a router;
//! signing is `ca/service.rs`. The
//! response body pulls: a stream has no task and no queue of its own, it is compared with the
//! latest resources whenever the connection can take more.

use std::convert::Infallible;
use std::future::{Ready, ready};
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures_util::Stream;
use futures_util::stream::unfold;
use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use outrigger_config::signing::CREATE_CERTIFICATE_PATH;
use outrigger_config::units::DEFAULT_NAMESPACE;
use outrigger_config::wire::{
    DELTA_PATH, DeltaDiscoveryRequest, DeltaDiscoveryResponse, MAX_MESSAGE_BYTES,
};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_rustls::TlsAcceptor;
use tonic::server::{Grpc, StreamingService};
use tonic::{Request, Response, Status, Streaming};
use tonic_prost::ProstCodec;
use tracing::{debug, info, warn};

use super::session::{Event, Session};
use crate::ca::credentials::Caller;
use crate::ca::service;
use crate::clock;
use crate::metrics::Counters;
use crate::proxies::{Proxies, Step};
use crate::security::{Guard, Peer};
use crate::shown::Shown;
use crate::stop::Stop;

/// A silent connection is asked whether it is alive this often, and closed when it does not answer
/// for as long again: a sidecar whose machine died is noticed within 20 s.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

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
    /// The latest resources; `None` until there is a config.
    pub resources: watch::Receiver<Option<Shown>>,
    /// Where progress is noted.
    pub proxies: Arc<Proxies>,
    /// Where pushes and answers are counted.
    pub counters: Arc<Counters>,
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
    let peer = Arc::new(peer);
    let service = service_fn(move |request| respond(request, Arc::clone(&peer), hub.clone()));
    let mut connection = pin!(
        http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .keep_alive_interval(KEEP_ALIVE)
            .keep_alive_timeout(KEEP_ALIVE)
            .max_concurrent_streams(MAX_STREAMS)
            .max_header_list_size(16 << 10)
            .max_pending_accept_reset_streams(32)
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
        debug!(error = %e, "discovery connection ended");
    }
}

async fn respond(
    request: hyper::Request<Incoming>,
    peer: Arc<Peer>,
    hub: Hub,
) -> Result<hyper::Response<tonic::body::Body>, Infallible> {
    if request.method() != hyper::Method::POST {
        return Ok(Status::invalid_argument("gRPC requests are POSTs").into_http());
    }
    match request.uri().path() {
        DELTA_PATH => {}
        CREATE_CERTIFICATE_PATH => {
            let caller = hub.guard.caller(&peer, request.headers()).await;
            let from = peer.addr.to_string();
            return Ok(service::create(hub.guard, from, caller, request).await);
        }
        _ => {
            let text = "this control plane serves DeltaAggregatedResources and CreateCertificate";
            return Ok(Status::unimplemented(text).into_http());
        }
    }
    let caller = match hub.guard.subscriber(&peer, request.headers()).await {
        Ok(caller) => caller,
        Err(refused) => {
            warn!(peer = %peer.addr, reason = %refused, "discovery stream refused");
            return Ok(service::status(&refused).into_http());
        }
    };
    let codec = ProstCodec::<DeltaDiscoveryResponse, DeltaDiscoveryRequest>::default();
    let mut grpc = Grpc::new(codec).max_decoding_message_size(MAX_MESSAGE_BYTES);
    Ok(grpc.streaming(Delta { hub, caller }, request).await)
}

struct Delta {
    hub: Hub,
    caller: Caller,
}

impl StreamingService<DeltaDiscoveryRequest> for Delta {
    type Response = DeltaDiscoveryResponse;
    type ResponseStream =
        Pin<Box<dyn Stream<Item = Result<DeltaDiscoveryResponse, Status>> + Send>>;
    type Future = Ready<Result<Response<Self::ResponseStream>, Status>>;

    fn call(&mut self, request: Request<Streaming<DeltaDiscoveryRequest>>) -> Self::Future {
        static STREAMS: AtomicU64 = AtomicU64::new(1);
        let pump = Pump {
            id: STREAMS.fetch_add(1, Ordering::Relaxed),
            hub: self.hub.clone(),
            caller: self.caller.clone(),
            requests: request.into_inner(),
            session: Session::default(),
            hello_by: Instant::now() + HELLO_WITHIN,
        };
        let responses = unfold(Some(pump), |pump| async {
            let mut pump = pump?;
            match pump.next().await {
                Ok(Some(response)) => Some((Ok(response), Some(pump))),
                Ok(None) => None,
                Err(status) => Some((Err(status), None)),
            }
        });
        ready(Ok(Response::new(Box::pin(responses))))
    }
}

/// One open stream. Dropping it is how the stream ends, however that comes about.
struct Pump {
    id: u64,
    hub: Hub,
    /// Who opened it; the node must be that.
    caller: Caller,
    requests: Streaming<DeltaDiscoveryRequest>,
    session: Session,
    hello_by: Instant,
}

impl Pump {
    /// The next response; `None` when the stream ends in order.
    async fn next(&mut self) -> Result<Option<DeltaDiscoveryResponse>, Status> {
        loop {
            let latest = self.hub.resources.borrow_and_update().clone();
            let id = self.session.node().map_or("", |node| &node.id);
            if let Some(resources) = latest.as_ref().map(|shown| shown.to(id))
                && let Some(response) = self.session.next(resources)
            {
                self.note(
                    &response.type_url,
                    &response.system_version_info,
                    Step::Sent,
                );
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
        }
        let event = self.session.on_request(request).map_err(|e| {
            warn!(error = %e, "discovery stream refused");
            Status::invalid_argument(e.to_string())
        })?;
        if new && let Some(node) = self.session.node() {
            info!(node = node.id, service = node.cluster, "sidecar connected");
            self.hub
                .proxies
                .connected(self.id, node, clock::wall_millis());
        }
        match event {
            Event::Subscribed | Event::Stale => {}
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
