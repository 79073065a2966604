//! `outrigger explain`: which service and rule take a request, why no other, and what applies.
//!
//! Asks the same functions as the sidecar: the host index, the compiled matches and the effective
//! values of the config crate. The config is a file's, or the one in force in a sidecar.

use std::fmt::Write as _;
use std::path::PathBuf;

use clap::Args;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Uri};
use outrigger_config::effective::{
    Limit, Origin, RulePolicy, ServicePolicy, Setting, connect_timeout,
};
use outrigger_config::model::AsyncWhen;
use outrigger_config::units::{ByteSize, Dur};
use outrigger_config::{MeshConfig, NamespacedName, RuleRef, Source, load, read_sources};
use outrigger_core::host::normalize_host;
use outrigger_core::retry::is_idempotent;
use outrigger_core::route::{RequestView, RuleSet, Verdict};
use outrigger_proxy::snapshot::compile::matches;
use serde_json::{Value, json};

use crate::client::Client;
use crate::output::{Failure, Format, items, print_as, table};
use crate::status::address_of;

/// The request, and where the config is.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// The method
    method: String,
    /// What the application calls, such as http://orders/v1/orders?x=1
    url: String,
    /// A header of the request, name:value
    #[arg(long, short = 'H', value_name = "NAME:VALUE")]
    header: Vec<String>,
    /// Mesh config: a file or a directory
    #[arg(long, short, value_name = "PATH", conflicts_with = "admin")]
    file: Option<PathBuf>,
    /// The config in force in a sidecar [default address: OUTRIGGER_ADMIN or http://127.0.0.1:15020]
    #[arg(long, value_name = "URL", num_args = 0..=1)]
    admin: Option<Option<String>>,
    /// The namespace of the caller
    #[arg(long, default_value = "default")]
    namespace: String,
}

pub(crate) async fn run(options: Options, format: Format) -> Result<(), Failure> {
    let config = config(&options).await?;
    let request = Request::read(&options)?;
    let explained = explain(&config, &request, &options.namespace)?;
    let chosen = explained["rule"].is_string();
    print_as(format, &explained, render);
    match chosen {
        true => Ok(()),
        false => Err(Failure::errors(
            "no rule takes this request: it is answered 404 no_route",
        )),
    }
}

async fn config(options: &Options) -> Result<MeshConfig, Failure> {
    let sources = match &options.file {
        Some(path) => read_sources(path).map_err(|error| {
            Failure::unusable(format!("cannot read {}: {error}", path.display()))
        })?,
        None => {
            let address = address_of(options.admin.clone().flatten());
            let config = Client::admin(&address)?.get("/config").await?;
            let document = |document: &Value| {
                let name = document["name"].as_str().unwrap_or("document");
                Source::new(name, document["content"].to_string())
            };
            items(&config["documents"]).iter().map(document).collect()
        }
    };
    let loaded = load(&sources);
    loaded.mesh.ok_or_else(|| {
        let (problems, summary) = (loaded.report.render_text(), loaded.report.summary());
        Failure::errors(format!("the config has errors\n{problems}{summary}"))
    })
}

/// A request as a rule sees it.
struct Request {
    method: Method,
    uri: Uri,
    host: String,
    headers: HeaderMap,
}

impl Request {
    fn read(options: &Options) -> Result<Self, Failure> {
        let method: Method = (options.method.parse())
            .map_err(|_| Failure::errors(format!("{}: not a method", options.method)))?;
        let url = match options.url.contains("://") {
            true => options.url.clone(),
            false => format!("http://{}", options.url),
        };
        let bad = |problem: &str| Failure::errors(format!("{}: {problem}", options.url));
        let uri: Uri = url.parse().map_err(|_| bad("not a URL"))?;
        let authority = uri.authority().ok_or_else(|| bad("no host in it"))?;
        let host = normalize_host(authority.as_str())
            .ok_or_else(|| bad("not a host"))?
            .into_owned();
        let mut headers = HeaderMap::new();
        for header in &options.header {
            let bad = || Failure::errors(format!("{header}: expected name:value"));
            let (name, value) = header.split_once(':').ok_or_else(bad)?;
            let name: HeaderName = name.trim().parse().map_err(|_| bad())?;
            let value: HeaderValue = value.trim().parse().map_err(|_| bad())?;
            headers.append(name, value);
        }
        Ok(Self {
            method,
            uri,
            host,
            headers,
        })
    }

