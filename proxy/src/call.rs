//! One request with what has been found out about it, from its head on.
//!
//! Answers the questions that `forward` asks in order: which service, which rule, which
//! endpoint, what to send. Decides nothing that outlives the request.
//!
//! Stands on the life of a request and on the life of a message.

mod affinity;
mod screen;

use std::net::SocketAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONTENT_TYPE, COOKIE, EXPECT, HOST};
use http::uri::{Authority, PathAndQuery};
use http::{HeaderMap, HeaderValue, Response, Uri, request};
use http_body::Body as _;
use outrigger_core::edit::HeaderEdits;
use outrigger_core::error_code::ErrorCode;
use outrigger_core::headers::{self, Field, Present, StripPolicy};
use outrigger_core::host::parse_authority;
use outrigger_core::retry::{self, RequestFacts};
use outrigger_core::route::RequestView;
use outrigger_core::spiffe::SpiffeId;
use outrigger_core::{deadline, split, time::Mono};

use self::affinity::Affinity;
use crate::clock;
use crate::deadline::Deadline;
use crate::destination::{self, Fixed, Wish};
use crate::error::ProxyError;
use crate::features::mirror::Duplicate;
use crate::http::body::{Replay, RequestBody, ResponseBody, Upload};
use crate::http::context::{Caller, Connection};
use crate::http::incoming::Incoming;
use crate::http::observe::{Arrival, Observation};
use crate::http::respond;
use crate::http::switch::Switch;
use crate::listener::Direction;
use crate::snapshot::features::Rewrite;
use crate::snapshot::{Route, Service, Snapshot};
use crate::upstream::connect::Protocol;
use crate::upstream::endpoint::EndpointUse;
use crate::upstream::pool::Outgoing;
use crate::worker::Worker;

/// One request on its way.
pub struct Call {
    /// The worker it runs on.
    pub worker: Rc<Worker>,
    /// The config it runs under, to its end.
    pub snapshot: Arc<Snapshot>,
    /// The head as it came, less what was taken for the upstream.
    pub parts: request::Parts,
    /// Where it came from.
    pub direction: Direction,
    /// The peer.
    pub peer: SocketAddr,
    /// Where its connection was going before it was redirected to us.
    pub original: Option<SocketAddr>,
    /// Who sent it, where that is proved.
    pub caller: Option<Rc<Caller>>,
    /// Who enqueued it, where it is a message, somebody else sent it, and that is proved.
    pub original_caller: Option<Box<SpiffeId>>,
    /// What is shown to a peer of who enqueued it, where it is a message.
    pub statement: Option<Box<HeaderValue>>,
    /// The one endpoint it may go to, when an address decided.
    pub fixed: Option<Fixed>,
    /// Whether it is a gRPC call, by content type.
    pub grpc: bool,
    /// When its head was complete.
    pub start: Mono,
    /// How far its body has come.
    pub upload: Rc<Upload>,
    /// What is recorded of it.
    pub observation: Observation,
    /// What the caller asks to switch to, if it does.
    pub switch: Option<Switch>,
    /// False for a delivery: the queue tries again, not this path.
    pub inline_retries: bool,
    /// Replaces the route's `timeouts.request`: the `delivery.timeout` of a message.
    pub request_timeout: Option<Duration>,
    /// How long its body may be; none is unlimited.
    pub max_request_body: Option<u64>,
    /// The endpoint of the last attempt, once there was one.
    pub endpoint: Option<SocketAddr>,
    /// Whether the breaker let it through as a probe.
    pub probe: bool,
    /// Whether a try ended without showing what the service did with the request.
    pub in_doubt: bool,
    /// Whether faults of its route may meet it.
    pub faulty: bool,
    /// The step of the ladder that it took, when its service could not be asked.
    pub fallback: Option<&'static str>,
    /// A copy that goes to another service when the request has ended.
    pub duplicate: Option<Box<Duplicate>>,
    caller_timeout: Option<Duration>,
    /// Which endpoints of its service it asks for, when not any.
    affinity: Option<Box<Affinity>>,
    prepared: HeaderMap,
    /// What its head had when it came.
    present: Present,
    /// The request carries an idempotency key.
    keyed: bool,
    /// Which attempt of a sidecar before us it is; 0 when none says so.
    peer_attempt: u32,
    authority: Option<Authority>,
}

