//! The sidecar's end of the discovery stream: from a control plane to a [`ConfigSink`].
//!
//! Owns the connection, its retries and the answers. What has been received and what is in effect
//! is in `received`; what survives a restart in `snapshot_cache`. Parses no documents: the sink
//! does, and what it refuses is told to the control plane word for word. Stands on the life of a
//! config update, where it enters the sidecar.
//!
//! The same stream tells which endpoints cannot be connected to (`unreachable`).
//!
//! A broken stream changes nothing: the sidecar goes on with what it has, for ever if need be, and
//! says on reconnect what that is, so that only the difference is sent.

mod received;
mod roots;
mod unreachable;

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use http::uri::PathAndQuery;
use http::{Request, Response};
use hyper::body::Incoming;
use hyper::client::conn::http2::SendRequest;
use outrigger_config::wire::{
    BUNDLE_TYPE, DELTA_PATH, DOCUMENT_TYPE, DeltaDiscoveryRequest, DeltaDiscoveryResponse,
    ENDPOINTS_TYPE, Endpoints, Locality, MAX_MESSAGE_BYTES, Node, Status, Struct, UNREACHABLE_TYPE,
    Value, cap_diagnostics,
};
use outrigger_core::backoff;
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, sleep_until, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::body::Body;
use tonic::client::Grpc;
use tonic::metadata::{Ascii, MetadataValue};
use tonic_prost::ProstCodec;
use tracing::{debug, info, warn};

use super::dial::{CONNECT_WITHIN, Dialer};
use super::snapshot_cache::{LastGood, NamedDocument, SnapshotCache};
use crate::app::Shared;
use crate::clock;
use received::Received;

/// How long the first documents wait for the first endpoints: a resource not delivered 15 s after
/// it was asked for counts as absent (xDS protocol, gRFC A57).
const ENDPOINTS_WITHIN: Duration = Duration::from_secs(15);

/// How often it is looked which endpoints cannot be connected to.
const TELL_EVERY: Duration = Duration::from_secs(1);

/// How this sidecar presents itself, and what it starts from.
pub struct Options {
    /// How the control plane is reached.
    pub dialer: Dialer,
    /// Who has our identity, for when the control plane asks for it.
    pub shared: Arc<Shared>,
    /// Unique among the sidecars: the workload's name, with its namespace.
    pub node_id: String,
    /// The service beside this sidecar; empty when there is none.
    pub service: String,
    /// The workload's namespace.
    pub namespace: String,
    /// The workload's service account.
    pub service_account: String,
    /// The workload's zone; empty when unknown.
    pub zone: String,
    /// The workload's labels.
    pub labels: BTreeMap<String, String>,
    /// What [`SnapshotCache::load`] found. Applied first, before anything is dialed.
    pub resume: Option<LastGood>,
    /// Where every accepted state is kept; `None` keeps nothing.
    pub cache: Option<SnapshotCache>,
    /// Shown to metrics and the admin API.
    pub link: Arc<Link>,
}

/// Takes updates; implemented where snapshots are compiled.
pub trait ConfigSink {
    /// Takes an update as a whole or refuses it as a whole.
    ///
    /// # Errors
    /// The diagnostics for the control plane, at most 4 KiB (longer ones are cut). What was in
    /// effect stays in effect.
    fn apply(&mut self, update: Update) -> Result<(), String>;
}

/// A change of what is in effect. At least one member says something.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Update {
    /// The whole set of documents, when any of them changed.
    pub documents: Option<DocumentSet>,
    /// Services whose endpoints changed, each with all its endpoints.
    pub endpoints: Vec<Arc<Endpoints>>,
    /// Services (`namespace/name`) that no longer have a pushed set of endpoints.
    pub removed_endpoints: Vec<String>,
}

/// Every document of the mesh.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct DocumentSet {
    /// The control plane's version of the set.
    pub version: String,
    /// By resource name, such as `MeshRoute/shop/orders`.
    pub documents: BTreeMap<String, NamedDocument>,
}

impl LastGood {
    /// All of it as one update.
    pub fn to_update(&self) -> Update {
        let documents = self.documents.clone();
        Update {
            documents: Some(DocumentSet {
                version: self.version.clone(),
                documents,
            }),
            endpoints: self.endpoints.values().cloned().collect(),
            removed_endpoints: Vec::new(),
        }
    }
}

/// The state of the connection, for metrics (`outrigger_control_plane_connected`) and people.
#[derive(Debug, Default)]
pub struct Link {
    connected: AtomicBool,
    connects: AtomicU64,
    accepted: AtomicU64,
    refused: AtomicU64,
    problem: Mutex<Option<String>>,
}

