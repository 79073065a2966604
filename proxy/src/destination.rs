//! Where a connection or a request goes: by its host, else by where it was going.
//!
//! | who asks | in this order |
//! |---|---|
//! | an outbound request | the service of its host; the service or endpoint at the original destination; `outbound.unknown`, to the original destination or to the host of an absolute-form target |
//! | an outbound TLS connection | the same, by its server name |
//! | other outbound bytes | the same, without a host |
//! | anything inbound | the original destination, else `app` |
//!
//! An unknown host without an original destination, in origin form, is `no_route` always.
//!
//! Stands on the life of a request.

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use http::Version;
use http::uri::Scheme;
use outrigger_config::model::AppProtocol;
use outrigger_core::balance;
use outrigger_core::client_hello::ClientHello;
use outrigger_core::error_code::ErrorCode;
use outrigger_core::host::parse_authority;
use outrigger_core::time::Mono;
use tracing::{info, warn};

use crate::call::Call;
use crate::error::ProxyError;
use crate::http::context::Connection;
use crate::listener::Direction;
use crate::snapshot::live::{Endpoint, EndpointSet, EndpointSpec, EndpointState, Labels};
use crate::snapshot::{Candidates, Route, Service, Snapshot};
use crate::unknown;
use crate::upstream::connect::{Protocol, Source};
use crate::upstream::endpoint::EndpointUse;
use crate::worker::Worker;

/// The one endpoint that a request or connection may go to: it was asked for by its address.
#[derive(Clone)]
pub struct Fixed {
    /// Whose endpoint it is: other services of the route choose among theirs.
    service: Arc<Service>,
    endpoint: Endpoint,
    /// What to speak; none is what the service speaks.
    protocol: Option<Protocol>,
    /// Where to connect from.
    source: Source,
    /// Whether it is outside the mesh.
    pub foreign: bool,
}

impl Fixed {
    fn at(service: &Arc<Service>, addr: SocketAddr, state: &Arc<EndpointState>) -> Self {
        let spec = EndpointSpec::at(addr);
        let state = Arc::clone(state);
        Self {
            service: Arc::clone(service),
            endpoint: Endpoint { spec, state },
            protocol: None,
            source: Source::Any,
            foreign: false,
        }
    }

    fn speaking(self, protocol: Protocol) -> Self {
        Self {
            protocol: Some(protocol),
            ..self
        }
    }

    /// The local application, where its callers found it.
    fn at_home(self) -> Self {
        Self {
            source: Source::Loopback,
            ..self
        }
    }

    fn foreign(self) -> Self {
        Self {
            foreign: true,
            ..self
        }
    }
}

/// What an intercepted connection is declared to speak, before a byte of it is seen.
pub fn declared(worker: &Worker, snapshot: &Snapshot, of: &Connection) -> Option<AppProtocol> {
    match (of.direction, of.original) {
        (Direction::Outbound, None) => None,
        (Direction::Outbound, Some(original)) => snapshot.at(original)?.declared,
        (Direction::Inbound, original) => {
            let app = worker.shared.bootstrap.app.map(|app| app.port());
            snapshot.app_speaks(original.map(|addr| addr.port()), app)
        }
    }
}

/// The service and rule of an outbound request; fixes its endpoint where an address decided.
///
/// # Errors
/// Those of [`Call::find_service`] and [`Call::find_route`], and of [`unknown`].
pub async fn outbound(call: &mut Call) -> Result<(Arc<Service>, Arc<Route>), ProxyError> {
    let service = match call.find_service() {
        Ok(service) => service,
        Err(refused) => by_address(call, refused).await?,
    };
    let route = call.find_route(&service)?;
    Ok((service, route))
}

async fn by_address(call: &mut Call, refused: ProxyError) -> Result<Arc<Service>, ProxyError> {
    // HTTP/1.0 knows no Host; otherwise a request that is malformed stays so.
    let hostless = refused.code == ErrorCode::BadRequest
        && call.parts.version <= Version::HTTP_10
        && !call.parts.headers.contains_key(http::header::HOST);
    if refused.code != ErrorCode::NoRoute && !hostless {
        return Err(refused);
    }
    let spoken = match call.parts.version {
        Version::HTTP_2 => Protocol::Http2,
        _ => Protocol::Http1,
    };
    let addr = match call.original {
        Some(original) => {
            if let Some(found) = call.snapshot.at(original) {
                call.fixed = found.endpoint.map(|endpoint| Fixed {
                    service: Arc::clone(&found.service),
                    endpoint,
                    protocol: None,
                    source: Source::Any,
                    foreign: false,
                });
                return Ok(found.service);
            }
            original
        }
        None => match proxied(call) {
            Some((host, port)) => {
                let (worker, snapshot) = (Rc::clone(&call.worker), Arc::clone(&call.snapshot));
                // Boxed: rare, and large.
                Box::pin(async move {
                    unknown::unknown_destination(&worker, &snapshot, &host, port).await
                })
                .await?
            }
            None => return Err(refused),
        },
    };
    let service = unknown::passthrough(&call.worker, &call.snapshot, addr)?;
    let state = &call.worker.shared.live.passthrough;
    call.fixed = Some(Fixed::at(&service, addr, state).speaking(spoken).foreign());
    Ok(service)
}

