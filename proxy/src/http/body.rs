//! Bodies, both ways: streamed, replayable up to a cap, observed to their end.
//!
//! A request body is buffered only while a retry is possible and only up to the route's
//! `retry.maxBody`; a response body is never buffered. The observation of a request ends with
//! its response body, so [`ResponseBody`] carries it together with the connection lease.
//!
//! Stands on the life of a request.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker, ready};

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};
use outrigger_core::time::Mono;

use crate::clock;
use crate::deadline::{Cut, Limits};
use crate::features::mirror::Duplicate;
use crate::http::incoming::{Incoming, PeerError};
use crate::http::observe::{Ending, Observation};
use crate::http::respond;
use crate::http::tunnel::Tunnel;
use crate::upstream::pool::Lease;
use crate::worker::Worker;

/// Why a body broke off.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    /// The peer that was sending broke off.
    #[error("the sending peer broke off")]
    Peer(#[source] PeerError),
    /// The request is being sent again elsewhere.
    #[error("given up for another try")]
    Superseded,
    /// One of the route's limits passed, or the caller's.
    #[error("cut by a time limit: {0:?}")]
    Cut(Cut),
}

/// How far the downstream's request body has come, shared between the body (which moves it) and
/// the attempt (which decides what a timeout or a failure means).
pub struct Upload {
    last: Cell<Mono>,
    ended: Cell<bool>,
    failed: Cell<bool>,
    starved: Cell<bool>,
    bytes: Cell<u64>,
    most: Cell<u64>,
    /// Who gets a copy; none for most requests.
    copy: Option<RefCell<Option<Box<Duplicate>>>>,
}

impl Upload {
    /// An upload that starts at `now`; `ended` when there is no body.
    pub fn new(now: Mono, ended: bool) -> Rc<Self> {
        Rc::new(Self {
            last: Cell::new(now),
            ended: Cell::new(ended),
            failed: Cell::new(false),
            starved: Cell::new(false),
            bytes: Cell::new(0),
            most: Cell::new(u64::MAX),
            copy: None,
        })
    }

    /// An upload that starts at `now`, of which `copy` gets a copy if there is one.
    pub fn copying(now: Mono, copy: Option<Box<Duplicate>>) -> Rc<Self> {
        let mut upload = Self::new(now, false);
        if let (Some(copy), Some(upload)) = (copy, Rc::get_mut(&mut upload)) {
            upload.copy = Some(RefCell::new(Some(copy)));
        }
        upload
    }

    /// Breaks the upload off once more than `most` bytes have come.
    pub fn limit(&self, most: Option<u64>) {
        self.most.set(most.unwrap_or(u64::MAX));
    }

    /// Whether it was broken off because it was longer than it may be.
    pub fn too_large(&self) -> bool {
        self.bytes.get() > self.most.get()
    }

    /// When the last byte arrived, or the start of the request. The `request` timeout runs from
    /// here, as in Envoy, so that a long upload that moves is not cut.
    pub fn last_progress(&self) -> Mono {
        self.last.get()
    }

    /// Whether the downstream broke off while sending.
    pub fn failed(&self) -> bool {
        self.failed.get()
    }

    /// Whether the whole body was read.
    pub fn ended(&self) -> bool {
        self.ended.get()
    }

    /// Whether the upstream waits for more and the downstream sends none: a stall is then the
    /// caller's, not the upstream's.
    pub fn starved(&self) -> bool {
        self.starved.get() && !self.ended.get()
    }

