//! What the EndpointSlices of a Kubernetes Service say (`discovery.k8s.io/v1`). Pure.
//!
//! Owns the reading of their JSON, and how the slices of one Service become its endpoints. Who
//! watches them in a cluster comes later; whoever does hands the slices over and gets what every
//! other registry gives.
//!
//! A Service has several slices: at most 100 endpoints each, and one set for each kind of address.
//! While endpoints are moved between slices one may stand in two of them, so they are united.

use std::collections::BTreeMap;
use std::net::IpAddr;

use outrigger_config::wire::{Endpoint, EndpointState};
use serde::Deserialize;

/// One slice, as the API server writes it. What is not read is passed over: newer servers add.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EndpointSlice {
    /// `IPv4`, `IPv6` or `FQDN`.
    #[serde(default)]
    pub address_type: String,
    /// Its endpoints.
    #[serde(default)]
    pub endpoints: Option<Vec<SliceEndpoint>>,
    /// The ports of each of them. The numbers of one name may differ from slice to slice.
    #[serde(default)]
    pub ports: Option<Vec<SlicePort>>,
}

/// One endpoint of a slice.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SliceEndpoint {
    /// They stand for the same endpoint; the first is used, as kube-proxy does.
    #[serde(default)]
    pub addresses: Vec<String>,
    /// Whether it may be asked.
    #[serde(default)]
    pub conditions: Option<Conditions>,
    /// The zone it runs in.
    #[serde(default)]
    pub zone: Option<String>,
    /// The node it runs on.
    #[serde(default)]
    pub node_name: Option<String>,
    /// Mostly its pod.
    #[serde(default)]
    pub target_ref: Option<TargetRef>,
}

/// Whether an endpoint may be asked. What is left out is as if nothing were wrong.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Conditions {
    /// Default true.
    #[serde(default)]
    pub ready: Option<bool>,
    /// Default: `ready`.
    #[serde(default)]
    pub serving: Option<bool>,
    /// Default false.
    #[serde(default)]
    pub terminating: Option<bool>,
}

/// An object of the cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct TargetRef {
    /// Its kind.
    #[serde(default)]
    pub kind: String,
    /// Its name.
    #[serde(default)]
    pub name: String,
}

/// A port of a slice.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct SlicePort {
    /// The name of the Service's port; empty where it has only one.
    #[serde(default)]
    pub name: Option<String>,
    /// The number at the endpoint.
    #[serde(default)]
    pub port: Option<u16>,
    /// `TCP`, `UDP` or `SCTP`.
    #[serde(default)]
    pub protocol: Option<String>,
}

impl Conditions {
    /// `ready` → Serving; `serving` while it ends → Draining; else Disabled (KEP-1672).
    pub fn state(self) -> EndpointState {
        let ready = self.ready.unwrap_or(true);
        let serving = self.serving.unwrap_or(ready);
        let terminating = self.terminating.unwrap_or(false);
        match (ready, serving) {
            (true, _) if !terminating => EndpointState::Serving,
            (_, true) if terminating => EndpointState::Draining,
            _ => EndpointState::Disabled,
        }
    }
}

/// The endpoints of a Service, ordered by id. `port` is the name of its port, or none for its only
/// one; slices that have no such port are passed over, and so are addresses that are none.
pub fn endpoints(slices: &[EndpointSlice], port: Option<&str>) -> Vec<Endpoint> {
    let mut all: BTreeMap<String, Endpoint> = BTreeMap::new();
    for slice in slices.iter().filter(|slice| slice.address_type != "FQDN") {
        let Some(number) = slice.number(port) else {
            continue;
        };
        for endpoint in slice.endpoints.iter().flatten() {
            let Some(new) = read(endpoint, number) else {
                continue;
            };
            // One that is moved may be late in one of its slices: the better word counts.
            let better = |known: &Endpoint| rank(new.state()) < rank(known.state());
            if all.get(&new.id).is_none_or(better) {
                all.insert(new.id.clone(), new);
            }
        }
    }
    let mut all: Vec<Endpoint> = all.into_values().collect();
    // When all of them end, those that still serve are better than nobody (kube-proxy's rule).
    if !all.iter().any(|e| e.state() == EndpointState::Serving) {
        let draining = |e: &&mut Endpoint| e.state() == EndpointState::Draining;
        for endpoint in all.iter_mut().filter(draining) {
            endpoint.state = EndpointState::Serving.into();
        }
    }
    all
}

