//! Bytes that must arrive as they left: bodies in any pieces, trailers, both ways at once, in every
//! combination of protocols.

use fastrand::Rng;
use outrigger_tests::client::{Ask, Client};
use outrigger_tests::mesh::{Sidecar, route, service, service_h2};
use outrigger_tests::raw::message::{Framing, declared};
use outrigger_tests::raw::{Act, Caller, Origin};
use outrigger_tests::upstream::{Reply, Upstream};
use tokio::io::AsyncWriteExt as _;

use crate::rig::CALM;

const MEGABYTE: usize = 1 << 20;

fn random(seed: u64, length: usize) -> Vec<u8> {
    let mut rng = Rng::with_seed(seed);
    std::iter::repeat_with(|| rng.u8(..)).take(length).collect()
}

/// Bytes in pieces of 1 to `longest`.
fn pieces(bytes: &[u8], longest: usize, rng: &mut Rng) -> Vec<Vec<u8>> {
    let mut rest = bytes;
    let mut pieces = Vec::new();
    while !rest.is_empty() {
        let (piece, after) = rest.split_at(rng.usize(1..=longest).min(rest.len()));
        pieces.push(piece.to_vec());
        rest = after;
    }
    pieces
}

fn chunked(bytes: &[u8], longest: usize, rng: &mut Rng, trailers: &str) -> Vec<u8> {
    let mut wire = Vec::new();
    for piece in pieces(bytes, longest, rng) {
        wire.extend(format!("{:X}\r\n", piece.len()).into_bytes());
        wire.extend([&piece[..], b"\r\n"].concat());
    }
    wire.extend(format!("0\r\n{trailers}\r\n").into_bytes());
    wire
}

async fn before_h1() -> (Origin, Sidecar) {
    let origin = Origin::start(|_| vec![Act::Echo]).await;
    let yaml = service("orders", &[origin.addr], CALM) + &route("orders", &["{}"]);
    (origin, Sidecar::start(yaml).await)
}

async fn before_h2() -> (Upstream, Sidecar) {
    let upstream = Upstream::h2(|_| Reply::echo()).await;
    let yaml = service_h2("orders", &[upstream.addr], CALM) + &route("orders", &["{}"]);
    (upstream, Sidecar::start(yaml).await)
}

const CHUNKED: &str = "POST /echo HTTP/1.1\r\nHost: orders\r\nTE: trailers\r\nTrailer: x-sum\r\nTransfer-Encoding: chunked\r\n\r\n";

/// Writes and reads at the same time; the body and trailers that came back.
async fn echo_h1(sidecar: &Sidecar, head: &str, wire: Vec<u8>, seed: u64) -> (Vec<u8>, String) {
    let caller = Caller::connect(sidecar.outbound()).await;
    let (mut reader, mut write) = caller.split();
    let mut rng = Rng::with_seed(seed);
    let all = [head.as_bytes(), &wire].concat();
    let writing = tokio::spawn(async move {
        for piece in pieces(&all, 40_000, &mut rng) {
            write.write_all(&piece).await.expect("written");
            tokio::task::yield_now().await;
        }
        write
    });
    let head = reader.head().await.expect("an answer");
    assert_eq!(head.second(), "200");
    let framing = declared(&head)
        .expect("framed")
        .unwrap_or(Framing::UntilClose);
    let (body, ended) = reader.body(framing).await;
    let trailers = ended.expect("whole");
    drop(writing.await.expect("no panic"));
    let sum = trailers.iter().find(|(name, _)| name == "x-sum");
    let sum = sum.map(|(_, value)| String::from_utf8_lossy(value).into_owned());
    (body, sum.unwrap_or_default())
}