    /// Polls `source`, keeping count.
    fn poll(
        &self,
        source: &mut Incoming,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, PeerError>>> {
        let polled = Pin::new(&mut *source).poll_frame(cx);
        self.starved.set(polled.is_pending());
        if let Poll::Ready(frame) = &polled {
            self.note(frame, source.is_end_stream());
            if self.too_large() {
                self.failed.set(true);
                return Poll::Ready(Some(Err(PeerError::TooLarge)));
            }
        }
        polled
    }

    /// Body bytes read from the downstream.
    pub fn bytes(&self) -> u64 {
        self.bytes.get()
    }

    fn note(&self, polled: &Option<Result<Frame<Bytes>, PeerError>>, at_end: bool) {
        self.last.set(clock::now());
        match polled {
            Some(Ok(frame)) => {
                let len = frame.data_ref().map_or(0, Bytes::len);
                self.bytes.set(self.bytes.get() + len as u64);
                if at_end || frame.is_trailers() {
                    self.ended.set(true);
                }
            }
            Some(Err(_)) => self.failed.set(true),
            None => self.ended.set(true),
        }
        if let Some(copy) = &self.copy {
            self.copy(copy, polled);
        }
    }

    fn copy(
        &self,
        copy: &RefCell<Option<Box<Duplicate>>>,
        polled: &Option<Result<Frame<Bytes>, PeerError>>,
    ) {
        let mut copy = copy.borrow_mut();
        let frame = polled.as_ref().and_then(|polled| polled.as_ref().ok());
        if let (Some(copy), Some(data)) = (copy.as_mut(), frame.and_then(Frame::data_ref)) {
            copy.data(data);
        }
        if self.ended.get()
            && let Some(copy) = copy.take()
        {
            copy.send();
        }
    }
}

/// The body of a request as it goes upstream.
pub enum RequestBody {
    /// No body.
    Empty,
    /// Bytes already in memory: a message from the queue.
    Full(Option<Bytes>),
    /// The downstream's body as it arrives; can be sent once.
    Streaming(Incoming, Rc<Upload>),
    /// The downstream's body after a first part that was read already; can be sent once.
    Prefixed(VecDeque<Bytes>, Incoming, Rc<Upload>),
    /// The downstream's body with a memory of what was already sent.
    Replay(ReplayReader),
}

impl RequestBody {
    /// Whether it can be read only once.
    pub fn is_single(&self) -> bool {
        matches!(self, Self::Streaming(..) | Self::Prefixed(..))
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match self.get_mut() {
            Self::Empty => Poll::Ready(None),
            Self::Full(bytes) => Poll::Ready(bytes.take().map(|data| Ok(Frame::data(data)))),
            Self::Prefixed(read, incoming, upload) => {
                if let Some(data) = read.pop_front() {
                    return Poll::Ready(Some(Ok(Frame::data(data))));
                }
                upload
                    .poll(incoming, cx)
                    .map(|polled| polled.map(|frame| frame.map_err(BodyError::Peer)))
            }
            Self::Streaming(incoming, upload) => upload
                .poll(incoming, cx)
                .map(|polled| polled.map(|frame| frame.map_err(BodyError::Peer))),
            Self::Replay(reader) => reader.poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Empty => true,
            Self::Full(bytes) => bytes.is_none(),
            Self::Prefixed(read, incoming, _) => read.is_empty() && incoming.is_end_stream(),
            Self::Streaming(incoming, _) => incoming.is_end_stream(),
            Self::Replay(reader) => reader.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Empty => SizeHint::with_exact(0),
            Self::Full(bytes) => {
                SizeHint::with_exact(bytes.as_ref().map_or(0, |data| data.len() as u64))
            }
            Self::Prefixed(read, incoming, _) => {
                let before = read.iter().map(|data| data.len() as u64).sum::<u64>();
                let rest = incoming.size_hint();
                let mut hint = SizeHint::new();
                hint.set_lower(before + rest.lower());
                if let Some(upper) = rest.upper() {
                    hint.set_upper(before.saturating_add(upper));
                }
                hint
            }
            Self::Streaming(incoming, _) => incoming.size_hint(),
            Self::Replay(reader) => reader.size_hint(),
        }
    }
}

/// A downstream body that remembers what it gave out, up to a cap, so that it can be sent again.
///
/// Past the cap it forgets everything and streams on: the attempt in progress is unaffected,
/// but [`Replay::reader`] answers `None` from then on.
pub struct Replay {
    state: Rc<RefCell<ReplayState>>,
}

struct ReplayState {
    source: Incoming,
    hint: SizeHint,
    chunks: Vec<Bytes>,
    buffered: u64,
    cap: u64,
    overflowed: bool,
    /// It overflowed because the sidecar has no more memory for it.
    starved: bool,
    /// Bytes of `chunks`, taken from the sidecar's budget.
    kept: u64,
    worker: Rc<Worker>,
    trailers: Option<HeaderMap>,
    ended: bool,
    upload: Rc<Upload>,
    /// The reader in force, and how to tell it that it no longer is: two readers of one source
    /// would take each other's frames and wakeups.
    current: u64,
    waiting: Option<Waker>,
}

impl Replay {
    /// Remembers at most `cap` bytes of `source`, as far as the sidecar's budget allows.
    pub fn new(worker: &Rc<Worker>, source: Incoming, cap: u64, upload: Rc<Upload>) -> Self {
        let hint = source.size_hint();
        let overflowed = hint.lower() > cap;
        let state = ReplayState {
            source,
            hint,
            chunks: Vec::new(),
            buffered: 0,
            cap,
            overflowed,
            starved: false,
            kept: 0,
            worker: Rc::clone(worker),
            trailers: None,
            ended: false,
            upload,
            current: 0,
            waiting: None,
        };
        Self {
            state: Rc::new(RefCell::new(state)),
        }
    }

