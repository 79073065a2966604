//! Connections of one worker, ready to carry a request.
//!
//! HTTP/1.1 connections wait in a last-in-first-out idle list per target; HTTP/2 connections are
//! shared, and another one opens when the peer's stream limit is reached, so nothing queues
//! inside h2. Connects are single-flight per h2 target: requests that arrive while one is under
//! way share it. The pool knows nothing of retries, breakers or balancing.
//!
//! Stands on the life of a request.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::future::Future;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use http::uri::{Authority, PathAndQuery, Scheme};
use http::{HeaderMap, Method, Request, Response, Uri, Version};
use outrigger_core::time::Mono;
use rustls::ClientConfig;
use tokio::sync::Notify;

use crate::clock;
use crate::error::chain;
use crate::http::body::RequestBody;
use crate::http::incoming::{Incoming, PeerError};
use crate::http1::client;
use crate::http1::wire::Wire;
use crate::identity::expiry::{Expiry, Outlived};
use crate::identity::verify::Refused;
use crate::io::Io;
use crate::upstream::connect::{self, ConnectError, Limits, Protocol, Secure, Target};
use crate::upstream::http2;
use crate::wheel::Wheel;

/// The `connection` settings of a service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Params {
    /// How long a connect may take.
    pub connect_timeout: Duration,
    /// Connections per endpoint over all workers; `None` is unlimited for HTTP/1.1 and 8 for h2.
    pub max_per_endpoint: Option<usize>,
    /// An unused connection is closed after this.
    pub idle_timeout: Duration,
    /// A connection takes no new request after this.
    pub max_age: Duration,
}

/// Connections per endpoint over all workers when `maxPerEndpoint` is not set: PRODUCT's default.
const DEFAULT_H2_CONNECTIONS: usize = 8;

/// How often a request that waits for a connection looks for what nobody tells it of.
const ASK_AGAIN: Duration = Duration::from_millis(50);

/// All upstream connections of one worker.
pub struct Pools {
    wheel: Wheel,
    limits: Limits,
    outlived: Outlived,
    pools: RefCell<HashMap<Target, Rc<Pool>, foldhash::fast::RandomState>>,
}

impl Pools {
    /// No connections yet.
    pub fn new(wheel: Wheel, limits: Limits, outlived: Outlived) -> Self {
        Self {
            wheel,
            limits,
            outlived,
            pools: RefCell::default(),
        }
    }

    /// A connection to `target` that can take a request now. `open` counts the endpoint's
    /// connections over all workers. `secure` is what the target's session stands for.
    ///
    /// # Errors
    /// When a new connection was needed and did not come about.
    ///
    /// # Cancel safety
    /// A connect under way is dropped, or goes on for the other requests that wait for it.
    pub async fn checkout(
        &self,
        target: Target,
        params: &Params,
        open: &Arc<AtomicUsize>,
        secure: Option<&Secure<'_>>,
    ) -> Result<Lease, ConnectError> {
        let pool = self.pool(target, open, secure)?;
        match target.protocol {
            Protocol::Http1 => pool.checkout_http1(self, params).await,
            Protocol::Http2 => pool.checkout_http2(self, params).await,
        }
    }

    fn pool(
        &self,
        target: Target,
        open: &Arc<AtomicUsize>,
        secure: Option<&Secure<'_>>,
    ) -> Result<Rc<Pool>, ConnectError> {
        if let Some(pool) = self.pools.borrow().get(&target) {
            return Ok(Rc::clone(pool));
        }
        let tls = match secure {
            Some(secure) => Some(secure.config(target.addr, target.protocol)?),
            None => None,
        };
        let pool = Rc::new(Pool::new(target, Arc::clone(open), tls));
        self.pools.borrow_mut().insert(target, Rc::clone(&pool));
        Ok(pool)
    }

    /// Closes what has been idle or has grown too old, and what nobody takes any more because our
    /// identity is of another `generation` now; run every few seconds.
    pub fn sweep(&self, generation: u64) {
        let now = clock::now();
        self.pools.borrow_mut().retain(|target, pool| {
            let session = target.session;
            let outlived = session.is_some_and(|session| session.generation != generation);
            pool.sweep(now, outlived);
            !pool.is_empty() || Rc::strong_count(pool) > 1
        });
    }
}

/// The connections of one worker to one target.
struct Pool {
    target: Target,
    tls: Option<Arc<ClientConfig>>,
    idle: RefCell<Vec<Http1>>,
    shared: RefCell<Vec<Rc<Http2>>>,
    connecting: Cell<bool>,
    /// h2 connects that have ended, and the last of them that failed: those who waited for it
    /// fail with it instead of trying one after another.
    flights: Cell<u64>,
    failed: RefCell<Option<(u64, Failed)>>,
    /// A connect ended, a stream or a connection came free.
    changed: Notify,
    open: Arc<AtomicUsize>,
    /// How many of `open` are this worker's.
    own: Cell<usize>,
    params: Cell<Option<Params>>,
}

