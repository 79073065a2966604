//! Real clients against real servers, through two sidecars in a row, each a process of its own:
//! client → web's outbound → the service's inbound → the service.

use std::net::SocketAddr;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use outrigger_tests::process::sink::Sink;
use outrigger_tests::process::{
    ControlPlane, Nginx, PATIENCE, Sidecar, SidecarFiles, command, grpc_server, h2load,
    h2load_until, output, printed, python, run, scratch, tool, wait_until,
};

/// The mesh config of both sidecars: one service that the web calls.
fn mesh(service: &str, protocol: &str, at: SocketAddr) -> String {
    format!(
        "apiVersion: outrigger.dev/v1alpha1\n\
         kind: MeshService\n\
         metadata: {{name: {service}}}\n\
         spec:\n\
        \x20 ports: [{{port: 80, appProtocol: {protocol}}}]\n\
        \x20 discovery: {{static: [{{address: {}, port: {}}}]}}\n",
        at.ip(),
        at.port()
    )
}

/// A rule for the service, whose header shows which version of the config served a request.
fn route(service: &str, version: usize) -> String {
    format!(
        "---\n\
         apiVersion: outrigger.dev/v1alpha1\n\
         kind: MeshRoute\n\
         metadata: {{name: {service}}}\n\
         spec:\n\
        \x20 services: [{service}]\n\
        \x20 rules:\n\
        \x20 - name: v{version}\n\
        \x20   timeouts: {{request: {}s}}\n",
        20 + version
    )
}

/// Two standalone sidecars in front of `app`.
struct Road {
    web: Sidecar,
    service: Sidecar,
    web_files: SidecarFiles,
}

fn road(dir: &Path, service: &str, protocol: &str, app: SocketAddr) -> Road {
    let files = SidecarFiles::write(dir, service, None, &format!("app: \"{app}\""));
    // The inbound side needs to know its own service only for the protocol; where it is found
    // matters to the web.
    files.set_mesh(&mesh(service, protocol, app));
    let served = files.start();
    // Two workers share one listener, the pools are their own.
    let web_files = SidecarFiles::write(dir, "web", None, "workers: 2");
    web_files.set_mesh(&mesh(service, protocol, served.inbound));
    Road {
        web: web_files.start(),
        service: served,
        web_files,
    }
}

/// curl through the web's outbound, by the service's name.
fn curl(web: SocketAddr, options: &[&str]) -> Command {
    let mut command = tool("curl");
    command.args([
        "--silent",
        "--show-error",
        "--fail-with-body",
        "--max-time",
        "120",
    ]);
    command
        .args(["--connect-to", &format!("::{web}")])
        .args(options);
    command
}