    /// The body from its start; `None` once more than the cap has passed. The reader before it
    /// breaks off, and its connection with it.
    pub fn reader(&self) -> Option<ReplayReader> {
        let mut state = self.state.borrow_mut();
        if state.overflowed && state.upload.bytes() > 0 {
            return None;
        }
        state.current += 1;
        if let Some(superseded) = state.waiting.take() {
            superseded.wake();
        }
        Some(ReplayReader {
            state: Rc::clone(&self.state),
            number: state.current,
            next: 0,
        })
    }

    /// The whole body for an attempt beside the one that is under way, which goes on; `None` while
    /// there is more to come.
    pub fn reader_beside(&self) -> Option<ReplayReader> {
        let state = self.state.borrow();
        (state.ended && !state.overflowed).then(|| ReplayReader {
            state: Rc::clone(&self.state),
            number: state.current,
            next: 0,
        })
    }

    /// Whether a further attempt could send the whole body again.
    pub fn replayable(&self) -> bool {
        !self.state.borrow().overflowed
    }

    /// Whether it cannot because the sidecar had no more memory to keep it.
    pub fn starved(&self) -> bool {
        self.state.borrow().starved
    }
}

/// One pass over a [`Replay`].
pub struct ReplayReader {
    state: Rc<RefCell<ReplayState>>,
    number: u64,
    next: usize,
}

impl ReplayReader {
    fn poll_frame(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let state = &mut *self.state.borrow_mut();
        if self.number != state.current {
            return Poll::Ready(Some(Err(BodyError::Superseded)));
        }
        if let Some(chunk) = state.chunks.get(self.next) {
            self.next += 1;
            return Poll::Ready(Some(Ok(Frame::data(chunk.clone()))));
        }
        if state.ended {
            let trailers = if self.next == state.chunks.len() {
                state.trailers.clone()
            } else {
                None
            };
            self.next = state.chunks.len() + 1;
            return Poll::Ready(trailers.map(|map| Ok(Frame::trailers(map))));
        }
        let Poll::Ready(polled) = state.upload.poll(&mut state.source, cx) else {
            state.waiting = Some(cx.waker().clone());
            return Poll::Pending;
        };
        state.ended = state.upload.ended();
        if let Some(Ok(frame)) = &polled {
            state.remember(frame);
            self.next = state.chunks.len();
            if frame.is_trailers() {
                self.next += 1;
            }
        }
        Poll::Ready(polled.map(|frame| frame.map_err(BodyError::Peer)))
    }

