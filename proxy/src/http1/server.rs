//! The downstream side: one task per connection, one request after the other.
//!
//! Owns the limits of a connection in time (head, idle, a reader that takes nothing), pipelining,
//! `100-continue`, and how a connection ends: a request that was refused or not read whole is the
//! last one, and its connection is closed in a way that lets the answer arrive. Knows nothing of
//! routes.
//!
//! Stands on the life of a request.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::io;
use std::pin::{Pin, pin};
use std::rc::{Rc, Weak};
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::{Method, Request, Response, StatusCode, Version};
use http_body::{Body as _, Frame, SizeHint};
use outrigger_core::error_code::ErrorCode;
use outrigger_core::http1::{
    Decoder, Framing, Item, Limits, Malformed, RequestHead, ResponseFraming, find_end,
    parse_request, write_response,
};
use outrigger_core::time::Mono;
use tracing::debug;

use crate::clock;
use crate::drain::Phase;
use crate::error::ProxyError;
use crate::forward;
use crate::http::body::ResponseBody;
use crate::http::context;
use crate::http::incoming::{Incoming, PeerError};
use crate::http::observe;
use crate::http::switch::Switch;
use crate::http::tunnel::Tunnel;
use crate::http1::sending::{Length, Sending, SendingError};
use crate::http1::wire::{self, Wire, WireError};
use crate::io::Io;
use crate::listener::{Direction, accept};
use crate::telemetry::limits::WireLimit;
use crate::wheel::Sleep;
use crate::worker::Worker;

/// Taken from the socket before its turn, while a request is served: pipelined requests, or the
/// peer's leaving.
const READ_AHEAD: usize = 16 * 1024;

/// What a peer may still send after its last answer, and for how long we listen: closing on
/// unread bytes would reset the connection and destroy the answer on its way (RFC 9112 §9.6).
const LINGER_BYTES: usize = 256 * 1024;
const LINGER: Duration = Duration::from_secs(1);

/// Serves the connection to its end.
pub async fn serve(worker: Rc<Worker>, stream: Io, peer: Rc<context::Connection>) {
    let wire = &worker.shared.wire;
    let limits = Limits {
        max_fields: wire.max_headers,
        max_head_bytes: wire.max_header_bytes,
    };
    let shared = Rc::new(Shared {
        wire: RefCell::new(Wire::new(stream)),
        reading: RefCell::new(Reading::new(&limits)),
        waiting: Cell::new(None),
    });
    let mut connection = Connection {
        timer: worker.wheel.sleep_until(clock::now() + wire.header_timeout),
        worker,
        peer,
        shared,
        limits,
        searched: 0,
    };
    let peer = connection.peer.peer;
    match clock::in_turns(connection.run()).await {
        End::Closed => {}
        End::Tunnel(tunnel) => {
            let Connection { worker, shared, .. } = connection;
            // The request is over: nobody else holds the socket.
            if let Some(shared) = Rc::into_inner(shared) {
                let mut wire = shared.wire.into_inner();
                if Box::pin(tunnel.run(&mut wire, &worker.wheel)).await {
                    wire.reset();
                }
            }
        }
        End::Broken(why) => debug!(%peer, why, "connection ended"),
    }
}

/// How a connection ended.
enum End {
    /// Nothing is left to do.
    Closed,
    /// Without the end of a message.
    Broken(&'static str),
    /// As HTTP: the rest belongs to the tunnel.
    Tunnel(Box<Tunnel>),
}

/// One downstream connection.
struct Connection {
    worker: Rc<Worker>,
    peer: Rc<context::Connection>,
    shared: Rc<Shared>,
    limits: Limits,
    timer: Sleep,
    /// How far the buffer was searched for the end of a head.
    searched: usize,
}

/// What the task of the connection and the body of its request both use.
///
/// Only one of them reads the socket at a time: the body while it has not ended and somebody
/// holds it, else the task.
struct Shared {
    wire: RefCell<Wire>,
    reading: RefCell<Reading>,
    /// The task, while it waits for the body to end.
    waiting: Cell<Option<Waker>>,
}

/// How far the request in progress was read.
struct Reading {
    decoder: Decoder,
    /// Rises with every request: a body that outlived its request reads nothing.
    number: u64,
    /// Whether somebody holds the body.
    held: bool,
    /// The peer waits for `100 Continue`.
    owed: Option<Sending>,
    failed: bool,
    /// Who waits for more of the body. The socket knows one task only, and that may be another by
    /// the time nothing more comes: an h2 upstream reads the body in a task of its own.
    reader: Option<Waker>,
}

impl Drop for Reading {
    fn drop(&mut self) {
        self.give_up();
    }
}

impl Reading {
    fn new(limits: &Limits) -> Self {
        Self {
            decoder: Decoder::new(Framing::Empty, limits),
            number: 0,
            held: false,
            owed: None,
            failed: false,
            reader: None,
        }
    }

