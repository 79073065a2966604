//! Heads that are refused: 400 `bad_request` (431 `headers_too_large` over a limit), the
//! connection is closed, and not a byte reaches a service: neither of the request, nor of what
//! follows it on the connection.
//!
//! Bytes that begin like no HTTP at all are closed without an answer: the listener could be asked
//! for any protocol. On a connection that has spoken HTTP they are 400 as well.

use fastrand::Rng;

use crate::rig::{Failures, Rig, get, is_error};

/// What becomes of a request.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Answer {
    /// 400 `bad_request`.
    Bad,
    /// 431 `headers_too_large`.
    Large,
    /// Closed without a word when it comes first, 400 after another.
    Opaque,
}

use Answer::{Bad, Large, Opaque};

/// After the request line and `Host: orders`: fields, and a body.
pub(crate) const FIELDS: &[(&str, &[u8], &[u8])] = &[
    // Framing.
    (
        "cl-te",
        b"Content-Length: 5\r\nTransfer-Encoding: chunked",
        b"0\r\n\r\n",
    ),
    (
        "te-cl",
        b"Transfer-Encoding: chunked\r\nContent-Length: 5",
        b"0\r\n\r\n",
    ),
    (
        "te-cl-zero",
        b"Transfer-Encoding: chunked\r\nContent-Length: 0",
        b"0\r\n\r\n",
    ),
    ("te-identity", b"Transfer-Encoding: identity", b""),
    (
        "te-identity-cl",
        b"Transfer-Encoding: identity\r\nContent-Length: 5",
        b"hello",
    ),
    (
        "te-chunked-identity",
        b"Transfer-Encoding: chunked, identity",
        b"0\r\n\r\n",
    ),
    (
        "te-identity-chunked",
        b"Transfer-Encoding: identity, chunked",
        b"0\r\n\r\n",
    ),
    (
        "te-gzip-chunked",
        b"Transfer-Encoding: gzip, chunked",
        b"0\r\n\r\n",
    ),
    (
        "te-chunked-twice",
        b"Transfer-Encoding: chunked, chunked",
        b"0\r\n\r\n",
    ),
    ("te-xchunked", b"Transfer-Encoding: xchunked", b"0\r\n\r\n"),
    (
        "te-vertical-tab",
        b"Transfer-Encoding: chunked\x0b",
        b"0\r\n\r\n",
    ),
    (
        "te-form-feed",
        b"Transfer-Encoding: \x0cchunked",
        b"0\r\n\r\n",
    ),
    ("te-nbsp", b"Transfer-Encoding: \xa0chunked", b"0\r\n\r\n"),
    ("te-quoted", b"Transfer-Encoding: \"chunked\"", b"0\r\n\r\n"),
    (
        "te-parameter",
        b"Transfer-Encoding: chunked;q=1",
        b"0\r\n\r\n",
    ),
    ("te-empty", b"Transfer-Encoding: ", b"0\r\n\r\n"),
    ("te-comma", b"Transfer-Encoding: ,chunked", b"0\r\n\r\n"),
    (
        "te-two-fields",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
        b"0\r\n\r\n",
    ),
    (
        "te-two-fields-identity",
        b"Transfer-Encoding: identity\r\nTransfer-Encoding: chunked",
        b"0\r\n\r\n",
    ),
    (
        "te-two-fields-x",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: x",
        b"0\r\n\r\n",
    ),
    (
        "te-space-before-colon",
        b"Transfer-Encoding : chunked",
        b"0\r\n\r\n",
    ),
    ("te-fold", b"Transfer-Encoding:\r\n chunked", b"0\r\n\r\n"),
    (
        "te-after-fold",
        b"X-A: b\r\n\tTransfer-Encoding: chunked",
        b"0\r\n\r\n",
    ),
    (
        "te-after-bare-cr",
        b"X-A: b\rTransfer-Encoding: chunked",
        b"0\r\n\r\n",
    ),
    (
        "te-after-bare-lf",
        b"X-A: b\nTransfer-Encoding: chunked",
        b"0\r\n\r\n",
    ),
    (
        "cl-two-equal",
        b"Content-Length: 5\r\nContent-Length: 5",
        b"hello",
    ),
    (
        "cl-two-different",
        b"Content-Length: 5\r\nContent-Length: 6",
        b"hello",
    ),
    ("cl-list-equal", b"Content-Length: 5, 5", b"hello"),
    ("cl-list-different", b"Content-Length: 5, 6", b"hello"),
    ("cl-plus", b"Content-Length: +5", b"hello"),
    ("cl-minus", b"Content-Length: -1", b"hello"),
    ("cl-minus-zero", b"Content-Length: -0", b""),
    ("cl-hex", b"Content-Length: 0x5", b"hello"),
    ("cl-letters", b"Content-Length: 5a", b"hello"),
    ("cl-blank-inside", b"Content-Length: 5 5", b"hello"),
    ("cl-fraction", b"Content-Length: 5.0", b"hello"),
    ("cl-exponent", b"Content-Length: 1e1", b"hello"),
    ("cl-underscore", b"Content-Length: 1_0", b"hello"),
    ("cl-empty", b"Content-Length: ", b""),
    ("cl-comma", b"Content-Length: 5,", b"hello"),
    (
        "cl-overflow",
        b"Content-Length: 18446744073709551616",
        b"hello",
    ),
    (
        "cl-overflow-twice",
        b"Content-Length: 184467440737095516165",
        b"hello",
    ),
    ("cl-non-ascii-digit", b"Content-Length: \xd9\xa5", b"hello"),
    ("cl-vertical-tab", b"Content-Length: \x0b5", b"hello"),
    // Lines.
    ("fold-space", b"X-A: b\r\n c", b""),
    ("fold-tab", b"X-A: b\r\n\tc", b""),
    ("fold-blank", b"X-A: b\r\n ", b""),
    ("lf-field", b"X-A: b\nX-B: c", b""),
    ("cr-in-value", b"X-A: b\rc", b""),
    ("cr-cr-lf", b"X-A: b\r", b""),
    ("no-colon", b"X-A", b""),
    ("name-empty", b": b", b""),
    ("name-space-before-colon", b"X-A : b", b""),
    ("name-tab-before-colon", b"X-A\t: b", b""),
    ("name-space-inside", b"X A: b", b""),
    ("name-nul", b"X\0A: b", b""),
    ("name-ctl", b"X\x01A: b", b""),
    ("name-cr", b"X\rA: b", b""),
    ("name-non-ascii", b"X-\xc3\x84: b", b""),
    ("name-bracket", b"X[A]: b", b""),
    ("name-quote", b"\"X\": b", b""),
    ("value-nul", b"X-A: b\0c", b""),
    ("value-ctl", b"X-A: b\x01c", b""),
    ("value-escape", b"X-A: b\x1bc", b""),
    ("value-delete", b"X-A: b\x7fc", b""),
    ("value-vertical-tab", b"X-A: b\x0bc", b""),
    // Hosts.
    ("host-two", b"Host: evil", b""),
    ("host-two-equal", b"Host: orders", b""),
    // Expectations.
    ("expect-unknown", b"Expect: a-miracle", b""),
    (
        "expect-two",
        b"Expect: 100-continue\r\nExpect: 100-continue\r\nContent-Length: 1",
        b"a",
    ),
];