#[tokio::test]
async fn a_megabyte_in_any_chunks_arrives_and_returns_whole_over_h1() {
    let (origin, sidecar) = before_h1().await;
    for (seed, longest) in [(1, 10), (2, 3_000), (3, 100_000), (4, MEGABYTE)] {
        // Many small chunks of a smaller body.
        let body = random(seed, if longest < 100 { 30_000 } else { MEGABYTE });
        let wire = chunked(&body, longest, &mut Rng::with_seed(seed), "X-Sum: 7\r\n");
        let (returned, sum) = echo_h1(&sidecar, CHUNKED, wire, seed).await;
        assert!(
            returned == body,
            "seed {seed}: returned {} bytes",
            returned.len()
        );
        assert_eq!(sum, "7");
        let seen = origin.seen().pop().expect("it was asked");
        assert!(seen.complete && seen.message.body == body, "seed {seed}");
        assert_eq!(seen.message.trailer("x-sum"), "7");
    }
    // Of known length, the length goes along.
    let body = random(5, MEGABYTE);
    let head = format!("POST /echo HTTP/1.1\r\nHost: orders\r\nContent-Length: {MEGABYTE}\r\n\r\n");
    let (returned, _) = echo_h1(&sidecar, &head, body.clone(), 5).await;
    assert!(returned == body);
    let seen = origin.seen().pop().expect("it was asked");
    assert_eq!(
        seen.message.head.get("content-length"),
        MEGABYTE.to_string()
    );
    assert_eq!(origin.malformed(), Vec::<String>::new());
}

#[tokio::test]
async fn a_megabyte_in_any_pieces_arrives_and_returns_whole_from_h2_to_h1() {
    let (origin, sidecar) = before_h1().await;
    let mut client = Client::h2(sidecar.outbound()).await;
    for (seed, longest) in [(1, 50), (2, 3_000), (3, 100_000)] {
        let body = random(seed, if longest < 100 { 3_000 } else { MEGABYTE });
        let (ask, sender) = Ask::new("POST", "orders", "/echo").streamed();
        let all = pieces(&body, longest, &mut Rng::with_seed(seed));
        let sending = tokio::spawn(async move {
            for piece in all {
                sender.send(piece.into()).await.expect("taken");
            }
        });
        let answer = client.call(ask).await;
        sending.await.expect("no panic");
        assert!(
            answer.body == body,
            "seed {seed}: returned {} bytes",
            answer.body.len()
        );
        let seen = origin.seen().pop().expect("it was asked");
        assert!(seen.complete && seen.message.body == body, "seed {seed}");
    }
    assert_eq!(origin.malformed(), Vec::<String>::new());
}

#[tokio::test]
async fn a_megabyte_in_any_chunks_arrives_and_returns_whole_before_h2() {
    let (upstream, sidecar) = before_h2().await;
    for (seed, longest) in [(1, 10), (2, 3_000), (3, 100_000)] {
        let body = random(seed, if longest < 100 { 30_000 } else { MEGABYTE });
        let wire = chunked(&body, longest, &mut Rng::with_seed(seed), "X-Sum: 7\r\n");
        let (returned, _) = echo_h1(&sidecar, CHUNKED, wire, seed).await;
        assert!(
            returned == body,
            "seed {seed}: returned {} bytes",
            returned.len()
        );
        let last = upstream.last();
        assert!(last.complete && last.body == body, "seed {seed}");
        assert_eq!(last.trailers["x-sum"], "7");
    }
    let mut client = Client::h2(sidecar.outbound()).await;
    let body = random(6, MEGABYTE);
    let answer = client
        .call(Ask::post("orders", "/echo", body.clone()))
        .await;
    assert!(answer.body == body);
    assert!(upstream.last().body == body);
}

