//! One endpoint in use by one attempt.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use outrigger_core::ejection::EjectRequest;
use outrigger_core::outcome::{Observed, Outcome};
use outrigger_core::time::Mono;
use tracing::warn;

use crate::clock;
use crate::identity::peers::Peers;
use crate::snapshot::Service;
use crate::snapshot::live::{Endpoint, EndpointState};
use crate::upstream::connect::{Protocol, Source};

/// Counts an attempt against its endpoint until it is finished or dropped, so that load and
/// health are right even when the caller leaves in the middle.
pub struct EndpointUse {
    service: Arc<Service>,
    addr: SocketAddr,
    protocol: Protocol,
    peers: Option<Arc<Peers>>,
    source: Source,
    state: Arc<EndpointState>,
    started: Mono,
    head: Option<Mono>,
    open: bool,
    /// Whether what it comes to says something of the endpoint.
    observed: bool,
    hedged: bool,
}

impl EndpointUse {
    /// Starts an attempt towards `endpoint`, which speaks `protocol`.
    pub fn start(
        service: &Arc<Service>,
        endpoint: &Endpoint,
        protocol: Protocol,
        now: Mono,
    ) -> Self {
        endpoint.state.load.start(now);
        Self {
            service: Arc::clone(service),
            addr: endpoint.spec.addr,
            protocol,
            peers: None,
            source: Source::Any,
            state: Arc::clone(&endpoint.state),
            started: now,
            head: None,
            open: true,
            observed: true,
            hedged: false,
        }
    }

    /// It may be given up for a quicker one: that it took so long is then what was learned of it.
    pub fn hedged(&mut self) {
        self.hedged = true;
    }

    /// The endpoint's address.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// What the endpoint speaks.
    pub fn protocol(&self) -> Protocol {
        self.protocol
    }

    /// The same, known to be one of `peers`: spoken to with mutual TLS only.
    #[must_use]
    pub fn expecting(mut self, peers: Option<Arc<Peers>>) -> Self {
        self.peers = peers;
        self
    }

    /// Who may answer there; none is plaintext.
    pub fn peers(&self) -> Option<&Arc<Peers>> {
        self.peers.as_ref()
    }

    /// The same, connected to from `source`.
    #[must_use]
    pub fn from(mut self, source: Source) -> Self {
        self.source = source;
        self
    }

    /// Where to connect from.
    pub fn source(&self) -> Source {
        self.source
    }

    /// What we know of the endpoint.
    pub fn state(&self) -> &Arc<EndpointState> {
        &self.state
    }

    /// The same, of which nothing is learned: a copy that nobody waits for ejects no endpoint.
    #[must_use]
    pub fn unobserved(mut self) -> Self {
        self.observed = false;
        self
    }

    /// The attempt begins only `now`: what it waited for before is no latency of the endpoint's.
    pub fn restart(&mut self, now: Mono) {
        self.started = now;
    }

    /// The response head arrived: that is the latency the balancer learns.
    pub fn answered(&mut self, now: Mono) {
        self.head = Some(now);
    }

    /// An opaque connection is open: that is its latency, and a success already, for it may last.
    pub fn connected(&mut self, now: Mono) {
        self.head = Some(now);
        let params = &self.service.ejection;
        self.state.health.record(params, now, Outcome::Success);
    }

    /// The attempt is over and showed `observed`.
    pub fn finish(mut self, observed: &Observed, now: Mono) {
        if !self.observed {
            return;
        }
        self.open = false;
        let outcome = self.service.failure_on.classify(observed);
        if outcome == Outcome::Failure {
            // However fast: an endpoint that fails at once must not draw the traffic.
            self.state.load.finish_failed(now);
        } else {
            self.state.load.finish(now, self.latency());
        }
        if matches!(observed, Observed::ConnectFailed) {
            self.state.not_reached(now);
        } else if self.head.is_some() {
            self.state.reached();
        }
        let params = &self.service.ejection;
        if let Some(request) = self
            .state
            .health
            .record_attempt(params, now, observed, outcome)
        {
            self.eject(now, &request, observed);
        }
    }

    /// Time to the response head; a refused connection must not look fast.
    pub fn latency(&self) -> Option<Duration> {
        self.head.map(|head| head.saturating_since(self.started))
    }

    fn eject(&self, now: Mono, request: &EjectRequest, last: &Observed) {
        let service = &self.service.state;
        let set = service.endpoints();
        let until = service
            .gate
            .try_eject(&self.service.ejection, now, &self.state.health, || {
                let serving = || {
                    // Those that checks call unhealthy are out already: the last of the others
                    // stays.
                    set.endpoints.iter().filter(|endpoint| {
                        endpoint.takes_requests() && !endpoint.state.health.is_checked_unhealthy()
                    })
                };
                let ejected = serving().filter(|endpoint| endpoint.state.health.is_ejected(now));
                (ejected.count(), serving().count())
            });
        if let Some(until) = until {
            let seconds = until.saturating_since(now).as_secs_f64();
            let why = format!(
                "{} failures in a row, the last: {}",
                request.consecutive,
                told(last)
            );
            warn!(service = service.name, endpoint = %self.addr, seconds, why, "endpoint ejected");
            self.state.reasons.ejected(why);
        }
    }
}

/// A failure, for a person.
fn told(observed: &Observed) -> String {
    let text = match observed {
        Observed::Head { status, grpc } => {
            return match grpc {
                Some(code) => format!("answered {}", code.name()),
                None => format!("answered {}", status.as_u16()),
            };
        }
        Observed::ConnectFailed => "no connection",
        Observed::Unsent => "closed before the request was sent",
        Observed::RefusedStream => "refused the stream",
        Observed::ResetBeforeResponse => "broke off before its answer",
        Observed::ResetInBody => "broke off in its answer",
        Observed::PerTryTimeout => "no answer within timeouts.perTry",
        Observed::RequestTimeout => "no answer within timeouts.request",
        Observed::CallerDeadline => "no answer before the caller's deadline",
        Observed::CallerGone => "the caller left",
        Observed::Protocol => "its bytes were not HTTP",
    };
    text.to_owned()
}

impl Drop for EndpointUse {
    fn drop(&mut self) {
        if self.open {
            // Abandoned by the caller: nobody failed.
            let now = clock::now();
            let outrun = self.hedged.then(|| now.saturating_since(self.started));
            self.state.load.finish(now, self.latency().or(outrun));
        }
    }
}
