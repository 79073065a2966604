//! HTTP/2 requests that would become something else in HTTP/1.1: refused with 400 `bad_request`, or
//! their stream is reset as malformed. Not a byte of them reaches a service that speaks HTTP/1.1,
//! and what is whole reaches it as it was meant.

use outrigger_tests::SOON;
use outrigger_tests::frames::{
    self, DATA, END_HEADERS, END_STREAM, GOAWAY, HEADERS, RST_STREAM, SETTINGS, field, frame,
};
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::rig::{Failures, Rig, told};

type Fields = &'static [(&'static str, &'static str)];

const POST: Fields = &[
    (":method", "POST"),
    (":scheme", "http"),
    (":authority", "orders"),
    (":path", "/h2"),
];

/// What replaces or follows the fields of [`POST`], and a body.
pub(crate) const REFUSED: &[(&str, Fields, &str)] = &[
    ("h2-te", &[("transfer-encoding", "chunked")], "0\r\n\r\n"),
    ("h2-cl-long", &[("content-length", "10")], "hello"),
    ("h2-cl-short", &[("content-length", "3")], "hello"),
    ("h2-cl-zero", &[("content-length", "0")], "hello"),
    ("h2-cl-letters", &[("content-length", "5a")], "hello"),
    ("h2-cl-plus", &[("content-length", "+5")], "hello"),
    ("h2-connection", &[("connection", "close")], ""),
    ("h2-keep-alive", &[("keep-alive", "timeout=5")], ""),
    ("h2-upgrade", &[("upgrade", "h2c")], ""),
    ("h2-te-gzip", &[("te", "gzip")], ""),
    ("h2-value-crlf", &[("x-a", "b\r\nx-b: c")], ""),
    ("h2-value-lf", &[("x-a", "b\nx-b: c")], ""),
    ("h2-value-nul", &[("x-a", "b\0c")], ""),
    ("h2-name-crlf", &[("x-a: b\r\nx-b", "c")], ""),
    ("h2-name-upper-case", &[("X-A", "b")], ""),
    ("h2-name-colon", &[("x:a", "b")], ""),
    ("h2-name-blank", &[("x a", "b")], ""),
    ("h2-name-empty", &[("", "b")], ""),
    (
        "h2-path-crlf",
        &[(":path", "/ HTTP/1.1\r\nhost: orders\r\n\r\nGET /smuggled")],
        "",
    ),
    ("h2-path-blank", &[(":path", "/a b")], ""),
    ("h2-path-empty", &[(":path", "")], ""),
    ("h2-path-relative", &[(":path", "a")], ""),
    ("h2-path-absolute", &[(":path", "http://evil/")], ""),
    ("h2-path-asterisk", &[(":path", "*")], ""),
    ("h2-path-non-ascii", &[(":path", "/\u{e4}")], ""),
    (
        "h2-method-line",
        &[(
            ":method",
            "GET /smuggled HTTP/1.1\r\nhost: orders\r\n\r\nGET",
        )],
        "",
    ),
    ("h2-method-blank", &[(":method", "GET /smuggled")], ""),
    (
        "h2-authority-userinfo",
        &[(":authority", "user@orders")],
        "",
    ),
    ("h2-authority-path", &[(":authority", "orders/evil")], ""),
    (
        "h2-authority-crlf",
        &[(":authority", "orders\r\nx-a: b")],
        "",
    ),
    ("h2-authority-blank", &[(":authority", "orders evil")], ""),
    ("h2-authority-port", &[(":authority", "orders:8o")], ""),
    ("h2-host-other", &[("host", "evil")], ""),
    ("h2-host-two", &[("host", "orders"), ("host", "evil")], ""),
    ("h2-pseudo-late", &[("x-a", "b"), (":status", "200")], ""),
    ("h2-pseudo-unknown", &[(":smuggled", "b")], ""),
];

