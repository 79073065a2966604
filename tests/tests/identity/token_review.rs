//! Tokens of Kubernetes' service accounts, reviewed by a stand-in for its API that answers as the
//! real one does.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, Response};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use outrigger_tests::mesh::Plane;
use outrigger_tests::pki::Authority;
use outrigger_tests::until;
use outrigger_tests::upstream::Raw;
use rcgen::SanType;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio_rustls::TlsAcceptor;

use super::authority::{ask, eventually, sidecar};
use super::{WEB, mesh, orders};

const OURS: &str = "outrigger-ca";
const GOOD: &str = "token-of-default-web";

/// The API, and what a control plane needs to reach it.
struct Api {
    /// The tokens that were asked about.
    asked: Arc<Mutex<Vec<String>>>,
    listener: Raw,
    dir: TempDir,
}

impl Api {
    async fn start() -> Self {
        let root = Authority::new("cluster");
        let leaf = root.signed("spiffe://cluster/api", |params| {
            params.subject_alt_names = vec![SanType::IpAddress([127, 0, 0, 1].into())];
        });
        let asked = Arc::<Mutex<Vec<String>>>::default();
        let (acceptor, note) = (
            TlsAcceptor::from(leaf.server(&["http/1.1"])),
            Arc::clone(&asked),
        );
        let listener = Raw::start(move |stream| {
            let (acceptor, note) = (acceptor.clone(), Arc::clone(&note));
            async move {
                // Who does not believe the certificate leaves.
                let Ok(stream) = acceptor.accept(stream).await else {
                    return;
                };
                let service = service_fn(move |request| answer(request, Arc::clone(&note)));
                let serving = http1::Builder::new().serve_connection(TokioIo::new(stream), service);
                // Who has waited long enough leaves as well.
                let _ = serving.await;
            }
        })
        .await;
        let dir = tempfile::tempdir().expect("a directory");
        std::fs::write(dir.path().join("ca.crt"), root.pem()).expect("written");
        std::fs::write(dir.path().join("token"), "token-of-the-plane\n").expect("written");
        Self {
            asked,
            listener,
            dir,
        }
    }

    fn bundle(&self) -> PathBuf {
        self.dir.path().join("ca.crt")
    }

    /// As `join` of a control plane.
    fn join(&self, bundle: &Path) -> Value {
        json!({"kubernetes": {
            "address": format!("https://{}", self.listener.addr),
            "bundle": bundle,
            "tokenFile": self.dir.path().join("token"),
        }})
    }

    /// How often a token was reviewed.
    fn asked_about(&self, token: &str) -> usize {
        let asked = self.asked.lock().unwrap();
        asked.iter().filter(|one| *one == token).count()
    }
}

async fn answer(
    request: Request<Incoming>,
    note: Arc<Mutex<Vec<String>>>,
) -> Result<Response<Full<Bytes>>, hyper::Error> {
    let (head, body) = request.into_parts();
    let body = body.collect().await?.to_bytes();
    let (code, text) = review(&head, &body, &note);
    let asked = note.lock().unwrap().last().cloned();
    match asked.as_deref() {
        Some("silent") => std::future::pending().await,
        Some("slow") => tokio::time::sleep(Duration::from_secs(1)).await,
        _ => {}
    }
    let answer = Response::builder()
        .status(code)
        .header("content-type", "application/json");
    Ok(answer.body(Full::from(text)).expect("an answer"))
}

fn failure(code: u16, message: &str) -> (u16, String) {
    let status = json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": message, "reason": message, "code": code,
    });
    (code, status.to_string())
}

