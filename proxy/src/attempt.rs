//! One try of a request: checkout, send, wait for the head, see what it was.
//!
//! The endpoint is already chosen; whether there is another try is decided in `forward`.
//! Stands on the life of a request.

use std::future::Future;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;
use http::header::{RETRY_AFTER, UPGRADE};
use http::{HeaderMap, Response};
use http_body::{Body as _, Frame};
use outrigger_core::error_code::ErrorCode;
use outrigger_core::headers;
use outrigger_core::outcome::{GrpcCode, Observed};
use outrigger_core::retry::Asked;
use outrigger_core::time::Mono;

use crate::call::Call;
use crate::clock;
use crate::deadline::Deadline;
use crate::error::chain;
use crate::features::fault;
use crate::http::body::{RequestBody, Upload};
use crate::http::incoming::Incoming;
use crate::identity;
use crate::listener::Direction;
use crate::snapshot::Service;
use crate::snapshot::features::Fault;
use crate::upstream::connect::{ConnectError, Secure, Target};
use crate::upstream::endpoint::EndpointUse;
use crate::upstream::pool::{self, Lease, SendError};
use crate::wheel::Sleep;

/// How long a gRPC head is held back to see a status in the trailers, while a retry is possible.
const HOLD_HEAD: Duration = Duration::from_millis(50);

/// The time limits of one try.
pub struct Window<'a> {
    /// When it begins.
    pub now: Mono,
    /// Of the whole request.
    pub deadline: &'a Deadline,
    /// Of this try.
    pub per_try: Option<Duration>,
    /// How to connect.
    pub connection: pool::Params,
    /// The fields of the head, where they are not those of the request's only try at the time.
    pub fields: Option<&'a HeaderMap>,
    /// What may stand in for the try.
    pub fault: Option<&'a Fault>,
}

/// A response head, with everything that lives as long as its body.
pub struct Answer {
    /// Head and body.
    pub response: Response<Incoming>,
    /// The first frame, when it was read to learn the gRPC status.
    pub peeked: Option<Frame<Bytes>>,
    /// The connection.
    pub lease: Lease,
    /// The endpoint in use.
    pub endpoint: EndpointUse,
    /// What the head (and a peeked trailer) showed.
    pub observed: Observed,
    /// When the head came.
    pub at: Mono,
    /// Whether a sidecar whose identity is proved sent it.
    pub meshed: bool,
}

/// No response head came.
pub struct Failure {
    /// What was seen.
    pub observed: Observed,
    /// One sentence for a person.
    pub detail: String,
    /// The request's body, when nothing of the request left: it can be sent again.
    pub unsent: Option<Box<RequestBody>>,
    /// A pooled connection closed under the request, without a byte of an answer: most likely it
    /// had closed before.
    pub stale: bool,
    /// A fault on purpose: says nothing of the service.
    pub injected: bool,
    /// There was no TLS session.
    pub tls: bool,
}

impl Failure {
    /// Whether the service may have worked on the request.
    pub fn leaves_in_doubt(&self) -> bool {
        let nothing = matches!(
            self.observed,
            Observed::ConnectFailed
                | Observed::Unsent
                | Observed::RefusedStream
                | Observed::Head { .. }
        );
        !nothing && !self.injected
    }

    fn new(observed: Observed, detail: String) -> Self {
        Self {
            observed,
            detail,
            unsent: None,
            stale: false,
            injected: false,
            tls: false,
        }
    }

    /// A try that a fault on purpose stood in for.
    pub fn injected(observed: Observed, detail: &str) -> Self {
        Self {
            injected: true,
            ..Self::new(observed, detail.to_owned())
        }
    }

    /// There is no connection.
    fn connect(call: &Call, error: &ConnectError) -> Self {
        if let ConnectError::Tls { refused, .. } = error {
            let metrics = &call.worker.shared.metrics;
            identity::count_refusal(metrics, Direction::Outbound, refused);
        }
        Self {
            tls: error.is_tls(),
            ..Self::new(Observed::ConnectFailed, chain(error))
        }
    }