#[test]
fn curl_and_h2load_reach_nginx_through_two_sidecars() {
    let dir = scratch();
    let nginx = Nginx::start(dir.path());
    let road = road(dir.path(), "orders", "http", nginx.addr);
    let web = road.web.outbound;
    let body: Vec<u8> = (0..1_500_000_u32)
        .map(|n| (n.wrapping_mul(n) % 251) as u8)
        .collect();
    let upload = dir.path().join("upload");
    std::fs::write(&upload, &body).unwrap();
    let data = format!("@{}", upload.display());
    let from = upload.display().to_string();
    let got = dir.path().join("got");
    let into = got.display().to_string();
    let code = "%{http_code} %{http_version}";
    for (protocol, version) in [("--http1.1", "1.1"), ("--http2-prior-knowledge", "2")] {
        let ask = |options: &[&str]| {
            let mut all = vec![protocol];
            all.extend_from_slice(options);
            run(&mut curl(web, &all))
        };
        assert_eq!(ask(&["http://orders/small"]), "hello\n");
        assert_eq!(ask(&["http://orders/10k"]).len(), 10_240);
        let put = ask(&["-T", &from, "-w", code, "http://orders/files/a"]);
        assert!(
            put.ends_with(&format!("20{} {version}", &put[2..3])),
            "PUT: {put}"
        );
        ask(&["-o", &into, "http://orders/files/a"]);
        assert!(
            std::fs::read(&got).unwrap() == body,
            "the file came back changed"
        );
        // Of unknown length, hence chunked where there are chunks.
        let chunked = ["-H", "Transfer-Encoding: chunked"];
        let framing: &[&str] = if version == "2" { &[] } else { &chunked };
        let put = ["-X", "PUT", "--data-binary", &data, "http://orders/files/b"];
        ask(&[framing, &put].concat());
        ask(&["-o", &into, "http://orders/files/b"]);
        assert!(
            std::fs::read(&got).unwrap() == body,
            "the chunked file came back changed"
        );
        let expect = [
            "-H",
            "Expect: 100-continue",
            "-T",
            &from,
            "http://orders/files/c",
        ];
        ask(&expect);
        let range = ask(&[
            "-r",
            "1000-1009",
            "-w",
            code,
            "-o",
            &into,
            "http://orders/files/a",
        ]);
        assert_eq!(range, format!("206 {version}"));
        assert_eq!(std::fs::read(&got).unwrap(), body[1000..1010]);
        let head = ask(&["-I", "http://orders/files/a"]).to_ascii_lowercase();
        assert!(head.contains("content-length: 1500000"), "HEAD: {head}");
        for file in ["a", "b", "c"] {
            let code = ask(&[
                "-X",
                "DELETE",
                "-w",
                code,
                &format!("http://orders/files/{file}"),
            ]);
            assert_eq!(code, format!("204 {version}"));
        }
        let gone = output(&mut curl(web, &[protocol, "-i", "http://orders/gone"]));
        let gone = printed(&gone).to_ascii_lowercase();
        assert!(gone.contains(" 410") && gone.contains("gone\n"), "{gone}");
        assert!(
            !gone.contains("outrigger-error"),
            "an upstream's own answer is not our error"
        );
        let unknown = output(&mut curl(web, &[protocol, "-i", "http://nobody/"]));
        let unknown = printed(&unknown).to_ascii_lowercase();
        assert!(unknown.contains("outrigger-error: no_route"), "{unknown}");
    }
    let mut total = 0;
    for path in ["http://orders/small", "http://orders/10k"] {
        total += h2load(web, path, &["--h1", "-n6000", "-c60", "-t1"]);
        total += h2load(web, path, &["-n6000", "-c6", "-m20", "-t1"]);
    }
    let counted = road
        .web
        .metric("outrigger_requests_total", &["status=\"200\"", "outbound"])
        .unwrap_or_default();
    assert!(
        counted >= total as f64,
        "{total} requests, but the metric says {counted}"
    );
    let inbound = road
        .service
        .metric("outrigger_requests_total", &["status=\"200\"", "inbound"])
        .unwrap_or_default();
    assert!(
        inbound >= total as f64,
        "{total} requests, but the metric says {inbound}"
    );
}

#[test]
fn grpcio_calls_in_every_way_through_two_sidecars() {
    let dir = scratch();
    let (_server, app) = grpc_server();
    let road = road(dir.path(), "inventory", "grpc", app);
    let mut client = python("grpc_client.py");
    client.arg(road.web.outbound.to_string()).arg("inventory");
    let report = run(&mut client);
    assert!(report.trim_end().ends_with(" calls, 0 failed"), "{report}");
}

#[test]
fn a_grpcio_health_server_decides_whether_its_endpoint_is_well() {
    let dir = scratch();
    let (server, app) = grpc_server();
    let files = SidecarFiles::write(dir.path(), "web", None, "");
    let check = |service: &str| {
        let health = format!(
            "\x20 health: {{grpc: {{service: {service}}}, interval: 50ms, timeout: 5s, \
             unhealthyAfter: 1, healthyAfter: 1}}\n"
        );
        files.set_mesh(&(mesh("inventory", "grpc", app) + &health));
    };
    check("outrigger.test.Echo");
    let web = files.start();
    // As people see it, and programs.
    let asked = |format: &str| {
        let admin = format!("http://{}", web.admin);
        printed(&output(command("outrigger").args([
            "endpoints",
            "--admin",
            &admin,
            "--output",
            format,
        ])))
    };
    let stands = |standing: &str, why: Option<&str>| {
        wait_until(standing, PATIENCE, || {
            let view: serde_json::Value = serde_json::from_str(&asked("json")).unwrap();
            let endpoint = &view["services"][0]["endpoints"][0];
            let checked = endpoint["lastCheck"].is_object();
            checked && endpoint["standing"] == standing && endpoint["why"].as_str() == why
        });
    };
    stands("available", None);
    server.signal("USR1");
    stands("unhealthy", Some("answered NOT_SERVING"));
    let table = asked("table");
    assert!(
        table.contains("unhealthy") && table.contains("answered NOT_SERVING"),
        "{table}"
    );
    server.signal("USR2");
    stands("available", None);
    check("nobody.Knows");
    stands("unhealthy", Some("answered NOT_FOUND"));
}

