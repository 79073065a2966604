//! What replicas share, in etcd: its v3 API over gRPC.
//!
//! One session is one connection, one lease and one watch of everything below the prefix. The lease
//! outlives a session that broke, so that a short loss of the connection costs nobody the lead.

use std::collections::{BTreeMap, VecDeque};
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use hyper::body::Incoming;
use hyper::client::conn::http2;
use hyper::{Request, Response, Uri};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use outrigger_config::bootstrap::EtcdSpec;
use prost::Message;
use prost::bytes::Bytes;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tonic::Streaming;
use tonic::body::Body;
use tonic::client::Grpc;
use tonic_prost::ProstCodec;

use super::etcd_wire::{
    Against, CREATE, Compare, DeleteRangeRequest, DeleteRangeResponse, KeyValue, LEASE,
    LeaseGrantRequest, LeaseGrantResponse, LeaseKeepAliveRequest, LeaseKeepAliveResponse,
    LeaseRevokeRequest, LeaseRevokeResponse, Op, Operation, PutRequest, PutResponse, RangeRequest,
    RangeResponse, TxnRequest, TxnResponse, WatchCreateRequest, WatchRequest, WatchResponse,
};
use super::{Event, LEADER, Leader};

/// How long one call may take. etcd answers within a flush of its disk, which may be busy.
const CALL_WITHIN: Duration = Duration::from_secs(5);

/// The most keys of one answer while everything is read.
const PAGE: i64 = 1000;

/// The longest answer: a page of values of the size that etcd takes.
const MAX_MESSAGE_BYTES: usize = 64 << 20;

/// A dead connection is noticed within twice this.
const KEEP_ALIVE: Duration = Duration::from_secs(2);

/// Where etcd is, and what outlives a session.
#[derive(Debug)]
pub(super) struct Etcd {
    endpoints: Vec<Uri>,
    prefix: String,
    ttl: Duration,
    me: Leader,
    next: usize,
    lease: Option<i64>,
}

/// One connection with its watch.
pub(super) struct Session {
    grpc: Grpc<H2>,
    prefix: String,
    me: Leader,
    lease: i64,
    watch: Streaming<WatchResponse>,
    events: VecDeque<Event>,
}

impl Etcd {
    pub(super) fn new(spec: &EtcdSpec, ttl: Duration, me: Leader) -> Result<Self, String> {
        let endpoint = |text: &String| {
            let uri: Uri = text.parse().map_err(|e| format!("{text:?}: {e}"))?;
            match uri.scheme_str() {
                Some("http") if uri.authority().is_some() => Ok(uri),
                _ => Err(format!("{text:?}: expected http://host:port")),
            }
        };
        let endpoints: Result<Vec<Uri>, String> = spec.endpoints.iter().map(endpoint).collect();
        Ok(Self {
            endpoints: endpoints?,
            prefix: spec.prefix().to_owned(),
            ttl,
            me,
            next: 0,
            lease: None,
        })
    }

    /// Connects to the next endpoint, takes up the lease or a new one, and reads everything.
    pub(super) async fn open(&mut self) -> Result<Session, String> {
        let endpoint = self.endpoints[self.next % self.endpoints.len()].clone();
        self.next += 1;
        let mut grpc = timeout(CALL_WITHIN, connect(&endpoint))
            .await
            .map_err(|_| format!("{endpoint} does not answer"))??;
        let lease = match self.lease {
            Some(lease) if is_alive(&mut grpc, lease).await? => lease,
            _ => grant(&mut grpc, self.ttl).await?,
        };
        self.lease = Some(lease);
        let (whole, revision) = read_all(&mut grpc, &self.prefix).await?;
        let watch = watch(&mut grpc, &self.prefix, revision + 1).await?;
        let mut session = Session {
            grpc,
            prefix: self.prefix.clone(),
            me: self.me.clone(),
            lease,
            watch,
            events: VecDeque::new(),
        };
        let mut values = BTreeMap::new();
        let mut leader = None;
        for kv in whole {
            match session.own(&kv.key) {
                Some(key) if key == LEADER => leader = Some(kv),
                Some(key) => {
                    values.insert(key, kv.value.to_vec());
                }
                None => {}
            }
        }
        session.events.push_back(Event::Whole(values));
        let of_leader = match &leader {
            Some(kv) => session.led(kv),
            None => Event::Vacant,
        };
        session.events.push_back(of_leader);
        Ok(session)
    }
}