/// Host and port of a request that was sent to us as to a proxy: in absolute form, plain HTTP.
/// Over HTTP/2 every request carries its authority, so none is told from one in origin form.
fn proxied(call: &Call) -> Option<(String, u16)> {
    let uri = &call.parts.uri;
    if call.parts.version >= Version::HTTP_2 || uri.scheme() != Some(&Scheme::HTTP) {
        return None;
    }
    let (host, port) = parse_authority(uri.authority()?.as_str())?;
    Some((host.into_owned(), port.unwrap_or(80)))
}

/// The local application and the rule of inbound requests; fixes the endpoint of an intercepted
/// one.
///
/// # Errors
/// `config_missing`, `no_route` when there is neither an original destination nor `app`.
pub fn inbound(call: &mut Call) -> Result<(Arc<Service>, Arc<Route>), ProxyError> {
    let app = app(&call.worker, &call.snapshot, call.original)?;
    if let Some(original) = call.original {
        let bootstrap = call.worker.shared.bootstrap.app.map(|app| app.port());
        let protocol = match call.snapshot.app_speaks(Some(original.port()), bootstrap) {
            Some(declared) => protocol(declared),
            // Sidecars multiplex whatever is called: HTTP/2 says nothing of the application then.
            None if call.parts.version == Version::HTTP_2 && call.caller.is_none() => {
                Protocol::Http2
            }
            None => Protocol::Http1,
        };
        let state = &call.worker.shared.live.app;
        call.fixed = Some(
            Fixed::at(&app, original, state)
                .speaking(protocol)
                .at_home(),
        );
    }
    let route = Arc::clone(&app.routes[0]);
    Ok((app, route))
}

fn app(
    worker: &Worker,
    snapshot: &Snapshot,
    original: Option<SocketAddr>,
) -> Result<Arc<Service>, ProxyError> {
    let Some(app) = &snapshot.app else {
        let detail = "this sidecar has no mesh config yet";
        return Err(ProxyError::local(ErrorCode::ConfigMissing, detail));
    };
    if original.is_none() && worker.shared.bootstrap.app.is_none() {
        let detail = "no application address: set `app` in the sidecar's bootstrap config";
        return Err(ProxyError::local(ErrorCode::NoRoute, detail));
    }
    Ok(Arc::clone(app))
}

/// Where a connection goes that is passed through as it is.
pub struct Onward {
    /// Its service.
    pub service: Arc<Service>,
    /// The only endpoint it may go to.
    pub fixed: Option<Fixed>,
}

/// Where a CONNECT goes: to the service of its host, else where `outbound.unknown` lets it.
///
/// # Errors
/// `config_missing`; `bad_request` without a port; those of [`unknown`].
pub async fn tunnel(call: &mut Call) -> Result<Onward, ProxyError> {
    match call.find_service() {
        Ok(service) => {
            return Ok(Onward {
                service,
                fixed: None,
            });
        }
        Err(refused) if refused.code != ErrorCode::NoRoute => return Err(refused),
        Err(_) => {}
    }
    let authority = call.authority().map(http::uri::Authority::as_str);
    let Some((host, Some(port))) = authority.and_then(parse_authority) else {
        let detail = "CONNECT needs a host and a port";
        return Err(ProxyError::downstream(ErrorCode::BadRequest, detail));
    };
    let (worker, snapshot) = (&call.worker, &call.snapshot);
    let addr = unknown::unknown_destination(worker, snapshot, &host, port).await?;
    let service = unknown::passthrough(worker, snapshot, addr)?;
    let fixed = Fixed::at(&service, addr, &worker.shared.live.passthrough).foreign();
    Ok(Onward {
        service,
        fixed: Some(fixed),
    })
}

