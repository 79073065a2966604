//! The service behind the proxies.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode};
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::{TcpListener, TcpSocket, TcpStream};

/// The first bytes of a client that speaks h2 with prior knowledge.
const PREFACE: &[u8] = b"PRI ";

/// Answers until the process is ended.
pub(crate) async fn serve(listen: SocketAddr) -> io::Result<()> {
    let socket = TcpSocket::new_v4()?;
    socket.set_reuseaddr(true)?;
    socket.bind(listen)?;
    // Thousands connect at once.
    let listener: TcpListener = socket.listen(4_096)?;
    println!("{}", listener.local_addr()?);
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                tokio::spawn(connection(stream));
            }
            Err(error) => {
                eprintln!("outrigger-bench: accept: {error}");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

async fn connection(stream: TcpStream) {
    let _ = stream.set_nodelay(true);
    let mut first = [0; 4];
    let seen = loop {
        match stream.peek(&mut first).await {
            Ok(0) | Err(_) => return,
            Ok(seen) if seen == first.len() || first[..seen] != PREFACE[..seen] => break seen,
            Ok(_) => tokio::task::yield_now().await,
        }
    };
    let io = TokioIo::new(stream);
    // A connection that breaks is the load's to report.
    if first[..seen] == *PREFACE {
        let mut server = http2::Builder::new(TokioExecutor::new());
        server.max_concurrent_streams(1_024);
        let _ = server.serve_connection(io, service_fn(answer)).await;
    } else {
        let _ = http1::Builder::new()
            .serve_connection(io, service_fn(answer))
            .await;
    }
}

async fn answer(request: Request<Incoming>) -> Result<Response<Answer>, Infallible> {
    let (head, body) = request.into_parts();
    let grpc = head
        .headers
        .get("content-type")
        .is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc"));
    let sent = if body.is_end_stream() {
        Bytes::new()
    } else {
        match body.collect().await {
            Ok(collected) => collected.to_bytes(),
            Err(_) => return Ok(status(400)),
        }
    };
    if grpc {
        return Ok(grpc_answer(sent));
    }
    let path = head.uri.path();
    if let Some(milliseconds) = number(path, "/slow/") {
        tokio::time::sleep(Duration::from_millis(milliseconds)).await;
    }
    if let Some(code) = number(path, "/status/") {
        return Ok(status(code));
    }
    Ok(match path {
        "/10k" => ok(Bytes::from_static(&[b'x'; 10 * 1024])),
        "/flaky" if every_tenth() => status(503),
        _ => ok(Bytes::from_static(&[b'x'; 100])),
    })
}

fn number(path: &str, prefix: &str) -> Option<u64> {
    path.strip_prefix(prefix)?.parse().ok()
}

fn every_tenth() -> bool {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    COUNT.fetch_add(1, Ordering::Relaxed) % 10 == 9
}

fn status(code: u64) -> Response<Answer> {
    let code = u16::try_from(code)
        .ok()
        .and_then(|code| StatusCode::from_u16(code).ok());
    let mut response = Response::new(Answer::default());
    *response.status_mut() = code.unwrap_or(StatusCode::BAD_REQUEST);
    response
}

fn ok(data: Bytes) -> Response<Answer> {
    let mut response = Response::new(Answer {
        data: Some(data),
        trailers: None,
    });
    let text = HeaderValue::from_static("text/plain");
    response.headers_mut().insert("content-type", text);
    response
}

/// The message as it came, and status 0.
fn grpc_answer(message: Bytes) -> Response<Answer> {
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", HeaderValue::from_static("0"));
    let mut response = Response::new(Answer {
        data: Some(message),
        trailers: Some(trailers),
    });
    let kind = HeaderValue::from_static("application/grpc");
    response.headers_mut().insert("content-type", kind);
    response
}

/// One piece of data, then trailers; either may be missing.
#[derive(Default)]
struct Answer {
    data: Option<Bytes>,
    trailers: Option<HeaderMap>,
}

impl Body for Answer {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let data = self.data.take().map(Frame::data);
        let frame = data.or_else(|| self.trailers.take().map(Frame::trailers));
        Poll::Ready(frame.map(Ok))
    }

    fn is_end_stream(&self) -> bool {
        self.data.is_none() && self.trailers.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.data.as_ref().map_or(0, |data| data.len() as u64))
    }
}
