//! Real sidecars and a real control plane in the test's process.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use outrigger_config::bootstrap::{OneOrMany, ProxyBootstrap};
use outrigger_control_plane::ControlPlaneBootstrap;
use outrigger_control_plane::ca::make;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::net::TcpSocket;
use tokio::time::timeout;

use crate::client::{self, Answer, Ask};
use crate::metrics::Scrape;
use crate::{SOON, until};

/// A `MeshService` with static endpoints in the namespace `default`. Each line of `more` is a
/// member of its `spec`.
pub fn service(name: &str, endpoints: &[SocketAddr], more: &str) -> String {
    let list: Vec<String> = endpoints
        .iter()
        .map(|addr| format!("{{address: {}, port: {}}}", addr.ip(), addr.port()))
        .collect();
    let discovery = format!("discovery: {{static: [{}]}}\n{more}", list.join(", "));
    document("MeshService", name, &discovery)
}

/// A service as [`service`] makes it, whose endpoints speak HTTP/2.
pub fn service_h2(name: &str, endpoints: &[SocketAddr], more: &str) -> String {
    let port = "ports: [{name: http, port: 80, appProtocol: kubernetes.io/h2c}]\n";
    service(name, endpoints, &format!("{port}{more}"))
}

/// A `MeshRoute` for the service of the same name. Each of `rules` is one rule in YAML's flow style.
pub fn route(service: &str, rules: &[&str]) -> String {
    let rules: String = rules.iter().map(|rule| format!("- {rule}\n")).collect();
    document(
        "MeshRoute",
        service,
        &format!("services: [{service}]\nrules:\n{rules}"),
    )
}

/// A `Queue` that may live in a container's own file system.
pub fn queue(name: &str, more: &str) -> String {
    let backend = "backend: {embedded: {allowEphemeral: true}}\n";
    document("Queue", name, &format!("{backend}{more}"))
}

/// A document of our own API. `name` may be `namespace/name`.
pub fn document(kind: &str, name: &str, spec: &str) -> String {
    let (namespace, name) = name.split_once('/').unwrap_or(("default", name));
    let spec: String = spec.lines().map(|line| format!("  {line}\n")).collect();
    format!(
        "---\napiVersion: outrigger.dev/v1alpha1\nkind: {kind}\n\
         metadata: {{name: {name}, namespace: {namespace}}}\nspec:\n{spec}"
    )
}

/// A sidecar to be started.
pub struct SidecarBuilder {
    name: String,
    mesh: Option<String>,
    plane: Option<SocketAddr>,
    app: Option<SocketAddr>,
    outbound: Vec<SocketAddr>,
    inbound: Vec<SocketAddr>,
    more: Value,
}

impl SidecarBuilder {
    /// Standalone, with this mesh config.
    pub fn mesh(mut self, yaml: impl Into<String>) -> Self {
        self.mesh = Some(yaml.into());
        self
    }

    /// Fed by the control plane at this address.
    pub fn plane(mut self, discovery: SocketAddr) -> Self {
        self.plane = Some(discovery);
        self
    }

    /// Before this application.
    pub fn app(mut self, addr: SocketAddr) -> Self {
        self.app = Some(addr);
        self
    }

    /// Listens at these for the application's calls.
    pub fn outbound_on(mut self, addrs: &[SocketAddr]) -> Self {
        self.outbound = addrs.to_vec();
        self
    }

    /// Listens at these for calls to the application.
    pub fn inbound_on(mut self, addrs: &[SocketAddr]) -> Self {
        self.inbound = addrs.to_vec();
        self
    }

    /// Sets a key of the bootstrap config.
    pub fn set(mut self, key: &str, value: Value) -> Self {
        self.more[key] = value;
        self
    }

    /// Starts it and waits until it is ready.
    pub async fn start(self) -> Sidecar {
        let sidecar = self.start_unready().await;
        sidecar.ready().await;
        sidecar
    }