/// A request's body before it is known how often it may be sent.
pub enum Payload {
    /// As it arrives from the downstream.
    Downstream(Incoming),
    /// Read already.
    Stored(Bytes),
    /// Begun to be read: these bytes, then what still arrives.
    Prefixed(Vec<Bytes>, Incoming),
}

impl Call {
    /// A request of a listener.
    pub fn from_downstream(
        worker: &Rc<Worker>,
        connection: &Connection,
        parts: request::Parts,
    ) -> Self {
        let mut call = Self::new(worker, parts, connection.direction, connection.peer);
        call.original = connection.original;
        if let Some(caller) = &connection.caller {
            call.caller = Some(Rc::clone(caller));
            call.caller_timeout = call.read_timeout(true);
        }
        call
    }

    /// A message on its way to its target: as if the application called again.
    pub fn from_message(worker: &Rc<Worker>, parts: request::Parts, timeout: Duration) -> Self {
        let local = SocketAddr::from(([127, 0, 0, 1], 0));
        let mut call = Self::new(worker, parts, Direction::Outbound, local);
        call.inline_retries = false;
        call.request_timeout = Some(timeout);
        call.caller_timeout = None;
        call
    }

    fn new(
        worker: &Rc<Worker>,
        mut parts: request::Parts,
        direction: Direction,
        peer: SocketAddr,
    ) -> Self {
        let start = clock::now();
        let snapshot = worker.snapshot();
        let switch = parts.extensions.remove::<Switch>();
        let present = Present::of(&parts.headers);
        let grpc = present.has(Field::ContentType) && is_grpc(&parts.headers);
        let generation = snapshot.generation;
        let arrival = Arrival {
            start,
            direction,
            peer,
            generation,
            grpc,
        };
        let observation = Observation::start(worker, &parts, arrival);
        let mut call = Self {
            caller_timeout: None,
            worker: Rc::clone(worker),
            snapshot,
            parts,
            direction,
            peer,
            original: None,
            caller: None,
            original_caller: None,
            statement: None,
            fixed: None,
            grpc,
            start,
            upload: Upload::new(start, true),
            observation,
            switch,
            inline_retries: direction == Direction::Outbound,
            request_timeout: None,
            max_request_body: None,
            endpoint: None,
            probe: false,
            in_doubt: false,
            faulty: false,
            fallback: None,
            affinity: None,
            duplicate: None,
            prepared: HeaderMap::new(),
            present,
            keyed: false,
            peer_attempt: 0,
            authority: None,
        };
        call.caller_timeout = call.read_timeout(direction == Direction::Outbound);
        call
    }

    /// The time that is left by the caller's word; `ours` says whether our own field counts.
    fn read_timeout(&self, ours: bool) -> Option<Duration> {
        let grpc = self.grpc && self.present.has(Field::GrpcTimeout);
        let ours = ours && self.present.has(Field::Ours);
        match grpc || ours {
            true => caller_timeout(&self.parts.headers, ours, grpc),
            false => None,
        }
    }

    /// The name that this sidecar and direction go by in answers.
    pub fn hop(&self) -> &str {
        match self.direction {
            Direction::Outbound => &self.worker.shared.hop.outbound,
            Direction::Inbound => &self.worker.shared.hop.inbound,
        }
    }

    /// The host that was asked for, once [`Call::screen`] or [`Call::find_service`] has read it.
    pub fn authority(&self) -> Option<&Authority> {
        self.authority.as_ref()
    }

    /// Whether it is a message on its way to its target.
    pub fn is_delivery(&self) -> bool {
        self.direction == Direction::Outbound && !self.inline_retries
    }

    /// The time the caller allows, if it said so.
    pub fn caller_timeout(&self) -> Option<Duration> {
        self.caller_timeout
    }