    fn is_end_stream(&self) -> bool {
        let state = self.state.borrow();
        let given_out = self.next >= state.chunks.len();
        let nothing_left = state.ended || (state.source.is_end_stream() && state.chunks.is_empty());
        given_out && nothing_left && (state.trailers.is_none() || self.next > state.chunks.len())
    }

    fn size_hint(&self) -> SizeHint {
        let state = self.state.borrow();
        if self.next == 0 {
            state.hint
        } else {
            SizeHint::default()
        }
    }
}

impl ReplayState {
    fn forget(&mut self) {
        self.chunks = Vec::new();
        self.worker.shared.overload.forget(self.kept);
        self.kept = 0;
    }

    fn remember(&mut self, frame: &Frame<Bytes>) {
        if self.overflowed {
            return;
        }
        if let Some(data) = frame.data_ref() {
            let length = data.len() as u64;
            self.buffered += length;
            self.starved = self.buffered <= self.cap && !self.worker.shared.overload.keep(length);
            if self.buffered > self.cap || self.starved {
                self.overflowed = true;
                self.forget();
            } else {
                self.kept += length;
                self.chunks.push(data.clone());
            }
        } else if let Some(trailers) = frame.trailers_ref() {
            self.trailers = Some(trailers.clone());
        }
    }
}

impl Drop for ReplayState {
    fn drop(&mut self) {
        self.forget();
    }
}

/// The body of a response as it goes downstream.
pub struct ResponseBody {
    inner: Inner,
}

enum Inner {
    Full(Option<Bytes>),
    Grpc {
        data: Option<Bytes>,
        trailers: Option<HeaderMap>,
    },
    Upstream(Box<UpstreamBody>),
    Tunnel(Box<Tunnel>),
    Layered(Box<dyn Layer>),
}

/// Something that is done to a response body on its way, for rules that ask for it.
pub trait Layer {
    /// The body below.
    fn inner(&self) -> &ResponseBody;

    /// The body below.
    fn inner_mut(&mut self) -> &mut ResponseBody;

    /// [`Body::poll_frame`].
    fn poll_frame(&mut self, cx: &mut Context<'_>)
    -> Poll<Option<Result<Frame<Bytes>, BodyError>>>;

    /// [`Body::is_end_stream`].
    fn is_end_stream(&self) -> bool;

    /// [`Body::size_hint`].
    fn size_hint(&self) -> SizeHint;
}

impl ResponseBody {
    fn of(inner: Inner) -> Self {
        Self { inner }
    }

    /// A body that is already in memory: everything that Outrigger answers itself.
    pub fn full(bytes: impl Into<Bytes>) -> Self {
        let bytes = bytes.into();
        Self::of(Inner::Full((!bytes.is_empty()).then_some(bytes)))
    }

    /// A gRPC body that is already in memory: one framed message and its trailers.
    pub fn grpc(data: Bytes, trailers: HeaderMap) -> Self {
        let data = (!data.is_empty()).then_some(data);
        Self::of(Inner::Grpc {
            data,
            trailers: Some(trailers),
        })
    }

    /// The upstream's body, streamed; `lease` and `observation` end with it.
    pub fn upstream(body: UpstreamBody) -> Self {
        Self::of(Inner::Upstream(Box::new(body)))
    }

    /// A body to which something is done on its way. Never a tunnel.
    pub fn layered(layer: Box<dyn Layer>) -> Self {
        Self::of(Inner::Layered(layer))
    }

    /// What follows an answer of 101.
    pub fn tunnel(tunnel: Tunnel) -> Self {
        Self::of(Inner::Tunnel(Box::new(tunnel)))
    }

    /// Whether this answer opens a tunnel.
    pub fn is_tunnel(&self) -> bool {
        matches!(self.inner, Inner::Tunnel(_))
    }

