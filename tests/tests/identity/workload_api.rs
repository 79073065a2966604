//! Identity from a SPIFFE Workload API: what the agent says is in force, and stays so without it.

use std::path::{Path, PathBuf};

use outrigger_tests::mesh::{Sidecar, SidecarBuilder};
use outrigger_tests::pki::{Authority, Leaf};
use outrigger_tests::process::{Process, python};
use outrigger_tests::upstream::{Reply, Upstream};
use outrigger_tests::{until, until_true};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::{ORDERS, WEB, files, mesh, orders, sidecar};

const OPS: &str = "spiffe://shop.local/ns/default/sa/ops";

/// The agent's files; they stay when it is killed, for the next one.
struct Agent {
    dir: TempDir,
    process: Option<Process>,
}

impl Agent {
    /// One that says this.
    fn start(says: &Value) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut agent = Self { dir, process: None };
        agent.will_say(says);
        agent.start_again();
        agent
    }

    fn start_again(&mut self) {
        let mut command = python("workload_api.py");
        command.arg(self.socket()).arg(self.file());
        let mut process = Process::start("workload_api.py", &mut command);
        process.line("serving");
        self.process = Some(process);
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("agent.sock")
    }

    fn file(&self) -> PathBuf {
        self.dir.path().join("says.json")
    }

    /// To streams that are opened from now on.
    fn will_say(&self, says: &Value) {
        let new = self.dir.path().join("new");
        std::fs::write(&new, says.to_string()).unwrap();
        std::fs::rename(new, self.file()).unwrap();
    }

    /// Also to those that are open.
    fn says(&self, says: &Value) {
        self.will_say(says);
        self.process.as_ref().unwrap().signal("USR1");
    }
}

/// What the agent knows of one identity.
fn svid(id: &str, leaf: &Leaf, bundle: &str, hint: &str) -> Value {
    json!({"id": id, "chain": leaf.chain, "key": leaf.key, "bundle": bundle, "hint": hint})
}

fn says(svids: &[Value]) -> Value {
    json!({ "svids": svids })
}

/// The sidecar of `orders` whose identity comes from `socket`.
fn of_agent(socket: &Path, api: Value, yaml: &str) -> SidecarBuilder {
    let files = files(&Authority::new("unused"), "orders");
    let mut api = api;
    api["socket"] = json!(socket);
    sidecar("orders", &files, yaml).set("identity", json!({ "workloadApi": api }))
}

async fn problem(sidecar: &Sidecar, text: &str) {
    until(text, || async {
        let view = sidecar.view("/identity").await;
        let problem = view["problem"].as_str().unwrap_or_default().to_owned();
        problem.contains(text).then_some(())
    })
    .await;
}

#[tokio::test]
async fn what_the_agent_says_is_in_force_and_stays_so_while_it_is_away() {
    let (old, new) = (Authority::new("old root"), Authority::new("new root"));
    let app = Upstream::h1(|_| Reply::ok("hello")).await;
    // Nobody has registered the workload yet.
    let mut agent = Agent::start(&json!({"deny": "no identity issued"}));
    let yaml = mesh("Strict") + &orders(app.addr);
    let callee = of_agent(&agent.socket(), json!({}), &yaml)
        .app(app.addr)
        .start_unready()
        .await;
    problem(&callee, "no identity issued").await;
    assert_eq!(callee.identity_generation(), 0);

    // It is registered: the first of two identities counts.
    let first = svid(ORDERS, &old.workload(ORDERS), &old.pem(), "");
    let other = svid(OPS, &old.workload(OPS), &old.pem(), "ops");
    agent.will_say(&says(&[first, other]));
    callee.ready().await;
    let view = callee.view("/identity").await;
    assert_eq!(view["id"], ORDERS, "{view}");
    assert_eq!(view["problem"], Value::Null, "{view}");
    let of_web = files(&old, "web");
    let yaml = mesh("Strict") + &orders(callee.inbound());
    let web = sidecar("web", &of_web, &yaml).start().await;
    assert_eq!(web.get("orders", "/").await.text(), "hello");

    // A renewal by another root, with both in the bundle; then a peer of the new root.
    let both = old.pem() + &new.pem();
    let renewed = svid(ORDERS, &new.workload(ORDERS), &both, "");
    agent.says(&says(std::slice::from_ref(&renewed)));
    until_true("the renewal", || callee.identity_generation() == 2).await;
    of_web.replace(&new.workload(WEB), &new.pem());
    until_true("the peer's", || web.identity_generation() == 2).await;
    assert_eq!(web.get("orders", "/").await.text(), "hello");

    // What is unusable changes nothing.
    let mut wrong = renewed.clone();
    wrong["id"] = json!(OPS);
    agent.says(&says(&[wrong]));
    problem(&callee, "is that of").await;
    assert_eq!(callee.identity_generation(), 2);
    agent.says(&says(&[]));
    problem(&callee, "no SVID").await;
    assert_eq!(web.get("orders", "/").await.text(), "hello");

    // The agent is gone, and so is the registration when it is back; what is in force stays.
    agent.process.take().unwrap().kill();
    problem(&callee, "Workload API").await;
    assert_eq!(web.get("orders", "/").await.text(), "hello");
    agent.will_say(&json!({"deny": "forgotten"}));
    agent.start_again();
    problem(&callee, "forgotten").await;
    callee.ready().await;
    assert_eq!(web.get("orders", "/").await.text(), "hello");
    agent.will_say(&says(&[svid(
        ORDERS,
        &new.workload(ORDERS),
        &new.pem(),
        "",
    )]));
    until_true("it is known again", || callee.identity_generation() == 3).await;
    let of_mailer = files(&old, "mailer");
    let mailer = sidecar("mailer", &of_mailer, &yaml).start().await;
    mailer
        .get("orders", "/")
        .await
        .assert_error(503, "tls_failed");
}

#[tokio::test]
async fn a_hint_chooses_among_several_identities() {
    let root = Authority::new("root");
    let app = Upstream::h1(|_| Reply::ok("hello")).await;
    let other = svid(OPS, &root.workload(OPS), &root.pem(), "ops");
    let agent = Agent::start(&says(std::slice::from_ref(&other)));
    let yaml = mesh("Strict") + &orders(app.addr);
    let callee = of_agent(&agent.socket(), json!({"hint": "shop"}), &yaml)
        .app(app.addr)
        .start_unready()
        .await;
    problem(&callee, "no SVID with the hint shop").await;
    let hinted = svid(ORDERS, &root.workload(ORDERS), &root.pem(), "shop");
    agent.says(&says(&[other, hinted]));
    callee.ready().await;
    assert_eq!(callee.view("/identity").await["id"], ORDERS);
}
