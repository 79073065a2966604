//! Two control planes over a real etcd, and the loss of the one that leads.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use outrigger_tests::process::{
    ControlPlane, Nginx, PATIENCE, Process, SidecarFiles, free_port, h2load_until, http, now,
    scratch, tool, wait_until,
};
use serde_json::{Value, json};

const INSTANCES: &str = "/v1/services/default%2Freports/instances";

/// Longer than `removeAfter` of the service: whoever is not heard is gone.
const BEATS: u64 = 52;

struct Etcd {
    process: Process,
    port: u16,
}

impl Etcd {
    fn start(dir: &Path, port: u16) -> Self {
        let (client, peer) = (
            format!("http://127.0.0.1:{port}"),
            format!("http://127.0.0.1:{}", free_port()),
        );
        let mut command = tool("etcd");
        command
            .arg("--data-dir")
            .arg(dir.join("etcd"))
            .args(["--name", "one", "--initial-cluster", &format!("one={peer}")])
            .args(["--listen-client-urls", &client])
            .args(["--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer])
            .args(["--initial-advertise-peer-urls", &peer]);
        let process = Process::start("etcd", &mut command);
        let etcd = Self { process, port };
        let addr = SocketAddr::from(([127, 0, 0, 1], port));
        wait_until("etcd is healthy", PATIENCE, || {
            http::get(addr, "/health").is_ok_and(|answer| answer.text().contains("true"))
        });
        etcd
    }
}

fn mesh(sink: SocketAddr) -> String {
    format!(
        "apiVersion: outrigger.dev/v1alpha1\nkind: MeshService\nmetadata: {{name: orders}}\n\
         spec: {{discovery: {{static: [{{address: {}, port: {}}}]}}}}\n\
         ---\napiVersion: outrigger.dev/v1alpha1\nkind: MeshService\nmetadata: {{name: reports}}\n\
         spec: {{discovery: {{heartbeat: {{ttl: 6s, removeAfter: 12s}}}}}}\n",
        sink.ip(),
        sink.port()
    )
}

fn control_plane(dir: &Path, name: &str, mesh: &str, etcd: &Etcd) -> ControlPlane {
    let dir = dir.join(name);
    std::fs::create_dir_all(&dir).expect("the scratch directory is writable");
    let endpoint = format!("http://127.0.0.1:{}", etcd.port);
    let more =
        format!("replicas: {{name: {name}, lease: 10s, etcd: {{endpoints: [\"{endpoint}\"]}}}}");
    ControlPlane::start_with(&dir, mesh, &more)
}

fn leads(plane: &ControlPlane) -> bool {
    plane.api("/v1/replicas")["leads"] == true
}

fn ask(addr: SocketAddr, method: &str, path: &str, body: &str) -> Option<u16> {
    let mut client = http::Client::connect(addr).ok()?;
    let host = format!("Host: {addr}");
    let answer = client.send(method, path, &[&host], body.as_bytes());
    answer.ok().map(|answer| answer.status)
}

fn instances(plane: &ControlPlane) -> Vec<Value> {
    let view = plane.api(INSTANCES);
    view["endpoints"].as_array().cloned().unwrap_or_default()
}

fn serving(plane: &ControlPlane, ids: &[&str]) -> bool {
    let instances = instances(plane);
    instances.len() == ids.len()
        && instances
            .iter()
            .zip(ids)
            .all(|(i, id)| i["id"] == *id && i["state"] == "Serving")
}

/// What stands before several control planes: a connection goes to the first that accepts it.
fn balancer(to: Vec<SocketAddr>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let addr = listener.local_addr().expect("an address");
    std::thread::spawn(move || {
        for near in listener.incoming().flatten() {
            let far = to.iter().find_map(|addr| TcpStream::connect(addr).ok());
            let Some(far) = far else { continue };
            for (mut from, mut into) in [
                (near.try_clone(), far.try_clone()),
                (far.try_clone(), near.try_clone()),
            ]
            .into_iter()
            .filter_map(|(from, into)| Some((from.ok()?, into.ok()?)))
            {
                std::thread::spawn(move || {
                    let _ = std::io::copy(&mut from, &mut into);
                    let _ = into.shutdown(std::net::Shutdown::Both);
                });
            }
        }
    });
    addr
}

/// An instance that renews its lease at whoever takes it, four times a second.
struct Beating {
    stop: Arc<AtomicBool>,
    beats: Arc<AtomicU64>,
    refused: Arc<Mutex<Vec<u16>>>,
}

impl Beating {
    fn start(id: &'static str, at: Vec<SocketAddr>) -> Self {
        let beating = Self {
            stop: Arc::default(),
            beats: Arc::default(),
            refused: Arc::default(),
        };
        let (stop, beats) = (beating.stop.clone(), beating.beats.clone());
        let refused = beating.refused.clone();
        std::thread::spawn(move || {
            let path = format!("{INSTANCES}/{id}/heartbeat");
            while !stop.load(Ordering::Relaxed) {
                match at.iter().find_map(|addr| ask(*addr, "PUT", &path, "")) {
                    Some(204) => _ = beats.fetch_add(1, Ordering::Relaxed),
                    Some(status) => refused.lock().expect("no panic").push(status),
                    None => {}
                }
                std::thread::sleep(Duration::from_millis(250));
            }
        });
        beating
    }

    fn beats(&self) -> u64 {
        self.beats.load(Ordering::Relaxed)
    }
}

impl Drop for Beating {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

#[test]
fn the_leader_is_killed_and_nobody_notices() {
    let dir = scratch();
    let nginx = Nginx::start(dir.path());
    let etcd = Etcd::start(dir.path(), free_port());
    let mesh = mesh(nginx.addr);
    let mut one = control_plane(dir.path(), "one", &mesh, &etcd);
    wait_until("the first leads", PATIENCE, || leads(&one));
    let two = control_plane(dir.path(), "two", &mesh, &etcd);
    wait_until("the second follows", PATIENCE, || {
        two.api("/v1/replicas")["leader"]["name"] == "one"
    });
    // Two instances: each is told one of the two, and renews its lease there while it lives.
    let (port, address) = (nginx.addr.port(), nginx.addr.ip());
    for (id, plane) in [("r-1", &one), ("r-2", &two)] {
        let body = json!({"id": id, "address": address, "port": port}).to_string();
        assert_eq!(ask(plane.admin, "POST", INSTANCES, &body), Some(201));
    }
    let first = Beating::start("r-1", vec![one.admin, two.admin]);
    let second = Beating::start("r-2", vec![two.admin]);
    for plane in [&one, &two] {
        wait_until("both instances are known", PATIENCE, || {
            serving(plane, &["r-1", "r-2"])
        });
    }
    let before = balancer(vec![one.discovery, two.discovery]);
    let web = SidecarFiles::write(dir.path(), "web", Some(before), "").start();
    let other = SidecarFiles::write(dir.path(), "other", Some(two.discovery), "").start();
    assert_eq!(web.config_version(), other.config_version());

    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let load = |url| {
            let (stop, web) = (&stop, web.outbound);
            scope.spawn(move || h2load_until(stop, web, url, &["--h1", "-n500", "-c4", "-t1"]))
        };
        let loads = [load("http://orders/small"), load("http://reports/small")];
        /// Ends the load also when something below panics.
        struct Stop<'a>(&'a AtomicBool);
        impl Drop for Stop<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::Relaxed);
            }
        }
        let ending = Stop(&stop);
        one.process.kill();
        wait_until("the second leads", PATIENCE, || leads(&two));
        let beats = [first.beats(), second.beats()];
        wait_until("longer than removeAfter", 2 * PATIENCE, || {
            assert!(serving(&two, &["r-1", "r-2"]), "{:?}", instances(&two));
            first.beats() > beats[0] + BEATS && second.beats() > beats[1] + BEATS
        });
        wait_until("the sidecar is with the second", PATIENCE, || {
            let proxies = two.api("/v1/proxies");
            let proxies = proxies["proxies"].as_array().cloned().unwrap_or_default();
            proxies.len() == 2 && proxies.iter().all(|p| p["synced"] == true)
        });
        drop(ending);
        let requests: u64 = loads
            .into_iter()
            .map(|load| load.join().expect("every request succeeds"))
            .sum();
        assert!(requests >= 1000, "{requests} requests");
    });
    for beating in [&first, &second] {
        let refused = beating.refused.lock().expect("no panic");
        assert!(refused.is_empty(), "an instance was forgotten: {refused:?}");
    }
    // Whoever comes back follows.
    let one = control_plane(dir.path(), "one", &mesh, &etcd);
    wait_until("the first is back", PATIENCE, || {
        one.api("/v1/replicas")["leader"]["name"] == "two" && serving(&one, &["r-1", "r-2"])
    });
    // Who falls silent goes, and is gone everywhere.
    drop(second);
    for plane in [&one, &two] {
        wait_until("the silent one is gone", PATIENCE, || {
            serving(plane, &["r-1"])
        });
    }
}

