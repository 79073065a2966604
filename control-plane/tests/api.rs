//! The OpenAPI document and the API agree, and writes can be bound, tried and cut into pages.

mod common;

use std::collections::BTreeSet;

use common::*;
use http_body_util::BodyExt as _;
use outrigger_control_plane::admin::openapi::document;
use serde_json::{Value, json};

const INSTANCES: &str = "/v1/services/shop%2Freports/instances";

/// What stands for the names of a path.
fn filled(path: &str) -> String {
    path.replace("{service}", "shop%2Freports")
        .replace("{instance}", "r-1")
}

fn schema<'a>(document: &'a Value, operation: &'a Value, status: u16, kind: &str) -> &'a Value {
    let of = &operation["responses"][status.to_string()]["content"][kind]["schema"];
    resolved(document, of)
}

fn resolved<'a>(document: &'a Value, schema: &'a Value) -> &'a Value {
    match schema["$ref"].as_str() {
        Some(name) => document
            .pointer(name.trim_start_matches('#'))
            .expect("it is defined"),
        None => schema,
    }
}

/// Whether a value is what a schema of ours says, which knows no more than what is read here.
fn fits(document: &Value, schema: &Value, value: &Value) -> Result<(), String> {
    let schema = resolved(document, schema);
    if let Some(choices) = schema["anyOf"].as_array() {
        let said: Vec<_> = choices.iter().map(|s| fits(document, s, value)).collect();
        return match said.iter().any(Result::is_ok) {
            true => Ok(()),
            false => Err(format!("{said:?}")),
        };
    }
    if let Some(words) = schema["enum"].as_array() {
        return words
            .contains(value)
            .then_some(())
            .ok_or(format!("{value}: {schema}"));
    }
    let is = |kind: &str| match kind {
        "object" => value.is_object(),
        "array" => value.is_array(),
        "string" => value.is_string(),
        "integer" => value.is_u64(),
        "boolean" => value.is_boolean(),
        "null" => value.is_null(),
        _ => false,
    };
    let right = match &schema["type"] {
        Value::String(kind) => is(kind),
        Value::Array(kinds) => kinds.iter().filter_map(Value::as_str).any(is),
        _ => schema["const"] == *value,
    };
    if !right {
        return Err(format!("{value} is no {}", schema["type"]));
    }
    for item in value.as_array().into_iter().flatten() {
        fits(document, &schema["items"], item)?;
    }
    for name in schema["required"].as_array().into_iter().flatten() {
        let name = name.as_str().expect("a name");
        if value.get(name).is_none() {
            return Err(format!("{name} is missing in {value}"));
        }
    }
    let (members, more) = (&schema["properties"], &schema["additionalProperties"]);
    for (name, member) in value.as_object().into_iter().flatten() {
        match members.get(name) {
            Some(schema) => fits(document, schema, member)?,
            None if more.is_object() => fits(document, more, member)?,
            None if *more == false => return Err(format!("{name} is not said")),
            None => {}
        }
    }
    Ok(())
}

/// Every operation of the document is answered as it says, with a status that it says. The order
/// is that of the life of an instance.
#[tokio::test]
async fn every_route_of_the_document_is_answered_as_it_says() {
    let plane = Plane::start().await;
    let mut client = Client::subscribe(plane.discovery(), "web-1").await;
    client.sync().await;
    let document = document();
    let served = plane.get("/openapi.json").await;
    assert_eq!(served, document);
    let body = |id: &str| match id {
        "registerInstance" => json!({"id": "r-1", "address": "127.0.0.1", "port": 9100}),
        "setInstanceState" => json!({"state": "Draining"}),
        _ => json!({}),
    };
    let mut operations: Vec<(&str, &str, &Value)> = Vec::new();
    for (path, methods) in document["paths"].as_object().expect("paths") {
        for (method, operation) in methods.as_object().expect("methods") {
            operations.push((path, method, operation));
        }
    }
    operations.sort_by_key(|(_, method, operation)| {
        let id = operation["operationId"].as_str().expect("a name");
        (id != "registerInstance", *method == "delete")
    });
    let mut seen = BTreeSet::new();
    for (path, method, operation) in operations {
        let id = operation["operationId"].as_str().expect("a name");
        assert!(seen.insert(id), "{id} twice");
        let body = match operation["requestBody"].is_null() {
            true => String::new(),
            false => body(id).to_string(),
        };
        let upper = method.to_uppercase();
        let response = plane.response(&upper, &filled(path), body).await;
        let status = response.status().as_u16();
        let said = &operation["responses"][status.to_string()];
        assert!(
            said.is_object(),
            "{id} answered {status}, which is not said"
        );
        let (head, body) = response.into_parts();
        let body = body.collect().await.expect("a body").to_bytes();
        let text = String::from_utf8(body.to_vec()).expect("text");
        let kind = head.headers.get("content-type");
        let kind = kind.map_or("", |kind| kind.to_str().expect("a text"));
        let kind = kind.split(';').next().unwrap_or_default();
        match kind {
            "" => assert!(said["content"].is_null() && text.is_empty(), "{id}"),
            "text/plain" => assert!(said["content"][kind].is_object(), "{id}"),
            kind => {
                let schema = schema(&document, operation, status, kind);
                let value = serde_json::from_str(&text).expect("JSON");
                fits(&document, schema, &value).unwrap_or_else(|e| panic!("{id}: {e}"));
            }
        }
        if let Some(code) = head.headers.get("outrigger-error") {
            let codes = said["description"].as_str().expect("a text");
            let code = code.to_str().expect("a text");
            assert!(codes.split(", ").any(|c| c == code), "{id}: {code}");
        }
    }
    assert!(seen.len() >= 20, "{seen:?}");
    // A document that says something else is noticed.
    assert!(
        fits(
            &document,
            &json!({"$ref": "#/components/schemas/Config"}),
            &json!({})
        )
        .is_err()
    );
}

