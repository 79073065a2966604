//! Every problem has a code, a place, a path and a way out; one row each.

#![allow(clippy::unwrap_used)]

use outrigger_config::{Loaded, Report, Severity, Source, bootstrap, load};

/// Two services, a queue, and room for what a row adds.
const BASE: &str = "
---
{apiVersion: outrigger.dev/v1alpha1, kind: MeshService, metadata: {name: orders, namespace: shop}, spec: {discovery: {heartbeat: {}}}}
---
{apiVersion: outrigger.dev/v1alpha1, kind: MeshService, metadata: {name: stock, namespace: shop}, spec: {ports: [{port: 80, appProtocol: grpc}], discovery: {heartbeat: {}}}}
---
{apiVersion: outrigger.dev/v1alpha1, kind: Queue, metadata: {name: later, namespace: shop}, spec: {}}
";

/// The problems of one code as `line @word text`, the word being what stands at the place.
fn lines(report: &Report, sources: &[Source], code: &str) -> Vec<String> {
    let found = report
        .problems
        .iter()
        .filter(|problem| problem.code == code);
    found
        .map(|problem| {
            let source = sources
                .iter()
                .find(|source| source.name == problem.file)
                .unwrap();
            let line = source
                .text
                .lines()
                .nth(problem.line - 1)
                .unwrap_or_default();
            let rest: String = line.chars().skip(problem.column - 1).collect();
            let end = rest
                .find([' ', ',', ':', '}', ']'])
                .map_or(rest.len(), |end| end.max(1));
            format!("{} @{} {}", problem.line, &rest[..end], problem.text())
        })
        .collect()
}

/// Loads `text` (which begins on line 1) beside the base, and compares the problems of one code.
#[track_caller]
fn check(code: &str, text: &str, expected: &[&str]) {
    let sources = [
        Source::new("it.yaml", text),
        Source::new("zz-base.yaml", BASE),
    ];
    let Loaded { mesh, report } = load(&sources);
    let found = lines(&report, &sources, code);
    assert_eq!(found, expected, "{}", report.render_text());
    assert_eq!(mesh.is_none(), report.has_errors());
    let errors = report
        .problems
        .iter()
        .filter(|p| p.severity == Severity::Error);
    let others: Vec<_> = errors.filter(|problem| problem.code != code).collect();
    assert!(others.is_empty(), "{others:?}");
}

fn doc(kind: &str, name: &str, spec: &str) -> String {
    let version = match kind {
        "HTTPRoute" | "GRPCRoute" => "gateway.networking.k8s.io/v1",
        _ => "outrigger.dev/v1alpha1",
    };
    format!(
        "{{apiVersion: {version}, kind: {kind}, metadata: {{name: {name}, namespace: shop}}, spec:\n{spec}}}\n---\n"
    )
}

fn route(rules: &str) -> String {
    doc(
        "MeshRoute",
        "r",
        &format!("{{services: [orders], rules:\n[{rules}]}}"),
    )
}

#[test]
fn text_that_cannot_be_read() {
    check(
        "E001",
        "a: [1, 2\n",
        &["1 @[1 broken YAML: unclosed bracket '['"],
    );
    check(
        "E001",
        &doc("Queue", "a", "{maxDepth: *nowhere}"),
        &["2 @*nowhere broken YAML: no anchor &nowhere before this"],
    );
    check("E004", "kind: \u{fffd}\n", &["1 @� the text is not UTF-8"]);
    check(
        "E002",
        &("[".repeat(65) + &"]".repeat(65)),
        &["1 @[ nested more than 64 levels deep"],
    );
    check(
        "E109",
        "just words\n",
        &["1 @just expected a document, found \"just words\""],
    );
}

#[test]
fn a_broken_document_does_not_hide_the_others() {
    let text = "kind: [\n---\napiVersion: outrigger.dev/v1alpha1\nkind: Queues\n---\nkind: }\n";
    let report = load(&[Source::new("it.yaml", text)]).report;
    assert_eq!(report.documents, 3);
    let places: Vec<_> = report.problems.iter().map(|p| (p.line, p.code)).collect();
    assert_eq!(places, [(1, "E001"), (4, "E102"), (6, "E001")]);
}

#[test]
fn an_alias_bomb_is_refused() {
    let mut text = "a: &a [1,1,1,1,1,1,1,1,1,1]\n".to_owned();
    for (this, before) in ["b", "c", "d", "e", "f", "g", "h"]
        .iter()
        .zip(["a", "b", "c", "d", "e", "f", "g"])
    {
        text += &format!(
            "{this}: &{this} [{}]\n",
            vec![format!("*{before}"); 10].join(",")
        );
    }
    let report = load(&[Source::new("it.yaml", text)]).report;
    assert_eq!(report.problems[0].code, "E002");
}