    /// Takes the tunnel that this answer opens, if it does.
    pub fn take_tunnel(&mut self) -> Option<Tunnel> {
        if !self.is_tunnel() {
            return None;
        }
        match std::mem::replace(&mut self.inner, Inner::Full(None)) {
            Inner::Tunnel(tunnel) => Some(*tunnel),
            _ => None,
        }
    }

    /// Moves a request's body on while the answer waits for its reader, so that neither waits
    /// for the other.
    pub fn poll_upload(&mut self, cx: &mut Context<'_>) {
        match &mut self.inner {
            Inner::Upstream(body) => body.incoming.poll_upload(cx),
            Inner::Layered(layer) => layer.inner_mut().poll_upload(cx),
            Inner::Full(_) | Inner::Grpc { .. } | Inner::Tunnel(_) => {}
        }
    }

    /// Collects at most `cap` bytes: the data, the trailers and whether the cap cut it short.
    ///
    /// # Errors
    /// The body's own error when it breaks off.
    pub async fn collect(mut self, cap: usize) -> Result<Collected, BodyError> {
        let mut collected = Collected::default();
        while let Some(frame) =
            futures_util::future::poll_fn(|cx| Pin::new(&mut self).poll_frame(cx)).await
        {
            match frame?.into_data() {
                Ok(data) => {
                    let room = cap.saturating_sub(collected.data.len());
                    collected.truncated |= data.len() > room;
                    collected.total += data.len() as u64;
                    collected
                        .data
                        .extend_from_slice(&data[..data.len().min(room)]);
                }
                Err(frame) => collected.trailers = frame.into_trailers().ok(),
            }
        }
        Ok(collected)
    }
}

/// What [`ResponseBody::collect`] gathered.
#[derive(Debug, Default)]
pub struct Collected {
    /// The first bytes, up to the cap.
    pub data: Vec<u8>,
    /// The trailers, if the body had any.
    pub trailers: Option<HeaderMap>,
    /// Whether more than the cap came.
    pub truncated: bool,
    /// All bytes that came.
    pub total: u64,
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match &mut self.get_mut().inner {
            Inner::Full(bytes) => Poll::Ready(bytes.take().map(|data| Ok(Frame::data(data)))),
            Inner::Grpc { data, trailers } => Poll::Ready(
                data.take()
                    .map(Frame::data)
                    .or_else(|| trailers.take().map(Frame::trailers))
                    .map(Ok),
            ),
            Inner::Upstream(body) => body.poll_frame(cx),
            Inner::Layered(layer) => layer.poll_frame(cx),
            Inner::Tunnel(_) => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.inner {
            Inner::Full(bytes) => bytes.is_none(),
            Inner::Grpc { data, trailers } => data.is_none() && trailers.is_none(),
            Inner::Upstream(body) => {
                body.cut || (body.peeked.is_none() && body.incoming.is_end_stream())
            }
            Inner::Layered(layer) => layer.is_end_stream(),
            Inner::Tunnel(_) => true,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.inner {
            Inner::Full(bytes) => {
                SizeHint::with_exact(bytes.as_ref().map_or(0, |data| data.len() as u64))
            }
            Inner::Grpc { .. } => SizeHint::default(),
            Inner::Upstream(body) if body.peeked.is_some() => SizeHint::default(),
            Inner::Upstream(body) => body.incoming.size_hint(),
            Inner::Layered(layer) => layer.size_hint(),
            Inner::Tunnel(_) => SizeHint::with_exact(0),
        }
    }
}

/// An upstream response body with everything that must end when it ends.
pub struct UpstreamBody {
    incoming: Incoming,
    /// A first frame that was read to learn the gRPC status before the head was passed on.
    peeked: Option<Frame<Bytes>>,
    lease: Option<Lease>,
    observation: Observation,
    limits: Option<Limits>,
    last: Mono,
    /// Nothing has come since it was first asked for: what the downstream takes its time for is
    /// no silence of the upstream's.
    waiting: bool,
    upload: Rc<Upload>,
    grpc: bool,
    /// Ended by a limit: trailers of ours were its last frame.
    cut: bool,
}

impl UpstreamBody {
    /// Wraps `incoming`, whose head came at `last`. `limits` bound how long it may take, with what
    /// the `upload` beside it moves.
    pub fn new(
        incoming: Incoming,
        peeked: Option<Frame<Bytes>>,
        lease: Lease,
        observation: Observation,
        limits: Option<Limits>,
        upload: Rc<Upload>,
        last: Mono,
    ) -> Self {
        let grpc = observation.is_grpc();
        let mut body = Self {
            incoming,
            peeked,
            lease: Some(lease),
            observation,
            limits,
            last,
            waiting: true,
            upload,
            grpc,
            cut: false,
        };
        if body.peeked.is_none() && body.incoming.is_end_stream() {
            // Nobody polls a body that has nothing to give: it ends here.
            body.finish_at(Ending::Complete, last);
        } else if body.peeked.as_ref().is_some_and(Frame::is_trailers) {
            body.note_trailers();
        }
        body
    }

