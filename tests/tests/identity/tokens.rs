//! Tokens that callers bring: which are good, where their keys come from, and what they allow.

use std::io::Write as _;
use std::net::SocketAddr;
use std::process::{Command, Stdio};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use outrigger_proxy::clock;
use outrigger_tests::client::{self, Answer, Ask, Client};
use outrigger_tests::mesh::{Sidecar, document, queue, route, service};
use outrigger_tests::pki::{Authority, Files};
use outrigger_tests::process::{run, tool};
use outrigger_tests::upstream::{self, Reply, Upstream};
use outrigger_tests::{until, until_true};
use rcgen::SanType;
use ring::rand::SystemRandom;
use ring::signature::{
    ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair as _,
};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio_rustls::TlsAcceptor;

use super::{files, mesh, sidecar};

const ISSUER: &str = "https://login.shop.local";

fn encode(bytes: impl AsRef<[u8]>) -> String {
    URL_SAFE_NO_PAD.encode(bytes)
}

/// A key of the issuer.
enum Key {
    Rsa(TempDir),
    P256(EcdsaKeyPair),
    Ed25519(Ed25519KeyPair),
}

impl Key {
    /// ring makes no RSA keys, and another implementation is the better judge.
    fn rsa() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut make = tool("openssl");
        make.args(["genrsa", "-out"])
            .arg(dir.path().join("key.pem"));
        run(&mut make);
        Self::Rsa(dir)
    }

    fn p256() -> Self {
        let (kind, random) = (&ECDSA_P256_SHA256_FIXED_SIGNING, SystemRandom::new());
        let document = EcdsaKeyPair::generate_pkcs8(kind, &random).unwrap();
        Self::P256(EcdsaKeyPair::from_pkcs8(kind, document.as_ref(), &random).unwrap())
    }

    fn ed25519() -> Self {
        let document = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).unwrap();
        Self::Ed25519(Ed25519KeyPair::from_pkcs8(document.as_ref()).unwrap())
    }

    fn algorithm(&self) -> &'static str {
        match self {
            Self::Rsa(_) => "RS256",
            Self::P256(_) => "ES256",
            Self::Ed25519(_) => "EdDSA",
        }
    }

    fn jwk(&self, id: &str) -> Value {
        match self {
            Self::Rsa(dir) => {
                let mut show = tool("openssl");
                show.args(["rsa", "-noout", "-modulus", "-in"]);
                let shown = run(show.arg(dir.path().join("key.pem")));
                let hex = shown.trim().strip_prefix("Modulus=").unwrap();
                let digits = |at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap();
                let modulus: Vec<u8> = (0..hex.len()).step_by(2).map(digits).collect();
                json!({"kty": "RSA", "kid": id, "use": "sig", "n": encode(modulus), "e": "AQAB"})
            }
            Self::P256(pair) => {
                let point = pair.public_key().as_ref();
                let (x, y) = (encode(&point[1..33]), encode(&point[33..]));
                json!({"kty": "EC", "crv": "P-256", "kid": id, "x": x, "y": y})
            }
            Self::Ed25519(pair) => {
                json!({"kty": "OKP", "crv": "Ed25519", "kid": id, "x": encode(pair.public_key())})
            }
        }
    }

    fn sign(&self, message: &str) -> Vec<u8> {
        match self {
            Self::Rsa(dir) => {
                let mut sign = tool("openssl");
                sign.args(["dgst", "-sha256", "-sign"]);
                sign.arg(dir.path().join("key.pem"));
                piped(&mut sign, message.as_bytes())
            }
            Self::P256(pair) => {
                let signed = pair.sign(&SystemRandom::new(), message.as_bytes());
                signed.unwrap().as_ref().to_vec()
            }
            Self::Ed25519(pair) => pair.sign(message.as_bytes()).as_ref().to_vec(),
        }
    }

    fn token_with(&self, head: &Value, claims: &Value) -> String {
        let signed = format!(
            "{}.{}",
            encode(head.to_string()),
            encode(claims.to_string())
        );
        let signature = encode(self.sign(&signed));
        format!("{signed}.{signature}")
    }

    /// A token of the key that is called `id`.
    fn token(&self, id: &str, claims: &Value) -> String {
        self.token_with(&json!({"alg": self.algorithm(), "kid": id}), claims)
    }
}

fn piped(command: &mut Command, input: &[u8]) -> Vec<u8> {
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(input).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    output.stdout
}

fn now() -> u64 {
    clock::unix_now().0 / 1000
}

/// What a good token says.
fn claims() -> Value {
    json!({
        "iss": ISSUER, "aud": ["orders"], "sub": "user-1", "exp": now() + 600,
        "scope": "orders.read orders.write",
    })
}

