//! Answers that are kept and said again.

use std::time::Duration;

use outrigger_tests::client::{Ask, Client};
use outrigger_tests::mesh::{Sidecar, document, route, service, service_h2};
use outrigger_tests::until_true;
use outrigger_tests::upstream::{Gate, Reply, Seen, Upstream};
use serde_json::json;

fn fresh(body: &'static str) -> Reply {
    Reply::ok(body).header("cache-control", "max-age=600")
}

async fn sidecar(upstream: &Upstream, more: &str, rule: &str) -> Sidecar {
    Sidecar::start(service("orders", &[upstream.addr], more) + &route("orders", &[rule])).await
}

const CACHE: &str = "{cache: {}}";

#[tokio::test]
async fn a_fresh_answer_is_said_again_with_its_age() {
    let upstream = Upstream::h1(|_| {
        fresh("kept")
            .header("age", "7")
            .header("link", "a")
            .header("link", "b")
    })
    .await;
    let sidecar = sidecar(&upstream, "", CACHE).await;
    let first = sidecar.get("orders", "/a?q=1").await;
    let status = "outrigger; fwd=uri-miss; stored";
    assert_eq!(first.header("cache-status"), status);
    let again = sidecar.get("orders", "/a?q=1").await;
    assert_eq!((again.status, again.text().as_str()), (200, "kept"));
    let age: u64 = again.header("age").parse().unwrap();
    assert!((7..60).contains(&age), "{age}");
    let status = again.header("cache-status");
    assert!(status.starts_with("outrigger; hit; ttl=5"), "{status}");
    assert_eq!(again.headers.get_all("link").iter().count(), 2);
    // The head alone comes from it as well, and another target does not.
    let head = sidecar.call(Ask::new("HEAD", "orders", "/a?q=1")).await;
    assert_eq!((head.status, head.body.len()), (200, 0));
    assert_eq!(upstream.hits(), 1);
    sidecar.get("orders", "/a?q=2").await;
    assert_eq!(upstream.hits(), 2);
    let metrics = sidecar.metrics().await;
    let asked = "outrigger_cache_requests_total";
    assert_eq!(metrics.sum(asked, &[("outcome", "hit")]), 2.0);
    assert_eq!(metrics.sum(asked, &[("outcome", "miss")]), 2.0);
    let orders = [("service", "default/orders")];
    assert_eq!(metrics.sum("outrigger_cache_entries", &orders), 2.0);
    assert!(metrics.sum("outrigger_cache_bytes", &orders) > 0.0);
    assert_eq!(metrics.sum("outrigger_requests_total", &[]), 4.0);
}

#[tokio::test]
async fn an_http_2_caller_is_answered_from_it_too() {
    let upstream = Upstream::h2(|_| fresh("kept")).await;
    let mesh = service_h2("orders", &[upstream.addr], "") + &route("orders", &[CACHE]);
    let sidecar = Sidecar::start(mesh).await;
    let mut client = Client::h2(sidecar.outbound()).await;
    for _ in 0..3 {
        assert_eq!(client.call(Ask::get("orders", "/")).await.text(), "kept");
    }
    let head = client.call(Ask::new("HEAD", "orders", "/")).await;
    assert_eq!((head.status, head.body.len()), (200, 0));
    assert_eq!(upstream.hits(), 1);
}

#[tokio::test]
async fn what_is_meant_for_one_caller_is_not_kept() {
    let upstream = Upstream::h1(|seen| match seen.path.as_str() {
        "/no-store" => Reply::ok("").header("cache-control", "no-store, max-age=60"),
        "/private" => Reply::ok("").header("cache-control", "private, max-age=60"),
        "/cookie" => fresh("").header("set-cookie", "a=b"),
        "/error" => fresh("").with_status(500),
        _ => fresh(""),
    })
    .await;
    let sidecar = sidecar(&upstream, "", "{retry: {attempts: 0}, cache: {}}").await;
    for (n, path) in ["/no-store", "/private", "/cookie", "/error"]
        .iter()
        .enumerate()
    {
        for _ in 0..2 {
            let answer = sidecar.get("orders", path).await;
            assert_eq!(
                answer.header("cache-status"),
                "outrigger; fwd=uri-miss",
                "{path}"
            );
        }
        assert_eq!(upstream.hits(), 2 * (n + 1), "{path}");
    }
    // Who has credentials gets what was made for them, and leaves nothing behind.
    let before = upstream.hits();
    for _ in 0..2 {
        let ask = Ask::get("orders", "/mine").header("authorization", "secret");
        sidecar.call(ask).await;
    }
    sidecar.get("orders", "/mine").await;
    assert_eq!(upstream.hits(), before + 3);
}

