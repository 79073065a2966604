//! A control plane on a directory of its own, a discovery client and an HTTP client.
#![allow(dead_code, unreachable_pub)]

use std::future::Future;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper::{Request, Response, Uri};
use hyper_util::rt::{TokioExecutor, TokioIo};
use outrigger_config::bootstrap::OneOrMany;
use outrigger_config::wire::{
    self, DELTA_PATH, DOCUMENT_TYPE, DeltaDiscoveryRequest, DeltaDiscoveryResponse, Document,
    ENDPOINTS_TYPE, EndpointState, Endpoints, Node, Status,
};
use outrigger_control_plane::{ControlPlaneBootstrap, Running, StartError, start};
use serde_json::Value;
use tempfile::TempDir;
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::body::Body;
use tonic_prost::ProstCodec;

/// Longer than anything takes; a test that waits this long has failed.
pub const SOON: Duration = Duration::from_secs(10);

pub const MESH: &str = "\
apiVersion: outrigger.dev/v1alpha1
kind: MeshService
metadata: {name: orders, namespace: shop}
spec:
  discovery: {static: [{address: 127.0.0.1, port: 9001}, {address: 127.0.0.1, port: 9002, state: Draining}]}
---
apiVersion: outrigger.dev/v1alpha1
kind: MeshService
metadata: {name: reports, namespace: shop}
spec:
  discovery: {heartbeat: {ttl: 60s, removeAfter: 120s}}
";

pub const ROUTE: &str = "\
apiVersion: outrigger.dev/v1alpha1
kind: MeshRoute
metadata: {name: orders, namespace: shop}
spec:
  services: [orders]
  rules: [{backends: [{service: orders}]}]
";

pub const BROKEN: &str = "\
apiVersion: outrigger.dev/v1alpha1
kind: MeshRoute
metadata: {name: orders, namespace: shop}
spec:
  services: [orders]
  rulez: []
";

pub struct Plane {
    pub dir: TempDir,
    pub running: Option<Running>,
    /// Further keys of the bootstrap.
    pub more: Value,
}

impl Plane {
    pub async fn start() -> Self {
        Self::with(serde_json::json!({})).await
    }

