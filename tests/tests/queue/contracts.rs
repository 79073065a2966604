//! Message contracts: what breaks them is refused before anything is made of it.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use outrigger_tests::client::{Ask, Client};
use outrigger_tests::mesh::{Sidecar, queue, route, service, service_h2};
use outrigger_tests::upstream::{Reply, Upstream};

use crate::{accepted, in_state, store_ready};

const SCHEMA: &str =
    r#"{"type": "object", "required": ["item"], "properties": {"item": {"type": "integer"}}}"#;

/// `orders` with a contract of this content and mode.
fn orders(upstream: &Upstream, contract: &str) -> String {
    let rule = format!(
        "{{name: create, contract: {contract}, async: {{when: Preferred, queue: orders, maxBody: 200KiB}}}}"
    );
    service("orders", &[upstream.addr], "") + &route("orders", &[&rule]) + &queue("orders", "")
}

fn order(body: impl Into<bytes::Bytes>) -> Ask {
    Ask::post("orders", "/v1/orders", body)
}

fn later(ask: Ask) -> Ask {
    ask.header("prefer", "respond-async")
}

#[tokio::test]
async fn a_body_that_breaks_the_contract_is_refused_before_it_is_sent_or_queued() {
    let upstream = Upstream::h1(|_| Reply::status(400)).await;
    let sidecar = Sidecar::start(orders(&upstream, &format!("{{jsonSchema: '{SCHEMA}'}}"))).await;
    store_ready(&sidecar).await;
    let long = format!(r#"{{"item": "{}"}}"#, "x".repeat(100_000));
    for body in ["{}", r#"{"item": "seven"}"#, "no JSON", "", &long] {
        for ask in [order(body.to_owned()), later(order(body.to_owned()))] {
            let refused = sidecar.call(ask).await;
            refused.assert_error(422, "contract_violation");
            assert!(!refused.text().contains("seven"), "{}", refused.text());
        }
    }
    let wrong = sidecar.call(order(r#"{"item": "seven"}"#)).await.text();
    assert!(wrong.contains("/item: "), "{wrong}");
    sidecar
        .call(order(vec![b' '; 300 * 1024]))
        .await
        .assert_error(413, "request_too_large");
    assert_eq!(upstream.hits(), 0);
    // What keeps it goes on, and a message says by which version it was checked.
    assert_eq!(sidecar.call(order(r#"{"item": 7}"#)).await.status, 400);
    assert_eq!(sidecar.get("orders", "/v1/orders").await.status, 400);
    let id = accepted(&sidecar, later(order(r#"{"item": 8}"#))).await;
    in_state(&sidecar, &id, "dead").await;
    assert_eq!(&upstream.last().body[..], br#"{"item": 8}"#);
    let letter = sidecar.view(&format!("/dead/{id}")).await;
    assert_eq!(
        letter["request"]["contract"].as_str().map(str::len),
        Some(16),
        "{letter}"
    );
    let metrics = sidecar.metrics().await;
    let enforced = [("route", "default/orders/create"), ("mode", "Enforce")];
    assert_eq!(
        metrics.sum("outrigger_contract_violations_total", &enforced),
        11.0
    );
}

#[tokio::test]
async fn a_contract_of_mode_warn_counts_and_lets_pass() {
    let upstream = Upstream::h1(|_| Reply::ok("")).await;
    let contract = format!("{{jsonSchema: '{SCHEMA}', mode: Warn}}");
    let sidecar = Sidecar::start(orders(&upstream, &contract)).await;
    store_ready(&sidecar).await;
    assert_eq!(sidecar.call(order("{}")).await.status, 200);
    assert_eq!(
        sidecar.call(order(vec![b'x'; 300 * 1024])).await.status,
        200
    );
    let id = accepted(&sidecar, later(order("{}"))).await;
    in_state(&sidecar, &id, "succeeded").await;
    let metrics = sidecar.metrics().await;
    let warned = [("mode", "Warn")];
    assert_eq!(
        metrics.sum("outrigger_contract_violations_total", &warned),
        2.0
    );
    assert_eq!(upstream.seen()[1].body.len(), 300 * 1024);
}

#[tokio::test]
async fn a_schema_beside_the_document_is_read_and_its_change_is_an_edit() {
    let upstream = Upstream::h1(|_| Reply::ok("")).await;
    let yaml = orders(&upstream, "{jsonSchema: ./orders.schema.json}");
    let sidecar = Sidecar::start(yaml).await;
    store_ready(&sidecar).await;
    let refused = sidecar.call(order(r#"{"item": 7}"#)).await;
    refused.assert_error(422, "contract_violation");
    assert!(refused.text().contains("missing"), "{}", refused.text());
    let file = sidecar.mesh_file().with_file_name("orders.schema.json");
    let becomes = async |schema: &str, body: &str, status: u16| {
        std::fs::write(&file, schema).expect("written");
        outrigger_tests::until("the schema is in force", async || {
            let answer = sidecar.call(order(body.to_owned())).await;
            (answer.status == status).then_some(())
        })
        .await;
    };
    becomes(SCHEMA, r#"{"item": 7}"#, 200).await;
    becomes(&SCHEMA.replace("integer", "string"), r#"{"item": 7}"#, 422).await;
    becomes(
        &SCHEMA.replace("integer", "string"),
        r#"{"item": "seven"}"#,
        200,
    )
    .await;
}

/// A protobuf field of wire type 2.
fn field(number: u8, content: &[u8]) -> Vec<u8> {
    let length = u8::try_from(content.len()).expect("short");
    assert!(length < 128);
    [&[number << 3 | 2, length], content].concat()
}

/// The descriptor set of `service shop.Orders { rpc Create(Order) returns (Order) }` with
/// `message Order { string item = 1; }`.
fn descriptors() -> Vec<u8> {
    let item = [
        field(1, b"item"),
        vec![3 << 3, 1],
        vec![4 << 3, 1],
        vec![5 << 3, 9],
    ]
    .concat();
    let order = [field(1, b"Order"), field(2, &item)].concat();
    let create = [
        field(1, b"Create"),
        field(2, b".shop.Order"),
        field(3, b".shop.Order"),
    ]
    .concat();
    let orders = [field(1, b"Orders"), field(2, &create)].concat();
    let file = [
        field(1, b"a.proto"),
        field(2, b"shop"),
        field(4, &order),
        field(6, &orders),
        field(12, b"proto3"),
    ];
    field(1, &file.concat())
}

#[tokio::test]
async fn a_grpc_call_is_held_to_its_descriptor_set_before_it_is_queued() {
    let upstream = Upstream::h2(|_| Reply::grpc(&[b""], 0)).await;
    let set = STANDARD.encode(descriptors());
    let rule = format!(
        "{{name: create, contract: {{descriptorSet: 'base64,{set}'}}, async: {{when: Always, queue: orders, grpcAck: Empty}}}}"
    );
    let yaml = service_h2("orders", &[upstream.addr], "")
        + &route("orders", &[&rule])
        + &queue("orders", "");
    let sidecar = Sidecar::start(yaml).await;
    store_ready(&sidecar).await;
    let mut client = Client::h2(sidecar.outbound()).await;
    let mut call = async |path: &str, message: &[u8]| {
        let answer = client.call(Ask::grpc("orders", path, message)).await;
        let status = [answer.header("grpc-status"), answer.trailer("grpc-status")].concat();
        (status, answer.code().to_owned())
    };
    let violation = ("3".to_owned(), "contract_violation".to_owned());
    // Field 1 is a text: not a number, and not cut short.
    assert_eq!(call("/shop.Orders/Create", &[1 << 3, 7]).await, violation);
    assert_eq!(
        call("/shop.Orders/Create", &[1 << 3 | 2, 9, b'x']).await,
        violation
    );
    assert_eq!(
        call("/shop.Orders/Delete", &field(1, b"book")).await,
        violation
    );
    assert_eq!(upstream.hits(), 0);
    let taken = call("/shop.Orders/Create", &field(1, b"book")).await;
    assert_eq!(taken, ("0".to_owned(), String::new()));
    outrigger_tests::until_true("it is delivered", || upstream.hits() == 1).await;
}