#[test]
fn a_source_that_is_too_large_is_refused() {
    let report = load(&[Source::new("it.yaml", " ".repeat((8 << 20) + 1))]).report;
    assert_eq!(report.problems[0].code, "E002");
}

#[test]
fn the_envelope() {
    let spec = "{discovery: {heartbeat: {}}}";
    check(
        "E003",
        &doc(
            "MeshService",
            "a",
            "{limits: {}, discovery: {heartbeat: {}},\n limits: {}}",
        ),
        &["3 @limits the key \"limits\" is there twice"],
    );
    check(
        "E101",
        &doc("MeshService", "a", spec).replace("v1alpha1", "v9"),
        &[
            "1 @outrigger.dev/v9 apiVersion: unknown apiVersion \"outrigger.dev/v9\" for MeshService; understood is outrigger.dev/v1alpha1",
        ],
    );
    check(
        "E102",
        &doc("MeshServise", "a", spec),
        &["1 @MeshServise kind: unknown kind \"MeshServise\"; did you mean \"MeshService\"?"],
    );
    check(
        "E102",
        &doc("Deployment", "a", spec),
        &[
            "1 @Deployment kind: unknown kind \"Deployment\"; known are Mesh, MeshService, MeshRoute, HTTPRoute, GRPCRoute, RoutePolicy, Queue, AuthorizationPolicy",
        ],
    );
    check(
        "E106",
        &doc("MeshService", "Orders", spec),
        &[
            "1 @Orders metadata.name: expected a name in lower-case letters, digits, '-' and '.', found \"Orders\"",
        ],
    );
    check(
        "E107",
        "{apiVersion: outrigger.dev/v1alpha1, kind: Queue, metadata: {name: a}}",
        &["1 @{apiVersion \"spec\" is missing"],
    );
    check(
        "E103",
        "{apiVersion: outrigger.dev/v1alpha1, kind: Queue, metadata: {name: a}, spec: {}, specs: 1}",
        &["1 @specs specs: unknown field; did you mean \"spec\"?"],
    );
    check(
        "W103",
        "{apiVersion: outrigger.dev/v1alpha1, kind: Queue, metadata: {name: a, label: {}}, spec: {}, status: {x: 1}}",
        &["1 @label metadata.label: unknown field; did you mean \"labels\"?"],
    );
    check(
        "E204",
        &doc("MeshService", "a", spec).repeat(2),
        &["4 @a metadata.name: there is already a MeshService shop/a, in it.yaml:1"],
    );
}

#[test]
fn the_shape() {
    check(
        "E103",
        &route("{timeouts: {perTri: 1s}}"),
        &["3 @perTri spec.rules[0].timeouts.perTri: unknown field; did you mean \"perTry\"?"],
    );
    check(
        "E104",
        &route("{async: {when: always}}"),
        &[
            "3 @always spec.rules[0].async.when: expected Never, Preferred, Always or Shadow, found \"always\"; did you mean \"Always\"?",
        ],
    );
    check(
        "E105",
        &doc(
            "MeshService",
            "a",
            "{discovery: {heartbeat: {}, static: []}}",
        ),
        &[
            "2 @static spec.discovery: exactly one of consul, dns, eureka, heartbeat, kubernetes, static may be set, found heartbeat and static",
        ],
    );
    check(
        "E105",
        &doc("Queue", "a", "{backend: {}}"),
        &[
            "2 @{ spec.backend: exactly one of amqp1, embedded, kafka, mqtt, nats, rabbitmq, redis must be set",
        ],
    );
    check(
        "E305",
        &doc(
            "MeshService",
            "a",
            "{discovery: {consul: {address: \"https://a\"}}}",
        ),
        &[
            "2 @\"https spec.discovery.consul.address: registries are asked in plaintext only, for now: write http://",
        ],
    );
    check(
        "E107",
        &doc("MeshService", "a", "{discovery: {eureka: {urls: []}}}"),
        &["2 @urls spec.discovery.eureka.urls: needs at least one server"],
    );
    check(
        "E106",
        &doc("MeshService", "a", "{breaker: {openFor: 10}}"),
        &["2 @10 spec.breaker.openFor: expected a duration such as \"10s\", found the number 10"],
    );
    check(
        "E106",
        &doc("MeshService", "a", "{ports: [{port: 0}]}"),
        &["2 @0 spec.ports[0].port: expected a port from 1 to 65535, found the number 0"],
    );
    check(
        "E106",
        &doc("MeshService", "a", "{ejection: {maxPercent: 101}}"),
        &[
            "2 @101 spec.ejection.maxPercent: expected a whole percentage from 0 to 100, found the number 101",
        ],
    );
    check(
        "E106",
        &doc(
            "MeshService",
            "a",
            "{discovery: {static: [{address: localhost, port: 1}]}}",
        ),
        &[
            "2 @localhost spec.discovery.static[0].address: expected an IP address, found \"localhost\"",
        ],
    );
    check(
        "E106",
        &route("{matches: [{method: post}]}"),
        &[
            "3 @post spec.rules[0].matches[0].method: expected a method such as GET, in upper case, found \"post\"",
        ],
    );
    check(
        "E106",
        &route("{matches: [{headers: [{name: 'x y', value: a}]}]}"),
        &[
            "3 @'x spec.rules[0].matches[0].headers[0].name: expected a header name such as \"x-canary\", found \"x y\"",
        ],
    );
}

