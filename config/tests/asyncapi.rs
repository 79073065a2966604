//! The AsyncAPI document, against the schema of the specification.

use outrigger_config::asyncapi::{About, document};
use outrigger_config::{MeshConfig, Source, load};
use serde_json::Value;

const SCHEMA: &str = include_str!("asyncapi/3.0.0.json");

fn config(yaml: &str) -> MeshConfig {
    let loaded = load(&[Source::new("mesh.yaml", yaml)]);
    loaded
        .mesh
        .unwrap_or_else(|| panic!("{}", loaded.report.render_text()))
}

fn of(yaml: &str) -> Value {
    let about = About {
        workload: "shop/web-1",
        version: "v-1",
        host: "127.0.0.1:15001",
    };
    document(&config(yaml), about)
}

/// What the specification's own schema finds wrong.
fn problems(document: &Value) -> Vec<String> {
    let schema = serde_json::from_str(SCHEMA).expect("JSON");
    let validator = jsonschema::validator_for(&schema).expect("a schema");
    let errors = validator.iter_errors(document);
    errors
        .map(|error| format!("{}: {error}", error.instance_path()))
        .collect()
}

const MESH: &str = r#"
apiVersion: outrigger.dev/v1alpha1
kind: MeshService
metadata: {name: orders, namespace: shop}
spec: {discovery: {static: [{address: 127.0.0.1, port: 9001}]}}
---
apiVersion: outrigger.dev/v1alpha1
kind: MeshService
metadata: {name: stock, namespace: shop}
spec: {discovery: {static: [{address: 127.0.0.1, port: 9002}]}}
---
apiVersion: outrigger.dev/v1alpha1
kind: MeshRoute
metadata: {name: orders, namespace: shop}
spec:
  services: [orders]
  rules:
  - name: create
    matches: [{method: POST, path: {type: Exact, value: /v1/orders}}]
    contract: {jsonSchema: '{"type": "object", "required": ["item"]}'}
    async:
      when: Preferred
      queue: letters
      subscribers: [stock]
      orderingKey: header:x-order-id
      callback: {allow: ["https://*.shop.internal"]}
  - name: cancel
    matches: [{method: DELETE}]
    async: {when: Always, queue: letters}
  - name: fallback
    matches: [{method: PUT}]
    onUnavailable: [{enqueue: {unasked: true}}]
  - name: plain
---
apiVersion: outrigger.dev/v1alpha1
kind: Queue
metadata: {name: letters, namespace: shop}
spec: {backend: {embedded: {}}}
"#;

#[test]
fn the_document_keeps_to_the_specification() {
    let document = of(MESH);
    assert_eq!(problems(&document), [] as [&str; 0], "{document:#}");
    let mut broken = document;
    broken["operations"]["send.shop.orders.create"]["action"] = "deliver".into();
    assert_ne!(
        problems(&broken),
        [] as [&str; 0],
        "the schema says nothing"
    );
}

#[test]
fn a_mesh_without_messages_has_a_document_without_channels() {
    let document = of("");
    assert_eq!(problems(&document), [] as [&str; 0], "{document:#}");
    assert_eq!(document["channels"], serde_json::json!({}));
}

#[test]
fn it_says_what_becomes_a_message_where_it_waits_and_who_gets_it() {
    let document = of(MESH);
    let names = |of: &Value| -> Vec<String> { of.as_object().unwrap().keys().cloned().collect() };
    // The one without a queue of its own waits in one of its service's name.
    assert_eq!(
        names(&document["channels"]),
        ["shop.letters", "shop.orders"]
    );
    assert_eq!(
        names(&document["operations"]),
        [
            "receive.shop.letters.shop.orders",
            "receive.shop.letters.shop.stock",
            "receive.shop.orders.shop.orders",
            "send.shop.orders.cancel",
            "send.shop.orders.create",
            "send.shop.orders.fallback",
        ]
    );
    let send = &document["operations"]["send.shop.orders.create"];
    assert_eq!(send["channel"]["$ref"], "#/channels/shop.letters");
    assert_eq!(send["bindings"]["http"]["method"], "POST");
    assert_eq!(
        send["reply"]["address"]["location"],
        "$message.header#/outrigger-callback"
    );
    let message = &document["components"]["messages"]["shop.orders.create"];
    assert_eq!(message["payload"]["schema"]["required"][0], "item");
    assert_eq!(message["x-outrigger-ordering-key"], "header:x-order-id");
    assert_eq!(
        message["x-outrigger-matches"][0]["path"]["value"],
        "/v1/orders"
    );
    // Every reference leads somewhere.
    let text = document.to_string();
    for part in text.split("\"$ref\":\"#").skip(1) {
        let pointer = part.split('"').next().unwrap();
        assert!(document.pointer(pointer).is_some(), "{pointer}");
    }
    let receive = &document["operations"]["receive.shop.letters.shop.stock"]["messages"];
    assert_eq!(
        receive.as_array().unwrap().len(),
        1,
        "only its subscription"
    );
}
