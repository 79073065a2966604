//! One request over HTTP/2, from its head to the end of its answer.
//!
//! Stands on the life of a request.

use std::cell::Cell;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::Poll;

use bytes::Bytes;
use h2::server::SendResponse;
use h2::{Reason, RecvStream, SendStream};
use http::header::{CONTENT_LENGTH, DATE, EXPECT};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, request, response};
use http_body::Body as _;
use tracing::debug;

use crate::forward;
use crate::http::body::ResponseBody;
use crate::http::context::Connection;
use crate::http::incoming::Incoming;
use crate::http::switch::{self, Switch};
use crate::http::tunnel::Tunnel;
use crate::http2::answer::{Answer, Sent};
use crate::http2::duplex::Duplex;
use crate::http2::request::RequestStream;
use crate::http2::streams::Stream;
use crate::worker::Worker;

/// Serves `request` and sends its answer through `respond`.
///
/// What is done at once with the head is done before there is a future: whoever holds it moves it
/// several times, so it holds no more than it waits with.
///
/// # Cancel safety
/// Dropping the future abandons the request and resets its stream.
pub fn serve(
    worker: Rc<Worker>,
    connection: Rc<Connection>,
    stream: Stream,
    request: Request<RecvStream>,
    respond: SendResponse<Bytes>,
) -> impl Future<Output = ()> {
    let (mut head, recv) = request.into_parts();
    let head_only = head.method == Method::HEAD;
    let (mut body, tunnelled) = if head.method == Method::CONNECT {
        open(&worker, &mut head);
        (RequestStream::empty(), Some(recv))
    } else {
        (RequestStream::new(recv, &head.headers), None)
    };
    let mut wanted = None;
    if head.headers.contains_key(EXPECT) {
        wanted = expected(&head.headers, &mut body);
    }
    let request = Request::from_parts(head, Incoming::Http2Request(body));
    let serving = {
        let worker = Rc::clone(&worker);
        Box::pin(async move { forward::serve(&worker, &connection, request).await })
    };
    let call = Served {
        worker,
        stream,
        respond,
        head_only,
        tunnelled,
    };
    call.answer(serving, wanted)
}

/// A request that is being served.
struct Served {
    worker: Rc<Worker>,
    stream: Stream,
    respond: SendResponse<Bytes>,
    head_only: bool,
    tunnelled: Option<RecvStream>,
}

impl Served {
    /// Waits for the answer and sends it.
    async fn answer(
        self,
        mut serving: Pin<Box<impl Future<Output = Response<ResponseBody>>>>,
        mut wanted: Option<Rc<Cell<bool>>>,
    ) {
        let Self {
            worker,
            mut stream,
            mut respond,
            head_only,
            tunnelled,
        } = self;
        let answered = std::future::poll_fn(|cx| {
            if let Poll::Ready(response) = serving.as_mut().poll(cx) {
                return Poll::Ready(Some(response));
            }
            if wanted.take_if(|wanted| wanted.get()).is_some() {
                let mut go_on = Response::new(());
                *go_on.status_mut() = StatusCode::CONTINUE;
                // Refused only when the stream is over.
                let _ = respond.send_informational(go_on);
            }
            // The caller may not want it any more.
            respond.poll_reset(cx).map(|_| None)
        });
        let Some(response) = answered.await else {
            return;
        };
        drop(serving);
        let (mut head, mut body) = response.into_parts();
        let fields = &mut head.headers;
        if !fields.contains_key(DATE) {
            fields.insert(DATE, worker.date_value());
        }
        if let (Some(tunnel), Some(recv)) = (body.take_tunnel(), tunnelled) {
            stream.answered();
            return Box::pin(carry(&worker, head, tunnel, recv, respond)).await;
        }
        let ended = head_only || body.is_end_stream();
        if !ended && let Some(length) = body.size_hint().exact() {
            let length = || HeaderValue::from(length);
            fields.entry(CONTENT_LENGTH).or_insert_with(length);
        }
        let Some(sending) = begin(&mut respond, head, ended) else {
            return;
        };
        if !ended {
            let mut answer = Answer::new(&worker, body, sending);
            match std::future::poll_fn(|cx| answer.poll(cx)).await {
                Sent::Ended => {}
                Sent::Gone => return,
            }
        }
        stream.answered();
    }
}

/// What tells that the body is wanted, to a caller that waits for that (RFC 9110 §10.1.1).
fn expected(fields: &HeaderMap, body: &mut RequestStream) -> Option<Rc<Cell<bool>>> {
    let expectation = fields.get(EXPECT)?.as_bytes();
    if body.is_end_stream() || !expectation.eq_ignore_ascii_case(b"100-continue") {
        return None;
    }
    let wanted = Rc::new(Cell::new(false));
    body.tell(Rc::clone(&wanted));
    Some(wanted)
}

/// Reads an extended CONNECT as the request that it stands for.
fn open(worker: &Worker, head: &mut request::Parts) {
    let mut key = [0; 16];
    worker.rng().fill(&mut key);
    if let Some(switch) = Switch::of_http2(head, key) {
        head.extensions.insert(switch);
    }
}

/// Sends the head of an answer; none when the stream is over.
fn begin(
    respond: &mut SendResponse<Bytes>,
    head: response::Parts,
    ended: bool,
) -> Option<SendStream<Bytes>> {
    let sent = respond.send_response(Response::from_parts(head, ()), ended);
    sent.inspect_err(|error| {
        debug!(%error, "no answer could be sent");
        respond.send_reset(Reason::INTERNAL_ERROR);
    })
    .ok()
}

/// Carries the tunnel that an answer opens over the stream of its request.
async fn carry(
    worker: &Worker,
    mut head: response::Parts,
    tunnel: Tunnel,
    recv: RecvStream,
    mut respond: SendResponse<Bytes>,
) {
    if head.status == StatusCode::SWITCHING_PROTOCOLS {
        switch::answer_http2(&mut head);
    }
    // RFC 9110 §9.3.6: what follows has no length.
    head.headers.remove(CONTENT_LENGTH);
    if let Some(send) = begin(&mut respond, head, false) {
        // Dropping a stream that broke off resets it.
        tunnel
            .run(&mut Duplex::new(recv, send), &worker.wheel)
            .await;
    }
}