#[test]
fn grpc_codes_and_numbers() {
    check(
        "E106",
        &route("{retry: {grpc: [UNAVAILIBLE]}}"),
        &[
            "3 @UNAVAILIBLE spec.rules[0].retry.grpc[0]: expected a gRPC code such as UNAVAILABLE, found \"UNAVAILIBLE\"; did you mean UNAVAILABLE?",
        ],
    );
    check(
        "E106",
        &route("{retry: {codes: [600]}}"),
        &[
            "3 @600 spec.rules[0].retry.codes[0]: expected a status such as 503 or a class such as \"5xx\", found \"600\"",
        ],
    );
    check(
        "E107",
        &route("{backends: [{weight: 1}]}"),
        &["3 @{weight spec.rules[0].backends[0]: \"service\" is missing"],
    );
    check(
        "E108",
        &route("{retry: {attempts: -1}}"),
        &["3 @-1 spec.rules[0].retry.attempts: expected a number from 0 to 20, found -1"],
    );
    check(
        "E108",
        &doc("MeshRoute", "r", "{services: []}"),
        &["2 @[ spec.services: the list must not be empty"],
    );
    check(
        "E109",
        &route("{matches: [{headers: [{name: x, value: 1}]}]}"),
        &[
            "3 @1 spec.rules[0].matches[0].headers[0].value: expected text, found the number 1; write \"1\" in quotes",
        ],
    );
    check(
        "E109",
        &route("{retry: {unsafe: 'true'}}"),
        &[
            "3 @'true' spec.rules[0].retry.unsafe: expected true or false, found \"true\"; write it without quotes",
        ],
    );
}

#[test]
fn references() {
    check(
        "E201",
        &route("{backends: [{service: order}]}"),
        &[
            "3 @order spec.rules[0].backends[0].service: no MeshService \"order\" in namespace \"shop\"; did you mean \"orders\"?",
        ],
    );
    check(
        "E201",
        &route("{backends: [{service: ops/orders}]}"),
        &[
            "3 @ops/orders spec.rules[0].backends[0].service: no MeshService \"orders\" in namespace \"ops\"; did you mean \"orders\"?",
        ],
    );
    check(
        "E201",
        &doc(
            "HTTPRoute",
            "h",
            "{parentRefs: [{group: '', kind: Service, name: orders}],\n rules: [{backendRefs: [{name: ordes}]}]}",
        ),
        &[
            "3 @ordes spec.rules[0].backendRefs[0].name: no MeshService \"ordes\" in namespace \"shop\"; did you mean \"orders\"?",
        ],
    );
    check(
        "E202",
        &route("{async: {when: Always, queue: latr}}"),
        &[
            "3 @latr spec.rules[0].async.queue: no Queue \"latr\" in namespace \"shop\"; did you mean \"later\"?",
        ],
    );
    let target = |name: &str, section: &str| {
        route("{name: one}")
            + &doc(
                "RoutePolicy",
                "p",
                &format!(
                    "{{targetRefs: [{{group: outrigger.dev, kind: MeshRoute, name: {name}, sectionName: {section}}}]}}"
                ),
            )
    };
    check(
        "E203",
        &target("s", "one"),
        &[
            "6 @s spec.targetRefs[0].name: no MeshRoute \"s\" in namespace \"shop\"; did you mean \"r\"?",
        ],
    );
    check(
        "E203",
        &target("r", "on"),
        &[
            "6 @on spec.targetRefs[0].sectionName: no rule \"on\" in MeshRoute shop/r; did you mean \"one\"?",
        ],
    );
    check(
        "E316",
        &target("r", "one").replace("{group: outrigger.dev", "{group: gateway"),
        &["6 @gateway spec.targetRefs[0].group: the group of MeshRoute is outrigger.dev"],
    );
}