#[tokio::test]
async fn what_is_not_in_the_document_is_not_answered() {
    let plane = Plane::start().await;
    let document = document();
    for path in document["paths"].as_object().expect("paths").keys() {
        let said = document["paths"][path].as_object().expect("methods");
        for method in ["GET", "POST", "PUT", "DELETE", "PATCH"] {
            if said.contains_key(&method.to_lowercase()) {
                continue;
            }
            let response = plane.response(method, &filled(path), String::new()).await;
            assert_eq!(response.status(), 405, "{method} {path}");
            let allowed = response.headers()["allow"].to_str().expect("a text");
            let mut allowed: Vec<_> = allowed.split(", ").map(str::to_lowercase).collect();
            allowed.sort();
            let said: Vec<_> = said.keys().cloned().collect();
            assert_eq!(allowed, said, "{path}");
        }
    }
    for path in ["/v1", "/v1/proxies/", "/v1/services/a/b", "/v2/proxies"] {
        assert_eq!(plane.request("GET", path, "").await.0, 404, "{path}");
    }
    let (status, said) = plane.request("GET", "/v1/proxies?limti=1", "").await;
    assert!(status == 400 && said.contains("limti"), "{said}");
}

#[tokio::test]
async fn lists_come_in_pages() {
    let plane = Plane::start().await;
    let mut clients = Vec::new();
    for id in ["web-1", "web-2", "web-3"] {
        let mut client = Client::subscribe(plane.discovery(), id).await;
        client.sync().await;
        clients.push(client);
    }
    let mut path = "/v1/proxies?limit=2".to_owned();
    let mut pages = Vec::new();
    loop {
        let response = plane.response("GET", &path, String::new()).await;
        let link = response.headers().get("link").cloned();
        let body = response.into_body().collect().await.expect("a body");
        let page: Value = serde_json::from_slice(&body.to_bytes()).expect("JSON");
        let ids = page["proxies"].as_array().expect("a list").iter();
        pages.push(ids.map(|p| p["id"].clone()).collect::<Vec<_>>());
        let Some(link) = link else {
            assert!(page["next"].is_null());
            break;
        };
        assert_eq!(page["next"], "web-2");
        let link = link.to_str().expect("a text");
        let target = link.strip_prefix('<').and_then(|l| l.split_once('>'));
        let (next, rel) = target.expect("a link");
        assert_eq!(rel, "; rel=\"next\"");
        path = next.to_owned();
    }
    assert_eq!(pages, [vec!["web-1", "web-2"], vec!["web-3"]]);
    let services = plane.get("/v1/services?limit=1").await;
    assert_eq!(services["next"], "shop/orders");
    let services = plane.get("/v1/services?after=shop%2Forders").await;
    assert_eq!(services["services"][0]["name"], "shop/reports");
    for limit in ["0", "1001", "many"] {
        let path = format!("/v1/services?limit={limit}");
        assert_eq!(plane.request("GET", &path, "").await.0, 400, "{limit}");
    }
}

