//! Requests that are unusual and right, or made right: what a service gets of them, and that the
//! connection goes on, or ends, where it should. Fields are told by name without those that
//! Outrigger adds.

use fastrand::Rng;

use crate::rig::{Failures, Rig, get, told};

/// Whether the connection takes another request afterwards.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum After {
    /// It does.
    Open,
    /// It is closed.
    Closed,
}

use After::{Closed, Open};

/// What is sent, and what the service gets of it.
pub(crate) const CASES: &[(&str, &[u8], &[&str], After)] = &[
    // Where messages end.
    (
        "pipelined-three",
        b"GET /1 HTTP/1.1\r\nHost: orders\r\n\r\nGET /2 HTTP/1.1\r\nHost: orders\r\n\r\nGET /3 HTTP/1.1\r\nHost: orders\r\n\r\n",
        &["GET /1 HTTP/1.1 | host: orders || ", "GET /2 HTTP/1.1 | host: orders || ", "GET /3 HTTP/1.1 | host: orders || "],
        Open,
    ),
    (
        "pipelined-bodies",
        b"POST /1 HTTP/1.1\r\nHost: orders\r\nContent-Length: 2\r\n\r\nabPUT /2 HTTP/1.1\r\nHost: orders\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nc\r\n0\r\n\r\nGET /3 HTTP/1.1\r\nHost: orders\r\n\r\n",
        &[
            "POST /1 HTTP/1.1 | content-length: 2 | host: orders || ab",
            "PUT /2 HTTP/1.1 | host: orders | transfer-encoding: chunked || c",
            "GET /3 HTTP/1.1 | host: orders || ",
        ],
        Open,
    ),
    (
        "body-surplus",
        b"POST /1 HTTP/1.1\r\nHost: orders\r\nContent-Length: 5\r\n\r\nhelloGET /2 HTTP/1.1\r\nHost: orders\r\n\r\n",
        &["POST /1 HTTP/1.1 | content-length: 5 | host: orders || hello", "GET /2 HTTP/1.1 | host: orders || "],
        Open,
    ),
    (
        "body-like-a-request",
        b"POST /1 HTTP/1.1\r\nHost: orders\r\nContent-Length: 38\r\n\r\nGET /inside HTTP/1.1\r\nHost: orders\r\n\r\n",
        &["POST /1 HTTP/1.1 | content-length: 38 | host: orders || GET /inside HTTP/1.1\\r\\nHost: orders\\r\\n\\r\\n"],
        Open,
    ),
    (
        "cl-0",
        b"POST /1 HTTP/1.1\r\nHost: orders\r\nContent-Length: 0\r\n\r\nGET /2 HTTP/1.1\r\nHost: orders\r\n\r\n",
        &["POST /1 HTTP/1.1 | content-length: 0 | host: orders || ", "GET /2 HTTP/1.1 | host: orders || "],
        Open,
    ),
    (
        "cl-none-post",
        b"POST /1 HTTP/1.1\r\nHost: orders\r\n\r\nGET /2 HTTP/1.1\r\nHost: orders\r\n\r\n",
        &["POST /1 HTTP/1.1 | content-length: 0 | host: orders || ", "GET /2 HTTP/1.1 | host: orders || "],
        Open,
    ),
    (
        "cl-get",
        b"GET /1 HTTP/1.1\r\nHost: orders\r\nContent-Length: 2\r\n\r\nabGET /2 HTTP/1.1\r\nHost: orders\r\n\r\n",
        &["GET /1 HTTP/1.1 | content-length: 2 | host: orders || ab", "GET /2 HTTP/1.1 | host: orders || "],
        Open,
    ),
    (
        "cl-leading-zeros",
        b"POST /1 HTTP/1.1\r\nHost: orders\r\nContent-Length: 002\r\n\r\nab",
        &["POST /1 HTTP/1.1 | content-length: 2 | host: orders || ab"],
        Open,
    ),
    (
        "te-white-space",
        b"POST /1 HTTP/1.1\r\nHost: orders\r\nTransfer-Encoding: \t chunked \t\r\n\r\n2\r\nab\r\n0\r\n\r\n",
        &["POST /1 HTTP/1.1 | host: orders | transfer-encoding: chunked || ab"],
        Open,
    ),
    (
        "te-upper-case",
        b"POST /1 HTTP/1.1\r\nHost: orders\r\nTRANSFER-ENCODING: CHUNKED\r\n\r\n2\r\nab\r\n0\r\n\r\n",
        &["POST /1 HTTP/1.1 | host: orders | transfer-encoding: chunked || ab"],
        Open,
    ),
    (
        "empty-line-before",
        b"\r\nGET /1 HTTP/1.1\r\nHost: orders\r\n\r\n\r\nGET /2 HTTP/1.1\r\nHost: orders\r\n\r\n",
        &["GET /1 HTTP/1.1 | host: orders || ", "GET /2 HTTP/1.1 | host: orders || "],
        Open,
    ),
    (
        "after-close",
        b"GET /1 HTTP/1.1\r\nHost: orders\r\nConnection: close\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: orders\r\n\r\n",
        &["GET /1 HTTP/1.1 | host: orders || "],
        Closed,
    ),
    (
        "after-refused",
        b"GET /1 HTTP/1.1\r\nHost: orders\r\n\r\nGET /2 HTTP/1.1\r\nHost : orders\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: orders\r\n\r\n",
        &["GET /1 HTTP/1.1 | host: orders || "],
        Closed,
    ),
    // Targets.
    (
        "absolute-form",
        b"GET http://orders/a?b=c HTTP/1.1\r\nHost: orders\r\n\r\n",
        &["GET /a?b=c HTTP/1.1 | host: orders || "],
        Open,
    ),
    (
        "absolute-form-other-host",
        b"GET http://orders/a HTTP/1.1\r\nHost: evil\r\n\r\n",
        &["GET /a HTTP/1.1 | host: orders || "],
        Open,
    ),
    (
        "absolute-form-port",
        b"GET http://orders:80/a HTTP/1.1\r\nHost: evil:81\r\n\r\n",
        &["GET /a HTTP/1.1 | host: orders:80 || "],
        Open,
    ),
    (
        "absolute-form-no-path",
        b"GET http://orders HTTP/1.1\r\nHost: orders\r\n\r\n",
        &["GET / HTTP/1.1 | host: orders || "],
        Open,
    ),
    (
        "target-bytes-kept",
        b"GET /a%2Fb//d;e=f?q=%20+/../&r=%00&s=%ff&&?= HTTP/1.1\r\nHost: orders\r\n\r\n",
        &["GET /a%2Fb//d;e=f?q=%20+/../&r=%00&s=%ff&&?= HTTP/1.1 | host: orders || "],
        Open,
    ),
    (
        "target-one-form",
        b"GET /a/./b/../%63 HTTP/1.1\r\nHost: orders\r\n\r\n",
        &["GET /a/c HTTP/1.1 | host: orders || "],
        Open,
    ),
    (
        "options-asterisk",
        b"OPTIONS * HTTP/1.1\r\nHost: orders\r\n\r\n",
        &["OPTIONS * HTTP/1.1 | host: orders || "],
        Open,
    ),
    (
        "method-unknown",
        b"M-SEARCH / HTTP/1.1\r\nHost: orders\r\n\r\n",
        &["M-SEARCH / HTTP/1.1 | host: orders || "],
        Open,
    ),
    (
        "method-lower-case-second",
        b"GET /1 HTTP/1.1\r\nHost: orders\r\n\r\nget /2 HTTP/1.1\r\nHost: orders\r\n\r\n",
        &["GET /1 HTTP/1.1 | host: orders || ", "get /2 HTTP/1.1 | host: orders || "],
        Open,
    ),
    // Fields.
    (
        "field-empty",
        b"GET /1 HTTP/1.1\r\nHost: orders\r\nX-A:\r\nX-B: \t \r\n\r\n",
        &["GET /1 HTTP/1.1 | host: orders | x-a:  | x-b:  || "],
        Open,
    ),
    (
        "field-white-space",
        b"GET /1 HTTP/1.1\r\nHost:orders\t \r\nX-A: \t a \t b \t\r\n\r\n",
        &["GET /1 HTTP/1.1 | host: orders | x-a: a \\t b || "],
        Open,
    ),
    (
        "field-obs-text",
        b"GET /1 HTTP/1.1\r\nHost: orders\r\nX-A: \x80\xff\xc3\xa4\r\n\r\n",
        &["GET /1 HTTP/1.1 | host: orders | x-a: \\x80\\xff\\xc3\\xa4 || "],
        Open,
    ),
    (
        "field-order",
        b"GET /1 HTTP/1.1\r\nHost: orders\r\nX-A: 1\r\nX-B: 2\r\nx-a: 3\r\nX-A: 1\r\n\r\n",
        &["GET /1 HTTP/1.1 | host: orders | x-a: 1 | x-a: 3 | x-a: 1 | x-b: 2 || "],
        Open,
    ),
    (
        "field-name-symbols",
        b"GET /1 HTTP/1.1\r\nHost: orders\r\n!#$%&'*+-.^_`|~: a\r\n\r\n",
        &["GET /1 HTTP/1.1 | !#$%&'*+-.^_`|~: a | host: orders || "],
        Open,
    ),
    // What ends at this hop.
    (
        "connection-nominated",
        b"GET /1 HTTP/1.1\r\nHost: orders\r\nConnection: X-A, keep-alive,x-b\r\nX-A: 1\r\nX-B: 2\r\nX-C: 3\r\nKeep-Alive: timeout=5\r\nProxy-Connection: x\r\n\r\n",
        &["GET /1 HTTP/1.1 | host: orders | x-c: 3 || "],
        Open,
    ),
    (
        "connection-close-nominated",
        b"GET /1 HTTP/1.1\r\nHost: orders\r\nConnection: close, X-A\r\nX-A: 1\r\n\r\n",
        &["GET /1 HTTP/1.1 | host: orders || "],
        Closed,
    ),
    (
        "connection-names-length",
        b"POST /1 HTTP/1.1\r\nHost: orders\r\nConnection: Content-Length\r\nContent-Length: 2\r\n\r\nab",
        &["POST /1 HTTP/1.1 | content-length: 2 | host: orders || ab"],
        Open,
    ),
    (
        "connection-names-coding",
        b"POST /1 HTTP/1.1\r\nHost: orders\r\nConnection: Transfer-Encoding\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n",
        &["POST /1 HTTP/1.1 | host: orders | transfer-encoding: chunked || ab"],
        Open,
    ),
    (
        "connection-names-host",
        b"GET /1 HTTP/1.1\r\nHost: orders\r\nConnection: Host, Cookie, Authorization\r\nCookie: a\r\nAuthorization: b\r\n\r\n",
        &["GET /1 HTTP/1.1 | authorization: b | cookie: a | host: orders || "],
        Open,
    ),
    (
        "upgrade-h2c",
        b"GET /1 HTTP/1.1\r\nHost: orders\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n",
        &["GET /1 HTTP/1.1 | host: orders || "],
        Open,
    ),
    (
        "upgrade-h2c-not-nominated",
        b"GET /1 HTTP/1.1\r\nHost: orders\r\nUpgrade: h2c\r\n\r\n",
        &["GET /1 HTTP/1.1 | host: orders || "],
        Open,
    ),
    (
        "upgrade-h2c-body",
        b"POST /1 HTTP/1.1\r\nHost: orders\r\nConnection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: 2\r\n\r\nabGET /2 HTTP/1.1\r\nHost: orders\r\n\r\n",
        &["POST /1 HTTP/1.1 | content-length: 2 | host: orders || ab", "GET /2 HTTP/1.1 | host: orders || "],
        Open,
    ),
    (
        "te-list",
        b"GET /1 HTTP/1.1\r\nHost: orders\r\nTE: gzip, trailers;q=0.5\r\n\r\n",
        &["GET /1 HTTP/1.1 | host: orders || "],
        Open,
    ),
    // HTTP/1.0.
    (
        "http-1-0",
        b"GET /1 HTTP/1.0\r\nHost: orders\r\n\r\n",
        &["GET /1 HTTP/1.1 | host: orders || "],
        Closed,
    ),
    (
        "http-1-0-keep-alive",
        b"GET /1 HTTP/1.0\r\nHost: orders\r\nConnection: keep-alive\r\n\r\n",
        &["GET /1 HTTP/1.1 | host: orders || "],
        Open,
    ),
    (
        "http-1-0-expect",
        b"POST /1 HTTP/1.0\r\nHost: orders\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\nab",
        &["POST /1 HTTP/1.1 | content-length: 2 | host: orders || ab"],
        Closed,
    ),
];

