use super::*;
use http::{HeaderName, HeaderValue};
use proptest::prelude::*;

/// A request as a test writes it: `POST /v1/orders?a=1` and headers.
struct Request {
    method: Method,
    path: String,
    query: Option<String>,
    headers: HeaderMap,
}

impl Request {
    fn new(line: &str, headers: &[(&str, &str)]) -> Self {
        let (method, target) = line.split_once(' ').unwrap();
        let (path, query) = match target.split_once('?') {
            Some((path, query)) => (path, Some(query.to_owned())),
            None => (target, None),
        };
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.append(
                name.parse::<HeaderName>().unwrap(),
                HeaderValue::from_str(value).unwrap(),
            );
        }
        Request {
            method: method.parse().unwrap(),
            path: path.to_owned(),
            query,
            headers: map,
        }
    }

    fn view(&self) -> RequestView<'_> {
        RequestView {
            method: &self.method,
            host: "orders",
            path: &self.path,
            query: self.query.as_deref(),
            headers: &self.headers,
        }
    }
}

fn any() -> Match {
    Match::default()
}

fn exact(path: &str) -> Match {
    Match {
        path: Some(PathMatch::Exact(path.into())),
        ..any()
    }
}

fn prefix(path: &str) -> Match {
    Match {
        path: Some(PathMatch::Prefix(path.into())),
        ..any()
    }
}

fn regex(path: &str) -> Match {
    Match {
        path: Some(PathMatch::regex(path).unwrap()),
        ..any()
    }
}

fn grpc(service: Option<&str>, method: Option<&str>) -> Match {
    let (service, method) = (service.map(str::to_owned), method.map(str::to_owned));
    Match {
        grpc: Some(GrpcMatch { service, method }),
        ..any()
    }
}

fn post(on: Match) -> Match {
    Match {
        method: Some(Method::POST),
        ..on
    }
}

fn header(mut on: Match, name: &str, value: ValueMatch) -> Match {
    on.headers.push(HeaderMatch {
        name: name.parse().unwrap(),
        value,
    });
    on
}

fn query(mut on: Match, name: &str, value: ValueMatch) -> Match {
    on.query.push(QueryMatch {
        name: name.into(),
        value,
    });
    on
}

fn is(value: &str) -> ValueMatch {
    ValueMatch::Exact(value.into())
}

#[allow(clippy::needless_pass_by_value)] // reads better in the tables below
fn check(on: Match, line: &str, headers: &[(&str, &str)], expected: bool) {
    let found = RuleSet::new(vec![vec![on.clone()]]).find(&Request::new(line, headers).view());
    assert_eq!(
        found.is_some(),
        expected,
        "{on:?} against {line} {headers:?}"
    );
}

#[test]
fn paths() {
    check(exact("/v1"), "GET /v1", &[], true);
    check(exact("/v1"), "GET /v1/", &[], false);
    check(prefix("/v1"), "GET /v1", &[], true);
    check(prefix("/v1"), "GET /v1/a", &[], true);
    check(prefix("/v1"), "GET /v10", &[], false);
    check(prefix("/v1/"), "GET /v1", &[], true);
    check(prefix("/v1/"), "GET /v1/a", &[], true);
    check(prefix("/"), "GET /v1", &[], true);
    check(prefix("/"), "OPTIONS *", &[], true);
    check(regex("/v[0-9]+"), "GET /v12", &[], true);
    check(regex("/v[0-9]+"), "GET /v12/a", &[], false);
    check(regex("/a|/b"), "GET /bc", &[], false);
    check(regex("(?x) /a # a comment"), "GET /a", &[], true);
    check(any(), "GET /anything", &[], true);
}

#[test]
fn an_expression_cannot_escape_its_anchors() {
    assert!(PathMatch::regex("a)(?:b").is_err());
    assert!(PathMatch::regex("(").is_err());
    assert!(PathMatch::regex("a{1000}{1000}{1000}").is_err());
}