#[tokio::test]
async fn many_that_miss_the_same_answer_fetch_it_once() {
    let gate = Gate::new();
    let held = gate.clone();
    let upstream = Upstream::h1(move |seen| match seen.path.as_str() {
        "/shared" => fresh("kept").hold(&held),
        _ => Reply::ok("mine")
            .header("cache-control", "private")
            .hold(&held),
    })
    .await;
    let sidecar = Sidecar::named("web-1")
        .set("workers", json!(4))
        .mesh(service("orders", &[upstream.addr], "") + &route("orders", &[CACHE]))
        .start()
        .await;
    let outbound = sidecar.outbound();
    let many = |path: &'static str| {
        let calls = (0..20).map(move |_| {
            tokio::spawn(async move {
                outrigger_tests::client::call(outbound, Ask::get("orders", path)).await
            })
        });
        futures_util::future::join_all(calls)
    };
    let shared = tokio::spawn(many("/shared"));
    until_true("one is fetching", || upstream.hits() >= 1).await;
    gate.pass(1);
    for answer in shared.await.unwrap() {
        assert_eq!(answer.unwrap().text(), "kept");
    }
    assert_eq!(upstream.hits(), 1);
    // An answer that turns out to be nobody else's holds nobody up for long.
    gate.open();
    for answer in many("/mine").await {
        assert_eq!(answer.unwrap().text(), "mine");
    }
    assert_eq!(upstream.hits(), 21);
}

#[tokio::test]
async fn a_stale_answer_is_validated_and_its_body_not_sent_again() {
    let upstream = Upstream::h1(|seen| {
        if seen.header("if-none-match") == "\"v1\"" {
            return Reply::status(304)
                .header("etag", "\"v1\"")
                .header("x-round", "2")
                .header("cache-control", "max-age=600");
        }
        Reply::ok("kept")
            .header("etag", "\"v1\"")
            .header("x-round", "1")
            .header("cache-control", "no-cache")
    })
    .await;
    let sidecar = sidecar(&upstream, "", CACHE).await;
    sidecar.get("orders", "/").await;
    let answer = sidecar.get("orders", "/").await;
    assert_eq!((answer.status, answer.text().as_str()), (200, "kept"));
    assert_eq!(answer.header("x-round"), "2");
    let status = answer.header("cache-status");
    assert!(
        status.starts_with("outrigger; hit; fwd=stale; fwd-status=304"),
        "{status}"
    );
    // Called good, it is fresh again.
    assert_eq!(sidecar.get("orders", "/").await.text(), "kept");
    assert_eq!(upstream.hits(), 2);
    // A caller that has it already is told so, from the cache.
    let ask = Ask::get("orders", "/").header("if-none-match", "W/\"v1\"");
    let answer = sidecar.call(ask).await;
    assert_eq!((answer.status, answer.body.len()), (304, 0));
    assert_eq!(answer.header("etag"), "\"v1\"");
    assert_eq!(upstream.hits(), 2);
}

/// The first is good and at once stale, all others fail.
fn failing(seen: &Seen) -> Reply {
    match seen.n {
        1 => Reply::ok("old").header("cache-control", "max-age=0"),
        _ => Reply::status(503),
    }
}

#[tokio::test]
async fn a_stale_answer_stands_in_for_an_error() {
    let mut upstream = Upstream::h1(failing).await;
    let rule = "{retry: {attempts: 0}, cache: {staleIfError: 5m}}";
    let sidecar = sidecar(&upstream, "", rule).await;
    assert_eq!(sidecar.get("orders", "/").await.text(), "old");
    let stale = sidecar.get("orders", "/").await;
    assert_eq!((stale.status, stale.text().as_str()), (200, "old"));
    let status = stale.header("cache-status");
    assert!(
        status.starts_with("outrigger; hit; detail=stale-if-error; ttl="),
        "{status}"
    );
    assert_eq!(upstream.hits(), 2, "the service was asked");
    upstream.stop().await;
    assert_eq!(sidecar.get("orders", "/").await.text(), "old");
    // What was never kept is an error still.
    sidecar
        .get("orders", "/other")
        .await
        .assert_error(503, "connect_failed");
    let metrics = sidecar.metrics().await;
    let stale = [("outcome", "stale")];
    assert_eq!(metrics.sum("outrigger_cache_requests_total", &stale), 2.0);
}

