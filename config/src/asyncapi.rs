//! The AsyncAPI 3.0 document of a mesh config: which calls become messages, where they wait, and who
//! gets them.
//!
//! One channel a queue; one message and one `send` operation a rule that makes messages, one
//! `receive` operation a service that gets them. Pure. Written after
//! <https://www.asyncapi.com/docs/reference/specification/v3.0.0>. On the life of a config update.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use crate::config::{MeshConfig, RuleRef};
use crate::effective::RulePolicy;
use crate::model::{AsyncWhen, RouteMatch};
use crate::units::NamespacedName;

/// The path below which the status of a message is.
const MESSAGES: &str = "/.outrigger/messages";

/// What the document is about, beside the config.
#[derive(Debug, Clone, Copy)]
pub struct About<'a> {
    /// Whose calls they are.
    pub workload: &'a str,
    /// The version of the config.
    pub version: &'a str,
    /// Where the sidecar takes calls, `host:port`.
    pub host: &'a str,
}

/// The document.
pub fn document(config: &MeshConfig, about: About<'_>) -> Value {
    let mut parts = Parts::default();
    for service in config.services.keys() {
        for rule in config.rules_for_service(service) {
            let policy = config.rule_policy(rule);
            if makes_messages(rule, &policy) {
                parts.add(service, rule, &policy);
            }
        }
    }
    let description = "Calls that the sidecar stores and delivers later. Each is sent over HTTP \
                       to the service that it is for, through the sidecar, and is acknowledged with \
                       202 and the place of its status. At least once: what must not happen twice \
                       has an idempotency key.";
    json!({
        "asyncapi": "3.0.0",
        "info": {
            "title": format!("Messages of {}", about.workload),
            "version": about.version,
            "description": description,
        },
        "defaultContentType": "application/json",
        "servers": {
            "sidecar": {
                "host": about.host,
                "protocol": "http",
                "description": "The sidecar's outbound listener; the Host names the service.",
            },
        },
        "channels": parts.channels,
        "operations": parts.operations,
        "components": {"messages": parts.messages},
    })
}

fn makes_messages(rule: RuleRef<'_>, policy: &RulePolicy) -> bool {
    let mut steps = rule.rule.on_unavailable.iter().flatten();
    *policy.async_.when != AsyncWhen::Never || steps.any(|step| step.enqueue.is_some())
}

#[derive(Default)]
struct Parts {
    channels: BTreeMap<String, Value>,
    operations: BTreeMap<String, Value>,
    messages: BTreeMap<String, Value>,
}

impl Parts {
    fn add(&mut self, service: &NamespacedName, rule: RuleRef<'_>, policy: &RulePolicy) {
        let queue = policy.async_.queue.as_ref().unwrap_or(service);
        let (channel, message) = (key(&queue.to_string()), key(&rule.route_name()));
        let described = described(service, rule, policy);
        self.messages.insert(message.clone(), described);
        let known = self.channels.entry(channel.clone()).or_insert_with(|| {
            json!({
                "address": queue.to_string(),
                "title": format!("Queue {queue}"),
                "servers": [{"$ref": "#/servers/sidecar"}],
                "messages": {},
            })
        });
        known["messages"][&message] = json!({"$ref": format!("#/components/messages/{message}")});
        let refers = json!({"$ref": format!("#/channels/{channel}/messages/{message}")});
        let send = send(&channel, &refers, rule, policy);
        self.operations.insert(format!("send.{message}"), send);
        for target in [service]
            .into_iter()
            .chain(policy.async_.subscribers.iter())
        {
            let name = format!("receive.{channel}.{}", key(&target.to_string()));
            let known = self.operations.entry(name).or_insert_with(|| {
                json!({
                    "action": "receive",
                    "channel": {"$ref": format!("#/channels/{channel}")},
                    "title": format!("Deliveries to {target}"),
                    "messages": [],
                })
            });
            if let Some(Value::Array(messages)) = known.get_mut("messages")
                && !messages.contains(&refers)
            {
                messages.push(refers.clone());
            }
        }
    }
}

