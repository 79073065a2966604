//! `discovery.dns` against a DNS server on loopback.

use std::net::SocketAddr;

use outrigger_tests::mesh::{Plane, Sidecar};
use outrigger_tests::process::{Process, python};
use outrigger_tests::until;
use outrigger_tests::upstream::{Reply, Upstream};
use serde_json::{Value, json};

use super::{known, knows, service, tell};

/// A DNS server with one name, `orders.test`, and its targets.
struct Dns {
    addr: SocketAddr,
    control: SocketAddr,
    _process: Process,
}

impl Dns {
    fn start() -> Self {
        let mut process = Process::start("dns_server.py", &mut python("dns_server.py"));
        let line = process.line("listening on ");
        let ports: Vec<u16> = line
            .split(' ')
            .filter_map(|part| part.parse().ok())
            .collect();
        let [addr, control] = [0, 1].map(|n| SocketAddr::from(([127, 0, 0, 1], ports[n])));
        Self {
            addr,
            control,
            _process: process,
        }
    }

    async fn records(&self, records: &Value) {
        tell(self.control, "PUT", "/records", records).await;
    }

    /// SRV records with this priority and weight for each upstream, on one target.
    async fn srv(&self, upstreams: &[(u16, u16, &Upstream)]) {
        let rows: Vec<Value> = upstreams
            .iter()
            .map(|(priority, weight, u)| json!([priority, weight, u.addr.port(), "h.test.", 0]))
            .collect();
        let host = json!({"A": [["127.0.0.1", 0]]});
        self.records(&json!({"orders.test.": {"SRV": rows}, "h.test.": host}))
            .await;
    }

    async fn mode(&self, mode: &Value) {
        tell(self.control, "PUT", "/mode", mode).await;
    }

    async fn count(&self, transport: &str) -> u64 {
        let count = tell(self.control, "GET", "/count", &Value::Null).await;
        count[transport].as_u64().expect("a number")
    }

    /// Waits until so many more questions have been answered.
    async fn asked(&self, more: u64) {
        let before = self.count("udp").await;
        until("DNS is asked", || async {
            (self.count("udp").await >= before + more).then_some(())
        })
        .await;
    }

    fn service(&self, more: &str) -> String {
        let dns = format!(
            "{{dns: {{name: orders.test, servers: [\"{}\"], minTtl: 20ms, maxTtl: 50ms, {more}}}}}",
            self.addr
        );
        service("orders", &dns)
    }
}

async fn upstream(text: &'static str) -> Upstream {
    Upstream::h1(move |_| Reply::ok(text)).await
}

#[tokio::test]
async fn srv_records_bring_ports_tiers_and_weights() {
    let (first, standby) = (upstream("first").await, upstream("standby").await);
    let dns = Dns::start();
    dns.srv(&[(10, 3, &first), (20, 0, &standby)]).await;
    let sidecar = Sidecar::start(dns.service("type: SRV")).await;
    // It is ready with its endpoints.
    for _ in 0..5 {
        assert_eq!(sidecar.get("orders", "/").await.text(), "first");
    }
    let view = sidecar.view("/endpoints").await;
    let endpoints = view["services"][0]["endpoints"].as_array().expect("a list");
    let facts = |addr: SocketAddr| {
        let found = endpoints.iter().find(|e| e["address"] == addr.to_string());
        let found = found.expect("it is known");
        (found["priority"].clone(), found["weight"].clone())
    };
    assert_eq!(facts(first.addr), (json!(0), json!(30)));
    assert_eq!(facts(standby.addr), (json!(1), json!(1)));
    dns.srv(&[(20, 0, &standby)]).await;
    knows(&sidecar, "default/orders", &[standby.addr]).await;
    assert_eq!(sidecar.get("orders", "/").await.text(), "standby");
}

#[tokio::test]
async fn addresses_of_both_families_are_endpoints() {
    let dns = Dns::start();
    let both = json!({"A": [["127.0.0.1", 0], ["127.0.0.2", 0]], "AAAA": [["::1", 0]]});
    dns.records(&json!({"orders.test.": both})).await;
    let sidecar = Sidecar::start(dns.service("port: 9001")).await;
    let at = |ips: &[&str]| -> Vec<SocketAddr> {
        let at = |ip: &&str| SocketAddr::new(ip.parse().expect("an address"), 9001);
        ips.iter().map(at).collect()
    };
    let all = at(&["127.0.0.1", "127.0.0.2", "::1"]);
    knows(&sidecar, "default/orders", &all).await;
    dns.records(&json!({"orders.test.": {"A": [["127.0.0.1", 0], ["127.0.0.3", 0]]}}))
        .await;
    // One of three is gone, and half of what remains is new.
    knows(&sidecar, "default/orders", &at(&["127.0.0.1", "127.0.0.3"])).await;
    // The same name, asked for in IPv6 only.
    dns.records(&json!({"orders.test.": both})).await;
    let sidecar = Sidecar::start(dns.service("type: AAAA, port: 9001")).await;
    knows(&sidecar, "default/orders", &at(&["::1"])).await;
}

