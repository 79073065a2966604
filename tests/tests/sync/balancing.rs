//! Which endpoint takes a request: latency, weights, keys, zones, tiers, subsets, slow start.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Duration;

use futures_util::future::join_all;
use outrigger_tests::client::{Answer, Ask, Client};
use outrigger_tests::mesh::{Edited, Sidecar, document, route, service};
use outrigger_tests::until;
use outrigger_tests::upstream::{Reply, Seen, Upstream};
use serde_json::json;

/// A service that answers with its name.
async fn named(name: &'static str) -> Upstream {
    Upstream::h1(move |_| Reply::ok(name)).await
}

/// A service whose endpoints are written out, each in YAML's flow style without its address.
fn orders(endpoints: &[(&Upstream, &str)], more: &str) -> String {
    let list: Vec<String> = endpoints
        .iter()
        .map(|(upstream, facts)| endpoint(upstream.addr, facts))
        .collect();
    let discovery = format!("discovery: {{static: [{}]}}\n{more}", list.join(", "));
    document("MeshService", "orders", &discovery)
}

fn endpoint(addr: SocketAddr, facts: &str) -> String {
    let comma = if facts.is_empty() { "" } else { ", " };
    format!(
        "{{address: {}, port: {}{comma}{facts}}}",
        addr.ip(),
        addr.port()
    )
}

/// Calls `count` times, one after another; every call must succeed.
async fn call(sidecar: &Sidecar, count: usize) {
    let mut client = Client::h1(sidecar.outbound()).await;
    for _ in 0..count {
        let answer = client.call(Ask::get("orders", "/")).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
    }
}

async fn with_user(sidecar: &Sidecar, user: usize) -> Answer {
    let ask = Ask::get("orders", "/").header("x-user", &user.to_string());
    sidecar.call(ask).await
}

#[tokio::test]
async fn one_of_three_that_is_ten_times_slower_gets_under_fifteen_percent() {
    let delayed =
        |millis| Upstream::h1(move |_| Reply::ok("").delay(Duration::from_millis(millis)));
    let (fast, also_fast, slow) = (delayed(10).await, delayed(10).await, delayed(100).await);
    let endpoints = [fast.addr, also_fast.addr, slow.addr];
    let sidecar = Sidecar::start(service("orders", &endpoints, "")).await;
    join_all((0..8).map(|_| call(&sidecar, 50))).await;
    let all = fast.hits() + also_fast.hits() + slow.hits();
    assert_eq!(all, 400);
    assert!(slow.hits() * 100 < all * 15, "{} of {all}", slow.hits());
}

#[tokio::test]
async fn weights_share_the_requests_of_a_round_robin() {
    let (heavy, light) = (named("heavy").await, named("light").await);
    let endpoints = [(&heavy, "weight: 300"), (&light, "weight: 100")];
    let more = "loadBalancer: {algorithm: RoundRobin}";
    let sidecar = Sidecar::start(orders(&endpoints, more)).await;
    call(&sidecar, 200).await;
    assert!((25..80).contains(&light.hits()), "{}", light.hits());
}

#[tokio::test]
async fn a_key_stays_with_its_endpoint_and_moves_only_when_that_is_gone() {
    let all = [named("a").await, named("b").await, named("c").await];
    let addrs = all.each_ref().map(|upstream| upstream.addr);
    let more = "loadBalancer: {algorithm: ConsistentHash, hashKey: header:x-user}";
    let sidecar = Sidecar::start(service("orders", &addrs, more)).await;
    let mut owners = Vec::new();
    for user in 0..30 {
        let owner = with_user(&sidecar, user).await.text();
        assert_eq!(with_user(&sidecar, user).await.text(), owner);
        owners.push(owner);
    }
    let seen: BTreeSet<&String> = owners.iter().collect();
    assert_eq!(seen.len(), 3, "{owners:?}");
    let without_c = service("orders", &addrs[..2], more);
    assert_eq!(sidecar.edit(&without_c).await, Edited::Applied);
    for (user, owner) in owners.iter().enumerate() {
        let now = with_user(&sidecar, user).await.text();
        assert!(now == *owner || owner == "c", "{user}: {owner} → {now}");
    }
    // Another sidecar agrees.
    let other = Sidecar::start(service("orders", &addrs, more)).await;
    for (user, owner) in owners.iter().enumerate() {
        assert_eq!(with_user(&other, user).await.text(), *owner);
    }
}

