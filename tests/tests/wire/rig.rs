//! A sidecar before an origin that remembers, and how a case is shown to have left no trace.

use std::future::Future;

use outrigger_tests::mesh::{Sidecar, route, service};
use outrigger_tests::raw::{Caller, Forwarded, Message, Origin, Reply};
use serde_json::json;

/// Nothing opens, nobody is ejected, and nothing is tried twice.
pub(crate) const CALM: &str = "breaker: {consecutiveFailures: 0, failureRate: {percent: 100, minRequests: 1000000, window: 10s}}\n\
    ejection: {consecutiveFailures: 0}";

/// The fields that Outrigger adds to every request.
const ADDED: [&str; 4] = [
    "x-request-id",
    "x-forwarded-proto",
    "outrigger-attempt",
    "outrigger-deadline-ms",
];

/// What a table found wrong, told at its end.
#[derive(Default)]
pub(crate) struct Failures(Vec<String>);

impl Failures {
    pub(crate) fn add(&mut self, case: &str, what: impl std::fmt::Display) {
        self.0.push(format!("{case}: {what}"));
    }

    pub(crate) fn check(&mut self, case: &str, holds: bool, what: impl std::fmt::Display) {
        if !holds {
            self.add(case, what);
        }
    }

    pub(crate) fn take(&mut self, other: Self) {
        self.0.extend(other.0);
    }

    pub(crate) fn finish(self) {
        let Self(all) = self;
        assert!(all.is_empty(), "{} wrong:\n{}", all.len(), all.join("\n"));
    }
}

/// A sidecar before an origin.
pub(crate) struct Rig {
    pub origin: Origin,
    pub sidecar: Sidecar,
}

impl Rig {
    /// The origin tells method and target of each request.
    pub(crate) async fn telling() -> Self {
        Self::before(Origin::telling().await, "{retry: {attempts: 0}}").await
    }

    /// Before this origin, with one rule.
    pub(crate) async fn before(origin: Origin, rule: &str) -> Self {
        let yaml = service("orders", &[origin.addr], CALM) + &route("orders", &[rule]);
        let sidecar = Sidecar::named("web-1")
            .mesh(yaml)
            .set("wire", json!({"headerTimeout": "500ms"}))
            .start()
            .await;
        Self { origin, sidecar }
    }

    pub(crate) async fn caller(&self) -> Caller {
        Caller::connect(self.sidecar.outbound()).await
    }

    /// Runs a case, and then a plain request on a connection of its own, which must get its own
    /// answer. Returns what reached the origin meanwhile, but for that request.
    pub(crate) async fn around<F>(
        &self,
        name: &str,
        wrong: &mut Failures,
        case: F,
    ) -> Vec<Forwarded>
    where
        F: Future<Output = ()>,
    {
        let before = self.origin.seen().len();
        case.await;
        let target = format!("/probe-{name}");
        let mut caller = self.caller().await;
        caller.send(get(&target)).await;
        let answer = caller.answer("GET").await;
        let told = answer.as_ref().map(|reply| reply.message.text());
        let own = told.as_deref() == Ok(&*format!("GET {target}"));
        wrong.check(name, own, format!("the next request: {answer:?}"));
        let mut seen = self.origin.seen().split_off(before);
        seen.retain(|seen| seen.message.head.second() != target);
        for what in self.origin.malformed() {
            wrong.add(name, format!("the origin was sent {what}"));
        }
        seen
    }

    /// `outrigger_requests_total` with this code.
    pub(crate) async fn counted(&self, code: &str) -> f64 {
        let scrape = self.sidecar.metrics().await;
        scrape.sum("outrigger_requests_total", &[("code", code)])
    }
}

/// A plain GET.
pub(crate) fn get(target: &str) -> Vec<u8> {
    format!("GET {target} HTTP/1.1\r\nHost: orders\r\n\r\n").into_bytes()
}

/// What a message says, in one line: its first line, its fields by name without those that
/// Outrigger adds, its body and its trailers. Fields of one name keep their order.
pub(crate) fn told(message: &Message) -> String {
    let mut fields = message.head.fields.clone();
    fields.retain(|(name, _)| !ADDED.contains(&name.as_str()));
    fields.sort_by(|(one, _), (other, _)| one.cmp(other));
    let mut text = message.head.line.escape_ascii().to_string();
    for (name, value) in &fields {
        text.push_str(&format!(" | {name}: {}", value.escape_ascii()));
    }
    text.push_str(&format!(" || {}", message.body.escape_ascii()));
    for (name, value) in &message.trailers {
        text.push_str(&format!(" || {name}: {}", value.escape_ascii()));
    }
    text
}

/// Whether it is our refusal, told whole.
pub(crate) fn is_error(reply: &Reply, status: u16, code: &str) -> Result<(), String> {
    let whole = reply.cut.is_none();
    let typed = reply.message.head.get("content-type") == "application/problem+json";
    let named = reply
        .message
        .text()
        .contains(&format!(r#""code":"{code}""#));
    if reply.status() == status && reply.code() == code && whole && typed && named {
        return Ok(());
    }
    Err(format!("not {status} {code} but {reply:?}"))
}
