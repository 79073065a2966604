//! Scripted services: real HTTP/1.1 and HTTP/2 servers that answer as a test says, and remember
//! what they were asked.

use std::convert::Infallible;
use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{Stream, StreamExt as _, stream};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Version};
use http_body::Frame;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

/// A body that breaks off on purpose.
#[derive(Debug)]
pub struct Broken;

impl std::fmt::Display for Broken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("broken off as the script says")
    }
}

impl std::error::Error for Broken {}

/// The body of scripted answers.
pub type Body = UnsyncBoxBody<Bytes, Broken>;

/// Holds answers back until the test lets them go.
#[derive(Clone)]
pub struct Gate(Arc<Semaphore>);

impl Default for Gate {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(0)))
    }
}

impl Gate {
    /// A closed gate.
    pub fn new() -> Self {
        Self::default()
    }

    /// Lets everybody pass from now on.
    pub fn open(&self) {
        self.0.close();
    }

    /// Lets `count` pass.
    pub fn pass(&self, count: usize) {
        self.0.add_permits(count);
    }

    async fn wait(&self) {
        if let Ok(permit) = self.0.acquire().await {
            permit.forget();
        }
    }
}

/// One request as the service saw it.
#[derive(Debug, Clone)]
pub struct Seen {
    /// Counted from 1, over all connections.
    pub n: usize,
    /// Which connection it came on, counted from 1.
    pub connection: usize,
    /// Its method.
    pub method: Method,
    /// Path and query.
    pub path: String,
    /// `Host` or `:authority`.
    pub authority: String,
    /// Its protocol version.
    pub version: Version,
    /// Its header fields.
    pub headers: HeaderMap,
    /// Its body, once it was read whole.
    pub body: Bytes,
    /// Its trailers, once the body was read whole.
    pub trailers: HeaderMap,
    /// Whether the body was read whole.
    pub complete: bool,
}

impl Seen {
    /// The first value of a field, as text; empty when it is not there.
    pub fn header(&self, name: &str) -> &str {
        self.headers
            .get(name)
            .map_or("", |value| value.to_str().expect("text"))
    }

    /// All values of a field.
    pub fn all(&self, name: &str) -> Vec<&[u8]> {
        self.headers
            .get_all(name)
            .iter()
            .map(HeaderValue::as_bytes)
            .collect()
    }
}

type Frames = Pin<Box<dyn Stream<Item = Result<Frame<Bytes>, Broken>> + Send>>;

enum Answer {
    Full(Bytes),
    Echo,
    Frames(Frames),
    Hang,
    Reset,
}

/// What to answer.
pub struct Reply {
    status: StatusCode,
    headers: HeaderMap,
    answer: Answer,
    trailers: Option<HeaderMap>,
    delay: Duration,
    gate: Option<Gate>,
    early: bool,
}

impl Reply {
    fn new(status: u16, answer: Answer) -> Self {
        Self {
            status: StatusCode::from_u16(status).expect("a status"),
            headers: HeaderMap::new(),
            answer,
            trailers: None,
            delay: Duration::ZERO,
            gate: None,
            early: false,
        }
    }

    /// 200 with a body.
    pub fn ok(body: impl Into<Bytes>) -> Self {
        Self::new(200, Answer::Full(body.into()))
    }

    /// A status without a body.
    pub fn status(status: u16) -> Self {
        Self::new(status, Answer::Full(Bytes::new()))
    }

    /// 200 with the request's body and content type.
    pub fn echo() -> Self {
        Self::new(200, Answer::Echo)
    }

    /// 200 with a body in pieces of no declared length.
    pub fn chunks<B: Into<Bytes>>(pieces: impl IntoIterator<Item = B>) -> Self {
        let frames: Vec<_> = pieces
            .into_iter()
            .map(|b| Ok(Frame::data(b.into())))
            .collect();
        Self::frames(stream::iter(frames))
    }

    /// 200 with whatever the stream says, as it says it.
    pub fn frames(
        frames: impl Stream<Item = Result<Frame<Bytes>, Broken>> + Send + 'static,
    ) -> Self {
        Self::new(200, Answer::Frames(Box::pin(frames)))
    }