/// The request line, before `Host: orders`.
pub(crate) const LINES: &[(&str, &[u8], Answer)] = &[
    ("version-missing", b"GET /", Bad),
    ("version-missing-blank", b"GET / ", Bad),
    ("version-1-2", b"GET / HTTP/1.2", Bad),
    ("version-1-10", b"GET / HTTP/1.10", Bad),
    ("version-0-9", b"GET / HTTP/0.9", Bad),
    ("version-2-0", b"GET / HTTP/2.0", Bad),
    ("version-2", b"GET / HTTP/2", Bad),
    ("version-lower-case", b"GET / http/1.1", Bad),
    ("version-mixed-case", b"GET / Http/1.1", Bad),
    ("version-other", b"GET / ICY/1.1", Bad),
    ("version-comma", b"GET / HTTP/1,1", Bad),
    ("version-blank-inside", b"GET / HTTP/ 1.1", Bad),
    ("version-blank-after", b"GET / HTTP/1.1 ", Bad),
    ("version-tab-before", b"GET /\tHTTP/1.1", Bad),
    ("line-two-blanks", b"GET  / HTTP/1.1", Opaque),
    ("line-two-blanks-after-target", b"GET /  HTTP/1.1", Bad),
    ("line-tab", b"GET\t/ HTTP/1.1", Opaque),
    ("line-blank-first", b" GET / HTTP/1.1", Opaque),
    ("line-words", b"GET / / HTTP/1.1", Bad),
    ("line-cr", b"GET /\r HTTP/1.1", Bad),
    ("line-lf", b"GET / HTTP/1.1\nX-A: b", Bad),
    ("line-nul", b"GET /\0 HTTP/1.1", Bad),
    ("method-brackets", b"G(T / HTTP/1.1", Opaque),
    ("method-empty", b"/ HTTP/1.1", Opaque),
    ("method-non-ascii", b"G\xc3\x84T / HTTP/1.1", Opaque),
    ("target-blank", b"GET /a b HTTP/1.1", Bad),
    ("target-ctl", b"GET /a\x01b HTTP/1.1", Bad),
    ("target-delete", b"GET /a\x7fb HTTP/1.1", Bad),
    ("target-non-ascii", b"GET /\xc3\xa4 HTTP/1.1", Bad),
    ("target-fragment", b"GET /a#b HTTP/1.1", Bad),
    ("target-fragment-in-query", b"GET /a?b#c HTTP/1.1", Bad),
    ("target-asterisk-get", b"GET * HTTP/1.1", Bad),
    ("target-asterisk-more", b"OPTIONS *x HTTP/1.1", Bad),
    ("target-relative", b"GET orders HTTP/1.1", Opaque),
    ("target-query-first", b"GET ?a=b HTTP/1.1", Opaque),
    (
        "absolute-userinfo",
        b"GET http://user@orders/ HTTP/1.1",
        Bad,
    ),
    (
        "absolute-userinfo-disguised",
        b"GET http://orders:80@evil/ HTTP/1.1",
        Bad,
    ),
    ("absolute-no-host", b"GET http:///a HTTP/1.1", Bad),
    ("absolute-bad-port", b"GET http://orders:8o/ HTTP/1.1", Bad),
    (
        "absolute-query-first",
        b"GET http://orders?a=b HTTP/1.1",
        Bad,
    ),
    ("absolute-fragment", b"GET http://orders/#a HTTP/1.1", Bad),
    (
        "absolute-backslash",
        b"GET http://orders\\@evil/ HTTP/1.1",
        Bad,
    ),
];