    /// Starts it.
    pub async fn start_unready(self) -> Sidecar {
        let dir = tempfile::tempdir().expect("a directory");
        let mut text = json!({
            "workload": {"name": self.name},
            "stateDir": dir.path().join("state"),
            "drain": "10s",
            "accessLog": {"when": "Off"},
        });
        if let Some(yaml) = &self.mesh {
            let path = dir.path().join("mesh.yaml");
            replace(&path, yaml);
            text["mesh"] = json!(path);
        }
        if let Some(discovery) = self.plane {
            text["controlPlane"] = json!({"address": format!("http://{discovery}")});
        }
        for (key, value) in self.more.as_object().into_iter().flatten() {
            text[key] = value.clone();
        }
        let mut bootstrap: ProxyBootstrap = serde_json::from_value(text).expect("a bootstrap");
        bootstrap.app = self.app;
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        bootstrap.listen.outbound = Some(OneOrMany(self.outbound));
        bootstrap.listen.inbound = Some(OneOrMany(self.inbound));
        bootstrap.listen.admin = Some(OneOrMany(vec![any]));
        let mut sidecar = Sidecar {
            bootstrap,
            dir: Arc::new(dir),
            running: None,
        };
        sidecar.start_again();
        sidecar
    }
}

/// What became of an edit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Edited {
    /// It is in force.
    Applied,
    /// The config before it stays in force.
    Refused,
}

/// A sidecar with a state directory of its own.
pub struct Sidecar {
    bootstrap: ProxyBootstrap,
    dir: Arc<TempDir>,
    running: Option<outrigger_proxy::app::Running>,
}

impl Sidecar {
    /// A sidecar of this name.
    pub fn named(name: &str) -> SidecarBuilder {
        SidecarBuilder {
            name: name.to_owned(),
            mesh: None,
            plane: None,
            app: None,
            outbound: vec![SocketAddr::from(([127, 0, 0, 1], 0))],
            inbound: vec![SocketAddr::from(([127, 0, 0, 1], 0))],
            more: json!({}),
        }
    }

    /// A standalone sidecar named `web-1` with this mesh config, ready.
    pub async fn start(yaml: impl Into<String>) -> Self {
        Self::named("web-1").mesh(yaml).start().await
    }

    fn running(&self) -> &outrigger_proxy::app::Running {
        self.running.as_ref().expect("it runs")
    }

    /// Where the application calls.
    pub fn outbound(&self) -> SocketAddr {
        self.running().addresses.outbound[0]
    }

    /// Where it takes the application's calls at this address.
    pub fn outbound_at(&self, ip: IpAddr) -> SocketAddr {
        let mut addresses = self.running().addresses.outbound.iter();
        let found = addresses.find(|addr| addr.ip() == ip);
        *found.expect("it listens there")
    }

    /// Where the application is called.
    pub fn inbound(&self) -> SocketAddr {
        self.running().addresses.inbound[0]
    }

    /// The admin API.
    pub fn admin(&self) -> SocketAddr {
        self.running().addresses.admin[0]
    }

    /// The file with the mesh config.
    pub fn mesh_file(&self) -> PathBuf {
        self.dir.path().join("mesh.yaml")
    }

    /// Where its state is.
    pub fn state_dir(&self) -> &Path {
        self.bootstrap.state_dir()
    }

    /// How often its identity was renewed; 0 before the first.
    pub fn identity_generation(&self) -> u64 {
        self.running().shared.identity.generation()
    }

    /// One call of the application, on a connection of its own.
    pub async fn call(&self, ask: Ask) -> Answer {
        client::call(self.outbound(), ask).await
    }

    /// `GET path` of `host`.
    pub async fn get(&self, host: &str, path: &str) -> Answer {
        self.call(Ask::get(host, path)).await
    }

    /// A request to the admin API.
    pub async fn ask_admin(&self, method: &str, path: &str, body: &str) -> Answer {
        let ask = Ask::new(method, "localhost", path).body(body.to_owned());
        client::call(self.admin(), ask).await
    }

    /// A resource of the admin API.
    ///
    /// # Panics
    /// When it is not answered 200 with JSON.
    pub async fn view(&self, path: &str) -> Value {
        let answer = self.ask_admin("GET", path, "").await;
        assert_eq!(answer.status, 200, "{path}: {}", answer.text());
        answer.json()
    }

    /// A scrape of counters that stand still: a caller has its answer a moment before the answer is
    /// counted. Under steady load it is the fifth scrape.
    pub async fn metrics(&self) -> Scrape {
        let mut scrape = self.scrape().await;
        for _ in 0..4 {
            tokio::time::sleep(Duration::from_millis(3)).await;
            let next = self.scrape().await;
            if next.same_counters(&scrape) {
                return next;
            }
            scrape = next;
        }
        scrape
    }

    async fn scrape(&self) -> Scrape {
        Scrape::parse(&self.ask_admin("GET", "/metrics", "").await.text())
    }

    /// Waits until a scrape is as expected.
    pub async fn metric_until(&self, what: &str, holds: impl Fn(&Scrape) -> bool) -> Scrape {
        until(what, || async { Some(self.scrape().await).filter(&holds) }).await
    }