#[tokio::test]
async fn a_write_can_be_bound_to_what_was_read() {
    let plane = Plane::start().await;
    let body = json!({"id": "r-1", "address": "127.0.0.1", "port": 9100}).to_string();
    let only_new = [("if-none-match", "*")];
    let create = || plane.response_to("POST", INSTANCES, &only_new, body.clone());
    assert_eq!(create().await.status(), 201);
    assert_eq!(create().await.status(), 412);
    let one = format!("{INSTANCES}/r-1");
    let tag = || async {
        let response = plane.response("GET", &one, String::new()).await;
        response.headers()["etag"]
            .to_str()
            .expect("a text")
            .to_owned()
    };
    let old = tag().await;
    let headers = [("if-none-match", old.as_str())];
    let seen = plane.response_to("GET", &one, &headers, String::new());
    assert_eq!(seen.await.status(), 304);
    let put = |tag: String, state: &'static str| {
        let (path, plane) = (format!("{one}/state"), &plane);
        async move {
            let body = json!({ "state": state }).to_string();
            let headers = [("if-match", tag.as_str())];
            plane
                .response_to("PUT", &path, &headers, body)
                .await
                .status()
        }
    };
    assert_eq!(put(old.clone(), "Draining").await, 204);
    assert_eq!(put(old.clone(), "Disabled").await, 412);
    // A heartbeat changes nothing that was read.
    let new = tag().await;
    assert_ne!(new, old);
    let beat = plane.request("PUT", &format!("{one}/heartbeat"), "").await;
    assert_eq!(beat.0, 204);
    assert_eq!(put(new.clone(), "Serving").await, 204);
    let delete = |tag: String| {
        let (path, plane) = (&one, &plane);
        async move {
            let headers = [("if-match", tag.as_str())];
            let response = plane.response_to("DELETE", path, &headers, String::new());
            response.await.status()
        }
    };
    assert_eq!(delete(new).await, 412);
    assert_eq!(delete(tag().await).await, 204);

    // Of two who read the same rollouts and go back, one does.
    plane.write("route.yaml", ROUTE);
    plane
        .get_until("/v1/rollouts", |view| {
            view["versions"][0]["version"] == view["version"] && !view["versions"][1].is_null()
        })
        .await;
    let read = plane.response("GET", "/v1/rollouts", String::new()).await;
    let tag = read.headers()["etag"].to_str().expect("a text").to_owned();
    let back = || {
        let path = "/v1/rollouts/rollback";
        let headers = [("if-match", tag.as_str())];
        let plane = &plane;
        async move {
            plane
                .response_to("POST", path, &headers, String::new())
                .await
                .status()
        }
    };
    assert_eq!(back().await, 200);
    assert_eq!(back().await, 412);
}

#[tokio::test]
async fn a_dry_run_says_what_would_be_and_does_nothing() {
    let plane = Plane::start().await;
    let body = json!({"id": "r-1", "address": "127.0.0.1", "port": 9100}).to_string();
    let dry = |path: &str| format!("{path}?dryRun=true");
    let (status, said) = plane.request("POST", &dry(INSTANCES), &body).await;
    let said: Value = serde_json::from_str(&said).expect("JSON");
    assert_eq!(status, 200);
    assert_eq!(
        said,
        json!({"dryRun": true, "would": {"id": "r-1", "created": true}})
    );
    let endpoints = || async { plane.get(INSTANCES).await["endpoints"].clone() };
    assert_eq!(endpoints().await, json!([]));
    // What would be refused is.
    let bad = body.replace("127.0.0.1", "nowhere");
    assert_eq!(plane.request("POST", &dry(INSTANCES), &bad).await.0, 400);
    let one = format!("{INSTANCES}/r-1");
    assert_eq!(plane.request("DELETE", &dry(&one), "").await.0, 404);
    assert_eq!(plane.request("POST", INSTANCES, &body).await.0, 201);
    let state = dry(&format!("{one}/state"));
    let draining = r#"{"state": "Draining"}"#;
    assert_eq!(plane.request("PUT", &state, draining).await.0, 200);
    assert_eq!(plane.request("DELETE", &dry(&one), "").await.0, 200);
    assert_eq!(endpoints().await[0]["state"], "Serving");
    let (status, _) = plane
        .request("POST", &dry("/v1/rollouts/rollback"), "")
        .await;
    assert_eq!(status, 409);
    let (status, _) = plane
        .request("DELETE", &format!("{one}?dryRun=yes"), "")
        .await;
    assert_eq!(status, 400);
}

#[tokio::test]
async fn the_files_are_read_when_somebody_asks_for_it() {
    let plane = Plane::start().await;
    let before = plane.get("/v1/config").await["version"].clone();
    plane.write("route.yaml", ROUTE);
    let (status, said) = plane.request("POST", "/v1/config/reload", "").await;
    assert_eq!(status, 200, "{said}");
    let said: Value = serde_json::from_str(&said).expect("JSON");
    assert_ne!(said["version"], before);
    plane.write("route.yaml", BROKEN);
    let (_, said) = plane.request("POST", "/v1/config/reload", "").await;
    let said: Value = serde_json::from_str(&said).expect("JSON");
    assert!(said["rejected"]["summary"].is_string(), "{said}");
}
