//! `discovery.eureka` against a real Eureka server, that of Spring Cloud Netflix.

use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use outrigger_tests::mesh::Sidecar;
use outrigger_tests::process::{Process, free_port, target_dir, wait_until};
use outrigger_tests::upstream::{Reply, Upstream, nobody};
use outrigger_tests::{client, until};
use serde_json::{Value, json};

use super::{known, knows, service, tell};

const ORDERS: &str = "/eureka/apps/ORDERS";

/// The server that `tests/run` puts together from Maven Central.
async fn eureka() -> (Process, SocketAddr) {
    let home = target_dir().join("eureka");
    assert!(
        home.join("classes/eureka/Server.class").is_file(),
        "{} has no Eureka server: run `tests/run --install`",
        home.display()
    );
    let port = free_port();
    let mut command = Command::new("java");
    command
        .current_dir(&home)
        .args([
            "-Xmx256m",
            "-XX:TieredStopAtLevel=1",
            "-cp",
            "classes:lib/*",
        ])
        .arg("eureka.Server")
        .arg(format!("--server.port={port}"))
        .arg("--server.address=127.0.0.1")
        .args([
            "--eureka.client.register-with-eureka=false",
            "--eureka.client.fetch-registry=false",
            "--eureka.server.enable-self-preservation=false",
            "--eureka.server.use-read-only-response-cache=false",
        ]);
    let mut process = Process::start("eureka", &mut command);
    // A Java server takes its time, the more the fewer processors it gets.
    wait_until("Eureka has started", Duration::from_secs(240), || {
        assert!(process.is_running(), "{}", process.log());
        process.log().contains("Started Server")
    });
    let addr = SocketAddr::from(([127, 0, 0, 1], port));
    until("Eureka serves its API", || async {
        let ask = client::Ask::get(&addr.to_string(), "/eureka/apps");
        let answer = client::try_call(addr, ask).await.ok()?;
        (answer.status == 200).then_some(())
    })
    .await;
    (process, addr)
}

fn instance(id: &str, upstream: &Upstream, status: &str) -> Value {
    json!({"instance": {
        "instanceId": id, "hostName": "127.0.0.1", "app": "ORDERS", "ipAddr": "127.0.0.1",
        "vipAddress": "orders", "status": status,
        "port": {"$": upstream.addr.port(), "@enabled": "true"},
        "securePort": {"$": 443, "@enabled": "false"},
        "dataCenterInfo": {
            "@class": "com.netflix.appinfo.InstanceInfo$DefaultDataCenterInfo", "name": "MyOwn"
        },
        "leaseInfo": {"renewalIntervalInSecs": 30, "durationInSecs": 300},
        "metadata": {"zone": "eu-1a", "track": "stable"},
    }})
}

#[tokio::test]
async fn instances_of_a_real_eureka_come_go_down_and_out_of_service() {
    let upstreams = [
        Upstream::h1(|_| Reply::ok("one")).await,
        Upstream::h1(|_| Reply::ok("two")).await,
        Upstream::h1(|_| Reply::ok("three")).await,
    ];
    let [one, two, three] = &upstreams;
    let (_server, addr) = eureka().await;
    let apps = ORDERS;
    tell(addr, "POST", apps, &instance("a", one, "UP")).await;
    // The first of the servers is away; one instance makes a list that is none in JSON.
    let away = nobody().await;
    let discovery = format!(
        "{{eureka: {{urls: [\"http://{away}/eureka\", \"http://{addr}/eureka/\"], refresh: 100ms}}}}"
    );
    let sidecar = Sidecar::start(service("orders", &discovery)).await;
    knows(&sidecar, "default/orders", &[one.addr]).await;
    let view = sidecar.view("/endpoints").await;
    let endpoint = &view["services"][0]["endpoints"][0];
    assert_eq!(
        (&endpoint["zone"], &endpoint["labels"]["track"]),
        (&json!("eu-1a"), &json!("stable"))
    );
    // What follows arrives by deltas.
    tell(addr, "POST", apps, &instance("b", two, "UP")).await;
    tell(addr, "POST", apps, &instance("c", three, "UP")).await;
    knows(
        &sidecar,
        "default/orders",
        &[one.addr, two.addr, three.addr],
    )
    .await;
    let is = |upstream: &Upstream, state: &str| (upstream.addr.to_string(), state.to_owned());

    tell(
        addr,
        "PUT",
        &format!("{apps}/a/status?value=OUT_OF_SERVICE"),
        &json!({}),
    )
    .await;
    until("the first drains", || async {
        let known = known(&sidecar, "default/orders").await;
        known.contains(&is(one, "Draining")).then_some(())
    })
    .await;
    tell(addr, "POST", apps, &instance("b", two, "DOWN")).await;
    until("the second is down", || async {
        let known = known(&sidecar, "default/orders").await;
        known.contains(&is(two, "Disabled")).then_some(())
    })
    .await;
    for _ in 0..6 {
        assert_eq!(sidecar.get("orders", "/").await.text(), "three");
    }
    tell(
        addr,
        "DELETE",
        &format!("{apps}/a/status?value=UP"),
        &json!({}),
    )
    .await;
    tell(addr, "DELETE", &format!("{apps}/b"), &json!({})).await;
    knows(&sidecar, "default/orders", &[one.addr, three.addr]).await;
}

#[tokio::test]
async fn a_eureka_that_dies_takes_nothing_with_it_and_another_takes_over() {
    let upstream = Upstream::h1(|_| Reply::ok("here")).await;
    let more = Upstream::h1(|_| Reply::ok("there")).await;
    let (mut first, addr) = eureka().await;
    // One that has just begun and has never heard of anybody, and that serves no deltas.
    let second = Upstream::h1(|seen| match seen.path.as_str() {
        "/apps/" => Reply::ok(r#"{"applications": {"apps__hashcode": "", "application": []}}"#),
        _ => Reply::status(403),
    })
    .await;
    tell(addr, "POST", ORDERS, &instance("a", &upstream, "UP")).await;
    let urls = format!("[\"http://{addr}/eureka\", \"http://{}\"]", second.addr);
    let discovery = format!("{{eureka: {{urls: {urls}, refresh: 100ms}}}}");
    let sidecar = Sidecar::start(service("orders", &discovery)).await;
    knows(&sidecar, "default/orders", &[upstream.addr]).await;
    first.kill();
    until("the other one is asked", || async {
        (second.hits() >= 3).then_some(())
    })
    .await;
    assert_eq!(sidecar.get("orders", "/").await.text(), "here");
    // What it hears of is taken at once; what it has not heard of is kept for a while.
    let port = more.addr.port();
    second.script(move |seen| match seen.path.as_str() {
        "/apps/" => Reply::ok(
            json!({"applications": {"application": {"name": "orders", "instance": {
                "instanceId": "b", "ipAddr": "127.0.0.1", "port": port, "status": "UP"
            }}}})
            .to_string(),
        ),
        _ => Reply::status(403),
    });
    knows(&sidecar, "default/orders", &[upstream.addr, more.addr]).await;
}