#[test]
fn documents_beside_each_other() {
    let named = |name: &str| {
        doc(
            "MeshService",
            name,
            "{hostnames: [Shop.example], discovery: {heartbeat: {}}}",
        )
    };
    check(
        "E205",
        &(named("a") + &named("b")),
        &["5 @Shop.example spec.hostnames[0]: \"Shop.example\" already belongs to shop/a"],
    );
    check(
        "E205",
        &doc(
            "MeshService",
            "a",
            "{hostnames: [orders], discovery: {heartbeat: {}}}",
        ),
        &["3 @orders metadata.name: \"orders\", by which this service is known, belongs to shop/a"],
    );
    let gateway = doc(
        "HTTPRoute",
        "h",
        "{parentRefs: [{group: '', kind: Service, name: orders}], rules: [{backendRefs: [{name: orders}]}]}",
    );
    check(
        "E206",
        &(route("{}") + &gateway),
        &[
            "6 @parentRefs spec.parentRefs: shop/orders already has the MeshRoute shop/r; one service takes one kind of route",
        ],
    );
    check(
        "E207",
        "{apiVersion: outrigger.dev/v1alpha1, kind: Mesh, metadata: {name: a}, spec: {}}\n---\n{apiVersion: outrigger.dev/v1alpha1, kind: Mesh, metadata: {name: b}, spec: {}}\n---\n",
        &["3 @b metadata.name: there is already a Mesh, \"a\""],
    );
    check(
        "E304",
        &route("{onUnavailable: [{service: orders}]}"),
        &[
            "3 @orders spec.rules[0].onUnavailable[0].service: goes in a circle: shop/orders falls back to shop/orders again",
        ],
    );
    check(
        "E319",
        &route("{name: a}, {name: a, matches: [{method: GET}]}"),
        &["3 @a spec.rules[1].name: another rule of this route is called \"a\""],
    );
}

#[test]
fn values_beyond_their_shape() {
    check(
        "E301",
        &route("{backends: [{service: orders, weight: 0}]}"),
        &[
            "3 @backends spec.rules[0].backends: the weights are all 0: no backend takes any traffic",
        ],
    );
    check(
        "E302",
        &route("{timeouts: {request: 1s, perTry: 2s}}"),
        &["3 @2s spec.rules[0].timeouts.perTry: perTry (2s) is longer than request (1s)"],
    );
    check(
        "E302",
        &route("{timeouts: {perTry: 20s}}"),
        &[
            "3 @20s spec.rules[0].timeouts.perTry: perTry (20s, rule) is longer than request (15s, built-in)",
        ],
    );
    check(
        "E303",
        &route("{matches: [{path: {type: RegularExpression, value: '/('}}]}"),
        &["3 @'/(' spec.rules[0].matches[0].path.value: not a regular expression: unclosed group"],
    );
    check(
        "E305",
        &doc("Queue", "a", "{backend: {nats: {url: 'http://x'}}}"),
        &["2 @'http spec.backend.nats.url: expected a URL such as \"nats://host\""],
    );
    check("E306", &("{apiVersion: outrigger.dev/v1alpha1, kind: Mesh, metadata: {name: a}, spec: {trustDomain: ours}}\n---\n".to_owned() + &doc("AuthorizationPolicy", "a", "{services: [orders], action: Deny, rules: [{from: [{principals: ['spiffe://theirs/x']}]}]}")), &["4 @'spiffe spec.rules[0].from[0].principals[0]: not of this mesh: its trust domain is \"ours\""]);
    check(
        "E307",
        &doc(
            "MeshService",
            "a",
            "{breaker: {failureRate: {minRequests: 0}}}",
        ),
        &["2 @0 spec.breaker.failureRate.minRequests: must be at least 1"],
    );
    check(
        "E308",
        &doc("MeshService", "a", "{breaker: {openFor: 5m}}"),
        &[
            "2 @5m spec.breaker.openFor: openFor (5m) is longer than maxOpenFor (2m), one of them by default",
        ],
    );
    check(
        "E308",
        &doc(
            "MeshService",
            "a",
            "{discovery: {heartbeat: {ttl: 2m, removeAfter: 1m}}}",
        ),
        &["2 @2m spec.discovery.heartbeat.ttl: ttl (2m) is longer than removeAfter (1m)"],
    );
    check(
        "E309",
        &route("{requestHeaders: {set: {'a b': x}}}"),
        &["3 @x spec.rules[0].requestHeaders.set.a b: not a header name"],
    );
    check(
        "E310",
        &route("{matches: [{method: GET, grpc: {service: a.B}}]}"),
        &[
            "3 @grpc spec.rules[0].matches[0].grpc: grpc stands for path and method; set one or the other",
        ],
    );
    check(
        "E311",
        &route("{matches: [{path: {value: v1}}]}"),
        &[
            "3 @v1 spec.rules[0].matches[0].path.value: expected a path that begins with \"/\", without a query",
        ],
    );
    check(
        "E312",
        &doc(
            "HTTPRoute",
            "h",
            "{parentRefs: [{group: '', kind: Service, name: orders}], rules: [{backendRefs: [{name: orders}],\n filters: [{type: CORS}]}]}",
        ),
        &[
            "3 @CORS spec.rules[0].filters[0].type: the filter \"CORS\" is not supported; supported are RequestHeaderModifier, ResponseHeaderModifier, RequestMirror, RequestRedirect, URLRewrite",
        ],
    );
    check(
        "E315",
        &route("{matches: [{grpc: {}}], async: {when: Always}}"),
        &[
            "3 @async spec.rules[0].async: gRPC calls are queued only with a grpcAck, which says what their caller gets",
        ],
    );
    check(
        "E318",
        &doc(
            "HTTPRoute",
            "h",
            "{parentRefs: [{group: '', kind: Service, name: orders}], rules: [{}]}",
        ),
        &["2 @{ spec.rules[0]: backendRefs is empty: such a rule answers nothing but 500"],
    );
    check(
        "E320",
        &doc(
            "MeshService",
            "a",
            "{discovery: {static: [{address: '::1', port: 1}, {address: '::1', port: 1}]}}",
        ),
        &["2 @{address spec.discovery.static[1]: the same endpoint as static[0]"],
    );
    check(
        "E321",
        &doc(
            "MeshService",
            "a",
            "{addresses: [10.0.0.1, 0.0.0.0, 'fe80::1',\n 10.0.0.1], discovery: {heartbeat: {}}}",
        ),
        &[
            "2 @0.0.0.0 spec.addresses[1]: no service is called at 0.0.0.0",
            "2 @'fe80 spec.addresses[2]: no service is called at fe80::1",
            "3 @10.0.0.1 spec.addresses[3]: 10.0.0.1 is listed twice with port 80",
        ],
    );
}

