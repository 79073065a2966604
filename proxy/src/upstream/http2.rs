//! HTTP/2 towards upstreams: the h2 crate, without a layer between.
//!
//! One task drives each connection; a request is sent and its response read by whoever polls, as
//! over HTTP/1.1, so that a call costs no task and no channel of its own. A short body goes out
//! together with its head.
//!
//! Stands on the life of a request.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use bytes::Bytes;
use h2::client::{Builder, Connection as Driver, ResponseFuture, SendRequest};
use h2::{Ping, PingPong, Reason, RecvStream, SendStream};
use http::Response;
use http::header::CONTENT_LENGTH;
use http_body::{Body as _, Frame, SizeHint};

use crate::clock;
use crate::http::body::RequestBody;
use crate::http::incoming::{Incoming, PeerError};
use crate::io::Io;
use crate::upstream::connect::{CONNECTION_WINDOW, Limits, STREAM_WINDOW};
use crate::upstream::doorbell::Doorbell;
use crate::upstream::pool::{Outgoing, SendError};
use crate::wheel::Wheel;

/// While there are streams, the peer is asked for a sign of life after this.
const PING_EVERY: Duration = Duration::from_secs(30);
/// The peer is gone when it gives none for this long.
const PONG_WITHIN: Duration = Duration::from_secs(10);

/// A first piece of a body up to this length goes out with the head, whatever window there is: h2
/// keeps it until there is enough.
const WITH_HEAD: usize = 16 * 1024;

/// One connection to an endpoint.
pub struct Connection {
    sender: RefCell<SendRequest<Bytes>>,
    state: Rc<State>,
}

/// What the connection and its task both know.
#[derive(Default)]
struct State {
    streams: Cell<usize>,
    ended: Cell<bool>,
    /// Nobody can send on it any more: its task ends with the last stream.
    left: Cell<bool>,
    doorbell: Doorbell,
}

/// Opens a connection over `stream`. Its task runs on this worker until it ends.
///
/// # Errors
/// h2's, when the peer does not take part in the handshake.
pub async fn connect(stream: Io, limits: &Limits, wheel: &Wheel) -> Result<Connection, h2::Error> {
    let secured = matches!(stream, Io::Tls(_));
    let expiry = stream.expiry().cloned();
    let (sender, mut driver) = Builder::new()
        .enable_push(false)
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_header_list_size(u32::try_from(limits.max_header_bytes).unwrap_or(u32::MAX))
        // Callers that give up reset streams, and late frames of those must not end the connection
        // for everybody else on it. The upstream is ours; the callers' side has its own bounds.
        .max_concurrent_reset_streams(4096)
        .max_local_error_reset_streams(None)
        .handshake(stream)
        .await?;
    let mut pings = driver.ping_pong();
    if let (true, Some(pings)) = (secured, &mut pings) {
        accepted(&mut driver, pings).await?;
    }
    let state = Rc::new(State::default());
    let (wheel, driven) = (wheel.clone(), Rc::clone(&state));
    tokio::task::spawn_local(async move {
        let driving = drive(driver, pings, &wheel, &driven);
        match expiry {
            Some(expiry) => {
                expiry.watch(&wheel, driving).await;
            }
            None => driving.await,
        }
        driven.ended.set(true);
    });
    Ok(Connection {
        sender: RefCell::new(sender),
        state,
    })
}

/// Waits for the peer's first word. TLS 1.3 lets a server refuse our certificate after the
/// handshake has ended for us (RFC 8446 §4.4.2.4); a request must not be what finds out.
async fn accepted(driver: &mut Driver<Io, Bytes>, pings: &mut PingPong) -> Result<(), h2::Error> {
    pings.send_ping(Ping::opaque())?;
    std::future::poll_fn(|cx| {
        if let Poll::Ready(ended) = Pin::new(&mut *driver).poll(cx) {
            return Poll::Ready(ended.and(Err(Reason::NO_ERROR.into())));
        }
        pings.poll_pong(cx).map_ok(drop)
    })
    .await
}

/// Moves the connection's frames until it ends, and asks a silent peer whether it is there.
async fn drive(
    mut driver: Driver<Io, Bytes>,
    mut pings: Option<PingPong>,
    wheel: &Wheel,
    state: &State,
) {
    let mut timer = wheel.sleep_until(clock::now() + PING_EVERY);
    let mut asked = false;
    std::future::poll_fn(|cx| {
        loop {
            let polled = Pin::new(&mut driver).poll(&mut state.doorbell.answer(cx));
            if polled.is_ready() {
                return Poll::Ready(());
            }
            let Some(pings) = &mut pings else {
                return Poll::Pending;
            };
            if asked && pings.poll_pong(cx).is_ready() {
                asked = false;
                timer.reset(clock::now() + PING_EVERY);
            }
            ready!(Pin::new(&mut timer).poll(cx));
            if asked {
                return Poll::Ready(());
            }
            asked = state.streams.get() > 0 && pings.send_ping(Ping::opaque()).is_ok();
            let next = if asked { PONG_WITHIN } else { PING_EVERY };
            timer.reset(clock::now() + next);
        }
    })
    .await;
}

