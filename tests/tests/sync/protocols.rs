//! HTTP/1.1, HTTP/2 and gRPC on either side, and what bodies go through.

use std::time::Duration;

use bytes::Bytes;
use http::Version;
use http_body_util::BodyExt as _;
use outrigger_tests::client::{self, Ask, Client, Raw};
use outrigger_tests::mesh::{Sidecar, service, service_h2};
use outrigger_tests::upstream::{Reply, Seen, Speaks, Upstream, grpc_frame};
use outrigger_tests::{until_true, upstream};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

/// A sidecar before one upstream of `speaks` called `orders`.
async fn before(
    speaks: Speaks,
    script: impl Fn(&Seen) -> Reply + Send + Sync + 'static,
) -> (Upstream, Sidecar) {
    let upstream = Upstream::start(speaks, script).await;
    let yaml = match speaks {
        Speaks::H1 => service("orders", &[upstream.addr], ""),
        Speaks::H2 => service_h2("orders", &[upstream.addr], ""),
    };
    (upstream, Sidecar::start(yaml).await)
}

async fn connect(speaks: Speaks, sidecar: &Sidecar) -> Client {
    match speaks {
        Speaks::H1 => Client::h1(sidecar.outbound()).await,
        Speaks::H2 => Client::h2(sidecar.outbound()).await,
    }
}

const BOTH: [Speaks; 2] = [Speaks::H1, Speaks::H2];

fn pattern(length: usize) -> Bytes {
    (0..length)
        .map(|at| (at * 31 % 251) as u8)
        .collect::<Vec<_>>()
        .into()
}

#[tokio::test]
async fn each_side_speaks_its_own_version() {
    for up in BOTH {
        let (upstream, sidecar) = before(up, |_| Reply::echo().header("x-a", "1")).await;
        for down in BOTH {
            let mut client = connect(down, &sidecar).await;
            let body = pattern(200_000);
            let ask = Ask::post("orders", "/v1/orders?a=b", body.clone())
                .header("content-type", "application/x-any");
            let answer = client.call(ask).await;
            let what = format!("{down:?} to {up:?}");
            assert_eq!((answer.status, answer.header("x-a")), (200, "1"), "{what}");
            assert!(answer.body == body, "{what}: the answer differs");
            let seen = upstream.last();
            assert!(
                seen.body == body && seen.complete,
                "{what}: the request differs"
            );
            assert_eq!(seen.authority, "orders", "{what}");
            assert_eq!(seen.path, "/v1/orders?a=b", "{what}");
            assert_eq!(seen.header("content-type"), "application/x-any", "{what}");
            let version = |speaks| match speaks {
                Speaks::H1 => Version::HTTP_11,
                Speaks::H2 => Version::HTTP_2,
            };
            assert_eq!(
                (answer.version, seen.version),
                (version(down), version(up)),
                "{what}"
            );
        }
    }
}

#[tokio::test]
async fn bodies_of_unknown_length_pass_in_both_directions() {
    for up in BOTH {
        let (upstream, sidecar) = before(up, |_| Reply::chunks(["one", "two", "three"])).await;
        for down in BOTH {
            let mut client = connect(down, &sidecar).await;
            let (ask, pieces) = Ask::new("POST", "orders", "/").streamed();
            let sending = async {
                for piece in ["a", "bc", "def"] {
                    pieces.send(piece.into()).await.expect("taken");
                }
                drop(pieces);
            };
            let (answer, ()) = tokio::join!(client.call(ask), sending);
            assert_eq!(answer.text(), "onetwothree", "{down:?} to {up:?}");
            assert_eq!(&upstream.last().body[..], b"abcdef", "{down:?} to {up:?}");
        }
    }
}

#[tokio::test]
async fn answers_without_a_body_keep_their_fields() {
    for up in BOTH {
        let (_upstream, sidecar) = before(up, |seen| match seen.path.as_str() {
            "/204" => Reply::status(204),
            "/304" => Reply::status(304).header("etag", "\"v1\""),
            _ => Reply::ok("12345"),
        })
        .await;
        for down in BOTH {
            // One connection: a body that is not there must not leave it out of step.
            let mut client = connect(down, &sidecar).await;
            let what = format!("{down:?} to {up:?}");
            let head = client.call(Ask::new("HEAD", "orders", "/")).await;
            assert_eq!(
                (head.status, head.header("content-length")),
                (200, "5"),
                "{what}"
            );
            assert!(head.body.is_empty(), "{what}");
            let none = client.call(Ask::get("orders", "/204")).await;
            assert_eq!(
                (none.status, none.header("transfer-encoding")),
                (204, ""),
                "{what}"
            );
            let same = client.call(Ask::get("orders", "/304")).await;
            assert_eq!(
                (same.status, same.header("etag")),
                (304, "\"v1\""),
                "{what}"
            );
            let whole = client.call(Ask::get("orders", "/")).await;
            assert_eq!(whole.text(), "12345", "{what}");
        }
    }
}

