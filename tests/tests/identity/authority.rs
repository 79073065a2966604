//! Certificates from the control plane's authority: who gets one, how it is renewed, and how the
//! root is replaced while requests flow.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use outrigger_control_plane::ca::make;
use outrigger_tests::client::{Ask, Client};
use outrigger_tests::mesh::{Plane, Sidecar, SidecarBuilder};
use outrigger_tests::pki::{Authority, now};
use outrigger_tests::process::python;
use outrigger_tests::upstream::{Raw, Reply, Upstream};
use outrigger_tests::{until, until_true};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::{Instant, interval, timeout};

use super::refused::say;
use super::{ORDERS, WEB, mesh, orders};

/// Longer than any rotation takes on a machine that has other things to do.
const PATIENCE: Duration = Duration::from_secs(120);

/// What the mesh consists of when `orders` is called at `addr`.
fn files(addr: SocketAddr) -> Vec<(&'static str, String)> {
    vec![("mesh.yaml", mesh("Strict") + &orders(addr))]
}

/// The sidecar of a workload of `account`, known to the control plane by its join token.
pub(crate) fn sidecar(plane: &Plane, account: &str) -> SidecarBuilder {
    let workload = json!({
        "name": format!("{account}-1"), "service": account, "serviceAccount": account,
    });
    Sidecar::named(account)
        .set("workload", workload)
        .set("controlPlane", plane.client(account))
        .set("identity", json!({"controlPlane": {}}))
}

/// `web` and `orders` with certificates of one authority.
async fn pair(leaf_ttl: &str) -> (Plane, Upstream, Sidecar, Sidecar) {
    let app = Upstream::h1(|_| Reply::ok("hello")).await;
    let (plane, callee, web) = pair_before(app.addr, leaf_ttl).await;
    (plane, app, callee, web)
}

/// The same before another application.
async fn pair_before(app: SocketAddr, leaf_ttl: &str) -> (Plane, Sidecar, Sidecar) {
    let accounts = ["web", "orders"];
    let plane = Plane::with_authority(&files(app), leaf_ttl, &accounts).await;
    let callee = sidecar(&plane, "orders").app(app).start().await;
    plane.write("mesh.yaml", &files(callee.inbound())[0].1);
    let web = sidecar(&plane, "web").start().await;
    until("the callee's address at web's sidecar", || async {
        let answer = web.get("orders", "/").await;
        (answer.status == 200).then_some(())
    })
    .await;
    (plane, callee, web)
}

/// An application that keeps nothing of what it is asked.
async fn forgetful() -> Raw {
    Raw::start(|mut stream: TcpStream| async move {
        let (mut asked, mut part) = (Vec::new(), [0; 4096]);
        while let Ok(count @ 1..) = stream.read(&mut part).await {
            asked.extend_from_slice(&part[..count]);
            while let Some(end) = asked.windows(4).position(|four| four == b"\r\n\r\n") {
                asked.drain(..end + 4);
                let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello";
                if stream.write_all(answer).await.is_err() {
                    return;
                }
            }
        }
    })
    .await
}

fn seconds() -> u64 {
    now().as_secs()
}

/// Waits longer than [`until`] does.
pub(crate) async fn eventually<T>(what: &str, mut found: impl AsyncFnMut() -> Option<T>) -> T {
    let asking = async {
        let mut ticks = interval(Duration::from_millis(50));
        loop {
            if let Some(value) = found().await {
                return value;
            }
            ticks.tick().await;
        }
    };
    match timeout(PATIENCE, asking).await {
        Ok(value) => value,
        Err(_) => panic!("waited in vain: {what}"),
    }
}

/// Every file below a directory, as one text.
fn everything_in(dir: &Path) -> String {
    let mut text = String::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => text.push_str(&everything_in(&path)),
            false => text.push_str(&String::from_utf8_lossy(&std::fs::read(path).unwrap())),
        }
    }
    text
}

