//! Unary gRPC calls as messages.

use outrigger_tests::client::{Ask, Client};
use outrigger_tests::mesh::Sidecar;
use outrigger_tests::process::python;
use outrigger_tests::until_true;
use outrigger_tests::upstream::{Reply, Seen, Upstream, grpc_frame};

use crate::{in_state, mesh, store_ready};

async fn mailer(
    asynchronous: &str,
    script: impl Fn(&Seen) -> Reply + Send + Sync + 'static,
) -> (Upstream, Sidecar, Client) {
    let upstream = Upstream::h2(script).await;
    let sidecar = Sidecar::start(mesh(&upstream, asynchronous, "")).await;
    store_ready(&sidecar).await;
    let client = Client::h2(sidecar.outbound()).await;
    (upstream, sidecar, client)
}

fn send(message: &[u8]) -> Ask {
    Ask::grpc("mailer", "/mail.Mailer/Send", message)
}

#[tokio::test]
async fn a_unary_call_is_acknowledged_with_an_empty_message_and_delivered() {
    let (upstream, sidecar, mut client) = mailer("when: Always, grpcAck: Empty", |_| {
        Reply::grpc(&[b"sent"], 0)
    })
    .await;
    let answer = client
        .call(send(b"hello").header("grpc-timeout", "5S"))
        .await;
    assert_eq!(
        (answer.status, answer.trailer("grpc-status")),
        (200, "0"),
        "{answer:?}"
    );
    assert_eq!(answer.body, grpc_frame(b""));
    let id = answer.header("outrigger-message-id").to_owned();
    let status = in_state(&sidecar, &id, "succeeded").await;
    assert_eq!(status["attempts"][0]["grpcStatus"], 0, "{status}");
    let seen = upstream.last();
    assert_eq!(seen.body, grpc_frame(b"hello"));
    assert_eq!(
        (seen.path.as_str(), seen.header("te")),
        ("/mail.Mailer/Send", "trailers")
    );
    assert_eq!(seen.header("outrigger-message-id"), id);
    assert_ne!(
        seen.header("grpc-timeout"),
        "5S",
        "the caller's deadline ended with its call"
    );
}

#[tokio::test]
async fn a_retryable_status_is_tried_again_and_a_permanent_one_is_dead() {
    let (upstream, sidecar, mut client) = mailer(
        "when: Always, grpcAck: Empty, delivery: {backoff: 5ms}",
        |seen| match seen.n {
            1 => Reply::grpc_error(14, "starting"),
            2 => Reply::grpc(&[b"sent"], 0),
            _ => Reply::grpc_error(3, "bad mail"),
        },
    )
    .await;
    let id = client
        .call(send(b"1"))
        .await
        .header("outrigger-message-id")
        .to_owned();
    in_state(&sidecar, &id, "succeeded").await;
    let id = client
        .call(send(b"2"))
        .await
        .header("outrigger-message-id")
        .to_owned();
    in_state(&sidecar, &id, "dead").await;
    assert_eq!(upstream.hits(), 3);
    let letter = sidecar.view(&format!("/dead/{id}")).await;
    assert_eq!(letter["lastReason"], "grpc_INVALID_ARGUMENT", "{letter}");
}

#[tokio::test]
async fn a_stream_of_messages_cannot_be_queued() {
    for (when, status, hits) in [("Always", "12", 0), ("Preferred", "0", 1)] {
        let rule = format!("when: {when}, grpcAck: Empty");
        let (upstream, _sidecar, mut client) = mailer(&rule, |_| Reply::grpc(&[b"both"], 0)).await;
        let two = [grpc_frame(b"one"), grpc_frame(b"two")].concat();
        let ask = send(b"")
            .body(two.clone())
            .header("prefer", "respond-async");
        let answer = client.call(ask).await;
        let found = format!(
            "{}{}",
            answer.header("grpc-status"),
            answer.trailer("grpc-status")
        );
        assert_eq!(found, status, "{when}: {answer:?}");
        assert_eq!(upstream.hits(), hits, "{when}");
        if when == "Preferred" {
            assert_eq!(answer.header("outrigger-async"), "skipped;reason=stream");
            assert!(upstream.last().body == two);
        }
    }
}

#[tokio::test]
async fn a_call_that_does_not_end_after_its_message_is_a_stream() {
    let (upstream, _sidecar, mut client) = mailer("when: Preferred, grpcAck: Empty", |_| {
        Reply::grpc(&[b"answer"], 0)
    })
    .await;
    let (ask, pieces) = Ask::new("POST", "mailer", "/mail.Mailer/Chat").streamed();
    let ask = ask
        .header("content-type", "application/grpc")
        .header("prefer", "respond-async");
    pieces.send(grpc_frame(b"first")).await.expect("taken");
    let chatting = async {
        // It goes on as a stream after the second that a unary call has for its end.
        until_true("the stream is passed on", || upstream.hits() == 1).await;
        pieces.send(grpc_frame(b"second")).await.expect("taken");
        drop(pieces);
    };
    let (answer, ()) = tokio::join!(client.call(ask), chatting);
    assert_eq!(
        answer.header("outrigger-async"),
        "skipped;reason=stream",
        "{answer:?}"
    );
    assert_eq!(
        upstream.last().body,
        [grpc_frame(b"first"), grpc_frame(b"second")].concat()
    );
}