/// At the limits: name, head and what the service gets of it, but for the fields.
pub(crate) fn large() -> Vec<(&'static str, Vec<u8>, usize)> {
    let start = "GET /1 HTTP/1.1\r\nHost: orders\r\n";
    let many: String = (0..99).map(|n| format!("x-{n}: a\r\n")).collect();
    let long = "a".repeat(59 * 1024 + 900);
    let longer = format!("x-a: {}\r\n", "a".repeat(1024)).repeat(59);
    vec![
        ("fields-100", format!("{start}{many}\r\n").into_bytes(), 100),
        (
            "head-60-kib",
            format!("{start}x-a: {long}\r\n\r\n").into_bytes(),
            2,
        ),
        (
            "head-60-kib-of-fields",
            format!("{start}{longer}\r\n").into_bytes(),
            60,
        ),
        (
            "target-60-kib",
            format!("GET /{long} HTTP/1.1\r\nHost: orders\r\n\r\n").into_bytes(),
            1,
        ),
    ]
}

#[tokio::test]
async fn what_is_right_is_passed_on() {
    let rig = Rig::telling().await;
    let mut wrong = Failures::default();
    for (at, (name, bytes, forwarded, after)) in CASES.iter().enumerate() {
        // In one piece, in several, and byte by byte.
        for longest in [usize::MAX, 20, 1] {
            let rng = &mut Rng::with_seed(at as u64);
            let mut found = Failures::default();
            let case = pass(
                &rig, name, bytes, forwarded, *after, longest, rng, &mut found,
            );
            let seen = rig.around(name, &mut wrong, case).await;
            wrong.take(found);
            let mut all: Vec<String> = seen.iter().map(|seen| told(&seen.message)).collect();
            all.retain(|told| !told.starts_with("GET /after "));
            let name = format!("{name}, {longest}");
            wrong.check(&name, all == *forwarded, format!("forwarded {all:#?}"));
            let whole = seen.iter().all(|seen| seen.complete);
            wrong.check(&name, whole, "not forwarded whole");
        }
    }
    wrong.finish();
}