#[tokio::test]
async fn sidecars_with_join_tokens_get_certificates_and_speak_tls() {
    let (plane, app, callee, web) = pair("1h").await;
    assert_eq!(web.view("/identity").await["id"], WEB);
    assert_eq!(callee.view("/identity").await["id"], ORDERS);
    assert_eq!(web.get("orders", "/").await.text(), "hello");
    let seen = app.last();
    let forwarded = seen.header("x-forwarded-client-cert");
    assert!(forwarded.ends_with(&format!(";URI={WEB}")), "{forwarded}");

    let view = plane.ask("GET", "/v1/ca", "").await.json();
    assert_eq!(view["trustDomain"], "shop.local", "{view}");
    assert_eq!(view["issued"], 2, "{view}");
    assert_eq!(view["issuers"][0]["signing"], true, "{view}");
    assert_eq!(view["roots"][0]["state"], "trusted", "{view}");
    let metrics = plane.ask("GET", "/metrics", "").await.text();
    for series in [
        "outrigger_control_plane_certificates_issued_total 2",
        "outrigger_control_plane_certificate_expiry_timestamp_seconds{certificate=\"issuer\"}",
        "outrigger_control_plane_certificate_expiry_timestamp_seconds{certificate=\"server\"}",
    ] {
        assert!(metrics.contains(series), "{series}:\n{metrics}");
    }
    let audit = std::fs::read_to_string(plane.state_dir().join("ca-audit.jsonl")).unwrap();
    let entries: Vec<Value> = audit
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let ids: Vec<&Value> = entries.iter().map(|entry| &entry["id"]).collect();
    assert_eq!(ids, [ORDERS, WEB]);
    for entry in &entries {
        assert_eq!(entry["event"], "issued", "{entry}");
        assert!(
            entry["by"].as_str().unwrap().starts_with("token sha256:"),
            "{entry}"
        );
    }
    // Neither the tokens nor anybody's key is anywhere but in its owner's memory.
    let token = std::fs::read_to_string(plane.token_file("web")).unwrap();
    assert!(!audit.contains(&token));
    assert!(!everything_in(web.state_dir()).contains("PRIVATE KEY"));
    assert!(!everything_in(&plane.state_dir()).contains(&token));
}

/// What an independent client is answered, one answer a case.
pub(crate) async fn ask(plane: &Plane, cases: &[Value]) -> Vec<Value> {
    let mut command = python("ca_client.py");
    command
        .arg(plane.discovery().to_string())
        .arg(plane.state_dir().join("roots.pem"));
    command.args(cases.iter().map(ToString::to_string));
    let output = tokio::task::spawn_blocking(move || command.output())
        .await
        .unwrap()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let answers = String::from_utf8(output.stdout).unwrap();
    let answers: Vec<Value> = answers
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(answers.len(), cases.len());
    answers
}

fn openssl(arguments: &[&str], dir: &Path) -> String {
    let output = Command::new("openssl")
        .args(arguments)
        .current_dir(dir)
        .output()
        .unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{arguments:?}: {out}{err}");
    out
}