    fn unsent(self, body: Box<RequestBody>) -> Self {
        Self {
            unsent: Some(body),
            ..self
        }
    }
}

impl Failure {
    /// The code for the caller, should this be the last try.
    pub fn code(&self) -> ErrorCode {
        match self.observed {
            Observed::ConnectFailed if self.tls => ErrorCode::TlsFailed,
            Observed::ConnectFailed => ErrorCode::ConnectFailed,
            Observed::PerTryTimeout | Observed::RequestTimeout => ErrorCode::UpstreamTimeout,
            Observed::CallerDeadline => ErrorCode::DeadlineExceeded,
            Observed::Protocol => ErrorCode::UpstreamProtocol,
            Observed::CallerGone => ErrorCode::BadRequest,
            Observed::Unsent
            | Observed::RefusedStream
            | Observed::ResetBeforeResponse
            | Observed::ResetInBody => ErrorCode::UpstreamReset,
            // A head is a failure only when nobody sent it.
            Observed::Head { .. } => ErrorCode::FaultInjected,
        }
    }
}

impl Answer {
    /// What the upstream says of coming again: `Retry-After`, or the gRPC pushback (gRFC A6).
    /// One that succeeded is not asked: nobody comes again.
    pub fn asked(&self) -> Asked {
        if let Observed::Head { status, grpc } = self.observed
            && status.is_success()
            && grpc.is_none_or(|code| code == GrpcCode::Ok)
        {
            return Asked::Nothing;
        }
        let fields = self.response.headers();
        let trailers = self.peeked.as_ref().and_then(Frame::trailers_ref);
        let pushback = fields
            .get(headers::GRPC_RETRY_PUSHBACK)
            .or_else(|| trailers?.get(headers::GRPC_RETRY_PUSHBACK));
        if let Some(pushback) = pushback {
            return headers::parse_retry_pushback(pushback).map_or(Asked::Never, Asked::After);
        }
        let Some(after) = fields.get(RETRY_AFTER) else {
            return Asked::Nothing;
        };
        headers::parse_retry_after(after, clock::unix_now()).map_or(Asked::Nothing, Asked::After)
    }

    /// Throws the answer away for another try. A short body is read to its end, so that the
    /// connection can be used again.
    pub fn discard(self, up_to: u64, upload: &Upload) {
        let Self {
            response,
            lease,
            endpoint,
            observed,
            ..
        } = self;
        endpoint.finish(&observed, clock::now());
        let mut body = response.into_body();
        if !upload.ended() {
            // The rest of the request goes to the next try; here nobody would finish it.
            return lease.discard();
        }
        if body.is_end_stream() {
            return lease.release();
        }
        if body.size_hint().upper().is_none_or(|size| size > up_to) {
            return lease.discard();
        }
        tokio::task::spawn_local(async move {
            loop {
                match std::future::poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await {
                    Some(Ok(_)) => {}
                    Some(Err(_)) => return lease.discard(),
                    None => return lease.release(),
                }
            }
        });
    }
}

