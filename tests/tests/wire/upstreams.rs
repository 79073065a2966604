//! Services that cannot be reached, leave at the wrong moment, or break HTTP/2: each is told with
//! one code, and counted with it.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use outrigger_tests::client::Client;
use outrigger_tests::client::{Answer, Ask};
use outrigger_tests::frames::{
    self, DATA, END_HEADERS, END_STREAM, GOAWAY, HEADERS, OK, RST_STREAM, SETTINGS, frame, go_away,
    peer, refused,
};
use outrigger_tests::mesh::{Sidecar, route, service, service_h2};
use outrigger_tests::raw::{Act, Origin, black_hole, tell};
use outrigger_tests::upstream::{Raw, nobody};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::Notify;

use crate::rig::CALM;

const ONCE: &str = "{timeouts: {connect: 300ms, request: 5s}, retry: {attempts: 0, budget: {percent: 0, minPerSecond: 0}}}";

/// What one GET over h1 and one over h2 are told, and that it was counted so.
async fn fails(yaml: String, status: u16, code: &str, what: &str) {
    let sidecar = Sidecar::start(yaml).await;
    let mut client = Client::h2(sidecar.outbound()).await;
    let answers: [Answer; 2] = [
        sidecar.get("orders", "/").await,
        client.call(Ask::get("orders", "/")).await,
    ];
    for answer in answers {
        assert_eq!(
            (answer.status, answer.code()),
            (status, code),
            "{what}: {}",
            answer.text()
        );
        answer.assert_error(status, code);
    }
    let labels = [("code", code), ("status", &*status.to_string())];
    let counted = sidecar
        .metrics()
        .await
        .sum("outrigger_requests_total", &labels);
    assert_eq!(counted, 2.0, "{what}");
}

#[tokio::test]
async fn a_port_where_nobody_listens_is_connect_failed() {
    let yaml = service("orders", &[nobody().await], CALM) + &route("orders", &[ONCE]);
    fails(yaml, 503, "connect_failed", "refused").await;
}

#[tokio::test]
async fn a_port_that_never_answers_is_connect_failed() {
    let (hole, _queued) = black_hole().await;
    let hole = hole.local_addr().expect("an address");
    let yaml = service("orders", &[hole], CALM) + &route("orders", &[ONCE]);
    fails(yaml, 503, "connect_failed", "black hole").await;
}

#[tokio::test]
async fn a_connection_reset_as_soon_as_it_is_made_is_one_failure() {
    for h2 in [false, true] {
        let upstream = Raw::start(|stream| async move {
            let _ = stream.set_zero_linger();
        })
        .await;
        let made = if h2 { service_h2 } else { service };
        let yaml = made("orders", &[upstream.addr], CALM) + &route("orders", &[ONCE]);
        let sidecar = Sidecar::start(yaml).await;
        let answer = sidecar.get("orders", "/").await;
        // Whether the connect or the exchange broke is a matter of microseconds.
        let told = (answer.status, answer.code().to_owned());
        let either = [
            (502, "upstream_reset".to_owned()),
            (503, "connect_failed".to_owned()),
        ];
        assert!(either.contains(&told), "{told:?}");
    }
}

/// Streams that an h2 service ends: what it does to each HEADERS.
type Script = fn(u32) -> Vec<u8>;

const CANCEL: u32 = 8;
const INTERNAL: u32 = 2;