#[tokio::test]
async fn an_independent_client_gets_a_certificate_that_openssl_verifies() {
    let nobody = SocketAddr::from(([127, 0, 0, 1], 9));
    let plane = Plane::with_authority(&files(nobody), "1h", &["web"]).await;
    let token = std::fs::read_to_string(plane.token_file("web")).unwrap();
    let admin = "spiffe://shop.local/ns/default/sa/admin";
    let cases: Vec<Value> = ["ec", "rsa", "ed25519"]
        .iter()
        .map(|key| json!({"token": token, "key": key, "names": [admin], "seconds": 600}))
        .collect();
    let answers = ask(&plane, &cases).await;
    for answer in &answers {
        assert_eq!(answer["code"], "OK", "{answer}");
        let dir = tempfile::tempdir().unwrap();
        let chain: Vec<&str> = answer["chain"]
            .as_array()
            .unwrap()
            .iter()
            .map(|pem| pem.as_str().unwrap())
            .collect();
        let [leaf, intermediate, roots] = chain[..] else {
            panic!("{answer}");
        };
        for (name, text) in [("leaf", leaf), ("between", intermediate), ("roots", roots)] {
            std::fs::write(dir.path().join(name), text).unwrap();
        }
        for purpose in ["sslclient", "sslserver"] {
            let verify = [
                "verify",
                "-x509_strict",
                "-purpose",
                purpose,
                "-CAfile",
                "roots",
                "-untrusted",
                "between",
                "leaf",
            ];
            assert_eq!(openssl(&verify, dir.path()), "leaf: OK\n");
        }
        let text = openssl(&["x509", "-in", "leaf", "-noout", "-text"], dir.path());
        // The identity of the token, not of the request.
        assert!(
            text.contains(&format!("URI:{WEB}")) && !text.contains("admin"),
            "{text}"
        );
        assert!(text.contains("CA:FALSE"), "{text}");
        let end = openssl(
            &["x509", "-in", "leaf", "-noout", "-checkend", "300"],
            dir.path(),
        );
        assert!(end.contains("will not expire"), "{end}");
        let late = Command::new("openssl")
            .args(["x509", "-in", "leaf", "-noout", "-checkend", "620"])
            .current_dir(dir.path())
            .output()
            .unwrap();
        assert!(!late.status.success());
        // What the listed roots are, the control plane's own file says.
        assert_eq!(
            roots,
            std::fs::read_to_string(plane.state_dir().join("roots.pem")).unwrap()
        );
    }
    // With what it got it can renew itself, without a token, and cannot become somebody else.
    let (chain, key) = (&answers[0]["chain"], &answers[0]["private"]);
    let chain = format!(
        "{}{}",
        chain[0].as_str().unwrap(),
        chain[1].as_str().unwrap()
    );
    let renewals = ask(
        &plane,
        &[
            json!({"chain": chain, "chain_key": key}),
            json!({"chain": chain, "chain_key": key, "account": WEB}),
            json!({"chain": chain, "chain_key": key, "account": admin}),
        ],
    )
    .await;
    let codes: Vec<&Value> = renewals.iter().map(|answer| &answer["code"]).collect();
    assert_eq!(codes, ["OK", "OK", "PERMISSION_DENIED"], "{renewals:?}");
}

#[tokio::test]
async fn who_proves_nothing_gets_nothing() {
    let nobody = SocketAddr::from(([127, 0, 0, 1], 9));
    let plane = Plane::with_authority(&files(nobody), "1h", &["web"]).await;
    let other = Plane::with_authority(&files(nobody), "1h", &["web"]).await;
    let token = std::fs::read_to_string(plane.token_file("web")).unwrap();
    let theirs = std::fs::read_to_string(other.token_file("web")).unwrap();
    let foreign = ask(&other, &[json!({"token": theirs})]).await;
    let chain = &foreign[0]["chain"];
    let chain = format!(
        "{}{}",
        chain[0].as_str().unwrap(),
        chain[1].as_str().unwrap()
    );
    let cases = [
        (json!({}), "UNAUTHENTICATED", "no credential"),
        (
            json!({"token": "guessed-and-guessed"}),
            "UNAUTHENTICATED",
            "unknown",
        ),
        (
            json!({"chain": chain, "chain_key": foreign[0]["private"]}),
            "UNAUTHENTICATED",
            "no root of this authority",
        ),
        (
            json!({"token": token, "account": "default/orders"}),
            "PERMISSION_DENIED",
            "not for spiffe://shop.local/ns/default/sa/orders",
        ),
        (
            json!({"token": token, "account": "spiffe://bank.local/ns/default/sa/web"}),
            "PERMISSION_DENIED",
            "not of the trust domain",
        ),
        (
            json!({"token": token, "forged": true}),
            "INVALID_ARGUMENT",
            "not signed by the key",
        ),
        (
            json!({"token": token, "authority": true}),
            "INVALID_ARGUMENT",
            "authority's",
        ),
        (
            json!({"token": token, "key": "weak"}),
            "INVALID_ARGUMENT",
            "too weak",
        ),
    ];
    let asked: Vec<Value> = cases.iter().map(|(case, ..)| case.clone()).collect();
    let answers = ask(&plane, &asked).await;
    for ((case, code, detail), answer) in cases.iter().zip(&answers) {
        assert_eq!(answer["code"], *code, "{case}: {answer}");
        let told = answer["detail"].as_str().unwrap();
        assert!(told.contains(detail), "{case}: {answer}");
    }
    let view = plane.ask("GET", "/v1/ca", "").await.json();
    assert_eq!(view["issued"], 0, "{view}");
    let refused = json!({"denied": 2, "request": 3, "unauthenticated": 3});
    assert_eq!(view["refused"], refused, "{view}");
    let audit = std::fs::read_to_string(plane.state_dir().join("ca-audit.jsonl")).unwrap();
    assert_eq!(audit.lines().count(), cases.len());
    assert!(!audit.contains(&token) && !audit.contains("guessed-and-guessed"));
}

