//! Announces the workload beside this sidecar to the control plane, and takes it back.
//!
//! Owns the lease: it is taken when the sidecar is ready and the application accepts connections,
//! renewed while it does, set to Draining when the sidecar wants to end and given back at its end.
//! What an instance is, and what a lease means, is the control plane's. Stands on the life of a
//! config update, at its source: what is said here becomes an endpoint in every sidecar.
//!
//! A heartbeat speaks for the application: while that refuses connections there is none, so that
//! the lease runs out as it would have without a sidecar.

use std::convert::Infallible;
use std::future::pending;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{AUTHORIZATION, CONTENT_TYPE};
use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::client::conn::http2::SendRequest;
use outrigger_config::NamespacedName;
use outrigger_core::backoff;
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::task::AbortHandle;
use tokio::time::{sleep, timeout};
use tonic::body::Body;
use tracing::{debug, info, warn};

use super::dial::{CONNECT_WITHIN, Dialer};
use crate::admin::not_ready;
use crate::app::Shared;
use crate::snapshot::live::AdminState;

/// How often it is looked whether there is something to announce: an instance is to get requests
/// within a second of being ready.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// How long the application may take to accept a connection.
const ACCEPT_WITHIN: Duration = Duration::from_secs(1);

/// The bounds of the wait after a failure, which doubles.
const FIRST_WAIT: Duration = Duration::from_millis(100);
const LONGEST_WAIT: Duration = Duration::from_secs(5);

/// How long the control plane may take to hear that we drain, and the sidecars after it.
const LEAVE_WITHIN: Duration = Duration::from_secs(2);

/// How long giving back the lease may take; one that is not given back runs out.
const END_WITHIN: Duration = Duration::from_secs(1);

/// The largest answer that is read.
const MAX_ANSWER: usize = 64 << 10;

/// The workload's lease, if it is one that has a lease.
pub struct Registration {
    shared: Arc<Shared>,
    /// None: nothing is announced.
    announced: Option<Announced>,
    wire: Option<Wire>,
    /// The control plane may know the instance.
    told: bool,
}

/// What is announced.
struct Announced {
    dialer: Dialer,
    service: NamespacedName,
    id: String,
    port: u16,
    /// None: whatever this host is called towards the control plane.
    ip: Option<IpAddr>,
}

/// An open connection to the control plane.
struct Wire {
    sender: SendRequest<Body>,
    driver: AbortHandle,
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

impl Registration {
    /// For a sidecar that listens at `inbound`.
    pub fn new(shared: Arc<Shared>, inbound: &[SocketAddr]) -> Self {
        let announced = announced(&shared, inbound);
        Self {
            shared,
            announced,
            wire: None,
            told: false,
        }
    }

    /// Keeps the lease for as long as it is polled.
    ///
    /// # Cancel safety
    /// What was said may have been heard: [`Registration::leave`] and [`Registration::end`] take
    /// that into account.
    pub async fn keep(&mut self) -> Infallible {
        if self.announced.is_none() {
            return pending().await;
        }
        let gauge = self.shared.metrics.gauge("outrigger_registered", &[]);
        let failed = self
            .shared
            .metrics
            .counter("outrigger_registration_failures_total", &[]);
        let mut rng = fastrand::Rng::new();
        let mut failures = 0;
        let mut held = None;
        loop {
            if !self.is_wanted() || !self.serves().await {
                // Not held any more as soon as the lease has run out; nobody has to be told.
                gauge.set(0.0);
                sleep(LOOK_EVERY).await;
                continue;
            }
            let done = match held {
                None => self.register().await.map(Some),
                Some(every) => self.renew().await.map(|known| known.then_some(every)),
            };
            match done {
                Ok(Some(every)) => {
                    (held, failures) = (Some(every), 0);
                    gauge.set(1.0);
                    sleep(every).await;
                }
                Ok(None) => held = None,
                Err(problem) => {
                    failed.increment(1);
                    if failures == 0 {
                        warn!(problem, "not registered; trying again");
                    }
                    sleep(backoff::full_jitter(
                        FIRST_WAIT,
                        LONGEST_WAIT,
                        failures,
                        &mut rng,
                    ))
                    .await;
                    failures += 1;
                }
            }
        }
    }