/// Where a connection goes that is not HTTP.
///
/// # Errors
/// `config_missing`, `no_route`.
pub fn opaque(
    worker: &Worker,
    snapshot: &Snapshot,
    connection: &Connection,
    hello: Option<&ClientHello>,
) -> Result<Onward, ProxyError> {
    let original = connection.original;
    if connection.direction == Direction::Inbound {
        let service = app(worker, snapshot, original)?;
        let fixed =
            original.map(|addr| Fixed::at(&service, addr, &worker.shared.live.app).at_home());
        return Ok(Onward { service, fixed });
    }
    if !snapshot.configured() {
        let detail = "this sidecar has no mesh config yet";
        return Err(ProxyError::local(ErrorCode::ConfigMissing, detail));
    }
    let port = original.map(|addr| addr.port());
    let named = hello
        .and_then(|hello| hello.server_name.as_deref())
        .and_then(parse_authority)
        .and_then(|(host, _)| snapshot.hosts.get(&host, port).copied())
        .and_then(|at| snapshot.services.get(at));
    if let Some(service) = named {
        return Ok(Onward {
            service: Arc::clone(service),
            fixed: None,
        });
    }
    let Some(addr) = original else {
        let detail = "neither a host nor an original destination";
        return Err(ProxyError::local(ErrorCode::NoRoute, detail));
    };
    if let Some(found) = snapshot.at(addr) {
        let fixed = found.endpoint.map(|endpoint| Fixed {
            service: Arc::clone(&found.service),
            endpoint,
            protocol: None,
            source: Source::Any,
            foreign: false,
        });
        return Ok(Onward {
            service: found.service,
            fixed,
        });
    }
    let service = unknown::passthrough(worker, snapshot, addr)?;
    let fixed = Fixed::at(&service, addr, &worker.shared.live.passthrough).foreign();
    Ok(Onward {
        service,
        fixed: Some(fixed),
    })
}

/// Which endpoints of a service a request may go to.
#[derive(Clone, Copy, Default)]
pub struct Wish<'a> {
    /// The one that its address decided.
    pub fixed: Option<&'a Fixed>,
    /// Those with these labels.
    pub labels: Option<&'a Labels>,
    /// The one that this hash of its key leads to.
    pub key: Option<u64>,
}

/// An endpoint of `service` to try: the fixed one, or one that is not among `tried` while there is
/// another. None when no endpoint takes requests.
pub fn pick(
    worker: &Worker,
    service: &Arc<Service>,
    wish: Wish<'_>,
    tried: &[SocketAddr],
    now: Mono,
) -> Option<EndpointUse> {
    let fixed = wish.fixed;
    let set = service.state.endpoints();
    if let Some(fixed) = fixed
        && Arc::ptr_eq(&fixed.service.state, &service.state)
    {
        let protocol = fixed.protocol.unwrap_or(set.spoken.protocol);
        let peers = set.peers(&fixed.endpoint.spec).cloned();
        let endpoint = EndpointUse::start(service, &fixed.endpoint, protocol, now);
        return Some(endpoint.from(fixed.source).expecting(peers));
    }
    let cut;
    let set: &EndpointSet = match wish.labels {
        None => &set,
        Some(labels) => match set.subset(labels) {
            Some(subset) => subset,
            None => {
                cut = set.cut(labels);
                &cut
            }
        },
    };
    let at = |addr: &SocketAddr| {
        let mut known = set.endpoints.iter();
        known.position(|known| known.spec.addr == *addr)
    };
    let exclude: Vec<usize> = tried.iter().filter_map(at).collect();
    let algorithm = service.algorithm.with(&service.state, set, wish.key);
    let (params, rng) = (&service.balance, &mut worker.rng());
    let picked = balance::pick(algorithm, params, &Candidates(set), &exclude, now, rng)?;
    if picked.panic || set.panic.load(Relaxed) {
        note_panic(service, set, picked.panic);
    }
    let endpoint = set.endpoints.get(picked.index)?;
    let peers = set.peers(&endpoint.spec).cloned();
    Some(EndpointUse::start(service, endpoint, set.spoken.protocol, now).expecting(peers))
}

/// Says when a service begins and ceases to be served whatever its endpoints' health.
fn note_panic(service: &Service, set: &EndpointSet, panic: bool) {
    if panic {
        service.metrics.panic_picks.increment(1);
    }
    if set.panic.swap(panic, Relaxed) == panic {
        return;
    }
    let service = &*service.name;
    if panic {
        warn!(
            service,
            "too few endpoints are available: health is ignored"
        );
    } else {
        info!(service, "enough endpoints are available again");
    }
}

/// How an upstream of this declaration is spoken to.
pub fn protocol(declared: AppProtocol) -> Protocol {
    match declared {
        AppProtocol::H2c | AppProtocol::Grpc => Protocol::Http2,
        AppProtocol::Http | AppProtocol::Tcp | AppProtocol::Tls => Protocol::Http1,
    }
}