#[tokio::test]
async fn nobody_gets_certificates_of_one_identity_without_end() {
    let nobody = SocketAddr::from(([127, 0, 0, 1], 9));
    let mut plane = Plane::with_authority(&files(nobody), "1h", &["web", "orders"]).await;
    plane.stop().await;
    let limit = json!({"requestsPerSecond": 1, "burst": 3});
    plane.configure("ca", json!({"rateLimit": limit}));
    plane.start_again().await;
    let token = |account| std::fs::read_to_string(plane.token_file(account)).unwrap();
    let (web, orders) = (
        json!({"token": token("web")}),
        json!({"token": token("orders")}),
    );
    // More than a slow machine could space out.
    let mut cases = vec![web; 40];
    cases.push(orders);
    let answers = ask(&plane, &cases).await;
    let (others, of_web) = answers.split_last().unwrap();
    assert_eq!(others["code"], "OK", "its own limit: {others}");
    for answer in &of_web[..3] {
        assert_eq!(answer["code"], "OK", "{answer}");
    }
    let limited = |answer: &&Value| answer["code"] == "RESOURCE_EXHAUSTED";
    let refused: Vec<&Value> = of_web.iter().filter(limited).collect();
    let told = refused.first().expect("one too many")["detail"].to_string();
    assert!(
        told.contains(WEB) && told.contains("try again in"),
        "{told}"
    );
    let metrics = plane.ask("GET", "/metrics", "").await.text();
    let series = format!(
        "outrigger_control_plane_certificates_refused_total{{reason=\"rate_limited\"}} {}",
        refused.len()
    );
    assert!(metrics.contains(&series), "{series}:\n{metrics}");
    let audit = std::fs::read_to_string(plane.state_dir().join("ca-audit.jsonl")).unwrap();
    let noted = audit
        .lines()
        .filter(|line| line.contains("\"rate_limited\""));
    assert_eq!(noted.count(), refused.len());
}

#[tokio::test]
async fn a_sidecar_that_says_it_is_somebody_else_gets_no_config() {
    let nobody = SocketAddr::from(([127, 0, 0, 1], 9));
    let plane = Plane::with_authority(&files(nobody), "1h", &["web", "orders"]).await;
    // The token of orders in the hands of web.
    let mut client = plane.client("orders");
    let liar = sidecar(&plane, "web")
        .set("controlPlane", client.clone())
        .start_unready()
        .await;
    let problem = until("it is told why", || async {
        let view = liar.view("/identity").await;
        view["problem"].as_str().map(str::to_owned)
    })
    .await;
    assert!(problem.contains("PermissionDenied"), "{problem}");
    let config = until("and not given the config", || async {
        let view = liar.view("/config").await;
        let told = view.to_string();
        told.contains("its credential is another's").then_some(view)
    })
    .await;
    assert_eq!(config["documents"], json!([]), "{config}");
    let ready = liar.ask_admin("GET", "/readyz", "").await;
    assert_eq!(ready.status, 503);

    // Whom the sidecar's bundle does not vouch for is not told the token.
    let other = Plane::with_authority(&files(nobody), "1h", &["web"]).await;
    client["bundle"] = json!(other.state_dir().join("roots.pem"));
    let careful = sidecar(&plane, "orders")
        .set("controlPlane", client)
        .start_unready()
        .await;
    let problem = until("it does not believe the control plane", || async {
        let view = careful.view("/identity").await;
        view["problem"].as_str().map(str::to_owned)
    })
    .await;
    assert!(problem.contains("no TLS with"), "{problem}");
}

