//! The tour: what Outrigger promises, shown with real traffic and checked.
//!
//! Every step says what happened, or what was expected and what came instead. Waiting is for a
//! condition with a deadline, never for time to pass.

use std::future::Future;
use std::time::Duration;

use bytes::Bytes;
use http::Method;
use serde_json::{Value, json};
use tokio::time::sleep;

use super::children::Children;
use super::services::{Mailer, Orders, Seen};
use super::stage::{Stage, TRUST_DOMAIN};
use crate::client::{Answer, send};
use crate::clock;
use crate::output::{cell, items};

/// What a step leads to: one line, either way.
pub(super) type Outcome = Result<String, String>;

/// Longer than anything of the tour takes on a busy machine.
const SOON: Duration = Duration::from_secs(15);

/// Everything that the steps act on.
#[derive(Debug)]
pub(super) struct Tour {
    pub(super) stage: Stage,
    pub(super) children: Children,
    pub(super) orders: Orders,
    pub(super) mailer: Mailer,
}

/// The steps, in their order.
pub(super) const STEPS: [&str; 8] = [
    "a call through two sidecars",
    "mTLS between all of them",
    "a retried call",
    "a breaker opens and recovers",
    "202 now, delivered later",
    "a dead letter is replayed",
    "a route changes live",
    "kill -9 loses no message",
];

impl Tour {
    /// Plays one step.
    pub(super) async fn step(&mut self, at: usize) -> Outcome {
        match at {
            0 => self.sync_call().await,
            1 => self.mutual_tls().await,
            2 => self.retried_call().await,
            3 => self.breaker().await,
            4 => self.deliver_later().await,
            5 => self.dead_letter().await,
            6 => self.live_edit().await,
            _ => self.kill_and_restart().await,
        }
    }

    /// Waits until every process is ready and knows the config and each other.
    pub(super) async fn ready(&mut self) -> Result<(), String> {
        let control = self.stage.control.to_string();
        self.up("the control plane", &control).await?;
        for (name, place) in [
            ("web", self.stage.web),
            ("orders", self.stage.orders),
            ("mailer", self.stage.mailer),
        ] {
            self.up(name, &place.admin.to_string()).await?;
        }
        until("three sidecars in sync", async || {
            let proxies = get(&control, "/v1/proxies").await?;
            let synced = items(&proxies["proxies"])
                .iter()
                .filter(|proxy| proxy["synced"] == true);
            holds(synced.count() == 3, || {
                format!("GET /v1/proxies: {proxies}")
            })
        })
        .await?;
        let admin = self.web_admin();
        until("mailer's registration at web's sidecar", async || {
            let endpoints = get(&admin, "/endpoints").await?;
            let mailer = items(&endpoints["services"])
                .iter()
                .find(|service| service["service"] == "shop/mailer");
            let known = mailer.is_some_and(|service| !items(&service["endpoints"]).is_empty());
            holds(known, || format!("GET /endpoints: {endpoints}"))
        })
        .await
    }

    /// Waits for a process, but not for one that has ended.
    async fn up(&mut self, name: &str, admin: &str) -> Result<(), String> {
        let deadline = clock::now() + SOON;
        loop {
            self.children.all_run()?;
            let answer = send(admin, Method::GET, "/readyz", &[], Bytes::new()).await;
            if answer
                .as_ref()
                .is_ok_and(|answer| answer.status.is_success())
            {
                return Ok(());
            }
            if clock::now() > deadline {
                let came = answer.map_or_else(|problem| problem, |answer| answer.text());
                return Err(format!("{name} is not ready after 15s: {}", came.trim()));
            }
            sleep(Duration::from_millis(20)).await;
        }
    }

