//! Header edits, rewrites, redirects and fixed answers.

use outrigger_tests::client::{Ask, Client};
use outrigger_tests::mesh::{Sidecar, route, service, service_h2};
use outrigger_tests::upstream::{Reply, Upstream};

fn one(rule: &str) -> String {
    route("orders", &[rule])
}

#[tokio::test]
async fn headers_are_removed_set_and_added_both_ways() {
    let upstream = Upstream::h1(|_| {
        Reply::ok("ok")
            .header("server", "secret")
            .header("x-version", "1")
    })
    .await;
    let rule = "{requestHeaders: {set: {x-route: canary}, add: {x-via: mesh}, remove: [x-debug]}, \
                responseHeaders: {set: {x-version: '2'}, add: {x-via: mesh}, remove: [server]}}";
    let mesh = service("orders", &[upstream.addr], "") + &one(rule);
    let sidecar = Sidecar::start(mesh).await;
    let ask = Ask::get("orders", "/")
        .header("x-debug", "1")
        .header("x-route", "forged")
        .header("x-via", "app");
    let answer = sidecar.call(ask).await;
    let seen = upstream.last();
    assert_eq!(seen.header("x-debug"), "");
    assert_eq!(seen.all("x-route"), [b"canary"]);
    assert_eq!(seen.all("x-via"), [&b"app"[..], b"mesh"]);
    assert_eq!(answer.header("server"), "");
    assert_eq!(answer.header("x-version"), "2");
    assert_eq!(answer.header("x-via"), "mesh");
}

#[tokio::test]
async fn a_grpc_call_has_its_headers_edited_by_gateway_api_filters() {
    let upstream = Upstream::h2(|_| Reply::grpc(&[b"pong"], 0)).await;
    let port = "ports: [{name: grpc, port: 80, appProtocol: grpc}]\n";
    let grpc_route = "---\n{apiVersion: gateway.networking.k8s.io/v1, kind: GRPCRoute, metadata: {name: r, namespace: default}, \
         spec: {parentRefs: [{group: '', kind: Service, name: orders}], rules: [{backendRefs: [{name: orders}], filters: [\
         {type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: x-route, value: filter}]}},\
         {type: ResponseHeaderModifier, responseHeaderModifier: {add: [{name: x-served, value: mesh}]}}]}]}}\n";
    let mesh = service("orders", &[upstream.addr], port) + grpc_route;
    let sidecar = Sidecar::start(mesh).await;
    let mut client = Client::h2(sidecar.outbound()).await;
    let answer = client.call(Ask::grpc("orders", "/a.B/C", b"ping")).await;
    assert_eq!(answer.trailer("grpc-status"), "0");
    assert_eq!(answer.header("x-served"), "mesh");
    assert_eq!(upstream.last().header("x-route"), "filter");
}

#[tokio::test]
async fn a_rewrite_changes_host_and_path_and_keeps_the_query() {
    let (h1, h2) = (
        Upstream::h1(|_| Reply::ok("")).await,
        Upstream::h2(|_| Reply::ok("")).await,
    );
    for (mesh, upstream) in [
        (service("orders", &[h1.addr], ""), &h1),
        (service_h2("orders", &[h2.addr], ""), &h2),
    ] {
        let rules = [
            "{matches: [{path: {value: /shop/v1}}], rewrite: {hostname: orders.internal, path: {type: ReplacePrefixMatch, replacePrefixMatch: /v2}}}",
            "{matches: [{path: {value: /full}}], rewrite: {path: {type: ReplaceFullPath, replaceFullPath: /all}}}",
        ];
        let sidecar = Sidecar::start(mesh + &route("orders", &rules)).await;
        for (asked, host, path) in [
            ("/shop/v1/a?q=%20", "orders.internal", "/v2/a?q=%20"),
            ("/shop/v1", "orders.internal", "/v2"),
            ("/full/of/it?x", "orders", "/all?x"),
        ] {
            let answer = sidecar.get("orders", asked).await;
            assert_eq!(answer.status, 200, "{}", answer.text());
            let seen = upstream.last();
            assert_eq!((seen.authority.as_str(), seen.path.as_str()), (host, path));
        }
    }
}

#[tokio::test]
async fn a_rewritten_request_is_retried_with_the_rewritten_path() {
    let upstream = Upstream::h1(|seen| match seen.n {
        1 => Reply::status(503),
        _ => Reply::ok("ok"),
    })
    .await;
    let rule = "{rewrite: {path: {type: ReplacePrefixMatch, replacePrefixMatch: /v2}}, requestHeaders: {add: {x-via: mesh}}}";
    let mesh = service("orders", &[upstream.addr], "") + &one(rule);
    let sidecar = Sidecar::start(mesh).await;
    assert_eq!(sidecar.get("orders", "/a").await.text(), "ok");
    for seen in upstream.seen() {
        assert_eq!(seen.path, "/v2/a");
        assert_eq!(seen.all("x-via"), [b"mesh"], "edited once, sent twice");
    }
}