#[tokio::test]
async fn a_caller_without_a_session_cookie_gets_one_that_brings_it_back() {
    let all = [named("a").await, named("b").await, named("c").await];
    let addrs = all.each_ref().map(|upstream| upstream.addr);
    let more = "loadBalancer: {algorithm: ConsistentHash, hashKey: cookie:sid, \
                sessionCookie: {ttl: 1h, path: /shop}}";
    let sidecar = Sidecar::start(service("orders", &addrs, more)).await;
    let mut seen = BTreeSet::new();
    for _ in 0..20 {
        let first = sidecar.get("orders", "/").await;
        let set = first.header("set-cookie").to_owned();
        assert!(
            set.ends_with("; Path=/shop; Max-Age=3600; HttpOnly"),
            "{set}"
        );
        let cookie = set.split(';').next().expect("a pair");
        for _ in 0..3 {
            let ask = Ask::get("orders", "/").header("cookie", &format!("x=1; {cookie}"));
            let again = sidecar.call(ask).await;
            assert_eq!(again.text(), first.text());
            assert_eq!(again.header("set-cookie"), "", "it has one");
        }
        seen.insert(first.text());
    }
    assert_eq!(seen.len(), 3);
}

#[tokio::test]
async fn callers_behind_the_application_are_told_apart_by_forwarded_for() {
    let all = [named("a").await, named("b").await, named("c").await];
    let addrs = all.each_ref().map(|upstream| upstream.addr);
    let more = "loadBalancer: {algorithm: ConsistentHash}";
    let sidecar = Sidecar::start(service("orders", &addrs, more)).await;
    let mut seen = BTreeSet::new();
    for n in 0..20 {
        let from = || Ask::get("orders", "/").header("x-forwarded-for", &format!("192.0.2.{n}"));
        let first = sidecar.call(from()).await.text();
        assert_eq!(sidecar.call(from()).await.text(), first);
        seen.insert(first);
    }
    assert_eq!(seen.len(), 3);
    let own = sidecar.get("orders", "/").await.text();
    for _ in 0..5 {
        assert_eq!(sidecar.get("orders", "/").await.text(), own);
    }
}

#[tokio::test]
async fn our_zone_is_preferred_and_spills_over_when_under_seventy_percent_are_healthy() {
    let near = [
        named("near").await,
        named("near").await,
        named("near").await,
    ];
    let far = named("far").await;
    let endpoints = [
        (&near[0], "zone: a"),
        (&near[1], "zone: a"),
        (&near[2], "zone: a"),
        (&far, "zone: b"),
    ];
    let more = "loadBalancer: {algorithm: RoundRobin}\n\
                ejection: {consecutiveFailures: 2, baseTime: 30s, maxTime: 30s, maxPercent: 50}";
    let sidecar = Sidecar::named("web-1")
        .set("workload", json!({"name": "web-1", "zone": "a"}))
        .mesh(orders(&endpoints, more))
        .start()
        .await;
    call(&sidecar, 60).await;
    assert_eq!(far.hits(), 0);
    near[0].script(|_| Reply::status(500));
    until("the far zone is asked", || async {
        sidecar.get("orders", "/").await;
        (far.hits() > 0).then_some(())
    })
    .await;
    let (before, sick) = (far.hits(), near[0].hits());
    call(&sidecar, 60).await;
    assert_eq!(near[0].hits(), sick, "it is ejected");
    let share = far.hits() - before;
    assert!((15..=25).contains(&share), "one of three: {share}");
}

