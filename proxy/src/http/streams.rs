//! The streams of one downstream HTTP/2 connection, as far as their peer can abuse them.
//!
//! Owns what h2 leaves open: how long a reader that takes nothing may hold an answer up, how many
//! requests a peer may abandon as soon as they have begun, and since when a connection has none.
//!
//! Stands on the life of a request.

use std::cell::Cell;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use outrigger_core::time::Mono;

use crate::clock;
use crate::http::body::{BodyError, ResponseBody};
use crate::http::incoming::Uploading;
use crate::telemetry::limits::WireLimit;
use crate::wheel::Sleep;
use crate::worker::Worker;

/// A stream that its peer resets within this time was premature (Envoy's default).
const PREMATURE: Duration = Duration::from_secs(1);
/// Streams from which on the share of premature ones counts, and where both counts are halved,
/// so that a good past does not pay for an attack. Envoy closes above one half of 500, too.
const ENOUGH_STREAMS: u32 = 500;
const FORGET_STREAMS: u32 = 2 * ENOUGH_STREAMS;

/// A last piece of a body up to this size is handed to h2 together with the end of its stream.
/// After a larger one the end waits for window, so that what lies in h2's buffer for a reader
/// that takes nothing stays under the eyes of the send timeout.
const UNNOTICED_BYTES: usize = 4 * 1024;

/// What the body of an answer did while the task of its stream was polled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Touched {
    /// Nobody asked it.
    No,
    /// It gave something to send.
    Gave,
    /// It waits for the upstream, or has ended.
    Waits,
}

/// The streams of one connection.
pub struct Streams {
    worker: Rc<Worker>,
    open: Cell<u32>,
    idle_since: Cell<Mono>,
    begun: Cell<u32>,
    abandoned: Cell<u32>,
    touched: Cell<Touched>,
    /// Of the answer that has just begun, for the task of its stream.
    uploading: Cell<Option<Uploading>>,
}

impl Streams {
    /// Those of a connection accepted just now: none.
    pub fn new(worker: Rc<Worker>) -> Rc<Self> {
        Rc::new(Self {
            worker,
            open: Cell::new(0),
            idle_since: Cell::new(clock::now()),
            begun: Cell::new(0),
            abandoned: Cell::new(0),
            touched: Cell::new(Touched::No),
            uploading: Cell::new(None),
        })
    }

    /// A request has begun.
    pub fn begin(self: &Rc<Self>) -> Stream {
        if self.begun.get() >= FORGET_STREAMS {
            self.begun.set(self.begun.get() / 2);
            self.abandoned.set(self.abandoned.get() / 2);
        }
        self.begun.set(self.begun.get() + 1);
        self.open.set(self.open.get() + 1);
        Stream {
            streams: Rc::clone(self),
            since: clock::now(),
            answered: false,
        }
    }

    /// Since when there is no request; none while there is one.
    pub fn idle_since(&self) -> Option<Mono> {
        (self.open.get() == 0).then(|| self.idle_since.get())
    }

    /// Whether the peer abandons most of what it begins (CVE-2023-44487 at a pace that leaves no
    /// backlog; CVE-2025-8671, which makes us reset in its place).
    pub fn are_abused(&self) -> bool {
        let (begun, abandoned) = (self.begun.get(), self.abandoned.get());
        begun >= ENOUGH_STREAMS && abandoned > begun / 2
    }
}

/// One request from its head to the end of its answer.
pub struct Stream {
    streams: Rc<Streams>,
    since: Mono,
    answered: bool,
}

impl Stream {
    /// What keeps the connection from being idle after the request was answered: a tunnel.
    pub fn outlasted(&self) -> Self {
        let streams = Rc::clone(&self.streams);
        streams.open.set(streams.open.get() + 1);
        Self {
            streams,
            since: self.since,
            answered: true,
        }
    }

    /// The answer, whose end is the request's.
    pub fn answer(mut self, body: ResponseBody) -> Sent {
        self.answered = body.is_end_stream();
        if !self.answered {
            self.streams.touched.set(Touched::Gave);
            self.streams.uploading.set(body.uploading());
        }
        Sent {
            body,
            stream: self,
            withheld: false,
        }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let streams = &self.streams;
        let now = clock::now();
        streams.open.set(streams.open.get() - 1);
        streams.idle_since.set(now);
        if !self.answered && now < self.since + PREMATURE {
            streams.abandoned.set(streams.abandoned.get() + 1);
        }
    }
}

/// The body of an answer that tells its connection how it fares.
pub struct Sent {
    body: ResponseBody,
    stream: Stream,
    /// The end is known and not yet told.
    withheld: bool,
}

impl Body for Sent {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = self.get_mut();
        this.withheld = false;
        let polled = Pin::new(&mut this.body).poll_frame(cx);
        let touched = match &polled {
            Poll::Ready(Some(Ok(frame))) => {
                let size = frame.data_ref().map_or(0, Bytes::len);
                this.withheld = size > UNNOTICED_BYTES;
                this.stream.answered |= frame.is_trailers() || this.is_end_stream();
                Touched::Gave
            }
            Poll::Ready(_) => {
                this.stream.answered = true;
                Touched::Waits
            }
            Poll::Pending => Touched::Waits,
        };
        this.stream.streams.touched.set(touched);
        polled
    }

    fn is_end_stream(&self) -> bool {
        !self.withheld && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Runs hyper's tasks for the streams of one connection on its worker, and drops the one whose
/// peer takes nothing of an answer for `wire.sendTimeout`: that resets its stream.
///
/// hyper asks an answer for more only when there is window for it. A request body that is still
/// going up beside it must not wait for that: its caller may read nothing before it has sent all.
#[derive(Clone)]
pub struct StreamExecutor(pub Rc<Streams>);

impl<F> hyper::rt::Executor<F> for StreamExecutor
where
    F: Future + 'static,
    F::Output: 'static,
{
    fn execute(&self, future: F) {
        let streams = Rc::clone(&self.0);
        // A task moves what it holds several times.
        let mut task = Box::pin(future);
        tokio::task::spawn_local(async move {
            let mut timer: Option<Sleep> = None;
            let mut uploading: Option<Uploading> = None;
            std::future::poll_fn(|cx| {
                streams.touched.set(Touched::No);
                if task.as_mut().poll(cx).is_ready() {
                    return Poll::Ready(());
                }
                uploading = streams.uploading.take().or(uploading.take());
                if uploading
                    .as_ref()
                    .is_some_and(|body| body.poll(cx).is_ready())
                {
                    uploading = None;
                }
                match streams.touched.get() {
                    Touched::No => {}
                    Touched::Waits => timer = None,
                    // hyper comes back to a body as soon as there is window for more of it.
                    Touched::Gave => {
                        let worker = &streams.worker;
                        let due = clock::now() + worker.shared.wire.send_timeout;
                        match &mut timer {
                            Some(timer) => timer.reset(due),
                            None => timer = Some(worker.wheel.sleep_until(due)),
                        }
                    }
                }
                let Some(stalled) = &mut timer else {
                    return Poll::Pending;
                };
                Pin::new(stalled).poll(cx).map(|()| {
                    let refusals = &streams.worker.shared.refusals;
                    refusals.count(WireLimit::SendTimeout);
                })
            })
            .await;
        });
    }
}
