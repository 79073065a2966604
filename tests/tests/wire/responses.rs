//! What a service answers, byte by byte: what is refused (502 `upstream_protocol`), what breaks off
//! before its head is whole (502 `upstream_reset`), what breaks off later (the caller sees a broken
//! response, never a short whole one), and what is passed on. Whatever happens, the next request
//! gets its own answer.

use std::collections::HashMap;
use std::time::Duration;

use outrigger_tests::client::{Ask, Client};
use outrigger_tests::raw::{Act, Cut, Origin, tell};

use crate::rig::{Failures, Rig, get, is_error, told};

/// What comes instead of a response: 502 `upstream_protocol`. The service keeps the connection
/// open, so that nothing but these bytes can tell.
pub(crate) const REFUSED: &[(&str, &[u8])] = &[
    ("garbage", b"SSH-2.0-OpenSSH_9.6\r\n\r\n"),
    ("garbage-binary", b"\x16\x03\x01\x00\x00\r\n\r\n"),
    ("garbage-http2", b"\x00\x00\x00\x04\x00\x00\x00\x00\x00\r\n\r\n"),
    ("http-0-9-body", b"<html>hello</html>\r\n\r\n"),
    ("response-version-1-2", b"HTTP/1.2 200 OK\r\nContent-Length: 0\r\n\r\n"),
    ("response-version-2-0", b"HTTP/2.0 200 OK\r\nContent-Length: 0\r\n\r\n"),
    ("response-version-lower-case", b"http/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"),
    ("status-099", b"HTTP/1.1 099 X\r\nContent-Length: 0\r\n\r\n"),
    ("status-000", b"HTTP/1.1 000 X\r\nContent-Length: 0\r\n\r\n"),
    ("status-600", b"HTTP/1.1 600 X\r\nContent-Length: 0\r\n\r\n"),
    ("status-999", b"HTTP/1.1 999 X\r\nContent-Length: 0\r\n\r\n"),
    ("status-two-digits", b"HTTP/1.1 20 OK\r\nContent-Length: 0\r\n\r\n"),
    ("status-four-digits", b"HTTP/1.1 2000 OK\r\nContent-Length: 0\r\n\r\n"),
    ("status-letters", b"HTTP/1.1 abc OK\r\nContent-Length: 0\r\n\r\n"),
    ("status-plus", b"HTTP/1.1 +20 OK\r\nContent-Length: 0\r\n\r\n"),
    ("status-missing", b"HTTP/1.1\r\nContent-Length: 0\r\n\r\n"),
    ("status-two-blanks", b"HTTP/1.1  200 OK\r\nContent-Length: 0\r\n\r\n"),
    ("status-tab", b"HTTP/1.1\t200 OK\r\nContent-Length: 0\r\n\r\n"),
    ("reason-nul", b"HTTP/1.1 200 O\0K\r\nContent-Length: 0\r\n\r\n"),
    ("switch-unasked", b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n"),
    ("response-cl-te", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
    ("response-te-cl", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n"),
    ("response-cl-two-equal", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 5\r\n\r\nhello"),
    ("response-cl-two-different", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello"),
    ("response-cl-list", b"HTTP/1.1 200 OK\r\nContent-Length: 5, 5\r\n\r\nhello"),
    ("response-cl-plus", b"HTTP/1.1 200 OK\r\nContent-Length: +5\r\n\r\nhello"),
    ("response-cl-minus", b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\nhello"),
    ("response-cl-empty", b"HTTP/1.1 200 OK\r\nContent-Length: \r\n\r\nhello"),
    ("response-cl-overflow", b"HTTP/1.1 200 OK\r\nContent-Length: 18446744073709551616\r\n\r\nhello"),
    ("response-te-gzip", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\nhello"),
    ("response-te-gzip-chunked", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n"),
    ("response-te-identity", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: identity\r\nContent-Length: 5\r\n\r\nhello"),
    ("response-te-two-fields", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
    ("response-te-http-1-0", b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"),
    ("response-te-204", b"HTTP/1.1 204 No Content\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
    ("response-lf-line", b"HTTP/1.1 200 OK\nContent-Length: 0\r\n\r\n"),
    ("response-lf-field", b"HTTP/1.1 200 OK\r\nX-A: b\nContent-Length: 0\r\n\r\n"),
    ("response-lf-end", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\n"),
    ("response-lf-all", b"HTTP/1.1 200 OK\nContent-Length: 0\n\n"),
    ("response-cr", b"HTTP/1.1 200 OK\r\nX-A: b\rc\r\nContent-Length: 0\r\n\r\n"),
    ("response-fold", b"HTTP/1.1 200 OK\r\nX-A: b\r\n c\r\nContent-Length: 0\r\n\r\n"),
    ("response-fold-first", b"HTTP/1.1 200 OK\r\n X-A: b\r\nContent-Length: 0\r\n\r\n"),
    ("response-blank-before-colon", b"HTTP/1.1 200 OK\r\nContent-Length : 0\r\n\r\n"),
    ("response-no-colon", b"HTTP/1.1 200 OK\r\nX-A\r\nContent-Length: 0\r\n\r\n"),
    ("response-name-empty", b"HTTP/1.1 200 OK\r\n: b\r\nContent-Length: 0\r\n\r\n"),
    ("response-value-nul", b"HTTP/1.1 200 OK\r\nX-A: b\0c\r\nContent-Length: 0\r\n\r\n"),
    ("response-value-ctl", b"HTTP/1.1 200 OK\r\nX-A: b\x01c\r\nContent-Length: 0\r\n\r\n"),
];

/// Refused for their size.
pub(crate) fn refused_large() -> Vec<(&'static str, Vec<u8>)> {
    let many: String = (0..101).map(|n| format!("x-{n}: a\r\n")).collect();
    let interim = "HTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\n".repeat(1000);
    vec![
        (
            "response-fields-101",
            format!("HTTP/1.1 200 OK\r\n{many}\r\n").into_bytes(),
        ),
        (
            "response-head-61-kib",
            format!("HTTP/1.1 200 OK\r\nx-a: {}\r\n\r\n", "a".repeat(61 * 1024)).into_bytes(),
        ),
        (
            "interim-flood",
            format!("{interim}HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").into_bytes(),
        ),
    ]
}

fn send(bytes: &[u8]) -> Act {
    Act::Send(bytes.to_vec())
}

/// Broken off before the head was whole: 502 `upstream_reset`.
pub(crate) fn lost() -> Vec<(&'static str, Vec<Act>)> {
    vec![
        ("close-before-head", vec![Act::Read, Act::Close]),
        ("reset-before-head", vec![Act::Read, Act::Reset]),
        ("reset-before-request", vec![Act::Reset]),
        (
            "close-in-status-line",
            vec![send(b"HTTP/1.1 20"), Act::Close],
        ),
        (
            "close-in-head",
            vec![send(b"HTTP/1.1 200 OK\r\nContent-Len"), Act::Close],
        ),
        (
            "close-before-head-end",
            vec![
                send(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n"),
                Act::Close,
            ],
        ),
        (
            "reset-in-head",
            vec![send(b"HTTP/1.1 200 OK\r\n"), Act::Pause(MOMENT), Act::Reset],
        ),
        (
            "close-after-interim",
            vec![send(b"HTTP/1.1 103 Early Hints\r\n\r\n"), Act::Close],
        ),
    ]
}

/// Enough for what was sent to be read before what follows.
const MOMENT: Duration = Duration::from_millis(30);
/// The route's idle timeout.
const IDLE: Duration = Duration::from_millis(400);

const LENGTH_10: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello";
const CHUNK: &[u8] = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n";

/// Broken after the head was whole, and the code it is counted with.
pub(crate) fn cut() -> Vec<(&'static str, Vec<Act>, &'static str)> {
    let chunk = |rest: &[u8]| vec![send(&[CHUNK, rest].concat()), Act::Hold];
    vec![
        (
            "length-short",
            vec![send(LENGTH_10), Act::Close],
            "upstream_reset",
        ),
        (
            "length-reset",
            vec![send(LENGTH_10), Act::Pause(MOMENT), Act::Reset],
            "upstream_reset",
        ),
        (
            "length-none-of-it",
            vec![
                send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n"),
                Act::Close,
            ],
            "upstream_reset",
        ),
        (
            "chunked-no-last",
            vec![send(CHUNK), Act::Close],
            "upstream_reset",
        ),
        (
            "chunked-in-size",
            vec![send(CHUNK), send(b"5"), Act::Close],
            "upstream_reset",
        ),
        (
            "chunked-in-data",
            vec![send(CHUNK), send(b"5\r\nhe"), Act::Close],
            "upstream_reset",
        ),
        (
            "chunked-in-last",
            vec![send(CHUNK), send(b"0\r\n"), Act::Close],
            "upstream_reset",
        ),
        (
            "chunked-in-trailers",
            vec![send(CHUNK), send(b"0\r\nx-a: b\r\n"), Act::Close],
            "upstream_reset",
        ),
        (
            "chunked-reset",
            vec![send(CHUNK), Act::Pause(MOMENT), Act::Reset],
            "upstream_reset",
        ),
        (
            "until-close-reset",
            vec![
                send(b"HTTP/1.1 200 OK\r\n\r\nhello"),
                Act::Pause(MOMENT),
                Act::Reset,
            ],
            "upstream_reset",
        ),
        ("response-size-letter", chunk(b"g\r\n"), "upstream_reset"),
        ("response-size-minus", chunk(b"-5\r\n"), "upstream_reset"),
        (
            "response-size-prefix",
            chunk(b"0x5\r\nhello\r\n"),
            "upstream_reset",
        ),
        (
            "response-size-overflow",
            chunk(b"10000000000000005\r\nhello\r\n"),
            "upstream_reset",
        ),
        (
            "response-size-lf",
            chunk(b"5\nhello\r\n0\r\n\r\n"),
            "upstream_reset",
        ),
        (
            "response-data-long",
            chunk(b"5\r\nhello!\r\n0\r\n\r\n"),
            "upstream_reset",
        ),
        ("response-last-lf", chunk(b"0\r\n\n"), "upstream_reset"),
        (
            "response-extension-lf",
            chunk(b"5;a\nhello\r\n0\r\n\r\n"),
            "upstream_reset",
        ),
        (
            "response-trailer-malformed",
            chunk(b"0\r\nx-a\r\n\r\n"),
            "upstream_reset",
        ),
        (
            "length-stalls",
            vec![send(LENGTH_10), Act::Hold],
            "upstream_timeout",
        ),
        (
            "chunked-stalls",
            vec![send(CHUNK), Act::Hold],
            "upstream_timeout",
        ),
    ]
}

/// Whether the connection to the service is used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Upstream {
    /// It is.
    Reused,
    /// It is closed.
    Dropped,
}

use Upstream::{Dropped, Reused};

/// Passed on: method, what the service says, what the caller gets, but for `date`.
pub(crate) fn passed() -> Vec<(&'static str, &'static str, Vec<Act>, &'static str, Upstream)> {
    let long = "x".repeat(9);
    let mut drip = vec![Act::Read];
    for byte in format!("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{long}").bytes() {
        drip.extend([Act::Send(vec![byte]), Act::Pause(Duration::from_millis(2))]);
    }
    let mut slow = vec![send(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n")];
    for byte in *b"hello" {
        slow.extend([Act::Pause(IDLE / 2), Act::Send(vec![byte])]);
    }
    let hello = "HTTP/1.1 200 OK | content-length: 5 || hello";
    let chunked = "HTTP/1.1 200 OK | transfer-encoding: chunked || hello";
    vec![
        ("response-plain", "GET", vec![send(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello")], hello, Reused),
        ("response-no-reason", "GET", vec![send(b"HTTP/1.1 200 \r\nContent-Length: 5\r\n\r\nhello")], hello, Reused),
        ("response-status-unknown", "GET", vec![send(b"HTTP/1.1 299 Whatever\r\nContent-Length: 0\r\n\r\n")], "HTTP/1.1 299  | content-length: 0 || ", Reused),
        ("response-chunked", "GET", vec![send(CHUNK), send(b"0\r\n\r\n")], chunked, Reused),
        ("response-extension-dropped", "GET", vec![send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5;a=b\r\nhello\r\n0;c\r\n\r\n")], chunked, Reused),
        ("response-trailers", "GET", vec![send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: x-sum\r\n\r\n5\r\nhello\r\n0\r\nX-Sum: 1\r\nContent-Length: 9\r\nSet-Cookie: a\r\n\r\n")], "HTTP/1.1 200 OK | trailer: x-sum | transfer-encoding: chunked || hello || x-sum: 1", Reused),
        ("response-drip", "GET", drip, "HTTP/1.1 200 OK | content-length: 9 || xxxxxxxxx", Reused),
        ("response-slow", "GET", slow, hello, Reused),
        ("response-http-1-0", "GET", vec![send(b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello")], hello, Dropped),
        ("response-http-1-0-keep-alive", "GET", vec![send(b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 5\r\n\r\nhello")], hello, Reused),
        ("response-until-close", "GET", vec![send(b"HTTP/1.1 200 OK\r\n\r\nhello"), Act::Close], chunked, Dropped),
        ("response-until-close-http-1-0", "GET", vec![send(b"HTTP/1.0 200 OK\r\n\r\nhello"), Act::Close], chunked, Dropped),
        ("response-close", "GET", vec![send(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 5\r\n\r\nhello"), Act::Close], hello, Dropped),
        ("response-close-said-only", "GET", vec![send(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 5\r\n\r\nhello")], hello, Dropped),
        ("response-nominated", "GET", vec![send(b"HTTP/1.1 200 OK\r\nConnection: X-A, Content-Length\r\nX-A: 1\r\nX-B: 2\r\nKeep-Alive: timeout=5\r\nContent-Length: 5\r\n\r\nhello")], "HTTP/1.1 200 OK | content-length: 5 | x-b: 2 || hello", Reused),
        ("response-fields-kept", "GET", vec![send(b"HTTP/1.1 200 OK\r\nX-A: 2\r\nX-Empty:\r\nX-A: \xff\t\x80\r\nX-A: 1\r\nContent-Length: 0\r\n\r\n")], "HTTP/1.1 200 OK | content-length: 0 | x-a: 2 | x-a: \\xff\\t\\x80 | x-a: 1 | x-empty:  || ", Reused),
        ("interim-dropped", "GET", vec![send(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello")], hello, Reused),
        ("surplus-response", "GET", vec![send(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhelloHTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npoison")], hello, Dropped),
        ("surplus-byte", "GET", vec![send(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello\n")], hello, Dropped),
        ("surplus-after-chunks", "GET", vec![send(CHUNK), send(b"0\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npoison")], chunked, Dropped),
        ("surplus-later", "GET", vec![send(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"), Act::Pause(MOMENT), send(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npoison")], hello, Dropped),
        ("head-length", "HEAD", vec![send(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n")], "HTTP/1.1 200 OK | content-length: 5 || ", Reused),
        ("head-body", "HEAD", vec![send(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello")], "HTTP/1.1 200 OK | content-length: 5 || ", Dropped),
        ("head-chunked", "HEAD", vec![send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")], "HTTP/1.1 200 OK || ", Reused),
        ("head-nothing", "HEAD", vec![send(b"HTTP/1.1 200 OK\r\n\r\n")], "HTTP/1.1 200 OK || ", Reused),
        ("status-204", "GET", vec![send(b"HTTP/1.1 204 No Content\r\n\r\n")], "HTTP/1.1 204 No Content || ", Reused),
        ("status-204-length", "GET", vec![send(b"HTTP/1.1 204 No Content\r\nContent-Length: 5\r\n\r\n")], "HTTP/1.1 204 No Content || ", Reused),
        ("status-204-body", "GET", vec![send(b"HTTP/1.1 204 No Content\r\nContent-Length: 5\r\n\r\nhello")], "HTTP/1.1 204 No Content || ", Dropped),
        ("status-304-length", "GET", vec![send(b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\nETag: a\r\n\r\n")], "HTTP/1.1 304 Not Modified | content-length: 5 | etag: a || ", Reused),
        ("status-304-body", "GET", vec![send(b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\nhello")], "HTTP/1.1 304 Not Modified | content-length: 5 || ", Dropped),
        ("post-answered-before-read", "POST", vec![send(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"), Act::Read], hello, Reused),
    ]
}

/// A sidecar before a service that does for each path what its script says, and tells method and
/// target at all other paths.
async fn scripted(scripts: impl IntoIterator<Item = (&'static str, Vec<Act>)>) -> Rig {
    let scripts: HashMap<String, Vec<Act>> = scripts
        .into_iter()
        .map(|(name, acts)| (format!("/{name}"), acts))
        .collect();
    let origin = Origin::start(move |seen| {
        let head = &seen.message.head;
        match scripts.get(&head.second()) {
            Some(acts) => acts.clone(),
            None => vec![Act::Read, Act::Send(tell(head))],
        }
    });
    let rule = "{timeouts: {idle: 400ms}, retry: {attempts: 0}}";
    Rig::before(origin.await, rule).await
}

/// Asks for each case over h1 and h2; both must be told `code` with 502, once.
async fn fails(rig: &Rig, name: &str, code: &str, wrong: &mut Failures) {
    let before = rig.counted(code).await;
    let mut found = Failures::default();
    let case = async {
        let mut caller = rig.caller().await;
        caller.send(get(&format!("/{name}"))).await;
        match caller.answer("GET").await {
            Ok(reply) => {
                if let Err(what) = is_error(&reply, 502, code) {
                    found.add(name, what);
                }
            }
            Err(cut) => found.add(name, format!("no answer: {cut:?}")),
        }
        // It is not the caller's fault: its connection goes on.
        caller.send(get("/after")).await;
        let text = caller.answer("GET").await.map(|reply| reply.message.text());
        found.check(
            name,
            text.as_deref() == Ok("GET /after"),
            format!("after: {text:?}"),
        );
        let mut client = Client::h2(rig.sidecar.outbound()).await;
        let answer = client
            .try_call(Ask::get("orders", &format!("/{name}")))
            .await;
        let told = answer
            .as_ref()
            .map(|answer| (answer.status, answer.code().to_owned()));
        found.check(
            name,
            told == Ok((502, code.to_owned())),
            format!("over h2: {answer:?}"),
        );
    };
    rig.around(name, wrong, case).await;
    wrong.take(found);
    let counted = rig.counted(code).await - before;
    wrong.check(
        name,
        counted == 2.0,
        format!("{code} counted {counted} times"),
    );
}

#[tokio::test]
async fn what_is_no_response_is_told_as_such() {
    let owned = |(name, bytes): &(&'static str, &[u8])| (*name, bytes.to_vec());
    let cases: Vec<_> = REFUSED.iter().map(owned).chain(refused_large()).collect();
    let acts = |(name, bytes): &(&'static str, Vec<u8>)| (*name, vec![send(bytes), Act::Hold]);
    let rig = scripted(cases.iter().map(acts)).await;
    let mut wrong = Failures::default();
    for (name, _) in &cases {
        fails(&rig, name, "upstream_protocol", &mut wrong).await;
    }
    wrong.finish();
}

#[tokio::test]
async fn what_breaks_off_before_its_head_is_told_as_such() {
    let rig = scripted(lost()).await;
    let mut wrong = Failures::default();
    for (name, _) in lost() {
        fails(&rig, name, "upstream_reset", &mut wrong).await;
    }
    wrong.finish();
}

#[tokio::test]
async fn what_breaks_off_later_is_never_a_short_whole_response() {
    let rig = scripted(cut().into_iter().map(|(name, acts, _)| (name, acts))).await;
    let mut wrong = Failures::default();
    for (name, _, code) in cut() {
        let before = rig.counted(code).await;
        let mut found = Failures::default();
        let case = async {
            let mut caller = rig.caller().await;
            caller.send(get(&format!("/{name}"))).await;
            let answer = caller.answer("GET").await;
            let broken = |cut: &Cut| matches!(cut, Cut::Short | Cut::Reset);
            let seen = answer
                .as_ref()
                .is_ok_and(|reply| reply.status() == 200 && reply.cut.as_ref().is_some_and(broken));
            found.check(name, seen, format!("{answer:?}"));
            let mut client = Client::h2(rig.sidecar.outbound()).await;
            let answer = client
                .try_call(Ask::get("orders", &format!("/{name}")))
                .await;
            let reset = answer.as_ref().is_err_and(|error| error.contains("Reset("));
            found.check(name, reset, format!("over h2: {answer:?}"));
            // The stream is broken, the connection is not.
            let answer = client.try_call(Ask::get("orders", "/after")).await;
            let text = answer.map(|answer| answer.text());
            found.check(
                name,
                text.as_deref() == Ok("GET /after"),
                format!("after: {text:?}"),
            );
        };
        rig.around(name, &mut wrong, case).await;
        wrong.take(found);
        let counted = rig.counted(code).await - before;
        wrong.check(
            name,
            counted == 2.0,
            format!("{code} counted {counted} times"),
        );
    }
    wrong.finish();
}

#[tokio::test]
async fn what_is_right_is_passed_on_to_the_caller() {
    let cases = passed();
    let scripts = cases
        .iter()
        .map(|(name, _, acts, _, _)| (*name, acts.clone()));
    let rig = scripted(scripts).await;
    let mut wrong = Failures::default();
    for (name, method, _, expected, upstream) in cases {
        let mut found = Failures::default();
        let case = async {
            let mut caller = rig.caller().await;
            let body = if method == "POST" {
                "Content-Length: 2\r\n\r\nab"
            } else {
                "\r\n"
            };
            caller
                .send(format!(
                    "{method} /{name} HTTP/1.1\r\nHost: orders\r\n{body}"
                ))
                .await;
            match caller.answer(method).await {
                Ok(mut reply) => {
                    reply.message.head.fields.retain(|(name, _)| name != "date");
                    let got = told(&reply.message);
                    found.check(
                        name,
                        got == expected && reply.cut.is_none(),
                        format!("{got} {:?}", reply.cut),
                    );
                }
                Err(cut) => found.add(name, format!("no answer: {cut:?}")),
            }
            if name == "surplus-later" {
                tokio::time::sleep(2 * MOMENT).await;
            }
            caller.send(get("/after")).await;
            let text = caller.answer("GET").await.map(|reply| reply.message.text());
            found.check(
                name,
                text.as_deref() == Ok("GET /after"),
                format!("after: {text:?}"),
            );
        };
        let seen = rig.around(name, &mut wrong, case).await;
        wrong.take(found);
        let connections: Vec<usize> = seen.iter().map(|seen| seen.connection).collect();
        let found = match connections[..] {
            [first, second] if first == second => Some(Reused),
            [_, _] => Some(Dropped),
            _ => None,
        };
        wrong.check(
            name,
            found == Some(upstream),
            format!("{found:?} on {connections:?}"),
        );
    }
    wrong.finish();
}