    /// The service that the request's host names.
    ///
    /// # Errors
    /// `config_missing`, `bad_request` for no or a malformed host, `no_route`.
    pub fn find_service(&mut self) -> Result<Arc<Service>, ProxyError> {
        if !self.snapshot.configured() {
            let detail = "this sidecar has no mesh config yet";
            return Err(ProxyError::local(ErrorCode::ConfigMissing, detail));
        }
        let authority = match self.authority.take() {
            Some(authority) => Some(authority),
            None => self.find_authority()?,
        };
        let Some(authority) = authority else {
            let detail = "the request has no Host";
            return Err(ProxyError::downstream(ErrorCode::BadRequest, detail));
        };
        let found = parse_authority(authority.as_str())
            .and_then(|(host, port)| self.snapshot.hosts.get(&host, port).copied())
            .and_then(|at| self.snapshot.services.get(at));
        let Some(service) = found else {
            let detail = format!("no service of the mesh is called {}", authority.host());
            self.authority = Some(authority);
            return Err(ProxyError::local(ErrorCode::NoRoute, detail));
        };
        self.authority = Some(authority);
        Ok(Arc::clone(service))
    }

    /// RFC 9112 §3.2.2 and RFC 9113 §8.3.1: the authority of the target decides; without one, the
    /// Host field.
    fn find_authority(&self) -> Result<Option<Authority>, ProxyError> {
        if let Some(authority) = self.parts.uri.authority() {
            return Ok(Some(authority.clone()));
        }
        let Some(host) = self.parts.headers.get(HOST) else {
            return Ok(None);
        };
        let authority = Authority::try_from(host.as_bytes());
        authority.map(Some).map_err(|_| {
            let detail = "the Host field is malformed";
            ProxyError::downstream(ErrorCode::BadRequest, detail)
        })
    }

    /// The rule that takes the request.
    ///
    /// # Errors
    /// `no_route` when the service has rules and none matches.
    pub fn find_route(&self, service: &Service) -> Result<Arc<Route>, ProxyError> {
        let found = service
            .rules
            .find(&self.view())
            .and_then(|rule| service.routes.get(rule));
        found.map(Arc::clone).ok_or_else(|| {
            let detail = format!(
                "no rule of {} takes {} {}",
                service.name,
                self.parts.method,
                self.parts.uri.path()
            );
            ProxyError::local(ErrorCode::NoRoute, detail)
        })
    }