impl Link {
    /// Whether a stream is open and has been answered.
    pub fn connected(&self) -> bool {
        self.connected.load(Ordering::Relaxed)
    }

    /// How many streams have been opened.
    pub fn connects(&self) -> u64 {
        self.connects.load(Ordering::Relaxed)
    }

    /// How many pushes were accepted.
    pub fn accepted(&self) -> u64 {
        self.accepted.load(Ordering::Relaxed)
    }

    /// How many pushes were refused.
    pub fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    /// The latest trouble: why there is no connection, or why the latest push was refused.
    pub fn problem(&self) -> Option<String> {
        self.problem
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn set_problem(&self, problem: Option<String>) {
        *self.problem.lock().unwrap_or_else(PoisonError::into_inner) = problem;
    }
}

/// Follows the control plane for as long as it is polled; never returns. Needs a tokio runtime with
/// time and I/O; the sink may be `!Send`.
///
/// # Cancel safety
/// Dropping the future closes the connection; an update is taken whole or not at all.
pub async fn run(mut options: Options, mut sink: impl ConfigSink) -> Infallible {
    let mut received = Received::default();
    if let Some(last_good) = options.resume.take() {
        let version = last_good.version.clone();
        match sink.apply(last_good.to_update()) {
            Ok(()) => {
                info!(version, "config of the last run is in effect");
                received = Received::resumed(last_good);
            }
            Err(problem) => warn!(version, problem, "config of the last run is refused"),
        }
    }
    let cache = options.cache.take();
    let follow = follow(&options, &mut received, cache.as_ref(), &mut sink);
    match &cache {
        // Both never return.
        Some(cache) => tokio::select! {
            never = follow => never,
            never = cache.write_behind() => never,
        },
        None => follow.await,
    }
}

async fn follow(
    options: &Options,
    received: &mut Received,
    cache: Option<&SnapshotCache>,
    sink: &mut impl ConfigSink,
) -> Infallible {
    let mut failures = 0u32;
    let mut rng = fastrand::Rng::new();
    loop {
        let mut stream = Stream {
            options,
            received,
            cache,
            sink,
            answered: false,
        };
        let ended = stream.run().await;
        let answered = stream.answered;
        options.link.connected.store(false, Ordering::Relaxed);
        options.shared.identity.deaf();
        received.disconnected();
        failures = if answered { 0 } else { failures + 1 };
        let wait = reconnect_after(failures, &mut rng);
        match ended {
            Ok(()) => info!(?wait, "control plane closed the stream"),
            Err(problem) => {
                if answered || failures == 1 || failures.is_multiple_of(10) {
                    warn!(
                        problem,
                        failures,
                        ?wait,
                        "no control plane; what is in effect stays"
                    );
                }
                options.link.set_problem(Some(problem));
            }
        }
        sleep(wait).await;
    }
}

/// The bound of the wait after the first attempt that failed; it doubles.
const FIRST_WAIT: Duration = Duration::from_millis(100);

/// The longest wait between two attempts.
const LONGEST_WAIT: Duration = Duration::from_secs(30);

/// Within this time the sidecars of a control plane that ended their streams come back.
const COME_BACK_WITHIN: Duration = Duration::from_secs(1);

/// How long to wait after `failures` attempts in a row without an answer, with full jitter: the
/// sidecars of a control plane that was away do not come all at once.
pub fn reconnect_after(failures: u32, rng: &mut fastrand::Rng) -> Duration {
    match failures.checked_sub(1) {
        None => backoff::spread(Duration::ZERO, COME_BACK_WITHIN, rng),
        Some(n) => backoff::full_jitter(FIRST_WAIT, LONGEST_WAIT, n, rng),
    }
}

/// One stream.
struct Stream<'a, S> {
    options: &'a Options,
    received: &'a mut Received,
    cache: Option<&'a SnapshotCache>,
    sink: &'a mut S,
    answered: bool,
}

