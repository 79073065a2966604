//! The three applications of the demo: plain HTTP services that know nothing of Outrigger.
//!
//! `web` calls the others through its sidecar, `orders` fails on demand, `mailer` can be stopped:
//! its listener is closed then, and its connections with it.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use http::{HeaderMap, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::task::{JoinHandle, JoinSet};

use crate::client::send;

type Reply = Response<Full<Bytes>>;

/// A request as an application got it.
#[derive(Debug, Clone)]
pub(super) struct Seen {
    pub(super) method: Method,
    /// With the query.
    pub(super) path: String,
    pub(super) headers: HeaderMap,
    pub(super) body: Bytes,
}

impl Seen {
    /// A header as text; empty when it is not there.
    pub(super) fn header(&self, name: &str) -> &str {
        self.headers
            .get(name)
            .and_then(|value| value.to_str().ok())
            .unwrap_or_default()
    }
}

/// A service that listens.
#[derive(Debug)]
struct Server(JoinHandle<()>);

impl Server {
    async fn start<F, R>(address: SocketAddr, answer: F) -> io::Result<Self>
    where
        F: Fn(Seen) -> R + Clone + Send + Sync + 'static,
        R: Future<Output = Reply> + Send + 'static,
    {
        let listener = TcpListener::bind(address).await?;
        Ok(Self(tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let answer = answer.clone();
                let service = service_fn(move |request: Request<Incoming>| {
                    let answer = answer.clone();
                    async move {
                        let (head, body) = request.into_parts();
                        let body = body.collect().await?.to_bytes();
                        let path = head
                            .uri
                            .path_and_query()
                            .map_or("/", |path| path.as_str())
                            .to_owned();
                        let seen = Seen {
                            method: head.method,
                            path,
                            headers: head.headers,
                            body,
                        };
                        Ok::<_, hyper::Error>(answer(seen).await)
                    }
                });
                connections.spawn(async move {
                    // Connections that sidecars give up are no news.
                    let _ = http1::Builder::new()
                        .serve_connection(TokioIo::new(stream), service)
                        .await;
                });
                while connections.try_join_next().is_some() {}
            }
        })))
    }

    /// Closes the listener and every connection.
    async fn stop(self) {
        self.0.abort();
        let _ = self.0.await;
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn reply(status: StatusCode, value: &Value) -> Reply {
    let mut reply = Response::new(Full::from(format!("{value}\n")));
    *reply.status_mut() = status;
    let json = header::HeaderValue::from_static("application/json");
    reply.headers_mut().insert(header::CONTENT_TYPE, json);
    reply
}

/// `orders`: answers for every order, or fails as long as it was told to.
#[derive(Debug, Clone, Default)]
pub(super) struct Orders(Arc<Mutex<OrdersState>>);

#[derive(Debug, Default)]
struct OrdersState {
    failures: u32,
    seen: Vec<Seen>,
}

impl Orders {
    /// Listens until the demo ends.
    pub(super) async fn start(&self, address: SocketAddr) -> io::Result<()> {
        let orders = self.clone();
        Server::start(address, move |seen| std::future::ready(orders.answer(seen)))
            .await
            .map(drop)
    }

    /// Fails the next requests.
    pub(super) fn fail(&self, next: u32) {
        lock(&self.0).failures = next;
    }

    /// The requests since the last time this was asked.
    pub(super) fn take(&self) -> Vec<Seen> {
        std::mem::take(&mut lock(&self.0).seen)
    }

    fn answer(&self, seen: Seen) -> Reply {
        let mut state = lock(&self.0);
        let path = seen.path.clone();
        let status = if seen.method == Method::POST {
            StatusCode::CREATED
        } else {
            StatusCode::OK
        };
        state.seen.push(seen);
        if state.failures > 0 {
            state.failures = state.failures.saturating_sub(1);
            return reply(
                StatusCode::SERVICE_UNAVAILABLE,
                &json!({"error": "orders is unwell"}),
            );
        }
        reply(
            status,
            &json!({"from": "orders", "path": path, "status": "open"}),
        )
    }
}

/// `mailer`: sends mail, which here means that it remembers it.
#[derive(Debug, Clone)]
pub(super) struct Mailer {
    address: SocketAddr,
    state: Arc<Mutex<MailerState>>,
}

#[derive(Debug, Default)]
struct MailerState {
    server: Option<Server>,
    knows_old_addresses: bool,
    seen: Vec<Seen>,
}

impl Mailer {
    /// One that is stopped.
    pub(super) fn new(address: SocketAddr) -> Self {
        Self {
            address,
            state: Arc::default(),
        }
    }

    /// Begins to listen.
    pub(super) async fn start(&self) -> Result<(), String> {
        let mailer = self.clone();
        let started = Server::start(self.address, move |seen| {
            std::future::ready(mailer.answer(seen))
        })
        .await;
        let server = started.map_err(|error| format!("mailer cannot listen: {error}"))?;
        lock(&self.state).server = Some(server);
        Ok(())
    }

    /// Closes its listener.
    pub(super) async fn stop(&self) {
        let server = lock(&self.state).server.take();
        if let Some(server) = server {
            server.stop().await;
        }
    }

    /// The fix of the fault that the tour finds: also takes addresses without a domain.
    pub(super) fn fix(&self) {
        lock(&self.state).knows_old_addresses = true;
    }

    /// Everything it was sent.
    pub(super) fn seen(&self) -> Vec<Seen> {
        lock(&self.state).seen.clone()
    }

    fn answer(&self, seen: Seen) -> Reply {
        let mut state = lock(&self.state);
        let to = serde_json::from_slice(&seen.body).unwrap_or(json!({}))["to"].clone();
        let known = state.knows_old_addresses;
        let refused = to.as_str().is_some_and(|to| !to.contains('@')) && !known;
        let id = seen.header("idempotency-key").to_owned();
        state.seen.push(seen);
        match refused {
            true => reply(
                StatusCode::BAD_REQUEST,
                &json!({"error": "an address has an @", "to": to}),
            ),
            false => reply(StatusCode::CREATED, &json!({"from": "mailer", "sent": id})),
        }
    }
}

/// `web`: hands `/orders…` and `/mails…` to the services, through its sidecar.
pub(super) async fn start_web(address: SocketAddr, outbound: SocketAddr) -> io::Result<()> {
    let server = Server::start(
        address,
        move |seen| async move { call(seen, outbound).await },
    );
    server.await.map(drop)
}

async fn call(seen: Seen, outbound: SocketAddr) -> Reply {
    let host = if seen.path.starts_with("/mails") {
        "mailer"
    } else {
        "orders"
    };
    let mut headers = vec![("host", host)];
    for name in ["prefer", "idempotency-key", "content-type", "traceparent"] {
        let value = seen.header(name);
        if !value.is_empty() {
            headers.push((name, value));
        }
    }
    let (sidecar, method, body) = (outbound.to_string(), seen.method.clone(), seen.body.clone());
    let answer = match send(&sidecar, method, &seen.path, &headers, body).await {
        Ok(answer) => answer,
        Err(problem) => {
            let value = json!({"error": format!("web cannot reach its sidecar: {problem}")});
            return reply(StatusCode::BAD_GATEWAY, &value);
        }
    };
    let mut reply = Response::new(Full::new(answer.body));
    *reply.status_mut() = answer.status;
    *reply.headers_mut() = answer.headers;
    for name in [
        header::TRANSFER_ENCODING,
        header::CONTENT_LENGTH,
        header::CONNECTION,
    ] {
        reply.headers_mut().remove(name);
    }
    reply
}