    /// What rules and policies look at; until the headers are prepared.
    pub fn view(&self) -> RequestView<'_> {
        RequestView {
            method: &self.parts.method,
            host: self.authority.as_ref().map_or("", Authority::host),
            path: self.parts.uri.path(),
            query: self.parts.uri.query(),
            headers: &self.parts.headers,
        }
    }

    /// The service that takes this request among the route's weighted backends. Before the headers
    /// are prepared: a key may be one of them.
    pub fn pick_backend(&mut self, service: &Arc<Service>, route: &Route) -> Arc<Service> {
        let chosen = match route.backends.as_slice() {
            [] => None,
            [only] => Some(only),
            several => {
                let total = route.total_weight.max(1);
                let key = route.split_key.as_ref();
                let point = match key.and_then(|key| key.of(&self.parts.headers)) {
                    Some(key) => split::point(key, total),
                    None => self.worker.rng().u32(..total),
                };
                let weights = several.iter().map(|backend| backend.weight);
                split::pick(weights, point).and_then(|at| several.get(at))
            }
        };
        let backend = chosen.and_then(|backend| self.snapshot.services.get(backend.service));
        let target = Arc::clone(backend.unwrap_or(service));
        let labels = chosen.and_then(|backend| backend.labels.as_ref());
        if labels.is_some() || target.is_hashed() {
            self.affinity = Some(Affinity::of(self, &target, labels));
        }
        target
    }

    /// An endpoint to try that is not among `tried` while there is another.
    ///
    /// # Errors
    /// `no_endpoints`.
    pub fn pick_endpoint(
        &self,
        service: &Arc<Service>,
        tried: &[SocketAddr],
        now: Mono,
    ) -> Result<EndpointUse, ProxyError> {
        let mut wish = Wish {
            fixed: self.fixed.as_ref(),
            ..Wish::default()
        };
        if let Some(affinity) = &self.affinity {
            affinity.restrict(service, &mut wish);
        }
        match destination::pick(&self.worker, service, wish, tried, now) {
            Some(endpoint) => Ok(endpoint),
            None => {
                let mut detail = format!("no endpoint of {} takes requests", service.name);
                if let Some(labels) = wish.labels {
                    let labels = labels.iter().map(|(name, value)| format!("{name}={value}"));
                    let labels: Vec<String> = labels.collect();
                    detail = format!("{detail} among those with {}", labels.join(", "));
                }
                let error = ProxyError::local(ErrorCode::NoEndpoints, detail);
                Err(error.retry_after(Duration::from_secs(1)))
            }
        }
    }

    /// The protocol for this call: gRPC needs h2 and a switch of protocols HTTP/1.1, whatever the
    /// port says. Sidecars multiplex between them.
    pub fn protocol(&self, endpoint: &EndpointUse) -> Protocol {
        if self.switch.is_some() {
            Protocol::Http1
        } else if self.grpc || endpoint.peers().is_some() {
            Protocol::Http2
        } else {
            endpoint.protocol()
        }
    }

    /// Makes the fields that every attempt sends out of those that came.
    pub fn prepare_headers(&mut self) {
        let mut fields = std::mem::take(&mut self.parts.headers);
        let present = self.present;
        if present.has(Field::HopByHop) {
            headers::strip_hop_by_hop(&mut fields);
        }
        if present.has(Field::Ours) {
            if self.direction == Direction::Outbound {
                self.peer_attempt = headers::attempt_of_peer(&fields);
            }
            headers::strip_outrigger(&mut fields, self.strip_policy());
        }
        if present.has(Field::Expect) {
            // 100 is answered where the body is read.
            fields.remove(EXPECT);
        }
        // Our own application is trusted; on the other side a peer without identity is not.
        let trusted = self.direction == Direction::Outbound || self.caller.is_some();
        if self.direction == Direction::Inbound {
            headers::append_forwarded_for(&mut fields, self.peer.ip(), true);
        }
        if let Some(caller) = &self.caller {
            let forwarded = caller.forwarded(self.original_caller.as_deref());
            fields.insert(headers::X_FORWARDED_CLIENT_CERT, forwarded);
        }
        headers::set_forwarded_proto(&mut fields, present, false, trusted);
        let id = headers::ensure_request_id(&mut fields, present, &mut self.worker.rng());
        self.observation.request_id(&id);
        if self.authority.is_none() {
            self.authority = self.find_authority().ok().flatten();
        }
        if present.has(Field::Host) {
            fields.remove(HOST);
        }
        if let Some(switch) = &self.switch {
            switch.mark(&mut fields);
        }
        self.keyed =
            present.has(Field::IdempotencyKey) && fields.contains_key(headers::IDEMPOTENCY_KEY);
        self.prepared = fields;
    }

    /// The fields that every attempt sends, once they are prepared.
    pub fn fields(&self) -> &HeaderMap {
        &self.prepared
    }

    /// Edits the fields that every attempt sends, once they are prepared.
    pub fn edit_headers(&mut self, edits: &HeaderEdits) {
        edits.apply(&mut self.prepared);
    }

    /// Changes host and path of what is sent, once the headers are prepared.
    pub fn rewrite(&mut self, rewrite: &Rewrite) {
        if let Some(host) = &rewrite.host {
            self.authority = Some(host.clone());
        }
        let Some(edit) = &rewrite.path else { return };
        let uri = &self.parts.uri;
        let target = edit.apply_to_target(uri.path(), uri.query());
        // A path that was checked, with the end and the query of one that was screened.
        if let Ok(target) = PathAndQuery::try_from(target) {
            self.parts.uri = Uri::from(target);
        }
    }

    /// Whether it goes to a destination outside the mesh, which is told nothing of ours.
    fn is_foreign(&self) -> bool {
        self.fixed.as_ref().is_some_and(|fixed| fixed.foreign)
    }

    fn strip_policy(&self) -> StripPolicy {
        match self.direction {
            // Those a caller may set were read before; none of them goes on as it came.
            Direction::Outbound if !self.inline_retries => StripPolicy::MeshPeer,
            Direction::Inbound if self.caller.is_some() => StripPolicy::MeshPeer,
            Direction::Outbound | Direction::Inbound => StripPolicy::Untrusted,
        }
    }

    /// Writes into the head what differs from one attempt to the next.
    pub fn stamp(&mut self, endpoint: &EndpointUse, attempt: u32, deadline: &Deadline, now: Mono) {
        let mut fields = std::mem::take(&mut self.prepared);
        self.stamp_on(&mut fields, endpoint, attempt, deadline, now);
        self.prepared = fields;
    }

    /// The head of one more attempt beside the one that is under way.
    pub fn stamped(
        &self,
        endpoint: &EndpointUse,
        attempt: u32,
        deadline: &Deadline,
        now: Mono,
    ) -> HeaderMap {
        let mut fields = self.prepared.clone();
        self.stamp_on(&mut fields, endpoint, attempt, deadline, now);
        fields
    }

    fn stamp_on(
        &self,
        fields: &mut HeaderMap,
        endpoint: &EndpointUse,
        attempt: u32,
        deadline: &Deadline,
        now: Mono,
    ) {
        if self.direction == Direction::Outbound && !self.is_foreign() {
            let number = match attempt {
                1 => HeaderValue::from_static("1"),
                more => HeaderValue::from(more),
            };
            fields.insert(headers::ATTEMPT, number);
        }
        if let Some(statement) = &self.statement {
            match endpoint.peers() {
                Some(_) => fields.insert(headers::CALLER_STATEMENT, (**statement).clone()),
                None => fields.remove(headers::CALLER_STATEMENT),
            };
        }
        self.tell_deadline(fields, deadline, now);
        if self.protocol(endpoint) == Protocol::Http1 {
            join_cookies(fields);
        }
    }

    /// The head as it goes upstream; with `fields` where they are not those prepared.
    pub fn outgoing<'a>(&'a self, fields: Option<&'a HeaderMap>) -> Outgoing<'a> {
        static ROOT: LazyLock<PathAndQuery> = LazyLock::new(|| PathAndQuery::from_static("/"));
        Outgoing {
            method: &self.parts.method,
            path: self.parts.uri.path_and_query().unwrap_or(&ROOT),
            authority: self.authority.as_ref(),
            headers: fields.unwrap_or(&self.prepared),
            switch: self.switch.is_some(),
        }
    }

    /// gRPC has a header for the end of the whole call; `outrigger-deadline-ms` is about the wait
    /// for the answer.
    fn tell_deadline(&self, fields: &mut HeaderMap, deadline: &Deadline, now: Mono) {
        // Such a value never repeats, and would drive what does out of HPACK's table.
        let unique = |mut value: HeaderValue| {
            value.set_sensitive(true);
            value
        };
        if self.grpc
            && let Some(remaining) = deadline.remaining_whole(now)
        {
            let value = deadline::format_grpc_timeout(remaining);
            fields.insert(headers::GRPC_TIMEOUT, unique(value));
        }
        if self.direction == Direction::Outbound
            && !self.is_foreign()
            && let Some(remaining) = deadline.remaining(now)
        {
            let value = deadline::format_deadline_ms(remaining);
            fields.insert(headers::DEADLINE_MS, unique(value));
        }
    }

    /// The body in the form in which it can be sent as often as the route allows.
    pub fn body(&mut self, payload: Payload, route: &Route) -> OutgoingBody {
        if self.duplicate.is_some() {
            self.copy_body(&payload);
        }
        match payload {
            Payload::Stored(bytes) if bytes.is_empty() => OutgoingBody::Empty,
            Payload::Stored(bytes) => OutgoingBody::Stored(bytes),
            Payload::Prefixed(read, incoming) => {
                self.upload = Upload::copying(clock::now(), self.duplicate.take());
                self.upload.limit(self.max_request_body);
                let upload = Rc::clone(&self.upload);
                let body = RequestBody::Prefixed(read.into(), incoming, upload);
                OutgoingBody::Once(Some(body))
            }
            Payload::Downstream(incoming) if incoming.is_end_stream() => OutgoingBody::Empty,
            Payload::Downstream(incoming) => {
                self.upload = Upload::copying(self.start, self.duplicate.take());
                self.upload.limit(self.max_request_body);
                let upload = Rc::clone(&self.upload);
                let cap = route.retry.max_body_bytes;
                // Also without retries: who turns a request away untouched gets it again.
                if incoming.size_hint().lower() > cap {
                    return OutgoingBody::Once(Some(RequestBody::Streaming(incoming, upload)));
                }
                OutgoingBody::Replay(Replay::new(&self.worker, incoming, cap, upload))
            }
        }
    }

    /// Hands to the copy what of the body is here already; sends it when that is all.
    fn copy_body(&mut self, payload: &Payload) {
        let Some(mut duplicate) = self.duplicate.take() else {
            return;
        };
        match payload {
            Payload::Stored(bytes) => duplicate.data(bytes),
            Payload::Prefixed(read, _) => read.iter().for_each(|data| duplicate.data(data)),
            Payload::Downstream(_) => {}
        }
        match payload {
            Payload::Downstream(incoming) | Payload::Prefixed(_, incoming)
                if !incoming.is_end_stream() =>
            {
                self.duplicate = Some(duplicate);
            }
            _ => duplicate.send(),
        }
    }

    /// What matters for retrying.
    pub fn facts(&self, body: &OutgoingBody) -> RequestFacts {
        RequestFacts {
            idempotent: retry::is_idempotent(&self.parts.method),
            keyed: self.keyed,
            grpc: self.grpc,
            replay: body.replay(),
            retried_by_peer: self.peer_attempt > 1,
        }
    }

    /// Removes from an upstream's answer what ends at this hop and what only a sidecar may say, and
    /// says it. `meshed` says that another sidecar answered.
    pub fn clean_response(&self, fields: &mut HeaderMap, meshed: bool) {
        let present = Present::of(fields);
        if present.has(Field::HopByHop) {
            headers::strip_hop_by_hop(fields);
        }
        if present.has(Field::Ours) && !meshed {
            headers::strip_outrigger(fields, StripPolicy::Untrusted);
        }
        if let Some(affinity) = &self.affinity {
            affinity.begin_session(fields);
        }
    }

    /// Counts what became of a possible retry.
    pub fn count_retry(&self, service: &Service, outcome: &str) {
        let labels = [("service", &*service.name), ("outcome", outcome)];
        self.worker
            .shared
            .metrics
            .counter("outrigger_retries_total", &labels)
            .increment(1);
    }

    /// Our own answer to a request that failed; ends its observation.
    pub fn refuse(&mut self, error: &ProxyError) -> Response<ResponseBody> {
        let route = self.observation.route_name();
        let about = respond::About {
            hop: self.hop(),
            route: route.as_deref(),
            attempts: self.observation.attempts(),
            grpc: self.grpc,
        };
        let response = respond::error(error, about);
        self.observation
            .answered_by_us(response.status(), Some(error.code));
        response
    }

    /// Our own answer to a request that succeeded; ends its observation.
    pub fn answer(&mut self, response: Response<ResponseBody>) -> Response<ResponseBody> {
        self.observation.answered_by_us(response.status(), None);
        response
    }
}

