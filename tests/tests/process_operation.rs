//! What an operator does: scrape, check, stop, start twice.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use outrigger_tests::process::http::{Client, get};
use outrigger_tests::process::sink::Sink;
use outrigger_tests::process::{
    ControlPlane, PATIENCE, Process, SidecarFiles, command, free_port, now, output, printed,
    scratch, tool, wait_until,
};

/// `orders` answers at once, `mailer` gets messages.
fn mesh(orders: SocketAddr, mailer: SocketAddr) -> String {
    let service = |name: &str, at: SocketAddr| {
        format!(
            "apiVersion: outrigger.dev/v1alpha1\n\
             kind: MeshService\n\
             metadata: {{name: {name}}}\n\
             spec:\n\
            \x20 discovery: {{static: [{{address: {}, port: {}}}]}}\n\
             ---\n",
            at.ip(),
            at.port()
        )
    };
    let route = "apiVersion: outrigger.dev/v1alpha1\n\
                 kind: MeshRoute\n\
                 metadata: {name: mailer}\n\
                 spec:\n\
                \x20 services: [mailer]\n\
                \x20 rules:\n\
                \x20 - name: send\n\
                \x20   async: {when: Always, queue: mail, delivery: {attempts: 2, backoff: 50ms}}\n\
                 ---\n\
                 apiVersion: outrigger.dev/v1alpha1\n\
                 kind: Queue\n\
                 metadata: {name: mail}\n\
                 spec: {backend: {embedded: {allowEphemeral: true}}}\n";
    format!(
        "{}{}{route}",
        service("orders", orders),
        service("mailer", mailer)
    )
}

/// A port at which nobody answers.
fn nobody() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], free_port()))
}

#[test]
fn metrics_are_clean_and_prometheus_scrapes_them() {
    let dir = scratch();
    let sink = Sink::start();
    let control_plane = ControlPlane::start(dir.path(), &mesh(sink.addr, sink.addr));
    let app = format!("app: \"{}\"", sink.addr);
    let files = SidecarFiles::write(dir.path(), "web", Some(control_plane.discovery), &app);
    let sidecar = files.start();
    let mut outbound = Client::connect(sidecar.outbound).unwrap();
    let mut inbound = Client::connect(sidecar.inbound).unwrap();
    for number in 0..20 {
        let path = format!("/{number}");
        assert_eq!(
            outbound
                .send("GET", &path, &["host: orders"], b"")
                .unwrap()
                .status,
            200
        );
        assert_eq!(
            outbound
                .send("GET", &path, &["host: nobody"], b"")
                .unwrap()
                .status,
            404
        );
        assert_eq!(
            inbound
                .send("GET", &path, &["host: web"], b"")
                .unwrap()
                .status,
            200
        );
        outbound
            .send("BREW", &path, &["host: orders"], b"")
            .unwrap();
    }
    wait_until("a message is taken and delivered", PATIENCE, || {
        let sent = outbound
            .send("POST", "/mail", &["host: mailer"], b"letter")
            .unwrap();
        sent.status == 202
            && sink
                .received()
                .iter()
                .any(|arrived| arrived.message.is_some())
    });
    // Unreachable: retries, a breaker, dead letters.
    control_plane.set_mesh(&mesh(nobody(), sink.addr));
    wait_until("calls fail", PATIENCE, || {
        outbound
            .send("GET", "/", &["host: orders"], b"")
            .unwrap()
            .status
            == 503
    });

    for (name, addr) in [
        ("sidecar", sidecar.admin),
        ("control plane", control_plane.admin),
    ] {
        let text = get(addr, "/metrics").unwrap().text();
        let mut promtool = tool("promtool");
        promtool.args(["check", "metrics"]).stdin(Stdio::piped());
        let mut child = promtool
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("promtool starts");
        std::io::Write::write_all(&mut child.stdin.take().unwrap(), text.as_bytes()).unwrap();
        let said = child.wait_with_output().unwrap();
        let clean = said.status.success() && said.stderr.is_empty();
        assert!(clean, "promtool on the {name}:\n{}\n{text}", printed(&said));
    }
    let text = get(sidecar.admin, "/metrics").unwrap().text();
    for family in [
        "outrigger_requests_total",
        "outrigger_request_duration_seconds",
        "outrigger_attempts_total",
        "outrigger_breaker_state",
        "outrigger_in_flight",
        "outrigger_queue_enqueued_total",
        "outrigger_queue_delivered_total",
        "outrigger_queue_depth",
        "outrigger_queue_conservation_drift",
        "outrigger_config_info",
        "outrigger_config_applied_timestamp_seconds",
        "outrigger_connections",
        "process_cpu_seconds_total",
        "process_resident_memory_bytes",
    ] {
        let shown = text.lines().any(|line| line.starts_with(family));
        assert!(shown, "{family} is missing in\n{text}");
    }
    assert!(
        text.contains("method=\"other\"") && !text.contains("BREW"),
        "methods are bounded"
    );

    let prometheus = Prometheus::start(dir.path(), &[sidecar.admin, control_plane.admin]);
    wait_until("Prometheus has scraped both", 2 * PATIENCE, || {
        let up = prometheus.query("up==1");
        let requests = prometheus.query("sum(outrigger_requests_total)>0");
        up.len() == 2 && requests.len() == 1
    });
}