#[tokio::test]
async fn an_authority_that_is_away_alarms_first_then_stops_traffic_and_all_comes_back() {
    let (mut plane, _app, callee, web) = pair("8s").await;
    plane.stop().await;
    let failures = "outrigger_certificate_renewal_failures_total";
    let expiry = "outrigger_certificate_expiry_timestamp_seconds";
    // The alarm comes while the certificate still counts, and so do calls.
    let (at, scrape) = until("a renewal fails", || async {
        let scrape = web.metrics().await;
        (scrape.sum(failures, &[]) > 0.0).then_some((seconds(), scrape))
    })
    .await;
    let until_then = scrape.sum(expiry, &[("certificate", "leaf")]);
    #[allow(clippy::cast_precision_loss)]
    let at = at as f64;
    assert!(
        until_then >= at,
        "the alarm at {at}, the end at {until_then}"
    );

    let answer = eventually("calls are refused", async || {
        let answer = web.get("orders", "/").await;
        let text = answer.text();
        // Whichever of the two ends first.
        (answer.status == 503 && text.contains("own certificate has expired")).then_some(answer)
    })
    .await;
    answer.assert_error(503, "tls_failed");
    let ready = web.ask_admin("GET", "/readyz", "").await;
    assert_eq!(ready.status, 503);
    let text = ready.text();
    assert!(text.starts_with("the certificate has expired: "), "{text}");
    assert!(text.contains("cannot connect to"), "{text}");

    plane.start_again().await;
    eventually("calls flow again", async || {
        (web.get("orders", "/").await.status == 200).then_some(())
    })
    .await;
    for sidecar in [&web, &callee] {
        sidecar.ready().await;
        assert!(sidecar.identity_generation() > 2);
    }
}

/// What this process holds, with everything that the test runs in it.
fn resident_mib() -> u64 {
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
    let resident: u64 = pages.split(' ').nth(1).unwrap().parse().unwrap();
    resident * 4096 / (1 << 20)
}

/// Calls at a steady rate from several connections until told to stop; how many were answered.
fn load(
    addr: SocketAddr,
    per_second: u32,
    stop: &Arc<AtomicBool>,
) -> Vec<tokio::task::JoinHandle<u64>> {
    const CALLERS: u32 = 10;
    let pause = Duration::from_secs(1) * CALLERS / per_second;
    (0..CALLERS)
        .map(|_| {
            let stop = Arc::clone(stop);
            tokio::spawn(async move {
                let mut client = Client::h1(addr).await;
                let mut ticks = interval(pause);
                let mut answered = 0;
                while !stop.load(Ordering::Relaxed) {
                    ticks.tick().await;
                    let answer = client.call(Ask::get("orders", "/")).await;
                    assert_eq!(answer.status, 200, "{}", answer.text());
                    answered += 1;
                }
                answered
            })
        })
        .collect()
}

