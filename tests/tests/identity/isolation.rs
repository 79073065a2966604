//! Whoever did not send a message does not see it, cancel it or take its key.
//!
//! One state directory under two identities: what the first sent is there when the second calls.

use outrigger_tests::client::{Answer, Ask, Client};
use outrigger_tests::mesh::{Sidecar, queue, route};
use outrigger_tests::pki::{Authority, Files};
use outrigger_tests::until;
use outrigger_tests::upstream::{Reply, Upstream};
use serde_json::Value;

use super::{ORDERS, WEB, mesh, orders, sidecar};

const MAILER: &str = "spiffe://shop.local/ns/default/sa/mailer";

/// A sidecar whose calls of `orders` become messages and are delivered by mutual TLS.
struct Rig {
    root: Authority,
    app: Upstream,
    _callee: Sidecar,
    files: [Files; 2],
    caller: Sidecar,
}

impl Rig {
    async fn start(rule: &str) -> Self {
        let root = Authority::new("root");
        let app = Upstream::h1(|_| Reply::ok("made")).await;
        let of_orders = Files::new(&root.workload(ORDERS), &root.pem());
        let yaml = mesh("Strict") + &orders(app.addr);
        let callee = sidecar("orders", &of_orders, &yaml)
            .app(app.addr)
            .start()
            .await;
        let of_caller = Files::new(&root.workload(WEB), &root.pem());
        let yaml = mesh("Strict")
            + &orders(callee.inbound())
            + &route("orders", &[rule])
            + &queue("orders", "");
        let caller = sidecar("web", &of_caller, &yaml).start().await;
        Self {
            root,
            app,
            _callee: callee,
            files: [of_orders, of_caller],
            caller,
        }
    }

    /// The sidecar is this workload from now on.
    async fn turn_into(&self, id: &str) {
        self.files[1].replace(&self.root.workload(id), &self.root.pem());
        until("it is somebody else", || async {
            let view = self.caller.view("/identity").await;
            (view["id"] == id).then_some(())
        })
        .await;
    }

    async fn send(&self, key: &str) -> String {
        let ask =
            Ask::post("orders", "/v1", "the body").header("idempotency-key", &format!("\"{key}\""));
        let answer = self.caller.call(ask).await;
        assert_eq!(answer.status, 202, "{}", answer.text());
        answer.header("outrigger-message-id").to_owned()
    }

    async fn ask(&self, method: &str, rest: &str) -> Answer {
        let path = format!("/.outrigger/messages{rest}");
        self.caller.call(Ask::new(method, "orders", &path)).await
    }

    async fn ended(&self, id: &str) -> Value {
        until("it has ended", || async {
            let view = self.caller.view(&format!("/messages/{id}")).await;
            (view["status"] == "succeeded").then_some(view)
        })
        .await
    }
}

