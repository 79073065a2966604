//! Chunked request bodies. What breaks the coding is answered 400 `bad_request` and the connection
//! is closed: the head and the chunks before it may have reached a service by then, but never the
//! end of the message, nor what follows it. What keeps to it arrives with its content alone.

use fastrand::Rng;

use crate::rig::{Failures, Rig, get, is_error, told};

/// What follows the head.
pub(crate) const BROKEN: &[(&str, &[u8])] = &[
    ("size-letter", b"g\r\nhello\r\n0\r\n\r\n"),
    ("size-prefix", b"0x5\r\nhello\r\n0\r\n\r\n"),
    ("size-suffix", b"5h\r\nhello\r\n0\r\n\r\n"),
    ("size-plus", b"+5\r\nhello\r\n0\r\n\r\n"),
    ("size-minus", b"-5\r\nhello\r\n0\r\n\r\n"),
    ("size-minus-zero", b"-0\r\n\r\n"),
    ("size-underscore", b"1_0\r\nhello hello hell\r\n0\r\n\r\n"),
    ("size-blank-before", b" 5\r\nhello\r\n0\r\n\r\n"),
    ("size-blank-after", b"5 \r\nhello\r\n0\r\n\r\n"),
    ("size-tab-after", b"5\t\r\nhello\r\n0\r\n\r\n"),
    ("size-comma", b"5,\r\nhello\r\n0\r\n\r\n"),
    ("size-empty", b"\r\nhello\r\n0\r\n\r\n"),
    ("size-17-digits", b"00000000000000005\r\nhello\r\n0\r\n\r\n"),
    ("size-overflow", b"10000000000000005\r\nhello\r\n0\r\n\r\n"),
    ("size-nul", b"5\0\r\nhello\r\n0\r\n\r\n"),
    ("size-lf", b"5\nhello\r\n0\r\n\r\n"),
    ("size-cr", b"5\rhello\r\n0\r\n\r\n"),
    ("size-cr-cr-lf", b"5\r\r\nhello\r\n0\r\n\r\n"),
    ("data-short", b"6\r\nhello\r\n0\r\n\r\n"),
    ("data-long", b"4\r\nhello\r\n0\r\n\r\n"),
    ("data-no-end", b"5\r\nhello0\r\n\r\n"),
    ("data-lf", b"5\r\nhello\n0\r\n\r\n"),
    ("data-cr", b"5\r\nhello\r0\r\n\r\n"),
    ("data-blank-after", b"5\r\nhello \r\n0\r\n\r\n"),
    ("last-lf", b"5\r\nhello\r\n0\n\n"),
    ("last-lf-end", b"5\r\nhello\r\n0\r\n\n"),
    ("lf-only", b"5\nhello\n0\n\n"),
    ("extension-lf", b"5;a\nhello\r\n0\r\n\r\n"),
    ("extension-cr", b"5;a\rb\r\nhello\r\n0\r\n\r\n"),
    ("extension-lf-quoted", b"5;a=\"\n\"\r\nhello\r\n0\r\n\r\n"),
    ("extension-nul", b"5;a=\0\r\nhello\r\n0\r\n\r\n"),
    ("extension-blank-before", b"5 ;a\r\nhello\r\n0\r\n\r\n"),
    ("trailer-no-colon", b"0\r\nx-a\r\n\r\n"),
    ("trailer-blank-before-colon", b"0\r\nx-a : b\r\n\r\n"),
    ("trailer-fold", b"0\r\nx-a: b\r\n c\r\n\r\n"),
    ("trailer-lf", b"0\r\nx-a: b\n\r\n"),
    ("trailer-cr", b"0\r\nx-a: b\rc\r\n\r\n"),
    ("trailer-nul", b"0\r\nx-a: \0\r\n\r\n"),
    (
        "trailer-request-line",
        b"0\r\nGET /smuggled HTTP/1.1\r\nhost: orders\r\n\r\n",
    ),
];

/// Broken by their size.
pub(crate) fn broken_large() -> Vec<(&'static str, Vec<u8>)> {
    let many = |count: usize| -> String { (0..count).map(|n| format!("x-{n}: a\r\n")).collect() };
    vec![
        (
            "extension-long",
            format!("5;{}\r\nhello\r\n0\r\n\r\n", "a".repeat(8 * 1024)).into_bytes(),
        ),
        (
            "extension-flood",
            format!(
                "{}0\r\n\r\n",
                format!("1;{}\r\na\r\n", "b".repeat(200)).repeat(400)
            )
            .into_bytes(),
        ),
        (
            "trailers-101",
            format!("0\r\n{}\r\n", many(101)).into_bytes(),
        ),
        (
            "trailers-61-kib",
            format!("0\r\nx-a: {}\r\n\r\n", "a".repeat(61 * 1024)).into_bytes(),
        ),
    ]
}