    /// Waits until `/readyz` says so.
    pub async fn ready(&self) {
        until("/readyz", || async {
            let answer = self.ask_admin("GET", "/readyz", "").await;
            (answer.status == 200).then_some(())
        })
        .await;
    }

    /// Replaces the mesh config as editors and deployments do, and waits for what becomes of it.
    ///
    /// # Panics
    /// When nothing does.
    pub async fn edit(&self, yaml: &str) -> Edited {
        let generation = self.view("/config").await["generation"].clone();
        let refused = self.metrics().await;
        replace(&self.mesh_file(), yaml);
        until("the edit is taken up or refused", || async {
            if self.view("/config").await["generation"] != generation {
                return Some(Edited::Applied);
            }
            let now = self.metrics().await;
            let more = now.since(&refused, "outrigger_config_rejected_total", &[]);
            (more > 0.0).then_some(Edited::Refused)
        })
        .await
    }

    /// Begins to drain, as SIGTERM does.
    pub fn shutdown(&self) {
        self.running().shutdown();
    }

    /// Waits until it has ended.
    ///
    /// # Panics
    /// When it does not end.
    pub async fn join(&mut self) {
        let running = self.running.take().expect("it runs");
        let ended = tokio::task::spawn_blocking(move || running.join());
        timeout(SOON, ended)
            .await
            .expect("it ends")
            .expect("no panic");
    }

    /// Drains and ends.
    pub async fn stop(&mut self) {
        self.shutdown();
        self.join().await;
    }

    /// Starts it again on the state it left; its ports are others.
    pub fn start_again(&mut self) {
        let bootstrap = self.bootstrap.clone();
        self.running = Some(outrigger_proxy::app::start(bootstrap).expect("started"));
    }

    /// Tries to run another one on the same state.
    ///
    /// # Errors
    /// Why it was refused.
    pub fn try_second(&self) -> Result<(), String> {
        let second = outrigger_proxy::app::start(self.bootstrap.clone());
        second
            .map(|running| running.shutdown())
            .map_err(|error| error.to_string())
    }

    /// Points it at another control plane; takes effect when it is started again.
    pub fn set_plane(&mut self, discovery: SocketAddr) {
        let client = self.bootstrap.control_plane.as_mut().expect("it has one");
        client.address = format!("http://{discovery}");
    }

    /// Forgets its state.
    ///
    /// # Panics
    /// While it runs.
    pub fn wipe(&self) {
        assert!(self.running.is_none(), "it runs");
        std::fs::remove_dir_all(self.bootstrap.state_dir()).expect("removed");
    }
}

impl Drop for Sidecar {
    fn drop(&mut self) {
        if let Some(running) = &self.running {
            // Nobody waits: its threads end by themselves or with the process.
            running
                .shared
                .drain
                .advance(outrigger_proxy::drain::Phase::Gone);
        }
    }
}

/// Never half a file.
fn replace(path: &Path, text: &str) {
    let new = path.with_extension("new");
    std::fs::write(&new, text).expect("written");
    std::fs::rename(new, path).expect("renamed");
}

/// A control plane with a config directory of its own.
pub struct Plane {
    dir: TempDir,
    more: Value,
    running: Option<outrigger_control_plane::Running>,
    addresses: Option<(SocketAddr, SocketAddr)>,
    /// Its ports while it is stopped, so that nobody else gets them.
    kept: Vec<TcpSocket>,
}

impl Plane {
    /// Starts one that serves these files: name and text.
    pub async fn start(files: &[(&str, String)]) -> Self {
        let mut plane = Self::new(files);
        plane.start_again().await;
        plane
    }

    /// Starts one with this key of its bootstrap config, too.
    pub async fn set(files: &[(&str, String)], key: &str, value: Value) -> Self {
        let mut plane = Self::new(files);
        plane.more[key] = value;
        plane.start_again().await;
        plane
    }