fn with(name: &str, value: Value) -> Value {
    let mut claims = claims();
    claims[name] = value;
    claims
}

fn set(keys: &[Value]) -> String {
    json!({ "keys": keys }).to_string()
}

/// Tokens of [`ISSUER`] whose keys are there.
fn jwt(jwks: &str) -> String {
    format!("jwt: [{{issuer: \"{ISSUER}\", audiences: [orders, mail], jwks: {{{jwks}}}}}]\n")
}

fn at(addr: SocketAddr) -> String {
    jwt(&format!("url: \"http://{addr}/jwks.json\", refresh: 1s"))
}

/// The sidecar of `orders`, in plaintext: a token is an identity of its own.
async fn callee(app: SocketAddr, jwt: &str, more: &str) -> (Sidecar, Files) {
    let files = files(&Authority::new("root"), "orders");
    let yaml = mesh("Permissive") + &service("orders", &[app], jwt) + more;
    let callee = sidecar("orders", &files, &yaml).app(app).start().await;
    (callee, files)
}

fn bearer(token: &str) -> Ask {
    Ask::get("orders", "/").header("authorization", &format!("Bearer {token}"))
}

async fn call(callee: &Sidecar, token: &str) -> Answer {
    client::call(callee.inbound(), bearer(token)).await
}

/// Waits until the keys are there: until then the caller is told to come again.
async fn keys_there(callee: &Sidecar, token: &str) {
    until("the issuer's keys", || async {
        (call(callee, token).await.status != 503).then_some(())
    })
    .await;
}

/// Whom `orders` allows: a user of the issuer with this scope.
fn allow(scope: &str) -> String {
    let spec = format!(
        "services: [orders]\naction: Allow\nrules: [{{from: [{{tokens: [{{issuers: [\"{ISSUER}\"], \
         subjects: [\"user-*\"], claims: [{{name: scope, values: [{scope}]}}]}}]}}]}}]\n"
    );
    document("AuthorizationPolicy", "users", &spec)
}

#[tokio::test]
async fn a_good_token_is_an_identity_and_a_bad_one_is_refused() {
    let keys = [Key::rsa(), Key::p256(), Key::ed25519()];
    let ids = ["rsa", "p256", "ed"];
    let public: Vec<Value> = keys.iter().zip(ids).map(|(key, id)| key.jwk(id)).collect();
    let published = set(&public);
    let jwks = Upstream::h1(move |_| Reply::ok(published.clone())).await;
    let app = Upstream::h1(|_| Reply::ok("hello")).await;
    let (callee, _files) = callee(app.addr, &at(jwks.addr), &allow("orders.write")).await;
    let good = keys[1].token("p256", &claims());
    keys_there(&callee, &good).await;

    let before = app.hits();
    for (key, id) in keys.iter().zip(ids) {
        let token = key.token(id, &claims());
        for _ in 0..2 {
            assert_eq!(call(&callee, &token).await.text(), "hello", "{id}");
        }
        // The application may look at it itself.
        assert_eq!(
            app.last().header("authorization"),
            format!("Bearer {token}")
        );
    }
    assert_eq!(app.hits(), before + 6);

    // Good, and allowed nothing by any policy; or none at all.
    for claims in [
        with("sub", json!("admin")),
        with("scope", json!("orders.read")),
    ] {
        let answer = call(&callee, &keys[1].token("p256", &claims)).await;
        answer.assert_error(403, "unauthorized");
        assert_eq!(answer.header("www-authenticate"), "");
    }
    for ask in [
        Ask::get("orders", "/"),
        Ask::get("orders", "/").header("authorization", "Basic dTpw"),
    ] {
        let answer = client::call(callee.inbound(), ask).await;
        answer.assert_error(403, "unauthorized");
    }

    let p256 = &keys[1];
    let mut endless = claims();
    endless.as_object_mut().unwrap().remove("exp");
    let unsigned = |algorithm: &str| {
        let head = encode(json!({"alg": algorithm, "kid": "p256"}).to_string());
        format!("{head}.{}.", encode(claims().to_string()))
    };
    let cases = [
        (
            p256.token("p256", &with("exp", json!(now() - 61))),
            "has expired",
        ),
        (
            p256.token("p256", &with("nbf", json!(now() + 600))),
            "is not valid yet",
        ),
        (
            p256.token("p256", &with("aud", json!("stock"))),
            "is for another audience",
        ),
        (
            p256.token("p256", &with("iss", json!("https://evil"))),
            "does not know",
        ),
        (
            p256.token("p256", &with("exp", json!("never"))),
            "has a malformed exp",
        ),
        (p256.token("p256", &endless), "has no exp"),
        (Key::p256().token("p256", &claims()), "not its issuer's"),
        (p256.token("other", &claims()), "does not have (other)"),
        // A key is good for its own algorithm only, whatever a token says.
        (keys[2].token("p256", &claims()), "does not have (p256)"),
        (unsigned("none"), "never accepted"),
        (unsigned("HS256"), "never accepted"),
        ("garbage".to_owned(), "is malformed"),
        (String::new(), "is malformed"),
    ];
    let served = app.hits();
    for (token, why) in &cases {
        let answer = call(&callee, token).await;
        answer.assert_error(401, "unauthenticated");
        let challenge = answer.header("www-authenticate");
        assert!(
            challenge.starts_with("Bearer error=\"invalid_token\"") && challenge.contains(why),
            "{why}: {challenge}"
        );
    }
    let twice = bearer(&good).header("authorization", &format!("Bearer {good}"));
    let answer = client::call(callee.inbound(), twice).await;
    answer.assert_error(401, "unauthenticated");
    let mut h2 = Client::h2(callee.inbound()).await;
    let ask = Ask::grpc("orders", "/shop.Orders/Get", b"").header("authorization", "Bearer x");
    assert_eq!(h2.call(ask).await.header("grpc-status"), "16");
    assert_eq!(app.hits(), served);
    let labels = [("code", "unauthenticated"), ("status", "401")];
    let counted = callee
        .metrics()
        .await
        .sum("outrigger_requests_total", &labels);
    assert!(counted >= cases.len() as f64, "{counted}");
}