impl Payload {
    /// The least that its body is long, as far as it is known; none for what was stored.
    pub fn declared(&self) -> Option<u64> {
        match self {
            Self::Stored(_) => None,
            Self::Downstream(incoming) => Some(incoming.size_hint().lower()),
            Self::Prefixed(read, incoming) => {
                let before: usize = read.iter().map(Bytes::len).sum();
                Some(before as u64 + incoming.size_hint().lower())
            }
        }
    }

    /// We answer without the body: what is on its way is read for a moment and thrown away, so
    /// that the answer reaches the peer and its h2 connection is not charged for late frames.
    pub fn discard(self) {
        let (Self::Downstream(mut body) | Self::Prefixed(_, mut body)) = self else {
            return;
        };
        // What is left of an HTTP/1.1 body is its connection's to deal with.
        if body.is_end_stream() || matches!(body, Incoming::Http1Request(_)) {
            return;
        }
        tokio::task::spawn_local(async move {
            let reading = async {
                let mut left = DISCARD_BYTES;
                while let Some(Ok(frame)) =
                    std::future::poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await
                {
                    let length = frame.data_ref().map_or(0, Bytes::len);
                    let Some(rest) = left.checked_sub(length) else {
                        return;
                    };
                    left = rest;
                }
            };
            let _ = tokio::time::timeout(DISCARD_FOR, reading).await;
        });
    }
}

