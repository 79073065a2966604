//! Who may change something over the admin API, and by which name the history knows it.

mod common;

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use common::*;
use http_body_util::BodyExt as _;
use outrigger_control_plane::ca::make;
use serde_json::{Value, json};

const INSTANCES: &str = "/v1/services/shop%2Freports/instances";

#[allow(clippy::disallowed_methods)] // the clock that tokens expire by
fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.expect("after 1970").as_secs()
}

fn token(file: &Path, at: u64) -> String {
    make::token(file, None, Duration::from_secs(60), at).expect("made")
}

/// A plane whose API knows the tokens of one file.
async fn plane(required: bool) -> (Plane, PathBuf, tempfile::TempDir) {
    let aside = tempfile::tempdir().expect("a directory");
    let file = aside.path().join("ops-token");
    std::fs::write(&file, "").expect("written");
    let tokens = json!([{"name": "ops", "file": file}]);
    let api = json!({"api": {"tokens": tokens, "requireToken": required}});
    (Plane::with(api).await, file, aside)
}

/// Registers an instance with a header: status and code.
async fn register(plane: &Plane, credentials: Option<&str>) -> (u16, String) {
    let body = json!({"id": "r-1", "address": "127.0.0.1", "port": 9100}).to_string();
    let headers: Vec<_> = credentials.iter().map(|c| ("authorization", *c)).collect();
    let response = plane.response_to("POST", INSTANCES, &headers, body).await;
    let status = response.status().as_u16();
    let challenged = response.headers().get("www-authenticate");
    assert_eq!(
        challenged.is_some_and(|with| with == "Bearer"),
        status == 401
    );
    let body = response.into_body().collect().await.expect("a body");
    let said: Value = serde_json::from_slice(&body.to_bytes()).expect("JSON");
    (status, said["code"].as_str().unwrap_or_default().to_owned())
}

#[tokio::test]
async fn a_token_that_is_not_known_changes_nothing_even_from_this_machine() {
    let (plane, file, _aside) = plane(false).await;
    let known = token(&file, now());
    let gone = token(&file, now());
    let expired = token(&file, now() - 120);
    let text = std::fs::read_to_string(&file).expect("read");
    assert!(!text.contains(&known), "hashes only");
    let refused = (401, "unauthenticated".to_owned());
    let unknown = known.replace(&known[..4], "aaaa");
    for credentials in [&unknown, &expired, ""] {
        let credentials = format!("Bearer {credentials}");
        assert_eq!(register(&plane, Some(&credentials)).await, refused);
    }
    assert_eq!(register(&plane, Some("Basic b3BzOm9wcw==")).await, refused);
    assert_eq!(plane.get(INSTANCES).await["endpoints"], json!([]));

    assert_eq!(
        register(&plane, Some(&format!("bearer {gone}"))).await.0,
        201
    );
    let kept: Vec<_> = text.lines().take(1).collect();
    std::fs::write(&file, kept.join("\n")).expect("written");
    assert_eq!(
        register(&plane, Some(&format!("Bearer {gone}"))).await,
        refused
    );
    assert_eq!(
        register(&plane, Some(&format!("Bearer {known}"))).await.0,
        200
    );
    assert_eq!(register(&plane, None).await.0, 200, "from this machine");
    std::fs::remove_file(&file).expect("removed");
    let unreadable = (503, "tokens_unreadable".to_owned());
    assert_eq!(
        register(&plane, Some(&format!("Bearer {known}"))).await,
        unreadable
    );
}

#[tokio::test]
async fn the_history_names_who_came_with_a_token() {
    let (plane, file, _aside) = plane(false).await;
    plane.write("route.yaml", ROUTE);
    let two = |view: &Value| !view["versions"][1].is_null();
    plane.get_until("/v1/rollouts", two).await;
    let credentials = format!("Bearer {}", token(&file, now()));
    // Not what a page in somebody's browser could send.
    let headers = [
        ("authorization", &*credentials),
        ("origin", "http://elsewhere.example"),
    ];
    let back = plane.response_to("POST", "/v1/rollouts/rollback", &headers, String::new());
    assert_eq!(back.await.status(), 200);
    let view = plane.get("/v1/rollouts").await;
    assert_eq!(view["versions"][0]["who"], "ops", "{view}");
}

#[tokio::test]
async fn where_tokens_are_required_this_machine_needs_one_to_write() {
    let (plane, file, _aside) = plane(true).await;
    let refused = (401, "unauthenticated".to_owned());
    assert_eq!(register(&plane, None).await, refused);
    assert_eq!(
        plane.get(INSTANCES).await["endpoints"],
        json!([]),
        "reads need none"
    );
    let credentials = format!("Bearer {}", token(&file, now()));
    assert_eq!(register(&plane, Some(&credentials)).await.0, 201);
}
