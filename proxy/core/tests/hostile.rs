//! Nothing that a peer can send makes a decision panic, and what must hold of its result holds.
//!
//! Generated from the pieces that attacks are made of, so that a few thousand cases go deep. The
//! seed is fixed and nothing is written down: every run is the same. PROPTEST_CASES and
//! PROPTEST_RNG_SEED look further.

#![allow(clippy::unwrap_used)]

use std::time::Duration;

use http::header::{CONNECTION, CONTENT_LENGTH, TE, TRANSFER_ENCODING, UPGRADE};
use http::{HeaderMap, HeaderName, HeaderValue, Method};
use outrigger_core::headers::{self, StripPolicy, TraceContext, Underscores};
use outrigger_core::host::{HostTable, parse_authority};
use outrigger_core::path::{self, Normalization};
use outrigger_core::route::{
    GrpcMatch, HeaderMatch, Match, PathMatch, QueryMatch, RequestView, RuleSet, ValueMatch, Verdict,
};
use outrigger_core::sniff::{self, Protocol};
use outrigger_core::time::UnixMillis;
use outrigger_core::{deadline, grpc};
use proptest::prelude::*;
use proptest::test_runner::RngSeed;

/// A second or two each in an unoptimised build.
fn config() -> ProptestConfig {
    let set = |name| std::env::var_os(name).is_some();
    let mut config = ProptestConfig {
        failure_persistence: None,
        ..ProptestConfig::default()
    };
    if !set("PROPTEST_CASES") {
        config.cases = 3000;
    }
    if !set("PROPTEST_RNG_SEED") {
        config.rng_seed = RngSeed::Fixed(0x6f75_7472);
    }
    config
}

/// Bytes: some of these pieces, and now and then anything.
fn bytes_of(pieces: &'static [&'static [u8]]) -> impl Strategy<Value = Vec<u8>> {
    let piece = prop_oneof![
        8 => prop::sample::select(pieces).prop_map(<[u8]>::to_vec),
        1 => prop::collection::vec(any::<u8>(), 0..6),
    ];
    prop::collection::vec(piece, 0..12).prop_map(|pieces| pieces.concat())
}

fn text_of(pieces: &'static [&'static str]) -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        8 => prop::sample::select(pieces).prop_map(str::to_owned),
        1 => "\\PC{0,4}",
    ];
    prop::collection::vec(piece, 0..12).prop_map(|pieces| pieces.concat())
}

const FIRST_BYTES: &[&[u8]] = &[
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"PRI * HTTP/2.0",
    b"GET",
    b" ",
    b"/",
    b"*",
    b"\r\n",
    b"\n",
    b"\r",
    b"http:",
    b"https://",
    b"CONNECT",
    b"\x16\x03\x01",
    b"\x00\x01",
    b"\x01",
    b"A",
    b"-",
    b"HTTP/1.1",
];

const NAMES: &[&str] = &[
    "connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "keep-alive",
    "host",
    "content-length",
    "x-forwarded-for",
    "x-forwarded-proto",
    "x-request-id",
    "prefer",
    "traceparent",
    "tracestate",
    "idempotency-key",
    "retry-after",
    "grpc-status",
    "grpc-timeout",
    "outrigger-attempt",
    "outrigger-delay",
    "outrigger-callback",
    "outrigger-deadline-ms",
    "x-forwarded-client-cert",
    "x_real-ip",
    "proxy-authorization",
    "cookie",
    "x-a",
];

const VALUES: &[&[u8]] = &[
    b"close",
    b",",
    b", ",
    b" ",
    b"\t",
    b"keep-alive",
    b"x-a",
    b"te",
    b"host",
    b"Content-Length",
    b"x-forwarded-for",
    b"outrigger-attempt",
    b"trailers",
    b"gzip",
    b";q=0",
    b"\"",
    b"\\",
    b"=",
    b"respond-async",
    b"wait",
    b"=9",
    b"99999999999999999999",
    b"-1",
    b"0",
    b"00-",
    b"ff",
    b"-",
    b"0af7651916cd43dd8448eb211c80319c",
    b"b7ad6b7169203331",
    b"-01",
    b"Sun, 06 Nov 1994 ",
    b"Sunday, 06-Nov-94 ",
    b"Sun Nov  6 ",
    b"08:49:37",
    b" GMT",
    b" 1994",
    b"Feb",
    b"31",
    b"\xff",
    b"10.0.0.1",
    b"[::1]",
    b"1S",
    b"8H",
    b"n",
    b"for=",
    b"unknown",
];