/// A Prometheus that scrapes every second.
struct Prometheus {
    addr: SocketAddr,
    _process: Process,
}

impl Prometheus {
    fn start(dir: &Path, targets: &[SocketAddr]) -> Self {
        let config = dir.join("prometheus.yml");
        let targets: Vec<String> = targets.iter().map(|addr| format!("\"{addr}\"")).collect();
        let text = format!(
            "global: {{scrape_interval: 1s, scrape_timeout: 1s}}\n\
             scrape_configs: [{{job_name: outrigger, static_configs: [{{targets: [{}]}}]}}]\n",
            targets.join(", ")
        );
        std::fs::write(&config, text).expect("the scratch directory is writable");
        let addr = nobody();
        let mut command = tool("prometheus");
        command.arg(format!("--config.file={}", config.display()));
        command.arg(format!(
            "--storage.tsdb.path={}",
            dir.join("prometheus").display()
        ));
        command.arg(format!("--web.listen-address={addr}"));
        let mut process = Process::start("prometheus", &mut command);
        process.accepts(addr.port());
        Self {
            addr,
            _process: process,
        }
    }

    fn query(&self, query: &str) -> Vec<serde_json::Value> {
        let query = query.replace('=', "%3D").replace('>', "%3E");
        let Ok(answer) = get(self.addr, &format!("/api/v1/query?query={query}")) else {
            return Vec::new();
        };
        if answer.status != 200 {
            return Vec::new();
        }
        answer.json()["data"]["result"]
            .as_array()
            .cloned()
            .unwrap_or_default()
    }
}

#[test]
fn sigterm_finishes_what_is_in_flight_and_exits_0() {
    let dir = scratch();
    let sink = Sink::start();
    let files = SidecarFiles::write(
        dir.path(),
        "web",
        None,
        &format!("app: \"{}\"\ndrain: 10s", sink.addr),
    );
    files.set_mesh(&mesh(sink.addr, sink.addr));
    for direction in ["outbound", "inbound"] {
        let mut sidecar = files.start();
        let addr = if direction == "outbound" {
            sidecar.outbound
        } else {
            sidecar.inbound
        };
        let status = std::thread::scope(|scope| {
            let slow = scope.spawn(move || {
                let mut client = Client::connect(addr).unwrap();
                client.send("GET", "/sleep/1500", &["host: orders"], b"")
            });
            wait_until("the request is in flight", PATIENCE, || {
                sidecar.metric("outrigger_in_flight", &[]) > Some(0.5)
            });
            let asked = now();
            sidecar.process.signal("TERM");
            let answer = slow
                .join()
                .unwrap()
                .expect("the request in flight is finished");
            assert_eq!(answer.status, 200, "{direction}: {}", answer.text());
            let status = sidecar.process.wait(Duration::from_secs(12));
            println!("{direction}: ended after {:?}", now() - asked);
            status
        });
        assert_eq!(
            status.code(),
            Some(0),
            "{direction}: {}",
            sidecar.process.log()
        );
        assert!(
            Client::connect(addr).is_err(),
            "{direction}: nobody listens any more"
        );
    }
    let mut control_plane = ControlPlane::start(dir.path(), &mesh(sink.addr, sink.addr));
    control_plane.process.signal("TERM");
    let status = control_plane.process.wait(Duration::from_secs(12));
    assert_eq!(status.code(), Some(0), "{}", control_plane.process.log());
}

#[test]
fn a_frozen_control_plane_is_noticed_and_followed_again() {
    let dir = scratch();
    let sink = Sink::start();
    let control_plane = ControlPlane::start(dir.path(), &mesh(sink.addr, sink.addr));
    let web = SidecarFiles::write(dir.path(), "web", Some(control_plane.discovery), "").start();
    let connected = || web.metric("outrigger_control_plane_connected", &[]);
    wait_until("it is connected", PATIENCE, || connected() == Some(1.0));
    let before = web.config_version();
    control_plane.process.signal("STOP");
    // By keep-alive, within 20 s; nothing else would tell a frozen peer from a quiet one.
    wait_until("the sidecar notices", 2 * PATIENCE, || {
        connected() == Some(0.0)
    });
    assert_eq!(web.config_version(), before);
    assert_eq!(web.admin("/readyz").map(|answer| answer.status), Some(200));
    let edited = mesh(sink.addr, sink.addr) + &more_service(sink.addr);
    control_plane.set_mesh(&edited);
    control_plane.process.signal("CONT");
    wait_until("what changed meanwhile arrives", 2 * PATIENCE, || {
        connected() == Some(1.0) && web.config_version() != before
    });
}

