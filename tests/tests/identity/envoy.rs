//! Envoy as a peer that is no sidecar of ours: both ends match SPIFFE IDs.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;

use outrigger_tests::client::{self, Ask};
use outrigger_tests::pki::{Authority, Files};
use outrigger_tests::process::{Process, free_port, scratch, target_dir};
use outrigger_tests::until;
use outrigger_tests::upstream::{Reply, Upstream};
use serde_json::{Value, json};

use super::{ORDERS, WEB, files, mesh, orders, sidecar};

/// Starts Envoy with one listener, and waits until it listens.
fn envoy(dir: &Path, port: u16, listener: &Value, clusters: &Value) -> Process {
    let binary = target_dir().join("bench-venv/bin/envoy");
    assert!(
        binary.is_file(),
        "{}: tests/run --install",
        binary.display()
    );
    let config = json!({"static_resources": {"listeners": [listener], "clusters": clusters}});
    let path = dir.join("envoy.json");
    std::fs::write(&path, config.to_string()).expect("written");
    let mut command = Command::new(binary);
    command.arg("--config-path").arg(path);
    command.args([
        "--concurrency",
        "1",
        "--disable-hot-restart",
        "--log-level",
        "warn",
    ]);
    let mut process = Process::start("envoy", &mut command);
    process.accepts(port);
    process
}

fn listener(port: u16, action: &Value, tls: Option<Value>) -> Value {
    let manager = "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager";
    let router = "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router";
    let mut route = json!({"match": {"prefix": "/"}});
    for (key, value) in action.as_object().expect("an object") {
        route[key] = value.clone();
    }
    let mut chain = json!({"filters": [{
        "name": "http",
        "typed_config": {
            "@type": manager,
            "stat_prefix": "http",
            "http_filters": [{"name": "router", "typed_config": {"@type": router}}],
            "route_config": {"virtual_hosts": [
                {"name": "all", "domains": ["*"], "routes": [route]},
            ]},
        },
    }]});
    if let Some(tls) = tls {
        chain["transport_socket"] = tls;
    }
    json!({"address": address(SocketAddr::from(([127, 0, 0, 1], port))), "filter_chains": [chain]})
}

fn address(addr: SocketAddr) -> Value {
    json!({"socket_address": {"address": addr.ip().to_string(), "port_value": addr.port()}})
}

/// TLS at the end `context`, as the workload in `files`, with a peer whose ID is `peer`.
fn tls(context: &str, files: &Files, peer: &str) -> Value {
    let file = |name: &str| json!({"filename": files.dir().join(name)});
    let mut config = json!({
        "@type": format!("type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.{context}"),
        "common_tls_context": {
            "alpn_protocols": ["h2"],
            "tls_params": {"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3"},
            "tls_certificates": [{
                "certificate_chain": file("svid.pem"), "private_key": file("key.pem"),
            }],
            "validation_context": {
                "trusted_ca": file("bundle.pem"),
                "match_typed_subject_alt_names": [{"san_type": "URI", "matcher": {"exact": peer}}],
            },
        },
    });
    if context == "DownstreamTlsContext" {
        config["require_client_certificate"] = json!(true);
    }
    json!({"name": "tls", "typed_config": config})
}

#[tokio::test]
async fn envoy_calls_a_sidecar_that_it_knows_by_its_spiffe_id() {
    let root = Authority::new("root");
    let app = Upstream::h1(|_| Reply::ok("from the application")).await;
    let (of_orders, of_web, dir) = (files(&root, "orders"), files(&root, "web"), scratch());
    let yaml = mesh("Strict") + &orders(app.addr);
    let callee = sidecar("orders", &of_orders, &yaml)
        .app(app.addr)
        .start()
        .await;
    for (expected, status) in [(ORDERS, 200), (WEB, 503)] {
        let options = "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions";
        let clusters = json!([{
            "name": "orders",
            "connect_timeout": "5s",
            "load_assignment": {"cluster_name": "orders", "endpoints": [{"lb_endpoints": [
                {"endpoint": {"address": address(callee.inbound())}},
            ]}]},
            "typed_extension_protocol_options": {
                "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                    "@type": options,
                    "explicit_http_config": {"http2_protocol_options": {}},
                },
            },
            "transport_socket": tls("UpstreamTlsContext", &of_web, expected),
        }]);
        let port = free_port();
        let action = json!({"route": {"cluster": "orders"}});
        let _envoy = envoy(dir.path(), port, &listener(port, &action, None), &clusters);
        let to = SocketAddr::from(([127, 0, 0, 1], port));
        let answer = client::call(to, Ask::get("orders", "/")).await;
        assert_eq!(answer.status, status, "{expected}: {}", answer.text());
    }
    assert_eq!(app.hits(), 1);
    let forwarded = app.last().header("x-forwarded-client-cert").to_owned();
    assert!(forwarded.ends_with(&format!(";URI={WEB}")), "{forwarded}");
}

#[tokio::test]
async fn a_sidecar_calls_envoy_and_each_knows_the_other_by_its_spiffe_id() {
    let root = Authority::new("root");
    let (of_orders, of_web, dir) = (files(&root, "orders"), files(&root, "web"), scratch());
    let port = free_port();
    let action = json!({"direct_response": {
        "status": 200, "body": {"inline_string": "from envoy"},
    }});
    let chain = tls("DownstreamTlsContext", &of_orders, WEB);
    let listening = listener(port, &action, Some(chain));
    let _envoy = envoy(dir.path(), port, &listening, &json!([]));
    let yaml = mesh("Strict") + &orders(SocketAddr::from(([127, 0, 0, 1], port)));
    let web = sidecar("web", &of_web, &yaml).start().await;
    until("an answer of envoy's", || async {
        let answer = web.get("orders", "/").await;
        (answer.text() == "from envoy").then_some(())
    })
    .await;
    // Somebody whom Envoy does not expect.
    let of_mailer = files(&root, "mailer");
    let mailer = sidecar("mailer", &of_mailer, &yaml).start().await;
    let answer = mailer.get("orders", "/").await;
    answer.assert_error(503, "tls_failed");
}