impl<S: ConfigSink> Stream<'_, S> {
    /// Until the stream ends: `Ok` when the control plane ended it in order.
    async fn run(&mut self) -> Result<(), String> {
        let svid = self.options.shared.identity.current();
        let svid = svid.as_deref();
        let token = self.options.dialer.token(svid)?;
        let (sender, connection) = self.options.dialer.connect(svid).await?;
        let mut connection = pin!(connection);
        tokio::select! {
            result = self.talk(sender, token) => result,
            ended = connection.as_mut() => match ended {
                Ok(()) => Err("the connection was closed".to_owned()),
                Err(e) => Err(format!("the connection broke: {e}")),
            },
        }
    }

    async fn talk(
        &mut self,
        sender: SendRequest<Body>,
        token: Option<MetadataValue<Ascii>>,
    ) -> Result<(), String> {
        // Two subscriptions or three, then one answer per response; a response of a type is sent
        // only after the answer to the one before.
        let (requests, outgoing) = mpsc::channel(8);
        for request in self.subscriptions() {
            requests.try_send(request).expect("there is room for three");
        }
        let codec = ProstCodec::<DeltaDiscoveryRequest, DeltaDiscoveryResponse>::default();
        let mut grpc = Grpc::with_origin(H2(sender), self.options.dialer.address().clone())
            .max_decoding_message_size(MAX_MESSAGE_BYTES);
        let mut request = tonic::Request::new(ReceiverStream::new(outgoing));
        if let Some(token) = token {
            request.metadata_mut().insert("authorization", token);
        }
        let call = grpc.streaming(request, PathAndQuery::from_static(DELTA_PATH), codec);
        let response = timeout(CONNECT_WITHIN, call).await;
        let response = response.map_err(|_| "the control plane does not answer".to_owned())?;
        let responses = response.map_err(|e| describe(&e))?.into_inner();
        self.options.link.connects.fetch_add(1, Ordering::Relaxed);
        self.answer_all(responses, &requests).await
    }

    async fn answer_all(
        &mut self,
        mut responses: Streaming<DeltaDiscoveryResponse>,
        requests: &mpsc::Sender<DeltaDiscoveryRequest>,
    ) -> Result<(), String> {
        let mut held: Option<(DeltaDiscoveryResponse, Instant)> = None;
        let mut told = BTreeSet::new();
        let mut looks = interval(TELL_EVERY);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let until = held.as_ref().map(|(_, until)| *until);
            let overdue = async {
                match until {
                    Some(until) => sleep_until(until).await,
                    None => std::future::pending().await,
                }
            };
            let response = tokio::select! {
                message = responses.message() => match message {
                    Ok(Some(response)) => Some(response),
                    Ok(None) => return Ok(()),
                    Err(e) => return Err(describe(&e)),
                },
                () = overdue => None,
                _ = looks.tick() => {
                    self.tell_unreachable(&mut told, requests);
                    continue;
                }
            };
            if let Some(response) = response {
                self.note_answered();
                if response.type_url == BUNDLE_TYPE {
                    let taken = roots::take_up(&response, &self.options.shared);
                    self.answer(&response, taken, requests).await?;
                    continue;
                }
                self.received.take(&response);
                if response.type_url == DOCUMENT_TYPE && self.received.must_wait_for_endpoints() {
                    held = Some((response, Instant::now() + ENDPOINTS_WITHIN));
                    continue;
                }
                self.settle(&response, requests).await?;
            }
            let overdue = until.is_some_and(|until| until <= Instant::now());
            if (overdue || !self.received.must_wait_for_endpoints())
                && let Some((documents, _)) = held.take()
            {
                self.settle(&documents, requests).await?;
            }
        }
    }

    /// Brings a response into effect, and answers it.
    async fn settle(
        &mut self,
        response: &DeltaDiscoveryResponse,
        requests: &mpsc::Sender<DeltaDiscoveryRequest>,
    ) -> Result<(), String> {
        let applied = self.received.apply(&response.type_url, self.sink);
        if let (Ok(true), Some(cache), Some(state)) =
            (&applied, self.cache, self.received.in_effect())
        {
            cache.store(state);
        }
        self.answer(response, applied.map(drop), requests).await
    }

    /// Says what became of a response.
    async fn answer(
        &mut self,
        response: &DeltaDiscoveryResponse,
        taken: Result<(), String>,
        requests: &mpsc::Sender<DeltaDiscoveryRequest>,
    ) -> Result<(), String> {
        let link = &self.options.link;
        let refusal = match taken {
            Ok(()) => {
                link.accepted.fetch_add(1, Ordering::Relaxed);
                link.set_problem(None);
                debug!(
                    type_url = response.type_url,
                    version = response.system_version_info,
                    "push accepted"
                );
                None
            }
            Err(problem) => {
                let problem = cap_diagnostics(problem);
                link.refused.fetch_add(1, Ordering::Relaxed);
                link.set_problem(Some(problem.clone()));
                let version = &response.system_version_info;
                warn!(version, problem, "push refused; what is in effect stays");
                Some(problem)
            }
        };
        let answer = DeltaDiscoveryRequest {
            type_url: response.type_url.clone(),
            response_nonce: response.nonce.clone(),
            // 3: invalid argument.
            error_detail: refusal.map(|message| Status {
                code: 3,
                message,
                details: Vec::new(),
            }),
            ..DeltaDiscoveryRequest::default()
        };
        requests
            .send(answer)
            .await
            .map_err(|_| "the stream was closed".to_owned())
    }

    /// Says what has changed since `told`. When there is no room for it, later.
    fn tell_unreachable(
        &self,
        told: &mut BTreeSet<String>,
        requests: &mpsc::Sender<DeltaDiscoveryRequest>,
    ) {
        let now = unreachable::now(&self.options.shared, clock::now());
        if now == *told || !self.answered {
            return;
        }
        let request = DeltaDiscoveryRequest {
            type_url: UNREACHABLE_TYPE.to_owned(),
            resource_names_subscribe: now.difference(told).cloned().collect(),
            resource_names_unsubscribe: told.difference(&now).cloned().collect(),
            ..DeltaDiscoveryRequest::default()
        };
        if requests.try_send(request).is_ok() {
            *told = now;
        }
    }

    /// Endpoints first, so that they are sent first and are there when the documents arrive; roots
    /// last, and only to whom the control plane's count.
    fn subscriptions(&self) -> Vec<DeltaDiscoveryRequest> {
        let subscription = |(type_url, versions): (&str, _)| DeltaDiscoveryRequest {
            type_url: type_url.to_owned(),
            initial_resource_versions: versions,
            ..DeltaDiscoveryRequest::default()
        };
        let mut all: Vec<_> = [ENDPOINTS_TYPE, DOCUMENT_TYPE]
            .map(|type_url| subscription((type_url, self.received.versions(type_url))))
            .into();
        if roots::are_wanted(&self.options.shared) {
            all.push(subscription((BUNDLE_TYPE, BTreeMap::new())));
        }
        if let Some(first) = all.first_mut() {
            first.node = Some(node(self.options));
        }
        all
    }

    fn note_answered(&mut self) {
        if !self.answered {
            self.answered = true;
            self.options.link.connected.store(true, Ordering::Relaxed);
            self.options.link.set_problem(None);
            info!(address = %self.options.dialer.address(), "control plane connected");
        }
    }
}