    pub async fn with(more: Value) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        std::fs::create_dir(dir.path().join("mesh")).expect("created");
        let running = None;
        let mut plane = Self { dir, running, more };
        plane.write("mesh.yaml", MESH);
        plane.start_again().await;
        plane
    }

    pub fn bootstrap(&self) -> ControlPlaneBootstrap {
        let any = || Some(OneOrMany(vec![SocketAddr::from(([127, 0, 0, 1], 0))]));
        let state = self.dir.path().join("state");
        let mut text = serde_json::json!({"config": self.mesh_dir(), "stateDir": state});
        for (key, value) in self.more.as_object().into_iter().flatten() {
            text[key] = value.clone();
        }
        let mut bootstrap: ControlPlaneBootstrap =
            serde_json::from_value(text).expect("a bootstrap");
        bootstrap.listen.discovery = any();
        bootstrap.listen.admin = any();
        bootstrap
    }

    pub async fn start_again(&mut self) {
        self.running = Some(start(self.bootstrap()).await.expect("started"));
    }

    /// On the addresses that it had before.
    pub async fn restart(&mut self) {
        let (discovery, admin) = (self.discovery(), self.admin());
        self.stop().await;
        let mut bootstrap = self.bootstrap();
        bootstrap.listen.discovery = Some(OneOrMany(vec![discovery]));
        bootstrap.listen.admin = Some(OneOrMany(vec![admin]));
        self.running = Some(start(bootstrap).await.expect("started"));
    }

    pub async fn try_second(&self) -> StartError {
        start(self.bootstrap()).await.expect_err("refused")
    }

    pub async fn stop(&mut self) {
        self.running.take().expect("it runs").shutdown().await;
    }

    pub fn mesh_dir(&self) -> PathBuf {
        self.dir.path().join("mesh")
    }

    pub fn write(&self, name: &str, text: &str) {
        // As editors and deployments do: never half a file.
        let path = self.mesh_dir().join(name);
        let temporary = path.with_extension("tmp");
        std::fs::write(&temporary, text).expect("written");
        std::fs::rename(temporary, path).expect("renamed");
    }

    pub fn remove(&self, name: &str) {
        std::fs::remove_file(self.mesh_dir().join(name)).expect("removed");
    }

    fn running(&self) -> &Running {
        self.running.as_ref().expect("it runs")
    }

    pub fn discovery(&self) -> SocketAddr {
        self.running().discovery_addr
    }

    pub fn admin(&self) -> SocketAddr {
        self.running().admin_addr
    }

    pub async fn get(&self, path: &str) -> Value {
        let (status, body) = self.request("GET", path, "").await;
        assert_eq!(status, 200, "{path}: {body}");
        serde_json::from_str(&body).expect("JSON")
    }

    pub async fn request(&self, method: &str, path: &str, body: &str) -> (u16, String) {
        let response = self.response(method, path, body.to_owned()).await;
        let status = response.status().as_u16();
        let body = response
            .into_body()
            .collect()
            .await
            .expect("a body")
            .to_bytes();
        (status, String::from_utf8(body.to_vec()).expect("text"))
    }

    pub async fn response(&self, method: &str, path: &str, body: String) -> Response<Incoming> {
        self.response_to(method, path, &[], body).await
    }

    pub async fn response_to(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: String,
    ) -> Response<Incoming> {
        let tcp = TcpStream::connect(self.admin()).await.expect("connected");
        let (mut sender, connection) = http1::handshake::<_, Full<Bytes>>(TokioIo::new(tcp))
            .await
            .expect("a handshake");
        tokio::spawn(connection);
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", self.admin().to_string());
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request
            .body(Full::new(Bytes::from(body)))
            .expect("a request");
        sender.send_request(request).await.expect("a response")
    }

    /// Asks until the answer is as expected: the API has no events.
    pub async fn get_until(&self, path: &str, is_right: impl Fn(&Value) -> bool) -> Value {
        let poll = async {
            loop {
                let value = self.get(path).await;
                if is_right(&value) {
                    return value;
                }
                tokio::task::yield_now().await;
            }
        };
        match timeout(SOON, poll).await {
            Ok(value) => value,
            Err(_) => panic!("never as expected: {}", self.get(path).await),
        }
    }
}

/// A sidecar's end of a stream, without a sidecar.
pub struct Client {
    requests: mpsc::Sender<DeltaDiscoveryRequest>,
    responses: Streaming<DeltaDiscoveryResponse>,
}

impl Client {
    pub async fn connect(address: SocketAddr, id: &str, first: Vec<DeltaDiscoveryRequest>) -> Self {
        Self::try_connect(address, id, first)
            .await
            .expect("a stream")
    }

    pub async fn try_connect(
        address: SocketAddr,
        id: &str,
        mut first: Vec<DeltaDiscoveryRequest>,
    ) -> Result<Self, String> {
        let text = |e: &dyn std::error::Error| e.to_string();
        let tcp = TcpStream::connect(address).await.map_err(|e| text(&e))?;
        let handshake = http2::handshake(TokioExecutor::new(), TokioIo::new(tcp));
        let (sender, connection) = handshake.await.map_err(|e| text(&e))?;
        tokio::spawn(connection);
        let origin: Uri = format!("http://{address}").parse().expect("a URL");
        let mut grpc = tonic::client::Grpc::with_origin(H2(sender), origin);
        let (requests, outgoing) = mpsc::channel(8);
        first[0].node.get_or_insert_with(|| Node {
            id: id.into(),
            cluster: "web".into(),
            ..Node::default()
        });
        for request in first {
            requests.try_send(request).expect("there is room");
        }
        let codec = ProstCodec::<DeltaDiscoveryRequest, DeltaDiscoveryResponse>::default();
        let request = tonic::Request::new(ReceiverStream::new(outgoing));
        let response = grpc
            .streaming(request, DELTA_PATH.parse().expect("a path"), codec)
            .await;
        Ok(Self {
            requests,
            responses: response.map_err(|e| text(&e))?.into_inner(),
        })
    }