fn fields() -> impl Strategy<Value = HeaderMap> {
    let field = (prop::sample::select(NAMES), bytes_of(VALUES));
    prop::collection::vec(field, 0..10).prop_map(|fields| {
        let mut map = HeaderMap::new();
        for (name, value) in fields {
            if let Ok(value) = HeaderValue::from_bytes(&value) {
                map.append(HeaderName::from_static(name), value);
            }
        }
        map
    })
}

const AUTHORITIES: &[&str] = &[
    "orders",
    ".",
    ":",
    "80",
    "65536",
    "@",
    "user",
    "[",
    "]",
    "::1",
    "::ffff:10.0.0.1",
    "%",
    "_",
    "-",
    "A",
    "shop",
    "*",
    "/",
    " ",
    "fe80::1%25eth0",
    "x.y",
];

const TARGETS: &[&str] = &[
    "/",
    "//",
    ".",
    "..",
    "%2e",
    "%2F",
    "%5c",
    "\\",
    "%",
    "%0",
    "%00",
    "%zz",
    "admin",
    "v1",
    "a",
    "?",
    "&",
    "=",
    "+",
    "é",
    ";",
    "shop.Stock",
    "Reserve",
    "#",
    "dry-run",
    "1",
];

fn rules() -> RuleSet {
    let named = |path: PathMatch| Match {
        path: Some(path),
        ..Match::default()
    };
    RuleSet::new(vec![
        vec![named(PathMatch::Exact("/v1/a".into()))],
        vec![named(PathMatch::Prefix("/admin".into()))],
        vec![named(PathMatch::regex("/v[0-9]+/(a|admin)*").unwrap())],
        vec![Match {
            headers: vec![HeaderMatch {
                name: HeaderName::from_static("prefer"),
                value: ValueMatch::regex(".*wait.*").unwrap(),
            }],
            query: vec![QueryMatch {
                name: "dry-run".into(),
                value: ValueMatch::Exact("1".into()),
            }],
            ..Match::default()
        }],
        vec![Match {
            grpc: Some(GrpcMatch {
                service: Some("shop.Stock".into()),
                method: None,
            }),
            ..Match::default()
        }],
        vec![named(PathMatch::Prefix("/".into()))],
    ])
}