    async fn sync_call(&mut self) -> Outcome {
        let (web, orders) = (self.web_admin(), self.stage.orders.admin.to_string());
        let requests = "outrigger_requests_total";
        let out = [
            ("direction", "outbound"),
            ("service", "shop/orders"),
            ("status", "200"),
        ];
        let inward = [("direction", "inbound"), ("status", "200")];
        let before = (
            metric(&web, requests, &out).await?,
            metric(&orders, requests, &inward).await?,
        );
        self.orders.take();
        let began = clock::now();
        let entrance = self.stage.web.inbound.to_string();
        let answer = send(
            &entrance,
            Method::GET,
            "/orders/7",
            &[("host", "web")],
            Bytes::new(),
        )
        .await?;
        let took = clock::now() - began;
        status(&answer, 200)?;
        let body = answer.json();
        expect(body["path"] == "/orders/7", "orders' own answer", || {
            answer.text()
        })?;
        let seen = self.orders.take();
        expect(seen.len() == 1, "one request at orders", || {
            format!("{}", seen.len())
        })?;
        let id = seen[0].header("x-request-id").to_owned();
        expect(!id.is_empty(), "a request id at orders", || {
            format!("{:?}", seen[0].headers)
        })?;
        until("both sidecars counting the request", async || {
            let after = (
                metric(&web, requests, &out).await?,
                metric(&orders, requests, &inward).await?,
            );
            holds(
                after.0 >= before.0 + 1.0 && after.1 >= before.1 + 1.0,
                || format!("{requests} went from {before:?} to {after:?}"),
            )
        })
        .await?;
        Ok(format!(
            "web > sidecar > sidecar > orders: 200 in {:.1}ms, counted by both",
            took.as_secs_f64() * 1e3
        ))
    }

    /// Each sidecar has its own certificate of the control plane's authority; orders and mailer
    /// hear who calls, and take no plaintext.
    async fn mutual_tls(&mut self) -> Outcome {
        let id = |name: &str| format!("spiffe://{TRUST_DOMAIN}/ns/shop/sa/{name}");
        let places = [
            ("web", self.stage.web),
            ("orders", self.stage.orders),
            ("mailer", self.stage.mailer),
        ];
        for (name, place) in places {
            let identity = get(&place.admin.to_string(), "/identity").await?;
            expect(identity["id"] == id(name), &id(name), || {
                identity.to_string()
            })?;
        }
        let authority = get(&self.stage.control.to_string(), "/v1/ca").await?;
        let issued = authority["issued"].as_u64().unwrap_or(0);
        expect(issued >= 3, "3 certificates issued", || {
            authority.to_string()
        })?;
        self.orders.take();
        let answer = self
            .call(Method::GET, "orders", "/orders/7", &[], "")
            .await?;
        status(&answer, 200)?;
        let seen = self.orders.take();
        let caller = seen
            .first()
            .map(|seen| seen.header("x-forwarded-client-cert"));
        let caller = caller.unwrap_or_default();
        expect(
            caller.ends_with(&format!(";URI={}", id("web"))),
            "orders to hear that web calls",
            || format!("x-forwarded-client-cert: {caller}"),
        )?;
        for (name, place) in &places[1..] {
            let inbound = place.inbound.to_string();
            let host = [("host", *name)];
            let plain = send(&inbound, Method::GET, "/", &host, Bytes::new()).await;
            expect(
                plain.is_err(),
                &format!("{name}'s sidecar to refuse plaintext"),
                || format!("{plain:?}"),
            )?;
        }
        Ok(format!(
            "3 sidecars, {issued} certificates of {TRUST_DOMAIN}; orders hears that web calls, plaintext is refused"
        ))
    }

    async fn retried_call(&mut self) -> Outcome {
        let admin = self.web_admin();
        let retried = [("service", "shop/orders"), ("outcome", "retried")];
        let before = metric(&admin, "outrigger_retries_total", &retried).await?;
        self.orders.take();
        self.orders.fail(1);
        let get = self
            .call(Method::GET, "orders", "/orders/7", &[], "")
            .await?;
        status(&get, 200)?;
        let seen = self.orders.take();
        expect(seen.len() == 2, "2 tries at orders for the GET", || {
            format!("{}", seen.len())
        })?;
        expect(
            seen[0].path == seen[1].path,
            "the same request twice",
            || format!("{seen:?}"),
        )?;
        let after = metric(&admin, "outrigger_retries_total", &retried).await?;
        let moved = || format!("from {before} to {after}");
        expect(
            after == before + 1.0,
            "outrigger_retries_total{outcome=\"retried\"} to move by 1",
            moved,
        )?;
        self.orders.fail(1);
        let post = self
            .call(Method::POST, "orders", "/orders", &[], "{}")
            .await?;
        self.orders.fail(0);
        status(&post, 503)?;
        let ours = post.header("outrigger-error");
        expect(ours.is_empty(), "the application's own 503", || {
            format!("outrigger-error: {ours}")
        })?;
        let seen = self.orders.take();
        expect(seen.len() == 1, "1 try at orders for the POST", || {
            format!("{}", seen.len())
        })?;
        Ok(
            "GET failed once: caller saw 200, orders saw 2; POST without a key: 503, sent once"
                .to_owned(),
        )
    }