impl Session {
    /// What is news. Cancel-safe.
    pub(super) async fn next(&mut self) -> Result<Event, String> {
        loop {
            if let Some(event) = self.events.pop_front() {
                return Ok(event);
            }
            let message = self.watch.message().await.map_err(|e| e.to_string())?;
            let response = message.ok_or("etcd ended the watch")?;
            if response.canceled {
                // Compacted, for example: everything is read anew.
                return Err(format!("etcd ended the watch: {}", response.cancel_reason));
            }
            for event in response.events {
                let Some(kv) = event.kv else { continue };
                let Some(key) = self.own(&kv.key) else {
                    continue;
                };
                let event = match (key.as_str(), event.kind) {
                    (LEADER, 0) => self.led(&kv),
                    (LEADER, _) => Event::Vacant,
                    (_, 0) => Event::Put(key, kv.value.to_vec()),
                    (_, _) => Event::Delete(key),
                };
                self.events.push_back(event);
            }
        }
    }

    /// Tries to take the lead. The watch tells who has it.
    pub(super) async fn campaign(&mut self) -> Result<(), String> {
        let key = self.key(LEADER);
        let put = PutRequest {
            key: key.clone(),
            value: self.me.to_json().into(),
            lease: self.lease,
        };
        let free = Compare {
            target: CREATE,
            key,
            against: Some(Against::CreateRevision(0)),
        };
        self.put_if(free, put).await.map(|_| ())
    }

    pub(super) async fn put(&mut self, key: &str, value: Vec<u8>) -> Result<(), String> {
        let put = PutRequest {
            key: self.key(key),
            value: value.into(),
            lease: 0,
        };
        let path = "/etcdserverpb.KV/Put";
        let _: PutResponse = call(&mut self.grpc, path, put).await?;
        Ok(())
    }

    /// Writes only while we lead; false when we do not.
    pub(super) async fn put_as_leader(
        &mut self,
        key: &str,
        value: Vec<u8>,
    ) -> Result<bool, String> {
        let put = PutRequest {
            key: self.key(key),
            value: value.into(),
            lease: 0,
        };
        let ours = Compare {
            target: LEASE,
            key: self.key(LEADER),
            against: Some(Against::Lease(self.lease)),
        };
        self.put_if(ours, put).await
    }

    pub(super) async fn delete(&mut self, key: &str) -> Result<(), String> {
        let delete = DeleteRangeRequest { key: self.key(key) };
        let path = "/etcdserverpb.KV/DeleteRange";
        let _: DeleteRangeResponse = call(&mut self.grpc, path, delete).await?;
        Ok(())
    }

    /// Renews the lease.
    pub(super) async fn keep_alive(&mut self) -> Result<(), String> {
        match is_alive(&mut self.grpc, self.lease).await? {
            true => Ok(()),
            false => Err("our lease is over".to_owned()),
        }
    }

    /// Gives the lease back, and the lead with it.
    pub(super) async fn leave(&mut self) -> Result<(), String> {
        let revoke = LeaseRevokeRequest { id: self.lease };
        let path = "/etcdserverpb.Lease/LeaseRevoke";
        let _: LeaseRevokeResponse = call(&mut self.grpc, path, revoke).await?;
        Ok(())
    }

    async fn put_if(&mut self, holds: Compare, put: PutRequest) -> Result<bool, String> {
        let request = TxnRequest {
            compare: vec![holds],
            success: vec![Op {
                operation: Some(Operation::Put(put)),
            }],
        };
        let path = "/etcdserverpb.KV/Txn";
        let response: TxnResponse = call(&mut self.grpc, path, request).await?;
        Ok(response.succeeded)
    }

    fn led(&self, kv: &KeyValue) -> Event {
        Event::Led {
            by: Leader::from_json(&kv.value),
            us: kv.lease == self.lease,
        }
    }

    fn key(&self, key: &str) -> Bytes {
        format!("{}{key}", self.prefix).into()
    }

    /// A key without the prefix.
    fn own(&self, key: &[u8]) -> Option<String> {
        let text = std::str::from_utf8(key).ok()?;
        text.strip_prefix(&self.prefix).map(str::to_owned)
    }
}

async fn connect(endpoint: &Uri) -> Result<Grpc<H2>, String> {
    let host = endpoint.host().unwrap_or_default();
    let bare = host.trim_matches(['[', ']']);
    let port = endpoint.port_u16().unwrap_or(2379);
    let tcp = TcpStream::connect((bare, port))
        .await
        .map_err(|e| format!("cannot connect to {endpoint}: {e}"))?;
    let _ = tcp.set_nodelay(true);
    let (sender, connection) = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(KEEP_ALIVE)
        .keep_alive_while_idle(true)
        .handshake::<_, Body>(TokioIo::new(tcp))
        .await
        .map_err(|e| format!("no HTTP/2 with {endpoint}: {e}"))?;
    // It ends with its last sender, which the session owns.
    tokio::spawn(connection);
    let grpc = Grpc::with_origin(H2(sender), endpoint.clone());
    Ok(grpc.max_decoding_message_size(MAX_MESSAGE_BYTES))
}