#[tokio::test]
async fn an_open_breaker_leads_to_the_stale_answer() {
    let upstream = Upstream::h1(failing).await;
    let breaker = "breaker: {consecutiveFailures: 1, openFor: 1m}";
    let rule = "{retry: {attempts: 0}, cache: {}, onUnavailable: [{staleCache: {}}, {respond: {status: 418}}]}";
    let sidecar = sidecar(&upstream, breaker, rule).await;
    assert_eq!(sidecar.get("orders", "/").await.text(), "old");
    // Without staleIfError the error is the caller's, and it opens the breaker.
    assert_eq!(sidecar.get("orders", "/").await.status, 503);
    let stale = sidecar.get("orders", "/").await;
    assert_eq!((stale.status, stale.text().as_str()), (200, "old"));
    assert_eq!(stale.header("outrigger-fallback"), "staleCache");
    let other = sidecar.get("orders", "/never-seen").await;
    assert_eq!(other.status, 418);
    assert_eq!(other.header("outrigger-fallback"), "respond");
    assert_eq!(upstream.hits(), 2);
}

#[tokio::test]
async fn answers_are_kept_for_each_value_that_they_vary_on() {
    let upstream = Upstream::h1(|seen| {
        Reply::ok(seen.header("accept-language").to_owned())
            .header("vary", "Accept-Language")
            .header("cache-control", "max-age=600")
    })
    .await;
    let sidecar = sidecar(&upstream, "", CACHE).await;
    for _ in 0..2 {
        for language in ["de", "en", ""] {
            let ask = Ask::get("orders", "/").header("accept-language", language);
            assert_eq!(sidecar.call(ask).await.text(), language);
        }
    }
    assert_eq!(upstream.hits(), 3);
}

#[tokio::test]
async fn a_change_makes_the_cache_forget_even_by_another_rule() {
    let upstream = Upstream::h1(|_| fresh("kept")).await;
    let rules = ["{matches: [{method: GET}], cache: {}}", "{name: rest}"];
    let mesh = service("orders", &[upstream.addr], "") + &route("orders", &rules);
    let sidecar = Sidecar::start(mesh).await;
    for _ in 0..2 {
        sidecar.get("orders", "/a").await;
    }
    assert_eq!(upstream.hits(), 1);
    sidecar.call(Ask::post("orders", "/b", "x")).await;
    sidecar.get("orders", "/a").await;
    assert_eq!(upstream.hits(), 2, "another target");
    sidecar.call(Ask::new("DELETE", "orders", "/a")).await;
    sidecar.get("orders", "/a").await;
    assert_eq!(upstream.hits(), 4);
}