    async fn breaker(&mut self) -> Outcome {
        let admin = self.web_admin();
        let service = [("service", "shop/orders")];
        status(
            &self
                .call(Method::GET, "orders", "/orders/1", &[], "")
                .await?,
            200,
        )?;
        self.orders.take();
        self.orders.fail(u32::MAX);
        for _ in 0..5 {
            status(
                &self
                    .call(Method::POST, "orders", "/orders", &[], "{}")
                    .await?,
                503,
            )?;
        }
        let opened = clock::now();
        let refused = self
            .call(Method::POST, "orders", "/orders", &[], "{}")
            .await?;
        status(&refused, 503)?;
        let code = refused.header("outrigger-error");
        expect(
            code == "circuit_open",
            "outrigger-error: circuit_open",
            || format!("{:?}", refused.headers),
        )?;
        let after = refused.header("retry-after");
        expect(!after.is_empty(), "Retry-After", || {
            format!("{:?}", refused.headers)
        })?;
        let seen = self.orders.take();
        expect(seen.len() == 5, "orders to see 5 of 6 requests", || {
            format!("{}", seen.len())
        })?;
        let state = metric(&admin, "outrigger_breaker_state", &service).await?;
        expect(state == 2.0, "outrigger_breaker_state 2 (open)", || {
            state.to_string()
        })?;
        self.orders.fail(0);
        until("a call that is let through again", async || {
            let answer = self
                .call(Method::GET, "orders", "/orders/1", &[], "")
                .await?;
            status(&answer, 200)
        })
        .await?;
        let recovered = clock::short(clock::now() - opened);
        until("outrigger_breaker_state 0 (closed)", async || {
            let state = metric(&admin, "outrigger_breaker_state", &service).await?;
            holds(state == 0.0, || state.to_string())
        })
        .await?;
        Ok(format!(
            "5 failures opened it: 503 circuit_open without a hit; closed again after {recovered}"
        ))
    }

    async fn deliver_later(&mut self) -> Outcome {
        self.mailer.stop().await;
        let body: Vec<u8> = (0..=255).collect();
        let began = clock::now();
        let headers = [
            ("prefer", "respond-async"),
            ("content-type", "application/octet-stream"),
        ];
        let accepted = self
            .call(
                Method::POST,
                "mailer",
                "/mails?a=%20b",
                &headers,
                body.clone(),
            )
            .await?;
        let took = clock::now() - began;
        let (id, location) = receipt(&accepted)?;
        let waiting = until("a message that waits for its target", async || {
            let view = self.message(&location, "").await?;
            holds(view["status"] == "waiting", || {
                format!("GET {location}: {view}")
            })
            .map(|()| view)
        })
        .await?;
        let spent = waiting["attemptsSpent"].as_u64().unwrap_or(u64::MAX);
        expect(spent < 8, "attempts left of 8", || waiting.to_string())?;
        self.mailer.start().await?;
        let done = self.succeeded(&location).await?;
        let delivered: Vec<Seen> = self.of(&id);
        expect(delivered.len() == 1, "one delivery to mailer", || {
            format!("{}", delivered.len())
        })?;
        let got = &delivered[0];
        expect(got.body == body, "the body byte for byte", || {
            format!("{:?}", got.body)
        })?;
        expect(
            got.path == "/mails?a=%20b",
            "the path as it was sent",
            || got.path.clone(),
        )?;
        let key = got.header("idempotency-key");
        expect(key == id, "the message's id as Idempotency-Key", || {
            key.to_owned()
        })?;
        expect(
            got.header("prefer").is_empty(),
            "no Prefer at mailer",
            || format!("{:?}", got.headers),
        )?;
        let result = self
            .call(
                Method::GET,
                "mailer",
                &format!("{location}/result"),
                &[],
                "",
            )
            .await?;
        status(&result, 201)?;
        expect(
            result.json()["sent"] == id.as_str(),
            "mailer's own answer as the result",
            || result.text(),
        )?;
        let tries = items(&done["attempts"]).len();
        Ok(format!(
            "202 in {:.1}ms while mailer was down, waiting with {spent} of 8 attempts spent; delivered at try {tries}",
            took.as_secs_f64() * 1e3
        ))
    }