/// `POST /apis/authentication.k8s.io/v1/tokenreviews` of a 1.36 API server.
fn review(head: &http::request::Parts, body: &[u8], note: &Mutex<Vec<String>>) -> (u16, String) {
    let field = |name: &str| head.headers.get(name).and_then(|value| value.to_str().ok());
    if field("authorization") != Some("Bearer token-of-the-plane") {
        return failure(401, "Unauthorized");
    }
    let path = "/apis/authentication.k8s.io/v1/tokenreviews";
    if (&head.method, head.uri.path()) != (&Method::POST, path) {
        return failure(404, "the server could not find the requested resource");
    }
    if field("content-type") != Some("application/json") {
        return failure(415, "UnsupportedMediaType");
    }
    let mut answer: Value = serde_json::from_slice(body).unwrap_or_default();
    let kind = (answer["kind"].as_str(), answer["apiVersion"].as_str());
    if kind != (Some("TokenReview"), Some("authentication.k8s.io/v1")) {
        return failure(400, "BadRequest");
    }
    if answer["spec"]["audiences"] != json!([OURS]) {
        return failure(400, "not asked for our audience");
    }
    let token = answer["spec"]["token"]
        .as_str()
        .unwrap_or_default()
        .to_owned();
    note.lock().unwrap().push(token.clone());
    let account = || {
        json!({
            "authenticated": true,
            "user": {
                "username": "system:serviceaccount:default:web",
                "uid": "2f0fd7a1-7a0d-4f6f-8c27-0a3ad3f1f7a4",
                "groups": [
                    "system:serviceaccounts",
                    "system:serviceaccounts:default",
                    "system:authenticated",
                ],
                "extra": {"authentication.kubernetes.io/pod-name": ["web-1"]},
            },
            "audiences": [OURS],
        })
    };
    let status = match token.as_str() {
        GOOD | "slow" => account(),
        "for others" => json!({
            "user": {},
            "error": "[invalid bearer token, token audiences [\"api\"] is invalid for the \
                      target audiences [\"outrigger-ca\"]]",
        }),
        "without audiences" => {
            let mut status = account();
            status.as_object_mut().unwrap().remove("audiences");
            status
        }
        "of a person" => json!({
            "authenticated": true,
            "user": {"username": "kubernetes-admin", "groups": ["system:authenticated"]},
            "audiences": [OURS],
        }),
        "no groups" => {
            let mut status = account();
            status["user"]["groups"] = json!(["system:authenticated"]);
            status
        }
        "broken" => return failure(500, "InternalError"),
        "no JSON" => return (201, "<html>".to_owned()),
        _ => json!({"user": {}, "error": "[invalid bearer token, Token has been invalidated]"}),
    };
    answer["status"] = status;
    (201, answer.to_string())
}

async fn plane(join: Value) -> Plane {
    let nobody = SocketAddr::from(([127, 0, 0, 1], 9));
    let files = [("mesh.yaml", mesh("Strict") + &orders(nobody))];
    let mut plane = Plane::with_authority(&files, "1h", &["web"]).await;
    plane.stop().await;
    plane.configure("join", join);
    plane.start_again().await;
    plane
}

