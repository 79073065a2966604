//! What a scanner finds of a sidecar's TLS, and what hellos meet that a strict server must refuse.

use outrigger_tests::mesh::Sidecar;
use outrigger_tests::pki::{Authority, Files};
use outrigger_tests::process::{python, run};
use outrigger_tests::upstream::{Reply, Upstream};
use serde_json::{Value, json};

use super::refused::say_with;
use super::{WEB, files, mesh, orders, sidecar};

async fn callee(root: &Authority) -> (Sidecar, Upstream, Files) {
    let app = Upstream::h1(|_| Reply::ok("hello")).await;
    let files = files(root, "orders");
    let yaml = mesh("Strict") + &orders(app.addr);
    let callee = sidecar("orders", &files, &yaml).app(app.addr).start().await;
    (callee, app, files)
}

/// What a script says of a sidecar's inbound port.
async fn asked(script: &'static str, callee: &Sidecar, files: Option<&Files>) -> Value {
    let mut command = python(script);
    let to = callee.inbound();
    command.arg(to.ip().to_string()).arg(to.port().to_string());
    if let Some(files) = files {
        let of = |name: &str| files.dir().join(name);
        command.args([of("svid.pem"), of("key.pem")]);
    }
    let asking = tokio::task::spawn_blocking(move || run(&mut command));
    serde_json::from_str(&asking.await.unwrap()).unwrap()
}

#[tokio::test]
async fn a_scanner_finds_tls_1_3_and_nothing_else() {
    let root = Authority::new("root");
    let (callee, _app, _files) = callee(&root).await;
    let of_web = files(&root, "web");
    let found = asked("tls_scan.py", &callee, Some(&of_web)).await;
    let suites = [
        "TLS_AES_128_GCM_SHA256",
        "TLS_AES_256_GCM_SHA384",
        "TLS_CHACHA20_POLY1305_SHA256",
    ];
    let expected = json!({
        "suites": {
            "ssl_2_0": [], "ssl_3_0": [], "tls_1_0": [], "tls_1_1": [], "tls_1_2": [],
            "tls_1_3": suites,
        },
        "curves": ["X25519", "secp256r1", "secp384r1"],
        "compression": false,
        "early data": false,
        "heartbleed": false,
        "ccs injection": false,
        "renegotiation": false,
        "robot": "NOT_VULNERABLE_RSA_NOT_SUPPORTED",
        "tickets": false,
    });
    assert_eq!(found, expected, "{found:#}");
}

#[tokio::test]
async fn hellos_that_break_the_rules_are_refused() {
    let root = Authority::new("root");
    let (callee, app, _files) = callee(&root).await;
    let found = asked("tls_hello.py", &callee, None).await;
    let expected = json!({
        "good": "hello",
        "in pieces": "hello",
        "grease": "hello",
        "unknown psk": "hello",
        "a key of another group": "retry",
        "tls 1.2 at most": "protocol_version",
        "tls 1.2 listed only": "protocol_version",
        "tls 1.0": "protocol_version",
        "draft 28 only": "protocol_version",
        "suites of tls 1.2 only": "handshake_failure",
        "no encryption": "handshake_failure",
        "finite fields only": "handshake_failure",
        // RFC 8446 §9.2 would have missing_extension; rustls says less.
        "no signatures listed": "handshake_failure",
        "no groups listed": "handshake_failure",
        "no key share": "handshake_failure",
        "short key": "illegal_parameter",
        "key of small order": "illegal_parameter",
        "point off the curve": "illegal_parameter",
        "compressed point": "illegal_parameter",
        "two keys of a group": "illegal_parameter",
        "compression": "illegal_parameter",
        "extension twice": "illegal_parameter",
        "psk that is not last": "illegal_parameter",
        "psk without modes": "missing_extension",
        "bytes behind the hello": "decode_error",
        "hello cut short": "decode_error",
        "empty extensions of a length": "decode_error",
        // RFC 8446 §5.1 would have record_overflow.
        "record too long": "decode_error",
        // Not told from plaintext, which a strict port refuses without a word.
        "finished first": "closed",
        "empty record": "closed",
        "application data inside": "closed",
        "change cipher spec first": "closed",
        "alert instead": "closed",
    });
    assert_eq!(found, expected, "{found:#}");
    assert_eq!(app.hits(), 0);
    let listed = found.as_object().unwrap().values();
    let alerts =
        listed.filter(|one| !["hello", "retry", "closed"].contains(&one.as_str().unwrap()));
    let alerts = alerts.count() as f64;
    // Each is counted once: as a failed handshake, or as the plaintext that it was taken for.
    let cases = found.as_object().unwrap().len() as f64;
    let failures = "outrigger_tls_handshake_failures_total";
    let refused = "outrigger_connections_refused_total";
    let counted = callee
        .metric_until("each is counted", |now| {
            let plaintext = [("direction", "inbound"), ("reason", "plaintext")];
            let failed = now.sum(failures, &[("direction", "inbound")]);
            failed + now.sum(refused, &plaintext) == cases
        })
        .await;
    let protocol = counted.sum(failures, &[("reason", "protocol")]);
    assert!(protocol >= alerts, "{protocol}");
    // A protocol that nobody speaks is refused behind the hello (RFC 7301 §3.2).
    let client = root.workload(WEB).client(&["spdy/1"]);
    let error = say_with(client, callee.inbound(), "").await.unwrap_err();
    assert!(error.contains("NoApplicationProtocol"), "{error}");
    assert_eq!(app.hits(), 0);
}