#[tokio::test]
async fn a_redirect_follows_gateway_api() {
    let upstream = Upstream::h1(|_| Reply::ok("")).await;
    let rules = [
        "{matches: [{path: {value: /https}}], redirect: {scheme: https}}",
        "{matches: [{path: {value: /old}}], redirect: {hostname: shop.example, port: 8443, statusCode: 301, path: {type: ReplacePrefixMatch, replacePrefixMatch: /new}}}",
        "{matches: [{path: {value: /gone}}], redirect: {statusCode: 308, path: {type: ReplaceFullPath, replaceFullPath: /}}}",
    ];
    let mesh = service("orders", &[upstream.addr], "") + &route("orders", &rules);
    let sidecar = Sidecar::start(mesh).await;
    for (host, path, status, location) in [
        (
            "orders:8080",
            "/https/a?q=1",
            302,
            "https://orders/https/a?q=1",
        ),
        (
            "orders",
            "/old/a?q=1",
            301,
            "http://shop.example:8443/new/a?q=1",
        ),
        ("orders:8080", "/gone/a", 308, "http://orders:8080/"),
    ] {
        let answer = sidecar.get(host, path).await;
        assert_eq!(answer.status, status);
        assert_eq!(answer.header("location"), location);
        assert_eq!(answer.code(), "", "no error of ours");
    }
    assert_eq!(upstream.hits(), 0);
    let metrics = sidecar.metrics().await;
    let redirected = [("status", "301"), ("code", "")];
    assert_eq!(metrics.sum("outrigger_requests_total", &redirected), 1.0);
}

#[tokio::test]
async fn a_fixed_answer_asks_no_service() {
    let upstream = Upstream::h2(|_| Reply::ok("")).await;
    let rules = [
        "{matches: [{path: {value: /closed}}], respond: {status: 418, body: 'short and stout', contentType: text/x-tea}, responseHeaders: {set: {x-pot: '1'}}}",
        "{matches: [{grpc: {service: a.B}}], respond: {status: 503, body: resting}}",
    ];
    let mesh = service_h2("orders", &[upstream.addr], "") + &route("orders", &rules);
    let sidecar = Sidecar::start(mesh).await;
    let answer = sidecar
        .call(Ask::post("orders", "/closed", vec![b'x'; 100_000]))
        .await;
    assert_eq!(
        (answer.status, answer.text().as_str()),
        (418, "short and stout")
    );
    assert_eq!(answer.header("content-type"), "text/x-tea");
    assert_eq!((answer.header("x-pot"), answer.code()), ("1", ""));
    let head = sidecar.call(Ask::new("HEAD", "orders", "/closed")).await;
    assert_eq!((head.status, head.body.len()), (418, 0));
    let mut client = Client::h2(sidecar.outbound()).await;
    let answer = client.call(Ask::grpc("orders", "/a.B/C", b"ping")).await;
    assert_eq!(answer.status, 200);
    assert_eq!(answer.header("grpc-status"), "14");
    assert_eq!(answer.header("grpc-message"), "resting");
    assert_eq!(upstream.hits(), 0);
}

#[tokio::test]
async fn a_route_policy_edits_the_headers_of_a_gateway_api_route() {
    let upstream = Upstream::h1(|_| Reply::ok("")).await;
    let http_route = "---\n{apiVersion: gateway.networking.k8s.io/v1, kind: HTTPRoute, metadata: {name: r, namespace: default}, \
         spec: {parentRefs: [{group: '', kind: Service, name: orders}], rules: [{backendRefs: [{name: orders}], filters: [\
         {type: URLRewrite, urlRewrite: {path: {type: ReplacePrefixMatch, replacePrefixMatch: /v2}}}]}]}}\n\
         ---\n{apiVersion: outrigger.dev/v1alpha1, kind: RoutePolicy, metadata: {name: p, namespace: default}, \
         spec: {targetRefs: [{group: gateway.networking.k8s.io, kind: HTTPRoute, name: r}], requestHeaders: {set: {x-policy: '1'}}}}\n";
    let sidecar = Sidecar::start(service("orders", &[upstream.addr], "") + http_route).await;
    assert_eq!(sidecar.get("orders", "/a").await.status, 200);
    let seen = upstream.last();
    assert_eq!(
        (seen.path.as_str(), seen.header("x-policy")),
        ("/v2/a", "1")
    );
}