    async fn dead_letter(&mut self) -> Outcome {
        let before = self.mailer.seen().len();
        let headers = [
            ("prefer", "respond-async"),
            ("content-type", "application/json"),
        ];
        let accepted = self
            .call(
                Method::POST,
                "mailer",
                "/mails",
                &headers,
                "{\"to\": \"nowhere\"}",
            )
            .await?;
        let (id, location) = receipt(&accepted)?;
        let dead = until("a dead letter at the first 400", async || {
            let view = self.message(&location, "").await?;
            holds(view["status"] == "dead", || {
                format!("GET {location}: {view}")
            })
            .map(|()| view)
        })
        .await?;
        let tries = self.mailer.seen().len() - before;
        expect(tries == 1, "one delivery", || format!("{tries}: {dead}"))?;
        let list = self.command(&["dlq", "ls", "--queue", "mail"]).await?;
        let letter = items(&list["dead"])
            .iter()
            .find(|letter| letter["id"] == id.as_str());
        let letter =
            letter.ok_or_else(|| format!("expected {id} in `outrigger dlq ls`, got {list}"))?;
        expect(letter["lastStatus"] == 400, "last status 400", || {
            letter.to_string()
        })?;
        let reason = cell(&letter["reason"]);
        let shown = self.command(&["dlq", "show", &id]).await?;
        let body = &shown["request"]["body"]["data"];
        expect(
            *body == "{\"to\": \"nowhere\"}",
            "the whole request in `dlq show`",
            || shown.to_string(),
        )?;
        let why = cell(&shown["lastBody"]["data"]);
        expect(
            why.contains("has an @"),
            "mailer's reason in `dlq show`",
            || shown.to_string(),
        )?;
        self.mailer.fix();
        let replayed = self.command(&["dlq", "replay", &id]).await?;
        expect(
            replayed["replayed"] == json!([id]),
            "it to be replayed",
            || replayed.to_string(),
        )?;
        let done = self.succeeded(&location).await?;
        expect(done["replays"] == 1, "1 replay in its status", || {
            done.to_string()
        })?;
        self.conserved().await?;
        Ok(format!(
            "mailer answered 400: dead at once ({reason}); fixed, `outrigger dlq replay`, delivered"
        ))
    }

    async fn live_edit(&mut self) -> Outcome {
        let control = self.stage.control.to_string();
        let before = self.call(Method::GET, "orders", "/beta", &[], "").await?;
        status(&before, 404)?;
        let code = before.header("outrigger-error");
        expect(code == "no_route", "outrigger-error: no_route", || {
            format!("{:?}", before.headers)
        })?;
        let old = get(&control, "/v1/config").await?["version"].clone();
        let good = self.stage.mesh().replace(
            "  rules:\n  - name: orders\n",
            "  rules:\n  - name: beta\n    matches: [{path: {type: Exact, value: /beta}}]\n  - name: orders\n",
        );
        let began = clock::now();
        self.stage.edit(&good)?;
        until("GET /beta to be 200", async || {
            status(
                &self.call(Method::GET, "orders", "/beta", &[], "").await?,
                200,
            )
        })
        .await?;
        let took = clock::now() - began;
        expect(
            took < Duration::from_secs(5),
            "the change within seconds",
            || clock::short(took),
        )?;
        let new = get(&control, "/v1/config").await?["version"].clone();
        expect(new != old, "a new config version", || new.to_string())?;

        let broken = good.replace("perTry:", "perTri:");
        let line = broken
            .lines()
            .position(|line| line.contains("perTri"))
            .map_or(0, |at| at + 1);
        self.stage.edit(&broken)?;
        let problem = until("the broken edit to be refused", async || {
            status(
                &self.call(Method::GET, "orders", "/beta", &[], "").await?,
                200,
            )?;
            let config = get(&control, "/v1/config").await?;
            let problems = items(&config["rejected"]["problems"]);
            let found = problems
                .iter()
                .find(|problem| problem["line"] == line)
                .cloned();
            found.ok_or_else(|| format!("no problem in line {line}: {}", config["rejected"]))
        })
        .await?;
        let kept = get(&control, "/v1/config").await?["version"].clone();
        expect(kept == new, "the last good config in force", || {
            kept.to_string()
        })?;
        status(
            &self.call(Method::GET, "orders", "/beta", &[], "").await?,
            200,
        )?;
        self.stage.edit(&good)?;
        until("the repaired config to be taken", async || {
            let config = get(&control, "/v1/config").await?;
            holds(config["rejected"].is_null(), || {
                config["rejected"].to_string()
            })
        })
        .await?;
        let place = format!("shop.yaml:{}:{}", problem["line"], problem["column"]);
        Ok(format!(
            "pushed and in effect after {}; a typo is refused at {place}, traffic goes on",
            clock::short(took)
        ))
    }

