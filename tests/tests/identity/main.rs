//! Who talks to whom: mutual TLS between sidecars, what it refuses, and what it proves.

#![allow(clippy::unwrap_used)]

mod authority;
mod authorization;
mod envoy;
mod expiry;
mod isolation;
mod mesh;
mod messages;
mod modes;
mod refused;
mod scanned;
mod token_review;
mod tokens;
mod workload_api;

use std::net::SocketAddr;

use outrigger_tests::mesh::{Sidecar, SidecarBuilder, document, service};
use outrigger_tests::pki::{Authority, Files};
use serde_json::json;

const WEB: &str = "spiffe://shop.local/ns/default/sa/web";
const ORDERS: &str = "spiffe://shop.local/ns/default/sa/orders";

/// The mesh of these tests: one trust domain, and how strict it is.
fn mesh(mode: &str) -> String {
    let spec = format!("trustDomain: shop.local\nmtls: {{mode: {mode}}}\n");
    document("Mesh", "default", &spec)
}

/// The service `orders` at `addr`, whose workloads have the identity [`ORDERS`].
fn orders(addr: SocketAddr) -> String {
    service("orders", &[addr], "identity: {serviceAccounts: [orders]}\n")
}

/// The sidecar of one workload of `account`.
fn sidecar(account: &str, files: &Files, yaml: &str) -> SidecarBuilder {
    let workload = json!({
        "name": format!("{account}-1"),
        "service": account,
        "serviceAccount": account,
    });
    Sidecar::named(account)
        .set("workload", workload)
        .set("identity", files.identity())
        .mesh(yaml)
}

/// The identity of `account`, vouched for by `root`.
fn files(root: &Authority, account: &str) -> Files {
    let id = format!("spiffe://shop.local/ns/default/sa/{account}");
    Files::new(&root.workload(&id), &root.pem())
}