/// A whole head, up to the empty line that ends it.
pub(crate) const HEADS: &[(&str, &[u8], Answer)] = &[
    (
        "te-http-1-0",
        b"POST / HTTP/1.0\r\nHost: orders\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        Bad,
    ),
    (
        "fold-first",
        b"GET / HTTP/1.1\r\n Host: orders\r\n\r\n",
        Bad,
    ),
    (
        "fold-after-host",
        b"GET / HTTP/1.1\r\nHost: orders\r\n .evil\r\n\r\n",
        Bad,
    ),
    (
        "empty-lines-two",
        b"\r\n\r\nGET / HTTP/1.1\r\nHost: orders\r\n\r\n",
        Bad,
    ),
    (
        "empty-line-lf",
        b"\nGET / HTTP/1.1\r\nHost: orders\r\n\r\n",
        Bad,
    ),
    ("lf-line", b"GET / HTTP/1.1\nHost: orders\r\n\r\n", Bad),
    ("lf-end", b"GET / HTTP/1.1\r\nHost: orders\r\n\n", Bad),
    (
        "lf-last-field",
        b"GET / HTTP/1.1\r\nHost: orders\n\r\n",
        Bad,
    ),
    ("lf-all", b"GET / HTTP/1.1\nHost: orders\n\n", Bad),
    ("lf-cr-lf", b"GET / HTTP/1.1\r\nHost: orders\n\r\n\r\n", Bad),
    ("cr-line", b"GET / HTTP/1.1\rHost: orders\r\n\r\n", Bad),
    (
        "cr-end",
        b"GET / HTTP/1.1\r\nHost: orders\r\n\rX-A: b\r\n\r\n",
        Bad,
    ),
    ("http-0-9", b"GET /\r\n", Bad),
    ("host-none", b"GET / HTTP/1.1\r\n\r\n", Bad),
    ("host-none-http-1-0", b"GET / HTTP/1.0\r\n\r\n", Bad),
    ("host-empty", b"GET / HTTP/1.1\r\nHost: \r\n\r\n", Bad),
    (
        "host-blank-inside",
        b"GET / HTTP/1.1\r\nHost: orders evil\r\n\r\n",
        Bad,
    ),
    (
        "host-list",
        b"GET / HTTP/1.1\r\nHost: orders, evil\r\n\r\n",
        Bad,
    ),
    (
        "host-userinfo",
        b"GET / HTTP/1.1\r\nHost: user@orders\r\n\r\n",
        Bad,
    ),
    (
        "host-path",
        b"GET / HTTP/1.1\r\nHost: orders/evil\r\n\r\n",
        Bad,
    ),
    (
        "host-scheme",
        b"GET / HTTP/1.1\r\nHost: http://orders\r\n\r\n",
        Bad,
    ),
    (
        "host-query",
        b"GET / HTTP/1.1\r\nHost: orders?a\r\n\r\n",
        Bad,
    ),
    (
        "host-port-letters",
        b"GET / HTTP/1.1\r\nHost: orders:8o\r\n\r\n",
        Bad,
    ),
    (
        "host-port-high",
        b"GET / HTTP/1.1\r\nHost: orders:65536\r\n\r\n",
        Bad,
    ),
    (
        "host-port-negative",
        b"GET / HTTP/1.1\r\nHost: orders:-1\r\n\r\n",
        Bad,
    ),
    (
        "host-port-two",
        b"GET / HTTP/1.1\r\nHost: orders:80:80\r\n\r\n",
        Bad,
    ),
    (
        "host-non-ascii",
        b"GET / HTTP/1.1\r\nHost: \xc3\xb6rders\r\n\r\n",
        Bad,
    ),
    (
        "host-bracket-open",
        b"GET / HTTP/1.1\r\nHost: [::1\r\n\r\n",
        Bad,
    ),
    (
        "absolute-without-host",
        b"GET http://orders/ HTTP/1.1\r\n\r\n",
        Bad,
    ),
    (
        "absolute-host-two",
        b"GET http://orders/ HTTP/1.1\r\nHost: orders\r\nHost: evil\r\n\r\n",
        Bad,
    ),
    (
        "absolute-host-malformed",
        b"GET http://orders/ HTTP/1.1\r\nHost: a b\r\n\r\n",
        Bad,
    ),
];