    /// Has new requests go elsewhere, and waits until this sidecar has heard of it, which is when
    /// the others hear of it, too; two seconds at most.
    pub async fn leave(&mut self) {
        if !self.told {
            return;
        }
        let leaving = timeout(LEAVE_WITHIN, async {
            self.set_draining().await?;
            while !self.is_seen_draining() {
                sleep(Duration::from_millis(10)).await;
            }
            Ok::<_, String>(())
        });
        match leaving.await {
            Ok(Ok(())) => debug!("the registry knows that we drain"),
            Ok(Err(problem)) => warn!(problem, "the registry was not told that we drain"),
            Err(_) => debug!("nobody says whether the registry knows that we drain"),
        }
    }

    /// Gives the lease back.
    pub async fn end(&mut self) {
        if !self.told {
            return;
        }
        match timeout(END_WITHIN, self.ask(Method::DELETE, "", None)).await {
            Ok(Ok((status, _))) if status.is_success() || status == StatusCode::NOT_FOUND => {
                info!("no longer registered");
            }
            Ok(Ok((status, _))) => warn!(%status, "still registered; the lease runs out"),
            Ok(Err(problem)) => warn!(problem, "still registered; the lease runs out"),
            Err(_) => warn!("still registered; the lease runs out"),
        }
    }

    /// Whether the sidecar is ready and its service is one whose instances register themselves.
    fn is_wanted(&self) -> bool {
        let Some(announced) = &self.announced else {
            return false;
        };
        let snapshot = self.shared.store.load();
        let config = snapshot.config.as_ref();
        let service = config.and_then(|config| config.services.get(&announced.service));
        let discovery = service.and_then(|service| service.discovery.as_ref());
        discovery.is_some_and(|spec| spec.heartbeat.is_some()) && not_ready(&self.shared).is_none()
    }

    /// Whether the application accepts connections; one that is intercepted is taken at the
    /// sidecar's word.
    async fn serves(&self) -> bool {
        let Some(app) = self.shared.bootstrap.app else {
            return true;
        };
        matches!(
            timeout(ACCEPT_WITHIN, TcpStream::connect(app)).await,
            Ok(Ok(_))
        )
    }

    /// How often to renew.
    async fn register(&mut self) -> Result<Duration, String> {
        let body = self.announced.as_ref().and_then(|announced| {
            let spec = self.shared.bootstrap.register.clone().unwrap_or_default();
            let ip = announced.ip.or_else(|| own_ip(&announced.dialer))?;
            let mut body = json!({
                "id": announced.id,
                "address": ip.to_string(),
                "port": announced.port,
                "zone": self.shared.zone().unwrap_or_default(),
                "labels": spec.labels,
            });
            if let Some(weight) = spec.weight {
                body["weight"] = weight.into();
            }
            Some(body)
        });
        let body = body.ok_or("this host has no address; set register.address")?;
        self.told = true;
        let (status, answer) = self.ask(Method::POST, "", Some(&body)).await?;
        if !status.is_success() {
            return Err(refused(status, &answer));
        }
        let every = answer["renewEvery"].as_str().unwrap_or_default();
        let every: outrigger_config::units::Dur = every
            .parse()
            .map_err(|_| "the control plane says no renewEvery".to_owned())?;
        info!(registration = %body, every = ?every.0, "registered");
        Ok(every.0.max(LOOK_EVERY))
    }

    /// False: it has to be registered again.
    async fn renew(&mut self) -> Result<bool, String> {
        let (status, answer) = self.ask(Method::PUT, "/heartbeat", None).await?;
        match status {
            StatusCode::NOT_FOUND => Ok(false),
            status if status.is_success() => Ok(true),
            status => Err(refused(status, &answer)),
        }
    }

    async fn set_draining(&mut self) -> Result<(), String> {
        let body = json!({"state": "Draining"});
        let (status, answer) = self.ask(Method::PUT, "/state", Some(&body)).await?;
        match status.is_success() {
            true => Ok(()),
            false => Err(refused(status, &answer)),
        }
    }

    fn is_seen_draining(&self) -> bool {
        let Some(announced) = &self.announced else {
            return true;
        };
        let snapshot = self.shared.store.load();
        let Some(service) = snapshot.service(&announced.service.to_string()) else {
            return true;
        };
        let set = service.state.endpoints();
        let mut ours = set.endpoints.iter().filter(|endpoint| {
            let addr = endpoint.spec.addr;
            addr.port() == announced.port && announced.ip.is_none_or(|ip| ip == addr.ip())
        });
        ours.all(|endpoint| endpoint.spec.admin != AdminState::Serving)
    }

