//! Applications: HTTP/1.1, HTTP/2 and raw clients.

use std::convert::Infallible;
use std::net::SocketAddr;

use bytes::Bytes;
use futures_util::stream;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, Version};
use http_body::Frame;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::SOON;
use crate::upstream::grpc_frame;

/// The body of requests.
pub type Body = UnsyncBoxBody<Bytes, Infallible>;

/// A request to send.
pub struct Ask {
    method: Method,
    host: String,
    path: String,
    headers: HeaderMap,
    body: Body,
}

impl Ask {
    /// A request without a body.
    pub fn new(method: &str, host: &str, path: &str) -> Self {
        Self {
            method: method.parse().expect("a method"),
            host: host.to_owned(),
            path: path.to_owned(),
            headers: HeaderMap::new(),
            body: Full::default().boxed_unsync(),
        }
    }

    /// A GET.
    pub fn get(host: &str, path: &str) -> Self {
        Self::new("GET", host, path)
    }

    /// A POST.
    pub fn post(host: &str, path: &str, body: impl Into<Bytes>) -> Self {
        Self::new("POST", host, path).body(body)
    }

    /// A gRPC call of one message.
    pub fn grpc(host: &str, path: &str, message: &[u8]) -> Self {
        Self::post(host, path, grpc_frame(message))
            .header("content-type", "application/grpc")
            .header("te", "trailers")
    }

    /// Appends a field.
    pub fn header(mut self, name: &str, value: &str) -> Self {
        let name = HeaderName::from_bytes(name.as_bytes()).expect("a name");
        self.headers.append(
            name,
            HeaderValue::from_bytes(value.as_bytes()).expect("a value"),
        );
        self
    }

    /// A body of known length.
    pub fn body(mut self, body: impl Into<Bytes>) -> Self {
        self.body = Full::new(body.into()).boxed_unsync();
        self
    }

    /// A body that is sent as the test hands over its pieces, and ends with the sender.
    pub fn streamed(self) -> (Self, mpsc::Sender<Bytes>) {
        let (sender, pieces) = mpsc::channel::<Bytes>(4);
        (self.pieces(pieces, None), sender)
    }

    /// A body in one piece of no declared length, and trailers.
    pub fn with_trailers(self, body: impl Into<Bytes>, trailers: &[(&str, &str)]) -> Self {
        let (sender, pieces) = mpsc::channel(1);
        sender.try_send(body.into()).expect("there is room");
        let mut map = HeaderMap::new();
        for (name, value) in trailers {
            let name = HeaderName::from_bytes(name.as_bytes()).expect("a name");
            map.append(name, HeaderValue::from_str(value).expect("a value"));
        }
        self.pieces(pieces, Some(map))
    }

    fn pieces(mut self, pieces: mpsc::Receiver<Bytes>, trailers: Option<HeaderMap>) -> Self {
        let frames = stream::unfold(
            (pieces, trailers),
            |(mut pieces, mut trailers)| async move {
                let frame = match pieces.recv().await {
                    Some(piece) => Frame::data(piece),
                    None => Frame::trailers(trailers.take()?),
                };
                Some((Ok(frame), (pieces, trailers)))
            },
        );
        self.body = StreamBody::new(frames).boxed_unsync();
        self
    }

    fn into_request(self, version: Version) -> Request<Body> {
        let mut request = Request::new(self.body);
        *request.method_mut() = self.method;
        *request.headers_mut() = self.headers;
        *request.version_mut() = version;
        let uri = if version == Version::HTTP_2 {
            format!("http://{}{}", self.host, self.path)
        } else {
            let host = HeaderValue::from_str(&self.host).expect("a host");
            request.headers_mut().insert("host", host);
            self.path
        };
        *request.uri_mut() = uri.parse().expect("a URI");
        request
    }
}