    async fn kill_and_restart(&mut self) -> Outcome {
        self.mailer.stop().await;
        let mut receipts = Vec::new();
        for n in 0..3 {
            let body = format!("{{\"to\": \"customer-{n}@example.com\"}}");
            let headers = [
                ("prefer", "respond-async"),
                ("content-type", "application/json"),
            ];
            let accepted = self
                .call(Method::POST, "mailer", "/mails", &headers, body.clone())
                .await?;
            receipts.push((receipt(&accepted)?, body));
        }
        let id = self.children.id("web");
        self.children.kill("web")?;
        self.mailer.start().await?;
        self.children.start_again("web")?;
        let began = clock::now();
        let admin = self.web_admin();
        self.up("web", &admin).await?;
        for ((id, location), body) in &receipts {
            self.succeeded(location).await?;
            let got = self.of(id);
            let same = !got.is_empty() && got.iter().all(|seen| seen.body == body.as_bytes());
            expect(same, "every message at mailer", || format!("{id}: {got:?}"))?;
        }
        let took = clock::short(clock::now() - began);
        self.conserved().await?;
        Ok(format!(
            "3 times 202, kill -9 of web's sidecar (process {id}); all 3 delivered {took} after the restart"
        ))
    }

    fn web_admin(&self) -> String {
        self.stage.web.admin.to_string()
    }

    /// A call of the application `web`: through its sidecar, by the service's name.
    async fn call(
        &self,
        method: Method,
        service: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: impl Into<Bytes>,
    ) -> Result<Answer, String> {
        let outbound = self.stage.web.outbound.to_string();
        let mut all = vec![("host", service)];
        all.extend_from_slice(headers);
        send(&outbound, method, path, &all, body.into()).await
    }

    async fn message(&self, location: &str, prefer: &str) -> Result<Value, String> {
        let answer = self
            .call(Method::GET, "mailer", location, &[("prefer", prefer)], "")
            .await?;
        status(&answer, 200)?;
        Ok(answer.json())
    }

    async fn succeeded(&self, location: &str) -> Result<Value, String> {
        until("the message to be delivered", async || {
            let view = self.message(location, "wait=5").await?;
            holds(view["status"] == "succeeded", || {
                format!("GET {location}: {view}")
            })
            .map(|()| view)
        })
        .await
    }

    /// The deliveries of a message to mailer.
    fn of(&self, id: &str) -> Vec<Seen> {
        let mut seen = self.mailer.seen();
        seen.retain(|seen| seen.header("idempotency-key") == id);
        seen
    }

    /// No message was lost or made up.
    async fn conserved(&self) -> Result<(), String> {
        let queue = [("queue", "shop/mail")];
        until("outrigger_queue_conservation_drift 0", async || {
            let drift = "outrigger_queue_conservation_drift";
            let drift = metric(&self.web_admin(), drift, &queue).await?;
            holds(drift == 0.0, || drift.to_string())
        })
        .await
    }

