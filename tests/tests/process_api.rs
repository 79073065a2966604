//! The control plane's description of its API, by somebody else's reading of the specification.

use std::io::Write as _;
use std::process::Stdio;

use outrigger_control_plane::admin::openapi::document;
use outrigger_tests::process::python;
use serde_json::Value;

/// What a validator says of a document; empty when it is in order.
fn said(document: &Value) -> String {
    let mut validator = python("openapi.py")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("Python starts");
    let mut stdin = validator.stdin.take().expect("it is piped");
    stdin
        .write_all(document.to_string().as_bytes())
        .expect("it is read");
    drop(stdin);
    let output = validator.wait_with_output().expect("it ends");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.success(), text.is_empty(), "{text}");
    text
}

#[test]
fn the_openapi_document_is_one() {
    let mut document = document();
    assert_eq!(said(&document), "");
    document["info"]["title"] = Value::from(7);
    assert!(said(&document).contains("title"));
}