    /// Whoever still holds the body gets nothing more of it.
    fn give_up(&mut self) {
        self.number += 1;
        if let Some(reader) = self.reader.take() {
            reader.wake();
        }
    }
}

/// What comes next on a connection.
#[allow(clippy::large_enum_variant)] // on the stack for a moment; a box would cost an allocation a request
enum Next {
    Request(RequestHead),
    Refused(Malformed),
    End(End),
}

impl Connection {
    async fn run(&mut self) -> End {
        let worker = Rc::clone(&self.worker);
        let peer = Rc::clone(&self.peer);
        let mut closing = pin!(accept::leaving(&worker, &peer));
        let mut due = clock::now() + worker.shared.wire.header_timeout;
        loop {
            let head = match self.next_head(closing.as_mut(), due).await {
                Next::Request(head) => head,
                Next::Refused(malformed) => return Box::pin(self.refuse(&malformed)).await,
                Next::End(end) => return end,
            };
            let reusable = match self.exchange(head).await {
                Ok(reusable) => reusable,
                Err(end) => return end,
            };
            if !reusable {
                return self.linger().await;
            }
            due = clock::now() + self.worker.shared.wire.idle_timeout;
        }
    }

    /// Waits for the next head: until `due` for its first byte (the first request of a connection:
    /// for all of it), then as long as a head may take.
    async fn next_head(
        &mut self,
        mut closing: Pin<&mut impl Future<Output = ()>>,
        due: Mono,
    ) -> Next {
        let head_timeout = self.worker.shared.wire.header_timeout;
        let mut due = due;
        let mut began = false;
        self.due_by(due);
        std::future::poll_fn(|cx| {
            let wire = &mut *self.shared.wire.borrow_mut();
            loop {
                if !wire.buf.is_empty() {
                    match find_end(&wire.buf, &mut self.searched, &self.limits) {
                        Ok(None) => {}
                        Ok(Some(end)) => {
                            self.searched = 0;
                            let bytes = wire.take_head(end);
                            return Poll::Ready(match parse_request(bytes, &self.limits) {
                                Ok(head) => Next::Request(head),
                                Err(malformed) => Next::Refused(malformed),
                            });
                        }
                        Err(malformed) => return Poll::Ready(Next::Refused(malformed)),
                    }
                    if !began {
                        began = true;
                        due = due.min(clock::now() + head_timeout);
                        if due < self.timer.deadline() {
                            self.timer.reset(due);
                        }
                    }
                }
                wire.rest();
                match wire.poll_fill(cx) {
                    Poll::Pending => break,
                    Poll::Ready(Ok(0)) if wire.buf.is_empty() => {
                        return Poll::Ready(Next::End(End::Closed));
                    }
                    Poll::Ready(Ok(0)) => {
                        return Poll::Ready(Next::End(End::Broken("closed in a head")));
                    }
                    Poll::Ready(Ok(_)) => {}
                    Poll::Ready(Err(_)) => return Poll::Ready(Next::End(End::Broken("reset"))),
                }
            }
            // A head that has begun is still served; one that has not may come elsewhere.
            if wire.buf.is_empty() && closing.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Next::End(End::Closed));
            }
            poll_due(&mut self.timer, due, cx).map(|()| {
                if began {
                    let refusals = &self.worker.shared.refusals;
                    refusals.count(WireLimit::HeaderTimeout);
                }
                Next::End(End::Broken("no request in time"))
            })
        })
        .await
    }

    /// Sees to it that the timer fires at `due` at the latest. One that fires earlier is left
    /// alone: it costs nothing while requests keep coming, and [`poll_due`] moves it on.
    fn due_by(&mut self, due: Mono) {
        if due < self.timer.deadline() {
            self.timer.reset(due);
        }
    }

    /// Serves one request: true when another may follow on this connection.
    async fn exchange(&mut self, head: RequestHead) -> Result<bool, End> {
        let RequestHead {
            method,
            uri,
            version,
            headers,
            framing,
            keep_alive,
            expect_continue,
            upgrade,
        } = head;
        // RFC 9110 §7.8: not together with content, which would have to be read first.
        let switch = if upgrade && matches!(framing, Framing::Empty | Framing::Length(0)) {
            Switch::of_http1(&headers)
        } else {
            None
        };
        let body = self.begin(framing, expect_continue && version == Version::HTTP_11);
        let head_only = method == Method::HEAD;
        let mut request = Request::new(Incoming::Http1Request(body));
        *request.method_mut() = method;
        *request.uri_mut() = uri;
        *request.version_mut() = version;
        *request.headers_mut() = headers;
        if let Some(switch) = switch {
            request.extensions_mut().insert(switch);
        }

        let worker = Rc::clone(&self.worker);
        let peer = Rc::clone(&self.peer);
        // In a box of its own: it is large, and an idle connection has none.
        let mut serving = Box::pin(forward::serve(&worker, &peer, request));
        let half_close = !keep_alive;
        let response = std::future::poll_fn(|cx| {
            if let Poll::Ready(response) = serving.as_mut().poll(cx) {
                return Poll::Ready(Some(response));
            }
            self.shared.poll_gone(cx, half_close).map(|()| None)
        })
        .await;
        drop(serving);
        let Some(response) = response else {
            return Err(End::Broken("the caller left"));
        };
        let keep_alive = keep_alive && !self.is_closing();
        let answer = Answer {
            version,
            head_only,
            keep_alive,
        };
        self.answer(response, answer).await
    }

    fn begin(&mut self, framing: Framing, expect: bool) -> RequestStream {
        let reading = &mut *self.shared.reading.borrow_mut();
        reading.decoder = Decoder::new(framing, &self.limits);
        reading.number += 1;
        reading.failed = false;
        let left = match framing {
            Framing::Empty => Some(0),
            Framing::Length(length) => Some(length),
            Framing::Chunked | Framing::UntilClose => None,
        };
        let ended = left == Some(0);
        reading.held = !ended;
        reading.owed = (expect && !ended).then(|| {
            let line = BytesMut::from(&b"HTTP/1.1 100 Continue\r\n\r\n"[..]);
            Sending::new(line, Length::Empty)
        });
        RequestStream {
            shared: (!ended).then(|| Rc::downgrade(&self.shared)),
            number: reading.number,
            left,
        }
    }

    fn is_closing(&self) -> bool {
        let phase = self.worker.shared.drain.phase();
        phase
            >= match self.peer.direction {
                Direction::Inbound => Phase::Draining,
                Direction::Outbound => Phase::Closing,
            }
            || self.peer.is_outlived()
    }

    /// Writes the answer: true when another request may follow.
    async fn answer(
        &mut self,
        response: Response<ResponseBody>,
        answer: Answer,
    ) -> Result<bool, End> {
        let (parts, mut body) = response.into_parts();
        let (length, framing) = lengths(&parts.status, &body, &answer);
        // A body that nobody reads any more is not waited for (RFC 9112 §9.3).
        let read = self.shared.is_held() || self.shared.request_is_over();
        let keep_alive = answer.keep_alive && length != Length::UntilClose && read;
        let mut out = wire::buffer();
        write_response(
            &mut out,
            answer.version,
            parts.status,
            &parts.headers,
            framing,
            keep_alive,
            Some(&self.worker.date()),
        );
        // What was promised and not yet asked for is no longer.
        self.shared.reading.borrow_mut().owed = None;
        let mut sending = Sending::new(out, length).keep_start();
        let half_close = !answer.keep_alive;
        let stall = self.worker.shared.wire.send_timeout;
        let mut stalled_at = None;
        let mut stall_due = Mono::default();
        let sent = std::future::poll_fn(|cx| {
            // The wire is held for each write only: asking the body may read the request.
            let write = |cx: &mut Context<'_>, slices: &[io::IoSlice<'_>]| {
                self.shared.wire.borrow_mut().poll_write(cx, slices)
            };
            if let Poll::Ready(sent) = sending.poll(cx, &mut body, write) {
                return Poll::Ready(sent.map_err(|error| ending(&error)));
            }
            if sending.is_flushed() {
                // The upstream is awaited, and its own limits watch it.
                stalled_at = None;
                return self
                    .shared
                    .poll_gone(cx, half_close)
                    .map(|()| Err("the caller left"));
            }
            body.poll_upload(cx);
            if stalled_at != Some(sending.written()) {
                stalled_at = Some(sending.written());
                stall_due = clock::now() + stall;
                self.due_by(stall_due);
            }
            poll_due(&mut self.timer, stall_due, cx).map(|()| {
                let refusals = &self.worker.shared.refusals;
                refusals.count(WireLimit::SendTimeout);
                Err("the caller takes nothing")
            })
        })
        .await;
        if let Err(why) = sent {
            if length == Length::UntilClose {
                // A proper end would make a whole answer of it.
                self.shared.wire.borrow().reset();
            }
            return Err(End::Broken(why));
        }
        if let Some(tunnel) = body.take_tunnel() {
            return Err(End::Tunnel(Box::new(tunnel)));
        }
        drop(body);
        Ok(keep_alive && self.shared.request_is_over())
    }

    /// Answers a head that cannot be served, and ends.
    async fn refuse(&mut self, malformed: &Malformed) -> End {
        let code = match malformed {
            Malformed::HeadTooLarge | Malformed::TooManyFields => ErrorCode::HeadersTooLarge,
            _ => ErrorCode::BadRequest,
        };
        let limit = match malformed {
            Malformed::HeadTooLarge => Some(WireLimit::HeaderBytes),
            Malformed::TooManyFields => Some(WireLimit::Headers),
            _ => None,
        };
        if let Some(limit) = limit {
            self.worker.shared.refusals.count(limit);
        }
        let error = ProxyError::downstream(code, malformed.to_string());
        let response = observe::refuse(&self.worker, &self.peer, &error);
        let answer = Answer {
            version: Version::HTTP_11,
            head_only: false,
            keep_alive: false,
        };
        match self.answer(response, answer).await {
            Ok(_) => self.linger().await,
            Err(end) => end,
        }
    }

    /// Closes so that the last answer arrives.
    async fn linger(&mut self) -> End {
        self.shared.reading.borrow_mut().give_up();
        let mut left = LINGER_BYTES;
        let mut shut = false;
        let due = clock::now() + LINGER;
        self.due_by(due);
        std::future::poll_fn(|cx| {
            let wire = &mut *self.shared.wire.borrow_mut();
            if !shut {
                let _ = ready!(wire.poll_shutdown(cx));
                shut = true;
            }
            loop {
                left = left.saturating_sub(wire.buf.len());
                wire.buf.clear();
                match wire.poll_fill(cx) {
                    Poll::Ready(Ok(0) | Err(_)) => return Poll::Ready(End::Closed),
                    Poll::Ready(Ok(_)) if left == 0 => return Poll::Ready(End::Closed),
                    Poll::Ready(Ok(_)) => {}
                    Poll::Pending => break,
                }
            }
            poll_due(&mut self.timer, due, cx).map(|()| End::Closed)
        })
        .await
    }
}