#[test]
fn an_address_belongs_to_one_service_by_port() {
    let two = |ports| {
        let service = |name, ports| {
            let spec = format!(
                "{{addresses: [10.0.0.1, 'fd00::1'], ports: [{ports}], discovery: {{heartbeat: {{}}}}}}"
            );
            doc("MeshService", name, &spec)
        };
        service("a", "{port: 80}") + &service("b", ports)
    };
    check("E205", &two("{port: 81}"), &[]);
    check(
        "E205",
        &two("{port: 81}, {port: 80}"),
        &[
            "5 @10.0.0.1 spec.addresses[0]: 10.0.0.1 with port 80 belongs to shop/a",
            "5 @'fd00 spec.addresses[1]: fd00::1 with port 80 belongs to shop/a",
        ],
    );
}

#[test]
fn warnings() {
    check(
        "W103",
        &doc(
            "HTTPRoute",
            "h",
            "{parentRefs: [{group: '', kind: Service, name: orders}], useless: 1, rules: [{backendRefs: [{name: orders}]}]}",
        ),
        &["2 @useless spec.useless: unknown field; known are hostnames, parentRefs, rules"],
    );
    check(
        "W301",
        &route("{retry: {unsafe: true}}"),
        &[
            "3 @true spec.rules[0].retry.unsafe: calls that are not idempotent, such as POST, are sent again without a key",
        ],
    );
    check(
        "W301",
        &route("{matches: [{method: GET}], retry: {unsafe: true}}"),
        &[],
    );
    check(
        "W302",
        &route(
            "{name: a, matches: [{path: {value: /a}}]}, {name: b, matches: [{path: {value: /a/}}]}",
        ),
        &[
            "3 @{name spec.rules[1]: never matches for shop/orders: shop/r/a takes the same requests first",
        ],
    );
    check(
        "W303",
        &route(&vec!["{matches: [{method: GET}]}"; 17].join(",")),
        &["2 @rules spec.rules: 17 rules: a cluster takes at most 16"],
    );
    check(
        "E322",
        &route(
            "{redirect: {scheme: ftp}},\n{matches: [{path: {type: Exact, value: /a}}], rewrite: {path: {type: ReplacePrefixMatch, replacePrefixMatch: /b}}},\n{matches: [{method: GET}], rewrite: {path: {type: ReplaceFullPath, replaceFullPath: b}}},\n{matches: [{method: PUT}], rewrite: {path: {type: ReplaceFullPath, replacePrefixMatch: /b}}}",
        ),
        &[
            "3 @ftp spec.rules[0].redirect.scheme: expected http or https, found \"ftp\"",
            "4 @/b spec.rules[1].rewrite.path.replacePrefixMatch: all matches of the rule must be of one and the same PathPrefix",
            "5 @b spec.rules[2].rewrite.path.replaceFullPath: expected a path that begins with \"/\", without a query",
            "6 @path spec.rules[3].rewrite.path: the type ReplaceFullPath needs replaceFullPath and nothing else",
        ],
    );
    check(
        "E105",
        &route("{fault: {abort: {percent: 1, status: 503, grpc: UNAVAILABLE}}}"),
        &["3 @abort spec.rules[0].fault.abort: exactly one of status, grpc must be set"],
    );
    check(
        "E106",
        &route("{splitKey: Source}"),
        &["3 @Source spec.rules[0].splitKey: expected header:NAME or cookie:NAME, found Source"],
    );
    check(
        "E323",
        &route("{respond: {status: 503}, redirect: {statusCode: 301}}"),
        &["3 @respond spec.rules[0].respond: redirect and respond exclude each other"],
    );
    let mesh = |mode: &str| {
        format!(
            "{{apiVersion: outrigger.dev/v1alpha1, kind: Mesh, metadata: {{name: a}}, spec: {{mtls: {{mode: {mode}}}}}}}\n---\n"
        )
    };
    let allowed = doc(
        "AuthorizationPolicy",
        "a",
        "{services: [orders], action: Allow, rules: [{from: [{serviceAccounts: [web]}, {ipBlocks: [10.0.0.0/8]}]}]}",
    );
    check("W309", &(mesh("Strict") + &allowed), &[]);
    check(
        "W309",
        &(mesh("Permissive") + &allowed),
        &[
            "4 @serviceAccounts spec.rules[0].from[0].serviceAccounts: shop/orders takes plaintext, and a caller in plaintext is not allowed by who it is: mtls.mode Strict refuses it",
        ],
    );
    check(
        "W309",
        &route("{onUnavailable: [{staleCache: {}}]}"),
        &[
            "3 @staleCache spec.rules[0].onUnavailable[0].staleCache: the rule has no cache to find anything in",
        ],
    );
    check(
        "W305",
        &doc("MeshService", "a", "{}"),
        &["1 @spec spec: no discovery: the service has no endpoints"],
    );
    let labelled = doc(
        "MeshService",
        "a",
        "{discovery: {static: [{address: 10.0.0.1, port: 1, labels: {v: \"1\"}}]}}",
    );
    check(
        "W310",
        &(labelled + &route("{backends: [{service: a, labels: {v: \"2\"}}]}")),
        &["6 @labels spec.rules[0].backends[0].labels: no endpoint of shop/a carries these labels"],
    );
    check(
        "E208",
        &route(
            r#"{contract: {jsonSchema: '{"type": 7}'}}, {contract: {descriptorSet: 'base64,!'}}"#,
        ),
        &[
            "3 @'{\"type\" spec.rules[0].contract.jsonSchema: no JSON Schema: 7 is not valid under any of the schemas listed in the 'anyOf' keyword",
            "3 @'base64 spec.rules[1].contract.descriptorSet: no base64: Invalid symbol 33, offset 0.",
        ],
    );
    check(
        "W309",
        &route("{contract: {jsonSchema: a.json}}"),
        &[
            "3 @a.json spec.rules[0].contract.jsonSchema: there is no file a.json beside the document (.json, .pb or .binpb, up to 1 MiB): with mode Enforce every call is refused",
        ],
    );
    for (pattern, found) in [
        ("hooks.shop", true),
        ("https://hooks.shop/path", true),
        ("https://a*.shop", true),
        ("https://user@hooks.shop", true),
        ("https://[hooks]", true),
        ("https://hooks.shop:0", true),
        ("https://*.shop:8443", false),
        ("http://[::1]:80/", false),
        ("https://*", false),
    ] {
        let text = route(&format!(
            "{{async: {{callback: {{allow: [\"{pattern}\"]}}}}}}"
        ));
        let sources = [Source::new("mesh.yaml", text)];
        let report = load(&sources).report;
        let refused = lines(&report, &sources, "E106");
        assert_eq!(!refused.is_empty(), found, "{pattern}: {refused:?}");
    }
    check(
        "E106",
        &route("{async: {grpcResponseType: .shop.Order}}"),
        &[
            "3 @.shop.Order spec.rules[0].async.grpcResponseType: expected a message's full name such as shop.Order, found .shop.Order",
        ],
    );
    check(
        "E308",
        &route("{async: {callback: {timeout: 31s}}}"),
        &["3 @31s spec.rules[0].async.callback.timeout: must be longer than 0s and at most 30s"],
    );
    check(
        "W312",
        &route("{async: {idempotency: {onUnknown: Forward}}}"),
        &[
            "3 @Forward spec.rules[0].async.idempotency.onUnknown: has no effect on messages: one whose outcome is unknown is delivered again, and a repeat with its key is answered with the same message; it is for the rule's own idempotency",
        ],
    );
    check(
        "W313",
        &route("{fault: {async: {duplicate: {percent: 1}}}}"),
        &["3 @async spec.rules[0].fault.async: the rule makes no messages that it could meet"],
    );
    check(
        "W313",
        &route("{fault: {async: {duplicate: {percent: 1}}}, async: {when: Always}}"),
        &[],
    );
}