/// Runs one try.
///
/// # Errors
/// [`Failure`] when no response head came.
///
/// # Cancel safety
/// Dropping the future resets the stream or closes the connection, and counts as an abandoned
/// try of the endpoint.
pub async fn attempt(
    call: &Call,
    service: &Arc<Service>,
    mut endpoint: EndpointUse,
    body: RequestBody,
    window: &Window<'_>,
    may_retry: bool,
) -> Result<Answer, Failure> {
    let addr = endpoint.addr();
    let per_try = window.per_try.map(|limit| window.now + limit);
    let mut timer = Timer::new(call, window.deadline, per_try);
    if let Some(fault) = window.fault {
        // Boxed: rare. The endpoint is given back as it was, for it was not asked.
        if let Err(injected) = Box::pin(fault::inject(call, fault, &mut timer)).await {
            return Err(injected.unsent(Box::new(body)));
        }
        endpoint.restart(clock::now());
    }
    // A try that finds nobody, or hears nothing, is a try as well.
    service.metrics.attempts.increment(1);
    let svid = match endpoint.peers() {
        None => None,
        Some(_) => match call.worker.shared.identity.current() {
            None => {
                let refused = call.worker.shared.identity.missing();
                let failure = Failure::connect(call, &ConnectError::Tls { addr, refused });
                return Err(failed(endpoint, failure.unsent(Box::new(body))));
            }
            some => some,
        },
    };
    let ends = svid.as_deref().zip(endpoint.peers());
    let secure = ends.map(|(svid, peers)| Secure { svid, peers });
    let target = Target {
        addr,
        protocol: call.protocol(&endpoint),
        source: endpoint.source(),
        session: secure.as_ref().map(Secure::session),
    };

    let open = Arc::clone(&endpoint.state().connections);
    let checkout = call
        .worker
        .pools
        .checkout(target, &window.connection, &open, secure.as_ref());
    let mut lease = match timer.guard(checkout).await {
        Ok(Ok(lease)) => lease,
        Ok(Err(error)) => {
            let failure = Failure::connect(call, &error);
            return Err(failed(endpoint, failure.unsent(Box::new(body))));
        }
        Err(observed) => {
            let detail = format!("no connection to {addr} in time");
            let failure = Failure::new(observed, detail);
            return Err(failed(endpoint, failure.unsent(Box::new(body))));
        }
    };

    let sent = lease.send(&call.outgoing(window.fields), body);
    let response = match timer.guard(sent).await {
        Ok(Ok(response)) => response,
        Ok(Err(error)) => {
            let failure = classify(call, addr, error, lease.reused());
            if failure.stale {
                lease.discard_stale();
            } else {
                lease.discard();
            }
            return Err(failed(endpoint, failure));
        }
        Err(observed) => {
            lease.discard();
            let detail = match observed {
                Observed::CallerGone => "the rest of the request body did not come".to_owned(),
                _ => format!("no answer from {addr} in time"),
            };
            return Err(failed(endpoint, Failure::new(observed, detail)));
        }
    };
    let at = clock::now();
    endpoint.answered(at);

    let (mut parts, mut body) = response.into_parts();
    let mut peeked = None;
    let mut grpc = None;
    if call.grpc {
        grpc = GrpcCode::from_headers(&parts.headers);
        if grpc.is_none() && parts.status.is_success() {
            if may_retry && !body.is_end_stream() {
                peeked = peek(call, &mut body).await;
            }
            let trailers = peeked.as_ref().and_then(Frame::trailers_ref);
            grpc = trailers.and_then(GrpcCode::from_headers);
        } else if grpc.is_none() {
            grpc = Some(GrpcCode::from_http(parts.status));
        }
    }
    // Whoever asked may not be told to switch protocols unasked (RFC 9110 §7.8).
    let switched = parts.status == http::StatusCode::SWITCHING_PROTOCOLS;
    if switched && (call.switch.is_none() || !parts.headers.contains_key(UPGRADE)) {
        lease.discard();
        let detail = format!("{addr} switched protocols without being asked");
        return Err(failed(endpoint, Failure::new(Observed::Protocol, detail)));
    }
    // No class of HTTP (RFC 9110 §15). Our own codec refuses it by itself.
    if parts.status.as_u16() > 599 {
        lease.discard();
        let detail = format!("{addr} answered with the status {}", parts.status.as_u16());
        return Err(failed(endpoint, Failure::new(Observed::Protocol, detail)));
    }
    parts.extensions.clear();
    // Without a gRPC status yet, the head says nothing bad: the trailers decide at the end.
    let observed = Observed::Head {
        status: parts.status,
        grpc,
    };
    let response = Response::from_parts(parts, body);
    Ok(Answer {
        response,
        peeked,
        lease,
        endpoint,
        observed,
        at,
        meshed: target.session.is_some(),
    })
}