/// Ready at `due`, by a timer that may be set to an earlier moment.
fn poll_due(timer: &mut Sleep, due: Mono, cx: &mut Context<'_>) -> Poll<()> {
    while Pin::new(&mut *timer).poll(cx).is_ready() {
        if clock::now() >= due {
            return Poll::Ready(());
        }
        timer.reset(due);
    }
    Poll::Pending
}

/// What the answer's form depends on beside itself.
#[derive(Clone, Copy)]
struct Answer {
    /// The request's.
    version: Version,
    /// The request was a HEAD.
    head_only: bool,
    keep_alive: bool,
}

fn lengths(status: &StatusCode, body: &ResponseBody, answer: &Answer) -> (Length, ResponseFraming) {
    let bodyless = answer.head_only
        || body.is_tunnel()
        || status.is_informational()
        || matches!(*status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED);
    if bodyless {
        return (Length::Empty, ResponseFraming::None);
    }
    match body.size_hint().exact() {
        Some(0) => (Length::Empty, ResponseFraming::Known(0)),
        Some(length) => (Length::Known(length), ResponseFraming::Known(length)),
        None if answer.version == Version::HTTP_11 => (Length::Chunked, ResponseFraming::Chunked),
        None => (Length::UntilClose, ResponseFraming::UntilClose),
    }
}