#[tokio::test]
async fn tokens_are_good_for_what_the_api_says_of_them() {
    let api = Api::start().await;
    let plane = plane(api.join(&api.bundle())).await;
    let cases = [
        (GOOD, "OK", "", "issued"),
        ("slow", "OK", "", "issued"),
        (
            "made up",
            "UNAUTHENTICATED",
            "Token has been invalidated",
            "unauthenticated",
        ),
        (
            "for others",
            "UNAUTHENTICATED",
            "invalid for the target audiences",
            "unauthenticated",
        ),
        (
            "without audiences",
            "UNAUTHENTICATED",
            "not meant for this authority",
            "unauthenticated",
        ),
        (
            "of a person",
            "UNAUTHENTICATED",
            "no service account's",
            "unauthenticated",
        ),
        (
            "no groups",
            "UNAUTHENTICATED",
            "no service account's",
            "unauthenticated",
        ),
        (
            "broken",
            "UNAVAILABLE",
            "answered 500: InternalError",
            "unable",
        ),
        ("no JSON", "UNAVAILABLE", "no TokenReview", "unable"),
        ("silent", "UNAVAILABLE", "no answer in 5s", "unable"),
        (GOOD, "OK", "", "issued"),
        (
            "made up",
            "UNAUTHENTICATED",
            "Token has been invalidated",
            "unauthenticated",
        ),
    ];
    let asked: Vec<Value> = cases
        .iter()
        .map(|(token, ..)| json!({"token": token}))
        .collect();
    let answers = ask(&plane, &asked).await;
    for ((token, code, detail, _), answer) in cases.iter().zip(&answers) {
        assert_eq!(answer["code"], *code, "{token}: {answer}");
        let told = answer["detail"].as_str().unwrap();
        assert!(told.contains(detail), "{token}: {answer}");
    }
    // A good one is reviewed each time: it may have been taken back. `silent` takes half of the
    // time for which one that is not good is remembered.
    assert_eq!(api.asked_about(GOOD), 2);
    assert!(api.asked_about("made up") >= 1);
    // A token for one account makes nobody another.
    let other = json!({"token": GOOD, "account": "default/orders"});
    let answer = ask(&plane, &[other]).await;
    assert_eq!(answer[0]["code"], "PERMISSION_DENIED", "{answer:?}");

    let audit = std::fs::read_to_string(plane.state_dir().join("ca-audit.jsonl")).unwrap();
    let entries: Vec<Value> = audit
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(entries.len(), cases.len() + 1);
    for ((token, _, detail, noted), entry) in cases.iter().zip(&entries) {
        match *noted {
            "issued" => {
                assert_eq!(
                    (&entry["event"], &entry["id"]),
                    (&json!("issued"), &json!(WEB))
                );
                let by = entry["by"].as_str().unwrap();
                assert!(by.starts_with("token sha256:"), "{entry}");
            }
            reason => {
                assert_eq!(entry["reason"], reason, "{token}: {entry}");
                assert!(
                    entry["detail"].as_str().unwrap().contains(detail),
                    "{entry}"
                );
            }
        }
        assert!(!entry.to_string().contains(GOOD), "{entry}");
    }
    assert_eq!(entries[cases.len()]["reason"], "denied");
}

#[tokio::test]
async fn tokens_are_told_to_the_clusters_api_and_to_nobody_else() {
    let api = Api::start().await;
    let elsewhere = api.dir.path().join("another.crt");
    std::fs::write(&elsewhere, Authority::new("another").pem()).unwrap();
    let plane = plane(api.join(&elsewhere)).await;
    let token = json!({"token": GOOD});
    let answer = ask(&plane, std::slice::from_ref(&token)).await;
    assert_eq!(answer[0]["code"], "UNAVAILABLE", "{answer:?}");
    let told = answer[0]["detail"].as_str().unwrap();
    assert!(told.contains("no TLS"), "{told}");
    assert_eq!(api.asked_about(GOOD), 0);
    // Both files are read anew: the kubelet replaces them.
    std::fs::copy(api.bundle(), &elsewhere).unwrap();
    std::fs::write(api.dir.path().join("token"), "of before").unwrap();
    let answer = ask(&plane, std::slice::from_ref(&token)).await;
    let told = answer[0]["detail"].as_str().unwrap();
    assert!(told.contains("answered 401: Unauthorized"), "{told}");
    std::fs::write(api.dir.path().join("token"), "token-of-the-plane").unwrap();
    let answer = ask(&plane, &[token]).await;
    assert_eq!(answer[0]["code"], "OK", "{answer:?}");
}

#[tokio::test]
async fn a_sidecar_comes_with_the_token_that_its_file_has_at_the_moment() {
    let api = Api::start().await;
    let plane = plane(api.join(&api.bundle())).await;
    let file = api.dir.path().join("of-the-sidecar");
    std::fs::write(&file, "expired").unwrap();
    let mut client = plane.client("web");
    client["tokenFile"] = json!(file);
    let web = sidecar(&plane, "web")
        .set("controlPlane", client)
        .start_unready()
        .await;
    let problem = until("it is told why", || async {
        let view = web.view("/identity").await;
        view["problem"].as_str().map(str::to_owned)
    })
    .await;
    assert!(problem.contains("the token is not good"), "{problem}");
    std::fs::write(&file, GOOD).unwrap();
    eventually("it has a certificate and config", async || {
        let ready = web.ask_admin("GET", "/readyz", "").await;
        (ready.status == 200).then_some(())
    })
    .await;
    assert_eq!(web.view("/identity").await["id"], WEB);
}
