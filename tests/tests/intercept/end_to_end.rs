//! Two hosts with a sidecar each that their applications know nothing of.

use std::os::unix::fs::chown;
use std::process::Command;

use outrigger_tests::process::{
    PATIENCE, Process, command, output, python, run, scratch, tool, wait_until,
};
use tempfile::TempDir;

use crate::netns::Host;

/// Who the sidecar is, by the default of `intercept`, and who its application.
const SIDECAR: u32 = 2102;
const APP: u32 = 1000;

/// Ports of the applications on the right host.
const WEB: &str = "8080";
const WEBSOCKET: &str = "8765";
const ECHO: &str = "9000";
const GREETING: &str = "9025";
const GRPC: &str = "50051";

/// What both sidecars know: service addresses that no host has, and the endpoints behind them.
fn mesh() -> String {
    let service = |name: &str, number: u8, port: u16, speaks: &str, endpoint: &str| {
        format!(
            "apiVersion: outrigger.dev/v1alpha1\n\
             kind: MeshService\n\
             metadata: {{name: {name}}}\n\
             spec:\n\
            \x20 addresses: [10.96.0.{number}, \"fd00:96::{number}\"]\n\
            \x20 ports: [{{port: {port}, appProtocol: {speaks}}}]\n\
            \x20 discovery:\n\
            \x20   static:\n\
            \x20   - {{address: 10.200.0.3, port: {endpoint}}}\n\
            \x20   - {{address: \"fd00:200::3\", port: {endpoint}}}\n\
             ---\n"
        )
    };
    [
        service("web", 10, 80, "http", WEB),
        service("socket", 11, 80, "http", WEBSOCKET),
        service("echo", 12, 7, "tcp", ECHO),
        service("greeting", 13, 25, "tcp", GREETING),
        service("chat", 14, 50051, "grpc", GRPC),
    ]
    .concat()
}

/// A host with its sidecar.
struct Meshed {
    _sidecar: Process,
    dir: TempDir,
    host: Host,
}

impl Meshed {
    /// Redirects first, as an init container does, and then starts the sidecar.
    fn start(host: Host, workload: &str) -> Self {
        let dir = scratch();
        let file = dir.path().join("proxy.yaml");
        let text = format!(
            "workload: {workload}\n\
             listen:\n\
            \x20 outbound: [\"127.0.0.1:15001\", \"[::1]:15001\"]\n\
            \x20 inbound: \"[::]:15006\"\n\
            \x20 admin: \"127.0.0.1:15020\"\n\
             mesh: mesh.yaml\n\
             stateDir: state\n"
        );
        std::fs::write(&file, text).expect("the scratch directory is writable");
        std::fs::write(dir.path().join("mesh.yaml"), mesh()).expect("it still is");
        chown(dir.path(), Some(SIDECAR), Some(SIDECAR)).expect("root may");

        let applied = host.intercept(&format!("--apply --config {}", file.display()));
        let said = String::from_utf8_lossy(&applied.stdout);
        assert_eq!(
            said, "IPv4 and IPv6 rules are in place (nft)\n",
            "{applied:?}"
        );

        let mut proxy = command("outrigger-proxy");
        let mut proxy = host.of_user(SIDECAR, proxy.arg("--config").arg(&file));
        let mut process = Process::start("outrigger-proxy", &mut proxy);
        process.line("\"listening\"");
        let meshed = Self {
            _sidecar: process,
            dir,
            host,
        };
        wait_until("the sidecar is ready", PATIENCE, || {
            meshed.admin("/readyz").is_some()
        });
        meshed
    }

    fn admin(&self, path: &str) -> Option<String> {
        let mut curl = self.host.moved(&tool("curl"));
        let answer = curl
            .args(["-sf", &format!("http://127.0.0.1:15020{path}")])
            .output();
        let answer = answer.ok().filter(|answer| answer.status.success())?;
        Some(String::from_utf8_lossy(&answer.stdout).into_owned())
    }

    /// The sum of a counter's series in one direction, of a service if one is given.
    fn count(&self, counter: &str, direction: &str, service: &str) -> u64 {
        let metrics = self.admin("/metrics").expect("the sidecar runs");
        let series = metrics.lines().filter(|line| {
            line.starts_with(&format!("{counter}{{"))
                && line.contains(&format!("direction=\"{direction}\""))
                && (service.is_empty() || line.contains(&format!("service=\"default/{service}\"")))
        });
        let values = series.filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok());
        values.sum()
    }

    /// What an application of this host prints.
    fn app(&self, program: &mut Command) -> String {
        run(&mut self.host.of_user(APP, program))
    }

    fn curl(&self, options: &[&str]) -> String {
        self.app(tool("curl").args(["-sS", "--max-time", "10"]).args(options))
    }
}