    fn new(files: &[(&str, String)]) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        std::fs::create_dir(dir.path().join("mesh")).expect("created");
        let plane = Self {
            dir,
            more: json!({}),
            running: None,
            addresses: None,
            kept: Vec::new(),
        };
        for (name, text) in files {
            plane.write(name, text);
        }
        plane
    }

    /// Starts one with TLS and an authority of the trust domain `shop.local`, whose certificates
    /// live for `leaf_ttl`, and join tokens for these service accounts of the namespace `default`.
    pub async fn with_authority(
        files: &[(&str, String)],
        leaf_ttl: &str,
        accounts: &[&str],
    ) -> Self {
        let mut plane = Self::new(files);
        let (state, now) = (
            plane.state_dir(),
            outrigger_proxy::clock::unix_now().0 / 1000,
        );
        make::init(&state, "shop.local", &["127.0.0.1".to_owned()], now).expect("made");
        let join = plane.dir.path().join("join");
        for account in accounts {
            let whole = format!("default/{account}");
            let hour = std::time::Duration::from_secs(3600);
            let token = make::token(&join, Some(&whole), hour, now).expect("a token");
            std::fs::write(plane.dir.path().join(format!("{account}.token")), token)
                .expect("written");
        }
        plane.more = json!({
            "ca": {"leafTtl": leaf_ttl},
            "tls": {"certificate": state.join("server.pem"), "key": state.join("server.key")},
            "join": {"tokens": [{"file": join, "serviceAccounts": ["default/*"]}]},
        });
        plane.start_again().await;
        plane
    }

    /// Sets a key of its bootstrap config; takes effect when it is started again.
    pub fn configure(&mut self, key: &str, value: Value) {
        self.more[key] = value;
    }

    /// Where its state is, and the files of its authority.
    pub fn state_dir(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    /// The join token of one of the accounts it was started with.
    pub fn token_file(&self, account: &str) -> PathBuf {
        self.dir.path().join(format!("{account}.token"))
    }

    /// As `controlPlane` of the bootstrap file of a workload of `account`.
    pub fn client(&self, account: &str) -> Value {
        json!({
            "address": format!("https://{}", self.discovery()),
            "bundle": self.state_dir().join("roots.pem"),
            "tokenFile": self.token_file(account),
        })
    }

    /// Writes a file of the config directory.
    pub fn write(&self, name: &str, text: &str) {
        replace(&self.dir.path().join("mesh").join(name), text);
    }

    /// Removes a file of the config directory.
    pub fn remove(&self, name: &str) {
        std::fs::remove_file(self.dir.path().join("mesh").join(name)).expect("removed");
    }

    /// Starts it, again on the addresses that it had.
    pub async fn start_again(&mut self) {
        let mut text = json!({
            "config": self.dir.path().join("mesh"),
            "stateDir": self.state_dir(),
        });
        for (key, value) in self.more.as_object().into_iter().flatten() {
            text[key] = value.clone();
        }
        let mut bootstrap: ControlPlaneBootstrap =
            serde_json::from_value(text).expect("a bootstrap");
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let (discovery, admin) = self.addresses.unwrap_or((any, any));
        bootstrap.listen.discovery = Some(OneOrMany(vec![discovery]));
        bootstrap.listen.admin = Some(OneOrMany(vec![admin]));
        self.kept.clear();
        let running = outrigger_control_plane::start(bootstrap)
            .await
            .expect("started");
        self.addresses = Some((running.discovery_addr, running.admin_addr));
        self.running = Some(running);
    }

    /// Ends it.
    pub async fn stop(&mut self) {
        self.running.take().expect("it runs").shutdown().await;
        let (discovery, admin) = self.addresses.expect("it was started");
        // Bound, but nobody listens: who connects is refused, as by a dead process.
        self.kept = [discovery, admin]
            .into_iter()
            .map(|addr| {
                let socket = TcpSocket::new_v4().expect("a socket");
                socket.set_reuseaddr(true).expect("set");
                socket.bind(addr).expect("bound");
                socket
            })
            .collect();
    }

    /// Forgets its state.
    ///
    /// # Panics
    /// While it runs.
    pub fn wipe(&self) {
        assert!(self.running.is_none(), "it runs");
        std::fs::remove_dir_all(self.dir.path().join("state")).expect("removed");
    }

    /// Where sidecars connect, also while it is stopped.
    pub fn discovery(&self) -> SocketAddr {
        self.addresses.expect("it was started").0
    }

    /// A request to its admin API.
    pub async fn ask(&self, method: &str, path: &str, body: &str) -> Answer {
        let admin = self.addresses.expect("it was started").1;
        let ask = Ask::new(method, "localhost", path).body(body.to_owned());
        client::call(admin, ask).await
    }

    /// A resource of its admin API, as soon as it is as expected.
    pub async fn view_until(&self, path: &str, holds: impl Fn(&Value) -> bool) -> Value {
        until(path, || async {
            Some(self.ask("GET", path, "").await.json()).filter(&holds)
        })
        .await
    }
}
