//! `outrigger explain`: which service and rule take a request, why no other, and what applies.
//!
//! Asks the same functions as the sidecar: the host index, the compiled matches and the effective
//! values of the config crate. The config is a file's, or the one in force in a sidecar.

mod authorization;
mod settings;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;

use clap::Args;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Uri};
use outrigger_config::effective::{RulePolicy, connect_timeout};
use outrigger_config::model::{AsyncWhen, Backend, MeshService, StaticEndpoint};
use outrigger_config::units::Reference;
use outrigger_config::{MeshConfig, NamespacedName, RuleRef, Source, load, read_sources};
use outrigger_core::host::normalize_host;
use outrigger_core::retry::is_idempotent;
use outrigger_core::route::{RequestView, RuleSet, Verdict};
use outrigger_proxy::forward::FREE_RESENDS;
use outrigger_proxy::snapshot::compile::matches;
use serde_json::{Value, json};

use self::settings::Settings;
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
    #[command(flatten)]
    caller: authorization::Caller,
}

pub(crate) async fn run(options: Options, format: Format) -> Result<(), Failure> {
    let config = config(&options).await?;
    let request = Request::read(&options)?;
    let mut explained = explain(&config, &request, &options.namespace)?;
    let chosen = explained["rule"].is_string();
    let mut refused = false;
    if let Some(asked) = options.caller.asked()?
        && chosen
    {
        let targets = items(&explained["backends"]).iter();
        let targets = targets.filter_map(|one| one["service"].as_str());
        let judged: Vec<Value> = targets
            .map(|target| authorization::judge(&config, target, &asked, request.view()))
            .collect();
        refused = judged.iter().all(|one| one["verdict"] == "refused");
        explained["authorization"] = json!(judged);
    }
    print_as(format, &explained, render);
    match chosen {
        true if refused => Err(Failure::errors(
            "no policy lets this caller in: it is answered 403 unauthorized",
        )),
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
    let mut settings = Settings::default();
    settings.rule(&policy);
    let mut total = Vec::new();
    for backend in backends(chosen, name) {
        let target = backend.service.target();
        let service = config.services.get(&target).cloned().unwrap_or_default();
        let applied = config.service_policy(&service);
        let connect = connect_timeout(&policy, &applied);
        let of = target.to_string();
        if !settings.0.iter().any(|row| row["of"] == *of) {
            settings.service(&of, &applied, &connect);
        }
        total.push(json!({
            "service": of,
            "weight": backend.weight.unwrap_or(1),
            "labels": backend.labels,
            "endpoints": listed(&service, &backend),
        }));
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

fn backends(chosen: Option<RuleRef<'_>>, service: &NamespacedName) -> Vec<Backend> {
    let listed = chosen.map(|rule| rule.rule.backends.clone());
    let listed = listed.unwrap_or_default();
    if !listed.is_empty() {
        return listed;
    }
    let NamespacedName { namespace, name } = service.clone();
    vec![Backend {
        service: Reference {
            namespace: Some(namespace),
            name,
        },
        weight: None,
        labels: BTreeMap::new(),
    }]
}

/// How many endpoints of a static list the backend means; none when a registry knows.
fn listed(service: &MeshService, backend: &Backend) -> Option<usize> {
    let listed = service.discovery.as_ref()?.static_.as_ref()?;
    let carries = |endpoint: &&StaticEndpoint| {
        let mut labels = backend.labels.iter();
        labels.all(|(name, value)| endpoint.labels.get(name) == Some(value))
    };
    Some(listed.iter().filter(carries).count())
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
        "sync": {
            "sends": sends,
            // Handed back by whoever cannot have worked on it: never more than that reach anybody.
            "resends": FREE_RESENDS,
            "worst": sends.saturating_add(FREE_RESENDS),
            "reached": if repeatable { sends } else { 1 },
            "why": why,
        },
        "async": queued.then(|| json!({"deliveries": policy.async_.delivery.attempts.value})),
    })
}

fn render(explained: &Value) -> String {
    let text_of = |value: &Value| value.as_str().unwrap_or("none").to_owned();
    let mut text = format!(
        "service  {}\nrule     {}\n",
        text_of(&explained["service"]),
        text_of(&explained["rule"])
    );
    for backend in items(&explained["backends"]) {
        let _ = write!(
            text,
            "to       {}, weight {}",
            text_of(&backend["service"]),
            backend["weight"]
        );
        let labels = backend["labels"].as_object();
        if let Some(labels) = labels.filter(|labels| !labels.is_empty()) {
            let pairs = labels.iter();
            let pairs: Vec<String> = pairs
                .map(|(name, value)| format!("{name}={}", text_of(value)))
                .collect();
            let _ = write!(text, ", labels {}", pairs.join(" "));
        }
        if let Some(count) = backend["endpoints"].as_u64() {
            let _ = write!(text, ", endpoints listed: {count}");
        }
        text.push('\n');
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
    text.push_str(&authorization::render(items(&explained["authorization"])));
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
        "\nworst case: {} attempts upstream ({} sends, and {} more of one that was handed back \
         untouched), of which {} can reach an application; {}",
        sync["worst"],
        sync["sends"],
        sync["resends"],
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
            caller: authorization::Caller::default(),
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
        let text = render(&value);
        assert!(
            text.contains("worst case: 8 attempts upstream (5 sends"),
            "{text}"
        );
        assert!(text.contains("weight 1, endpoints listed: 1"), "{text}");
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