#[test]
fn reports_for_people_programs_and_review() {
    let report = load(&[Source::new(
        "shop/routes.yaml",
        route("{timeouts: {perTri: 1s}}"),
    )])
    .report;
    assert!(report.render_text().starts_with(
        "shop/routes.yaml:3:14: error[E103] spec.rules[0].timeouts.perTri: unknown field; did you mean \"perTry\"?\n"
    ));
    assert_eq!(report.summary(), "1 document, 1 error, 0 warnings");
    let json: serde_json::Value = serde_json::from_str(&report.render_json()).unwrap();
    assert_eq!(json["problems"][0]["line"], 3);
    assert!(report.render_github().starts_with(
        "::error file=shop/routes.yaml,line=3,col=14,title=E103::spec.rules[0].timeouts.perTri: "
    ));
}

#[test]
fn bootstrap_problems() {
    let proxy = |text: &str, code: &str, expected: &[&str]| {
        let (loaded, report) = bootstrap::load_proxy(&Source::new("proxy.yaml", text));
        let source = Source::new("proxy.yaml", text);
        let found = lines(&report, &[source], code);
        assert_eq!(found, expected, "{}", report.render_text());
        assert!(loaded.is_none());
    };
    let base = "workload: {name: a}\nlisten: {outbound: '127.0.0.1:0'}\n";
    proxy(
        base,
        "E105",
        &["1 @workload exactly one of mesh, controlPlane must be set"],
    );
    proxy(
        &format!("{base}mesh: a\ncontrolPlane: {{address: 'http://127.0.0.1:1'}}"),
        "E105",
        &["4 @controlPlane controlPlane: exactly one of mesh, controlPlane may be set"],
    );
    proxy(
        &format!("{base}controlPlane: {{address: 'http://10.0.0.1:1'}}"),
        "E401",
        &[
            "3 @'http controlPlane.address: plaintext only to loopback: tokens and signing must not be readable on the way",
        ],
    );
    proxy(
        &format!("{base}controlPlane: {{address: 'https://10.0.0.1:1'}}"),
        "E405",
        &[
            "3 @controlPlane controlPlane: https:// needs bundle: the authorities that vouch for the control plane",
        ],
    );
    proxy(
        "workload: {name: a}\nmesh: a\nidentity: {controlPlane: {}}",
        "E406",
        &[
            "3 @controlPlane identity.controlPlane: needs controlPlane: its authority signs our certificates",
        ],
    );
    proxy(
        &format!(
            "{base}controlPlane: {{address: 'http://127.0.0.1:1'}}\nidentity: {{controlPlane: {{}}}}"
        ),
        "E406",
        &[
            "4 @controlPlane identity.controlPlane: needs controlPlane.tokenFile: nothing is signed for who cannot say who it is",
        ],
    );
    proxy(
        "workload: {name: a}\nmesh: a\nlisten: {outbound: [], inbound: []}\n",
        "E402",
        &["3 @listen listen: neither outbound nor inbound: there is nothing to serve"],
    );
    proxy(
        "workload: {name: a}\nmesh: a\nlisten: {outbound: '127.0.0.1:1', admin: ['[::1]:1', '127.0.0.1:1']}",
        "E403",
        &["3 @admin listen.admin: 127.0.0.1:1 is already that of listen.outbound"],
    );
    proxy(
        "workload: {name: a}\nmesh: a\napp: 127.0.0.1:15006",
        "E404",
        &[
            "3 @127.0.0.1 app: 127.0.0.1:15006 is the sidecar's own listener 0.0.0.0:15006, not the app's",
        ],
    );
    proxy(
        "workload: {name: a}\nmesh: a\nlisten: {outbound: [here]}",
        "E106",
        &[
            "3 @here listen.outbound[0]: expected an address such as \"127.0.0.1:15001\", found \"here\"",
        ],
    );
    proxy(
        "workload: {name: a}\nmesh: a\nworker: 2",
        "E103",
        &["3 @worker worker: unknown field; did you mean \"workers\"?"],
    );
    proxy(
        "",
        "E110",
        &["1 @ a sidecar's bootstrap is one document, found 0"],
    );
    let source = Source::new("cp.yaml", "listen: {discovery: '0.0.0.0:1'}\nconfig: a");
    let (_, report) = bootstrap::load_control_plane(&source);
    assert_eq!(
        lines(&report, &[source], "E401"),
        ["1 @'0.0.0.0 listen.discovery: plaintext only on loopback; set tls"]
    );
    let plane = |more: &str, code: &str, expected: &[&str]| {
        let base = "listen: {discovery: '127.0.0.1:1'}\nconfig: a\n";
        let source = Source::new("cp.yaml", format!("{base}{more}"));
        let (_, report) = bootstrap::load_control_plane(&source);
        assert_eq!(lines(&report, &[source], code), expected);
    };
    plane(
        "ca: {certificate: a}",
        "E105",
        &["3 @ca ca: certificate and key come together, or both from stateDir"],
    );
    for ttl in ["1s", "2161h"] {
        let expected = format!("3 @{ttl} ca.leafTtl: a certificate lives 2s to 2160h");
        plane(&format!("ca: {{leafTtl: {ttl}}}"), "E407", &[&expected]);
    }
    plane(
        "ca: {}\njoin: {tokens: [{file: a, serviceAccounts: []}, {file: b, serviceAccounts: [web, '*/*']}]}",
        "E408",
        &[
            "4 @serviceAccounts join.tokens[0].serviceAccounts: a token for no service account lets nobody join",
            "4 @web join.tokens[1].serviceAccounts[0]: expected namespace/name, with * for any, found \"web\"",
        ],
    );
    plane(
        "ca: {}\njoin: {kubernetes: {address: 'http://api'}}",
        "E411",
        &[
            "4 @'http join.kubernetes.address: expected https://host:port, found \"http://api\": tokens are for its eyes only",
        ],
    );
    plane(
        "join: {tokens: [{file: a, serviceAccounts: ['shop/*']}]}",
        "W402",
        &["3 @join join: without ca nobody signs for who joins"],
    );
    plane(
        "api: {requireToken: true}",
        "E412",
        &["3 @true api.requireToken: without tokens nobody could change anything"],
    );
    plane(
        "api: {tokens: [{name: ' ', file: a}]}",
        "E412",
        &["3 @' api.tokens[0].name: the history needs a name"],
    );
    let canary = |canary: &str, code: &str, expected: &str| {
        plane(&format!("rollout: {{canary: {canary}}}"), code, &[expected]);
    };
    canary(
        "{percent: 5, labels: {a: b}}",
        "E105",
        "3 @labels rollout.canary.labels: at most one of percent, labels may be set",
    );
    canary(
        "{labels: {}}",
        "E409",
        "3 @labels rollout.canary.labels: no labels would be everybody; name one, or use percent",
    );
    canary(
        "{percent: 0}",
        "E409",
        "3 @0 rollout.canary.percent: nobody would try it; leave canary out to push to all at once",
    );
    let both = "exactly one of directory, etcd must be set";
    let both = format!("3 @replicas replicas: {both}");
    plane("replicas: {}", "E105", &[&both]);
    let etcd = "{endpoints: ['http://a:1']}";
    plane(
        &format!("replicas: {{directory: a, etcd: {etcd}}}"),
        "E105",
        &[&both],
    );
    plane(
        "replicas: {lease: 1s, etcd: {endpoints: ['a:1'], prefix: ''}}",
        "E410",
        &[
            "3 @1s replicas.lease: the lead is lost after 2s to 5m",
            "3 @'a replicas.etcd.endpoints[0]: expected http://host:port, found \"a:1\"",
            "3 @'' replicas.etcd.prefix: without a prefix every key of the etcd would be ours",
        ],
    );
}