    /// One request about the instance; on a new connection when the old one has ended.
    async fn ask(
        &mut self,
        method: Method,
        what: &str,
        body: Option<&Value>,
    ) -> Result<(StatusCode, Value), String> {
        let Some(announced) = &self.announced else {
            return Err("nothing is announced".to_owned());
        };
        let svid = self.shared.identity.current();
        let token = announced.dialer.token(svid.as_deref())?;
        let fresh = match &self.wire {
            Some(wire) if !wire.sender.is_closed() => None,
            _ => {
                let (sender, connection) = announced.dialer.connect(svid.as_deref()).await?;
                let driver = tokio::task::spawn_local(async move {
                    let _ = connection.await;
                });
                Some(Wire {
                    sender,
                    driver: driver.abort_handle(),
                })
            }
        };
        if fresh.is_some() {
            self.wire = fresh;
        }
        let Some(wire) = &mut self.wire else {
            return Err("there is no connection".to_owned());
        };
        let NamespacedName { namespace, name } = &announced.service;
        let mut path = format!("/v1/services/{namespace}%2F{name}/instances");
        if method != Method::POST {
            path = format!("{path}/{}{what}", announced.id);
        }
        let mut url = announced.dialer.address().clone().into_parts();
        url.path_and_query = path.parse().ok();
        let url = http::Uri::from_parts(url).map_err(|e| e.to_string())?;
        let text = body.map_or_else(String::new, Value::to_string);
        let request = Request::builder().method(method).uri(url);
        let mut request = request
            .header(CONTENT_TYPE, "application/json")
            .body(Body::new(Full::from(text)))
            .map_err(|e| e.to_string())?;
        if let Some(token) = token {
            let mut value = http::HeaderValue::from_bytes(token.as_bytes())
                .map_err(|_| "the token is no header value".to_owned())?;
            value.set_sensitive(true);
            request.headers_mut().insert(AUTHORIZATION, value);
        }
        let answer = timeout(CONNECT_WITHIN, exchange(&mut wire.sender, request)).await;
        let answer = answer.unwrap_or_else(|_| Err("the control plane does not answer".into()));
        if answer.is_err() {
            self.wire = None;
        }
        answer
    }
}

async fn exchange(
    sender: &mut SendRequest<Body>,
    request: Request<Body>,
) -> Result<(StatusCode, Value), String> {
    sender.ready().await.map_err(|e| e.to_string())?;
    let response = sender
        .send_request(request)
        .await
        .map_err(|e| e.to_string())?;
    let status = response.status();
    let body = Limited::new(response.into_body(), MAX_ANSWER);
    let body: Bytes = body.collect().await.map_err(|e| e.to_string())?.to_bytes();
    Ok((status, serde_json::from_slice(&body).unwrap_or_default()))
}

fn refused(status: StatusCode, answer: &Value) -> String {
    let detail = answer["detail"].as_str().unwrap_or_default();
    format!("the control plane answered {status}: {detail:.300}")
}

/// What is to be announced; none where nobody could be led to the application by it.
fn announced(shared: &Shared, inbound: &[SocketAddr]) -> Option<Announced> {
    let bootstrap = &shared.bootstrap;
    let spec = bootstrap.register.clone().unwrap_or_default();
    let listener = inbound.first()?;
    if spec.enabled == Some(false) {
        return None;
    }
    // Intercepted calls arrive at the application's own port, which only the user knows.
    let port = spec
        .port
        .or(bootstrap.app.is_some().then_some(listener.port()))?;
    let bound = Some(listener.ip()).filter(|ip| !ip.is_unspecified());
    Some(Announced {
        dialer: Dialer::new(bootstrap.control_plane.as_ref()?).ok()?,
        service: bootstrap.workload.service()?,
        id: bootstrap.workload.name.clone(),
        port,
        ip: spec.address.or(bound),
    })
}

/// The address that this host uses towards the control plane. Sends nothing.
fn own_ip(dialer: &Dialer) -> Option<IpAddr> {
    let (host, port) = dialer.authority();
    let any: [IpAddr; 2] = [Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()];
    any.into_iter().find_map(|any| {
        let socket = UdpSocket::bind((any, 0)).ok()?;
        socket.connect((host, port)).ok()?;
        Some(socket.local_addr().ok()?.ip())
    })
}