/// What an h2 service does to every stream; the code.
const H2: &[(&str, Script, &str)] = &[
    ("h2-refused-stream", refused, "upstream_reset"),
    (
        "h2-reset-internal",
        |id| reset(id, INTERNAL),
        "upstream_reset",
    ),
    ("h2-reset-cancel", |id| reset(id, CANCEL), "upstream_reset"),
    ("h2-go-away-below", |_| go_away(0), "upstream_reset"),
    (
        "h2-go-away-error",
        |_| go_away_for(INTERNAL),
        "upstream_reset",
    ),
    (
        "h2-data-first",
        |id| frame(DATA, END_STREAM, id, b"hello"),
        "upstream_protocol",
    ),
    (
        "h2-status-missing",
        |id| frame(HEADERS, END_HEADERS | END_STREAM, id, &[]),
        "upstream_protocol",
    ),
    (
        "h2-status-600",
        |id| frame(HEADERS, END_HEADERS | END_STREAM, id, b"\x08\x03600"),
        "upstream_protocol",
    ),
    (
        "h2-status-101",
        |id| frame(HEADERS, END_HEADERS | END_STREAM, id, b"\x08\x03101"),
        "upstream_protocol",
    ),
    (
        "h2-frame-too-large",
        |id| frame(DATA, 0, id, &[0; 20_000]),
        "upstream_protocol",
    ),
];

fn go_away_for(reason: u32) -> Vec<u8> {
    frame(GOAWAY, 0, 0, &[[0; 4], reason.to_be_bytes()].concat())
}

fn reset(id: u32, reason: u32) -> Vec<u8> {
    frame(RST_STREAM, 0, id, &reason.to_be_bytes())
}

/// The names of the cases here.
pub(crate) fn names() -> Vec<&'static str> {
    H2.iter()
        .map(|(name, _, _)| *name)
        .chain(["h2-garbage"])
        .collect()
}

#[tokio::test]
async fn what_an_h2_service_does_to_a_stream_is_told_as_what_it_is() {
    for (name, script, code) in H2 {
        let script = *script;
        let upstream = peer(&[], move |kind, id| match kind {
            HEADERS => Some(script(id)),
            _ => Some(Vec::new()),
        })
        .await;
        let yaml = service_h2("orders", &[upstream.addr], CALM) + &route("orders", &[ONCE]);
        fails(yaml, 502, code, name).await;
    }
}

/// With the last stream ended there is nobody left to look at the connection.
#[tokio::test]
async fn a_connection_that_was_said_goodbye_to_is_closed_without_another_request() {
    let closed = Arc::new(Notify::new());
    let seen = Arc::clone(&closed);
    let upstream = Raw::start(move |mut stream| {
        let seen = Arc::clone(&seen);
        async move {
            let mut preface = [0; 24];
            let _ = stream.read_exact(&mut preface).await;
            let _ = stream.write_all(&frame(SETTINGS, 0, 0, &[])).await;
            while let Some(got) = frames::read(&mut stream).await {
                if got.kind == HEADERS {
                    let last = [go_away(got.stream), frames::answered(got.stream)].concat();
                    let _ = stream.write_all(&last).await;
                }
            }
            seen.notify_one();
        }
    })
    .await;
    let sidecar = Sidecar::start(service_h2("orders", &[upstream.addr], CALM)).await;
    assert_eq!(sidecar.get("orders", "/").await.status, 200);
    let patience = Duration::from_secs(30);
    let ended = tokio::time::timeout(patience, closed.notified()).await;
    ended.expect("the sidecar closes what it cannot use");
}

#[tokio::test]
async fn an_h2_service_that_is_none_is_told_as_such() {
    let upstream = Raw::start(|mut stream| async move {
        let mut preface = [0; 24];
        let _ = stream.read_exact(&mut preface).await;
        while let Some(got) = frames::read(&mut stream).await {
            if got.kind == HEADERS {
                let none = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n";
                let _ = stream.write_all(none).await;
            }
        }
    })
    .await;
    let yaml = service_h2("orders", &[upstream.addr], CALM) + &route("orders", &[ONCE]);
    fails(yaml, 502, "upstream_protocol", "h2-garbage").await;
}