    fn view(&self) -> RequestView<'_> {
        RequestView {
            method: &self.method,
            host: &self.host,
            path: self.uri.path(),
            query: self.uri.query(),
            headers: &self.headers,
        }
    }
}

fn explain(config: &MeshConfig, request: &Request, namespace: &str) -> Result<Value, Failure> {
    let hosts = config.host_index(namespace);
    let Some(name) = hosts.get(&request.host) else {
        let known: Vec<&str> = hosts.keys().map(String::as_str).collect();
        return Err(Failure::errors(format!(
            "no service is called {} from namespace {namespace} (404 no_route); known: {}",
            request.host,
            if known.is_empty() {
                "none".to_owned()
            } else {
                known.join(", ")
            }
        )));
    };
    let rules = config.rules_for_service(name);
    let compiled = rules
        .iter()
        .map(|rule| matches(&rule.rule.matches))
        .collect();
    let mut considered = Vec::new();
    let mut chosen = None;
    for one in RuleSet::new(compiled).explain(&request.view()) {
        let rule = rules[one.rule];
        let verdict = match one.verdict {
            Verdict::Chosen => {
                chosen = Some(rule);
                "chosen".to_owned()
            }
            Verdict::LowerPrecedence => {
                "matches too; the one above is more specific or earlier".to_owned()
            }
            Verdict::Missed(reason) => reason.to_string(),
        };
        considered.push(json!({
            "rule": rule.route_name(), "match": one.match_index, "verdict": verdict,
        }));
    }
    let without_rules = rules.is_empty() && !config.has_route(name);
    let (rule_name, policy) = match chosen {
        Some(rule) => (rule.route_name(), config.rule_policy(rule)),
        None if without_rules => ("the defaults".to_owned(), config.default_rule_policy()),
        None => {
            return Ok(
                json!({"service": name.to_string(), "rule": null, "considered": considered}),
            );
        }
    };
    let backends = backends(chosen, name);
    let mut settings = Settings::default();
    settings.rule(&policy);
    let mut total = Vec::new();
    for (backend, weight) in &backends {
        let service = config.services.get(backend).cloned().unwrap_or_default();
        let applied = config.service_policy(&service);
        let connect = connect_timeout(&policy, &applied);
        settings.service(&backend.to_string(), &applied, &connect);
        total.push(json!({"service": backend.to_string(), "weight": weight}));
    }
    Ok(json!({
        "service": name.to_string(),
        "rule": rule_name,
        "considered": considered,
        "backends": total,
        "settings": settings.0,
        "upstreamAttempts": attempts(request, &policy),
    }))
}

fn backends(chosen: Option<RuleRef<'_>>, service: &NamespacedName) -> Vec<(NamespacedName, u32)> {
    let listed = chosen
        .map(|rule| rule.rule.backends.as_slice())
        .unwrap_or_default();
    if listed.is_empty() {
        return vec![(service.clone(), 1)];
    }
    listed
        .iter()
        .map(|one| (one.service.target(), one.weight.unwrap_or(1)))
        .collect()
}

/// How often an upstream can see the request at worst. A request that one sidecar retries is not
/// retried by the next, so hops do not multiply.
fn attempts(request: &Request, policy: &RulePolicy) -> Value {
    let sends = policy.retry.attempts.value.saturating_add(1);
    let grpc = (request.headers.get("content-type"))
        .is_some_and(|value| value.as_bytes().starts_with(b"application/grpc"));
    let repeatable = *policy.retry.unsafe_
        || (is_idempotent(&request.method) && !grpc)
        || request.headers.contains_key("idempotency-key");
    let queued = match *policy.async_.when {
        AsyncWhen::Never => false,
        AsyncWhen::Preferred => request.headers.get_all("prefer").iter().any(|value| {
            value
                .to_str()
                .is_ok_and(|text| text.contains("respond-async"))
        }),
        _ => true,
    };
    let why = match repeatable {
        true => "any retryable failure is tried again",
        false => {
            "only failures that surely did not reach the upstream are tried again: not idempotent, \
             no Idempotency-Key, retry.unsafe is false"
        }
    };
    json!({
        "sync": {"sends": sends, "reached": if repeatable { sends } else { 1 }, "why": why},
        "async": queued.then(|| json!({"deliveries": policy.async_.delivery.attempts.value})),
    })
}

