//! Connections that a redirect took from their way.

use std::net::{IpAddr, SocketAddr};

use outrigger_tests::mesh::{Edited, Sidecar, document, service};
use outrigger_tests::netns::{End, connect, read_to_end, redirect, within};
use outrigger_tests::upstream::{Reply, Speaks, Upstream};
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::{dial, say, shouter};

/// Endpoints `.3` and `.4`, service addresses `.50` and `.51` that nobody has, a link-local one,
/// and sources whose connections are redirected.
const ADDRESSES: &[&str] = &[
    "10.200.0.3/32",
    "10.200.0.4/32",
    "10.200.0.50/32",
    "10.200.0.51/32",
    "10.200.0.98/32",
    "10.200.0.99/32",
    "10.201.0.0/24",
    "169.254.9.9/32",
    "fd00:200::3/128",
    "fd00:200::50/128",
    "fd00:200::99/128",
];

fn addr(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

/// Where the application's connections come from.
fn source(to: SocketAddr) -> IpAddr {
    match to {
        SocketAddr::V4(_) => "10.200.0.99".parse().unwrap(),
        SocketAddr::V6(_) => "fd00:200::99".parse().unwrap(),
    }
}

/// A sidecar to which all connections of the application are redirected.
async fn intercepting(yaml: String) -> Sidecar {
    let sidecar = Sidecar::named("web-1")
        .mesh(yaml)
        .outbound_on(&[addr("127.0.0.1:15001"), addr("[::1]:15001")])
        .start()
        .await;
    redirect(source(addr("0.0.0.0:0")), 15001);
    redirect(source(addr("[::]:0")), 15001);
    sidecar
}

/// `GET /` of `host` at `to`.
async fn get(to: &str, host: &str) -> String {
    let to = addr(to);
    let mut stream = connect(source(to), to).await.expect("connected");
    let ask = format!("GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
    stream.write_all(ask.as_bytes()).await.unwrap();
    read_to_end(&mut stream).await.0
}

fn assert_from(answer: &str, who: &str) {
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    assert!(answer.ends_with(who), "{answer}, not {who}");
}

async fn web(at: &str, says: &'static str) -> Upstream {
    Upstream::on(addr(at), Speaks::H1, move |_| Reply::ok(says)).await
}

#[test]
fn host_then_original_destination_decide_over_both_families() {
    within(ADDRESSES, || async {
        let third = web("10.200.0.3:9000", "three").await;
        let _fourth = web("10.200.0.4:9000", "four").await;
        let _sixth = web("[fd00:200::3]:9000", "six").await;
        let outside = web("10.200.0.4:8000", "outside").await;
        let yaml = service(
            "orders",
            &[addr("10.200.0.3:9000"), addr("[fd00:200::3]:9000")],
            "addresses: [10.200.0.50, 'fd00:200::50']\nports: [{port: 80}]\n",
        ) + &service("stock", &[addr("10.200.0.4:9000")], "");
        let sidecar = intercepting(yaml.clone()).await;

        // The host decides first, wherever the connection was going.
        assert_from(&get("10.200.0.3:9000", "stock").await, "four");
        assert_from(&get("10.200.0.51:1234", "stock").await, "four");
        // An endpoint is that endpoint and no other.
        for _ in 0..4 {
            assert_from(&get("10.200.0.3:9000", "10.200.0.3:9000").await, "three");
            assert_from(&get("[fd00:200::3]:9000", "any.example").await, "six");
        }
        // A service address is any of its endpoints.
        let orders = ["three", "six"];
        let answer = get("10.200.0.50:80", "any.example").await;
        assert!(orders.iter().any(|who| answer.ends_with(who)), "{answer}");
        let answer = get("[fd00:200::50]:80", "any.example").await;
        assert!(orders.iter().any(|who| answer.ends_with(who)), "{answer}");
        // Anything else goes where it was going, as it was.
        assert_from(&get("10.200.0.4:8000", "shop.example").await, "outside");
        assert_eq!(outside.last().authority, "shop.example");
        let scrape = sidecar.metrics().await;
        let passed = [("service", "passthrough"), ("status", "200")];
        assert_eq!(scrape.sum("outrigger_requests_total", &passed), 1.0);
        let orders = [("service", "default/orders"), ("status", "200")];
        assert_eq!(scrape.sum("outrigger_requests_total", &orders), 10.0);

        // A changed endpoint is known by its address.
        let moved = yaml.replace("9000", "8000");
        assert_eq!(sidecar.edit(&moved).await, Edited::Applied);
        assert_from(&get("10.200.0.4:8000", "shop.example").await, "outside");
        let stock = [("service", "default/stock"), ("status", "200")];
        let scrape = sidecar.metrics().await;
        assert_eq!(scrape.sum("outrigger_requests_total", &stock), 3.0);
        assert!(third.hits() > 0);

        let deny = document("Mesh", "default", "outbound: {unknown: Deny}");
        assert_eq!(sidecar.edit(&(yaml + &deny)).await, Edited::Applied);
        let answer = get("10.200.0.4:8000", "shop.example").await;
        assert!(answer.contains("outrigger-error: no_route"), "{answer}");
        assert_from(&get("10.200.0.3:9000", "shop.example").await, "three");
    });
}

#[test]
fn a_mapped_peer_of_a_listener_for_both_families_is_asked_as_ipv4() {
    within(ADDRESSES, || async {
        let _third = web("10.200.0.3:9000", "three").await;
        let _sidecar = Sidecar::named("web-1")
            .mesh(service("orders", &[addr("10.200.0.3:9000")], ""))
            .outbound_on(&[addr("[::]:15001")])
            .start()
            .await;
        redirect(source(addr("0.0.0.0:0")), 15001);
        assert_from(&get("10.200.0.3:9000", "any.example").await, "three");
    });
}

#[test]
fn opaque_bytes_go_to_the_service_of_the_address() {
    within(ADDRESSES, || async {
        let db = shouter("10.200.0.3:5432", "hello").await;
        let _other = shouter("10.200.0.4:7000", "").await;
        let yaml = service(
            "db",
            // Nobody listens at the second one.
            &[addr("10.200.0.3:5432"), addr("10.200.0.4:5432")],
            "addresses: [10.200.0.50]\nports: [{port: 5432, appProtocol: tcp}]\n",
        );
        let sidecar = intercepting(yaml.clone()).await;
        for n in 0..6 {
            let to = addr("10.200.0.50:5432");
            let mut stream = connect(source(to), to).await.unwrap();
            // The server speaks first, and is not waited for.
            let mut greeting = [0; 5];
            stream.read_exact(&mut greeting).await.unwrap();
            assert_eq!(&greeting, b"hello");
            assert_eq!(say(&mut stream, "a").await, ("Abye".into(), End::Closed));
            assert_eq!(db.connections(), n + 1);
        }
        // The dead endpoint, asked for by its own address, is no other.
        let to = addr("10.200.0.4:5432");
        assert_eq!(dial(source(to), to, "a").await, (String::new(), End::Reset));
        // Unknown: passed on where it was going.
        let to = addr("10.200.0.4:7000");
        assert_eq!(
            dial(source(to), to, "ehlo").await,
            ("EHLObye".into(), End::Closed)
        );
        let ended = |service, code| {
            [
                ("direction", "outbound"),
                ("service", service),
                ("code", code),
            ]
        };
        // A client may know of an end before it is counted.
        let counts = [
            (ended("default/db", ""), 6.0),
            (ended("default/db", "connect_failed"), 1.0),
            (ended("passthrough", ""), 1.0),
        ];
        sidecar
            .metric_until("all ends are counted", |scrape| {
                let counted = |labels| scrape.sum("outrigger_tcp_connections_total", labels);
                counts
                    .iter()
                    .all(|(labels, count)| counted(labels) == *count)
            })
            .await;

        let deny = document("Mesh", "default", "outbound: {unknown: Deny}");
        assert_eq!(sidecar.edit(&(yaml + &deny)).await, Edited::Applied);
        assert_eq!(
            dial(source(to), to, "ehlo").await,
            (String::new(), End::Reset)
        );
        let denied = ended("", "no_route");
        sidecar
            .metric_until("the refusal is counted", |scrape| {
                scrape.sum("outrigger_tcp_connections_total", &denied) == 1.0
            })
            .await;
    });
}

#[test]
fn connections_that_would_come_back_or_lead_to_link_local_are_refused() {
    within(ADDRESSES, || async {
        let sidecar = intercepting(service("orders", &[], "")).await;
        let before = sidecar.metrics().await;
        let admin = sidecar.admin();
        for (to, reason) in [
            (admin, "loop"),
            (sidecar.inbound(), "loop"),
            (addr("169.254.9.9:80"), "link_local"),
        ] {
            let answer = dial(source(to), to, "GET / HTTP/1.1\r\nHost: orders\r\n\r\n").await;
            assert_eq!(answer, (String::new(), End::Reset), "{to}");
            let labels = [("direction", "outbound"), ("reason", reason)];
            let after = sidecar.metrics().await;
            let more = after.since(&before, "outrigger_connections_refused_total", &labels);
            assert!(more > 0.0, "{to} {reason}");
        }
    });
}

#[test]
fn an_intercepted_call_goes_to_the_address_that_was_called_and_not_to_app() {
    within(ADDRESSES, || async {
        let _called = web("10.200.0.3:8080", "called").await;
        let _app = web("127.0.0.1:8080", "app").await;
        let _first = shouter("10.200.0.3:5432", "hello").await;
        let sidecar = Sidecar::named("web-1")
            .mesh(service("web", &[addr("10.200.0.3:8080")], ""))
            .app(addr("127.0.0.1:8080"))
            .inbound_on(&[addr("127.0.0.1:15006")])
            .set("workload", json!({"name": "web-1", "service": "web"}))
            .start()
            .await;
        let caller: IpAddr = "10.200.0.98".parse().unwrap();
        redirect(caller, 15006);
        let get = async |to: &str, from: IpAddr| {
            let mut stream = connect(from, addr(to)).await.unwrap();
            let ask = "GET / HTTP/1.1\r\nHost: web\r\nConnection: close\r\n\r\n";
            stream.write_all(ask.as_bytes()).await.unwrap();
            read_to_end(&mut stream).await.0
        };
        assert_from(&get("10.200.0.3:8080", caller).await, "called");
        // Not intercepted: to `app`.
        let direct: IpAddr = "127.0.0.1".parse().unwrap();
        assert_from(&get("127.0.0.1:15006", direct).await, "app");
        // Another port of the workload, of which nothing is declared.
        let mut stream = connect(caller, addr("10.200.0.3:5432")).await.unwrap();
        assert_eq!(say(&mut stream, "quit").await.1, End::Closed);
        let scrape = sidecar.metrics().await;
        let labels = [
            ("direction", "inbound"),
            ("service", "default/web"),
            ("status", "200"),
        ];
        assert_eq!(scrape.sum("outrigger_requests_total", &labels), 2.0);
    });
}

#[test]
fn opaque_connections_of_one_source_stay_with_one_endpoint_where_the_service_hashes() {
    within(ADDRESSES, || async {
        let _servers = [
            shouter("10.200.0.3:7000", "three ").await,
            shouter("10.200.0.4:7000", "four ").await,
        ];
        let more = "addresses: [10.200.0.50]\n\
                    ports: [{name: db, port: 7000, appProtocol: tcp}]\n\
                    loadBalancer: {algorithm: ConsistentHash}";
        let endpoints = [addr("10.200.0.3:7000"), addr("10.200.0.4:7000")];
        let _sidecar = intercepting(service("db", &endpoints, more)).await;
        let mut whose = std::collections::BTreeSet::new();
        // Callers beside each other on one host: pods of a node-wide sidecar.
        for last in 1..=16 {
            let source: IpAddr = format!("10.201.0.{last}").parse().unwrap();
            redirect(source, 15001);
            let (first, _) = dial(source, addr("10.200.0.50:7000"), "x").await;
            for _ in 0..3 {
                let (again, end) = dial(source, addr("10.200.0.50:7000"), "x").await;
                assert_eq!((&again, end), (&first, End::Closed), "{source}");
            }
            whose.insert(first);
        }
        assert_eq!(whose.len(), 2, "every source goes to the same: {whose:?}");
    });
}