impl Connection {
    /// Whether it takes no request any more.
    pub fn is_closed(&self) -> bool {
        self.state.ended.get()
    }

    /// Requests on it.
    pub fn streams(&self) -> usize {
        self.state.streams.get()
    }

    /// Counts a request until the guard is dropped.
    pub fn begin(self: &Rc<Self>) -> Stream {
        self.state.streams.set(self.streams() + 1);
        self.settle();
        Stream(Rc::clone(self))
    }

    /// Lets its task do what could wait when the last request ended.
    pub fn settle(&self) {
        self.state.doorbell.settle();
    }

    /// Whether it takes a request now. One that is going away counts as closed from here on.
    pub fn is_ready(&self) -> bool {
        let mut sender = self.sender.borrow_mut();
        if self.is_closed() || self.streams() >= sender.current_max_send_streams() {
            return false;
        }
        match sender.poll_ready(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(Ok(())) => true,
            Poll::Ready(Err(_)) => {
                self.state.ended.set(true);
                false
            }
            Poll::Pending => false,
        }
    }

    /// Sends a request and waits for the head of its response.
    ///
    /// # Errors
    /// See [`SendError`].
    ///
    /// # Cancel safety
    /// Dropping the future resets the stream.
    pub fn send(
        &self,
        head: &Outgoing<'_>,
        body: RequestBody,
    ) -> impl Future<Output = Result<Response<Incoming>, SendError>> + use<> {
        let ended = body.is_end_stream();
        let sent = self.sender.borrow_mut().send_request(head.http2(), ended);
        let state = Rc::clone(&self.state);
        async move {
            let (mut response, stream) = match sent {
                Ok(sent) => sent,
                // Nothing of it was even queued.
                Err(error) => return Err(SendError::Unsent(Box::new(body), error.into())),
            };
            let mut upload = (!ended).then(|| Upload::new(stream, body));
            let answered =
                std::future::poll_fn(|cx| poll_head(cx, &mut response, &mut upload)).await;
            let (head, recv) = answered
                .map_err(|error| match error {
                    PeerError::Http2(error) if refused(&error) => SendError::Refused(error.into()),
                    error => SendError::Failed(error),
                })?
                .into_parts();
            let left = if recv.is_end_stream() {
                Some(0)
            } else {
                let length = head.headers.get(CONTENT_LENGTH);
                length.and_then(|length| length.to_str().ok()?.parse().ok())
            };
            // Rare: the answer came before the request's end.
            let upload = upload.map(Box::new);
            let stream = ResponseStream {
                recv: Some(recv),
                upload,
                left,
                state,
            };
            Ok(Response::from_parts(head, Incoming::Http2Response(stream)))
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // The sender goes next, and the task must notice.
        self.state.left.set(true);
        self.settle();
    }
}

/// A request that counts against its connection's streams.
pub struct Stream(Rc<Connection>);

impl Drop for Stream {
    fn drop(&mut self) {
        self.0.state.streams.set(self.0.streams() - 1);
    }
}

fn poll_head(
    cx: &mut Context<'_>,
    response: &mut ResponseFuture,
    upload: &mut Option<Upload>,
) -> Poll<Result<Response<RecvStream>, PeerError>> {
    // Even a peer that takes no more of the request may have answered it.
    if let Poll::Ready(answered) = Pin::new(&mut *response).poll(cx) {
        return Poll::Ready(answered.map_err(PeerError::from));
    }
    let Some(going) = upload else {
        return Poll::Pending;
    };
    // What was sent just now may have been the end of the stream.
    let moved = ready!(going.poll(cx));
    *upload = None;
    match moved {
        Ok(()) => Poll::Pending,
        Err(Broken) => Poll::Ready(Err(PeerError::RequestBroken)),
    }
}

/// The request's body broke off.
struct Broken;

/// A request body on its way out.
struct Upload {
    stream: SendStream<Bytes>,
    body: RequestBody,
    /// Read and not yet sent.
    chunk: Bytes,
    /// Nothing follows the chunk.
    last: bool,
    first: bool,
}

impl Upload {
    fn new(stream: SendStream<Bytes>, body: RequestBody) -> Self {
        Self {
            stream,
            body,
            chunk: Bytes::new(),
            last: false,
            first: true,
        }
    }