/// Every value with its origin.
#[derive(Default)]
struct Settings(Vec<Value>);

impl Settings {
    fn add(&mut self, of: &str, name: &str, value: &dyn ToString, origin: &Origin) {
        let value = value.to_string();
        self.0
            .push(json!({"of": of, "name": name, "value": value, "origin": origin.to_string()}));
    }

    fn plain<T: ToString>(&mut self, of: &str, name: &str, setting: &Setting<T>) {
        self.add(of, name, &setting.value, &setting.origin);
    }

    fn word<T: std::fmt::Debug>(&mut self, of: &str, name: &str, setting: &Setting<T>) {
        self.add(of, name, &format!("{:?}", setting.value), &setting.origin);
    }

    fn list<T: ToString>(&mut self, of: &str, name: &str, setting: &Setting<Vec<T>>) {
        let words: Vec<String> = setting.value.iter().map(T::to_string).collect();
        let words = if words.is_empty() {
            "none".to_owned()
        } else {
            words.join(" ")
        };
        self.add(of, name, &words, &setting.origin);
    }

    fn option<T: ToString>(&mut self, of: &str, name: &str, setting: &Setting<Option<T>>) {
        let value = setting
            .value
            .as_ref()
            .map_or("none".to_owned(), T::to_string);
        self.add(of, name, &value, &setting.origin);
    }

    fn limit(&mut self, of: &str, name: &str, limit: &Limit) {
        let value = limit
            .value
            .map_or("none".to_owned(), |time| Dur(time).to_string());
        self.add(of, name, &value, &limit.origin);
    }

    fn time(&mut self, of: &str, name: &str, setting: &Setting<std::time::Duration>) {
        self.add(of, name, &Dur(setting.value), &setting.origin);
    }

    fn size(&mut self, of: &str, name: &str, setting: &Setting<u64>) {
        self.add(of, name, &ByteSize(setting.value), &setting.origin);
    }

    fn rule(&mut self, policy: &RulePolicy) {
        let of = "rule";
        let timeouts = &policy.timeouts;
        self.limit(of, "timeouts.request", &timeouts.request);
        self.limit(of, "timeouts.perTry", &timeouts.per_try);
        self.limit(of, "timeouts.idle", &timeouts.idle);
        self.limit(of, "timeouts.stream", &timeouts.stream);
        let retry = &policy.retry;
        self.plain(of, "retry.attempts", &retry.attempts);
        self.list(of, "retry.codes", &retry.codes);
        self.list(of, "retry.grpc", &retry.grpc);
        if !retry.conditions.is_empty() {
            self.word(of, "retry.conditions", &retry.conditions);
        }
        self.plain(of, "retry.unsafe", &retry.unsafe_);
        self.time(of, "retry.backoff", &retry.backoff);
        self.time(of, "retry.maxBackoff", &retry.max_backoff);
        self.size(of, "retry.maxBody", &retry.max_body);
        self.plain(of, "retry.budget.percent", &retry.budget_percent);
        self.plain(
            of,
            "retry.budget.minPerSecond",
            &retry.budget_min_per_second,
        );
        let limits = &policy.limits;
        if limits.max_in_flight.is_some() {
            self.option(of, "limits.maxInFlight", &limits.max_in_flight);
            self.plain(of, "limits.maxPending", &limits.max_pending);
            self.time(of, "limits.maxPendingWait", &limits.max_pending_wait);
        }
        if limits.max_request_body.is_some() {
            self.option(of, "limits.maxRequestBody", &limits.max_request_body);
        }
        self.asynchronous(policy);
    }