/// What is passed on, and as what.
pub(crate) const PASSED: &[(&str, Fields, &str, &str)] = &[
    (
        "h2-plain",
        &[],
        "",
        "POST /h2 HTTP/1.1 | content-length: 0 | host: orders || ",
    ),
    (
        "h2-body-like-a-request",
        &[("content-length", "22")],
        "GET /smuggled HTTP/1.1",
        "POST /h2 HTTP/1.1 | content-length: 22 | host: orders || GET /smuggled HTTP/1.1",
    ),
    (
        "h2-body-of-no-length",
        &[],
        "0\r\n\r\n",
        "POST /h2 HTTP/1.1 | host: orders | transfer-encoding: chunked || 0\\r\\n\\r\\n",
    ),
    (
        "h2-path-fragment",
        &[(":path", "/a#b")],
        "",
        "POST /a HTTP/1.1 | content-length: 0 | host: orders || ",
    ),
    (
        "h2-expect",
        &[("expect", "a-miracle")],
        "",
        "POST /h2 HTTP/1.1 | content-length: 0 | host: orders || ",
    ),
    (
        "h2-te-trailers",
        &[("te", "trailers")],
        "",
        "POST /h2 HTTP/1.1 | content-length: 0 | host: orders | te: trailers || ",
    ),
    (
        "h2-cookies",
        &[("cookie", "a=1"), ("cookie", "b=2")],
        "",
        "POST /h2 HTTP/1.1 | content-length: 0 | cookie: a=1; b=2 | host: orders || ",
    ),
];

/// How a stream ended.
#[derive(Debug, PartialEq, Eq)]
enum Ended {
    Answered(Vec<u8>),
    Reset,
    Closed,
}

/// Sends one request on a connection of its own.
async fn send(rig: &Rig, fields: &[(&str, &str)], body: &str) -> Ended {
    let mut block: Vec<u8> = Vec::new();
    let replaced = |name: &str| fields.iter().any(|(other, _)| *other == name);
    let kept = POST.iter().filter(|(name, _)| !replaced(name));
    // Those that replace go first, as pseudo-fields must; `:status` is one that may not be there.
    let is_early = |name: &str| name.starts_with(':') && name != ":status";
    let early = fields.iter().filter(|(name, _)| is_early(name));
    let late = fields.iter().filter(|(name, _)| !is_early(name));
    for (name, value) in kept.chain(early).chain(late) {
        block.extend(field(name, value));
    }
    let mut stream = TcpStream::connect(rig.sidecar.outbound())
        .await
        .expect("connected");
    let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    bytes.extend(frame(SETTINGS, 0, 0, &[]));
    if body.is_empty() {
        bytes.extend(frame(HEADERS, END_HEADERS | END_STREAM, 1, &block));
    } else {
        bytes.extend(frame(HEADERS, END_HEADERS, 1, &block));
        bytes.extend(frame(DATA, END_STREAM, 1, body.as_bytes()));
    }
    stream.write_all(&bytes).await.expect("written");
    let reading = async {
        while let Some(got) = frames::read(&mut stream).await {
            match got.kind {
                HEADERS => return Ended::Answered(got.payload),
                RST_STREAM => return Ended::Reset,
                GOAWAY => return Ended::Closed,
                _ => {}
            }
        }
        Ended::Closed
    };
    timeout(SOON, reading).await.expect("an end")
}

/// `:status: 200` and `:status: 400` in the static table (RFC 7541 appendix A).
const OK: u8 = 0x88;
const BAD_REQUEST: u8 = 0x8c;

#[tokio::test]
async fn requests_that_would_be_others_in_http_1_are_refused() {
    let rig = Rig::telling().await;
    let mut wrong = Failures::default();
    for (name, fields, body) in REFUSED {
        let mut found = Failures::default();
        let case = async {
            match send(&rig, fields, body).await {
                Ended::Reset | Ended::Closed => {}
                Ended::Answered(block) if block.first() == Some(&BAD_REQUEST) => {}
                answered => found.add(name, format!("{answered:?}")),
            }
        };
        let seen = rig.around(name, &mut wrong, case).await;
        wrong.take(found);
        // A length that is wrong shows with the end of the body.
        let whole = seen
            .iter()
            .any(|seen| seen.complete || !name.starts_with("h2-cl-"));
        wrong.check(name, !whole, format!("forwarded {seen:?}"));
    }
    wrong.finish();
}

#[tokio::test]
async fn requests_arrive_in_http_1_as_they_were_meant() {
    let rig = Rig::telling().await;
    let mut wrong = Failures::default();
    for (name, fields, body, expected) in PASSED {
        let mut found = Failures::default();
        let case = async {
            let ended = send(&rig, fields, body).await;
            let ok = matches!(&ended, Ended::Answered(block) if block.first() == Some(&OK));
            found.check(name, ok, format!("{ended:?}"));
        };
        let seen = rig.around(name, &mut wrong, case).await;
        wrong.take(found);
        let all: Vec<String> = seen.iter().map(|seen| told(&seen.message)).collect();
        wrong.check(name, all == [*expected], format!("forwarded {all:#?}"));
    }
    wrong.finish();
}