impl Pool {
    fn new(target: Target, open: Arc<AtomicUsize>, tls: Option<Arc<ClientConfig>>) -> Self {
        Self {
            target,
            tls,
            idle: RefCell::default(),
            shared: RefCell::default(),
            connecting: Cell::new(false),
            flights: Cell::new(0),
            failed: RefCell::default(),
            changed: Notify::new(),
            open,
            own: Cell::new(0),
            params: Cell::new(None),
        }
    }

    async fn checkout_http1(
        self: &Rc<Self>,
        pools: &Pools,
        params: &Params,
    ) -> Result<Lease, ConnectError> {
        self.params.set(Some(*params));
        loop {
            if let Some(connection) = self.take_idle() {
                return Ok(Lease(Kind::Http1 {
                    pool: Rc::clone(self),
                    connection,
                    reused: true,
                }));
            }
            if let Some(slot) = Slot::take(self, params.max_per_endpoint.unwrap_or(usize::MAX)) {
                // Boxed: large, and rare beside requests.
                let stream = Box::pin(self.connect(pools, params)).await?;
                let connection = Http1 {
                    leaves: stream.expiry().map(Expiry::at),
                    connection: client::Connection::new(stream, pools.limits.http1()),
                    since: clock::now(),
                    made: clock::now(),
                    _slot: slot,
                };
                return Ok(Lease(Kind::Http1 {
                    pool: Rc::clone(self),
                    connection,
                    reused: false,
                }));
            }
            self.changed(&pools.wheel).await;
        }
    }

    /// Waits for something to come free. Asked again now and then: the places of other workers
    /// and a higher stream limit of the peer come free without a word.
    async fn changed(&self, wheel: &Wheel) {
        tokio::select! {
            () = self.changed.notified() => {}
            () = wheel.sleep_until(clock::now() + ASK_AGAIN) => {}
        }
    }

    fn take_idle(&self) -> Option<Http1> {
        let mut idle = self.idle.borrow_mut();
        while let Some(connection) = idle.pop() {
            if connection.connection.is_ready() && !has_left(connection.leaves, clock::now()) {
                return Some(connection);
            }
        }
        None
    }

    async fn checkout_http2(
        self: &Rc<Self>,
        pools: &Pools,
        params: &Params,
    ) -> Result<Lease, ConnectError> {
        self.params.set(Some(*params));
        loop {
            if let Some(stream) = self.take_stream(params) {
                return Ok(Lease(Kind::Http2 { stream }));
            }
            if !self.connecting.get() {
                let max = params.max_per_endpoint.unwrap_or(DEFAULT_H2_CONNECTIONS);
                if let Some(slot) = Slot::take(self, max) {
                    let mut flight = Flight::start(self);
                    // Boxed: large, and rare beside requests.
                    let connected = Box::pin(self.connect_http2(pools, params, slot)).await;
                    flight.error = connected.as_ref().err().map(Failed::of);
                    connected?;
                    continue;
                }
            }
            let seen = self.flights.get();
            self.changed(&pools.wheel).await;
            if let Some((flight, failed)) = &*self.failed.borrow()
                && *flight > seen
            {
                return Err(ConnectError::Shared {
                    reason: failed.reason.clone(),
                    tls: failed.tls,
                });
            }
        }
    }

    fn take_stream(&self, params: &Params) -> Option<Stream> {
        let mut shared = self.shared.borrow_mut();
        shared.retain(|connection| !connection.connection.is_closed());
        let fresh = |connection: &Rc<Http2>| {
            let young = params.max_age.is_zero()
                || clock::now().saturating_since(connection.made) < params.max_age;
            young && !has_left(connection.leaves, clock::now())
        };
        let connection = shared
            .iter()
            .find(|c| fresh(c) && c.connection.is_ready())?;
        Some(Stream {
            counted: Some(connection.connection.begin()),
            connection: Rc::clone(connection),
        })
    }