/// One more service, as a change of the mesh.
fn more_service(addr: SocketAddr) -> String {
    format!(
        "---\napiVersion: outrigger.dev/v1alpha1\nkind: MeshService\nmetadata: {{name: more}}\n\
         spec:\n  discovery: {{static: [{{address: {}, port: {}}}]}}\n",
        addr.ip(),
        addr.port()
    )
}

#[test]
fn a_second_instance_is_refused() {
    let dir = scratch();
    let sink = Sink::start();
    let files = SidecarFiles::write(dir.path(), "web", None, "");
    files.set_mesh(&mesh(sink.addr, sink.addr));
    let first = files.start();
    let second = output(
        command("outrigger-proxy")
            .arg("--config")
            .arg(&files.config),
    );
    let said = printed(&second);
    assert_eq!(second.status.code(), Some(2), "{said}");
    assert!(
        said.contains("state directory") && said.contains("in use"),
        "{said}"
    );

    let other = SidecarFiles::write(dir.path(), "other", None, "workers: 2");
    other.set_mesh(&mesh(sink.addr, sink.addr));
    let config = std::fs::read_to_string(&other.config).unwrap();
    let same = format!("outbound: \"{}\"", first.outbound);
    std::fs::write(
        &other.config,
        config.replace("outbound: \"127.0.0.1:0\"", &same),
    )
    .unwrap();
    let second = output(
        command("outrigger-proxy")
            .arg("--config")
            .arg(&other.config),
    );
    let said = printed(&second);
    assert_eq!(second.status.code(), Some(2), "{said}");
    assert!(
        said.contains("cannot listen on") && said.contains("outbound"),
        "{said}"
    );
    assert_eq!(
        first.admin("/readyz").map(|answer| answer.status),
        Some(200)
    );

    let control_plane = ControlPlane::start(dir.path(), &mesh(sink.addr, sink.addr));
    let program = "outrigger-control-plane";
    let second = output(command(program).arg("--config").arg(&control_plane.config));
    let said = printed(&second);
    assert_eq!(second.status.code(), Some(2), "{said}");
    assert!(
        said.contains("state directory") && said.contains("in use"),
        "{said}"
    );
}

#[test]
fn check_version_and_help_say_what_they_should() {
    let dir = scratch();
    let files = SidecarFiles::write(dir.path(), "web", None, "");
    let good = mesh(nobody(), nobody());
    files.set_mesh(&good);
    let control_plane = dir.path().join("control-plane.yaml");
    std::fs::write(
        &control_plane,
        "listen: {discovery: \"127.0.0.1:0\"}\nconfig: web-mesh.yaml\nstateDir: control-state\n",
    )
    .unwrap();
    let programs = [
        ("outrigger-proxy", &files.config),
        ("outrigger-control-plane", &control_plane),
    ];
    let check = |name: &str, config: &Path| {
        let checked = output(command(name).arg("--config").arg(config).arg("--check"));
        (checked.status.code(), printed(&checked))
    };
    for (name, config) in programs {
        let version = output(command(name).arg("--version"));
        let said = printed(&version);
        assert!(
            version.status.success() && said.starts_with(&format!("{name} ")),
            "{said}"
        );
        let help = output(command(name).arg("--help"));
        let said = printed(&help);
        assert!(help.status.success() && said.contains("--config") && said.contains("--check"));
        let (status, said) = check(name, config);
        assert_eq!(status, Some(0), "{name}: {said}");
        let (status, said) = check(name, &dir.path().join("missing.yaml"));
        assert_eq!(status, Some(2), "{name}: {said}");
        assert!(said.contains("missing.yaml"), "{name}: {said}");
    }
    let version = printed(&output(command("outrigger").arg("--version")));
    assert!(version.starts_with("outrigger "), "{version}");
    let help = printed(&output(command("outrigger").arg("--help")));
    assert!(help.contains("demo") && help.contains("check"), "{help}");
    files.set_mesh(&good.replace("attempts", "atempts"));
    let line = 1 + good
        .lines()
        .position(|line| line.contains("attempts"))
        .unwrap();
    for (name, config) in programs {
        let (status, said) = check(name, config);
        assert_eq!(status, Some(1), "{name}: {said}");
        let place = format!("web-mesh.yaml:{line}:");
        assert!(
            said.contains(&place) && said.contains("did you mean \"attempts\"?"),
            "{said}"
        );
    }
    // The mesh is gone: unreadable, not wrong.
    std::fs::remove_file(&files.mesh).unwrap();
    for (name, config) in programs {
        let (status, said) = check(name, config);
        assert_eq!(status, Some(2), "{name}: {said}");
    }
    assert!(!files.state.exists(), "a check leaves nothing behind");
    let bare = output(&mut command("outrigger-proxy"));
    assert_eq!(bare.status.code(), Some(2), "{}", printed(&bare));
}