#[test]
fn a_gibibyte_each_way_needs_no_memory() {
    const GIB: u64 = 1 << 30;
    const ALLOWED: u64 = 32 << 20;
    let dir = scratch();
    let nginx = Nginx::start(dir.path());
    let sink = Sink::start();
    let sparse = std::fs::File::create(nginx.files.join("big")).unwrap();
    sparse.set_len(GIB).unwrap();
    // Not all zeros: what is at the end must come from the end.
    sparse.write_all_at(b"the end", GIB - 7).unwrap();
    let big = nginx.files.join("big").display().to_string();
    let down_dir = scratch();
    let up_dir = scratch();
    let down = road(down_dir.path(), "files", "http", nginx.addr);
    let up = road(up_dir.path(), "uploads", "http", sink.addr);
    for protocol in ["--http1.1", "--http2-prior-knowledge"] {
        let sidecars = [&down.web, &down.service, &up.web, &up.service];
        // The first request of a kind allocates what is kept.
        run(&mut curl(
            down.web.outbound,
            &[protocol, "http://files/small"],
        ));
        let before = sidecars.map(|sidecar| sidecar.process.memory("VmRSS"));
        let ask = [
            protocol,
            "-w",
            "%{http_code} %{size_download}",
            "-o",
            "/dev/null",
        ];
        let url = ["http://files/files/big"];
        let got = run(&mut curl(down.web.outbound, &[&ask[..], &url[..]].concat()));
        assert_eq!(got, format!("200 {GIB}"), "download with {protocol}");
        let already = sink.discarded();
        let put = [
            protocol,
            "-X",
            "POST",
            "-T",
            &big,
            "-w",
            "%{http_code}",
            "-o",
            "/dev/null",
        ];
        let url = ["http://uploads/discard"];
        let got = run(&mut curl(up.web.outbound, &[&put[..], &url[..]].concat()));
        assert_eq!(got, "200", "upload with {protocol}");
        assert_eq!(sink.discarded() - already, GIB, "upload with {protocol}");
        for (sidecar, before) in sidecars.iter().zip(before) {
            let peak = sidecar.process.memory("VmHWM");
            let grown = peak.saturating_sub(before);
            println!(
                "{protocol}: {} KiB more than {}",
                grown / 1024,
                before / 1024
            );
            assert!(
                grown < ALLOWED,
                "{protocol}: grew by {} KiB from {before}",
                grown / 1024
            );
        }
    }
}

/// Two loads at once, h1 and h2c, until `work` is done; gives how many requests there were.
fn under_load(web: SocketAddr, url: &str, work: impl FnOnce()) -> u64 {
    let stop = AtomicBool::new(false);
    /// Ends the load also when the work panics.
    struct Stop<'a>(&'a AtomicBool);
    impl Drop for Stop<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    std::thread::scope(|scope| {
        let h1 = scope.spawn(|| h2load_until(&stop, web, url, &["--h1", "-n2000", "-c20", "-t1"]));
        let h2 = scope.spawn(|| h2load_until(&stop, web, url, &["-n2000", "-c4", "-m8", "-t1"]));
        {
            let _stop = Stop(&stop);
            work();
        }
        h1.join().expect("every request succeeds") + h2.join().expect("every request succeeds")
    })
}

#[test]
fn a_mesh_file_is_edited_under_load() {
    let dir = scratch();
    let nginx = Nginx::start(dir.path());
    let road = road(dir.path(), "orders", "http", nginx.addr);
    let service = mesh("orders", "http", road.service.inbound);
    let requests = under_load(road.web.outbound, "http://orders/small", || {
        for version in 1..=10 {
            let before = road.web.config_version();
            road.web_files
                .set_mesh(&format!("{service}{}", route("orders", version)));
            wait_until("the edit is in force", PATIENCE, || {
                road.web.config_version() != before
            });
        }
        let good = road.web.config_version();
        let rejected = road.web.metric("outrigger_config_rejected_total", &[]);
        let broken = route("orders", 11).replace("timeouts", "timeuots");
        road.web_files.set_mesh(&format!("{service}{broken}"));
        assert!(rejected.is_some());
        wait_until("the broken edit is refused", PATIENCE, || {
            road.web.metric("outrigger_config_rejected_total", &[]) > rejected
        });
        assert_eq!(
            road.web.config_version(),
            good,
            "the last good config stays in force"
        );
        assert!(
            road.web.process.log().contains("timeuots"),
            "the log says what is wrong"
        );
    });
    assert!(requests >= 4000, "{requests} requests");
}