fn send(channel: &str, message: &Value, rule: RuleRef<'_>, policy: &RulePolicy) -> Value {
    let when = match *policy.async_.when {
        AsyncWhen::Preferred => "where the caller sends Prefer: respond-async",
        AsyncWhen::Always => "always",
        AsyncWhen::Shadow => "as a copy of each call",
        AsyncWhen::Never => "while the service cannot be asked",
    };
    let mut send = json!({
        "action": "send",
        "channel": {"$ref": format!("#/channels/{channel}")},
        "title": rule.route_name(),
        "description": format!("A call becomes a message {when}."),
        "messages": [message],
    });
    let mut methods = rule
        .rule
        .matches
        .iter()
        .filter_map(|found| found.method.as_ref());
    if let (Some(method), None) = (methods.next(), methods.next())
        && METHODS.contains(&method.as_str())
    {
        send["bindings"] = json!({"http": {"method": method, "bindingVersion": "0.3.0"}});
    }
    if policy.async_.callback.is_some() {
        let address = json!({
            "location": "$message.header#/outrigger-callback",
            "description": "Where the end of the message is told, as a signed CloudEvent.",
        });
        send["reply"] = json!({"address": address});
    }
    send
}

/// Those that the HTTP binding 0.3.0 knows.
const METHODS: [&str; 9] = [
    "GET", "PUT", "POST", "PATCH", "DELETE", "HEAD", "OPTIONS", "CONNECT", "TRACE",
];

fn described(service: &NamespacedName, rule: RuleRef<'_>, policy: &RulePolicy) -> Value {
    let string = |description: &str| json!({"type": "string", "description": description});
    let mut headers = Map::new();
    headers.insert(
        policy.async_.idempotency.header.to_string(),
        string("Names the call: a repeat with it is the same message."),
    );
    headers.insert(
        "outrigger-delay".to_owned(),
        string("Not delivered before so long, such as 10s."),
    );
    headers.insert(
        "outrigger-expires".to_owned(),
        string("Not delivered after so long, such as 1h."),
    );
    if policy.async_.callback.is_some() {
        let mut url = string("The URL that is told of the end.");
        url["format"] = json!("uri");
        headers.insert("outrigger-callback".to_owned(), url);
    }
    let mut message = json!({
        "name": rule.route_name(),
        "title": format!("A call of {service}"),
        "headers": {"type": "object", "properties": headers},
        "correlationId": {
            "location": "$message.header#/outrigger-message-id",
            "description": format!("Of the 202 and of each delivery; {MESSAGES}/{{id}} says how it stands."),
        },
        "x-outrigger-service": service.to_string(),
        "x-outrigger-matches": rule.rule.matches.iter().map(matched).collect::<Vec<_>>(),
    });
    if let Some(key) = &*policy.async_.ordering_key {
        message["x-outrigger-ordering-key"] = json!(key.to_string());
    }
    if policy.async_.grpc_ack.is_some() && rule.rule.matches.iter().any(|m| m.grpc.is_some()) {
        message["contentType"] = json!("application/grpc");
    }
    let contract = policy.features.contract.as_deref();
    let schema = contract.and_then(|contract| contract.json_schema.as_deref());
    if let Some(schema) = schema.and_then(|text| serde_json::from_str::<Value>(text).ok()) {
        message["payload"] = payload(&schema);
    }
    message
}

/// A contract's schema, in the dialect that it names; without a name it is read as 2020-12.
fn payload(schema: &Value) -> Value {
    let dialect = schema.get("$schema").and_then(Value::as_str);
    let draft = ["draft-04", "draft-06", "draft-07", "2019-09"]
        .into_iter()
        .find(|draft| dialect.is_some_and(|dialect| dialect.contains(draft)));
    let draft = draft.map_or("2020-12".to_owned(), str::to_owned);
    json!({
        "schemaFormat": format!("application/schema+json;version={draft}"),
        "schema": schema,
    })
}

/// What a rule asks of a call, without what the config leaves out.
fn matched(found: &RouteMatch) -> Value {
    let mut view = serde_json::to_value(found).unwrap_or_default();
    if let Some(view) = view.as_object_mut() {
        let empty = |value: &Value| value.as_array().is_some_and(Vec::is_empty);
        view.retain(|_, value| !value.is_null() && !empty(value));
    }
    view
}

/// A name as a key of the document, which takes letters, digits, dots, hyphens and underscores.
fn key(name: &str) -> String {
    let plain = |c: char| match c.is_ascii_alphanumeric() || matches!(c, '-' | '_') {
        true => c,
        false => '.',
    };
    name.chars().map(plain).collect()
}
