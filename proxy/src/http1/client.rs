//! The upstream side: one connection, one exchange at a time.
//!
//! Nothing runs by itself: the request is written and the response read by whoever polls, first
//! the attempt that waits for the head, then the response body. A body that is still going up
//! when the head arrives goes on with every poll of the response.
//!
//! Stands on the life of a request.

use std::cell::RefCell;
use std::future::Future;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http::uri::Authority;
use http::{Method, Response, StatusCode};
use http_body::{Body as _, Frame, SizeHint};
use outrigger_core::http1::{
    self, BodyLength, Decoder, Item, Limits, ResponseHead, find_end, parse_response, write_request,
};

use crate::http::body::RequestBody;
use crate::http::incoming::{Incoming, PeerError};
use crate::http1::sending::{Length, Sending, SendingError};
use crate::http1::wire::{self, Wire, WireError};
use crate::io::Io;
use crate::upstream::pool::{Outgoing, SendError};

/// Interim responses (RFC 9110 §15.2) before the final one; more are a flood.
const MAX_INTERIM: u32 = 16;

/// One connection to an endpoint.
pub struct Connection {
    inner: RefCell<Inner>,
}

struct Inner {
    wire: Wire,
    limits: Limits,
    upload: Upload,
    response: Decoder,
    /// Whether the exchange that ended, if any, left the connection fit for another.
    keep_alive: bool,
}

/// What is left to do of the request.
enum Upload {
    /// Nothing.
    Done,
    /// Some of it.
    Going(Box<(Sending, RequestBody)>),
    /// It broke off; the connection ends with this exchange.
    Broken,
}

impl Connection {
    /// A connection over `stream`, ready for its first request.
    pub fn new(stream: Io, limits: Limits) -> Rc<Self> {
        Rc::new(Self {
            inner: RefCell::new(Inner {
                wire: Wire::new(stream),
                limits,
                upload: Upload::Done,
                response: Decoder::new(http1::Framing::Empty, &limits),
                keep_alive: true,
            }),
        })
    }

    /// Whether the last exchange ended on both sides and left room for another.
    pub fn is_reusable(&self) -> bool {
        self.inner.borrow().is_reusable()
    }

    /// Whether it can take a request now: the peer has neither closed meanwhile nor sent anything
    /// unasked.
    pub fn is_ready(&self) -> bool {
        let inner = self.inner.borrow();
        inner.is_reusable() && inner.wire.is_quiet()
    }

    /// Sends `request` and waits for the head of the final response.
    ///
    /// # Errors
    /// See [`SendError`].
    ///
    /// # Cancel safety
    /// The connection cannot be used again when the future is dropped.
    pub fn send(
        self: Rc<Self>,
        head: &Outgoing<'_>,
        body: RequestBody,
    ) -> impl Future<Output = Result<Response<Incoming>, SendError>> + use<> {
        let asked = Asked {
            method: head.method.clone(),
            switch: head.switch,
        };
        self.inner.borrow_mut().begin(head, body);
        let mut read = Reading::default();
        async move {
            let head = std::future::poll_fn(|cx| {
                let inner = &mut *self.inner.borrow_mut();
                inner.poll_head(cx, &asked, &mut read)
            })
            .await;
            match head {
                Ok(head) => Ok(self.respond(head)),
                Err(failed) => Err(self.inner.borrow_mut().give_up(failed)),
            }
        }
    }

    fn respond(self: Rc<Self>, head: ResponseHead) -> Response<Incoming> {
        let hint = match head.framing {
            http1::Framing::Empty => Some(0),
            http1::Framing::Length(length) => Some(length),
            http1::Framing::Chunked | http1::Framing::UntilClose => None,
        };
        let mut response = Response::new(Incoming::Http1Response(ResponseStream {
            connection: (hint != Some(0)).then_some(self),
            left: hint,
        }));
        *response.status_mut() = head.status;
        *response.version_mut() = head.version;
        *response.headers_mut() = head.headers;
        response
    }

    /// The bare socket, after the peer has switched protocols; none while a response is held.
    pub fn into_wire(self: Rc<Self>) -> Option<Wire> {
        Rc::into_inner(self).map(|connection| connection.inner.into_inner().wire)
    }
}

/// What the response depends on.
struct Asked {
    method: Method,
    /// A switch of protocols was asked for.
    switch: bool,
}

/// How far the head has come.
#[derive(Default)]
struct Reading {
    searched: usize,
    interim: u32,
    began: bool,
}

impl Inner {
    fn is_reusable(&self) -> bool {
        self.keep_alive && self.response.is_ended() && matches!(self.upload, Upload::Done)
    }

    fn begin(&mut self, head: &Outgoing<'_>, body: RequestBody) {
        // Until the end of the exchange says otherwise.
        self.keep_alive = false;
        let (length, framing) = lengths(head.method, &body);
        let mut out = wire::buffer();
        write_request(
            &mut out,
            head.method,
            head.path.as_str(),
            head.authority.map(Authority::as_str),
            head.headers,
            framing,
        );
        let sending = Sending::new(out, length).head_first(body.is_single());
        self.upload = Upload::Going(Box::new((sending, body)));
    }