#[test]
fn methods_headers_and_query() {
    check(post(any()), "POST /", &[], true);
    check(post(any()), "GET /", &[], false);
    let canary = || header(any(), "x-canary", is("1"));
    check(canary(), "GET /", &[("x-canary", "1")], true);
    check(canary(), "GET /", &[("x-canary", "2")], false);
    check(canary(), "GET /", &[], false);
    let list = || header(any(), "x-a", is("1,2"));
    check(list(), "GET /", &[("x-a", "1"), ("x-a", "2")], true);
    check(list(), "GET /", &[("x-a", "1")], false);
    check(
        header(any(), "cookie", is("a=1; b=2")),
        "GET /",
        &[("cookie", "a=1"), ("cookie", "b=2")],
        true,
    );
    let number = || ValueMatch::regex("[0-9]+").unwrap();
    check(
        header(any(), "x-a", number()),
        "GET /",
        &[("x-a", "12")],
        true,
    );
    check(
        header(any(), "x-a", number()),
        "GET /",
        &[("x-a", "12a")],
        false,
    );
    check(query(any(), "a", is("1")), "GET /?b=2&a=1", &[], true);
    check(query(any(), "a", is("1")), "GET /?a=2&a=1", &[], false);
    check(query(any(), "a", is("x y")), "GET /?%61=x%20y", &[], true);
    check(query(any(), "a", is("x+y%2")), "GET /?a=x+y%2", &[], true);
    check(query(any(), "a", is("")), "GET /?a", &[], true);
    check(query(any(), "a", is("")), "GET /", &[], false);
    check(query(any(), "a", number()), "GET /?a=7", &[], true);
}

#[test]
fn grpc_calls() {
    let reserve = || grpc(Some("shop.Inventory"), Some("Reserve"));
    check(reserve(), "POST /shop.Inventory/Reserve", &[], true);
    check(reserve(), "GET /shop.Inventory/Reserve", &[], false);
    check(reserve(), "POST /shop.Inventory/Release", &[], false);
    check(
        grpc(Some("shop.Inventory"), None),
        "POST /shop.Inventory/Release",
        &[],
        true,
    );
    check(
        grpc(Some("shop.Inventory"), None),
        "POST /shop.Inventory",
        &[],
        false,
    );
    check(
        grpc(None, Some("Reserve")),
        "POST /other/Reserve",
        &[],
        true,
    );
    check(grpc(None, None), "POST /a/b", &[], true);
    check(grpc(None, None), "POST /a/b/c", &[], false);
}

#[test]
fn the_more_specific_match_wins_whatever_the_order() {
    let in_order = || {
        vec![
            post(exact("/v1/orders")),
            exact("/v1/orders"),
            regex("/v1/orders|/v2"),
            regex("/v1/.*"),
            post(prefix("/v1/orders")),
            query(header(prefix("/v1/orders"), "x-a", is("1")), "q", is("1")),
            header(prefix("/v1/orders"), "x-a", is("1")),
            query(prefix("/v1/orders"), "q", is("1")),
            prefix("/v1/orders"),
            prefix("/v1/"),
            post(any()),
            any(),
        ]
    };
    let request = Request::new("POST /v1/orders?q=1", &[("x-a", "1")]);
    for dropped in 0..in_order().len() {
        let mut matches = in_order().split_off(dropped);
        let count = matches.len();
        assert_eq!(
            rules_of(&matches).find(&request.view()),
            Some(0),
            "{dropped}"
        );
        matches.reverse();
        assert_eq!(
            rules_of(&matches).find(&request.view()),
            Some(count - 1),
            "{dropped}"
        );
    }
}

fn rules_of(matches: &[Match]) -> RuleSet {
    RuleSet::new(matches.iter().map(|on| vec![on.clone()]).collect())
}

#[test]
fn grpc_matches_with_a_service_come_before_those_without() {
    let matches = [
        grpc(None, Some("AVeryLongMethodName")),
        grpc(Some("s"), None),
        grpc(Some("s"), Some("AVeryLongMethodName")),
    ];
    let request = Request::new("POST /s/AVeryLongMethodName", &[]);
    assert_eq!(rules_of(&matches).find(&request.view()), Some(2));
    assert_eq!(rules_of(&matches[..2]).find(&request.view()), Some(1));
}

#[test]
fn among_equals_the_earlier_rule_wins_and_a_rule_without_matches_takes_all() {
    let rules = RuleSet::new(vec![vec![], vec![any()], vec![exact("/x"), prefix("/y")]]);
    let find = |line| rules.find(&Request::new(line, &[]).view());
    assert_eq!(find("GET /"), Some(0));
    assert_eq!(find("GET /x"), Some(2));
    assert_eq!(find("GET /y/z"), Some(2));
    assert_eq!(
        RuleSet::new(vec![]).find(&Request::new("GET /", &[]).view()),
        None
    );
}

