//! One request watched from its head to the end of its response: the only place where its
//! outcome reaches breaker, metrics and access log.
//!
//! An observation ends exactly once: with the response body, with our own answer, or, when the
//! downstream leaves, by being dropped. Stands on the life of a request.

use std::io::Write as _;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Uri, request};
use outrigger_core::breaker::{Ticket, Transition};
use outrigger_core::error_code::ErrorCode;
use outrigger_core::outcome::{GrpcCode, Observed, Outcome};
use outrigger_core::time::Mono;
use tracing::{info, warn};

use crate::bulkhead;
use crate::clock;
use crate::error::ProxyError;
use crate::http::body::ResponseBody;
use crate::http::context::Connection;
use crate::http::respond;
use crate::listener::Direction;
use crate::snapshot::{Route, Service};
use crate::telemetry::access_log::When;
use crate::upstream::endpoint::EndpointUse;
use crate::worker::Worker;

/// How a response came to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// All of it was passed on.
    Complete,
    /// The upstream broke off in the body.
    UpstreamReset,
    /// Nothing moved for too long.
    Idle,
    /// A gRPC call had no message in time.
    Late,
    /// The stream's life was over.
    Lifetime,
    /// The caller's own deadline passed.
    CallerDeadline,
    /// The downstream went away before the end.
    DownstreamGone,
}

impl Ending {
    /// As the access log writes it; none for a proper end.
    const fn name(self) -> Option<&'static str> {
        match self {
            Ending::Complete => None,
            Ending::UpstreamReset => Some("upstream_reset"),
            Ending::Idle => Some("idle"),
            Ending::Late => Some("late"),
            Ending::Lifetime => Some("lifetime"),
            Ending::CallerDeadline => Some("caller_deadline"),
            Ending::DownstreamGone => Some("downstream_gone"),
        }
    }
}

/// Where and when a request came, beside its head.
#[derive(Debug, Clone, Copy)]
pub struct Arrival {
    /// When its head was complete.
    pub start: Mono,
    /// Which listener took it.
    pub direction: Direction,
    /// Who sent it.
    pub peer: SocketAddr,
    /// The snapshot it runs under.
    pub generation: u64,
    /// Whether it is a gRPC call.
    pub grpc: bool,
}

/// The record of one request. After [`Observation::take`] what is left records nothing.
pub struct Observation(Option<Box<Record>>);

struct Record {
    worker: Rc<Worker>,
    start: Mono,
    direction: Direction,
    peer: SocketAddr,
    method: Method,
    uri: Uri,
    request_id: Option<HeaderValue>,
    generation: u64,
    route: Option<Arc<Route>>,
    service: Option<Arc<Service>>,
    status: StatusCode,
    grpc: bool,
    grpc_status: Option<GrpcCode>,
    code: Option<ErrorCode>,
    attempts: u32,
    bytes: u64,
    /// What the last attempt showed, when no response came.
    failed: Option<Observed>,
    breaker: Option<(Arc<Service>, Ticket)>,
    in_flight: Option<Arc<Service>>,
    /// Whether it counts against the limit of `route` as well.
    in_rule: bool,
    /// Whether it counts against the budget of the sidecar.
    in_sidecar: bool,
    endpoint: Option<EndpointUse>,
}

impl Observation {
    /// Starts watching a request whose head arrived at `start`.
    pub fn start(worker: &Rc<Worker>, head: &request::Parts, arrival: Arrival) -> Self {
        let Arrival {
            start,
            direction,
            peer,
            generation,
            grpc,
        } = arrival;
        Self(Some(Box::new(Record {
            worker: Rc::clone(worker),
            start,
            direction,
            peer,
            method: head.method.clone(),
            uri: head.uri.clone(),
            request_id: None,
            generation,
            route: None,
            service: None,
            status: StatusCode::OK,
            grpc,
            grpc_status: None,
            code: None,
            attempts: 0,
            bytes: 0,
            failed: None,
            breaker: None,
            in_flight: None,
            in_rule: false,
            in_sidecar: false,
            endpoint: None,
        })))
    }

    /// Moves the record out, to where the request goes on.
    #[must_use]
    pub fn take(&mut self) -> Self {
        Self(self.0.take())
    }

    fn note(&mut self, note: impl FnOnce(&mut Record)) {
        if let Some(record) = &mut self.0 {
            note(record);
        }
    }

    /// The id that follows the request through the mesh.
    pub fn request_id(&mut self, id: &HeaderValue) {
        self.note(|record| record.request_id = Some(id.clone()));
    }