    fn asynchronous(&mut self, policy: &RulePolicy) {
        let of = "rule";
        let asynchronous = &policy.async_;
        self.word(of, "async.when", &asynchronous.when);
        if *asynchronous.when == AsyncWhen::Never {
            return;
        }
        self.option(of, "async.queue", &asynchronous.queue);
        self.size(of, "async.maxBody", &asynchronous.max_body);
        self.option(of, "async.orderingKey", &asynchronous.ordering_key);
        self.word(of, "async.onDead", &asynchronous.on_dead);
        let delivery = &asynchronous.delivery;
        self.plain(of, "async.delivery.attempts", &delivery.attempts);
        self.time(of, "async.delivery.backoff", &delivery.backoff);
        self.time(of, "async.delivery.maxBackoff", &delivery.max_backoff);
        self.limit(of, "async.delivery.maxAge", &delivery.max_age);
        self.limit(of, "async.delivery.timeout", &delivery.timeout);
        self.plain(of, "async.delivery.maxInFlight", &delivery.max_in_flight);
        self.option(
            of,
            "async.delivery.requestsPerSecond",
            &delivery.requests_per_second,
        );
        self.list(of, "async.permanent.codes", &asynchronous.permanent_codes);
        self.list(of, "async.permanent.except", &asynchronous.permanent_except);
        self.time(of, "async.resultTtl", &asynchronous.result_ttl);
        self.size(of, "async.resultMaxBody", &asynchronous.result_max_body);
        self.list(of, "async.subscribers", &asynchronous.subscribers);
        self.word(of, "async.secrets", &asynchronous.secrets);
    }

    fn service(&mut self, of: &str, policy: &ServicePolicy, connect: &Limit) {
        self.limit(of, "timeouts.connect", connect);
        self.word(
            of,
            "loadBalancer.algorithm",
            &policy.load_balancer.algorithm,
        );
        self.word(of, "loadBalancer.locality", &policy.load_balancer.locality);
        self.option(
            of,
            "connection.maxPerEndpoint",
            &policy.connection.max_per_endpoint,
        );
        self.limit(
            of,
            "connection.idleTimeout",
            &policy.connection.idle_timeout,
        );
        self.limit(of, "connection.maxAge", &policy.connection.max_age);
        self.plain(of, "limits.maxInFlight", &policy.limits.max_in_flight);
        self.plain(of, "limits.maxPending", &policy.limits.max_pending);
        self.time(of, "limits.maxPendingWait", &policy.limits.max_pending_wait);
        self.option(of, "limits.maxRequestBody", &policy.limits.max_request_body);
        let breaker = &policy.breaker;
        self.plain(
            of,
            "breaker.consecutiveFailures",
            &breaker.consecutive_failures,
        );
        self.plain(of, "breaker.failureRate.percent", &breaker.failure_percent);
        self.plain(of, "breaker.failureRate.minRequests", &breaker.min_requests);
        self.time(of, "breaker.failureRate.window", &breaker.window);
        self.time(of, "breaker.openFor", &breaker.open_for);
        self.time(of, "breaker.maxOpenFor", &breaker.max_open_for);
        self.plain(of, "breaker.halfOpenRequests", &breaker.half_open_requests);
        self.list(of, "breaker.failureOn.codes", &breaker.failure_on.codes);
        let ejection = &policy.ejection;
        self.plain(
            of,
            "ejection.consecutiveFailures",
            &ejection.consecutive_failures,
        );
        self.time(of, "ejection.baseTime", &ejection.base_time);
        self.plain(of, "ejection.maxPercent", &ejection.max_percent);
    }
}