async fn call<Q, R>(grpc: &mut Grpc<H2>, path: &'static str, request: Q) -> Result<R, String>
where
    Q: Message + 'static,
    R: Message + Default + 'static,
{
    let exchange = async {
        grpc.ready().await.map_err(|e| e.to_string())?;
        let codec = ProstCodec::<Q, R>::default();
        let path = hyper::http::uri::PathAndQuery::from_static(path);
        let response = grpc.unary(tonic::Request::new(request), path, codec).await;
        response.map_err(|status| status.to_string())
    };
    let response = timeout(CALL_WITHIN, exchange).await;
    let response = response.map_err(|_| format!("etcd does not answer to {path}"))??;
    Ok(response.into_inner())
}

async fn grant(grpc: &mut Grpc<H2>, ttl: Duration) -> Result<i64, String> {
    let request = LeaseGrantRequest {
        ttl: i64::try_from(ttl.as_secs()).unwrap_or(i64::MAX).max(1),
    };
    let path = "/etcdserverpb.Lease/LeaseGrant";
    let response: LeaseGrantResponse = call(grpc, path, request).await?;
    match response.error.is_empty() {
        true => Ok(response.id),
        false => Err(response.error),
    }
}

/// Renews a lease; false when it is over.
async fn is_alive(grpc: &mut Grpc<H2>, lease: i64) -> Result<bool, String> {
    let exchange = async {
        grpc.ready().await.map_err(|e| e.to_string())?;
        let codec = ProstCodec::<LeaseKeepAliveRequest, LeaseKeepAliveResponse>::default();
        let path = "/etcdserverpb.Lease/LeaseKeepAlive";
        let path = hyper::http::uri::PathAndQuery::from_static(path);
        let once = futures_util::stream::iter([LeaseKeepAliveRequest { id: lease }]);
        let response = grpc.streaming(tonic::Request::new(once), path, codec).await;
        let mut answers = response.map_err(|e| e.to_string())?.into_inner();
        let answer = answers.message().await.map_err(|e| e.to_string())?;
        Ok::<_, String>(answer.is_some_and(|answer| answer.ttl > 0))
    };
    let alive = timeout(CALL_WITHIN, exchange).await;
    alive.map_err(|_| "etcd does not renew our lease".to_owned())?
}

/// Everything below the prefix at one revision.
async fn read_all(grpc: &mut Grpc<H2>, prefix: &str) -> Result<(Vec<KeyValue>, i64), String> {
    let mut all = Vec::new();
    let (mut from, mut revision) = (prefix.as_bytes().to_vec(), 0);
    loop {
        let request = RangeRequest {
            key: from.into(),
            range_end: behind(prefix),
            limit: PAGE,
            revision,
        };
        let page: RangeResponse = call(grpc, "/etcdserverpb.KV/Range", request).await?;
        if revision == 0 {
            revision = page.header.map_or(0, |header| header.revision);
        }
        all.extend(page.kvs);
        let last = all.last().filter(|_| page.more);
        let Some(last) = last else {
            return Ok((all, revision));
        };
        // The next key there can be.
        from = last.key.to_vec();
        from.push(0);
    }
}

async fn watch(
    grpc: &mut Grpc<H2>,
    prefix: &str,
    start_revision: i64,
) -> Result<Streaming<WatchResponse>, String> {
    let request = WatchRequest {
        create: Some(WatchCreateRequest {
            key: prefix.as_bytes().to_vec().into(),
            range_end: behind(prefix),
            start_revision,
        }),
    };
    // The stream of requests stays open: etcd ends the watch with it.
    let requests = futures_util::stream::StreamExt::chain(
        futures_util::stream::iter([request]),
        futures_util::stream::pending(),
    );
    let exchange = async {
        grpc.ready().await.map_err(|e| e.to_string())?;
        let codec = ProstCodec::<WatchRequest, WatchResponse>::default();
        let path = hyper::http::uri::PathAndQuery::from_static("/etcdserverpb.Watch/Watch");
        let response = grpc
            .streaming(tonic::Request::new(requests), path, codec)
            .await;
        response.map_err(|e| e.to_string())
    };
    let response = timeout(CALL_WITHIN, exchange).await;
    let response = response.map_err(|_| "etcd does not open a watch".to_owned())??;
    Ok(response.into_inner())
}

/// The end of the range of all keys with a prefix: the prefix with its last byte one up.
fn behind(prefix: &str) -> Bytes {
    let mut end = prefix.as_bytes().to_vec();
    // A prefix is text, so no byte of it is 255.
    if let Some(last) = end.last_mut() {
        *last += 1;
    }
    end.into()
}

/// A connection as tonic wants it.
struct H2(http2::SendRequest<Body>);

impl tower::Service<Request<Body>> for H2 {
    type Response = Response<Incoming>;
    type Error = hyper::Error;
    type Future = Pin<Box<dyn Future<Output = hyper::Result<Response<Incoming>>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<hyper::Result<()>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        Box::pin(self.0.send_request(request))
    }
}