/// `OUTRIGGER_ROTATION_SECONDS=120` runs it as long as that, with certificates of 4 s: renewed
/// every two.
#[tokio::test]
async fn leaves_and_then_the_root_are_replaced_under_load_without_a_failed_request() {
    let long: Option<u64> = std::env::var("OUTRIGGER_ROTATION_SECONDS")
        .ok()
        .and_then(|seconds| seconds.parse().ok());
    let (leaf_ttl, at_least) = match long {
        Some(seconds) => ("4s", Duration::from_secs(seconds)),
        None => ("6s", Duration::ZERO),
    };
    let app = forgetful().await;
    let (plane, callee, web) = pair_before(app.addr, leaf_ttl).await;
    let stop = Arc::new(AtomicBool::new(false));
    let begun = Instant::now();
    let callers = load(web.outbound(), 500, &stop);
    // Grown to the load.
    eventually("calls are answered", async || {
        (web.metrics().await.sum("outrigger_requests_total", &[]) > 2000.0).then_some(())
    })
    .await;
    let at_first = resident_mib();
    let dir = plane.state_dir();
    let view = async || plane.ask("GET", "/v1/ca", "").await.json();

    // Leaves.
    let before = (web.identity_generation(), callee.identity_generation());
    eventually("both were renewed", async || {
        let renewed = web.identity_generation() > before.0
            && callee.identity_generation() > before.1
            && begun.elapsed() >= at_least;
        renewed.then_some(())
    })
    .await;
    let midway = resident_mib();
    // The issuer, under the same root.
    let old = view().await;
    make::rotate_issuer(&dir, seconds()).unwrap();
    eventually("the next issuer signs", async || {
        let now = view().await;
        let first = &now["issuers"][0];
        (first["serial"] != old["issuers"][0]["serial"] && first["signing"] == true).then_some(())
    })
    .await;
    // The root: told of, then signing, then alone.
    make::rotate_root(&dir, seconds()).unwrap();
    let two = eventually("two roots are handed out", async || {
        let now = view().await;
        (now["roots"].as_array().unwrap().len() == 2).then_some(now)
    })
    .await;
    let signs = |view: &Value| {
        let issuers = view["issuers"].as_array().unwrap();
        let signing = issuers.iter().find(|issuer| issuer["signing"] == true);
        signing.unwrap()["root"].clone()
    };
    let (first, new) = (signs(&old), two["issuers"][0]["root"].clone());
    assert_ne!(first, new);
    let refused = make::drop_old_roots(&dir, seconds()).unwrap_err();
    assert!(
        refused.to_string().contains("live for another"),
        "{refused}"
    );
    eventually("the new root signs", async || {
        (signs(&view().await) == new).then_some(())
    })
    .await;
    eventually("the old root may go", async || {
        make::drop_old_roots(&dir, seconds()).ok()
    })
    .await;
    eventually("one root is left", async || {
        let now = view().await;
        let roots = now["roots"].as_array().unwrap();
        (roots.len() == 1 && roots[0]["sha256"] == new).then_some(())
    })
    .await;
    let generations = (web.identity_generation(), callee.identity_generation());
    eventually("both know the new root alone", async || {
        let renewed = web.identity_generation() > generations.0
            && callee.identity_generation() > generations.1;
        renewed.then_some(())
    })
    .await;
    stop.store(true, Ordering::Relaxed);
    let mut answered = 0;
    for caller in callers {
        answered += caller.await.expect("no request failed");
    }
    let generations = (web.identity_generation(), callee.identity_generation());
    let at_last = resident_mib();
    println!("resident: {at_first} MiB, after the leaves {midway} MiB, at the end {at_last} MiB");
    println!(
        "{answered} requests in {:?}, {generations:?} certificates",
        begun.elapsed()
    );
    assert!(answered > 0);
}