    /// Whether it is a gRPC call.
    pub fn is_grpc(&self) -> bool {
        self.0.as_ref().is_some_and(|record| record.grpc)
    }

    /// Which rule took the request.
    pub fn routed(&mut self, service: &Arc<Service>, route: &Arc<Route>) {
        self.note(|record| {
            record.service = Some(Arc::clone(service));
            record.route = Some(Arc::clone(route));
        });
    }

    /// No rule is asked: a connection to `service` is passed through.
    pub fn passed(&mut self, service: &Arc<Service>) {
        self.note(|record| record.service = Some(Arc::clone(service)));
    }

    /// A tunnel is open.
    pub fn opened(&mut self) {
        self.note(|record| record.status = StatusCode::OK);
    }

    /// The name of the rule that took the request.
    pub fn route_name(&self) -> Option<Arc<str>> {
        self.0
            .as_ref()
            .and_then(|record| record.route.as_ref())
            .map(|route| Arc::clone(&route.name))
    }

    /// The breaker let the request pass; its outcome goes to `service`.
    pub fn admitted(&mut self, service: &Arc<Service>, ticket: Ticket) {
        self.note(|record| record.breaker = Some((Arc::clone(service), ticket)));
    }

    /// The request counts against `service`'s limit until it ends.
    pub fn entered(&mut self, service: &Arc<Service>) {
        self.note(|record| record.in_flight = Some(Arc::clone(service)));
    }

    /// The request counts against the sidecar's budget until it ends.
    pub fn entered_sidecar(&mut self) {
        self.note(|record| {
            record.in_sidecar = true;
            record.worker.begin();
        });
    }

    /// The request is not sent where it was let in: its places there are given back.
    pub fn step_back(&mut self) {
        self.note(|record| {
            record.breaker = None;
            record.leave(None, Mono::ZERO);
        });
    }

    /// The request counts against its rule's limit until it ends.
    pub fn entered_rule(&mut self) {
        self.note(|record| record.in_rule = true);
    }

    /// Whether it counts against its rule's limit.
    pub fn is_in_rule(&self) -> bool {
        self.0.as_ref().is_some_and(|record| record.in_rule)
    }

    /// One more try.
    pub fn attempt(&mut self) {
        self.note(|record| record.attempts += 1);
    }

    /// Tries so far.
    pub fn attempts(&self) -> u32 {
        self.0.as_ref().map_or(0, |record| record.attempts)
    }

    /// The last try showed this and no response follows.
    pub fn failed(&mut self, observed: Observed) {
        self.note(|record| record.failed = Some(observed));
    }

    /// A response head is passed on; `endpoint` is in use until the response ends.
    pub fn answered(
        &mut self,
        status: StatusCode,
        grpc_status: Option<GrpcCode>,
        endpoint: EndpointUse,
    ) {
        self.note(|record| {
            record.status = status;
            record.grpc_status = grpc_status;
            record.endpoint = Some(endpoint);
            if !record.grpc || grpc_status.is_some() {
                record.settle_probe();
            }
        });
    }

    /// Body bytes passed on.
    pub fn bytes(&mut self, count: usize) {
        self.note(|record| {
            record.bytes += count as u64;
            // The first message of a gRPC stream is its answer.
            record.settle_probe();
        });
    }

    /// Trailers passed on.
    pub fn trailers(&mut self, trailers: &HeaderMap) {
        self.note(|record| {
            if record.grpc {
                record.grpc_status = GrpcCode::from_headers(trailers).or(record.grpc_status);
            }
        });
    }

    /// We answer ourselves; ends the observation.
    pub fn answered_by_us(&mut self, status: StatusCode, code: Option<ErrorCode>) {
        self.note(|record| {
            record.status = status;
            record.code = code;
        });
        self.end(Ending::Complete);
    }

    /// Forgets the request: it turned out to be none (a message that died before its delivery).
    pub fn discard(&mut self) {
        self.0 = None;
    }

    /// Ends the observation; later calls do nothing.
    pub fn end(&mut self, ending: Ending) {
        if self.0.is_some() {
            self.end_at(ending, clock::now());
        }
    }

    /// Ends the observation at `now`; later calls do nothing.
    pub fn end_at(&mut self, ending: Ending, now: Mono) {
        if let Some(record) = self.0.take() {
            record.end(ending, now);
        }
    }
}

impl Drop for Observation {
    fn drop(&mut self) {
        self.end(Ending::DownstreamGone);
    }
}