    /// 200 with `start`, and then the connection or stream breaks.
    pub fn broken_after(start: impl Into<Bytes>) -> Self {
        let first = stream::iter([Ok(Frame::data(start.into()))]);
        // The head and the first piece leave before the break.
        let broken = stream::once(async {
            tokio::time::sleep(Duration::from_millis(30)).await;
            Err(Broken)
        });
        Self::frames(first.chain(broken))
    }

    /// No answer, ever.
    pub fn hang() -> Self {
        Self::new(200, Answer::Hang)
    }

    /// The connection (HTTP/2: the stream) breaks before any answer.
    pub fn reset() -> Self {
        Self::new(200, Answer::Reset)
    }

    /// A gRPC answer: messages, then `status` in the trailers.
    pub fn grpc(messages: &[&[u8]], status: u8) -> Self {
        let frames: Vec<Bytes> = messages.iter().map(|message| grpc_frame(message)).collect();
        Self::chunks(frames)
            .header("content-type", "application/grpc")
            .trailer("grpc-status", &status.to_string())
    }

    /// A gRPC error without any message: trailers-only.
    pub fn grpc_error(status: u8, message: &str) -> Self {
        Self::status(200)
            .header("content-type", "application/grpc")
            .header("grpc-status", &status.to_string())
            .header("grpc-message", message)
    }

    /// Sets the status.
    pub fn with_status(mut self, status: u16) -> Self {
        self.status = StatusCode::from_u16(status).expect("a status");
        self
    }

    /// Appends a field.
    pub fn header(mut self, name: &str, value: &str) -> Self {
        let name = HeaderName::from_bytes(name.as_bytes()).expect("a name");
        self.headers
            .append(name, HeaderValue::from_str(value).expect("a value"));
        self
    }

    /// Appends a trailer.
    pub fn trailer(mut self, name: &str, value: &str) -> Self {
        let name = HeaderName::from_bytes(name.as_bytes()).expect("a name");
        let value = HeaderValue::from_str(value).expect("a value");
        self.trailers.get_or_insert_default().append(name, value);
        self
    }

    /// Answers only after this time.
    pub fn delay(mut self, delay: Duration) -> Self {
        self.delay = delay;
        self
    }

    /// Answers only when the gate lets it.
    pub fn hold(mut self, gate: &Gate) -> Self {
        self.gate = Some(gate.clone());
        self
    }

    /// Answers before the request's body was read; the body is never read.
    pub fn early(mut self) -> Self {
        self.early = true;
        self
    }
}

/// A gRPC message with its five-byte prefix.
pub fn grpc_frame(message: &[u8]) -> Bytes {
    let length = u32::try_from(message.len()).expect("a short message");
    [&[0][..], &length.to_be_bytes(), message].concat().into()
}

/// What the service speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Speaks {
    /// HTTP/1.1.
    H1,
    /// HTTP/2 with prior knowledge.
    H2,
}

type Script = dyn Fn(&Seen) -> Reply + Send + Sync;

struct State {
    speaks: Speaks,
    script: Mutex<Arc<Script>>,
    seen: Mutex<Vec<Seen>>,
    connections: AtomicUsize,
    active: AtomicUsize,
    most_active: AtomicUsize,
}

/// A service. Ends with its value, connections and all.
pub struct Upstream {
    /// Where it listens, also while it is down.
    pub addr: SocketAddr,
    state: Arc<State>,
    serving: Option<tokio::task::JoinHandle<()>>,
}

impl Upstream {
    /// An HTTP/1.1 service.
    pub async fn h1(script: impl Fn(&Seen) -> Reply + Send + Sync + 'static) -> Self {
        Self::start(Speaks::H1, script).await
    }

    /// An HTTP/2 service with prior knowledge, also for gRPC.
    pub async fn h2(script: impl Fn(&Seen) -> Reply + Send + Sync + 'static) -> Self {
        Self::start(Speaks::H2, script).await
    }

    /// A service that speaks `speaks`.
    pub async fn start(
        speaks: Speaks,
        script: impl Fn(&Seen) -> Reply + Send + Sync + 'static,
    ) -> Self {
        Self::on(([127, 0, 0, 1], 0).into(), speaks, script).await
    }