fn failed(endpoint: EndpointUse, failure: Failure) -> Failure {
    // A connection that had closed says nothing of the endpoint.
    let seen = if failure.stale {
        Observed::Unsent
    } else {
        failure.observed
    };
    endpoint.finish(&seen, clock::now());
    failure
}

/// The first frame of a gRPC body, if it comes within [`HOLD_HEAD`].
async fn peek(call: &Call, body: &mut Incoming) -> Option<Frame<Bytes>> {
    let mut hold = call.worker.wheel.sleep_until(clock::now() + HOLD_HEAD);
    std::future::poll_fn(|cx| {
        if let Poll::Ready(frame) = Pin::new(&mut *body).poll_frame(cx) {
            // An error is met again by whoever reads on.
            return Poll::Ready(frame.and_then(Result::ok));
        }
        Pin::new(&mut hold).poll(cx).map(|()| None)
    })
    .await
}

fn classify(call: &Call, addr: SocketAddr, error: SendError, reused: bool) -> Failure {
    match error {
        SendError::Unsent(body, error) => {
            let detail = format!(
                "{addr} closed before the request was sent: {}",
                chain(&error)
            );
            Failure::new(Observed::Unsent, detail).unsent(body)
        }
        SendError::Refused(error) => {
            let detail = format!("{addr} refused the stream: {}", chain(&error));
            Failure::new(Observed::RefusedStream, detail)
        }
        SendError::Failed(error) => {
            let observed = if call.upload.failed() {
                Observed::CallerGone
            } else if error.is_malformed() {
                Observed::Protocol
            } else {
                Observed::ResetBeforeResponse
            };
            let detail = format!("{addr} broke off before its answer: {}", chain(&error));
            let stale = reused && observed == Observed::ResetBeforeResponse;
            Failure {
                stale,
                ..Failure::new(observed, detail)
            }
        }
    }
}

/// One timer for all limits of a try.
pub struct Timer<'a> {
    deadline: &'a Deadline,
    per_try: Option<Mono>,
    sleep: Option<Sleep>,
}

impl<'a> Timer<'a> {
    fn new(call: &Call, deadline: &'a Deadline, per_try: Option<Mono>) -> Self {
        let mut timer = Self {
            deadline,
            per_try,
            sleep: None,
        };
        timer.sleep = timer.due().map(|(at, _)| call.worker.wheel.sleep_until(at));
        timer
    }

    fn due(&self) -> Option<(Mono, Observed)> {
        let whole = self.deadline.due();
        match (self.per_try, whole) {
            (Some(at), Some((whole, _))) if at < whole => Some((at, Observed::PerTryTimeout)),
            (Some(at), None) => Some((at, Observed::PerTryTimeout)),
            (_, whole) => whole,
        }
    }

    /// Waits for `work` until the limit that passes first.
    ///
    /// # Errors
    /// What it means that the limit passed.
    pub async fn guard<T>(&mut self, work: impl Future<Output = T>) -> Result<T, Observed> {
        let mut work = pin!(work);
        std::future::poll_fn(|cx| {
            if let Poll::Ready(done) = work.as_mut().poll(cx) {
                return Poll::Ready(Ok(done));
            }
            loop {
                let Some(sleep) = &mut self.sleep else {
                    return Poll::Pending;
                };
                std::task::ready!(Pin::new(&mut *sleep).poll(cx));
                // The upload may have moved meanwhile, and the limit with it.
                let Some((at, observed)) = self.due() else {
                    return Poll::Pending;
                };
                if at <= clock::now() {
                    return Poll::Ready(Err(observed));
                }
                if let Some(sleep) = &mut self.sleep {
                    sleep.reset(at);
                }
            }
        })
        .await
    }
}