/// A whole response.
#[derive(Debug, Clone)]
pub struct Answer {
    /// The status.
    pub status: u16,
    /// The protocol version.
    pub version: Version,
    /// The header fields.
    pub headers: HeaderMap,
    /// The body.
    pub body: Bytes,
    /// The trailers.
    pub trailers: HeaderMap,
}

impl Answer {
    /// The first value of a field; empty when it is not there.
    pub fn header(&self, name: &str) -> &str {
        self.headers
            .get(name)
            .map_or("", |value| value.to_str().expect("text"))
    }

    /// The first value of a trailer; empty when it is not there.
    pub fn trailer(&self, name: &str) -> &str {
        self.trailers
            .get(name)
            .map_or("", |value| value.to_str().expect("text"))
    }

    /// `outrigger-error`.
    pub fn code(&self) -> &str {
        self.header("outrigger-error")
    }

    /// The body as JSON.
    ///
    /// # Panics
    /// When it is none.
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|error| panic!("{error}: {}", self.text()))
    }

    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// Checks that it is one of our errors, told whole: status, header and problem document.
    pub fn assert_error(&self, status: u16, code: &str) {
        assert_eq!(
            (self.status, self.code()),
            (status, code),
            "{}",
            self.text()
        );
        assert_eq!(self.header("content-type"), "application/problem+json");
        let problem = self.json();
        assert_eq!(problem["code"], code, "{problem}");
        assert_eq!(problem["status"], status, "{problem}");
        for member in ["type", "title", "detail", "hop"] {
            assert!(problem[member].is_string(), "{member} in {problem}");
        }
    }
}

enum Sender {
    H1(http1::SendRequest<Body>),
    H2(http2::SendRequest<Body>),
}

/// One connection of an application.
pub struct Client {
    sender: Sender,
    connection: JoinHandle<()>,
}

impl Client {
    /// An HTTP/1.1 connection.
    pub async fn h1(addr: SocketAddr) -> Self {
        Self::try_h1(addr).await.expect("connected")
    }

    /// An HTTP/1.1 connection, if there is somebody.
    ///
    /// # Errors
    /// What the system or hyper said.
    pub async fn try_h1(addr: SocketAddr) -> Result<Self, String> {
        let stream = connect(addr).await?;
        let made = http1::handshake(TokioIo::new(stream)).await;
        let (sender, connection) = made.map_err(|error| error.to_string())?;
        let connection = tokio::spawn(async move { drop(connection.await) });
        Ok(Self {
            sender: Sender::H1(sender),
            connection,
        })
    }

    /// An HTTP/2 connection with prior knowledge.
    pub async fn h2(addr: SocketAddr) -> Self {
        let stream = connect(addr).await.expect("connected");
        // Windows as small as the protocol's own: the peer waits for updates all the time.
        let mut builder = http2::Builder::new(TokioExecutor::new());
        builder
            .initial_stream_window_size(65_535)
            .initial_connection_window_size(65_535);
        let made = builder.handshake(TokioIo::new(stream)).await;
        let (sender, connection) = made.expect("a handshake");
        let connection = tokio::spawn(async move { drop(connection.await) });
        Self {
            sender: Sender::H2(sender),
            connection,
        }
    }

    /// Sends a request and reads its head.
    ///
    /// # Errors
    /// What hyper said, or that nothing came in time.
    pub async fn open(&mut self, ask: Ask) -> Result<Response<Incoming>, String> {
        let sent = async {
            match &mut self.sender {
                Sender::H1(sender) => {
                    sender.ready().await?;
                    sender
                        .send_request(ask.into_request(Version::HTTP_11))
                        .await
                }
                Sender::H2(sender) => {
                    sender.ready().await?;
                    sender.send_request(ask.into_request(Version::HTTP_2)).await
                }
            }
        };
        timeout(SOON, sent)
            .await
            .map_err(|_| "no response in time".to_owned())?
            .map_err(|error| format!("{error:?}"))
    }

    /// Sends a request and reads its whole response.
    ///
    /// # Errors
    /// What hyper said, or that nothing came in time.
    pub async fn try_call(&mut self, ask: Ask) -> Result<Answer, String> {
        let response = self.open(ask).await?;
        read(response).await
    }