    /// Ready when nothing is left to send, or nobody takes it: the response says more then.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        loop {
            if !self.chunk.is_empty() {
                self.stream.reserve_capacity(self.chunk.len());
                let room = self.stream.capacity();
                if room == 0 {
                    // Told of changes only; what it is now is asked above.
                    let Some(Ok(_)) = ready!(self.stream.poll_capacity(cx)) else {
                        return Poll::Ready(Ok(()));
                    };
                    continue;
                }
                let part = self.chunk.split_to(room.min(self.chunk.len()));
                let last = self.last && self.chunk.is_empty();
                if self.stream.send_data(part, last).is_err() || last {
                    return Poll::Ready(Ok(()));
                }
                continue;
            }
            match ready!(Pin::new(&mut self.body).poll_frame(cx)) {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => {
                        self.last = self.body.is_end_stream();
                        if data.is_empty() && !self.last {
                            continue;
                        }
                        if std::mem::take(&mut self.first) && data.len() <= WITH_HEAD {
                            let sent = self.stream.send_data(data, self.last);
                            if sent.is_err() || self.last {
                                return Poll::Ready(Ok(()));
                            }
                        } else if data.is_empty() {
                            let _ = self.stream.send_data(data, true);
                            return Poll::Ready(Ok(()));
                        } else {
                            self.chunk = data;
                        }
                    }
                    Err(frame) => {
                        if let Ok(trailers) = frame.into_trailers() {
                            // Refused only when the stream is gone already.
                            let _ = self.stream.send_trailers(trailers);
                        }
                        return Poll::Ready(Ok(()));
                    }
                },
                Some(Err(_)) => {
                    self.stream.send_reset(Reason::CANCEL);
                    return Poll::Ready(Err(Broken));
                }
                None => {
                    let _ = self.stream.send_data(Bytes::new(), true);
                    return Poll::Ready(Ok(()));
                }
            }
        }
    }
}

/// Whether the peer says that it has not worked on the request: REFUSED_STREAM, or a GOAWAY with a
/// lower last stream id (RFC 9113 §8.7).
fn refused(error: &h2::Error) -> bool {
    let refused = error.is_reset() && error.reason() == Some(Reason::REFUSED_STREAM);
    let above_last_id =
        error.is_go_away() && error.is_remote() && error.reason() == Some(Reason::NO_ERROR);
    refused || above_last_id
}

/// The body of a response.
pub struct ResponseStream {
    /// None while it is dropped.
    recv: Option<RecvStream>,
    /// What is left to send of the request.
    upload: Option<Box<Upload>>,
    left: Option<u64>,
    state: Rc<State>,
}

impl Drop for ResponseStream {
    fn drop(&mut self) {
        // Beside others, and where something is left to be said of it, the task runs anyway. Where
        // nobody is left who would settle what is owed, it must.
        let last = self.state.streams.get() == 0 && !self.state.left.get();
        if last && self.upload.is_none() && self.is_end_stream() {
            let state = Rc::clone(&self.state);
            state.doorbell.mute(|| self.recv = None);
        }
    }
}

impl ResponseStream {
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
    ) -> Poll<Option<Result<Frame<Bytes>, PeerError>>> {
        self.poll_upload(cx);
        let Some(recv) = &mut self.recv else {
            return Poll::Ready(None);
        };
        match ready!(recv.poll_data(cx)) {
            Some(Ok(data)) => {
                // Taken: the peer may send as much again. Fails only when the stream is over.
                let _ = recv.flow_control().release_capacity(data.len());
                self.left = self.left.map(|left| left.saturating_sub(data.len() as u64));
                Poll::Ready(Some(Ok(Frame::data(data))))
            }
            // RFC 9113 §8.1: sent after a whole response, to stop the upload beside it.
            Some(Err(error))
                if error.is_remote()
                    && error.is_reset()
                    && error.reason() == Some(Reason::NO_ERROR)
                    && self.left.is_none_or(|left| left == 0) =>
            {
                Poll::Ready(None)
            }
            Some(Err(error)) => Poll::Ready(Some(Err(error.into()))),
            None => match ready!(recv.poll_trailers(cx)) {
                Ok(trailers) => Poll::Ready(trailers.map(|trailers| Ok(Frame::trailers(trailers)))),
                Err(error) => Poll::Ready(Some(Err(error.into()))),
            },
        }
    }

    /// Moves a request body on while the response waits for its reader.
    pub fn poll_upload(&mut self, cx: &mut Context<'_>) {
        if let Some(upload) = &mut self.upload
            && upload.poll(cx).is_ready()
        {
            // What became of it shows in the response, or does not matter any more.
            self.upload = None;
        }
    }
}