#[tokio::test]
async fn keys_are_rotated_by_their_issuer_and_withdrawn_ones_count_no_more() {
    let (old, new) = (Key::p256(), Key::ed25519());
    let (first, both, last) = (
        set(&[old.jwk("old")]),
        set(&[old.jwk("old"), new.jwk("new")]),
        set(&[new.jwk("new")]),
    );
    let jwks = Upstream::h1(move |_| Reply::ok(first.clone())).await;
    let app = Upstream::h1(|_| Reply::ok("hello")).await;
    let (callee, _files) = callee(app.addr, &at(jwks.addr), "").await;
    let (by_old, by_new) = (old.token("old", &claims()), new.token("new", &claims()));
    keys_there(&callee, &by_old).await;
    assert_eq!(call(&callee, &by_old).await.status, 200);
    call(&callee, &by_new)
        .await
        .assert_error(401, "unauthenticated");

    jwks.script(move |_| Reply::ok(both.clone()));
    until("the new key counts", || async {
        (call(&callee, &by_new).await.status == 200).then_some(())
    })
    .await;
    assert_eq!(call(&callee, &by_old).await.status, 200);

    // What is no key set changes nothing.
    jwks.script(|_| Reply::ok("<html>"));
    let failed = [("outcome", "failed")];
    let fetches = "outrigger_jwks_fetches_total";
    callee
        .metric_until("a bad answer", |now| now.sum(fetches, &failed) > 0.0)
        .await;
    assert_eq!(call(&callee, &by_new).await.status, 200);

    jwks.script(move |_| Reply::ok(last.clone()));
    until("the old key counts no more", || async {
        (call(&callee, &by_old).await.status == 401).then_some(())
    })
    .await;
    assert_eq!(call(&callee, &by_new).await.status, 200);
}

#[tokio::test]
async fn without_the_issuers_keys_no_token_is_good_and_the_answer_says_why() {
    let key = Key::p256();
    let published = set(&[key.jwk("1")]);
    let mut jwks = Upstream::h1(move |_| Reply::ok(published.clone())).await;
    jwks.stop().await;
    let app = Upstream::h1(|_| Reply::ok("hello")).await;
    let (callee, _files) = callee(app.addr, &at(jwks.addr), "").await;
    let token = key.token("1", &claims());
    until("the reason", || async {
        let answer = call(&callee, &token).await;
        answer.assert_error(503, "unauthenticated");
        assert_eq!(answer.header("retry-after"), "1");
        answer
            .text()
            .contains("cannot connect to http://")
            .then_some(())
    })
    .await;
    assert_eq!(app.hits(), 0);
    // Whoever brings no token needs none here.
    let answer = client::call(callee.inbound(), Ask::get("orders", "/")).await;
    assert_eq!(answer.status, 200);

    jwks.start_again().await;
    keys_there(&callee, &token).await;
    assert_eq!(call(&callee, &token).await.status, 200);
    // What is known stays known while the issuer is away.
    jwks.stop().await;
    let failed = [("outcome", "failed")];
    let before = callee.metrics().await;
    let fetches = "outrigger_jwks_fetches_total";
    callee
        .metric_until("away", |now| now.since(&before, fetches, &failed) > 0.0)
        .await;
    let other = key.token("1", &with("sub", json!("user-2")));
    assert_eq!(call(&callee, &other).await.status, 200);
}

