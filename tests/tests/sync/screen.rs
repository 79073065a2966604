//! What two readers could understand differently is refused, or reaches everybody in one form.

use outrigger_tests::client::{Answer, Ask, Client, Raw};
use outrigger_tests::mesh::{Sidecar, route, service};
use outrigger_tests::upstream::{Reply, Upstream};
use serde_json::{Value, json};

/// `/admin` is answered by one service, everything else by another.
async fn guarded(wire: Value) -> (Sidecar, Upstream, Upstream) {
    let open = Upstream::h1(|_| Reply::ok("open")).await;
    let admin = Upstream::h1(|_| Reply::ok("admin")).await;
    let rule = |prefix: &str, to: &str| {
        format!(
            "{{matches: [{{path: {{type: PathPrefix, value: {prefix}}}}}], backends: [{{service: {to}}}]}}"
        )
    };
    let rules = [rule("/admin", "guard"), rule("/", "orders")];
    let yaml = service("orders", &[open.addr], "")
        + &service("guard", &[admin.addr], "")
        + &route("orders", &[&rules[0], &rules[1]]);
    let sidecar = Sidecar::named("web-1")
        .mesh(yaml)
        .app(open.addr)
        .set("wire", wire)
        .start()
        .await;
    (sidecar, open, admin)
}

async fn status(sidecar: &Sidecar, path: &str) -> u16 {
    let mut raw = Raw::connect(sidecar.outbound()).await;
    raw.send(format!("GET {path} HTTP/1.1\r\nHost: orders\r\n\r\n"))
        .await;
    let answer = raw.read_until("\r\n\r\n").await;
    answer[9..12].parse().expect("a status line")
}

#[tokio::test]
async fn a_path_is_matched_and_forwarded_in_one_form() {
    let (sidecar, open, admin) = guarded(json!({})).await;
    for path in [
        "/x/../admin/1?q=/../%2e",
        "/x/%2e%2E/admin/1?q=/../%2e",
        "/%61dmin/1?q=/../%2e",
        "/./admin\\1?q=/../%2e",
    ] {
        assert_eq!(status(&sidecar, path).await, 200, "{path}");
        assert_eq!(admin.last().path, "/admin/1?q=/../%2e", "{path}");
    }
    assert_eq!((open.hits(), admin.hits()), (0, 4));
    assert_eq!(status(&sidecar, "//a//%2Fb").await, 200);
    assert_eq!(open.last().path, "//a//%2Fb");
    assert_eq!(status(&sidecar, "/a%00").await, 400);
    assert_eq!(open.hits(), 1);
}

#[tokio::test]
async fn how_much_is_normalised_is_the_operators_choice() {
    let check = async |rule: &str, path: &str, seen: Result<&str, u16>| {
        let (sidecar, open, admin) = guarded(json!({"pathNormalization": rule})).await;
        let status = status(&sidecar, path).await;
        let went: Vec<String> = [&open, &admin]
            .iter()
            .flat_map(|upstream| upstream.seen())
            .map(|seen| seen.path)
            .collect();
        let expected: Vec<&str> = seen.iter().copied().collect();
        assert_eq!(went, expected, "{rule} {path}");
        assert_eq!(status, seen.err().unwrap_or(200), "{rule} {path}");
    };
    check("None", "/x/../admin%00", Ok("/x/../admin%00")).await;
    check("MergeSlashes", "//admin///1", Ok("/admin/1")).await;
    check("DecodeAndMergeSlashes", "/x%2f..%5Cadmin", Ok("/admin")).await;
    check("DecodeAndMergeSlashes", "/100%", Err(400)).await;
}

#[tokio::test]
async fn inbound_hands_the_application_one_form_too() {
    let (sidecar, open, _admin) = guarded(json!({})).await;
    let mut raw = Raw::connect(sidecar.inbound()).await;
    raw.send("GET /x/../admin HTTP/1.1\r\nHost: orders\r\n\r\n")
        .await;
    raw.read_until("open").await;
    assert_eq!(open.last().path, "/admin");
    for hosts in [
        "",
        "Host: a\r\nHost: b\r\n",
        "Host: user@orders\r\n",
        "Host: \r\n",
    ] {
        let mut raw = Raw::connect(sidecar.inbound()).await;
        raw.send(format!("GET / HTTP/1.1\r\n{hosts}\r\n")).await;
        let answer = raw.read_until("\r\n\r\n").await;
        assert!(answer.starts_with("HTTP/1.1 400"), "{hosts:?}: {answer}");
        assert!(answer.contains("outrigger-error: bad_request"), "{answer}");
    }
    assert_eq!(open.hits(), 1);
}

#[tokio::test]
async fn header_names_with_an_underscore_pass_go_or_are_refused() {
    let ask = || Ask::get("orders", "/").header("x_real-ip", "6.6.6.6");
    let check = async |rule: &str, status: u16, seen: &[&str]| {
        let (sidecar, open, _admin) = guarded(json!({"underscores": rule})).await;
        assert_eq!(sidecar.call(ask()).await.status, status, "{rule}");
        let open = open.seen();
        let forwarded: Vec<&str> = open.iter().map(|seen| seen.header("x_real-ip")).collect();
        assert_eq!(forwarded, seen, "{rule}");
    };
    check("Keep", 200, &["6.6.6.6"]).await;
    check("Drop", 200, &[""]).await;
    check("Refuse", 400, &[]).await;
}

#[tokio::test]
async fn http_2_names_one_host() {
    let (sidecar, open, _admin) = guarded(json!({})).await;
    let mut client = Client::h2(sidecar.outbound()).await;
    let mut with_host = async |host: &str| -> Answer {
        client
            .call(Ask::get("orders", "/").header("host", host))
            .await
    };
    with_host("evil").await.assert_error(400, "bad_request");
    assert_eq!(open.hits(), 0);
    for same in ["orders", "ORDERS", "orders."] {
        assert_eq!(with_host(same).await.status, 200, "{same}");
    }
}

#[tokio::test]
async fn a_connection_without_requests_is_closed_after_the_idle_timeout() {
    let (sidecar, _open, _admin) = guarded(json!({"idleTimeout": "200ms"})).await;
    let mut h1 = Raw::connect(sidecar.outbound()).await;
    h1.send("GET / HTTP/1.1\r\nHost: orders\r\n\r\n").await;
    assert!(h1.read_to_end().await.ends_with("open"));
    let mut h2 = Client::h2(sidecar.outbound()).await;
    assert_eq!(h2.call(Ask::get("orders", "/")).await.status, 200);
    h2.closed().await;
}