fn ending(error: &SendingError) -> &'static str {
    match error {
        SendingError::Io(_) => "the caller left",
        SendingError::Body(_) => "the upstream broke off",
        SendingError::Length => "the upstream's body is not as long as announced",
    }
}

impl Shared {
    /// Whether somebody reads the request's body.
    fn is_held(&self) -> bool {
        self.reading.borrow().held
    }

    /// Whether the request was read to its end, or is not being read any more and the rest of it
    /// is here already.
    fn request_is_over(&self) -> bool {
        let reading = &mut *self.reading.borrow_mut();
        if reading.held || reading.failed {
            return false;
        }
        let buf = &mut self.wire.borrow_mut().buf;
        while !reading.decoder.is_ended() {
            match reading.decoder.decode(buf) {
                Ok(Item::More) | Err(_) => return false,
                Ok(_) => {}
            }
        }
        true
    }

    /// Ready when the peer has left while its request is served. `half_close`: it may have ended
    /// its side only, as it said that nothing more follows.
    fn poll_gone(&self, cx: &mut Context<'_>, half_close: bool) -> Poll<()> {
        let reading = self.reading.borrow();
        if reading.held {
            // The body reads, and notices.
            self.waiting.set(Some(cx.waker().clone()));
            return Poll::Pending;
        }
        let wire = &mut *self.wire.borrow_mut();
        if wire.eof() && (reading.failed || !half_close) {
            // The body met the end first.
            return Poll::Ready(());
        }
        while wire.buf.len() < READ_AHEAD && !wire.eof() {
            match ready!(wire.poll_fill(cx)) {
                Ok(0) | Err(_) => {}
                Ok(_) => continue,
            }
            if wire.eof() && half_close {
                break;
            }
            return Poll::Ready(());
        }
        Poll::Pending
    }