    /// Sends a request and reads its whole response.
    ///
    /// # Panics
    /// When there is none.
    pub async fn call(&mut self, ask: Ask) -> Answer {
        self.try_call(ask).await.expect("a response")
    }

    /// Waits until the other side has closed the connection.
    ///
    /// # Panics
    /// When it does not.
    pub async fn closed(self) {
        timeout(SOON, self.connection)
            .await
            .expect("closed in time")
            .expect("no panic");
    }

    /// Cuts the connection, whatever is under way.
    pub fn abort(&self) {
        self.connection.abort();
    }
}

/// Reads a whole response.
///
/// # Errors
/// When it breaks off or does not end in time.
pub async fn read(response: Response<Incoming>) -> Result<Answer, String> {
    let (parts, body) = response.into_parts();
    let collected = timeout(4 * SOON, body.collect())
        .await
        .map_err(|_| "the response does not end".to_owned())?
        .map_err(|error| format!("{error:?}"))?;
    let trailers = collected.trailers().cloned().unwrap_or_default();
    Ok(Answer {
        status: parts.status.as_u16(),
        version: parts.version,
        headers: parts.headers,
        body: collected.to_bytes(),
        trailers,
    })
}

async fn connect(addr: SocketAddr) -> Result<TcpStream, String> {
    let stream = timeout(SOON, TcpStream::connect(addr)).await;
    let stream = stream.map_err(|_| "no connection in time".to_owned())?;
    let stream = stream.map_err(|error| error.to_string())?;
    stream
        .set_nodelay(true)
        .map_err(|error| error.to_string())?;
    Ok(stream)
}

/// One request on an HTTP/1.1 connection of its own.
///
/// # Panics
/// When there is no response.
pub async fn call(addr: SocketAddr, ask: Ask) -> Answer {
    try_call(addr, ask).await.expect("a response")
}

/// One request on an HTTP/1.1 connection of its own.
///
/// # Errors
/// Why there is no response.
pub async fn try_call(addr: SocketAddr, ask: Ask) -> Result<Answer, String> {
    Client::try_h1(addr).await?.try_call(ask).await
}

/// A connection below HTTP.
pub struct Raw {
    stream: TcpStream,
    received: Vec<u8>,
}

impl Raw {
    /// Connects.
    pub async fn connect(addr: SocketAddr) -> Self {
        Self {
            stream: connect(addr).await.expect("connected"),
            received: Vec::new(),
        }
    }

    /// Writes bytes.
    pub async fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.stream
            .write_all(bytes.as_ref())
            .await
            .expect("written");
    }

    /// Ends the sending half.
    pub async fn half_close(&mut self) {
        self.stream.shutdown().await.expect("shut down");
    }

    /// Reads until `text` has come; returns all that came so far.
    ///
    /// # Panics
    /// When it does not come.
    pub async fn read_until(&mut self, text: &str) -> String {
        let reading = async {
            let mut buffer = [0; 4096];
            while !String::from_utf8_lossy(&self.received).contains(text) {
                match self.stream.read(&mut buffer).await {
                    Ok(count) if count > 0 => self.received.extend_from_slice(&buffer[..count]),
                    _ => break,
                }
            }
        };
        let _ = timeout(SOON, reading).await;
        let all = String::from_utf8_lossy(&self.received).into_owned();
        assert!(all.contains(text), "{text:?} never came; got {all:?}");
        all
    }

    /// Reads until the other side closes; returns all that came.
    ///
    /// # Panics
    /// When it does not close.
    pub async fn read_to_end(&mut self) -> String {
        let mut rest = Vec::new();
        let read = timeout(SOON, self.stream.read_to_end(&mut rest)).await;
        // A reset is an end as well.
        let _ = read.expect("closed in time");
        self.received.extend_from_slice(&rest);
        String::from_utf8_lossy(&self.received).into_owned()
    }
}