/// Both, with the applications of the right one.
struct Mesh {
    left: Meshed,
    right: Meshed,
    _apps: [Process; 2],
}

impl Mesh {
    fn start() -> Self {
        let (left, right) = Host::pair();
        // Service addresses are routed like anything that is not here.
        left.route("10.96.0.0/16", "10.200.0.3");
        left.route("fd00:96::/64", "fd00:200::3");
        right.route("10.96.0.0/16", "10.200.0.2");
        let mut apps = python("apps.py");
        apps.args(["serve", WEB, WEBSOCKET, ECHO, GREETING]);
        let mut apps = Process::start("apps.py", &mut right.of_user(APP, &apps));
        let mut grpc = python("grpc_server.py");
        grpc.arg(format!("[::]:{GRPC}"));
        let mut grpc = Process::start("grpc_server.py", &mut right.of_user(APP, &grpc));
        apps.line("serving");
        grpc.line("listening on port");
        Self {
            left: Meshed::start(left, "{name: left-1}"),
            right: Meshed::start(right, "{name: right-1, service: socket}"),
            _apps: [apps, grpc],
        }
    }

    /// Does `calls`, which make `expected` requests to `service` (or connections to it): each goes
    /// through both sidecars.
    fn through_both<T>(
        &self,
        counter: &str,
        service: &str,
        expected: u64,
        calls: impl FnOnce() -> T,
    ) -> T {
        let out = || self.left.count(counter, "outbound", service);
        let into = || self.right.count(counter, "inbound", "");
        let (sent, received) = (out() + expected, into() + expected);
        let result = calls();
        let what = format!("{expected} of {counter} to {service:?} are counted by both");
        wait_until(&what, PATIENCE, || {
            let counted = (out(), into());
            assert!(
                counted.0 <= sent && counted.1 <= received,
                "more than {what}: {counted:?}"
            );
            counted == (sent, received)
        });
        result
    }
}

const REQUESTS: &str = "outrigger_requests_total";
const CONNECTIONS: &str = "outrigger_tcp_connections_total";

#[test]
fn every_protocol_goes_through_both_sidecars() {
    let mesh = Mesh::start();
    check_http(&mesh);
    check_grpc(&mesh);
    check_bytes(&mesh);
}

/// HTTP/1.1 and h2 with prior knowledge: by name, by the service's address and by the endpoint's.
fn check_http(mesh: &Mesh) {
    for version in ["--http1.1", "--http2-prior-knowledge"] {
        for (resolve, url, host) in [
            ("web:80:10.96.0.10", "http://web/a", "web"),
            ("web:80:[fd00:96::10]", "http://web/a", "web"),
            ("-:1:1.1.1.1", "http://10.96.0.10/a", "10.96.0.10"),
            ("-:1:1.1.1.1", "http://[fd00:96::10]/a", "[fd00:96::10]"),
            ("-:1:1.1.1.1", "http://10.200.0.3:8080/a", "10.200.0.3:8080"),
            (
                "-:1:1.1.1.1",
                "http://[fd00:200::3]:8080/a",
                "[fd00:200::3]:8080",
            ),
        ] {
            let answer = mesh.through_both(REQUESTS, "web", 1, || {
                mesh.left.curl(&[version, "--resolve", resolve, url])
            });
            let expected = format!("{{\"path\": \"/a\", \"host\": \"{host}\", \"peer\": ");
            assert!(answer.starts_with(&expected), "{version} {url}: {answer}");
        }
    }
}

fn check_grpc(mesh: &Mesh) {
    for target in ["10.96.0.14:50051", "[fd00:200::3]:50051"] {
        let said = mesh.through_both(REQUESTS, "chat", 21, || {
            let mut client = python("grpc_client.py");
            mesh.left
                .app(client.args([target, "chat", "streams", "metadata"]))
        });
        assert!(said.ends_with(", 0 failed\n"), "{target}: {said}");
    }
}