#[tokio::test]
async fn keys_may_be_in_a_file_that_is_replaced() {
    let (old, new) = (Key::p256(), Key::p256());
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("jwks.json");
    std::fs::write(&path, set(&[old.jwk("1")])).unwrap();
    let app = Upstream::h1(|_| Reply::ok("hello")).await;
    let place = jwt(&format!("file: \"{}\"", path.display()));
    let (callee, _files) = callee(app.addr, &place, "").await;
    let (by_old, by_new) = (old.token("1", &claims()), new.token("1", &claims()));
    keys_there(&callee, &by_old).await;
    assert_eq!(call(&callee, &by_old).await.status, 200);
    let next = dir.path().join("next");
    std::fs::write(&next, set(&[new.jwk("1")])).unwrap();
    std::fs::rename(next, &path).unwrap();
    until("the file's new key", || async {
        (call(&callee, &by_new).await.status == 200).then_some(())
    })
    .await;
    call(&callee, &by_old)
        .await
        .assert_error(401, "unauthenticated");
}

#[tokio::test]
async fn keys_are_fetched_over_tls_from_whom_the_bundle_vouches_for() {
    let (root, other) = (Authority::new("root"), Authority::new("another root"));
    let key = Key::p256();
    let published = set(&[key.jwk("1")]);
    let leaf = root.signed("spiffe://unused/x", |params| {
        params.subject_alt_names = vec![SanType::DnsName("localhost".try_into().unwrap())];
    });
    let acceptor = TlsAcceptor::from(leaf.server(&[]));
    let server = upstream::Raw::start(move |stream| {
        let (acceptor, body) = (acceptor.clone(), published.clone());
        async move {
            let Ok(mut stream) = acceptor.accept(stream).await else {
                return;
            };
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                let Ok(byte) = stream.read_u8().await else {
                    return;
                };
                head.push(byte);
            }
            assert!(head.starts_with(b"GET /keys HTTP/1.1\r\n"));
            let answer = format!(
                "HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}",
                body.len()
            );
            let _ = stream.write_all(answer.as_bytes()).await;
            let _ = stream.shutdown().await;
        }
    })
    .await;
    let dir = tempfile::tempdir().unwrap();
    let app = Upstream::h1(|_| Reply::ok("hello")).await;
    let token = key.token("1", &claims());
    for (name, pem, good) in [("good", root.pem(), true), ("bad", other.pem(), false)] {
        let bundle = dir.path().join(name);
        std::fs::write(&bundle, pem).unwrap();
        let port = server.addr.port();
        let place = jwt(&format!(
            "url: \"https://localhost:{port}/keys\", bundle: \"{}\", refresh: 1s",
            bundle.display()
        ));
        let (callee, _files) = callee(app.addr, &place, "").await;
        if good {
            keys_there(&callee, &token).await;
            assert_eq!(call(&callee, &token).await.status, 200);
        } else {
            until("the reason", || async {
                let answer = call(&callee, &token).await;
                answer.assert_error(503, "unauthenticated");
                answer.text().contains("no TLS with https://").then_some(())
            })
            .await;
        }
    }
}

#[tokio::test]
async fn a_message_keeps_its_token_or_is_refused_where_it_would_lose_it() {
    let key = Key::p256();
    let published = set(&[key.jwk("1")]);
    let jwks = Upstream::h1(move |_| Reply::ok(published.clone())).await;
    let app = Upstream::h1(|_| Reply::ok("hello")).await;
    let (callee, _files) = callee(app.addr, &at(jwks.addr), &allow("orders.write")).await;
    let token = key.token("1", &claims());
    keys_there(&callee, &token).await;
    let served = app.hits();
    for (secrets, accepted) in [("Drop", false), ("Keep", true)] {
        let rule = format!("{{async: {{when: Always, queue: orders, secrets: {secrets}}}}}");
        let yaml = mesh("Permissive")
            + &service("orders", &[callee.inbound()], &at(jwks.addr))
            + &allow("orders.write")
            + &route("orders", &[&rule])
            + &queue("orders", "");
        let web = Sidecar::start(yaml).await;
        let ask = Ask::post("orders", "/", "x").header("authorization", &format!("Bearer {token}"));
        let answer = web.call(ask).await;
        match accepted {
            true => {
                assert_eq!(answer.status, 202, "{}", answer.text());
                until_true("it is delivered", || app.hits() == served + 1).await;
            }
            false => answer.assert_error(403, "unauthorized"),
        }
    }
    assert_eq!(
        app.last().header("authorization"),
        format!("Bearer {token}")
    );
}
