//! The life of a message through a real sidecar and its embedded store.

mod accept;
mod callbacks;
mod chaos;
mod clients;
mod contracts;
mod delivery;
mod events;
mod export;
mod fairness;
mod fan_out;
mod full_volume;
mod grpc;
mod letters;
mod operator;
mod ordering;
mod outage;
mod outcomes;
mod quotas;
mod restart;
mod status;

use std::net::{IpAddr, UdpSocket};

use outrigger_tests::client::{Answer, Ask};
use outrigger_tests::mesh::{Sidecar, queue, route, service};
use outrigger_tests::metrics::Scrape;
use outrigger_tests::until;
use outrigger_tests::upstream::{Reply, Seen, Upstream};
use serde_json::Value;

/// A service `mailer` and a rule for it with this `async`.
fn mesh(upstream: &Upstream, asynchronous: &str, more: &str) -> String {
    let rule = format!("{{name: send, async: {{queue: mail, {asynchronous}}}}}");
    service("mailer", &[upstream.addr], more) + &route("mailer", &[&rule]) + &queue("mail", "")
}

/// A sidecar before a scripted `mailer` whose calls become messages as `asynchronous` says.
async fn mailer(
    asynchronous: &str,
    script: impl Fn(&Seen) -> Reply + Send + Sync + 'static,
) -> (Upstream, Sidecar) {
    let upstream = Upstream::h1(script).await;
    let sidecar = Sidecar::start(mesh(&upstream, asynchronous, "")).await;
    store_ready(&sidecar).await;
    (upstream, sidecar)
}

/// The store is opened beside readiness; until then an enqueue is refused.
async fn store_ready(sidecar: &Sidecar) {
    until("the store is open", || async {
        (sidecar.view("/queues").await["store"]["health"] == "ready").then_some(())
    })
    .await;
}

/// An address of this machine that is not loopback. Nothing is sent.
fn own_address() -> IpAddr {
    let socket = UdpSocket::bind("0.0.0.0:0").expect("a socket");
    socket
        .connect("203.0.113.1:9")
        .expect("the machine has a network interface with a route");
    socket.local_addr().expect("an address").ip()
}

fn post(body: &str) -> Ask {
    Ask::post("mailer", "/v1/mails", body.to_owned())
}

fn asynchronously(ask: Ask) -> Ask {
    ask.header("prefer", "respond-async")
}

/// Sends a request that must become a message; returns its id.
async fn accepted(sidecar: &Sidecar, ask: Ask) -> String {
    let answer = sidecar.call(ask).await;
    assert_eq!(answer.status, 202, "{}", answer.text());
    answer.header("outrigger-message-id").to_owned()
}

async fn ask_status(sidecar: &Sidecar, id: &str) -> Answer {
    sidecar
        .get("mailer", &format!("/.outrigger/messages/{id}"))
        .await
}

async fn status(sidecar: &Sidecar, id: &str) -> Value {
    let answer = ask_status(sidecar, id).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    answer.json()
}

/// The status of a message, as soon as it is in this state.
async fn in_state(sidecar: &Sidecar, id: &str, state: &str) -> Value {
    let last = std::cell::RefCell::new(Value::Null);
    let waiting = async {
        loop {
            let status = status(sidecar, id).await;
            if status["status"] == state {
                return status;
            }
            *last.borrow_mut() = status;
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    };
    match tokio::time::timeout(outrigger_tests::SOON, waiting).await {
        Ok(status) => status,
        Err(_) => panic!("never {state}: {}", last.borrow()),
    }
}

/// Waits until `count` says `wanted`, however long that takes while it goes on.
async fn progress(what: &str, wanted: usize, count: impl Fn() -> usize) {
    let mut seen = count();
    while seen < wanted {
        let what = format!("{what}: {seen} of {wanted}");
        seen = until(&what, || {
            std::future::ready(Some(count()).filter(|now| *now > seen))
        })
        .await;
    }
    assert_eq!(seen, wanted, "{what}");
}

/// The conservation gauge is there and 0.
fn assert_no_drift(metrics: &Scrape) {
    let name = "outrigger_queue_conservation_drift";
    assert!(metrics.has(name), "there is no {name}");
    assert_eq!(metrics.sum(name, &[]), 0.0);
}
