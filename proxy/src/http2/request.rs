//! The body of a request over HTTP/2 as it comes in.
//!
//! Stands on the life of a request.

use std::cell::Cell;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use h2::RecvStream;
use http::HeaderMap;
use http::header::CONTENT_LENGTH;
use http_body::{Frame, SizeHint};

/// What a caller sends after the head of its request.
///
/// h2 holds what has come against the announced length, and a stream that was reset is an error,
/// whatever the reason: a body that breaks off is never a whole one.
pub struct RequestStream {
    /// None: there is no body.
    recv: Option<RecvStream>,
    /// What is still to come, if it was announced.
    left: Option<u64>,
    /// To be told that the body is wanted: its caller waits for `100 Continue`.
    wanted: Option<Rc<Cell<bool>>>,
}

impl RequestStream {
    /// The body that belongs to a head.
    pub fn new(recv: RecvStream, head: &HeaderMap) -> Self {
        if recv.is_end_stream() {
            return Self::empty();
        }
        let length = head.get(CONTENT_LENGTH);
        Self {
            recv: Some(recv),
            left: length.and_then(|length| length.to_str().ok()?.parse().ok()),
            wanted: None,
        }
    }

    /// No body.
    pub fn empty() -> Self {
        Self {
            recv: None,
            left: Some(0),
            wanted: None,
        }
    }

    /// Sets `wanted` when somebody first asks for the body and nothing of it is there.
    pub fn tell(&mut self, wanted: Rc<Cell<bool>>) {
        self.wanted = Some(wanted);
    }

    /// Whether nothing more comes.
    pub fn is_end_stream(&self) -> bool {
        self.recv.as_ref().is_none_or(RecvStream::is_end_stream)
    }

    /// What is still to come, if it was announced.
    pub fn size_hint(&self) -> SizeHint {
        self.left
            .map_or_else(SizeHint::default, SizeHint::with_exact)
    }

    /// The next piece.
    pub fn poll_frame(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, h2::Error>>> {
        let Some(recv) = &mut self.recv else {
            return Poll::Ready(None);
        };
        let polled = recv.poll_data(cx);
        if let Some(wanted) = self.wanted.take() {
            wanted.set(polled.is_pending());
        }
        match ready!(polled) {
            Some(Ok(data)) => {
                // Taken: the peer may send as much again. Fails only when the stream is over.
                let _ = recv.flow_control().release_capacity(data.len());
                self.left = self.left.map(|left| left.saturating_sub(data.len() as u64));
                Poll::Ready(Some(Ok(Frame::data(data))))
            }
            Some(Err(error)) => Poll::Ready(Some(Err(error))),
            None => match ready!(recv.poll_trailers(cx)) {
                Ok(trailers) => Poll::Ready(trailers.map(|trailers| Ok(Frame::trailers(trailers)))),
                Err(error) => Poll::Ready(Some(Err(error))),
            },
        }
    }
}