#[tokio::test]
async fn thirty_two_mebibytes_pass_unchanged() {
    const PIECE: usize = 64 * 1024;
    const PIECES: usize = 512;
    for speaks in BOTH {
        let (upstream, sidecar) = before(speaks, |_| Reply::echo()).await;
        let mut client = connect(speaks, &sidecar).await;
        let whole = pattern(PIECE * PIECES);
        let (ask, pieces) = Ask::new("PUT", "orders", "/").streamed();
        let sending = async {
            for at in 0..PIECES {
                let piece = whole.slice(at * PIECE..(at + 1) * PIECE);
                pieces.send(piece).await.expect("taken");
            }
            drop(pieces);
        };
        let (answer, ()) = tokio::join!(client.call(ask), sending);
        assert_eq!(answer.body.len(), whole.len());
        assert!(
            answer.body == whole && upstream.last().body == whole,
            "{speaks:?}: it differs"
        );
    }
}

#[tokio::test]
async fn trailers_pass_over_http_2() {
    let (upstream, sidecar) =
        before(Speaks::H2, |_| Reply::ok("body").trailer("x-sum", "42")).await;
    let mut client = Client::h2(sidecar.outbound()).await;
    let ask = Ask::new("POST", "orders", "/").with_trailers("up", &[("x-count", "2")]);
    let answer = client.call(ask).await;
    assert_eq!(
        (answer.text().as_str(), answer.trailer("x-sum")),
        ("body", "42")
    );
    let seen = upstream.last();
    assert_eq!(&seen.body[..], b"up");
    assert_eq!(
        seen.trailers.get("x-count").map(|value| value.as_bytes()),
        Some(&b"2"[..])
    );
}

#[tokio::test]
async fn a_unary_grpc_call_passes_whatever_the_port_says() {
    // A plain `http` port: the content type asks for HTTP/2.
    let upstream = Upstream::h2(|_| Reply::grpc(&[b"pong"], 0)).await;
    let sidecar = Sidecar::start(service("orders", &[upstream.addr], "")).await;
    let mut client = Client::h2(sidecar.outbound()).await;
    let answer = client
        .call(Ask::grpc("orders", "/shop.Orders/Create", b"ping"))
        .await;
    assert_eq!((answer.status, answer.trailer("grpc-status")), (200, "0"));
    assert_eq!(answer.body, grpc_frame(b"pong"));
    let seen = upstream.last();
    assert_eq!(seen.body, grpc_frame(b"ping"));
    assert_eq!(
        (seen.path.as_str(), seen.header("te")),
        ("/shop.Orders/Create", "trailers")
    );
}

#[tokio::test]
async fn a_grpc_stream_flows_message_by_message() {
    let (sender, receiver) = tokio::sync::mpsc::channel::<Bytes>(1);
    let receiver = std::sync::Mutex::new(Some(receiver));
    let (_upstream, sidecar) = before(Speaks::H2, move |_| {
        let receiver = receiver.lock().expect("whole").take().expect("asked once");
        let frames = futures_util::stream::unfold(receiver, |mut receiver| async move {
            let piece = receiver.recv().await?;
            Some((Ok(http_body::Frame::data(piece)), receiver))
        });
        Reply::frames(frames)
            .header("content-type", "application/grpc")
            .trailer("grpc-status", "0")
    })
    .await;
    let mut client = Client::h2(sidecar.outbound()).await;
    let response = client
        .open(Ask::grpc("orders", "/shop.Orders/Watch", b"all"))
        .await;
    let mut body = response.expect("a head before any message").into_body();
    for message in [&b"first"[..], b"second", b"third"] {
        sender.send(grpc_frame(message)).await.expect("taken");
        // The next message is sent only after this one has arrived.
        let frame = body.frame().await.expect("a frame").expect("unbroken");
        assert_eq!(frame.into_data().expect("data"), grpc_frame(message));
    }
    drop(sender);
    let trailers = body.frame().await.expect("a frame").expect("unbroken");
    let trailers = trailers.into_trailers().expect("trailers");
    assert_eq!(trailers["grpc-status"], "0");
}