#[test]
fn explain_says_what_was_chosen_beaten_and_missed() {
    let rules = RuleSet::new(vec![
        vec![post(exact("/v1/orders"))],
        vec![header(prefix("/v1"), "x-canary", is("1"))],
        vec![],
        vec![prefix("/v1")],
        vec![grpc(Some("shop.Inventory"), None)],
        vec![query(prefix("/v1"), "q", is("1"))],
    ]);
    let request = Request::new("POST /v1/mail?q=2", &[]);
    let said: Vec<_> = rules
        .explain(&request.view())
        .into_iter()
        .map(|considered| match considered.verdict {
            Verdict::Chosen => (considered.rule, "chosen".to_owned()),
            Verdict::LowerPrecedence => (considered.rule, "beaten".to_owned()),
            Verdict::Missed(reason) => (considered.rule, reason.to_string()),
        })
        .collect();
    let expected = [
        (0, "path /v1/mail is not exactly /v1/orders"),
        (4, "path /v1/mail is not gRPC shop.Inventory/*"),
        (1, "header x-canary is missing, wanted \"1\""),
        (5, "query parameter q is \"2\", wanted \"1\""),
        (3, "chosen"),
        (2, "beaten"),
    ];
    assert_eq!(said, expected.map(|(rule, text)| (rule, text.to_owned())));
}

fn some_match() -> impl Strategy<Value = Match> {
    let segment = prop_oneof![Just("/a"), Just("/a/b"), Just("/b"), Just("/"), Just("/a/")];
    let path = prop_oneof![
        Just(None),
        segment
            .clone()
            .prop_map(|path| Some(PathMatch::Exact(path.into()))),
        segment.prop_map(|path| Some(PathMatch::Prefix(path.into()))),
        prop_oneof![Just("/a.*"), Just(".*"), Just("/[ab]")]
            .prop_map(|source| Some(PathMatch::regex(source).unwrap())),
    ];
    let name = prop_oneof![Just("x"), Just("y")];
    let values = prop::collection::vec((name, prop_oneof![Just("1"), Just("2")]), 0..3);
    let calls = prop_oneof![
        4 => Just(None),
        1 => Just(Some((Some("a"), None))),
        1 => Just(Some((Some("a"), Some("b")))),
        1 => Just(Some((None, Some("b")))),
    ];
    (path, proptest::bool::ANY, values.clone(), values, calls).prop_map(
        |(path, posts, hs, qs, call)| {
            let mut on = Match {
                path,
                ..Match::default()
            };
            on.method = posts.then_some(Method::POST);
            on.headers
                .extend(hs.into_iter().map(|(name, value)| HeaderMatch {
                    name: HeaderName::from_static(name),
                    value: is(value),
                }));
            on.query
                .extend(qs.into_iter().map(|(name, value)| QueryMatch {
                    name: name.into(),
                    value: is(value),
                }));
            on.grpc = call.and_then(|(service, method)| grpc(service, method).grpc);
            on
        },
    )
}

proptest! {
    #[test]
    fn find_is_the_first_of_a_brute_force_search(
        rules in prop::collection::vec(prop::collection::vec(some_match(), 0..3), 0..8),
        line in prop_oneof![
            Just("GET /a"), Just("POST /a/b"), Just("GET /b?x=1"), Just("POST /a?x=1&y=2"),
        ],
        headers in prop::collection::vec(
            (prop_oneof![Just("x"), Just("y")], prop_oneof![Just("1"), Just("2")]), 0..3,
        ),
    ) {
        let request = Request::new(line, &headers);
        let compiled = RuleSet::new(rules.clone());
        // Independently of the sorting: the greatest specificity, then the earliest rule.
        let mut best: Option<(Specificity, usize)> = None;
        for (rule, matches) in rules.into_iter().enumerate() {
            let matches = if matches.is_empty() { vec![Match::default()] } else { matches };
            for on in matches {
                let specificity = Specificity::of(&on);
                let takes = on.check(&request.view()).is_ok();
                if takes && best.is_none_or(|(known, _)| specificity > known) {
                    best = Some((specificity, rule));
                }
            }
        }
        let found = compiled.find(&request.view());
        prop_assert_eq!(found, best.map(|(_, rule)| rule));
        let explained = compiled.explain(&request.view());
        let chosen: Vec<_> =
            explained.iter().filter(|c| c.verdict == Verdict::Chosen).map(|c| c.rule).collect();
        prop_assert_eq!(chosen, found.into_iter().collect::<Vec<_>>());
    }

    #[test]
    fn precedence_is_a_total_order(a in some_match(), b in some_match(), c in some_match()) {
        let [a, b, c] = [a, b, c].map(|on| Specificity::of(&on));
        prop_assert_eq!(a.cmp(&b), b.cmp(&a).reverse());
        prop_assert!(!(a <= b && b <= c) || a <= c);
    }

    #[test]
    fn no_query_panics(query in ".{0,30}", name in "[a%]{0,3}") {
        let _ = query_value(Some(&query), &name);
    }
}