impl Record {
    fn end(mut self: Box<Self>, ending: Ending, now: Mono) {
        let observed = self.observed(ending);
        let took = self.took(&observed, now);
        if let Some(endpoint) = self.endpoint.take() {
            endpoint.finish(&observed, now);
        }
        if let Some((service, ticket)) = self.breaker.take() {
            record_breaker(&self.worker, &service, ticket, &observed, now);
        }
        self.leave(took, now);
        if self.in_sidecar {
            self.worker.end();
            self.worker.shared.overload.leave();
        }
        match ending {
            Ending::Complete => {}
            Ending::UpstreamReset => self.code = self.code.or(Some(ErrorCode::UpstreamReset)),
            Ending::Idle | Ending::Late | Ending::Lifetime => {
                self.code = self.code.or(Some(ErrorCode::UpstreamTimeout));
            }
            Ending::CallerDeadline => {
                self.code = self.code.or(Some(ErrorCode::DeadlineExceeded));
            }
            Ending::DownstreamGone => {}
        }
        self.count(now);
        self.log(now, ending);
    }

    /// How long the answer took, or how long none came, where the service's limit is found out from
    /// that. A failure that comes at once says nothing of how much the service can take.
    fn took(&self, observed: &Observed, now: Mono) -> Option<Duration> {
        let service = self.in_flight.as_ref()?;
        service.limits.adaptive.as_ref()?;
        match observed {
            Observed::RequestTimeout | Observed::PerTryTimeout | Observed::CallerDeadline => {
                Some(now.saturating_since(self.start))
            }
            _ if service.failure_on.classify(observed) == Outcome::Success => {
                self.endpoint.as_ref()?.latency()
            }
            _ => None,
        }
    }

    /// Gives the places of its service and of its rule back.
    fn leave(&mut self, took: Option<Duration>, now: Mono) {
        if let Some(service) = self.in_flight.take() {
            bulkhead::leave(&service, took, now);
        }
        if std::mem::take(&mut self.in_rule)
            && let Some(route) = &self.route
        {
            let max = route.limits.as_ref().map(|rule| rule.limits.max_in_flight);
            route.state.bulkhead.leave(max.unwrap_or_default());
        }
    }

    /// A probe is over with the head, or a gRPC stream's first message: the service must not
    /// stay half-open for as long as a stream lasts.
    fn settle_probe(&mut self) {
        let probe = |(_, ticket): &mut (Arc<Service>, Ticket)| ticket.is_probe();
        if let Some((service, ticket)) = self.breaker.take_if(probe) {
            let grpc = if self.grpc {
                self.grpc_status.or(Some(GrpcCode::Ok))
            } else {
                None
            };
            let observed = Observed::Head {
                status: self.status,
                grpc,
            };
            record_breaker(&self.worker, &service, ticket, &observed, clock::now());
        }
    }

    /// What the whole request showed, for breaker and endpoint.
    fn observed(&self, ending: Ending) -> Observed {
        if let Some(failed) = &self.failed {
            return *failed;
        }
        match ending {
            Ending::UpstreamReset => Observed::ResetInBody,
            Ending::Idle | Ending::Late => Observed::RequestTimeout,
            Ending::CallerDeadline => Observed::CallerDeadline,
            // A stream that lived too long says nothing of its service.
            Ending::DownstreamGone | Ending::Lifetime => Observed::CallerGone,
            Ending::Complete => Observed::Head {
                status: self.status,
                grpc: self.grpc.then(|| self.grpc_code()),
            },
        }
    }

    fn grpc_code(&self) -> GrpcCode {
        self.grpc_status
            .unwrap_or_else(|| GrpcCode::from_http(self.status))
    }

    fn count(&self, now: Mono) {
        let Some(route) = &self.route else {
            return self.count_unrouted();
        };
        route.duration.record(now.saturating_since(self.start));
        let (method, method_label) = method_label(&self.method);
        let status = self.status.as_u16();
        let code = self.code.map_or(0, |code| code as u64 + 1);
        let labels = (u64::from(method) << 32) | (u64::from(status) << 16) | code;
        let id = (route.id << 1) | u32::from(self.direction == Direction::Inbound);
        let counter = self.worker.counter(self.generation, (id, labels), || {
            let mut digits = itoa::Buffer::new();
            self.worker.shared.metrics.counter(
                "outrigger_requests_total",
                &[
                    ("direction", self.direction.as_str()),
                    ("route", &route.name),
                    (
                        "service",
                        self.service.as_ref().map_or("", |service| &service.name),
                    ),
                    ("method", method_label),
                    ("status", digits.format(status)),
                    ("code", self.code.map_or("", ErrorCode::as_str)),
                ],
            )
        });
        counter.increment(1);
    }