/// How much of a body is read that we do not want, and for how long.
const DISCARD_BYTES: usize = 64 * 1024;
const DISCARD_FOR: Duration = Duration::from_secs(1);

/// A body that may be sent more than once.
pub enum OutgoingBody {
    /// No body.
    Empty,
    /// In memory.
    Stored(Bytes),
    /// Remembered while it streams.
    Replay(Replay),
    /// Streamed; gone once it was handed over.
    Once(Option<RequestBody>),
}

impl OutgoingBody {
    /// The body for the next attempt. Empty when it is gone: ask [`OutgoingBody::replay`] first.
    pub fn take(&mut self) -> RequestBody {
        match self {
            Self::Empty => RequestBody::Empty,
            Self::Stored(bytes) => RequestBody::Full(Some(bytes.clone())),
            Self::Replay(replay) => replay
                .reader()
                .map_or(RequestBody::Empty, RequestBody::Replay),
            Self::Once(body) => body.take().unwrap_or(RequestBody::Empty),
        }
    }

    /// The body for an attempt beside the one that is under way; none while it still arrives.
    pub fn beside(&self) -> Option<RequestBody> {
        match self {
            Self::Empty => Some(RequestBody::Empty),
            Self::Stored(bytes) => Some(RequestBody::Full(Some(bytes.clone()))),
            Self::Replay(replay) => replay.reader_beside().map(RequestBody::Replay),
            Self::Once(_) => None,
        }
    }