#[test]
fn a_control_plane_is_edited_broken_and_killed_under_load() {
    let dir = scratch();
    let nginx = Nginx::start(dir.path());
    let mut control_plane = ControlPlane::start(dir.path(), &mesh("orders", "http", nginx.addr));
    let source = Some(control_plane.discovery);
    let app = format!("app: \"{}\"", nginx.addr);
    let orders = SidecarFiles::write(dir.path(), "orders", source, &app).start();
    let web_files = SidecarFiles::write(dir.path(), "web", source, "");
    let mut web = web_files.start();
    let in_step = |control_plane: &ControlPlane| {
        wait_until("both sidecars run the newest config", PATIENCE, || {
            let listed = control_plane.api("/v1/proxies");
            let proxies = listed["proxies"].as_array().cloned().unwrap_or_default();
            let synced = |proxy: &serde_json::Value| {
                proxy["synced"] == true
                    && proxy["config"]["acknowledged"] == proxy["config"]["sent"]
            };
            proxies.len() == 2 && proxies.iter().all(synced)
        });
    };
    let edit = |control_plane: &ControlPlane, text: &str| {
        let before = (control_plane.config_version(), web.config_version());
        control_plane.set_mesh(text);
        wait_until("the edit is taken up", PATIENCE, || {
            control_plane.config_version() != before.0
        });
        wait_until("the edit is in force", PATIENCE, || {
            web.config_version() != before.1
        });
        in_step(control_plane);
    };
    let service = mesh("orders", "http", orders.inbound);
    edit(&control_plane, &service);

    let requests = under_load(web.outbound, "http://orders/small", || {
        for version in 1..=8 {
            edit(
                &control_plane,
                &format!("{service}{}", route("orders", version)),
            );
        }
    });
    assert!(requests >= 4000, "{requests} requests under edits");

    let good = control_plane.config_version();
    let broken = format!(
        "{service}{}",
        route("orders", 9).replace("timeouts", "timeuots")
    );
    let requests = under_load(web.outbound, "http://orders/small", || {
        control_plane.set_mesh(&broken);
        wait_until("the broken edit is reported", PATIENCE, || {
            !control_plane.api("/v1/config")["rejected"].is_null()
        });
    });
    assert!(
        requests >= 4000,
        "{requests} requests under the broken edit"
    );
    let said = control_plane.api("/v1/config")["rejected"].to_string();
    assert!(
        said.contains("timeuots") && said.contains("timeouts"),
        "{said}"
    );
    assert!(
        control_plane.process.log().contains("timeuots"),
        "the log says what is wrong"
    );
    assert_eq!(control_plane.config_version(), good);
    let line = 1 + broken
        .lines()
        .position(|line| line.contains("timeuots"))
        .unwrap();
    let checked = output(command("outrigger").arg("check").arg(&control_plane.mesh));
    let said = printed(&checked);
    let place = format!("mesh.yaml:{line}:5: error[");
    assert!(said.contains(&place), "no {place} in {said}");
    assert_eq!(checked.status.code(), Some(1), "{said}");

    let requests = under_load(web.outbound, "http://orders/small", || {
        control_plane.process.kill();
        wait_until("the sidecar notices", PATIENCE, || {
            web.metric("outrigger_control_plane_connected", &[]) == Some(0.0)
        });
    });
    assert!(
        requests >= 4000,
        "{requests} requests without a control plane"
    );

    let version = web.config_version();
    web.process.kill();
    drop(web);
    let web = web_files.start();
    assert_eq!(
        web.config_version(),
        version,
        "served from the last good config"
    );
    assert_eq!(
        run(&mut curl(web.outbound, &["http://orders/small"])),
        "hello\n"
    );
    h2load(
        web.outbound,
        "http://orders/small",
        &["-n2000", "-c4", "-m8", "-t1"],
    );
}