    /// As a sidecar of this service account beside this service (`namespace/name`), subscribed to
    /// everything of ours, from nothing.
    pub async fn subscribe_as(address: SocketAddr, account: &str, service: &str) -> Self {
        let (namespace, account) = account.split_once('/').expect("namespace/name");
        let text = |value: &str| wire::Value::text(value);
        let fields = [
            ("namespace".to_owned(), text(namespace)),
            ("serviceAccount".to_owned(), text(account)),
        ];
        let mut first = vec![wildcard(ENDPOINTS_TYPE), wildcard(DOCUMENT_TYPE)];
        first[0].node = Some(Node {
            id: format!("{namespace}/{account}-1"),
            cluster: service.into(),
            metadata: Some(wire::Struct {
                fields: fields.into(),
            }),
            ..Node::default()
        });
        Self::connect(address, "", first).await
    }

    /// Subscribed to everything of ours, from nothing.
    pub async fn subscribe(address: SocketAddr, id: &str) -> Self {
        Self::connect(
            address,
            id,
            vec![wildcard(ENDPOINTS_TYPE), wildcard(DOCUMENT_TYPE)],
        )
        .await
    }

    pub async fn next(&mut self) -> DeltaDiscoveryResponse {
        let message = timeout(SOON, self.responses.message())
            .await
            .expect("a response in time");
        message.expect("no error").expect("not the end")
    }

    /// The next response however long it takes; `None` when the stream ends.
    pub async fn until_closed(&mut self) -> Option<DeltaDiscoveryResponse> {
        self.responses.message().await.ok().flatten()
    }

    /// The next response, accepted.
    pub async fn take(&mut self) -> DeltaDiscoveryResponse {
        let response = self.next().await;
        self.answer(&response, None).await;
        response
    }

    /// Both first responses, accepted.
    pub async fn sync(&mut self) -> (DeltaDiscoveryResponse, DeltaDiscoveryResponse) {
        let endpoints = self.next().await;
        assert_eq!(endpoints.type_url, ENDPOINTS_TYPE);
        self.answer(&endpoints, None).await;
        let documents = self.next().await;
        assert_eq!(documents.type_url, DOCUMENT_TYPE);
        self.answer(&documents, None).await;
        (endpoints, documents)
    }

    pub async fn answer(&self, response: &DeltaDiscoveryResponse, refused: Option<&str>) {
        let request = DeltaDiscoveryRequest {
            type_url: response.type_url.clone(),
            response_nonce: response.nonce.clone(),
            error_detail: refused.map(|m| Status {
                code: 3,
                message: m.into(),
                details: vec![],
            }),
            ..DeltaDiscoveryRequest::default()
        };
        self.requests
            .send(request)
            .await
            .expect("the stream is open");
    }

    /// `Ok` when the server ended the stream in order.
    pub async fn end(mut self) -> Result<(), tonic::Status> {
        loop {
            match timeout(SOON, self.responses.message())
                .await
                .expect("an end in time")
            {
                Ok(Some(_)) => {}
                Ok(None) => return Ok(()),
                Err(e) => return Err(e),
            }
        }
    }
}

pub fn wildcard(type_url: &str) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest {
        type_url: type_url.into(),
        ..DeltaDiscoveryRequest::default()
    }
}

pub fn names(response: &DeltaDiscoveryResponse) -> Vec<&str> {
    response.resources.iter().map(|r| r.name.as_str()).collect()
}

pub fn document(response: &DeltaDiscoveryResponse, name: &str) -> Value {
    let resource = response
        .resources
        .iter()
        .find(|r| r.name == name)
        .expect("it is in there");
    let document: Document =
        wire::unpack(resource.resource.as_ref().expect("content")).expect("a document");
    serde_json::from_str(&document.yaml).expect("JSON")
}

/// Port and state of each endpoint of a service.
pub fn endpoints(response: &DeltaDiscoveryResponse, service: &str) -> Vec<(u32, EndpointState)> {
    let resource = response
        .resources
        .iter()
        .find(|r| r.name == service)
        .expect("it is in there");
    let set: Endpoints =
        wire::unpack(resource.resource.as_ref().expect("content")).expect("endpoints");
    set.endpoints.iter().map(|e| (e.port, e.state())).collect()
}

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