/// Over a limit: name and head.
pub(crate) fn large() -> Vec<(&'static str, Vec<u8>)> {
    let start = "GET / HTTP/1.1\r\nHost: orders\r\n";
    let with = |fields: String| format!("{start}{fields}\r\n").into_bytes();
    let many = |count: usize| (0..count).map(|n| format!("x-{n}: a\r\n")).collect();
    vec![
        ("fields-101", with(many(100))),
        ("fields-1000", with(many(999))),
        (
            "head-61-kib",
            with(format!("x-a: {}\r\n", "a".repeat(61 * 1024))),
        ),
        (
            "head-61-kib-of-fields",
            with(format!("x-a: {}\r\n", "a".repeat(1024)).repeat(61)),
        ),
        (
            "head-61-kib-name",
            with(format!("{}: a\r\n", "x".repeat(61 * 1024))),
        ),
        (
            "target-61-kib",
            format!(
                "GET /{} HTTP/1.1\r\nHost: orders\r\n\r\n",
                "a".repeat(61 * 1024)
            )
            .into_bytes(),
        ),
    ]
}

/// How the bytes get there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Whole,
    Split,
    Second,
}

/// Sends a head that must be refused, with another request behind it.
async fn refuse(rig: &Rig, name: &str, head: &[u8], answer: Answer, wrong: &mut Failures) {
    for way in [Way::Whole, Way::Split, Way::Second] {
        let case = format!("{name}, {way:?}");
        let mut bytes = [head, &get("/smuggled")].concat();
        if way == Way::Second {
            bytes = [get("/first"), bytes].concat();
        }
        let mut found = Failures::default();
        let seen = rig
            .around(
                name,
                wrong,
                one(rig, &case, &bytes, way, answer, &mut found),
            )
            .await;
        wrong.take(found);
        let first = usize::from(way == Way::Second);
        wrong.check(&case, seen.len() == first, format!("forwarded {seen:?}"));
    }
}

