//! The body of an answer on its way to its caller.
//!
//! Stands on the life of a request.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use h2::{Reason, SendStream};
use http_body::Body as _;

use crate::clock;
use crate::http::body::ResponseBody;
use crate::telemetry::limits::WireLimit;
use crate::wheel::Sleep;
use crate::worker::Worker;

/// The first bytes of a body are handed to h2 together with the head, whatever window there is.
/// What follows goes as the window lets it, so that no more than this lies in h2's buffer for a
/// reader that takes nothing without the send timeout noticing.
const UNNOTICED_BYTES: usize = 4 * 1024;

/// How an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sent {
    /// With its last byte or its trailers, or by us: the service's answer broke off, or the caller
    /// took nothing of it for too long.
    Ended,
    /// The caller reset the stream.
    Gone,
}

/// A body and the stream it goes to.
pub struct Answer<'a> {
    worker: &'a Worker,
    body: ResponseBody,
    stream: SendStream<Bytes>,
    /// Read and not yet sent.
    chunk: Bytes,
    /// Nothing follows the chunk.
    last: bool,
    /// How much may still go out whatever window there is.
    unnoticed: usize,
    /// Fires when the reader has taken nothing of the chunk for `wire.sendTimeout`.
    stalled: Option<Sleep>,
}

impl<'a> Answer<'a> {
    /// A body whose head went out over `stream`.
    pub fn new(worker: &'a Worker, body: ResponseBody, stream: SendStream<Bytes>) -> Self {
        Self {
            worker,
            body,
            stream,
            chunk: Bytes::new(),
            last: false,
            unnoticed: UNNOTICED_BYTES,
            stalled: None,
        }
    }

    /// Moves the body on until it waits, for the service or for its reader, or has ended.
    pub fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Sent> {
        loop {
            if !self.chunk.is_empty() {
                if let Some(ended) = ready!(self.poll_chunk(cx)) {
                    return Poll::Ready(ended);
                }
                continue;
            }
            let Poll::Ready(frame) = Pin::new(&mut self.body).poll_frame(cx) else {
                return self.stream.poll_reset(cx).map(|_| Sent::Gone);
            };
            match frame {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => {
                        self.last = self.body.is_end_stream();
                        let Some(left) = self.unnoticed.checked_sub(data.len()) else {
                            self.unnoticed = 0;
                            self.chunk = data;
                            continue;
                        };
                        self.unnoticed = left;
                        // Refused only when the stream is gone already: the reset tells.
                        let sent = self.stream.send_data(data, self.last);
                        if self.last || sent.is_err() {
                            return Poll::Ready(Sent::Ended);
                        }
                    }
                    Err(frame) => {
                        if let Ok(trailers) = frame.into_trailers() {
                            let _ = self.stream.send_trailers(trailers);
                        }
                        return Poll::Ready(Sent::Ended);
                    }
                },
                Some(Err(_)) => {
                    // A broken answer must not look like a whole one.
                    self.stream.send_reset(Reason::INTERNAL_ERROR);
                    return Poll::Ready(Sent::Ended);
                }
                None => {
                    let _ = self.stream.send_data(Bytes::new(), true);
                    return Poll::Ready(Sent::Ended);
                }
            }
        }
    }

    /// Sends what the reader has room for; ready with an end, or when the chunk is gone.
    fn poll_chunk(&mut self, cx: &mut Context<'_>) -> Poll<Option<Sent>> {
        while !self.chunk.is_empty() {
            self.stream.reserve_capacity(self.chunk.len());
            let room = self.stream.capacity();
            if room == 0 {
                // Told of changes only; what it is now is asked above.
                match self.stream.poll_capacity(cx) {
                    Poll::Ready(Some(Ok(_))) => continue,
                    Poll::Ready(_) => return Poll::Ready(Some(Sent::Gone)),
                    Poll::Pending => return self.poll_stalled(cx).map(Some),
                }
            }
            self.stalled = None;
            let part = self.chunk.split_to(room.min(self.chunk.len()));
            let last = self.last && self.chunk.is_empty();
            if self.stream.send_data(part, last).is_err() {
                return Poll::Ready(Some(Sent::Gone));
            }
            if last {
                return Poll::Ready(Some(Sent::Ended));
            }
        }
        Poll::Ready(None)
    }

    /// The reader takes nothing now.
    fn poll_stalled(&mut self, cx: &mut Context<'_>) -> Poll<Sent> {
        // A caller may read nothing before it has sent all.
        self.body.poll_upload(cx);
        let timeout = self.worker.shared.wire.send_timeout;
        let wheel = &self.worker.wheel;
        let timer = self
            .stalled
            .get_or_insert_with(|| wheel.sleep_until(clock::now() + timeout));
        ready!(Pin::new(timer).poll(cx));
        self.worker.shared.refusals.count(WireLimit::SendTimeout);
        self.stream.send_reset(Reason::CANCEL);
        Poll::Ready(Sent::Ended)
    }
}