#[tokio::test]
async fn an_answer_of_other_than_one_message_is_not_unary() {
    let (_upstream, sidecar, mut client) = mailer("when: Always, grpcAck: Empty", |_| {
        Reply::grpc(&[b"one", b"two"], 0)
    })
    .await;
    let id = client
        .call(send(b"x"))
        .await
        .header("outrigger-message-id")
        .to_owned();
    in_state(&sidecar, &id, "dead").await;
    assert_eq!(
        sidecar.view(&format!("/dead/{id}")).await["reason"],
        "not_unary"
    );
}

#[tokio::test]
async fn without_an_acknowledgement_to_give_a_grpc_call_is_not_queued() {
    let (upstream, _sidecar, mut client) =
        mailer("when: Preferred", |_| Reply::grpc(&[b"now"], 0)).await;
    let answer = client
        .call(send(b"x").header("prefer", "respond-async"))
        .await;
    assert_eq!(answer.trailer("grpc-status"), "0", "{answer:?}");
    assert_eq!(answer.header("outrigger-async"), "skipped;reason=grpc_ack");
    assert_eq!(upstream.hits(), 1);
}

#[tokio::test]
async fn the_rule_says_which_grpc_codes_are_permanent() {
    let rule =
        "when: Always, grpcAck: Empty, delivery: {backoff: 5ms}, permanent: {grpc: [INTERNAL]}";
    let (upstream, sidecar, mut client) = mailer(rule, |seen| match seen.n {
        1 => Reply::grpc_error(5, "not there yet"),
        2 => Reply::grpc(&[b"sent"], 0),
        _ => Reply::grpc_error(13, "broken"),
    })
    .await;
    for (expected, hits) in [("succeeded", 2), ("dead", 3)] {
        let id = client
            .call(send(b"x"))
            .await
            .header("outrigger-message-id")
            .to_owned();
        in_state(&sidecar, &id, expected).await;
        assert_eq!(upstream.hits(), hits);
    }
}

/// A `google.protobuf.StringValue` shorter than 128 bytes.
fn string_value(text: &str) -> Vec<u8> {
    let length = u8::try_from(text.len()).expect("short");
    [&[0x0a, length], text.as_bytes()].concat()
}

#[tokio::test(flavor = "multi_thread")]
async fn grpcio_follows_operations_with_googles_own_messages() {
    let rule = "when: Always, grpcAck: Operation, grpcResponseType: google.protobuf.StringValue";
    let (upstream, sidecar, _client) = mailer(rule, |seen| {
        if seen.header("x-kind") == "bad" {
            return Reply::grpc_error(3, "no");
        }
        Reply::grpc(&[&string_value("made")], 0)
    })
    .await;
    let address = sidecar.outbound().to_string();
    let client = tokio::task::spawn_blocking(move || {
        let mut client = python("operations.py");
        client.args([address.as_str(), "mailer"]).output()
    });
    let output = client.await.expect("no panic").expect("it ran");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    assert_eq!(upstream.hits(), 2, "the third was cancelled");
}

#[tokio::test]
async fn an_operation_of_the_service_itself_is_passed_on_when_it_is_done() {
    // Operation{name: "theirs", done: true, response: Any{type_url: "t", value: "v"}}
    let theirs = b"\x0a\x06theirs\x18\x01\x2a\x06\x0a\x01t\x12\x01v";
    let (_upstream, _sidecar, mut client) = mailer("when: Always, grpcAck: Operation", |_| {
        Reply::grpc(&[theirs], 0)
    })
    .await;
    let answer = client.call(send(b"x").header("prefer", "wait=10")).await;
    let id = answer.header("outrigger-message-id");
    let name = format!("operations/{id}");
    let mut ours = vec![0x0a, u8::try_from(name.len()).expect("short")];
    ours.extend_from_slice(name.as_bytes());
    ours.extend_from_slice(b"\x18\x01\x2a\x06\x0a\x01t\x12\x01v");
    assert_eq!(answer.body, grpc_frame(&ours), "{answer:?}");
    assert_eq!(answer.trailer("grpc-status"), "0");
}

#[tokio::test]
async fn a_service_without_such_rules_keeps_its_own_operations() {
    let (upstream, _sidecar, mut client) = mailer("when: Never", |_| Reply::grpc(&[b""], 0)).await;
    let path = "/google.longrunning.Operations/GetOperation";
    let answer = client.call(Ask::grpc("mailer", path, b"\x0a\x01x")).await;
    assert_eq!(answer.trailer("grpc-status"), "0", "{answer:?}");
    assert_eq!(upstream.last().path, path);
}
