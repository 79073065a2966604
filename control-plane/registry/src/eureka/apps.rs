//! What a Eureka server knows: its applications and their instances. Pure.
//!
//! The JSON is derived from XML, so that a list of one may be the one itself, and numbers and truth
//! values may be strings; both forms are read everywhere.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use outrigger_config::wire::{Endpoint, EndpointState};
use serde_json::Value;

/// All instances: application in upper case → instance id → instance.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Apps(BTreeMap<String, BTreeMap<String, Instance>>);

/// One instance.
#[derive(Clone, Debug, PartialEq)]
struct Instance {
    /// As Eureka says it: counted in the hash code.
    status: String,
    /// `None` for one that cannot be connected to.
    endpoint: Option<Endpoint>,
}

impl Apps {
    /// Reads the `applications` of a full fetch.
    pub(super) fn new(applications: &Value) -> Self {
        let mut apps = Self::default();
        for (app, id, instance) in instances(applications) {
            apps.0.entry(app).or_default().insert(id, read(instance));
        }
        apps
    }

    /// These with a delta applied; `None` when the result is not what the server has.
    pub(super) fn with_delta(&self, delta: &Value) -> Option<Self> {
        let expected = text(delta.get("apps__hashcode")?)?;
        let mut apps = self.clone();
        for (app, id, instance) in instances(delta) {
            let of_app = apps.0.entry(app).or_default();
            match instance.get("actionType").and_then(text).as_deref() {
                Some("DELETED") => drop(of_app.remove(&id)),
                _ => drop(of_app.insert(id, read(instance))),
            }
        }
        apps.0.retain(|_, instances| !instances.is_empty());
        (apps.hash_code() == expected).then_some(apps)
    }

    /// How many instances have each status: `DOWN_1_UP_2_`.
    fn hash_code(&self) -> String {
        let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
        for instance in self.0.values().flat_map(BTreeMap::values) {
            *counts.entry(&instance.status).or_default() += 1;
        }
        counts
            .iter()
            .fold(String::new(), |mut code, (status, count)| {
                let _ = write!(code, "{status}_{count}_");
                code
            })
    }

    /// The endpoints of an application.
    pub(super) fn endpoints(&self, app: &str) -> Vec<Endpoint> {
        let instances = self.0.get(app).into_iter().flat_map(BTreeMap::values);
        instances.filter_map(|i| i.endpoint.clone()).collect()
    }
}

/// Application, id and JSON of each instance in there.
fn instances(applications: &Value) -> impl Iterator<Item = (String, String, &Value)> {
    let apps = one_or_many(applications.get("application"));
    apps.flat_map(|app| {
        let name = app.get("name").and_then(text).unwrap_or_default();
        let name = name.to_ascii_uppercase();
        one_or_many(app.get("instance")).filter_map(move |instance| {
            // Older servers know an instance by its host only.
            let id = instance.get("instanceId").or(instance.get("hostName"));
            Some((name.clone(), text(id?)?, instance))
        })
    })
}

fn one_or_many(value: Option<&Value>) -> impl Iterator<Item = &Value> {
    let (many, one) = match value {
        Some(Value::Array(items)) => (items.as_slice(), None),
        Some(one @ Value::Object(_)) => (&[][..], Some(one)),
        _ => (&[][..], None),
    };
    many.iter().chain(one)
}

/// A string, or a number or truth value as one.
fn text(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        Value::Bool(truth) => Some(truth.to_string()),
        _ => None,
    }
}

fn read(instance: &Value) -> Instance {
    let field = |name: &str| instance.get(name).and_then(text).unwrap_or_default();
    let status = field("status");
    let state = match status.as_str() {
        "UP" => EndpointState::Serving,
        "OUT_OF_SERVICE" => EndpointState::Draining,
        _ => EndpointState::Disabled,
    };
    Instance {
        endpoint: endpoint(instance, &field, state),
        status,
    }
}

fn endpoint(
    instance: &Value,
    field: &dyn Fn(&str) -> String,
    state: EndpointState,
) -> Option<Endpoint> {
    let mut labels: BTreeMap<String, String> = match instance.get("metadata") {
        Some(Value::Object(members)) => members
            .iter()
            // What XML says of the type of an empty map.
            .filter(|(key, _)| !key.starts_with('@'))
            .filter_map(|(key, value)| Some((key.clone(), text(value)?)))
            .collect(),
        _ => BTreeMap::new(),
    };
    let (plain, plain_enabled) = port(instance.get("port"));
    let (secure, secure_enabled) = port(instance.get("securePort"));
    let port = match (plain_enabled, secure_enabled) {
        (false, true) => secure,
        _ => plain,
    };
    let host = Some(field("ipAddr")).filter(|ip| ip.parse::<std::net::IpAddr>().is_ok());
    let amazon = instance.pointer("/dataCenterInfo/metadata/availability-zone");
    let mut take = |key: &str| labels.remove(key);
    let zone = take("zone").or_else(|| amazon.and_then(text));
    let weight = take("weight").and_then(|weight| weight.parse::<u32>().ok());
    let priority = take("priority").and_then(|p| p.parse::<u32>().ok());
    let identity = take("spiffe").unwrap_or_default();
    Some(Endpoint {
        id: instance
            .get("instanceId")
            .and_then(text)
            .unwrap_or_else(|| field("hostName")),
        address: host?,
        port: port.filter(|port| (1..=65_535).contains(port))?,
        zone: zone.unwrap_or_default(),
        weight: weight.unwrap_or(100).min(1_000_000),
        state: state.into(),
        labels,
        identity,
        priority: priority.unwrap_or(0).min(100),
    })
}