/// Whatever is not HTTP, or stops being it.
fn check_bytes(mesh: &Mesh) {
    for (kind, counter, service, address, port) in [
        ("websocket", REQUESTS, "socket", "10.96.0.11", "80"),
        ("websocket", REQUESTS, "socket", "fd00:200::3", WEBSOCKET),
        ("echo", CONNECTIONS, "echo", "10.96.0.12", "7"),
        ("echo", CONNECTIONS, "echo", "fd00:96::12", "7"),
        ("echo", CONNECTIONS, "echo", "10.200.0.3", ECHO),
        ("greeting", CONNECTIONS, "greeting", "10.96.0.13", "25"),
        ("greeting", CONNECTIONS, "greeting", "fd00:200::3", GREETING),
        // An address that the mesh does not know.
        ("echo", CONNECTIONS, "", "10.200.9.3", ECHO),
        ("greeting", CONNECTIONS, "", "10.200.9.3", GREETING),
    ] {
        let said = mesh.through_both(counter, service, 1, || {
            let mut call = python("apps.py");
            let peer = format!("{kind},{address},{port}");
            mesh.left.app(call.arg("call").arg(peer))
        });
        let expected = match kind {
            "websocket" => "ws one, ws two\n",
            "echo" => "echo of bytes\n",
            _ => "220 welcome, 250 thanks\n",
        };
        assert_eq!(said, expected, "{kind} to {address}:{port}");
    }
}

#[test]
fn nothing_comes_back_to_the_sidecar_that_sent_it() {
    let mesh = Mesh::start();
    let (left, right) = (&mesh.left, &mesh.right);

    // The sidecar's user is not redirected to its own outbound listener.
    let before = left.count(REQUESTS, "outbound", "");
    let mut curl = tool("curl");
    curl.args(["-sS", "--max-time", "10", "http://10.200.0.3:8080/sidecar"]);
    let answer = run(&mut left.host.of_user(SIDECAR, &curl));
    assert!(answer.contains("/sidecar"), "{answer}");
    assert_eq!(left.count(REQUESTS, "outbound", ""), before);

    // A workload that calls its own service meets its own inbound listener once.
    let counts = || {
        let out = right.count(REQUESTS, "outbound", "web");
        (out, right.count(REQUESTS, "inbound", ""))
    };
    let (out, into) = counts();
    let answer = right.curl(&["http://10.96.0.10/self"]);
    assert!(answer.contains("/self"), "{answer}");
    wait_until("both listeners have counted it once", PATIENCE, || {
        counts() == (out + 1, into + 1)
    });
    // By its own address it is not redirected at all.
    let answer = right.curl(&["http://10.200.0.3:8080/self"]);
    assert!(
        answer.contains("\"peer\": \"::ffff:10.200.0.3\""),
        "{answer}"
    );
    assert_eq!(counts(), (out + 1, into + 1));

    // The redirect ports themselves lead nowhere, neither for the application nor from another
    // host (as a user whose connections that host's own sidecar leaves alone).
    for address in ["10.200.0.2", "[fd00:200::2]"] {
        for (from, user, port) in [
            (left, APP, 15001),
            (left, APP, 15006),
            (right, SIDECAR, 15001),
            (right, SIDECAR, 15006),
        ] {
            let mut curl = tool("curl");
            let url = format!("http://{address}:{port}/");
            curl.args(["-sf", "--max-time", "10", &url]);
            let answer = output(&mut from.host.of_user(user, &curl));
            assert!(!answer.status.success(), "{url}: {answer:?}");
        }
    }
    wait_until("the inbound listener has refused four", PATIENCE, || {
        left.count("outrigger_connections_refused_total", "inbound", "") == 4
    });
    assert_eq!(left.count(REQUESTS, "outbound", ""), before);
}

#[test]
fn without_the_rules_the_sidecars_see_nothing() {
    let mesh = Mesh::start();
    let (left, right) = (&mesh.left, &mesh.right);
    for meshed in [left, right] {
        let removed = meshed.host.intercept("--remove");
        assert!(removed.status.success(), "{removed:?}");
        assert_eq!(meshed.host.all_rules(), "", "nothing is left");
    }
    let answer = left.curl(&["http://10.200.0.3:8080/direct"]);
    assert!(
        answer.contains("\"peer\": \"::ffff:10.200.0.2\""),
        "{answer}"
    );
    assert_eq!(left.count(REQUESTS, "outbound", ""), 0);
    assert_eq!(right.count(REQUESTS, "inbound", ""), 0);
    assert!(
        left.dir.path().join("state").exists(),
        "it ran as its own user"
    );
}