fn render(explained: &Value) -> String {
    let text_of = |value: &Value| value.as_str().unwrap_or("none").to_owned();
    let mut text = format!(
        "service  {}\nrule     {}\n",
        text_of(&explained["service"]),
        text_of(&explained["rule"])
    );
    for backend in items(&explained["backends"]) {
        let _ = writeln!(
            text,
            "to       {}, weight {}",
            text_of(&backend["service"]),
            backend["weight"]
        );
    }
    let considered: Vec<Vec<String>> = items(&explained["considered"])
        .iter()
        .map(|one| {
            vec![
                text_of(&one["rule"]),
                one["match"].to_string(),
                text_of(&one["verdict"]),
            ]
        })
        .collect();
    if !considered.is_empty() {
        let _ = write!(
            text,
            "\n{}",
            table(&["RULE", "MATCH", "VERDICT"], &considered)
        );
    }
    let settings: Vec<Vec<String>> = items(&explained["settings"])
        .iter()
        .map(|one| {
            ["of", "name", "value", "origin"]
                .map(|key| text_of(&one[key]))
                .to_vec()
        })
        .collect();
    if settings.is_empty() {
        return text;
    }
    let _ = write!(
        text,
        "\n{}",
        table(&["OF", "SETTING", "VALUE", "FROM"], &settings)
    );
    let attempts = &explained["upstreamAttempts"];
    let sync = &attempts["sync"];
    let _ = writeln!(
        text,
        "\nworst case: {} sends, of which {} can reach an application; {}",
        sync["sends"],
        sync["reached"],
        text_of(&sync["why"])
    );
    if let Some(deliveries) = attempts["async"]["deliveries"].as_u64() {
        let _ = writeln!(
            text,
            "as a message: at most {deliveries} deliveries, in-line retries off"
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const MESH: &str = "\
apiVersion: outrigger.dev/v1alpha1
kind: MeshService
metadata: {name: orders, namespace: shop}
spec: {discovery: {static: [{address: 127.0.0.1, port: 1}]}}
---
apiVersion: outrigger.dev/v1alpha1
kind: MeshRoute
metadata: {name: orders, namespace: shop}
spec:
  services: [orders]
  rules:
  - name: create
    matches: [{method: POST, path: {type: Exact, value: /v1/orders}}]
    retry: {attempts: 4}
    async: {when: Preferred}
  - name: default
    matches: [{path: {value: /v1}}]
";

    fn explained(method: &str, url: &str, header: &[&str]) -> Result<Value, Failure> {
        let config = load(&[Source::new("mesh.yaml", MESH)]).mesh.unwrap();
        let options = Options {
            method: method.to_owned(),
            url: url.to_owned(),
            header: header.iter().map(|&header| header.to_owned()).collect(),
            file: None,
            admin: None,
            namespace: "shop".to_owned(),
        };
        explain(&config, &Request::read(&options)?, "shop")
    }

    #[test]
    fn the_rule_its_values_and_the_worst_case_are_shown() {
        let value = explained(
            "POST",
            "http://orders/v1/orders",
            &["prefer: respond-async"],
        )
        .unwrap();
        assert_eq!(value["rule"], "shop/orders/create");
        assert_eq!(value["considered"].as_array().unwrap().len(), 2);
        let attempts = &value["upstreamAttempts"];
        assert_eq!(
            (&attempts["sync"]["sends"], &attempts["sync"]["reached"]),
            (&json!(5), &json!(1))
        );
        assert_eq!(attempts["async"]["deliveries"], 8);
        let setting = |name: &str| {
            let found = items(&value["settings"])
                .iter()
                .find(|one| one["name"] == name);
            found
                .map(|one| (one["value"].clone(), one["origin"].clone()))
                .unwrap()
        };
        assert_eq!(setting("retry.attempts"), (json!("4"), json!("rule")));
        assert_eq!(
            setting("timeouts.request"),
            (json!("15s"), json!("built-in"))
        );
        assert!(render(&value).contains("worst case: 5 sends"));
    }

    #[test]
    fn a_keyed_request_may_reach_the_application_more_than_once() {
        let value = explained("POST", "orders/v1/orders", &["idempotency-key: a"]).unwrap();
        assert_eq!(value["upstreamAttempts"]["sync"]["reached"], 5);
        assert_eq!(value["upstreamAttempts"]["async"], Value::Null);
    }

    #[test]
    fn no_rule_says_why_each_was_passed_over() {
        let value = explained("GET", "http://orders/other", &[]).unwrap();
        assert_eq!(value["rule"], Value::Null);
        let first = &value["considered"][0]["verdict"];
        assert!(
            first.as_str().unwrap().contains("path /other is not"),
            "{first}"
        );
    }

    #[test]
    fn an_unknown_host_names_the_known_ones() {
        let failure = explained("GET", "http://nobody/", &[]).unwrap_err();
        assert!(
            failure.message.contains("orders.shop"),
            "{}",
            failure.message
        );
    }
}