#[tokio::test]
async fn a_message_is_its_senders_alone() {
    let rule = "{async: {when: Always, queue: orders}}";
    let rig = Rig::start(rule).await;
    let of_web = rig.send("k").await;
    rig.ended(&of_web).await;
    assert_eq!(rig.ask("GET", &format!("/{of_web}")).await.status, 200);
    let delayed = Ask::post("orders", "/v1", "later").header("outrigger-delay", "1h");
    let waiting = rig.caller.call(delayed).await;
    let waiting = waiting.header("outrigger-message-id").to_owned();

    rig.turn_into(MAILER).await;
    for (method, rest) in [
        ("GET", format!("/{of_web}")),
        ("GET", format!("/{of_web}/result")),
        ("GET", format!("/{waiting}")),
        ("GET", format!("/{waiting}/result")),
        ("DELETE", format!("/{waiting}")),
    ] {
        let answer = rig.ask(method, &rest).await;
        answer.assert_error(403, "unauthorized");
        assert!(!answer.text().contains(WEB), "it does not say whose it is");
    }
    // Nor does it hear when it ends.
    let path = format!("/.outrigger/messages/{waiting}");
    let poll = Ask::get("orders", &path).header("prefer", "wait=30");
    rig.caller
        .call(poll)
        .await
        .assert_error(403, "unauthorized");
    let by_key = rig.ask("GET", "?idempotencyKey=k").await;
    by_key.assert_error(404, "message_unknown");
    let unknown = rig.ask("GET", "/01ARZ3NDEKTSV4RRFFQ69G5FAV").await;
    unknown.assert_error(404, "message_unknown");

    // The same key is another call of another caller.
    let of_mailer = rig.send("k").await;
    assert_ne!(of_mailer, of_web);
    rig.ended(&of_mailer).await;
    assert_eq!(rig.app.hits(), 2);
    let found = rig.ask("GET", "?idempotencyKey=k").await;
    assert_eq!(found.json()["id"], of_mailer.as_str());

    // Operators see whose each is.
    for (id, caller) in [(&of_web, WEB), (&waiting, WEB), (&of_mailer, MAILER)] {
        let view = rig.caller.view(&format!("/messages/{id}")).await;
        assert_eq!(view["caller"], caller, "{view}");
    }

    rig.turn_into(WEB).await;
    rig.ask("GET", &format!("/{of_mailer}"))
        .await
        .assert_error(403, "unauthorized");
    assert_eq!(rig.send("k").await, of_web, "a repeat is the same message");
    let cancelled = rig.ask("DELETE", &format!("/{waiting}")).await;
    assert_eq!(cancelled.json()["status"], "cancelled");
}

#[tokio::test]
async fn answers_to_repeats_are_the_callers_alone() {
    let rig = Rig::start("{idempotency: {}}").await;
    let send = || async {
        let ask = Ask::post("orders", "/v1", "the body").header("idempotency-key", "\"k\"");
        rig.caller.call(ask).await
    };
    assert_eq!(send().await.status, 200);
    assert_eq!(send().await.header("outrigger-idempotency"), "replayed");
    rig.turn_into(MAILER).await;
    assert_eq!(send().await.header("outrigger-idempotency"), "");
    assert_eq!(rig.app.hits(), 2);
}

/// `{name: "operations/ID"}` in protobuf.
fn named(id: &str) -> Vec<u8> {
    let name = format!("operations/{id}");
    let length = u8::try_from(name.len()).unwrap();
    [&[0x0a, length][..], name.as_bytes()].concat()
}

#[tokio::test]
async fn operations_are_the_callers_alone() {
    let rig = Rig::start("{async: {when: Always, queue: orders, grpcAck: Operation}}").await;
    let mut client = Client::h2(rig.caller.outbound()).await;
    let make = Ask::grpc("orders", "/shop.Orders/Make", b"x").header("outrigger-delay", "1h");
    let made = client.call(make).await;
    let id = made.header("outrigger-message-id").to_owned();
    let mut ask = async |method: &str, body: Vec<u8>| {
        let path = format!("/google.longrunning.Operations/{method}");
        client.call(Ask::grpc("orders", &path, &body)).await
    };
    let listed = ask("ListOperations", Vec::new()).await;
    assert!(String::from_utf8_lossy(&listed.body).contains(&id));
    rig.turn_into(MAILER).await;
    for method in [
        "GetOperation",
        "WaitOperation",
        "CancelOperation",
        "DeleteOperation",
    ] {
        let answer = ask(method, named(&id)).await;
        assert_eq!(answer.header("grpc-status"), "7", "{method}: {answer:?}");
        assert_eq!(answer.code(), "unauthorized");
    }
    let listed = ask("ListOperations", Vec::new()).await;
    assert_eq!(listed.trailer("grpc-status"), "0", "{listed:?}");
    assert!(!String::from_utf8_lossy(&listed.body).contains(&id));
    rig.turn_into(WEB).await;
    let cancelled = ask("CancelOperation", named(&id)).await;
    assert_eq!(cancelled.trailer("grpc-status"), "0", "{cancelled:?}");
}