    /// A service at this address.
    pub async fn on(
        addr: SocketAddr,
        speaks: Speaks,
        script: impl Fn(&Seen) -> Reply + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind(addr).await.expect("a port");
        let state = Arc::new(State {
            speaks,
            script: Mutex::new(Arc::new(script)),
            seen: Mutex::default(),
            connections: AtomicUsize::new(0),
            active: AtomicUsize::new(0),
            most_active: AtomicUsize::new(0),
        });
        let addr = listener.local_addr().expect("an address");
        let serving = Some(tokio::spawn(serve(listener, Arc::clone(&state))));
        Self {
            addr,
            state,
            serving,
        }
    }

    /// Answers otherwise from now on.
    pub fn script(&self, script: impl Fn(&Seen) -> Reply + Send + Sync + 'static) {
        *lock(&self.state.script) = Arc::new(script);
    }

    /// Goes down: the port is closed and every connection is cut.
    pub async fn stop(&mut self) {
        if let Some(serving) = self.serving.take() {
            serving.abort();
            let _ = serving.await;
        }
    }

    /// Comes up again, on the same address.
    pub async fn start_again(&mut self) {
        self.stop().await;
        let listener = TcpListener::bind(self.addr)
            .await
            .expect("the port is still free");
        self.serving = Some(tokio::spawn(serve(listener, Arc::clone(&self.state))));
    }

    /// How many requests it was asked.
    pub fn hits(&self) -> usize {
        lock(&self.state.seen).len()
    }

    /// All requests so far, in order.
    pub fn seen(&self) -> Vec<Seen> {
        lock(&self.state.seen).clone()
    }

    /// The latest request.
    ///
    /// # Panics
    /// When there was none.
    pub fn last(&self) -> Seen {
        lock(&self.state.seen)
            .last()
            .cloned()
            .expect("it was never asked")
    }

    /// Connections accepted so far.
    pub fn connections(&self) -> usize {
        self.state.connections.load(Ordering::SeqCst)
    }

    /// Requests being answered now.
    pub fn active(&self) -> usize {
        self.state.active.load(Ordering::SeqCst)
    }