#[tokio::test]
async fn both_directions_of_a_grpc_call_flow_at_once() {
    let (_upstream, sidecar) = before(Speaks::H2, |_| Reply::grpc(&[b"early"], 0).early()).await;
    let mut client = Client::h2(sidecar.outbound()).await;
    let (ask, pieces) = Ask::new("POST", "orders", "/shop.Orders/Chat").streamed();
    let ask = ask.header("content-type", "application/grpc");
    // The answer comes while the request is still open.
    let response = client.open(ask).await.expect("a head");
    let first = response
        .into_body()
        .frame()
        .await
        .expect("a frame")
        .expect("unbroken");
    assert_eq!(first.into_data().expect("data"), grpc_frame(b"early"));
    drop(pieces);
}

#[tokio::test]
async fn grpc_errors_pass_in_trailers_and_without_a_body() {
    let (_upstream, sidecar) = before(Speaks::H2, |seen| match seen.path.as_str() {
        "/s/Trailers" => Reply::grpc(&[b"part"], 5).trailer("grpc-message", "no such order"),
        _ => Reply::grpc_error(7, "not yours"),
    })
    .await;
    let mut client = Client::h2(sidecar.outbound()).await;
    let late = client.call(Ask::grpc("orders", "/s/Trailers", b"x")).await;
    assert_eq!((late.status, late.trailer("grpc-status")), (200, "5"));
    assert_eq!(late.trailer("grpc-message"), "no such order");
    assert_eq!(late.body, grpc_frame(b"part"));
    let only = client.call(Ask::grpc("orders", "/s/Only", b"x")).await;
    assert_eq!((only.status, only.header("grpc-status")), (200, "7"));
    assert_eq!(
        (only.header("grpc-message"), only.code()),
        ("not yours", "")
    );
}

#[tokio::test]
async fn our_own_errors_reach_grpc_callers_as_a_status() {
    let yaml = service("orders", &[upstream::nobody().await], "");
    let sidecar = Sidecar::start(yaml).await;
    let mut client = Client::h2(sidecar.outbound()).await;
    let answer = client.call(Ask::grpc("orders", "/s/M", b"x")).await;
    assert_eq!((answer.status, answer.header("grpc-status")), (200, "14"));
    assert_eq!(answer.code(), "connect_failed");
    let unknown = client.call(Ask::grpc("nobody", "/s/M", b"x")).await;
    assert_eq!(
        (unknown.header("grpc-status"), unknown.code()),
        ("12", "no_route")
    );
}

#[tokio::test]
async fn an_answer_before_the_end_of_the_upload_reaches_the_caller() {
    for up in BOTH {
        let (_upstream, sidecar) =
            before(up, |_| Reply::ok("enough").with_status(413).early()).await;
        for down in BOTH {
            let mut client = connect(down, &sidecar).await;
            let (ask, pieces) = Ask::new("POST", "orders", "/").streamed();
            pieces
                .send(Bytes::from_static(b"start"))
                .await
                .expect("taken");
            let answer = client.try_call(ask).await;
            let answer = answer.unwrap_or_else(|error| panic!("{down:?} to {up:?}: {error}"));
            assert_eq!(
                (answer.status, answer.text().as_str()),
                (413, "enough"),
                "{down:?} to {up:?}"
            );
            drop(pieces);
        }
    }
}

#[tokio::test]
async fn a_caller_that_leaves_frees_the_upstream() {
    for up in BOTH {
        let (upstream, sidecar) = before(up, |_| Reply::hang()).await;
        for down in BOTH {
            let mut client = connect(down, &sidecar).await;
            tokio::select! {
                answer = client.open(Ask::get("orders", "/")) => panic!("{answer:?}"),
                () = until_true("it arrives", || upstream.active() == 1) => {}
            }
            client.abort();
            until_true("the upstream is let go", || upstream.active() == 0).await;
            sidecar
                .metric_until("nothing is in flight", |metrics| {
                    metrics.sum("outrigger_in_flight", &[]) == 0.0
                })
                .await;
        }
        // Nor is the service blamed for it.
        let breakers = sidecar.view("/breakers").await;
        assert_eq!(breakers["breakers"][0]["windowFailures"], 0, "{breakers}");
    }
}

#[tokio::test]
async fn an_upstream_that_breaks_off_is_told_apart_from_one_that_ends() {
    for up in BOTH {
        let (_upstream, sidecar) = before(up, |seen| match seen.path.as_str() {
            "/head" => Reply::reset(),
            _ => Reply::broken_after("half"),
        })
        .await;
        for down in BOTH {
            let mut client = connect(down, &sidecar).await;
            client
                .call(Ask::get("orders", "/head"))
                .await
                .assert_error(502, "upstream_reset");
            let half = client.try_call(Ask::get("orders", "/body")).await;
            assert!(
                half.is_err(),
                "{down:?} to {up:?}: half a body looks whole: {half:?}"
            );
        }
        let metrics = sidecar.metrics().await;
        let broken = metrics.sum("outrigger_requests_total", &[("code", "upstream_reset")]);
        assert!(broken >= 2.0, "{broken}");
    }
}