    fn let_go(&self, number: u64) {
        let mut reading = self.reading.borrow_mut();
        if reading.number == number {
            reading.held = false;
            drop(reading);
            if let Some(task) = self.waiting.take() {
                task.wake();
            }
        }
    }

    fn poll_item(&self, cx: &mut Context<'_>, number: u64) -> Poll<Result<Item, WireError>> {
        let reading = &mut *self.reading.borrow_mut();
        if reading.number != number || reading.failed {
            return Poll::Ready(Err(WireError::Closed));
        }
        let wire = &mut *self.wire.borrow_mut();
        if let Some(owed) = &mut reading.owed {
            // RFC 9110 §10.1.1: now that the body is wanted, unless it has begun to come.
            let sent = if wire.buf.is_empty() {
                let nothing = &mut ResponseBody::full(Bytes::new());
                ready!(owed.poll(cx, nothing, |cx, slices| wire.poll_write(cx, slices)))
            } else {
                Ok(())
            };
            reading.owed = None;
            if let Err(SendingError::Io(error)) = sent {
                return Poll::Ready(Err(error.into()));
            }
        }
        let polled = loop {
            match reading.decoder.decode(&mut wire.buf) {
                Ok(Item::More) => wire.rest(),
                Ok(item) => {
                    wire.rest();
                    return Poll::Ready(Ok(item));
                }
                Err(malformed) => break WireError::from(malformed),
            }
            match wire.poll_fill(cx) {
                Poll::Pending => {
                    reading.reader = Some(cx.waker().clone());
                    return Poll::Pending;
                }
                Poll::Ready(Ok(0)) => break WireError::Truncated,
                Poll::Ready(Ok(_)) => {}
                Poll::Ready(Err(error)) => break error.into(),
            }
        };
        reading.failed = true;
        Poll::Ready(Err(polled))
    }
}

/// The body of a request as it arrives.
pub struct RequestStream {
    /// None once it has ended. Weak, so that a body that nobody finishes does not hold the socket.
    shared: Option<Weak<Shared>>,
    number: u64,
    left: Option<u64>,
}

impl RequestStream {
    /// Whether nothing more comes.
    pub fn is_end_stream(&self) -> bool {
        self.shared.is_none()
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
    ) -> Poll<Option<Result<Frame<Bytes>, PeerError>>> {
        let Some(shared) = &self.shared else {
            return Poll::Ready(None);
        };
        let (item, ended) = match shared.upgrade() {
            Some(shared) => {
                let item = ready!(shared.poll_item(cx, self.number));
                (item, shared.reading.borrow().decoder.is_ended())
            }
            None => (Err(WireError::Closed), true),
        };
        if ended || item.is_err() {
            self.end();
        }
        Poll::Ready(match item {
            Ok(Item::Data(data)) => {
                self.left = self.left.map(|left| left.saturating_sub(data.len() as u64));
                Some(Ok(Frame::data(data)))
            }
            Ok(Item::Trailers(trailers)) => Some(Ok(Frame::trailers(trailers))),
            Ok(Item::End | Item::More) => None,
            Err(error) => Some(Err(error.into())),
        })
    }

    fn end(&mut self) {
        if let Some(shared) = self.shared.take().and_then(|shared| shared.upgrade()) {
            shared.let_go(self.number);
        }
    }
}

impl Drop for RequestStream {
    fn drop(&mut self) {
        self.end();
    }
}
