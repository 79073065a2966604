//! A config that some sidecars try first, with real ones, of which one cannot take it.

use std::net::SocketAddr;

use outrigger_tests::mesh::{Plane, Sidecar, service};
use outrigger_tests::until;
use outrigger_tests::upstream::{Reply, Upstream};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

/// What the way to the canary spoils.
const MARK: &[u8] = b"maxInFlight";

/// A way to the control plane on which one key is spoilt: the sidecar behind it is as one of another
/// version, which does not take what the others take.
async fn spoiling(to: SocketAddr) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let addr = listener.local_addr().expect("an address");
    tokio::spawn(async move {
        while let Ok((near, _)) = listener.accept().await {
            tokio::spawn(async move {
                let far = TcpStream::connect(to).await?;
                let (mut from_far, mut to_far) = far.into_split();
                let (mut from_near, mut to_near) = near.into_split();
                let up = async move { tokio::io::copy(&mut from_near, &mut to_far).await };
                let down = async move {
                    let mut held = Vec::new();
                    let mut buffer = [0; 4096];
                    loop {
                        let n = from_far.read(&mut buffer).await?;
                        if n == 0 {
                            return to_near.write_all(&held).await;
                        }
                        held.extend_from_slice(&buffer[..n]);
                        while let Some(at) = held.windows(MARK.len()).position(|w| w == MARK) {
                            held[at] = b'M';
                        }
                        // What may be the beginning of the mark waits for the rest.
                        let begins = |n: &usize| held.ends_with(&MARK[..*n]);
                        let kept = (1..MARK.len()).rev().find(begins).unwrap_or(0);
                        let rest = held.split_off(held.len() - kept);
                        to_near.write_all(&held).await?;
                        held = rest;
                    }
                };
                tokio::select! {
                    up = up => up.map(|_| ()),
                    down = down => down,
                }
            });
        }
    });
    addr
}

async fn sidecar(name: &str, discovery: SocketAddr, track: &str) -> Sidecar {
    let workload = json!({"name": name, "labels": {"track": track}});
    let sidecar = Sidecar::named(name).plane(discovery);
    sidecar.set("workload", workload).start().await
}

async fn plane(bake: &str, files: &[(&str, String)]) -> Plane {
    let canary = json!({"labels": {"track": "canary"}, "bake": bake});
    Plane::set(files, "rollout", json!({ "canary": canary })).await
}

async fn version(sidecar: &Sidecar) -> Value {
    sidecar.view("/config").await["version"].clone()
}

#[tokio::test]
async fn a_canary_that_refuses_a_config_keeps_it_from_the_others() {
    let upstream = Upstream::h1(|_| Reply::ok("good")).await;
    let old = service("orders", &[upstream.addr], "");
    let plane = plane("1h", &[("orders.yaml", old)]).await;
    let spoilt = spoiling(plane.discovery()).await;
    let canary = sidecar("canary-1", spoilt, "canary").await;
    let others = [
        sidecar("web-1", plane.discovery(), "stable").await,
        sidecar("web-2", plane.discovery(), "stable").await,
    ];
    let before = version(&canary).await;
    let new = service("orders", &[upstream.addr], "limits: {maxInFlight: 7}");
    plane.write("orders.yaml", &new);
    let view = plane
        .view_until("/v1/rollouts", |view| !view["stopped"].is_null())
        .await;
    assert_eq!(view["stopped"]["sidecar"], "default/canary-1", "{view}");
    let reason = view["stopped"]["reason"].as_str().expect("a text");
    assert!(reason.contains("MeshService/default/orders"), "{reason}");
    assert_eq!(view["version"], before);
    // All three, the canary too, run what they had, and say so.
    let view = plane
        .view_until("/v1/rollouts", |view| view["proxies"]["synced"] == 3)
        .await;
    assert_eq!(view["proxies"]["refused"], 0, "{view}");
    for sidecar in others.iter().chain([&canary]) {
        assert_eq!(version(sidecar).await, before);
        assert_eq!(sidecar.get("orders", "/").await.text(), "good");
    }
    // Nobody but the canary was ever sent the other one.
    for sidecar in &others {
        assert_eq!(sidecar.view("/config").await["generation"], 1);
    }
    // The next edit is tried, too, and taken.
    let next = service("orders", &[upstream.addr], "limits: {maxPending: 7}");
    plane.write("orders.yaml", &next);
    until("the canary runs the next one", || async {
        (version(&canary).await != before).then_some(())
    })
    .await;
    assert_eq!(version(&others[0]).await, before);
    let answer = plane.ask("POST", "/v1/rollouts/promote", "").await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    for sidecar in &others {
        until("the others run it", || async {
            (version(sidecar).await == version(&canary).await).then_some(())
        })
        .await;
    }
}

#[tokio::test]
async fn a_config_that_the_canary_runs_reaches_the_others() {
    let upstream = Upstream::h1(|_| Reply::ok("good")).await;
    let old = service("orders", &[upstream.addr], "");
    let plane = plane("500ms", &[("orders.yaml", old)]).await;
    let canary = sidecar("canary-1", plane.discovery(), "canary").await;
    let other = sidecar("web-1", plane.discovery(), "stable").await;
    let before = version(&canary).await;
    let new = service("orders", &[upstream.addr], "limits: {maxInFlight: 7}");
    plane.write("orders.yaml", &new);
    until("both run it", || async {
        let (of_other, of_canary) = (version(&other).await, version(&canary).await);
        assert!(
            of_canary != before || of_other == before,
            "the other one runs it and the canary does not"
        );
        (of_other != before).then_some(())
    })
    .await;
    assert_eq!(version(&canary).await, version(&other).await);
    let view = plane.ask("GET", "/v1/rollouts", "").await.json();
    assert!(
        view["onTrial"].is_null() && view["stopped"].is_null(),
        "{view}"
    );
    let metrics = plane.ask("GET", "/metrics", "").await.text();
    let line = "outrigger_control_plane_rollouts_total{outcome=\"promoted\"} 1\n";
    assert!(metrics.contains(line), "{metrics}");
}