fn values<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Vec<&'a HeaderValue> {
    headers.get_all(name).iter().collect()
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn first_bytes(bytes in bytes_of(FIRST_BYTES), cut in 0_usize..64) {
        let verdict = sniff::sniff(&bytes);
        let first = sniff::sniff(&bytes[..cut.min(bytes.len())]);
        prop_assert!(first == Protocol::NeedMore || first == verdict);
    }

    #[test]
    fn fields_that_end_at_this_hop(before in fields(), from_app in any::<bool>()) {
        let mut after = before.clone();
        headers::strip_hop_by_hop(&mut after);
        for name in [CONNECTION, TRANSFER_ENCODING, UPGRADE, headers::KEEP_ALIVE] {
            prop_assert!(!after.contains_key(&name), "{name}");
        }
        let te = values(&after, &TE);
        prop_assert!(te.is_empty() || te == [&HeaderValue::from_static("trailers")]);
        // Whatever `Connection` says, who is meant and who asks stays, in requests and responses.
        for name in headers::PROTECTED {
            prop_assert_eq!(values(&before, &name), values(&after, &name));
        }
        prop_assert!(before.contains_key(CONTENT_LENGTH) == after.contains_key(CONTENT_LENGTH));
        let once = after.clone();
        headers::strip_hop_by_hop(&mut after);
        prop_assert_eq!(&once, &after);

        let policy = match from_app {
            true => StripPolicy::OutboundFromApp,
            false => StripPolicy::Untrusted,
        };
        headers::strip_outrigger(&mut after, policy);
        prop_assert!(!after.contains_key(headers::ATTEMPT));
        prop_assert!(!after.contains_key(headers::X_FORWARDED_CLIENT_CERT));
        prop_assert!(from_app || after.keys().all(|n| !n.as_str().starts_with(headers::PREFIX)));
        headers::strip_for_delivery(&mut after);
        prop_assert!(!after.contains_key(headers::PREFER));
    }

    #[test]
    fn fields_that_are_read(map in fields(), now in 0..4_000_000_000_000_u64) {
        let _ = headers::parse_prefer(&map);
        let _ = headers::idempotency_key(&map, &headers::IDEMPOTENCY_KEY);
        let _ = grpc::GrpcCode::from_headers(&map);
        if let Some(trace) = TraceContext::from_headers(&map) {
            let text = trace.to_header();
            prop_assert_eq!(TraceContext::parse(text.to_str().unwrap()), Some(trace));
        }
        for value in map.values() {
            if let Some(wait) = headers::parse_retry_after(value, UnixMillis(now)) {
                prop_assert!(wait <= Duration::from_secs(u64::MAX));
            }
            if let Ok(text) = value.to_str() {
                let _ = headers::parse_http_date(text, UnixMillis(now));
                let _ = TraceContext::parse(text);
                let _ = deadline::parse_deadline_ms(text);
                let _ = deadline::parse_grpc_timeout(text);
            }
        }
    }

    #[test]
    fn fields_that_are_added(mut map in fields(), trusted in any::<bool>(), seed in any::<u64>()) {
        let peer = "10.9.8.7".parse().unwrap();
        headers::append_forwarded_for(&mut map, peer, trusted);
        let list = values(&map, &headers::X_FORWARDED_FOR);
        prop_assert_eq!(list.len(), 1);
        let list = list[0].to_str().unwrap();
        prop_assert!(list.ends_with("10.9.8.7"));
        prop_assert!(trusted || list == "10.9.8.7");
        let present = headers::Present::of(&map);
        headers::set_forwarded_proto(&mut map, present, false, trusted);
        prop_assert!(trusted || values(&map, &headers::X_FORWARDED_PROTO) == ["http"]);
        let id = headers::ensure_request_id(&mut map, present, &mut fastrand::Rng::with_seed(seed));
        prop_assert_eq!(values(&map, &headers::X_REQUEST_ID), [&id]);
        prop_assert!(id.len() <= 128 && id.as_bytes().iter().all(u8::is_ascii_graphic));
        headers::screen_underscores(&mut map, Underscores::Drop).unwrap();
        prop_assert!(headers::screen_underscores(&mut map, Underscores::Refuse).is_ok());
    }

    #[test]
    fn hosts(authority in text_of(AUTHORITIES)) {
        let mut table = HostTable::new();
        for pattern in ["orders", "*.shop", "x.y"] {
            table.insert(pattern, None, pattern).unwrap();
        }
        if let Some((host, port)) = parse_authority(&authority) {
            prop_assert!(!host.contains(['@', '/', ' ', '%']), "{host}");
            prop_assert_eq!(host.to_ascii_lowercase(), host.as_ref());
            let again = parse_authority(&host).map(|(host, _)| host.into_owned());
            prop_assert_eq!(again.as_deref(), Some(host.as_ref()));
            let _ = table.get(&host, port);
        }
    }

    #[test]
    fn targets(target in text_of(TARGETS), map in fields(), post in any::<bool>()) {
        let target = format!("/{target}");
        let (path, query) = match target.split_once('?') {
            Some((path, query)) => (path, Some(query)),
            None => (target.as_str(), None),
        };
        let rules = rules();
        let method = if post { Method::POST } else { Method::GET };
        let find = |path: &str| {
            let view = RequestView { method: &method, host: "orders", path, query, headers: &map };
            let found = rules.find(&view);
            assert!(found.is_some(), "the last rule takes everything: {path}");
            let explained = rules.explain(&view);
            let chosen = explained.iter().find(|rule| rule.verdict == Verdict::Chosen);
            assert_eq!(chosen.map(|rule| rule.rule), found);
            found
        };
        find(path);
        for how in [
            Normalization::None,
            Normalization::Base,
            Normalization::MergeSlashes,
            Normalization::DecodeAndMergeSlashes,
        ] {
            if let Ok(normal) = path::normalize(path, how) {
                // What is forwarded is matched by the next sidecar as it was by this one.
                let next = path::normalize(&normal, how).unwrap();
                prop_assert_eq!(find(&normal), find(&next));
                let admin = normal.split('/').nth(1) == Some("admin");
                prop_assert!(!admin || how == Normalization::None || find(&normal) != Some(5));
            }
        }
    }
}