#[tokio::test]
async fn a_new_endpoint_warms_up() {
    let (old, new) = (named("old").await, named("new").await);
    // Not PeakEwma, which prefers whoever happens to be faster by a little.
    let more = |warmup| format!("loadBalancer: {{algorithm: RoundRobin, warmup: {warmup}}}");
    let sidecar = Sidecar::start(orders(&[(&old, "")], &more("1h"))).await;
    call(&sidecar, 20).await;
    let both = [(&old, ""), (&new, "")];
    let edit = orders(&both, &more("1h"));
    assert_eq!(sidecar.edit(&edit).await, Edited::Applied);
    call(&sidecar, 200).await;
    let early = new.hits();
    assert!(
        (1..70).contains(&early),
        "a tenth to begin with: {early} of 200"
    );
    let edit = orders(&both, &more("0s"));
    assert_eq!(sidecar.edit(&edit).await, Edited::Applied);
    call(&sidecar, 200).await;
    let share = new.hits() - early;
    assert!(share > 50, "then its whole share: {share} of 200");
}

#[tokio::test]
async fn the_standby_tier_takes_over_when_the_first_is_down_and_gives_back() {
    let (mut first, standby) = (named("first").await, named("standby").await);
    let endpoints = [(&first, "priority: 0"), (&standby, "priority: 1")];
    let more = "ejection: {consecutiveFailures: 2, baseTime: 200ms, maxTime: 200ms}";
    let sidecar = Sidecar::start(orders(&endpoints, more)).await;
    call(&sidecar, 30).await;
    assert_eq!((first.hits(), standby.hits()), (30, 0));
    first.stop().await;
    call(&sidecar, 30).await;
    assert_eq!(standby.hits(), 30, "no call failed");
    let view = sidecar.view("/endpoints").await;
    assert_eq!(view["services"][0]["endpoints"][1]["priority"], 1, "{view}");
    first.start_again().await;
    until("the first takes the calls again", || async {
        (sidecar.get("orders", "/").await.text() == "first").then_some(())
    })
    .await;
    let before = standby.hits();
    call(&sidecar, 30).await;
    assert_eq!(standby.hits(), before);
}

#[tokio::test]
async fn below_the_panic_threshold_health_is_ignored_and_that_is_seen() {
    let (good, bad) = (named("good").await, named("bad").await);
    bad.script(|_| Reply::status(500));
    let more = "loadBalancer: {algorithm: RoundRobin, panicThreshold: 60}\n\
                ejection: {consecutiveFailures: 2, baseTime: 30s, maxTime: 30s}";
    let sidecar = Sidecar::start(orders(&[(&good, ""), (&bad, "")], more)).await;
    let service = [("service", "default/orders")];
    assert_eq!(
        sidecar
            .metrics()
            .await
            .sum("outrigger_balancer_panic", &service),
        0.0
    );
    until("the balancer is in panic", || async {
        sidecar.get("orders", "/").await;
        let metrics = sidecar.metrics().await;
        (metrics.sum("outrigger_balancer_panic", &service) == 1.0).then_some(())
    })
    .await;
    let view = sidecar.view("/endpoints").await;
    assert_eq!(view["services"][0]["panic"], true, "{view}");
    bad.script(|_| Reply::ok("bad"));
    let before = bad.hits();
    call(&sidecar, 40).await;
    assert!(bad.hits() - before >= 15, "{}", bad.hits() - before);
    let picks = sidecar
        .metrics()
        .await
        .sum("outrigger_panic_picks_total", &service);
    assert!(picks >= 40.0, "{picks}");
    // Without a threshold half of the endpoints are enough.
    let calm = more.replace(", panicThreshold: 60", "");
    let edit = orders(&[(&good, ""), (&bad, "")], &calm);
    assert_eq!(sidecar.edit(&edit).await, Edited::Applied);
    let before = bad.hits();
    call(&sidecar, 20).await;
    assert_eq!(
        bad.hits(),
        before,
        "ejected, and a reload has not forgotten it"
    );
    let metrics = sidecar.metrics().await;
    assert_eq!(metrics.sum("outrigger_balancer_panic", &service), 0.0);
}