async fn one(rig: &Rig, case: &str, bytes: &[u8], way: Way, answer: Answer, wrong: &mut Failures) {
    let mut caller = rig.caller().await;
    if way == Way::Split {
        let seed = bytes.iter().fold(bytes.len() as u64, |sum, byte| {
            sum.wrapping_mul(31).wrapping_add(u64::from(*byte))
        });
        let longest = (bytes.len() / 12).max(3);
        let rng = &mut Rng::with_seed(seed);
        caller.send_split(bytes, longest, rng).await;
    } else {
        caller.send(bytes).await;
    }
    if way == Way::Second {
        let told = caller.answer("GET").await.map(|reply| reply.message.text());
        wrong.check(
            case,
            told.as_deref() == Ok("GET /first"),
            format!("{told:?}"),
        );
    }
    if answer != Opaque || way == Way::Second {
        let (status, code) = match answer {
            Large => (431, "headers_too_large"),
            Bad | Opaque => (400, "bad_request"),
        };
        match caller.answer("GET").await {
            Ok(reply) => {
                if let Err(what) = is_error(&reply, status, code) {
                    wrong.add(case, what);
                }
                let head = &reply.message.head;
                let close =
                    head.get("connection") == "close" || head.line().starts_with("HTTP/1.0");
                wrong.check(case, close, "no connection: close");
            }
            Err(cut) => wrong.add(case, format!("no answer: {cut:?}")),
        }
    }
    if let Err(what) = caller.closed().await {
        wrong.add(case, what);
    }
}

#[tokio::test]
async fn malformed_fields_are_refused() {
    let rig = Rig::telling().await;
    let mut wrong = Failures::default();
    for (name, fields, body) in FIELDS {
        let start = b"POST / HTTP/1.1\r\nHost: orders\r\n";
        let head = [&start[..], fields, b"\r\n\r\n", body].concat();
        refuse(&rig, name, &head, Bad, &mut wrong).await;
    }
    wrong.finish();
}

#[tokio::test]
async fn malformed_request_lines_are_refused() {
    let rig = Rig::telling().await;
    let mut wrong = Failures::default();
    for (name, line, answer) in LINES {
        let head = [*line, b"\r\nHost: orders\r\n\r\n"].concat();
        refuse(&rig, name, &head, *answer, &mut wrong).await;
    }
    wrong.finish();
}

#[tokio::test]
async fn malformed_heads_are_refused() {
    let rig = Rig::telling().await;
    let mut wrong = Failures::default();
    for (name, head, answer) in HEADS {
        refuse(&rig, name, head, *answer, &mut wrong).await;
    }
    wrong.finish();
}

#[tokio::test]
async fn heads_over_a_limit_are_refused() {
    let rig = Rig::telling().await;
    let mut wrong = Failures::default();
    for (name, head) in large() {
        refuse(&rig, name, &head, Large, &mut wrong).await;
    }
    wrong.finish();
}

#[tokio::test]
async fn what_is_refused_is_counted() {
    let rig = Rig::telling().await;
    for (code, bytes) in [
        (
            "bad_request",
            b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n".to_vec(),
        ),
        (
            "bad_request",
            b"GET / HTTP/3.1\r\nHost: orders\r\n\r\n".to_vec(),
        ),
        ("headers_too_large", large().remove(0).1),
    ] {
        let before = rig.counted(code).await;
        let mut caller = rig.caller().await;
        caller.send(bytes).await;
        let reply = caller.answer("GET").await.expect("an answer");
        assert_eq!(reply.code(), code);
        assert_eq!(rig.counted(code).await, before + 1.0, "{code}");
    }
}