#[tokio::test]
async fn trailers_go_both_ways_in_every_combination() {
    // From h1 to h1: with the megabyte above. From h2 to h1:
    let (origin, sidecar) = before_h1().await;
    let mut client = Client::h2(sidecar.outbound()).await;
    let up = || {
        Ask::new("POST", "orders", "/echo")
            .header("te", "trailers")
            .header("trailer", "x-sum")
            .with_trailers("hello", &[("x-sum", "7"), ("x-sum", "8")])
    };
    let answer = client.call(up()).await;
    assert_eq!(
        (answer.text().as_str(), answer.trailer("x-sum")),
        ("hello", "7")
    );
    let seen = origin.seen().pop().expect("it was asked");
    let expected = [
        ("x-sum".to_owned(), b"7".to_vec()),
        ("x-sum".to_owned(), b"8".to_vec()),
    ];
    assert_eq!(seen.message.trailers, expected);
    assert_eq!(answer.trailers.get_all("x-sum").iter().count(), 2);

    // To h2, from h1 and h2.
    let upstream = Upstream::h2(|_| Reply::chunks(["hel", "lo"]).trailer("x-sum", "9")).await;
    let yaml = service_h2("orders", &[upstream.addr], CALM) + &route("orders", &["{}"]);
    let sidecar = Sidecar::start(yaml).await;
    let wire = chunked(b"hello", 2, &mut Rng::with_seed(1), "X-Sum: 7\r\n");
    let (body, sum) = echo_h1(&sidecar, CHUNKED, wire, 1).await;
    assert_eq!((&body[..], sum.as_str()), (&b"hello"[..], "9"));
    assert_eq!(upstream.last().trailers["x-sum"], "7");
    let mut client = Client::h2(sidecar.outbound()).await;
    let answer = client.call(up()).await;
    assert_eq!(
        (answer.text().as_str(), answer.trailer("x-sum")),
        ("hello", "9")
    );
    assert_eq!(upstream.last().trailers.get_all("x-sum").iter().count(), 2);
}

#[tokio::test]
async fn what_goes_up_comes_down_before_the_upload_ends() {
    let (_origin, sidecar) = before_h1().await;
    // h1: every chunk is back before the next is sent.
    let (mut reader, mut write) = Caller::connect(sidecar.outbound()).await.split();
    write.write_all(CHUNKED.as_bytes()).await.expect("written");
    write.write_all(b"2\r\n00\r\n").await.expect("written");
    let head = reader.head().await.expect("an answer before the end");
    let mut framing = declared(&head).expect("framed").expect("chunked");
    let mut back = Vec::new();
    for n in 0..20 {
        while back.len() < 2 * (n + 1) {
            match reader.piece(&mut framing).await.expect("a piece") {
                outrigger_tests::raw::message::Piece::Data(data) => back.extend(data),
                end => panic!("{end:?}"),
            }
        }
        let chunk = format!("2\r\n{:02}\r\n", n + 1);
        write.write_all(chunk.as_bytes()).await.expect("written");
    }
    write.write_all(b"0\r\n\r\n").await.expect("written");
    let (rest, ended) = reader.body(framing).await;
    ended.expect("whole");
    let expected: String = (0..=20).map(|n| format!("{n:02}")).collect();
    assert_eq!([back, rest].concat(), expected.as_bytes());

    // h2.
    let mut client = Client::h2(sidecar.outbound()).await;
    let (ask, sender) = Ask::new("POST", "orders", "/echo").streamed();
    sender.send("00".into()).await.expect("taken");
    let mut response = client.open(ask).await.expect("an answer before the end");
    let mut back = Vec::new();
    for n in 0..20 {
        while back.len() < 2 * (n + 1) {
            let frame = http_body_util::BodyExt::frame(response.body_mut()).await;
            back.extend(
                frame
                    .expect("more")
                    .expect("whole")
                    .into_data()
                    .expect("data"),
            );
        }
        sender
            .send(format!("{:02}", n + 1).into())
            .await
            .expect("taken");
    }
    drop(sender);
    let rest = outrigger_tests::client::read(response)
        .await
        .expect("whole");
    assert_eq!([&back[..], &rest.body[..]].concat(), expected.as_bytes());
}