/// `{"$": 8080, "@enabled": "true"}`, or the number alone, as newer writers have it.
fn port(value: Option<&Value>) -> (Option<u32>, bool) {
    let Some(value) = value else {
        return (None, false);
    };
    let (number, enabled) = match value {
        Value::Object(members) => (
            members.get("$").and_then(text),
            members.get("@enabled").and_then(text),
        ),
        _ => (text(value), Some("true".to_owned())),
    };
    let enabled = enabled.is_some_and(|enabled| enabled == "true");
    (number.and_then(|number| number.parse().ok()), enabled)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn instance(id: &str, status: &str) -> Value {
        json!({
            "instanceId": id, "hostName": "h", "app": "WEB", "ipAddr": "10.0.0.1",
            "status": status, "overriddenStatus": "UNKNOWN",
            "port": {"$": 8080, "@enabled": "true"},
            "securePort": {"$": 443, "@enabled": "false"},
            "metadata": {"@class": "java.util.Collections$EmptyMap"},
        })
    }

    fn apps(instances: &Value) -> Apps {
        Apps::new(&json!({"application": [{"name": "web", "instance": instances}]}))
    }

    fn states(apps: &Apps) -> Vec<(String, EndpointState)> {
        let endpoints = apps.endpoints("WEB");
        endpoints
            .iter()
            .map(|e| (e.id.clone(), e.state()))
            .collect()
    }

    #[test]
    fn a_list_of_one_may_be_the_one() {
        let one = instance("a", "UP");
        let as_list = apps(&json!([one]));
        assert_eq!(apps(&one), as_list);
        let object = json!({"application": {"name": "WEB", "instance": one}});
        assert_eq!(Apps::new(&object), as_list);
        assert_eq!(states(&as_list), [("a".into(), EndpointState::Serving)]);
        assert_eq!(Apps::new(&json!({})), Apps::default());
    }

    #[test]
    fn ports_are_read_in_every_form() {
        let check = |port: Value, secure: Value, expected: Option<u32>| {
            let mut one = instance("a", "UP");
            one["port"] = port.clone();
            one["securePort"] = secure;
            let found = apps(&one).endpoints("WEB");
            assert_eq!(found.first().map(|e| e.port), expected, "{port}");
        };
        let off = json!({"$": 443, "@enabled": "false"});
        check(json!({"$": 80, "@enabled": "true"}), off.clone(), Some(80));
        check(json!({"$": "80", "@enabled": true}), off.clone(), Some(80));
        check(json!(80), off.clone(), Some(80));
        check(json!("80"), Value::Null, Some(80));
        check(
            json!({"$": 80, "@enabled": "false"}),
            json!({"$": "443", "@enabled": "true"}),
            Some(443),
        );
        check(json!({"$": 0, "@enabled": "true"}), off, None);
        check(Value::Null, Value::Null, None);
    }

    #[test]
    fn statuses_and_metadata_are_what_we_call_them() {
        let statuses = ["UP", "OUT_OF_SERVICE", "DOWN", "STARTING", "UNKNOWN"];
        let found: Vec<_> = statuses
            .map(|status| apps(&instance("a", status)).endpoints("WEB")[0].state())
            .into();
        let (serving, out) = (EndpointState::Serving, EndpointState::Disabled);
        assert_eq!(found, [serving, EndpointState::Draining, out, out, out]);
        let mut one = instance("a", "UP");
        one["metadata"] =
            json!({"zone": "b", "weight": "7", "spiffe": "spiffe://m/w", "track": "canary"});
        let endpoint = apps(&one).endpoints("WEB").remove(0);
        assert_eq!((endpoint.zone.as_str(), endpoint.weight), ("b", 7));
        assert_eq!(endpoint.identity, "spiffe://m/w");
        assert_eq!(endpoint.labels, [("track".into(), "canary".into())].into());
        one["metadata"] = json!({});
        one["dataCenterInfo"] = json!({"metadata": {"availability-zone": "us-1c"}});
        assert_eq!(apps(&one).endpoints("WEB")[0].zone, "us-1c");
    }

    #[test]
    fn a_delta_counts_when_the_hash_code_is_right() {
        let known = apps(&json!([instance("a", "UP"), instance("b", "UP")]));
        let change = |id: &str, status: &str, action: &str| {
            let mut one = instance(id, status);
            one["actionType"] = json!(action);
            one
        };
        let delta = json!({
            "apps__hashcode": "DOWN_1_UP_1_",
            "application": {"name": "WEB", "instance": [
                change("a", "UP", "DELETED"),
                change("b", "DOWN", "MODIFIED"),
                change("c", "UP", "ADDED"),
            ]},
        });
        let after = known.with_delta(&delta).expect("it adds up");
        assert_eq!(
            states(&after),
            [
                ("b".into(), EndpointState::Disabled),
                ("c".into(), EndpointState::Serving)
            ]
        );
        let mut wrong = delta;
        wrong["apps__hashcode"] = json!("UP_3_");
        assert_eq!(known.with_delta(&wrong), None);
        wrong
            .as_object_mut()
            .expect("it is one")
            .remove("apps__hashcode");
        assert_eq!(known.with_delta(&wrong), None);
        let nothing = json!({"apps__hashcode": "UP_2_", "application": []});
        assert_eq!(known.with_delta(&nothing), Some(known));
    }

    #[test]
    fn an_instance_without_an_address_is_counted_and_not_used() {
        let mut one = instance("a", "UP");
        one["ipAddr"] = json!("");
        let apps = apps(&one);
        assert_eq!(apps.hash_code(), "UP_1_");
        assert!(apps.endpoints("WEB").is_empty());
    }
}
