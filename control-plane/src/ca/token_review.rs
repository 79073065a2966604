//! Whose a token is, by the Kubernetes API: `TokenReview` of `authentication.k8s.io/v1`.
//!
//! Owns the question, its bounds, and for a moment the tokens that are not good, so that somebody
//! who guesses does not make the API guess along. A good token is asked about each time: it may
//! have been taken back. The bundle and our own token are read anew each time, because the kubelet
//! replaces them. Stands on the life of a config update, beside the documents.

use std::collections::HashMap;
use std::fmt;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::{Either, select};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::client::conn::http1;
use hyper::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HOST, HeaderValue, USER_AGENT};
use hyper::{Request, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use outrigger_config::bootstrap::KubernetesApi;
use rustls::client::Resumption;
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use serde::Deserialize;
use serde_json::json;
use sha2::{Digest as _, Sha256};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use super::credentials::{Review, TokenReview};
use crate::clock;

const PATH: &str = "/apis/authentication.k8s.io/v1/tokenreviews";

/// How long a review may take, waiting for its turn included. The sidecar waits for 20 s.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);

/// Reviews at a time, as many as an API server does not notice.
const AT_A_TIME: usize = 16;

/// The longest answer that is read.
const MAX_BYTES: usize = 1 << 20;

/// How long a token that is not good is remembered, and how many of them.
const REMEMBERED: Duration = Duration::from_secs(10);
const MOST_REMEMBERED: usize = 1024;

/// The Kubernetes API.
pub struct Kubernetes {
    uri: Uri,
    bundle: PathBuf,
    token_file: PathBuf,
    turns: Semaphore,
    /// By the hash of a token that is not good: until when, and what was said of it.
    refused: Mutex<HashMap<[u8; 32], (Duration, Review)>>,
}

impl fmt::Debug for Kubernetes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Kubernetes({})", self.uri)
    }
}

/// As it comes; fields that are left out are empty.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Answer {
    status: Status,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Status {
    authenticated: bool,
    user: User,
    audiences: Vec<String>,
    error: String,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct User {
    username: String,
    groups: Vec<String>,
}

/// What the API says where it does not review (`meta/v1` `Status`).
#[derive(Default, Deserialize)]
#[serde(default)]
struct Failure {
    message: String,
}

impl Kubernetes {
    /// As the bootstrap file says. Nothing is asked yet.
    ///
    /// # Errors
    /// What is wrong with the address.
    pub fn new(api: &KubernetesApi) -> Result<Self, String> {
        let address = api.address();
        let uri: Uri = address
            .parse()
            .map_err(|e| format!("{address:?} is not a URL: {e}"))?;
        if uri.scheme_str() != Some("https") || uri.host().is_none_or(str::is_empty) {
            return Err(format!("{address:?}: expected https://host:port"));
        }
        Ok(Self {
            uri,
            bundle: api.bundle(),
            token_file: api.token_file(),
            turns: Semaphore::new(AT_A_TIME),
            refused: Mutex::default(),
        })
    }

    async fn ask(&self, token: &str, audience: &str) -> Result<Review, String> {
        let turn = self.turns.acquire().await;
        let _turn = turn.map_err(|e| e.to_string())?;
        let authorization = self.authorization()?;
        let host = self.uri.host().unwrap_or_default();
        let bare = host.trim_matches(['[', ']']).to_owned();
        let port = self.uri.port_u16().unwrap_or(443);
        let tcp = TcpStream::connect((bare.as_str(), port)).await;
        let tcp = tcp.map_err(|e| format!("cannot connect: {e}"))?;
        let name = ServerName::try_from(bare)
            .map_err(|_| format!("{host} is no name that a certificate could have"))?;
        let session = TlsConnector::from(tls(&self.bundle)?).connect(name, tcp);
        let session = session.await.map_err(|e| format!("no TLS: {e}"))?;
        let handshake = http1::handshake::<_, Full<Bytes>>(TokioIo::new(session));
        let (mut sender, connection) = handshake.await.map_err(|e| e.to_string())?;
        let question = json!({
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenReview",
            "spec": {"token": token, "audiences": [audience]},
        });
        let base = self.uri.path().trim_end_matches('/');
        let authority = self
            .uri
            .authority()
            .map_or(host, |authority| authority.as_str());
        let request = Request::post(format!("{base}{PATH}"))
            .header(HOST, authority)
            .header(AUTHORIZATION, authorization)
            .header(CONTENT_TYPE, "application/json")
            .header(ACCEPT, "application/json")
            .header(USER_AGENT, concat!("outrigger/", env!("CARGO_PKG_VERSION")))
            .body(Full::from(question.to_string()))
            .map_err(|e| e.to_string())?;
        let answer = async {
            let response = sender.send_request(request).await;
            let (head, body) = response.map_err(|e| e.to_string())?.into_parts();
            let body = Limited::new(body, MAX_BYTES).collect().await;
            let body = body.map_err(|e| format!("the answer broke off: {e}"))?;
            review(head.status, &body.to_bytes())
        };
        // Side by side in one task: the connection ends with the question.
        match select(pin!(answer), pin!(connection)).await {
            Either::Left((answer, _)) => answer,
            Either::Right((Ok(()), answer)) => answer.await,
            Either::Right((Err(e), _)) => Err(e.to_string()),
        }
    }

    fn authorization(&self) -> Result<HeaderValue, String> {
        let file = self.token_file.display();
        let token = std::fs::read_to_string(&self.token_file);
        let token = token.map_err(|e| format!("cannot read {file}: {e}"))?;
        let mut value = HeaderValue::from_str(&format!("Bearer {}", token.trim()))
            .map_err(|_| format!("{file} holds no token"))?;
        value.set_sensitive(true);
        Ok(value)
    }

    fn remembered(&self, hash: &[u8; 32], now: Duration) -> Option<Review> {
        let refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        let (until, review) = refused.get(hash)?;
        (*until > now).then(|| review.clone())
    }

    fn remember(&self, hash: [u8; 32], review: &Review, now: Duration) {
        let mut refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        if refused.len() >= MOST_REMEMBERED {
            refused.retain(|_, (until, _)| *until > now);
        }
        if refused.len() < MOST_REMEMBERED {
            refused.insert(hash, (now + REMEMBERED, review.clone()));
        }
    }
}

impl TokenReview for Kubernetes {
    fn review<'a>(
        &'a self,
        token: &'a str,
        audience: &'a str,
    ) -> Pin<Box<dyn Future<Output = Result<Review, String>> + Send + 'a>> {
        Box::pin(async move {
            let hash: [u8; 32] = Sha256::digest(token).into();
            if let Some(review) = self.remembered(&hash, clock::monotonic()) {
                return Ok(review);
            }
            let asked = timeout(ANSWER_WITHIN, self.ask(token, audience)).await;
            let review = match asked {
                Ok(asked) => asked.map_err(|problem| format!("{}: {problem}", self.uri))?,
                Err(_) => return Err(format!("{}: no answer in {ANSWER_WITHIN:?}", self.uri)),
            };
            if !review.authenticated {
                self.remember(hash, &review, clock::monotonic());
            }
            Ok(review)
        })
    }
}

