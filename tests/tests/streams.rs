//! Streams that stall, that grow old, that nobody answers, and that carry a part of the mesh.

#[path = "../../control-plane/tests/common/mod.rs"]
mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use common::{Client, names, wildcard};
use outrigger_config::wire::{DOCUMENT_TYPE, DeltaDiscoveryResponse, ENDPOINTS_TYPE};
use outrigger_tests::mesh::{Plane, Sidecar, document, service};
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

/// `orders`, which only `web` may call, and `web` itself.
fn guarded(orders: &Upstream) -> Vec<(&'static str, String)> {
    let policy = "services: [orders]\naction: Allow\n\
                  rules: [{from: [{serviceAccounts: [web]}]}]";
    vec![
        ("orders.yaml", service("orders", &[orders.addr], "")),
        ("web.yaml", service("web", &[], "")),
        (
            "policy.yaml",
            document("AuthorizationPolicy", "orders", policy),
        ),
        (
            "nobody.yaml",
            document(
                "AuthorizationPolicy",
                "web",
                "services: [web]\naction: Allow\nrules: []",
            ),
        ),
    ]
}

#[tokio::test]
async fn a_stream_carries_what_its_sidecar_may_call_and_no_more() {
    let orders = Upstream::h1(|_| Reply::ok("")).await;
    let callable = json!({"scope": "Callable"});
    let plane = Plane::set(&guarded(&orders), "push", callable).await;
    let check = |(endpoints, documents): (DeltaDiscoveryResponse, DeltaDiscoveryResponse),
                 services: &[&str],
                 expected: &[&str]| {
        assert_eq!(names(&endpoints), services);
        assert_eq!(names(&documents), expected);
    };
    let connect = |account, service| Client::subscribe_as(plane.discovery(), account, service);
    let mut web = connect("default/web", "default/web").await;
    let of_web = [
        "AuthorizationPolicy/default/orders",
        "AuthorizationPolicy/default/web",
        "MeshService/default/orders",
        "MeshService/default/web",
    ];
    check(
        web.sync().await,
        &["default/orders", "default/web"],
        &of_web,
    );
    let mut own = connect("default/orders", "default/orders").await;
    let of_orders = [
        "AuthorizationPolicy/default/orders",
        "MeshService/default/orders",
    ];
    check(own.sync().await, &["default/orders"], &of_orders);
    let mut other = connect("other/thief", "default/orders").await;
    check(other.sync().await, &[], &[]);
    // A change that `other` does not see is accepted by it, with nothing in it.
    plane.write(
        "orders.yaml",
        &service("orders", &[orders.addr], "limits: {maxInFlight: 7}"),
    );
    for (client, seen) in [(&mut web, 1), (&mut own, 1), (&mut other, 0)] {
        let push = client.next().await;
        assert_eq!(
            (&*push.type_url, push.resources.len()),
            (DOCUMENT_TYPE, seen)
        );
        client.answer(&push, None).await;
    }
    plane
        .view_until("/v1/proxies", |view| {
            let all = view["proxies"].as_array().expect("a list");
            all.len() == 3 && all.iter().all(|proxy| proxy["synced"] == true)
        })
        .await;
}

#[tokio::test]
async fn a_sidecar_with_a_part_of_the_mesh_serves_it_and_follows_its_permissions() {
    let orders = Upstream::h1(|_| Reply::ok("ordered")).await;
    let callable = json!({"scope": "Callable"});
    let plane = Plane::set(&guarded(&orders), "push", callable).await;
    let as_account = |account: &str| {
        let client = json!({"address": format!("http://{}", plane.discovery())});
        let workload =
            json!({"name": format!("{account}-1"), "serviceAccount": account, "service": "web"});
        Sidecar::named(account)
            .set("controlPlane", client)
            .set("workload", workload)
    };
    let web = as_account("web").start().await;
    assert_eq!(web.get("orders", "/").await.text(), "ordered");
    let other = as_account("other").start().await;
    assert_eq!(other.get("orders", "/").await.code(), "no_route");
    // Once it may, it sees it.
    let both = "services: [orders]\naction: Allow\n\
                rules: [{from: [{serviceAccounts: [web, other]}]}]";
    plane.write(
        "policy.yaml",
        &document("AuthorizationPolicy", "orders", both),
    );
    until("the other may call, too", || async {
        (other.get("orders", "/").await.text() == "ordered").then_some(())
    })
    .await;
}
