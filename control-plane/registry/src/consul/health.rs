//! The answer of `/v1/health/service/:name` as instances of a service. Pure.

use std::collections::BTreeMap;

use outrigger_config::wire::{Endpoint, EndpointState};
use serde::{Deserialize, Deserializer};

/// One instance.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Instance {
    /// An IP address or a host name.
    pub(super) host: String,
    /// Everything but the address.
    pub(super) endpoint: Endpoint,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Entry {
    node: Node,
    service: Service,
    #[serde(default, deserialize_with = "nullable")]
    checks: Vec<Check>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Node {
    #[serde(default)]
    node: String,
    #[serde(default)]
    address: String,
    #[serde(default, deserialize_with = "nullable")]
    meta: BTreeMap<String, String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Service {
    #[serde(rename = "ID", default)]
    id: String,
    #[serde(default)]
    address: String,
    #[serde(default)]
    port: u32,
    #[serde(default, deserialize_with = "nullable")]
    meta: BTreeMap<String, String>,
    #[serde(default, deserialize_with = "nullable")]
    weights: Weights,
    #[serde(default, deserialize_with = "nullable")]
    locality: Locality,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Weights {
    #[serde(default = "one")]
    passing: u32,
    #[serde(default = "one")]
    warning: u32,
}

impl Default for Weights {
    fn default() -> Self {
        Self {
            passing: 1,
            warning: 1,
        }
    }
}

fn one() -> u32 {
    1
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Locality {
    #[serde(default)]
    zone: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Check {
    #[serde(rename = "CheckID", default)]
    id: String,
    #[serde(default)]
    status: String,
}

/// Go writes `null` for an empty map or list.
fn nullable<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(
    deserializer: D,
) -> Result<T, D::Error> {
    Option::deserialize(deserializer).map(Option::unwrap_or_default)
}

/// The worst of an instance's checks, its node's among them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Health {
    Passing,
    Warning,
    Critical,
    Maintenance,
}

/// Reads an answer. With `only_passing`, what warns or fails is left out; without, what warns has
/// its weight for that, and what fails is listed as unhealthy. What is in maintenance drains.
pub(super) fn read(body: &[u8], only_passing: bool) -> Result<Vec<Instance>, String> {
    let entries: Vec<Entry> =
        serde_json::from_slice(body).map_err(|e| format!("not a list of instances: {e}"))?;
    let instances = entries.into_iter().filter_map(|entry| {
        let health = health(&entry.checks);
        let (state, weight) = match health {
            Health::Passing => (EndpointState::Serving, entry.service.weights.passing),
            Health::Maintenance => (EndpointState::Draining, entry.service.weights.passing),
            _ if only_passing => return None,
            Health::Warning => (EndpointState::Serving, entry.service.weights.warning),
            Health::Critical => (EndpointState::Unhealthy, entry.service.weights.passing),
        };
        instance(entry, state, weight)
    });
    Ok(instances.collect())
}

fn health(checks: &[Check]) -> Health {
    let of = |check: &Check| {
        let maintenance = check.id == "_node_maintenance"
            || check.id.starts_with("_service_maintenance:")
            || check.status == "maintenance";
        match check.status.as_str() {
            _ if maintenance => Health::Maintenance,
            "passing" => Health::Passing,
            "warning" => Health::Warning,
            _ => Health::Critical,
        }
    };
    checks.iter().map(of).max().unwrap_or(Health::Passing)
}

fn instance(entry: Entry, state: EndpointState, weight: u32) -> Option<Instance> {
    let Entry { node, service, .. } = entry;
    let host = match service.address.is_empty() {
        true => node.address,
        false => service.address,
    };
    // A service without a port is a note in Consul and nothing to connect to.
    if host.is_empty() || !(1..=65_535).contains(&service.port) {
        return None;
    }
    let mut labels = service.meta;
    let zone = labels.remove("zone").unwrap_or_default();
    let zone = [zone, service.locality.zone]
        .into_iter()
        .chain(node.meta.get("zone").cloned())
        .find(|zone| !zone.is_empty());
    let identity = labels.remove("spiffe").unwrap_or_default();
    let priority = labels.remove("priority").and_then(|p| p.parse().ok());
    Some(Instance {
        host,
        endpoint: Endpoint {
            // Ids of services are unique on their node only.
            id: format!("{}/{}", node.node, service.id),
            port: service.port,
            zone: zone.unwrap_or_default(),
            // Ours are around 100, and Consul's around 1.
            weight: weight.saturating_mul(100).min(1_000_000),
            state: state.into(),
            labels,
            identity,
            priority: priority.unwrap_or(0).min(100),
            address: String::new(),
        },
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read_one(entry: &serde_json::Value, only_passing: bool) -> Option<Instance> {
        let body = json!([entry]).to_string();
        read(body.as_bytes(), only_passing).expect("readable").pop()
    }

    fn entry(checks: &serde_json::Value) -> serde_json::Value {
        json!({
            "Node": {"Node": "n1", "Address": "10.0.0.9", "Meta": null},
            "Service": {"ID": "web-1", "Service": "web", "Tags": null, "Address": "", "Port": 8080,
                        "Meta": {"zone": "a", "spiffe": "spiffe://m/w", "track": "canary"},
                        "Weights": {"Passing": 3, "Warning": 1}},
            "Checks": checks,
        })
    }

    fn check(id: &str, status: &str) -> serde_json::Value {
        json!({"CheckID": id, "Status": status})
    }

    #[test]
    fn an_instance_is_read_with_its_facts() {
        let found = read_one(&entry(&json!([check("serfHealth", "passing")])), true);
        let Instance { host, endpoint } = found.expect("it passes");
        assert_eq!(host, "10.0.0.9");
        assert_eq!(
            (endpoint.id.as_str(), endpoint.port, endpoint.weight),
            ("n1/web-1", 8080, 300)
        );
        assert_eq!(
            (endpoint.zone.as_str(), endpoint.identity.as_str()),
            ("a", "spiffe://m/w")
        );
        assert_eq!(endpoint.labels, [("track".into(), "canary".into())].into());
    }

    #[test]
    fn the_worst_check_counts() {
        let states = |checks: &[(&str, &str)]| {
            let checks: Vec<_> = checks.iter().map(|(id, s)| check(id, s)).collect();
            [true, false].map(|only| {
                let found = read_one(&entry(&json!(checks)), only)?;
                Some((found.endpoint.state(), found.endpoint.weight))
            })
        };
        let serving = Some((EndpointState::Serving, 300));
        let draining = Some((EndpointState::Draining, 300));
        assert_eq!(states(&[]), [serving, serving]);
        assert_eq!(
            states(&[("a", "passing"), ("b", "warning")]),
            [None, Some((EndpointState::Serving, 100))]
        );
        assert_eq!(
            states(&[("a", "critical"), ("b", "warning")]),
            [None, Some((EndpointState::Unhealthy, 300))]
        );
        assert_eq!(
            states(&[
                ("a", "critical"),
                ("_service_maintenance:web-1", "critical")
            ]),
            [draining, draining]
        );
        assert_eq!(
            states(&[("_node_maintenance", "critical")]),
            [draining, draining]
        );
    }

    #[test]
    fn what_cannot_be_connected_to_is_left_out_and_rubbish_is_an_error() {
        let mut no_port = entry(&json!([]));
        no_port["Service"]["Port"] = json!(0);
        assert_eq!(read_one(&no_port, true), None);
        for bad in ["", "{}", "null", "[{}]", "[1]", "<html>"] {
            assert!(read(bad.as_bytes(), true).is_err(), "{bad}");
        }
        assert_eq!(read(b"[]", true), Ok(vec![]));
    }
}
