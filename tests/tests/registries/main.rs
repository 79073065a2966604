//! Endpoints from registries that are not ours, through real sidecars, with and without a control
//! plane.

mod consul;
mod dns;
mod eureka;

use std::net::SocketAddr;

use outrigger_tests::client::{self, Ask};
use outrigger_tests::mesh::{Sidecar, document};
use outrigger_tests::until;
use serde_json::Value;

/// A service with this discovery.
fn service(name: &str, discovery: &str) -> String {
    let spec = format!("discovery: {discovery}\nloadBalancer: {{algorithm: RoundRobin}}");
    document("MeshService", name, &spec)
}

/// A call to a server that plays a registry.
async fn tell(at: SocketAddr, method: &str, path: &str, body: &Value) -> Value {
    let ask = Ask::new(method, &at.to_string(), path)
        .header("content-type", "application/json")
        .body(body.to_string());
    let answer = client::call(at, ask).await;
    assert!(
        (200..300).contains(&answer.status),
        "{method} {path}: {} {}",
        answer.status,
        answer.text()
    );
    serde_json::from_slice(&answer.body).unwrap_or_default()
}

/// Address and registry state of each endpoint that a sidecar knows, in order.
async fn known(sidecar: &Sidecar, service: &str) -> Vec<(String, String)> {
    let view = sidecar.view("/endpoints").await;
    let services = view["services"].as_array().expect("a list");
    let service = services.iter().find(|s| s["service"] == service);
    let endpoints = service.expect("it is known")["endpoints"].as_array();
    let mut known: Vec<_> = endpoints
        .expect("a list")
        .iter()
        .map(|e| {
            let text = |key: &str| e[key].as_str().unwrap_or_default().to_owned();
            (text("address"), text("state"))
        })
        .collect();
    known.sort();
    known
}

/// Waits until a sidecar knows these addresses of a service, in any order.
async fn knows(sidecar: &Sidecar, service: &str, expected: &[SocketAddr]) {
    let mut expected: Vec<String> = expected.iter().map(ToString::to_string).collect();
    expected.sort();
    until(&format!("{service} is at {expected:?}"), || async {
        let known = known(sidecar, service).await;
        known
            .iter()
            .map(|(addr, _)| addr)
            .eq(&expected)
            .then_some(())
    })
    .await;
}