impl EndpointSlice {
    /// The number of a port that is named, or of the only one.
    fn number(&self, name: Option<&str>) -> Option<u16> {
        let ports = self.ports.iter().flatten();
        let tcp = |port: &&SlicePort| port.protocol.as_deref().is_none_or(|p| p == "TCP");
        let mut ports = ports.filter(tcp);
        let found = match name {
            Some(name) => ports.find(|port| port.name.as_deref() == Some(name)),
            None => ports.next().filter(|_| ports.next().is_none()),
        };
        found?.port.filter(|number| *number > 0)
    }
}

fn rank(state: EndpointState) -> u8 {
    match state {
        EndpointState::Serving => 0,
        EndpointState::Draining => 1,
        EndpointState::Unhealthy | EndpointState::Disabled => 2,
    }
}

fn read(endpoint: &SliceEndpoint, port: u16) -> Option<Endpoint> {
    let address: IpAddr = endpoint.addresses.first()?.parse().ok()?;
    let named = [
        ("kubernetes.io/hostname", endpoint.node_name.as_ref()),
        (
            "outrigger.dev/pod",
            endpoint
                .target_ref
                .as_ref()
                .filter(|target| target.kind == "Pod")
                .map(|target| &target.name),
        ),
    ];
    let labels = named
        .into_iter()
        .filter_map(|(name, value)| Some((name.to_owned(), value?.clone())));
    let state = endpoint.conditions.unwrap_or_default().state();
    Some(Endpoint {
        id: format!("{address}-{port}"),
        address: address.to_string(),
        port: port.into(),
        zone: endpoint.zone.clone().unwrap_or_default(),
        weight: 100,
        state: state.into(),
        labels: labels.collect(),
        ..Endpoint::default()
    })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn slice(value: Value) -> EndpointSlice {
        serde_json::from_value(value).expect("a slice")
    }

    fn states(slices: &[EndpointSlice], port: Option<&str>) -> Vec<(String, EndpointState)> {
        let all = endpoints(slices, port);
        all.iter().map(|e| (e.id.clone(), e.state())).collect()
    }

    fn of(id: &str, state: EndpointState) -> (String, EndpointState) {
        (id.to_owned(), state)
    }

    #[test]
    fn a_slice_as_a_cluster_writes_it() {
        let slice = slice(json!({
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "name": "orders-abc",
                "labels": {"kubernetes.io/service-name": "orders"},
            },
            "addressType": "IPv4",
            "endpoints": [{
                "addresses": ["10.1.2.3"],
                "conditions": {"ready": true, "serving": true, "terminating": false},
                "hints": {"forZones": [{"name": "eu-1a"}]},
                "nodeName": "node-1",
                "targetRef": {"kind": "Pod", "name": "orders-1", "namespace": "shop", "uid": "u"},
                "zone": "eu-1a",
            }],
            "ports": [
                {"name": "metrics", "port": 9090, "protocol": "TCP"},
                {"name": "http", "port": 8080, "protocol": "TCP", "appProtocol": "http"},
            ],
        }));
        let found = endpoints(&[slice], Some("http"));
        let expected = Endpoint {
            id: "10.1.2.3-8080".into(),
            address: "10.1.2.3".into(),
            port: 8080,
            zone: "eu-1a".into(),
            weight: 100,
            labels: [
                ("kubernetes.io/hostname".to_owned(), "node-1".to_owned()),
                ("outrigger.dev/pod".to_owned(), "orders-1".to_owned()),
            ]
            .into(),
            ..Endpoint::default()
        };
        assert_eq!(found, [expected]);
    }

    #[test]
    fn conditions_become_states_and_what_is_left_out_is_well() {
        use EndpointState::{Disabled, Draining, Serving};
        let check = |conditions: Value, expected| {
            let read: Conditions = serde_json::from_value(conditions.clone()).expect("conditions");
            assert_eq!(read.state(), expected, "{conditions}");
        };
        check(json!({}), Serving);
        check(
            json!({"ready": null, "serving": null, "terminating": null}),
            Serving,
        );
        check(json!({"ready": true}), Serving);
        check(json!({"ready": false}), Disabled);
        check(
            json!({"ready": false, "serving": true, "terminating": true}),
            Draining,
        );
        check(
            json!({"ready": false, "serving": false, "terminating": true}),
            Disabled,
        );
        // `publishNotReadyAddresses` says ready until the very end.
        check(json!({"ready": true, "serving": false}), Serving);
        check(
            json!({"ready": true, "serving": true, "terminating": true}),
            Draining,
        );
    }

    #[test]
    fn slices_are_united_and_an_endpoint_on_the_move_counts_once() {
        use EndpointState::{Disabled, Serving};
        let one = |address: &str, ready: bool, port: u16| {
            slice(json!({
                "addressType": "IPv4",
                "endpoints": [{"addresses": [address], "conditions": {"ready": ready}}],
                "ports": [{"name": "", "port": port}],
            }))
        };
        let slices = [
            one("10.0.0.2", false, 80),
            one("10.0.0.1", true, 80),
            one("10.0.0.2", true, 80),
            // A named target port has another number in a newer pod.
            one("10.0.0.3", false, 81),
        ];
        let expected = [
            of("10.0.0.1-80", Serving),
            of("10.0.0.2-80", Serving),
            of("10.0.0.3-81", Disabled),
        ];
        assert_eq!(states(&slices, None), expected);
        let mut reversed = slices;
        reversed.reverse();
        assert_eq!(states(&reversed, None), expected);
    }

    #[test]
    fn while_all_of_them_end_those_that_serve_are_asked() {
        let ending = |address: &str, serving: bool| {
            json!({"addresses": [address],
                   "conditions": {"ready": false, "serving": serving, "terminating": true}})
        };
        let slices = [slice(json!({
            "addressType": "IPv6",
            "endpoints": [ending("fd00::1", true), ending("fd00::2", false)],
            "ports": [{"port": 80}],
        }))];
        let expected = [
            of("fd00::1-80", EndpointState::Serving),
            of("fd00::2-80", EndpointState::Disabled),
        ];
        assert_eq!(states(&slices, None), expected);
    }

    #[test]
    fn what_cannot_be_connected_to_is_passed_over() {
        let check = |value: Value, port| assert_eq!(states(&[slice(value)], port), []);
        let good = json!([{"addresses": ["10.0.0.1"]}]);
        check(json!({}), None);
        check(
            json!({"addressType": "IPv4", "endpoints": null, "ports": null}),
            None,
        );
        check(
            json!({"addressType": "FQDN", "endpoints": [{"addresses": ["a.b"]}], "ports": [{"port": 1}]}),
            None,
        );
        check(
            json!({"addressType": "IPv4", "endpoints": good, "ports": []}),
            None,
        );
        check(
            json!({"addressType": "IPv4", "endpoints": good, "ports": [{}]}),
            None,
        );
        // Of several ports one has to be named, and UDP is none of ours.
        let two = json!([{"name": "a", "port": 1}, {"name": "b", "port": 2}]);
        check(
            json!({"addressType": "IPv4", "endpoints": good, "ports": two}),
            None,
        );
        check(
            json!({"addressType": "IPv4", "endpoints": good, "ports": two}),
            Some("c"),
        );
        let udp = json!([{"name": "dns", "port": 53, "protocol": "UDP"}]);
        check(
            json!({"addressType": "IPv4", "endpoints": good, "ports": udp}),
            Some("dns"),
        );
        let bad = json!([{"addresses": []}, {"addresses": ["x"]}, {}]);
        check(
            json!({"addressType": "IPv4", "endpoints": bad, "ports": [{"port": 1}]}),
            None,
        );
    }
}