    async fn connect_http2(
        self: &Rc<Self>,
        pools: &Pools,
        params: &Params,
        slot: Slot,
    ) -> Result<(), ConnectError> {
        let due = connect::due(params.connect_timeout);
        let stream = self.connect(pools, params).await?;
        let leaves = stream.expiry().map(Expiry::at);
        let addr = self.target.addr;
        let opening = http2::connect(stream, &pools.limits, &pools.wheel);
        let connection = match self.tls {
            None => opening
                .await
                .map_err(|source| ConnectError::Handshake { addr, source })?,
            Some(_) => {
                let opened = connect::within(&pools.wheel, due, opening).await;
                let refused = match opened {
                    Some(Ok(connection)) => Ok(connection),
                    Some(Err(error)) => Err(Refused::ByPeer(chain(&error))),
                    None => Err(Refused::TimedOut),
                };
                refused.map_err(|refused| ConnectError::Tls { addr, refused })?
            }
        };
        self.shared.borrow_mut().push(Rc::new(Http2 {
            connection: Rc::new(connection),
            leaves,
            made: clock::now(),
            since: Cell::new(clock::now()),
            slot,
        }));
        Ok(())
    }

    async fn connect(&self, pools: &Pools, params: &Params) -> Result<Io, ConnectError> {
        let Target { addr, source, .. } = self.target;
        let due = connect::due(params.connect_timeout);
        let stream = connect::tcp(&pools.wheel, addr, source, params.connect_timeout).await?;
        let Some(config) = &self.tls else {
            return Ok(Io::Plain(stream));
        };
        let config = Arc::clone(config);
        connect::tls(&pools.wheel, addr, stream, config, &pools.outlived, due).await
    }

    fn sweep(&self, now: Mono, outlived: bool) {
        let Some(params) = self.params.get() else {
            return;
        };
        let old =
            |made: Mono| !params.max_age.is_zero() && now.saturating_since(made) >= params.max_age;
        let stale = |since: Mono| {
            !params.idle_timeout.is_zero() && now.saturating_since(since) >= params.idle_timeout
        };
        self.idle.borrow_mut().retain(|c| {
            let kept = !outlived && !has_left(c.leaves, now);
            kept && c.connection.is_ready() && !old(c.made) && !stale(c.since)
        });
        self.shared.borrow_mut().retain(|c| {
            c.connection.settle();
            let unused = c.connection.streams() == 0;
            let spent = outlived || stale(c.since.get());
            let gone = c.connection.is_closed() || has_left(c.leaves, now);
            !(gone || old(c.made) || (unused && spent))
        });
    }

    fn is_empty(&self) -> bool {
        self.idle.borrow().is_empty() && self.shared.borrow().is_empty() && !self.connecting.get()
    }
}

/// A place under `maxPerEndpoint`; given back when the connection is gone.
struct Slot {
    pool: Rc<Pool>,
}

impl Slot {
    /// `None` when the endpoint has `max` connections already. A worker without any may always
    /// open one: no worker starves beside the others.
    fn take(pool: &Rc<Pool>, max: usize) -> Option<Self> {
        let open = pool.open.fetch_add(1, Ordering::Relaxed);
        if open >= max && pool.own.get() > 0 {
            pool.open.fetch_sub(1, Ordering::Relaxed);
            return None;
        }
        pool.own.set(pool.own.get() + 1);
        Some(Self {
            pool: Rc::clone(pool),
        })
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.pool.open.fetch_sub(1, Ordering::Relaxed);
        self.pool.own.set(self.pool.own.get() - 1);
        self.pool.changed.notify_waiters();
    }
}

/// A connect under way. Ends when it is dropped, so that a cancelled one never blocks those who
/// wait for it; they try again then.
struct Flight<'a> {
    pool: &'a Pool,
    error: Option<Failed>,
}

/// How a connect failed, for those who shared it.
struct Failed {
    reason: String,
    tls: bool,
}

impl Failed {
    fn of(error: &ConnectError) -> Self {
        Self {
            reason: chain(error),
            tls: error.is_tls(),
        }
    }
}

impl<'a> Flight<'a> {
    fn start(pool: &'a Pool) -> Self {
        pool.connecting.set(true);
        Self { pool, error: None }
    }
}

impl Drop for Flight<'_> {
    fn drop(&mut self) {
        self.pool.connecting.set(false);
        let flight = self.pool.flights.get() + 1;
        self.pool.flights.set(flight);
        if let Some(failed) = self.error.take() {
            *self.pool.failed.borrow_mut() = Some((flight, failed));
        }
        self.pool.changed.notify_waiters();
    }
}

/// Whether the certificate of a connection's peer has expired by `now`.
fn has_left(leaves: Option<Mono>, now: Mono) -> bool {
    leaves.is_some_and(|at| at <= now)
}

struct Http1 {
    connection: Rc<client::Connection>,
    leaves: Option<Mono>,
    made: Mono,
    since: Mono,
    _slot: Slot,
}

struct Http2 {
    connection: Rc<http2::Connection>,
    leaves: Option<Mono>,
    made: Mono,
    since: Cell<Mono>,
    slot: Slot,
}

struct Stream {
    connection: Rc<Http2>,
    counted: Option<http2::Stream>,
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.counted = None;
        self.connection.since.set(clock::now());
        self.connection.slot.pool.changed.notify_waiters();
    }
}