#[tokio::test]
async fn a_backend_with_labels_takes_only_the_endpoints_that_carry_them() {
    let (one, two) = (named("v1").await, named("v2").await);
    let endpoints = [
        (&one, "labels: {version: v1}"),
        (&two, "labels: {version: v2, ring: canary}"),
    ];
    let rules = [
        "{name: canary, matches: [{headers: [{name: x-canary, value: \"1\"}]}], \
         backends: [{service: orders, labels: {version: v2}}]}",
        "{name: nowhere, matches: [{path: {value: /v3}}], \
         backends: [{service: orders, labels: {version: v3}}]}",
        "{name: split, matches: [{path: {value: /split}}], \
         backends: [{service: orders, weight: 80, labels: {version: v1}}, \
         {service: orders, weight: 20, labels: {version: v2}}]}",
        "{name: stable, backends: [{service: orders, labels: {version: v1}}]}",
    ];
    let yaml = orders(&endpoints, "") + &route("orders", &rules);
    let sidecar = Sidecar::start(yaml).await;
    for _ in 0..10 {
        assert_eq!(sidecar.get("orders", "/").await.text(), "v1");
        let canary = Ask::get("orders", "/").header("x-canary", "1");
        assert_eq!(sidecar.call(canary).await.text(), "v2");
    }
    sidecar
        .get("orders", "/v3")
        .await
        .assert_error(503, "no_endpoints");
    let mut canaries = 0;
    for _ in 0..100 {
        canaries += usize::from(sidecar.get("orders", "/split").await.text() == "v2");
    }
    assert!((5..45).contains(&canaries), "{canaries} of 100");
}

#[tokio::test]
async fn a_subset_keeps_to_its_endpoints_when_they_change() {
    let (one, two, three) = (named("v1").await, named("v2").await, named("v2b").await);
    let rule = "{name: all, backends: [{service: orders, labels: {version: v2}}]}";
    let yaml = |endpoints: &[(&Upstream, &str)]| orders(endpoints, "") + &route("orders", &[rule]);
    let before = [
        (&one, "labels: {version: v1}"),
        (&two, "labels: {version: v2}"),
    ];
    let sidecar = Sidecar::start(yaml(&before)).await;
    assert_eq!(sidecar.get("orders", "/").await.text(), "v2");
    let after = [
        (&one, "labels: {version: v1}"),
        (&two, "labels: {version: v1}"),
        (&three, "labels: {version: v2}"),
    ];
    assert_eq!(sidecar.edit(&yaml(&after)).await, Edited::Applied);
    for _ in 0..10 {
        assert_eq!(sidecar.get("orders", "/").await.text(), "v2b");
    }
}

#[tokio::test]
async fn a_retry_tries_the_rest_of_our_zone_first_and_another_zone_last() {
    let failing = async || Upstream::h1(|_| Reply::status(503)).await;
    let near = [failing().await, failing().await];
    let far = named("far").await;
    let endpoints = [
        (&near[0], "zone: a"),
        (&near[1], "zone: a"),
        (&far, "zone: b"),
    ];
    let more = "ejection: {consecutiveFailures: 0}\nbreaker: {failureRate: {percent: 0}}";
    let rule = "{retry: {attempts: 2, budget: {percent: 100, minPerSecond: 100}}}";
    let sidecar = Sidecar::named("web-1")
        .set("workload", json!({"name": "web-1", "zone": "a"}))
        .mesh(orders(&endpoints, more) + &route("orders", &[rule]))
        .start()
        .await;
    for n in 1..=10 {
        assert_eq!(sidecar.get("orders", "/").await.text(), "far");
        assert_eq!((near[0].hits(), near[1].hits(), far.hits()), (n, n, n));
    }
    let seen = far.seen();
    let last = |seen: &Seen| seen.header("outrigger-attempt") == "3";
    assert!(seen.iter().all(last), "{seen:?}");
}