/// What an answer says of the token; that it cannot be reviewed says nothing of it.
fn review(status: StatusCode, body: &[u8]) -> Result<Review, String> {
    if !status.is_success() {
        let said: Failure = serde_json::from_slice(body).unwrap_or_default();
        let code = status.as_u16();
        return Err(format!("answered {code}: {:.200}", said.message)
            .trim_end_matches([':', ' '])
            .to_owned());
    }
    let answer: Answer =
        serde_json::from_slice(body).map_err(|e| format!("the answer is no TokenReview: {e}"))?;
    let Status {
        authenticated,
        user,
        audiences,
        error,
    } = answer.status;
    Ok(Review {
        authenticated,
        username: user.username,
        groups: user.groups,
        audiences,
        error,
    })
}

/// Believes whoever the bundle vouches for.
fn tls(bundle: &Path) -> Result<Arc<ClientConfig>, String> {
    let file = bundle.display();
    let pem = std::fs::read(bundle).map_err(|e| format!("cannot read {file}: {e}"))?;
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(&pem) {
        let certificate = certificate.map_err(|e| format!("{file}: {e}"))?;
        roots.add(certificate).map_err(|e| format!("{file}: {e}"))?;
    }
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|e| e.to_string())?
        .with_root_certificates(roots);
    let mut config = config.with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    config.resumption = Resumption::disabled();
    Ok(Arc::new(config))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_a_review_or_none() {
        let read = |code: u16, text: &str| {
            review(
                StatusCode::from_u16(code).expect("a status"),
                text.as_bytes(),
            )
        };
        let good = r#"{"kind": "TokenReview", "status": {"authenticated": true, "user":
            {"username": "u", "uid": "1", "groups": ["g"]}, "audiences": ["a"]}}"#;
        let review = read(201, good).expect("a review");
        assert!(review.authenticated);
        assert_eq!((&*review.username, &*review.groups[0]), ("u", "g"));
        // A token for others: the API says no more than that.
        let review = read(201, r#"{"status": {"error": "[invalid bearer token]"}}"#);
        let review = review.expect("a review");
        assert!(!review.authenticated && review.error.contains("invalid"));
        assert_eq!(read(200, "{}"), Ok(Review::default()));
        let check = |code, text, expected: &str| {
            assert_eq!(read(code, text).expect_err(text), expected);
        };
        check(
            401,
            r#"{"message": "Unauthorized"}"#,
            "answered 401: Unauthorized",
        );
        check(500, "<html>", "answered 500");
        let refused = read(201, "[").expect_err("no JSON");
        assert!(
            refused.starts_with("the answer is no TokenReview"),
            "{refused}"
        );
    }

    #[test]
    fn what_is_not_good_is_remembered_for_a_while() {
        let api = Kubernetes::new(&KubernetesApi::default()).expect("the usual address");
        let now = Duration::from_secs(5);
        api.remember([1; 32], &Review::default(), now);
        assert_eq!(api.remembered(&[1; 32], now), Some(Review::default()));
        assert_eq!(api.remembered(&[2; 32], now), None);
        assert_eq!(api.remembered(&[1; 32], now + REMEMBERED), None);
        for n in 0..=MOST_REMEMBERED {
            let hash: [u8; 32] = Sha256::digest(n.to_be_bytes()).into();
            api.remember(hash, &Review::default(), now);
        }
        let known = api.refused.lock().expect("whole").len();
        assert_eq!(known, MOST_REMEMBERED);
    }
}
