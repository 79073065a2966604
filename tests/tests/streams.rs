//! Streams that stall, that grow old, and that nobody answers.

#[path = "../../control-plane/tests/common/mod.rs"]
mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use common::{Client, wildcard};
use outrigger_config::wire::{DOCUMENT_TYPE, ENDPOINTS_TYPE};
use outrigger_tests::mesh::{Plane, Sidecar, service};
use outrigger_tests::relay::Relay;
use outrigger_tests::until;
use outrigger_tests::upstream::{Reply, Upstream};
use serde_json::{Value, json};

/// A second for a ping and a second for its answer, where it is 10 s by default.
fn quick() -> Value {
    json!({"keepAlive": "1s"})
}

async fn sidecar(name: &str, discovery: std::net::SocketAddr) -> Sidecar {
    let client = json!({"address": format!("http://{discovery}"), "keepAlive": "1s"});
    let sidecar = Sidecar::named(name).set("controlPlane", client);
    sidecar.start().await
}

async fn answers(sidecar: &Sidecar, text: &str) {
    until(&format!("orders answers {text:?}"), || async {
        (sidecar.get("orders", "/").await.text() == text).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_sidecar_whose_stream_froze_finds_out_and_gets_what_it_missed() {
    let old = Upstream::h1(|_| Reply::ok("old")).await;
    let new = Upstream::h1(|_| Reply::ok("new")).await;
    let plane = Plane::start(&[("orders.yaml", service("orders", &[old.addr], ""))]).await;
    let relay = Relay::to(plane.discovery()).await;
    let frozen = sidecar("frozen", relay.addr).await;
    let others = [
        sidecar("web-1", plane.discovery()).await,
        sidecar("web-2", plane.discovery()).await,
    ];
    answers(&frozen, "old").await;
    relay.freeze();
    plane.write("orders.yaml", &service("orders", &[new.addr], ""));
    for other in &others {
        answers(other, "new").await;
    }
    // Nobody closed anything: only a ping without an answer tells.
    answers(&frozen, "new").await;
}

#[tokio::test]
async fn the_control_plane_finds_the_stream_that_froze_among_others() {
    let upstream = Upstream::h1(|_| Reply::ok("")).await;
    let files = [("orders.yaml", service("orders", &[upstream.addr], ""))];
    let plane = Plane::set(&files, "push", quick()).await;
    let relay = Relay::to(plane.discovery()).await;
    // Ends without a ping of their own, so that only the control plane can notice.
    let mut frozen = Client::subscribe(relay.addr, "frozen").await;
    let mut other = Client::subscribe(plane.discovery(), "other").await;
    frozen.sync().await;
    other.sync().await;
    relay.freeze();
    let view = plane
        .view_until("/v1/proxies", |view| {
            view["proxies"][0]["connected"] == false
        })
        .await;
    assert_eq!(view["proxies"][0]["id"], "frozen", "{view}");
    assert_eq!(view["proxies"][1]["connected"], true, "{view}");
}

#[tokio::test]
async fn a_sidecar_that_answers_pings_and_no_push_is_cut_off() {
    let upstream = Upstream::h1(|_| Reply::ok("")).await;
    let files = [("orders.yaml", service("orders", &[upstream.addr], ""))];
    let plane = Plane::set(&files, "push", quick()).await;
    let mut good = Client::subscribe(plane.discovery(), "good").await;
    good.sync().await;
    let mute = Client::subscribe(plane.discovery(), "mute").await;
    mute.end().await.expect_err("the connection is cut");
    let view = plane
        .view_until("/v1/proxies", |view| {
            view["proxies"][1]["connected"] == false
        })
        .await;
    assert_eq!(view["proxies"][0]["connected"], true, "{view}");
}

#[tokio::test]
async fn an_old_connection_is_replaced_without_a_failed_request_or_a_resend() {
    let upstream = Upstream::h1(|_| Reply::ok("fine")).await;
    let files = [("orders.yaml", service("orders", &[upstream.addr], ""))];
    let plane = Plane::set(&files, "push", json!({"maxConnectionAge": "500ms"})).await;
    let sidecar = Arc::new(sidecar("web-1", plane.discovery()).await);
    let generation = sidecar.view("/config").await["generation"].clone();
    let done = Arc::new(AtomicBool::new(false));
    let traffic = tokio::spawn({
        let (sidecar, done) = (Arc::clone(&sidecar), Arc::clone(&done));
        async move {
            let mut calls = 0;
            while !done.load(Ordering::Relaxed) {
                assert_eq!(sidecar.get("orders", "/").await.text(), "fine");
                calls += 1;
            }
            calls
        }
    });
    let since = |view: &Value| view["proxies"][0]["connectedSince"].as_u64();
    let mut last = since(&plane.ask("GET", "/v1/proxies", "").await.json());
    for _ in 0..3 {
        let next = plane
            .view_until("/v1/proxies", |view| {
                since(view) > last && view["proxies"][0]["synced"] == true
            })
            .await;
        last = since(&next);
    }
    done.store(true, Ordering::Relaxed);
    assert!(traffic.await.expect("no request failed") > 0);
    // Nothing was sent that would have been put in force anew.
    assert_eq!(sidecar.view("/config").await["generation"], generation);

    // On the wire: the stream ends in order, and the next one that says what it has gets nothing.
    let mut first = Client::subscribe(plane.discovery(), "raw").await;
    let (endpoints, documents) = first.sync().await;
    first.end().await.expect("the stream ends in order");
    let resume = |type_url: &str, had: &outrigger_config::wire::DeltaDiscoveryResponse| {
        let mut request = wildcard(type_url);
        let had = had.resources.iter();
        request.initial_resource_versions =
            had.map(|r| (r.name.clone(), r.version.clone())).collect();
        request
    };
    let resumed = vec![
        resume(ENDPOINTS_TYPE, &endpoints),
        resume(DOCUMENT_TYPE, &documents),
    ];
    let mut second = Client::connect(plane.discovery(), "raw", resumed).await;
    let (endpoints, documents) = second.sync().await;
    assert!(endpoints.resources.is_empty() && documents.resources.is_empty());
}