    fn note_trailers(&mut self) {
        if let Some(trailers) = self.peeked.as_ref().and_then(Frame::trailers_ref) {
            self.observation.trailers(trailers);
        }
    }

    fn poll_frame(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if self.cut {
            return Poll::Ready(None);
        }
        if let Some(frame) = self.peeked.take() {
            if frame.is_trailers() {
                self.finish(Ending::Complete);
            }
            return Poll::Ready(Some(Ok(frame)));
        }
        match Pin::new(&mut self.incoming).poll_frame(cx) {
            Poll::Pending => self.poll_limits(cx),
            Poll::Ready(Some(Ok(frame))) => {
                self.last = clock::now();
                self.waiting = false;
                if let Some(limits) = &mut self.limits {
                    limits.began();
                    if let Some(cut) = limits.outlived(self.last) {
                        return self.cut(cut);
                    }
                }
                if let Some(data) = frame.data_ref() {
                    self.observation.bytes(data.len());
                } else if let Some(trailers) = frame.trailers_ref() {
                    self.observation.trailers(trailers);
                }
                if frame.is_trailers() || self.incoming.is_end_stream() {
                    self.finish_at(Ending::Complete, self.last);
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(Some(Err(error))) => {
                self.finish(Ending::UpstreamReset);
                Poll::Ready(Some(Err(BodyError::Peer(error))))
            }
            Poll::Ready(None) => {
                self.finish(Ending::Complete);
                Poll::Ready(None)
            }
        }
    }

    fn poll_limits(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let Some(limits) = &mut self.limits else {
            return Poll::Pending;
        };
        if !self.waiting {
            (self.waiting, self.last) = (true, clock::now());
        }
        let cut = ready!(limits.poll(self.last, &self.upload, cx));
        self.cut(cut)
    }

    /// Ends the response before its end. A gRPC caller is told in trailers, where there can be any.
    fn cut(&mut self, cut: Cut) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let trailers = self.grpc && self.incoming.size_hint().exact().is_none();
        self.finish(cut.ending());
        if !trailers || cut == Cut::Idle {
            return Poll::Ready(Some(Err(BodyError::Cut(cut))));
        }
        self.cut = true;
        Poll::Ready(Some(Ok(Frame::trailers(respond::cut_trailers(cut)))))
    }

    fn finish(&mut self, ending: Ending) {
        self.finish_at(ending, clock::now());
    }

    fn finish_at(&mut self, ending: Ending, now: Mono) {
        self.observation.end_at(ending, now);
        if let Some(lease) = self.lease.take() {
            match ending {
                Ending::Complete => lease.release(),
                _ => lease.discard(),
            }
        }
    }
}

impl Drop for UpstreamBody {
    fn drop(&mut self) {
        // Dropped before its end: the downstream went away, or a HEAD answer had no body to read.
        if self.lease.is_some() {
            self.finish(Ending::DownstreamGone);
        }
    }
}