#[tokio::test]
async fn a_root_counts_everywhere_as_soon_as_it_is_handed_out_and_no_longer_than_that() {
    let (plane, _app, callee, web) = pair("1h").await;
    let next = Authority::new("next root");
    let peer = next.workload(WEB);
    let call = async || {
        let alpn = ["outrigger-http/1.1"];
        say(peer.client(&alpn), callee.inbound()).await
    };
    let stranger = call().await.unwrap_err();
    assert!(stranger.contains("alert"), "{stranger}");
    let renewals = async |sidecar: &Sidecar| {
        let scrape = sidecar.metrics().await;
        scrape.sum("outrigger_certificate_renewals_total", &[])
    };
    let before = (renewals(&web).await, renewals(&callee).await);
    let generations = (web.identity_generation(), callee.identity_generation());

    let file = plane.state_dir().join("roots.pem");
    let old = std::fs::read_to_string(&file).unwrap();
    let replace = |text: &str| {
        let new = file.with_extension("new");
        std::fs::write(&new, text).unwrap();
        std::fs::rename(new, &file).unwrap();
    };
    replace(&(old.clone() + &next.pem()));
    let begun = Instant::now();
    let answer = eventually("who comes with the next root is believed", async || {
        call().await.ok()
    })
    .await;
    println!("believed {:?} after it was listed", begun.elapsed());
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    eventually("by everybody", async || {
        (web.identity_generation() > generations.0).then_some(())
    })
    .await;
    // The same certificates, which the old root vouches for, and peers believe both.
    assert_eq!((renewals(&web).await, renewals(&callee).await), before);
    assert_eq!(web.get("orders", "/").await.status, 200);
    let proxies = plane
        .view_until("/v1/proxies", |view| {
            let all = view["proxies"].as_array().unwrap();
            let sent = &all[0]["roots"]["sent"];
            all.len() == 2
                && all.iter().all(|proxy| {
                    let roots = &proxy["roots"];
                    roots["sent"] == *sent && roots["acknowledged"] == *sent
                })
        })
        .await;
    assert!(
        proxies["proxies"][0]["roots"]["sent"].is_string(),
        "{proxies}"
    );

    // No certificate of the authority needs it, so it is taken back as quickly.
    replace(&old);
    eventually("it is believed no more", async || call().await.err()).await;
    assert_eq!(web.get("orders", "/").await.status, 200);
    assert_eq!((renewals(&web).await, renewals(&callee).await), before);
}

#[tokio::test]
async fn a_root_that_certificates_need_is_handed_out_although_no_file_lists_it() {
    let (mut plane, _app, callee, web) = pair("6s").await;
    let dir = plane.state_dir();
    let old = plane.ask("GET", "/v1/ca", "").await.json();
    let old = old["roots"][0]["sha256"].clone();
    make::rotate_root(&dir, seconds()).unwrap();
    // In a hurry, and wrongly: only the new root is listed.
    let both = std::fs::read_to_string(dir.join("roots.pem")).unwrap();
    let end = both.find("-----END CERTIFICATE-----\n").unwrap();
    let (alone, rest) = both.split_at(end + "-----END CERTIFICATE-----\n".len());
    assert!(rest.contains("BEGIN"));
    std::fs::write(dir.join("roots.new"), alone).unwrap();
    std::fs::rename(dir.join("roots.new"), dir.join("roots.pem")).unwrap();
    let states = |view: &Value| -> Vec<(Value, String)> {
        let roots = view["roots"].as_array().unwrap().iter();
        roots
            .map(|root| {
                (
                    root["sha256"].clone(),
                    root["state"].as_str().unwrap().to_owned(),
                )
            })
            .collect()
    };
    let leaving = (old.clone(), "leaving".to_owned());
    eventually("the old root is leaving", async || {
        let view = plane.ask("GET", "/v1/ca", "").await.json();
        states(&view).contains(&leaving).then_some(())
    })
    .await;
    // Also after a restart, which has the files only.
    plane.stop().await;
    plane.start_again().await;
    let view = plane.ask("GET", "/v1/ca", "").await.json();
    assert!(states(&view).contains(&leaving), "{view}");
    eventually("it is gone when nothing lives under it", async || {
        let view = plane.ask("GET", "/v1/ca", "").await.json();
        states(&view)
            .iter()
            .all(|(root, _)| *root != old)
            .then_some(())
    })
    .await;
    until_true("both sidecars have certificates", || {
        web.identity_generation() > 0 && callee.identity_generation() > 0
    })
    .await;
    eventually("and use them", async || {
        (web.get("orders", "/").await.status == 200).then_some(())
    })
    .await;
}
