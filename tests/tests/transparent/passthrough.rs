//! Calls to destinations that the mesh knows nothing of, from explicit callers.

use outrigger_tests::client::{Ask, Raw};
use outrigger_tests::mesh::{Sidecar, document, service};
use outrigger_tests::netns::{End, within};
use outrigger_tests::upstream::{Reply, Speaks, Upstream};
use tokio::net::TcpStream;

use crate::say;

fn mesh(unknown: &str) -> String {
    document(
        "Mesh",
        "default",
        &format!("outbound: {{unknown: {unknown}}}"),
    ) + &service("orders", &[], "")
}

/// The answer to a request in absolute form.
async fn proxied(sidecar: &Sidecar, url: &str) -> String {
    let mut raw = Raw::connect(sidecar.outbound()).await;
    let host = url.trim_start_matches("http://").split('/').next().unwrap();
    raw.send(format!(
        "GET {url} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
    ))
    .await;
    raw.read_to_end().await
}

#[tokio::test]
async fn an_unknown_host_in_origin_form_is_no_route_whatever_the_setting() {
    for unknown in ["Allow", "Deny"] {
        let sidecar = Sidecar::start(mesh(unknown)).await;
        sidecar
            .get("nowhere.example", "/")
            .await
            .assert_error(404, "no_route");
    }
}

#[tokio::test]
async fn nothing_unknown_leads_to_loopback_or_back_to_us() {
    let upstream = Upstream::h1(|_| Reply::ok("secret")).await;
    let sidecar = Sidecar::start(mesh("Allow")).await;
    let port = upstream.addr.port();
    for host in [
        "127.0.0.1",
        "localhost",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "169.254.169.254",
        "0.0.0.0",
    ] {
        let answer = proxied(&sidecar, &format!("http://{host}:{port}/")).await;
        assert!(answer.starts_with("HTTP/1.1 404 "), "{host}: {answer}");
        assert!(
            answer.contains("outrigger-error: no_route"),
            "{host}: {answer}"
        );
    }
    let admin = sidecar.admin();
    let answer = proxied(&sidecar, &format!("http://{admin}/")).await;
    assert!(answer.contains("loop"), "{answer}");
    assert_eq!(upstream.hits(), 0);
}

#[tokio::test]
async fn a_name_that_leads_nowhere_is_a_failed_connect() {
    let sidecar = Sidecar::start(mesh("Allow")).await;
    let answer = proxied(&sidecar, "http://nowhere.invalid/").await;
    assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
    assert!(
        answer.contains("outrigger-error: connect_failed"),
        "{answer}"
    );
}

#[tokio::test]
async fn bytes_without_a_destination_are_refused() {
    let sidecar = Sidecar::start(mesh("Allow")).await;
    let mut stream = TcpStream::connect(sidecar.outbound()).await.unwrap();
    assert_eq!(
        say(&mut stream, "ehlo\r\n").await,
        (String::new(), End::Reset)
    );
    let refused = [("direction", "outbound"), ("reason", "no_destination")];
    let scrape = sidecar.metrics().await;
    assert_eq!(
        scrape.sum("outrigger_connections_refused_total", &refused),
        1.0
    );
}

#[test]
fn a_request_in_absolute_form_goes_to_an_unknown_host_where_that_is_allowed() {
    within(&["10.200.0.3/32"], || async {
        let addr = "10.200.0.3:8000".parse().unwrap();
        let upstream = Upstream::on(addr, Speaks::H1, |_| Reply::ok("outside")).await;
        let sidecar = Sidecar::start(mesh("Allow")).await;
        let answer = proxied(&sidecar, "http://10.200.0.3:8000/a?b=c").await;
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
        assert!(answer.ends_with("outside"), "{answer}");
        let seen = upstream.last();
        assert_eq!(
            (&*seen.authority, &*seen.path),
            ("10.200.0.3:8000", "/a?b=c")
        );
        let ours = seen
            .headers
            .keys()
            .any(|name| name.as_str().starts_with("outrigger-"));
        assert!(!ours, "{:?}", seen.headers);
        let labels = [
            ("service", "passthrough"),
            ("route", "passthrough"),
            ("status", "200"),
        ];
        let scrape = sidecar.metrics().await;
        assert_eq!(scrape.sum("outrigger_requests_total", &labels), 1.0);
        // In origin form it is not a request to a proxy.
        let asked = sidecar.call(Ask::get("10.200.0.3:8000", "/")).await;
        asked.assert_error(404, "no_route");

        let sidecar = Sidecar::start(mesh("Deny")).await;
        let answer = proxied(&sidecar, "http://10.200.0.3:8000/").await;
        assert!(answer.contains("outrigger-error: no_route"), "{answer}");
        assert_eq!(upstream.hits(), 1);
    });
}