    fn poll_head(
        &mut self,
        cx: &mut Context<'_>,
        asked: &Asked,
        read: &mut Reading,
    ) -> Poll<Result<ResponseHead, PeerError>> {
        let sending = self.poll_upload(cx);
        if let (Upload::Broken, Poll::Ready(Err(broken))) = (&self.upload, sending) {
            return Poll::Ready(Err(broken));
        }
        loop {
            match self.next_head(asked, read) {
                Ok(Some(head)) => return Poll::Ready(Ok(head)),
                Ok(None) => {}
                Err(error) => return Poll::Ready(Err(error.into())),
            }
            // Even a peer that takes no more of the request may have answered it.
            let filled = match ready!(self.wire.poll_fill(cx)) {
                Ok(0) if read.began => Err(WireError::Truncated),
                Ok(0) => Err(WireError::Closed),
                Ok(_) => Ok(()),
                Err(error) => Err(WireError::Io(error)),
            };
            if let Err(error) = filled {
                return Poll::Ready(Err(error.into()));
            }
            read.began = true;
        }
    }

    fn next_head(
        &mut self,
        asked: &Asked,
        read: &mut Reading,
    ) -> Result<Option<ResponseHead>, WireError> {
        loop {
            if self.wire.buf.is_empty() {
                return Ok(None);
            }
            let Some(end) = find_end(&self.wire.buf, &mut read.searched, &self.limits)? else {
                return Ok(None);
            };
            read.searched = 0;
            let bytes = self.wire.take_head(end);
            let head = parse_response(bytes, &asked.method, &self.limits)?;
            let switched = head.status == StatusCode::SWITCHING_PROTOCOLS;
            if head.status.is_informational() && !switched {
                read.interim += 1;
                if read.interim > MAX_INTERIM {
                    return Err(http1::Malformed::Framing("too many interim responses").into());
                }
                continue;
            }
            // RFC 9110 §7.8: only a request that offered it may be told to switch.
            if switched && !asked.switch {
                return Err(http1::Malformed::Framing("101 to a request without Upgrade").into());
            }
            self.response = Decoder::new(head.framing, &self.limits);
            self.keep_alive = head.keep_alive && !switched;
            return Ok(Some(head));
        }
    }

    /// Moves the request on. An error is kept for the exchange: the answer may come all the same.
    fn poll_upload(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), PeerError>> {
        let (sending, body) = match &mut self.upload {
            Upload::Done => return Poll::Ready(Ok(())),
            Upload::Broken => return Poll::Pending,
            Upload::Going(going) => &mut **going,
        };
        let wire = &mut self.wire;
        let sent = sending.poll(cx, body, |cx, slices| wire.poll_write(cx, slices));
        let failed = match ready!(sent) {
            Ok(()) => {
                self.upload = Upload::Done;
                return Poll::Ready(Ok(()));
            }
            Err(failed) => failed,
        };
        self.keep_alive = false;
        match failed {
            // Kept, for `give_up` to see how far it came.
            SendingError::Io(error) => Poll::Ready(Err(PeerError::Http1(WireError::Io(error)))),
            SendingError::Body(_) | SendingError::Length => {
                self.upload = Upload::Broken;
                let gone = std::io::Error::other("the request body broke off");
                Poll::Ready(Err(PeerError::Http1(WireError::Io(gone))))
            }
        }
    }

    /// No head came: the request goes back when nothing of it was sent.
    fn give_up(&mut self, failed: PeerError) -> SendError {
        self.keep_alive = false;
        match std::mem::replace(&mut self.upload, Upload::Broken) {
            Upload::Going(going) if going.0.written() == 0 => {
                let (_, body) = *going;
                SendError::Unsent(Box::new(body), failed)
            }
            _ => SendError::Failed(failed),
        }
    }

    /// Moves the request on beside the response: what becomes of it now shows in the response, or
    /// does not matter any more.
    fn poll_beside(&mut self, cx: &mut Context<'_>) {
        if self.poll_upload(cx).is_ready() && !matches!(self.upload, Upload::Done) {
            self.upload = Upload::Broken;
        }
    }

    fn poll_body(&mut self, cx: &mut Context<'_>) -> Poll<Result<Item, WireError>> {
        self.poll_beside(cx);
        loop {
            match self.response.decode(&mut self.wire.buf)? {
                Item::More => self.wire.rest(),
                item => {
                    self.wire.rest();
                    return Poll::Ready(Ok(item));
                }
            }
            if ready!(self.wire.poll_fill(cx))? == 0 {
                self.response.at_eof().map_err(|_| WireError::Truncated)?;
            }
        }
    }
}

/// How the body is announced, and what is to be written of it.
fn lengths(method: &Method, body: &RequestBody) -> (Length, BodyLength) {
    if body.is_end_stream() {
        // RFC 9110 §8.6: methods that expect content say so when there is none.
        let expects = matches!(*method, Method::POST | Method::PUT | Method::PATCH);
        let framing = if expects {
            BodyLength::Known(0)
        } else {
            BodyLength::Empty
        };
        return (Length::Empty, framing);
    }
    match body.size_hint().exact() {
        Some(length) => (Length::Known(length), BodyLength::Known(length)),
        None => (Length::Chunked, BodyLength::Chunked),
    }
}

/// The body of a response. Holds the connection until it has given its last byte.
pub struct ResponseStream {
    connection: Option<Rc<Connection>>,
    left: Option<u64>,
}

impl ResponseStream {
    /// Whether nothing more comes.
    pub fn is_end_stream(&self) -> bool {
        self.connection.is_none()
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
        let Some(connection) = &self.connection else {
            return Poll::Ready(None);
        };
        let (item, ended) = {
            let inner = &mut *connection.inner.borrow_mut();
            let item = ready!(inner.poll_body(cx));
            (item, inner.response.is_ended())
        };
        if ended || item.is_err() {
            self.connection = None;
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

    /// Moves a request body on while the response waits for its reader.
    pub fn poll_upload(&mut self, cx: &mut Context<'_>) {
        if let Some(connection) = &self.connection {
            connection.inner.borrow_mut().poll_beside(cx);
        }
    }
}