    /// The most requests that were ever being answered at once.
    pub fn most_active(&self) -> usize {
        self.state.most_active.load(Ordering::SeqCst)
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        if let Some(serving) = &self.serving {
            serving.abort();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn serve(listener: TcpListener, state: Arc<State>) {
    let mut connections = JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        let connection = state.connections.fetch_add(1, Ordering::SeqCst) + 1;
        // Small answers leave at once.
        let _ = stream.set_nodelay(true);
        let state = Arc::clone(&state);
        connections.spawn(async move {
            let speaks = state.speaks;
            let service =
                service_fn(move |request| answer(Arc::clone(&state), connection, request));
            let io = TokioIo::new(stream);
            // What the sidecar makes of a broken connection is what tests look at.
            let _ = match speaks {
                Speaks::H1 => http1::Builder::new().serve_connection(io, service).await,
                Speaks::H2 => {
                    http2::Builder::new(TokioExecutor::new())
                        .serve_connection(io, service)
                        .await
                }
            };
        });
        while connections.try_join_next().is_some() {}
    }
}

/// Counts a request until its answer is over.
struct Active(Arc<State>);

impl Active {
    fn new(state: &Arc<State>) -> Self {
        let active = state.active.fetch_add(1, Ordering::SeqCst) + 1;
        state.most_active.fetch_max(active, Ordering::SeqCst);
        Self(Arc::clone(state))
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        self.0.active.fetch_sub(1, Ordering::SeqCst);
    }
}

async fn answer(
    state: Arc<State>,
    connection: usize,
    request: Request<Incoming>,
) -> Result<Response<Body>, Broken> {
    let active = Active::new(&state);
    let (parts, incoming) = request.into_parts();
    let host = parts
        .headers
        .get("host")
        .and_then(|host| host.to_str().ok());
    let authority = parts.uri.authority().map(|authority| authority.as_str());
    let mut seen = Seen {
        n: 0,
        connection,
        method: parts.method,
        path: parts
            .uri
            .path_and_query()
            .map_or("", |path| path.as_str())
            .to_owned(),
        authority: authority.or(host).unwrap_or_default().to_owned(),
        version: parts.version,
        headers: parts.headers,
        body: Bytes::new(),
        trailers: HeaderMap::new(),
        complete: false,
    };
    let at = {
        let mut all = lock(&state.seen);
        seen.n = all.len() + 1;
        all.push(seen.clone());
        seen.n - 1
    };
    let script = Arc::clone(&lock(&state.script));
    let reply = script(&seen);
    let mut unread = None;
    let mut body = Bytes::new();
    if reply.early {
        unread = Some(incoming);
    } else {
        let collected = incoming.collect().await.map_err(|_| Broken)?;
        let trailers = collected.trailers().cloned().unwrap_or_default();
        body = collected.to_bytes();
        let mut all = lock(&state.seen);
        (all[at].body, all[at].trailers, all[at].complete) = (body.clone(), trailers, true);
    }
    if !reply.delay.is_zero() {
        tokio::time::sleep(reply.delay).await;
    }
    if let Some(gate) = &reply.gate {
        gate.wait().await;
    }
    let frames: Frames = match reply.answer {
        // hyper leaves it to the service to send no body over HTTP/2.
        Answer::Full(full) if seen.method == Method::HEAD => {
            let mut headers = reply.headers;
            headers.insert("content-length", HeaderValue::from(full.len()));
            let none = Full::default().map_err(|never: Infallible| match never {});
            return Ok(response(reply.status, headers, none.boxed_unsync()));
        }
        Answer::Reset => return Err(Broken),
        Answer::Hang => std::future::pending().await,
        Answer::Full(full) if reply.trailers.is_none() => {
            let full = Full::new(full).map_err(|never: Infallible| match never {});
            return Ok(response(reply.status, reply.headers, full.boxed_unsync()));
        }
        Answer::Full(full) => Box::pin(stream::iter([Ok(Frame::data(full))])),
        Answer::Echo => {
            let mut headers = reply.headers;
            if let Some(kind) = seen.headers.get("content-type") {
                headers.insert("content-type", kind.clone());
            }
            let full = Full::new(body).map_err(|never: Infallible| match never {});
            return Ok(response(reply.status, headers, full.boxed_unsync()));
        }
        Answer::Frames(frames) => frames,
    };
    let trailers = reply.trailers.map(|trailers| Ok(Frame::trailers(trailers)));
    let frames = frames.chain(stream::iter(trailers)).map(move |frame| {
        // Both live as long as the answer.
        let _ = (&active, &unread);
        frame
    });
    Ok(response(
        reply.status,
        reply.headers,
        StreamBody::new(frames).boxed_unsync(),
    ))
}

fn response(status: StatusCode, headers: HeaderMap, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    *response.headers_mut() = headers;
    response
}

/// A server below HTTP: what each connection gets is the test's.
pub struct Raw {
    /// Where it listens.
    pub addr: SocketAddr,
    connections: Arc<AtomicUsize>,
    serving: tokio::task::JoinHandle<()>,
}

impl Raw {
    /// Runs `serve` for every connection.
    pub async fn start<F>(serve: impl Fn(TcpStream) -> F + Send + 'static) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        Self::on(([127, 0, 0, 1], 0).into(), serve).await
    }

    /// Runs `serve` for every connection to this address.
    pub async fn on<F>(addr: SocketAddr, serve: impl Fn(TcpStream) -> F + Send + 'static) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let listener = TcpListener::bind(addr).await.expect("a port");
        let addr = listener.local_addr().expect("an address");
        let connections = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&connections);
        let serving = tokio::spawn(async move {
            let mut tasks = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                count.fetch_add(1, Ordering::SeqCst);
                tasks.spawn(serve(stream));
            }
        });
        Self {
            addr,
            connections,
            serving,
        }
    }

    /// Connections accepted so far.
    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

/// An address where nobody listens.
pub async fn nobody() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    listener.local_addr().expect("an address")
}