/// One exchange's hold on a connection. Dropping it without [`Lease::release`] closes an
/// HTTP/1.1 connection and frees an h2 stream.
pub struct Lease(Kind);

enum Kind {
    Http1 {
        pool: Rc<Pool>,
        connection: Http1,
        reused: bool,
    },
    Http2 {
        stream: Stream,
    },
}

/// A request head as every attempt sends it.
pub struct Outgoing<'a> {
    /// The method.
    pub method: &'a Method,
    /// Path and query.
    pub path: &'a PathAndQuery,
    /// Whom it is for; `Host` or `:authority`.
    pub authority: Option<&'a Authority>,
    /// The fields, without `Host`.
    pub headers: &'a HeaderMap,
    /// Whether it asks to switch protocols.
    pub switch: bool,
}

impl Outgoing<'_> {
    /// As the h2 crate takes it.
    pub fn http2(&self) -> Request<()> {
        let mut uri = http::uri::Parts::default();
        uri.path_and_query = Some(self.path.clone());
        if let Some(authority) = self.authority {
            uri.authority = Some(authority.clone());
            uri.scheme = Some(Scheme::HTTP);
        }
        let mut request = Request::new(());
        *request.method_mut() = self.method.clone();
        *request.version_mut() = Version::HTTP_2;
        *request.uri_mut() = Uri::from_parts(uri).unwrap_or_default();
        *request.headers_mut() = self.headers.clone();
        request
    }
}

/// Why a request got no response head.
pub enum SendError {
    /// The request was handed back: not a byte of it reached the peer.
    Unsent(Box<RequestBody>, PeerError),
    /// The peer refused the stream before processing it (REFUSED_STREAM, or a GOAWAY with a
    /// lower last stream id).
    Refused(PeerError),
    /// It may have reached the peer.
    Failed(PeerError),
}

impl Lease {
    /// Whether the connection carried a request before: a failure without an answer may then be
    /// the keep-alive race.
    pub fn reused(&self) -> bool {
        matches!(&self.0, Kind::Http1 { reused: true, .. })
    }

    /// Sends the request and waits for the response head.
    ///
    /// # Errors
    /// See [`SendError`].
    ///
    /// # Cancel safety
    /// Dropping the future resets the h2 stream, or closes the HTTP/1.1 connection once the
    /// lease is dropped too.
    pub fn send(
        &mut self,
        head: &Outgoing<'_>,
        body: RequestBody,
    ) -> impl Future<Output = Result<Response<Incoming>, SendError>> + use<> {
        let sent = match &mut self.0 {
            Kind::Http1 { connection, .. } => {
                Either::Http1(Rc::clone(&connection.connection).send(head, body))
            }
            Kind::Http2 { stream } => Either::Http2(stream.connection.connection.send(head, body)),
        };
        async move {
            match sent {
                Either::Http1(sending) => sending.await,
                Either::Http2(sending) => sending.await,
            }
        }
    }

    /// The exchange ended well: an HTTP/1.1 connection goes back to the idle list.
    pub fn release(self) {
        match self.0 {
            Kind::Http2 { stream } => drop(stream),
            Kind::Http1 {
                pool,
                mut connection,
                ..
            } => {
                if connection.connection.is_reusable() {
                    connection.since = clock::now();
                    pool.put(connection);
                }
            }
        }
    }

    /// The peer has switched protocols: the bare connection, and its place under
    /// `maxPerEndpoint`. None over HTTP/2, where nothing is switched.
    pub fn into_tunnel(self) -> Option<(Wire, Place)> {
        let Kind::Http1 { connection, .. } = self.0 else {
            return None;
        };
        let wire = connection.connection.into_wire()?;
        Some((wire, Place(connection._slot)))
    }

    /// The exchange broke off: an HTTP/1.1 connection cannot be used again.
    pub fn discard(self) {
        drop(self);
    }

    /// The connection had closed before it was used. Those that have been idle for even longer
    /// are not better, and the next try must not find one of them.
    pub fn discard_stale(self) {
        if let Kind::Http1 { pool, .. } = &self.0 {
            pool.idle.borrow_mut().clear();
        }
    }
}

/// A place under `maxPerEndpoint`, given back when it is dropped.
pub struct Place(#[allow(dead_code)] Slot); // held for its drop

enum Either<A, B> {
    Http1(A),
    Http2(B),
}

impl Pool {
    fn put(&self, connection: Http1) {
        let expired = self.params.get().is_some_and(|params| {
            !params.max_age.is_zero()
                && connection.since.saturating_since(connection.made) >= params.max_age
        });
        if !expired {
            self.idle.borrow_mut().push(connection);
            self.changed.notify_one();
        }
    }
}