    /// What `outrigger …` answers in JSON, as a program of its own.
    async fn command(&self, words: &[&str]) -> Result<Value, String> {
        let mut words: Vec<String> = words.iter().map(|&word| word.to_owned()).collect();
        words.extend(["--output", "json", "--admin"].map(str::to_owned));
        words.push(format!("http://{}", self.web_admin()));
        let shown = words.join(" ");
        let ran = tokio::task::spawn_blocking(move || {
            std::process::Command::new(std::env::current_exe()?)
                .args(words)
                .output()
        });
        let output = match ran.await {
            Ok(Ok(output)) => output,
            Ok(Err(error)) => return Err(format!("outrigger {shown}: {error}")),
            Err(error) => return Err(format!("outrigger {shown}: {error}")),
        };
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        expect(
            output.status.success(),
            &format!("`outrigger {shown}` to succeed"),
            || said,
        )?;
        serde_json::from_slice(&output.stdout)
            .map_err(|error| format!("outrigger {shown}: {error}"))
    }
}

/// The id and the status URL of a call that became a message.
fn receipt(answer: &Answer) -> Result<(String, String), String> {
    status(answer, 202)?;
    let (id, location) = (
        answer.header("outrigger-message-id"),
        answer.header("location"),
    );
    let applied = answer.header("preference-applied");
    let whole = !id.is_empty() && location.ends_with(id) && applied.contains("respond-async");
    expect(
        whole,
        "Location, the message's id and Preference-Applied",
        || format!("{:?}", answer.headers),
    )?;
    Ok((id.to_owned(), location.to_owned()))
}

fn status(answer: &Answer, expected: u16) -> Result<(), String> {
    expect(
        answer.status == expected,
        &format!("status {expected}"),
        || {
            let code = answer.header("outrigger-error");
            format!("{} {code} {}", answer.status.as_u16(), answer.text().trim())
        },
    )
}

fn expect(holds: bool, what: &str, came: impl FnOnce() -> String) -> Result<(), String> {
    if holds {
        Ok(())
    } else {
        Err(format!("expected {what}, got {}", came()))
    }
}

fn holds(holds: bool, came: impl FnOnce() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(came()) }
}

/// Asks again until it holds; after 15 s, what came last.
async fn until<T, R>(what: &str, ask: impl Fn() -> R) -> Result<T, String>
where
    R: Future<Output = Result<T, String>>,
{
    let deadline = clock::now() + SOON;
    loop {
        match ask().await {
            Ok(value) => return Ok(value),
            Err(came) if clock::now() > deadline => {
                return Err(format!("expected {what} within 15s, got {came}"));
            }
            Err(_) => sleep(Duration::from_millis(20)).await,
        }
    }
}

async fn get(address: &str, path: &str) -> Result<Value, String> {
    let answer = send(address, Method::GET, path, &[], Bytes::new()).await?;
    status(&answer, 200).map_err(|problem| format!("GET http://{address}{path}: {problem}"))?;
    Ok(answer.json())
}

/// The sum of the series of a metric that have these labels; 0 when there is none.
async fn metric(admin: &str, name: &str, labels: &[(&str, &str)]) -> Result<f64, String> {
    let answer = send(admin, Method::GET, "/metrics", &[], Bytes::new()).await?;
    status(&answer, 200)?;
    Ok(sum(&answer.text(), name, labels))
}

fn sum(text: &str, name: &str, labels: &[(&str, &str)]) -> f64 {
    let wanted: Vec<String> = labels
        .iter()
        .map(|(label, value)| format!("{label}=\"{value}\""))
        .collect();
    let series = text
        .lines()
        .filter_map(|line| line.strip_prefix(name)?.strip_prefix('{'));
    let values = series.filter_map(|line| {
        let (labels, value) = line.rsplit_once("} ")?;
        wanted
            .iter()
            .all(|wanted| labels.contains(wanted))
            .then(|| value.parse::<f64>().ok())?
    });
    values.sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn series_are_summed_by_their_labels() {
        let text = "# HELP a_total x\na_total{s=\"1\",t=\"x\"} 2\na_total{s=\"1\",t=\"y\"} 3\n\
                    a_total{s=\"2\"} 5\na_totals{s=\"1\"} 7\n";
        assert_eq!(sum(text, "a_total", &[("s", "1")]), 5.0);
        assert_eq!(sum(text, "a_total", &[("s", "1"), ("t", "y")]), 3.0);
        assert_eq!(sum(text, "a_total", &[("s", "9")]), 0.0);
    }
}