#[tokio::test]
async fn an_operator_sees_what_is_kept_and_can_purge_it() {
    let upstream = Upstream::h1(|_| fresh("kept")).await;
    let sidecar = sidecar(&upstream, "", CACHE).await;
    for path in ["/a/1", "/a/2", "/b"] {
        sidecar.get("orders", path).await;
    }
    let kept = sidecar.view("/cache").await;
    assert_eq!(kept[0]["service"], "default/orders");
    assert_eq!(kept[0]["entries"], 3);
    let purge = async |body: &str| {
        let answer = sidecar.ask_admin("POST", "/cache/purge", body).await;
        (answer.status, answer.json()["purged"].clone())
    };
    let some = r#"{"service": "default/orders", "path": "/a"}"#;
    assert_eq!(purge(some).await, (200, json!(2)));
    assert_eq!(purge(r#"{"service": "default/none"}"#).await.0, 404);
    assert_eq!(purge(r#"{"path": 1}"#).await.0, 400);
    assert_eq!(purge("").await, (200, json!(1)));
    sidecar.get("orders", "/b").await;
    assert_eq!(upstream.hits(), 4);
}

#[tokio::test]
async fn half_an_answer_and_a_large_one_are_not_kept() {
    let upstream = Upstream::h1(|seen| match seen.path.as_str() {
        "/broken" => Reply::broken_after("half").header("cache-control", "max-age=600"),
        "/chunks" => {
            Reply::chunks([vec![b'x'; 800], vec![b'y'; 800]]).header("cache-control", "max-age=600")
        }
        _ => fresh("kept"),
    })
    .await;
    let rule = "{cache: {maxBody: 1KiB, maxEntries: 2}}";
    let sidecar = sidecar(&upstream, "", rule).await;
    for _ in 0..2 {
        let mut client = Client::h1(sidecar.outbound()).await;
        assert!(
            client
                .try_call(Ask::get("orders", "/broken"))
                .await
                .is_err()
        );
        let large = sidecar.get("orders", "/chunks").await;
        assert_eq!(large.body.len(), 1_600);
    }
    assert_eq!(upstream.hits(), 4);
    // And no more than may be.
    for n in 0..10 {
        sidecar.get("orders", &format!("/{n}")).await;
    }
    assert_eq!(sidecar.view("/cache").await[0]["entries"], 2);
}

#[tokio::test]
async fn the_answer_of_another_service_is_not_kept_for_this_one() {
    let other = Upstream::h1(|_| fresh("other")).await;
    let upstream = Upstream::h1(|_| fresh("own").delay(Duration::ZERO)).await;
    let rule = "{cache: {}, onUnavailable: [{service: other}]}";
    let without = service("orders", &[], "") + &service("other", &[other.addr], "");
    let sidecar = Sidecar::start(without + &route("orders", &[rule])).await;
    assert_eq!(sidecar.get("orders", "/").await.text(), "other");
    let with = service("orders", &[upstream.addr], "") + &service("other", &[other.addr], "");
    let mesh = with + &route("orders", &[rule]) + &document("Mesh", "default", "{}");
    sidecar.edit(&mesh).await;
    assert_eq!(sidecar.get("orders", "/").await.text(), "own");
}

/// What the cache said of an answer, without its numbers.
fn told(answer: &outrigger_tests::client::Answer) -> String {
    let status = answer.header("cache-status");
    status.split("; ttl").next().unwrap_or_default().to_owned()
}

#[tokio::test]
async fn only_if_cached_is_answered_by_the_cache_or_not_at_all() {
    let upstream = Upstream::h1(|_| fresh("kept")).await;
    let sidecar = sidecar(&upstream, "", CACHE).await;
    let ask = |path| Ask::get("orders", path).header("cache-control", "only-if-cached");
    let refused = sidecar.call(ask("/a")).await;
    refused.assert_error(504, "not_cached");
    assert_eq!(upstream.hits(), 0);
    sidecar.get("orders", "/a").await;
    let answer = sidecar.call(ask("/a")).await;
    assert_eq!((answer.status, answer.text().as_str()), (200, "kept"));
    sidecar
        .call(ask("/b"))
        .await
        .assert_error(504, "not_cached");
    let young = ask("/a").header("cache-control", "max-age=0, min-fresh=601");
    sidecar.call(young).await.assert_error(504, "not_cached");
    assert_eq!(upstream.hits(), 1);
    let metrics = sidecar.metrics().await;
    let code = [("code", "not_cached"), ("status", "504")];
    assert_eq!(metrics.sum("outrigger_requests_total", &code), 3.0);
}

#[tokio::test]
async fn a_caller_may_take_what_is_stale_or_ask_for_what_stays_fresh() {
    let upstream = Upstream::h1(|seen| {
        let lifetime = match seen.path.as_str() {
            "/strict" => "max-age=10, must-revalidate",
            _ => "max-age=10",
        };
        // It is older than that already.
        let reply = Reply::ok("kept").header("cache-control", lifetime);
        reply.header("age", "30").header("etag", "\"v1\"")
    })
    .await;
    let sidecar = sidecar(&upstream, "", CACHE).await;
    let call = async |path: &str, control: &str| {
        let ask = Ask::get("orders", path).header("cache-control", control);
        told(&sidecar.call(ask).await)
    };
    sidecar.get("orders", "/").await;
    sidecar.get("orders", "/strict").await;
    assert_eq!(upstream.hits(), 2);
    assert_eq!(call("/", "max-stale").await, "outrigger; hit");
    assert_eq!(call("/", "max-stale=600").await, "outrigger; hit");
    assert_eq!(upstream.hits(), 2, "nobody was asked");
    for (path, control) in [
        ("/", "max-stale=1"),
        ("/", "max-stale, max-age=20"),
        ("/", "max-stale, no-cache"),
        ("/", "min-fresh=1"),
        ("/strict", "max-stale"),
    ] {
        let before = upstream.hits();
        call(path, control).await;
        assert_eq!(upstream.hits(), before + 1, "{path} {control}");
    }
}

#[tokio::test]
async fn a_callers_no_store_leaves_nothing_behind_and_its_no_cache_asks_anew() {
    let upstream = Upstream::h1(|_| fresh("kept")).await;
    let sidecar = sidecar(&upstream, "", CACHE).await;
    let ask = |control| Ask::get("orders", "/").header("cache-control", control);
    for hits in 1..=2 {
        let answer = sidecar.call(ask("no-store")).await;
        assert_eq!(told(&answer), "outrigger; fwd=uri-miss");
        assert_eq!(upstream.hits(), hits);
    }
    sidecar.get("orders", "/").await;
    assert_eq!(upstream.hits(), 3);
    // What is kept already may be said (RFC 9111 §5.2.1.5).
    let answer = sidecar.call(ask("no-store")).await;
    assert_eq!(told(&answer), "outrigger; hit");
    let answer = sidecar.call(ask("no-cache")).await;
    assert_eq!(told(&answer), "outrigger; fwd=uri-miss; stored");
    assert_eq!(upstream.hits(), 4);
    let pragma = Ask::get("orders", "/").header("pragma", "no-cache");
    sidecar.call(pragma).await;
    assert_eq!(upstream.hits(), 5);
}