    /// No rule took it: rare, so the labels may be formatted here.
    fn count_unrouted(&self) {
        let mut digits = itoa::Buffer::new();
        self.worker
            .shared
            .metrics
            .counter(
                "outrigger_requests_total",
                &[
                    ("direction", self.direction.as_str()),
                    ("route", ""),
                    (
                        "service",
                        self.service.as_ref().map_or("", |service| &service.name),
                    ),
                    ("method", method_label(&self.method).1),
                    ("status", digits.format(self.status.as_u16())),
                    ("code", self.code.map_or("", ErrorCode::as_str)),
                ],
            )
            .increment(1);
    }

    fn log(&self, now: Mono, ending: Ending) {
        let bad =
            self.status.is_server_error() || self.code.is_some() || ending != Ending::Complete;
        let wanted = match self.worker.shared.access_log.when() {
            When::Off => false,
            When::Errors => bad,
            When::Sampled => bad || self.worker.sampled(),
            When::All => true,
        };
        if wanted {
            self.worker
                .log_line(|line| self.write_line(line, now, ending));
        }
    }

    fn write_line(&self, line: &mut Vec<u8>, now: Mono, ending: Ending) {
        let seconds = now.saturating_since(self.start).as_secs_f64();
        let json = |text: &str| serde_json::Value::from(text).to_string();
        // Writing to memory cannot fail.
        let _ = write!(
            line,
            r#"{{"time":{},"direction":"{}","peer":"{}","method":{},"path":{},"status":{},"code":"{}","route":{},"service":{},"attempts":{},"bytes":{},"seconds":{seconds:.6}"#,
            clock::unix_now().0,
            self.direction.as_str(),
            self.peer,
            json(self.method.as_str()),
            json(self.uri.path()),
            self.status.as_u16(),
            self.code.map_or("", ErrorCode::as_str),
            json(self.route.as_ref().map_or("", |route| &route.name)),
            json(self.service.as_ref().map_or("", |service| &service.name)),
            self.attempts,
            self.bytes,
        );
        if let Some(status) = self.grpc_status {
            let _ = write!(line, r#","grpc":"{}""#, status.name());
        }
        if let Some(id) = self.request_id.as_ref().and_then(|id| id.to_str().ok()) {
            let _ = write!(line, r#","requestId":{}"#, json(id));
        }
        if let Some(name) = ending.name() {
            let _ = write!(line, r#","ending":"{name}""#);
        }
        line.extend_from_slice(b"}\n");
    }
}

fn record_breaker(
    worker: &Worker,
    service: &Service,
    ticket: Ticket,
    observed: &Observed,
    now: Mono,
) {
    let Some(params) = service.breaker_params() else {
        return;
    };
    // A caller that left says nothing of the service: neutral, and a probe gives its place back.
    let outcome = service.failure_on.classify(observed);
    let breaker = &service.state.breaker;
    match breaker.record(&params, now, ticket, outcome, &mut worker.rng()) {
        Some(Transition::Opened { cause, open_for }) => {
            warn!(
                service = &*service.name,
                ?cause,
                ?open_for,
                "breaker opened"
            );
        }
        Some(Transition::Closed) => info!(service = &*service.name, "breaker closed"),
        None => {}
    }
}

/// The answer to bytes that are no request: counted and logged like one.
pub fn refuse(
    worker: &Rc<Worker>,
    connection: &Connection,
    error: &ProxyError,
) -> Response<ResponseBody> {
    let (mut parts, ()) = Request::new(()).into_parts();
    // Whatever it was called, it was not understood: the label is `other`.
    parts.method = Method::from_bytes(b"-").unwrap_or_default();
    let arrival = Arrival {
        start: clock::now(),
        direction: connection.direction,
        peer: connection.peer,
        generation: 0,
        grpc: false,
    };
    let mut observation = Observation::start(worker, &parts, arrival);
    let hop = &worker.shared.hop;
    let about = respond::About {
        hop: match connection.direction {
            Direction::Outbound => &hop.outbound,
            Direction::Inbound => &hop.inbound,
        },
        route: None,
        attempts: 0,
        grpc: false,
    };
    let response = respond::error(error, about);
    observation.answered_by_us(response.status(), Some(error.code));
    response
}

/// Bounded label of a method: its index and its name.
fn method_label(method: &Method) -> (u8, &'static str) {
    const KNOWN: [&str; 9] = [
        "GET", "POST", "PUT", "DELETE", "HEAD", "PATCH", "OPTIONS", "CONNECT", "TRACE",
    ];
    let known = KNOWN.iter().position(|name| *name == method.as_str());
    known.map_or((9, "other"), |at| {
        (u8::try_from(at).unwrap_or(9), KNOWN[at])
    })
}