    /// An unsent request came back: a streamed body can be sent after all.
    pub fn take_back(&mut self, body: RequestBody) {
        if let Self::Once(place) = self {
            *place = Some(body);
        }
    }

    /// Whether the whole body could be sent now.
    pub fn replay(&self) -> retry::Replay {
        match self {
            Self::Empty | Self::Stored(_) => retry::Replay::Yes,
            Self::Replay(replay) if replay.replayable() => retry::Replay::Yes,
            Self::Once(Some(_)) => retry::Replay::Yes,
            Self::Replay(replay) if replay.starved() => retry::Replay::NoMemory,
            Self::Replay(_) | Self::Once(None) => retry::Replay::TooLarge,
        }
    }
}

/// h2 may split cookies into several fields; HTTP/1.1 servers read one (RFC 9113 §8.2.3).
fn join_cookies(fields: &mut HeaderMap) {
    let mut several = fields.get_all(COOKIE).iter();
    if several.next().is_none() || several.next().is_none() {
        return;
    }
    let parts: Vec<&[u8]> = fields
        .get_all(COOKIE)
        .iter()
        .map(HeaderValue::as_bytes)
        .collect();
    if let Ok(joined) = HeaderValue::from_bytes(&parts.join(&b"; "[..])) {
        fields.insert(COOKIE, joined);
    }
}

fn is_grpc(fields: &HeaderMap) -> bool {
    fields.get(CONTENT_TYPE).is_some_and(|value| {
        let value = value.as_bytes();
        value.starts_with(b"application/grpc") && !value.starts_with(b"application/grpc-web")
    })
}

/// The time that is left by the caller's word; `ours` says whether our own field counts.
fn caller_timeout(fields: &HeaderMap, ours: bool, grpc: bool) -> Option<Duration> {
    let text = |name| {
        fields
            .get(name)
            .and_then(|value: &HeaderValue| value.to_str().ok())
    };
    let grpc_timeout = grpc
        .then(|| text(headers::GRPC_TIMEOUT))
        .flatten()
        .and_then(deadline::parse_grpc_timeout);
    let ours = ours
        .then(|| text(headers::DEADLINE_MS))
        .flatten()
        .and_then(deadline::parse_deadline_ms);
    match (grpc_timeout, ours) {
        (Some(one), Some(other)) => Some(one.min(other)),
        (one, other) => one.or(other),
    }
}