fn node(options: &Options) -> Node {
    let fields = BTreeMap::from([
        ("namespace".to_owned(), Value::text(&options.namespace)),
        (
            "serviceAccount".to_owned(),
            Value::text(&options.service_account),
        ),
        ("labels".to_owned(), Value::texts(&options.labels)),
    ]);
    Node {
        id: options.node_id.clone(),
        cluster: options.service.clone(),
        metadata: Some(Struct { fields }),
        locality: Some(Locality {
            zone: options.zone.clone(),
            ..Locality::default()
        }),
        user_agent_name: "outrigger".to_owned(),
        user_agent_version: env!("CARGO_PKG_VERSION").to_owned(),
    }
}

fn describe(status: &tonic::Status) -> String {
    format!(
        "the control plane answered {:?}: {}",
        status.code(),
        status.message()
    )
}

/// The connection as tonic wants to see it.
pub struct H2(pub SendRequest<Body>);

impl tower::Service<Request<Body>> for H2 {
    type Response = Response<Incoming>;
    type Error = hyper::Error;
    type Future = Pin<Box<dyn Future<Output = hyper::Result<Response<Incoming>>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<hyper::Result<()>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        Box::pin(self.0.send_request(request))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whatever the seed, a crowd of sidecars is spread over the whole wait, and none waits longer
    /// than the bound of its attempt.
    #[test]
    fn a_crowd_comes_back_spread_over_the_whole_wait() {
        const CROWD: usize = 2_000;
        for seed in 0..50 {
            let mut rng = fastrand::Rng::with_seed(seed);
            for failures in [0, 1, 2, 5, 9, 10, 40, u32::MAX] {
                let bound = match failures {
                    0 => COME_BACK_WITHIN,
                    n => backoff::ceiling(FIRST_WAIT, LONGEST_WAIT, n - 1),
                };
                assert!(bound <= LONGEST_WAIT);
                let mut tenths = [0; 10];
                for _ in 0..CROWD {
                    let wait = reconnect_after(failures, &mut rng);
                    assert!(wait <= bound, "seed {seed}, {failures} failures: {wait:?}");
                    let share = wait.as_secs_f64() / bound.as_secs_f64();
                    tenths[((share * 10.0) as usize).min(9)] += 1;
                }
                // A fair share is 200; beyond 300 and below 100 are seven standard deviations.
                assert!(
                    tenths.iter().all(|n| (100..300).contains(n)),
                    "seed {seed}, {failures} failures: {tenths:?}"
                );
            }
        }
    }
}
