//! Weighted backends by a key.

use outrigger_tests::client::Ask;
use outrigger_tests::mesh::{Edited, Sidecar, route, service};
use outrigger_tests::upstream::{Reply, Upstream};

fn mesh(stable: &Upstream, canary: &Upstream, weights: [u32; 2], key: &str) -> String {
    let [first, second] = weights;
    service("orders", &[stable.addr], "")
        + &service("orders-v2", &[canary.addr], "")
        + &route(
            "orders",
            &[&format!(
                "{{backends: [{{service: orders, weight: {first}}}, {{service: orders-v2, weight: {second}}}]{key}}}"
            )],
        )
}

/// Who answers each of forty users.
async fn sides(sidecar: &Sidecar, cookie: bool) -> Vec<String> {
    let mut sides = Vec::new();
    for user in 0..40 {
        let ask = Ask::get("orders", "/");
        let ask = match cookie {
            true => ask.header("cookie", &format!("a=b; user={user}; c=d")),
            false => ask.header("x-user", &format!("{user}")),
        };
        sides.push(sidecar.call(ask).await.text());
    }
    sides
}

#[tokio::test]
async fn a_caller_stays_with_its_backend_and_a_growing_canary_keeps_its_callers() {
    let stable = Upstream::h1(|_| Reply::ok("v1")).await;
    let canary = Upstream::h1(|_| Reply::ok("v2")).await;
    let key = ", splitKey: 'header:x-user'";
    let sidecar = Sidecar::start(mesh(&stable, &canary, [70, 30], key)).await;
    let first = sides(&sidecar, false).await;
    assert!(first.contains(&"v1".to_owned()) && first.contains(&"v2".to_owned()));
    assert_eq!(first, sides(&sidecar, false).await, "the same again");
    let by_cookie = ", splitKey: 'cookie:user'";
    let other = Sidecar::start(mesh(&stable, &canary, [70, 30], by_cookie)).await;
    assert_eq!(first, sides(&other, true).await, "from another sidecar");
    let grown = mesh(&stable, &canary, [40, 60], key);
    assert_eq!(sidecar.edit(&grown).await, Edited::Applied);
    for (before, after) in first.iter().zip(sides(&sidecar, false).await) {
        assert!(before == "v1" || after == "v2");
    }
}