/// What follows the head, the content in it and its trailers as [`told`] tells them.
pub(crate) const WHOLE: &[(&str, &[u8], &str)] = &[
    ("chunks-plain", b"5\r\nhello\r\n0\r\n\r\n", "hello"),
    ("chunks-none", b"0\r\n\r\n", ""),
    (
        "chunks-several",
        b"1\r\nh\r\n4\r\nello\r\n0\r\n\r\n",
        "hello",
    ),
    (
        "size-upper-case",
        b"A\r\nhellohello\r\n0\r\n\r\n",
        "hellohello",
    ),
    (
        "size-leading-zeros",
        b"0000000000000005\r\nhello\r\n0\r\n\r\n",
        "hello",
    ),
    ("last-zeros", b"5\r\nhello\r\n000\r\n\r\n", "hello"),
    (
        "extension-dropped",
        b"5;name=value\r\nhello\r\n0;last\r\n\r\n",
        "hello",
    ),
    (
        "extension-quoted",
        b"5;a=\"b;c\"\r\nhello\r\n0\r\n\r\n",
        "hello",
    ),
    (
        "data-like-chunks",
        b"7\r\n0\r\n\r\nab\r\n0\r\n\r\n",
        "0\\r\\n\\r\\nab",
    ),
    (
        "trailer-kept",
        b"5\r\nhello\r\n0\r\nX-Sum: 1\r\nx-sum: 2\r\n\r\n",
        "hello || x-sum: 1 || x-sum: 2",
    ),
    (
        "trailer-forbidden-length",
        b"5\r\nhello\r\n0\r\nContent-Length: 9\r\nx-sum: 1\r\n\r\n",
        "hello || x-sum: 1",
    ),
    (
        "trailer-forbidden-coding",
        b"5\r\nhello\r\n0\r\nTransfer-Encoding: chunked\r\nx-sum: 1\r\n\r\n",
        "hello || x-sum: 1",
    ),
    (
        "trailer-forbidden-host",
        b"5\r\nhello\r\n0\r\nHost: evil\r\nx-sum: 1\r\n\r\n",
        "hello || x-sum: 1",
    ),
    (
        "trailer-forbidden-authorization",
        b"5\r\nhello\r\n0\r\nAuthorization: x\r\nx-sum: 1\r\n\r\n",
        "hello || x-sum: 1",
    ),
    (
        "trailer-forbidden-connection",
        b"5\r\nhello\r\n0\r\nConnection: x-sum\r\nx-sum: 1\r\n\r\n",
        "hello || x-sum: 1",
    ),
    (
        "trailers-forbidden-all",
        b"5\r\nhello\r\n0\r\nContent-Type: a\r\nTE: trailers\r\nTrailer: a\r\n\r\n",
        "hello",
    ),
    (
        "trailer-ours",
        b"5\r\nhello\r\n0\r\noutrigger-attempt: 7\r\nx-sum: 1\r\n\r\n",
        "hello || x-sum: 1",
    ),
];

const HEAD: &[u8] = b"POST /chunks HTTP/1.1\r\nHost: orders\r\nTrailer: x-sum\r\nTE: trailers\r\nTransfer-Encoding: chunked\r\n\r\n";

#[tokio::test]
async fn broken_chunks_never_make_a_whole_request() {
    let rig = Rig::telling().await;
    let mut wrong = Failures::default();
    let owned = |(name, body): &(&'static str, &[u8])| (*name, body.to_vec());
    let cases = BROKEN.iter().map(owned).chain(broken_large());
    for (at, (name, body)) in cases.enumerate() {
        let rng = &mut Rng::with_seed(at as u64);
        let bytes = [HEAD, &body, &get("/smuggled")].concat();
        for longest in [usize::MAX, (bytes.len() / 12).max(3)] {
            let mut found = Failures::default();
            let case = async {
                let mut caller = rig.caller().await;
                match longest {
                    usize::MAX => caller.send(&bytes).await,
                    _ => caller.send_split(&bytes, longest, rng).await,
                }
                match caller.answer("POST").await {
                    Ok(reply) => {
                        if let Err(what) = is_error(&reply, 400, "bad_request") {
                            found.add(name, what);
                        }
                    }
                    Err(cut) => found.add(name, format!("no answer: {cut:?}")),
                }
                if let Err(what) = caller.closed().await {
                    found.add(name, what);
                }
            };
            let seen = rig.around(name, &mut wrong, case).await;
            wrong.take(found);
            for seen in seen {
                let harmless = !seen.complete && seen.message.head.second() == "/chunks";
                wrong.check(name, harmless, format!("forwarded {seen:?}"));
            }
        }
    }
    wrong.finish();
}

#[tokio::test]
async fn chunks_arrive_with_their_content_alone() {
    let rig = Rig::telling().await;
    let mut wrong = Failures::default();
    let start = "POST /chunks HTTP/1.1 | host: orders | te: trailers | trailer: x-sum | transfer-encoding: chunked || ";
    for (at, (name, body, content)) in WHOLE.iter().enumerate() {
        let rng = &mut Rng::with_seed(at as u64);
        // The next request on the connection begins where this one ends.
        let bytes = [HEAD, body, &get("/next")].concat();
        for longest in [usize::MAX, 3] {
            let mut found = Failures::default();
            let case = async {
                let mut caller = rig.caller().await;
                match longest {
                    usize::MAX => caller.send(&bytes).await,
                    _ => caller.send_split(&bytes, longest, rng).await,
                }
                for told in ["POST /chunks", "GET /next"] {
                    let answer = caller.answer("POST").await;
                    let text = answer.as_ref().map(|reply| reply.message.text());
                    found.check(name, text.as_deref() == Ok(told), format!("{answer:?}"));
                }
            };
            let seen = rig.around(name, &mut wrong, case).await;
            wrong.take(found);
            let all: Vec<String> = seen.iter().map(|seen| told(&seen.message)).collect();
            let next = "GET /next HTTP/1.1 | host: orders || ".to_owned();
            wrong.check(
                name,
                all == [format!("{start}{content}"), next],
                format!("forwarded {all:#?}"),
            );
        }
    }
    // Extensions end here.
    let bytes = rig.origin.bytes().concat();
    assert!(
        !bytes
            .windows(4)
            .any(|four| four == b"=val" || four == b";las")
    );
    wrong.finish();
}