#[tokio::test]
async fn handshakes_that_break_the_rules_never_reach_the_application() {
    let root = Authority::new("root");
    let (callee, app, _files) = callee(&root).await;
    let of_web = files(&root, "web");
    let found = asked("tls_handshake.py", &callee, Some(&of_web)).await;
    let served = "answered HTTP/1.1 200 OK";
    let during = json!({
        "corrupted verify": "decrypt_error",
        "verify of a server": "decrypt_error",
        "verify of another handshake": "decrypt_error",
        "scheme of another curve": "decrypt_error",
        "scheme of rsa": "decrypt_error",
        "scheme of tls 1.2": "illegal_parameter",
        "scheme of sha-1": "illegal_parameter",
        "no verify": "unexpected_message",
        "no certificate": "certificate_required",
        "certificate twice": "unexpected_message",
        "corrupted finished": "decrypt_error",
        "no finished": "bad_record_mac",
        "data before finished": "unexpected_message",
        "corrupted record": "bad_record_mac",
    });
    // Behind the handshake the end of the connection may overtake the alert.
    let after = json!({
        "second hello": "unexpected_message",
        "second finished": "unexpected_message",
        "unknown message": "unexpected_message",
        "oversized": "record_overflow",
        "oversized padding": "record_overflow",
        "bad key update": "illegal_parameter",
        // Each must be answered, so there is a bound on them.
        "many key updates": "unexpected_message",
    });
    // No tickets, and so nothing that early data could belong to.
    let good = ["good", "early data", "key update", "key update asked for"];
    for (case, made) in found.as_object().unwrap() {
        if good.contains(&case.as_str()) {
            assert_eq!(made, served, "{case}");
        } else if let Some(alert) = after.get(case) {
            assert!(made == alert || made == "closed", "{case}: {made}");
        } else {
            assert_eq!(made, &during[case], "{case}");
        }
    }
    assert_eq!(app.hits(), good.len());
    let failures = "outrigger_tls_handshake_failures_total";
    // What comes behind the handshake is counted with it when it is read with it.
    let late = 8.0..=8.0 + after.as_object().unwrap().len() as f64;
    for (reason, counts) in [
        ("possession", 5.0..=5.0),
        ("no_certificate", 1.0..=1.0),
        ("protocol", late),
    ] {
        callee
            .metric_until(reason, |now| {
                let labels = [("direction", "inbound"), ("reason", reason)];
                counts.contains(&now.sum(failures, &labels))
            })
            .await;
    }
}