#[tokio::test]
async fn an_h2_response_that_breaks_off_is_never_a_short_whole_one() {
    for (what, end) in [
        ("reset", (|id| reset(id, INTERNAL)) as Script),
        ("connection closed", |_| Vec::new()),
    ] {
        let upstream = Raw::start(move |mut stream| async move {
            let mut preface = [0; 24];
            let _ = stream.read_exact(&mut preface).await;
            let _ = stream.write_all(&frame(4, 0, 0, &[])).await;
            while let Some(got) = frames::read(&mut stream).await {
                if got.kind != HEADERS {
                    continue;
                }
                let head = frame(HEADERS, END_HEADERS, got.stream, OK);
                let start = frame(DATA, 0, got.stream, b"hello");
                let _ = stream.write_all(&[head, start].concat()).await;
                tokio::time::sleep(Duration::from_millis(30)).await;
                let last = end(got.stream);
                if last.is_empty() {
                    return;
                }
                let _ = stream.write_all(&last).await;
            }
        })
        .await;
        let yaml = service_h2("orders", &[upstream.addr], CALM) + &route("orders", &[ONCE]);
        let sidecar = Sidecar::start(yaml).await;
        let mut caller = outrigger_tests::raw::Caller::connect(sidecar.outbound()).await;
        caller.send(crate::rig::get("/")).await;
        let reply = caller.answer("GET").await.expect("a head");
        assert_eq!(reply.status(), 200, "{what}");
        assert!(reply.cut.is_some(), "{what}: {reply:?}");
        let mut client = Client::h2(sidecar.outbound()).await;
        let answer = client.try_call(Ask::get("orders", "/")).await;
        assert!(answer.is_err(), "{what}: {answer:?}");
        let scrape = sidecar.metrics().await;
        let reset = scrape.sum("outrigger_requests_total", &[("code", "upstream_reset")]);
        assert_eq!(reset, 2.0, "{what}");
    }
}

#[tokio::test]
async fn a_connection_that_closes_under_a_request_costs_no_get_and_no_post_twice() {
    // Each connection answers once and closes under its second request.
    let counts = Arc::new(AtomicUsize::new(0));
    let posts = Arc::clone(&counts);
    let connections = std::sync::Mutex::new(std::collections::HashSet::new());
    let origin = Origin::start(move |seen| {
        if seen.message.head.method() == "POST" {
            posts.fetch_add(1, Ordering::SeqCst);
        }
        let first = connections
            .lock()
            .expect("no panic")
            .insert(seen.connection);
        match first {
            true => vec![Act::Read, Act::Send(tell(&seen.message.head))],
            false => vec![Act::Close],
        }
    })
    .await;
    let yaml = service("orders", &[origin.addr], CALM) + &route("orders", &[ONCE]);
    let sidecar = Sidecar::start(yaml).await;
    for n in 0..10 {
        let answer = sidecar.get("orders", &format!("/{n}")).await;
        assert_eq!((answer.status, answer.text()), (200, format!("GET /{n}")));
    }
    for n in 0..10 {
        let before = counts.load(Ordering::SeqCst);
        let answer = sidecar
            .call(Ask::post("orders", &format!("/{n}"), "ab"))
            .await;
        match answer.status {
            200 => assert_eq!(answer.text(), format!("POST /{n}")),
            _ => answer.assert_error(502, "upstream_reset"),
        }
        assert_eq!(
            counts.load(Ordering::SeqCst),
            before + 1,
            "a POST was sent twice"
        );
    }
}

#[tokio::test]
async fn a_connection_that_closed_before_the_request_costs_nothing() {
    let origin = Origin::start(|seen| {
        let answer = tell(&seen.message.head);
        vec![Act::Read, Act::Send(answer), Act::Close]
    })
    .await;
    let yaml = service("orders", &[origin.addr], CALM) + &route("orders", &[ONCE]);
    let sidecar = Sidecar::start(yaml).await;
    for n in 0..20 {
        for method in ["GET", "POST"] {
            let answer = sidecar
                .call(Ask::new(method, "orders", &format!("/{n}")).body("ab"))
                .await;
            assert_eq!(answer.status, 200, "{method} {n}: {}", answer.text());
            // It closes by then.
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
    assert_eq!(origin.seen().len(), 40);
}
