//! Keeps the answer of a call with a key: a copy is taken as it passes, and its end is held back
//! until the copy is durable, so that whoever has an answer gets the same one again.
//!
//! Stands on the life of a request.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, Response, StatusCode};
use http_body::{Body as _, Frame, SizeHint};
use outrigger_core::outcome::GrpcCode;
use outrigger_queue::{Conclusion, QueueBackend, StoredResult};
use tracing::warn;

use super::{UnderWay, leaves_open};
use crate::clock;
use crate::http::body::{BodyError, Layer, ResponseBody};
use crate::queueing::convert;

/// How long an answer waits for the store; after it, a repeat finds an unknown outcome.
const PATIENCE: Duration = Duration::from_secs(5);

/// What is needed to keep an answer.
pub(super) struct Keeper {
    pub(super) backend: Arc<dyn QueueBackend>,
    pub(super) under_way: UnderWay,
    pub(super) grpc: bool,
    /// An earlier try may have done what this answer does not tell of.
    pub(super) in_doubt: bool,
    pub(super) max_body: usize,
}

impl Keeper {
    /// The answer, which is kept as it is read. One without a body is kept at once.
    pub(super) async fn keep(self, response: Response<ResponseBody>) -> Response<ResponseBody> {
        if response.body().is_tunnel() || leaves_open(&response) {
            return response;
        }
        let copy = Copy {
            status: response.status(),
            fields: kept(response.headers()),
            body: BytesMut::new(),
            whole: true,
            trailers: None,
            keeper: self,
        };
        if response.body().is_end_stream() {
            copy.conclude().await;
            return response;
        }
        response.map(|inner| {
            ResponseBody::layered(Box::new(Body {
                inner,
                copy: Some(Box::new(copy)),
                writing: None,
                held: VecDeque::new(),
                ended: false,
            }))
        })
    }
}

/// What is said again; not what was said of this one exchange.
fn kept(fields: &HeaderMap) -> HeaderMap {
    let mut kept = fields.clone();
    let ours = fields
        .keys()
        .filter(|name| name.as_str().starts_with("outrigger-"));
    for name in ours {
        kept.remove(name);
    }
    kept
}

/// What has passed so far.
struct Copy {
    status: StatusCode,
    fields: HeaderMap,
    body: BytesMut,
    /// False once it is over `max_body`.
    whole: bool,
    trailers: Option<HeaderMap>,
    keeper: Keeper,
}

impl Copy {
    fn take(&mut self, frame: &Frame<Bytes>) {
        if let Some(trailers) = frame.trailers_ref() {
            self.trailers = Some(trailers.clone());
        }
        let Some(data) = frame.data_ref() else { return };
        if self.whole && self.body.len() + data.len() <= self.keeper.max_body {
            self.body.extend_from_slice(data);
        } else {
            self.whole = false;
            self.body = BytesMut::new();
        }
    }

    /// Whether the service has worked on the request for good; what it calls its own failure, or
    /// too early, is asked again.
    fn is_final(&self) -> bool {
        let busy = [
            StatusCode::REQUEST_TIMEOUT,
            StatusCode::TOO_EARLY,
            StatusCode::TOO_MANY_REQUESTS,
        ];
        if self.status.is_server_error() || busy.contains(&self.status) {
            return false;
        }
        if !self.keeper.grpc {
            return true;
        }
        let trailers = self.trailers.as_ref();
        let code = trailers
            .and_then(GrpcCode::from_headers)
            .or_else(|| GrpcCode::from_headers(&self.fields));
        !matches!(
            code.unwrap_or(GrpcCode::Unknown),
            GrpcCode::Cancelled
                | GrpcCode::Unknown
                | GrpcCode::DeadlineExceeded
                | GrpcCode::ResourceExhausted
                | GrpcCode::Aborted
                | GrpcCode::Internal
                | GrpcCode::Unavailable
        )
    }

    /// Resolves when it is durable, or when that takes too long.
    async fn conclude(self) {
        let how = match self.is_final() {
            false if self.keeper.in_doubt => return,
            false => Conclusion::Forgotten,
            true => Conclusion::Answered(self.whole.then(|| StoredResult {
                status: self.status.as_u16(),
                headers: convert::owned_fields(&self.fields),
                body: self.body.freeze(),
                trailers: self.trailers.as_ref().map(convert::owned_fields),
                finished_at: clock::unix_now(),
                truncated: false,
            })),
        };
        let Keeper {
            backend, under_way, ..
        } = self.keeper;
        let concluding = backend.conclude(under_way.id, how, clock::unix_now());
        match tokio::time::timeout(PATIENCE, concluding).await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => warn!(%error, "an answer is not kept"),
            Err(_) => warn!("an answer is not kept: the store does not answer"),
        }
    }
}

/// A body whose last frame comes when its copy is kept.
struct Body {
    inner: ResponseBody,
    /// None once it is being written, or when the answer broke off.
    copy: Option<Box<Copy>>,
    writing: Option<Pin<Box<dyn Future<Output = ()>>>>,
    held: VecDeque<Frame<Bytes>>,
    ended: bool,
}

impl Layer for Body {
    fn inner(&self) -> &ResponseBody {
        &self.inner
    }

    fn inner_mut(&mut self) -> &mut ResponseBody {
        &mut self.inner
    }

    fn poll_frame(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        loop {
            if let Some(writing) = &mut self.writing {
                ready!(writing.as_mut().poll(cx));
                self.writing = None;
            }
            if self.ended {
                return Poll::Ready(self.held.pop_front().map(Ok));
            }
            match ready!(Pin::new(&mut self.inner).poll_frame(cx)) {
                Some(Ok(frame)) => {
                    if let Some(copy) = &mut self.copy {
                        copy.take(&frame);
                    }
                    self.held.push_back(frame);
                    if self.held.len() > 1 {
                        return Poll::Ready(self.held.pop_front().map(Ok));
                    }
                }
                Some(Err(error)) => {
                    // Half an answer is none: what the service did is unknown.
                    self.copy = None;
                    self.held.clear();
                    self.ended = true;
                    return Poll::Ready(Some(Err(error)));
                }
                None => {
                    self.ended = true;
                    let copy = self.copy.take();
                    self.writing = copy.map(|copy| Box::pin(copy.conclude()) as Pin<Box<_>>);
                }
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.ended && self.held.is_empty() && self.writing.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        let inner = self.inner.size_hint();
        let held: usize = self
            .held
            .iter()
            .filter_map(Frame::data_ref)
            .map(Bytes::len)
            .sum();
        match inner.exact() {
            Some(left) => SizeHint::with_exact(left + held as u64),
            None => inner,
        }
    }
}