#[tokio::test]
async fn what_is_not_http_is_upstream_protocol() {
    let garbage = upstream::Raw::start(|mut stream| async move {
        let mut buffer = [0; 1024];
        let _ = stream.read(&mut buffer).await;
        let _ = stream.write_all(b"220 smtp ready\r\n\r\n").await;
        let _ = stream.read(&mut buffer).await;
    })
    .await;
    let yaml = service("orders", &[garbage.addr], "");
    let sidecar = Sidecar::start(yaml).await;
    let answer = sidecar.call(Ask::post("orders", "/", "x")).await;
    answer.assert_error(502, "upstream_protocol");
    assert_eq!(garbage.connections(), 1);
}

#[tokio::test]
async fn a_caller_that_waits_for_100_continue_is_told_to_go_on() {
    let (upstream, sidecar) = before(Speaks::H1, |_| Reply::echo()).await;
    let mut raw = Raw::connect(sidecar.outbound()).await;
    raw.send(
        "POST / HTTP/1.1\r\nHost: orders\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n",
    )
    .await;
    raw.read_until("HTTP/1.1 100").await;
    raw.send("hello").await;
    raw.read_until("hello").await;
    assert_eq!(&upstream.last().body[..], b"hello");
}

#[tokio::test]
async fn a_caller_that_closes_its_sending_half_is_gone() {
    let (upstream, sidecar) = before(Speaks::H1, |_| Reply::hang()).await;
    let mut raw = Raw::connect(sidecar.outbound()).await;
    raw.send("GET / HTTP/1.1\r\nHost: orders\r\n\r\n").await;
    until_true("it arrives", || upstream.active() == 1).await;
    raw.half_close().await;
    until_true("the upstream is let go", || upstream.active() == 0).await;
}

#[tokio::test]
async fn pipelined_requests_are_answered_in_order() {
    let (_upstream, sidecar) = before(Speaks::H1, |seen| Reply::ok(seen.path.clone())).await;
    let mut raw = Raw::connect(sidecar.outbound()).await;
    let one = |path| format!("GET {path} HTTP/1.1\r\nHost: orders\r\n\r\n");
    raw.send(one("/first") + &one("/second")).await;
    let all = raw.read_until("/second").await;
    assert!(all.find("/first") < all.find("/second"), "{all}");
}

#[tokio::test]
async fn upstream_connections_are_used_again() {
    for up in BOTH {
        let (upstream, sidecar) = before(up, |_| Reply::ok("x")).await;
        for _ in 0..20 {
            assert_eq!(sidecar.get("orders", "/").await.status, 200);
        }
        assert_eq!(upstream.connections(), 1, "{up:?}");
    }
}

#[tokio::test]
async fn many_streams_share_one_connection_on_either_side() {
    let (upstream, sidecar) = before(Speaks::H2, |_| {
        Reply::echo().delay(Duration::from_millis(20))
    })
    .await;
    let mut client = Client::h2(sidecar.outbound()).await;
    let mut under_way = Vec::new();
    for n in 0..50 {
        let ask = Ask::post("orders", "/", format!("body {n}"));
        under_way.push(client.open(ask).await.map(client::read));
    }
    for (n, answer) in under_way.into_iter().enumerate() {
        let answer = answer.expect("a head").await.expect("a body");
        assert_eq!(answer.text(), format!("body {n}"));
    }
    assert!(upstream.connections() <= 2, "{}", upstream.connections());
}

#[tokio::test]
async fn two_sidecars_in_a_row_carry_a_call() {
    let app = Upstream::h1(|_| Reply::echo()).await;
    let callee = Sidecar::named("orders-1")
        .mesh(service("orders", &[app.addr], ""))
        .app(app.addr)
        .start()
        .await;
    let yaml = service_h2("orders", &[callee.inbound()], "");
    let caller = Sidecar::named("web-1").mesh(yaml).start().await;
    let answer = caller
        .call(Ask::post("orders", "/v1", "over two hops"))
        .await;
    assert_eq!(
        (answer.status, answer.text().as_str()),
        (200, "over two hops")
    );
    // An error of the second hop says so.
    drop(app);
    let refused = caller.call(Ask::post("orders", "/v1", "")).await;
    assert_eq!(refused.status, 503);
}