#[test]
fn without_etcd_all_goes_on_and_what_was_told_meanwhile_is_not_lost() {
    let dir = scratch();
    let nginx = Nginx::start(dir.path());
    let mut etcd = Etcd::start(dir.path(), free_port());
    let mesh = mesh(nginx.addr);
    let one = control_plane(dir.path(), "one", &mesh, &etcd);
    let two = control_plane(dir.path(), "two", &mesh, &etcd);
    wait_until("one of them leads", PATIENCE, || leads(&one) != leads(&two));
    // Each renews its lease where it was registered.
    let register = |plane: &ControlPlane, id: &'static str| {
        let body = json!({"id": id, "address": "127.0.0.1", "port": 9100}).to_string();
        assert_eq!(ask(plane.admin, "POST", INSTANCES, &body), Some(201));
        Beating::start(id, vec![plane.admin])
    };
    let first = register(&one, "r-1");
    wait_until("it is known", PATIENCE, || serving(&two, &["r-1"]));
    etcd.process.kill();
    for plane in [&one, &two] {
        wait_until("the loss is seen, and nobody leads", PATIENCE, || {
            let view = plane.api("/v1/replicas");
            view["connected"] == false && view["problem"].is_string() && view["leads"] == false
        });
    }
    let _second = register(&one, "r-2");
    let _third = register(&two, "r-3");
    let beats = first.beats();
    wait_until("longer than a ttl", PATIENCE, || {
        // The second does not hear the first instance, and does not hold it against it.
        assert!(serving(&one, &["r-1", "r-2"]), "{:?}", instances(&one));
        assert!(serving(&two, &["r-1", "r-3"]), "{:?}", instances(&two));
        first.beats() > beats + 28
    });
    let _etcd = Etcd::start(dir.path(), etcd.port);
    let all = ["r-1", "r-2", "r-3"];
    let end = now() + 2 * PATIENCE;
    while !serving(&one, &all) || !serving(&two, &all) {
        let views = [&one, &two].map(|plane| (instances(plane), plane.process.log()));
        assert!(now() < end, "not all is known: {views:#?}");
        std::thread::sleep(Duration::from_millis(100));
    }
    wait_until("one of them leads again", PATIENCE, || {
        leads(&one) != leads(&two)
    });
}