#[allow(clippy::too_many_arguments)] // the columns of the table
async fn pass(
    rig: &Rig,
    name: &str,
    bytes: &[u8],
    forwarded: &[&str],
    after: After,
    longest: usize,
    rng: &mut Rng,
    wrong: &mut Failures,
) {
    let mut caller = rig.caller().await;
    match longest {
        usize::MAX => caller.send(bytes).await,
        _ => caller.send_split(bytes, longest, rng).await,
    }
    for message in forwarded {
        let told: Vec<&str> = message.split(' ').take(2).collect();
        let answer = caller.answer(told[0]).await;
        let text = answer.as_ref().map(|reply| reply.message.text());
        let own = text.as_deref() == Ok(&*told.join(" "));
        wrong.check(name, own, format!("{answer:?}"));
    }
    if after == Open {
        caller.send(get("/after")).await;
        let answer = caller.answer("GET").await;
        let text = answer.as_ref().map(|reply| reply.message.text());
        wrong.check(
            name,
            text.as_deref() == Ok("GET /after"),
            format!("after: {answer:?}"),
        );
        return;
    }
    // What comes second may be refused before that.
    let mut closed = caller.closed().await;
    if name == "after-refused" {
        closed = closed.or_else(|said| match said.contains("outrigger-error: bad_request") {
            true => Ok(()),
            false => Err(said),
        });
    }
    if let Err(what) = closed {
        wrong.add(name, what);
    }
}

#[tokio::test]
async fn heads_at_the_limits_are_passed_on() {
    let rig = Rig::telling().await;
    let mut wrong = Failures::default();
    for (name, bytes, fields) in large() {
        for longest in [usize::MAX, 6000] {
            let before = rig.origin.seen().len();
            let rng = &mut Rng::with_seed(1);
            let mut caller = rig.caller().await;
            match longest {
                usize::MAX => caller.send(&bytes).await,
                _ => caller.send_split(&bytes, longest, rng).await,
            }
            let status = caller.answer("GET").await.map(|reply| reply.status());
            wrong.check(name, status == Ok(200), format!("{status:?}"));
            let seen = rig.origin.seen().split_off(before);
            let [seen] = &seen[..] else {
                wrong.add(name, format!("forwarded {} times", seen.len()));
                continue;
            };
            let had = told(&seen.message).matches(" | ").count();
            wrong.check(name, had == fields, format!("{had} fields"));
        }
    }
    wrong.finish();
}