#[test]
fn tokens_are_read_from_one_place_and_asked_for_where_they_are_read() {
    let service = |jwt: &str| {
        format!(
            "{{apiVersion: outrigger.dev/v1alpha1, kind: MeshService, metadata: {{name: a}}, \
             spec: {{jwt: [{jwt}]}}}}"
        )
    };
    check(
        "E105",
        &service("{issuer: i, audiences: [a], jwks: {file: k, url: 'http://k'}}"),
        &["1 @jwks spec.jwt[0].jwks: exactly one of file, url must be set"],
    );
    check(
        "E202",
        &service(
            "{issuer: i, audiences: [a], jwks: {file: k}}, {issuer: i, audiences: [b], jwks: {file: k}}",
        ),
        &["1 @i spec.jwt[1].issuer: \"i\" is listed already"],
    );
    check(
        "E308",
        &service("{issuer: i, audiences: [a], jwks: {url: 'http://k', refresh: 0s}}"),
        &["1 @0s spec.jwt[0].jwks.refresh: must be at least 1s"],
    );
    check(
        "W311",
        "{apiVersion: outrigger.dev/v1alpha1, kind: MeshService, metadata: {name: a}, spec: {}}\n---\n\
         {apiVersion: outrigger.dev/v1alpha1, kind: AuthorizationPolicy, metadata: {name: p}, \
         spec: {services: [a], action: Allow, rules: [{from: [{tokens: [{issuers: [i]}]}]}]}}",
        &["3 @tokens spec.rules[0].from[0].tokens: default/a has no jwt: it reads no tokens"],
    );
}