#[tokio::test]
async fn no_error_and_no_lost_zone_empties_a_set() {
    let upstreams = [upstream("one").await, upstream("two").await];
    let all = [upstreams[0].addr, upstreams[1].addr];
    let dns = Dns::start();
    let records = || async {
        dns.srv(&[(0, 1, &upstreams[0]), (0, 1, &upstreams[1])])
            .await;
    };
    records().await;
    let sidecar = Sidecar::start(dns.service("type: SRV")).await;
    knows(&sidecar, "default/orders", &all).await;
    for mode in [
        json!({"rcode": "SERVFAIL"}),
        json!({"rcode": "REFUSED"}),
        json!({"rcode": "NXDOMAIN"}),
        json!({"truncate": true, "tcp": false}),
    ] {
        dns.mode(&mode).await;
        dns.asked(3).await;
        assert_eq!(known(&sidecar, "default/orders").await.len(), 2, "{mode}");
        assert_eq!(sidecar.get("orders", "/").await.status, 200, "{mode}");
        dns.mode(&json!({})).await;
        dns.asked(3).await;
    }
    // A zone that is there and has nothing.
    dns.records(&json!({"orders.test.": {}})).await;
    dns.asked(3).await;
    assert_eq!(known(&sidecar, "default/orders").await.len(), 2);
    // What comes after all that is taken.
    dns.srv(&[(0, 1, &upstreams[1])]).await;
    knows(&sidecar, "default/orders", &all[1..]).await;
}

#[tokio::test]
async fn a_truncated_answer_is_asked_for_again_over_tcp() {
    let upstream = upstream("found").await;
    let dns = Dns::start();
    dns.mode(&json!({"truncate": true})).await;
    dns.srv(&[(0, 1, &upstream)]).await;
    let sidecar = Sidecar::start(dns.service("type: SRV")).await;
    knows(&sidecar, "default/orders", &[upstream.addr]).await;
    assert!(dns.count("tcp").await > 0);
}

#[tokio::test]
async fn the_control_plane_looks_up_pushes_and_holds_back_a_large_loss() {
    let upstreams = [
        upstream("one").await,
        upstream("two").await,
        upstream("three").await,
    ];
    let [one, two, three] = &upstreams;
    let all = [one.addr, two.addr, three.addr];
    let dns = Dns::start();
    dns.srv(&[(0, 1, one), (0, 1, two), (0, 1, three)]).await;
    let mut plane = Plane::start(&[("orders.yaml", dns.service("type: SRV"))]).await;
    let sidecar = Sidecar::named("web-1").plane(plane.discovery());
    let sidecar = sidecar.start().await;
    knows(&sidecar, "default/orders", &all).await;
    let path = "/v1/services/default%2Forders";
    let refused = plane.ask("POST", &format!("{path}/confirm"), "").await;
    assert_eq!((refused.status, refused.code()), (409, "nothing_held"));

    // Two of three gone at once: held, and seen to be held.
    dns.srv(&[(0, 1, one)]).await;
    let view = plane
        .view_until(path, |view| !view["registry"]["held"].is_null())
        .await;
    let kept = view["registry"]["held"]["endpoints"].as_array();
    assert_eq!(kept.map(Vec::len), Some(2), "{view}");
    let metrics = plane.ask("GET", "/metrics", "").await.text();
    let held = "outrigger_control_plane_registry_held_endpoints{service=\"default/orders\"} 2";
    assert!(metrics.contains(held), "{metrics}");
    assert_eq!(known(&sidecar, "default/orders").await.len(), 3);
    // Somebody who knows better says so.
    let confirmed = plane.ask("POST", &format!("{path}/confirm"), "").await;
    assert_eq!(confirmed.status, 204, "{}", confirmed.text());
    knows(&sidecar, "default/orders", &[one.addr]).await;

    // A control plane that starts while DNS is down takes nothing away, and knows what it knew.
    plane.stop().await;
    dns.mode(&json!({"rcode": "SERVFAIL"})).await;
    plane.start_again().await;
    let second = Sidecar::named("web-2").plane(plane.discovery());
    let second = second.start().await;
    knows(&second, "default/orders", &[one.addr]).await;
    let view = plane
        .view_until(path, |view| view["registry"]["problem"].is_string())
        .await;
    assert_eq!(
        view["endpoints"].as_array().map(Vec::len),
        Some(1),
        "{view}"
    );
    plane
        .view_until("/v1/proxies", |view| {
            let all = view["proxies"].as_array().expect("a list");
            all.len() == 2 && all.iter().all(|proxy| proxy["synced"] == true)
        })
        .await;
    assert_eq!(sidecar.get("orders", "/").await.text(), "one");

    // Nor does one that forgot everything, whether DNS is down or has lost the zone.
    for records in [false, true] {
        plane.stop().await;
        plane.wipe();
        if records {
            dns.records(&json!({})).await;
            dns.mode(&json!({})).await;
        }
        plane.start_again().await;
        plane
            .view_until("/v1/proxies", |view| {
                let all = view["proxies"].as_array().expect("a list");
                all.len() == 2 && all.iter().all(|proxy| proxy["synced"] == true)
            })
            .await;
        knows(&sidecar, "default/orders", &[one.addr]).await;
        assert_eq!(sidecar.get("orders", "/").await.text(), "one");
    }
    // And it is followed again when DNS is well.
    dns.srv(&[(0, 1, two), (0, 1, three)]).await;
    knows(&sidecar, "default/orders", &all[1..]).await;
}
