//! The sidecars that are or were connected, and how far each has got.
//!
//! Owns what `GET /v1/proxies` shows: per sidecar and type the version sent, accepted and refused,
//! with the diagnostics. Decides nothing: `discovery/session.rs` does. Stands on the life of a
//! config update, at its end.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use outrigger_config::wire::{BUNDLE_TYPE, DOCUMENT_TYPE, ENDPOINTS_TYPE, Node, cap_diagnostics};
use serde::Serialize;

use crate::rollout::{Policy, Sidecar};

/// How long a sidecar that left stays listed, so that one that crashes in a loop is seen.
const KEEP_GONE: Duration = Duration::from_secs(600);

/// The most sidecars listed. The oldest that left make room; beyond that a connected one is served
/// but not listed.
const MAX_LISTED: usize = 20_000;

/// All sidecars by node id.
#[derive(Debug, Default)]
pub struct Proxies {
    by_id: Mutex<BTreeMap<String, Proxy>>,
}

/// One sidecar.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Proxy {
    /// Its node id.
    pub id: String,
    /// The service beside it, `namespace/name`.
    pub service: String,
    /// Its zone; empty when unknown.
    pub zone: String,
    /// What it says about its workload.
    pub labels: BTreeMap<String, String>,
    /// Its version of Outrigger.
    pub version: String,
    /// Whether a stream is open.
    pub connected: bool,
    /// When the latest stream was opened, in milliseconds since 1970.
    pub connected_since: u64,
    /// When it was last heard, in milliseconds since 1970.
    pub last_seen: u64,
    /// Whether it runs the newest config: what was sent last has been accepted.
    pub synced: bool,
    /// Config documents.
    pub config: Progress,
    /// Endpoints of services.
    pub endpoints: Progress,
    /// The roots to believe; nothing of a sidecar that has its certificate from elsewhere.
    pub roots: Progress,
    /// Endpoints that it says it cannot connect to.
    pub unreachable: Vec<Unreachable>,
    #[serde(skip)]
    stream: u64,
    #[serde(skip)]
    left: Option<Duration>,
}

/// An endpoint that a sidecar cannot connect to.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Unreachable {
    /// `namespace/name`.
    pub service: String,
    /// `address:port`.
    pub endpoint: String,
}

/// How far a sidecar has got in one type. Versions name the whole set.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Progress {
    /// Sent last.
    pub sent: Option<String>,
    /// Accepted last: what the sidecar runs.
    pub acknowledged: Option<String>,
    /// Refused, and nothing accepted since.
    pub refused: Option<Refusal>,
}

/// A refused push.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Refusal {
    /// The version refused.
    pub version: String,
    /// The sidecar's diagnostics, at most 4 KiB.
    pub reason: String,
    /// When, in milliseconds since 1970.
    pub at: u64,
}

impl Progress {
    fn synced(&self) -> bool {
        self.sent.is_some() && self.sent == self.acknowledged
    }
}

/// What happened to a push.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// It was sent.
    Sent,
    /// It was accepted.
    Acked,
    /// It was refused, with these diagnostics.
    Refused(String),
}

impl Proxies {
    /// A stream was opened by `node`. A later stream of the same id takes the entry over.
    pub fn connected(&self, stream: u64, node: &Node, wall_millis: u64) {
        let mut by_id = self.lock();
        if by_id.len() >= MAX_LISTED && !by_id.contains_key(&node.id) {
            let gone = by_id.values().filter(|p| p.left.is_some());
            let Some(oldest) = gone.min_by_key(|p| p.left).map(|p| p.id.clone()) else {
                return;
            };
            by_id.remove(&oldest);
        }
        let namespace = node.metadata_text("namespace").unwrap_or("default");
        let proxy = Proxy {
            id: node.id.clone(),
            // Sidecars say `namespace/name`; anything else means its own namespace.
            service: match node.cluster.contains('/') {
                true => node.cluster.clone(),
                false => format!("{namespace}/{}", node.cluster),
            },
            zone: node
                .locality
                .as_ref()
                .map(|l| l.zone.clone())
                .unwrap_or_default(),
            labels: node.metadata_texts("labels"),
            version: node.user_agent_version.clone(),
            connected: true,
            connected_since: wall_millis,
            last_seen: wall_millis,
            synced: false,
            config: Progress::default(),
            endpoints: Progress::default(),
            roots: Progress::default(),
            unreachable: Vec::new(),
            stream,
            left: None,
        };
        by_id.insert(node.id.clone(), proxy);
    }

    /// Notes what happened to a push of `version` on a stream.
    pub fn step(
        &self,
        stream: u64,
        id: &str,
        type_url: &str,
        version: &str,
        step: Step,
        wall_millis: u64,
    ) {
        let mut by_id = self.lock();
        let Some(proxy) = by_id.get_mut(id).filter(|p| p.stream == stream) else {
            return;
        };
        let progress = match type_url {
            DOCUMENT_TYPE => &mut proxy.config,
            ENDPOINTS_TYPE => &mut proxy.endpoints,
            BUNDLE_TYPE => &mut proxy.roots,
            _ => return,
        };
        match step {
            Step::Sent => progress.sent = Some(version.to_owned()),
            Step::Acked => {
                progress.acknowledged = Some(version.to_owned());
                progress.refused = None;
            }
            Step::Refused(reason) => {
                progress.refused = Some(Refusal {
                    version: version.to_owned(),
                    reason: cap_diagnostics(reason),
                    at: wall_millis,
                });
            }
        }
        proxy.synced = proxy.config.synced();
        proxy.last_seen = wall_millis;
    }

    /// Notes what the sidecar of a stream cannot connect to: `namespace/name address:port` each.
    pub fn unreachable(&self, stream: u64, id: &str, names: &BTreeSet<String>) {
        let read = |name: &String| {
            let (service, endpoint) = name.split_once(' ')?;
            Some(Unreachable {
                service: service.to_owned(),
                endpoint: endpoint.to_owned(),
            })
        };
        let mut by_id = self.lock();
        if let Some(proxy) = by_id.get_mut(id).filter(|p| p.stream == stream) {
            proxy.unreachable = names.iter().filter_map(read).collect();
        }
    }

    /// The endpoints (`address:port`) of a service that sidecars say they cannot connect to, with
    /// the ids of those sidecars.
    pub fn unreachable_of(&self, service: &str) -> BTreeMap<String, Vec<String>> {
        let mut from: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for proxy in self.lock().values().filter(|proxy| proxy.connected) {
            let of_this = proxy.unreachable.iter().filter(|u| u.service == service);
            for unreachable in of_this {
                let ids = from.entry(unreachable.endpoint.clone()).or_default();
                ids.push(proxy.id.clone());
            }
        }
        from
    }

    /// How many pairs of sidecar and endpoint there are without a path.
    pub fn unreachable_count(&self) -> usize {
        let by_id = self.lock();
        let connected = by_id.values().filter(|proxy| proxy.connected);
        connected.map(|proxy| proxy.unreachable.len()).sum()
    }

    /// A stream was closed.
    pub fn disconnected(&self, stream: u64, id: &str, now: Duration, wall_millis: u64) {
        let mut by_id = self.lock();
        if let Some(proxy) = by_id.get_mut(id).filter(|p| p.stream == stream) {
            proxy.connected = false;
            proxy.last_seen = wall_millis;
            proxy.left = Some(now);
        }
    }

    /// Forgets the sidecars that left long ago.
    pub fn sweep(&self, now: Duration) {
        let long_gone = |left: Duration| now.saturating_sub(left) >= KEEP_GONE;
        self.lock()
            .retain(|_, proxy| !proxy.left.is_some_and(long_gone));
    }

    /// Everything listed, ordered by id.
    pub fn list(&self) -> Vec<Proxy> {
        self.lock().values().cloned().collect()
    }

    /// What a rollout looks at.
    pub fn sidecars(&self, canary: &Policy) -> Vec<Sidecar> {
        let refused = |refused: &Refusal| (refused.version.clone(), refused.reason.clone());
        let sidecar = |proxy: &Proxy| Sidecar {
            id: proxy.id.clone(),
            service: proxy.service.clone(),
            connected: proxy.connected,
            labelled: canary.names(&proxy.labels),
            runs: proxy.config.acknowledged.clone(),
            refused: proxy.config.refused.as_ref().map(refused),
        };
        self.lock().values().map(sidecar).collect()
    }

    /// How many streams are open.
    pub fn connected_count(&self) -> usize {
        self.lock().values().filter(|p| p.connected).count()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Proxy>> {
        // Every critical section leaves the map whole, so a poisoned lock is still good.
        self.by_id.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(id: &str) -> Node {
        Node {
            id: id.into(),
            cluster: "web".into(),
            ..Node::default()
        }
    }

    #[test]
    fn a_refusal_stays_until_something_is_accepted() {
        let proxies = Proxies::default();
        proxies.connected(1, &node("web-1"), 10);
        proxies.step(1, "web-1", DOCUMENT_TYPE, "v1", Step::Sent, 11);
        proxies.step(1, "web-1", DOCUMENT_TYPE, "v1", Step::Acked, 12);
        assert!(proxies.list()[0].synced);
        proxies.step(1, "web-1", DOCUMENT_TYPE, "v2", Step::Sent, 13);
        proxies.step(
            1,
            "web-1",
            DOCUMENT_TYPE,
            "v2",
            Step::Refused("no".into()),
            14,
        );
        let one = proxies.list().remove(0);
        assert!(!one.synced);
        assert_eq!(one.config.acknowledged.as_deref(), Some("v1"));
        let refused = Refusal {
            version: "v2".into(),
            reason: "no".into(),
            at: 14,
        };
        assert_eq!(one.config.refused, Some(refused));
        proxies.step(1, "web-1", DOCUMENT_TYPE, "v3", Step::Sent, 15);
        proxies.step(1, "web-1", DOCUMENT_TYPE, "v3", Step::Acked, 16);
        assert_eq!(proxies.list()[0].config.refused, None);
    }

    #[test]
    fn a_stream_that_was_replaced_no_longer_speaks_for_its_id() {
        let proxies = Proxies::default();
        proxies.connected(1, &node("web-1"), 10);
        proxies.connected(2, &node("web-1"), 11);
        proxies.disconnected(1, "web-1", Duration::ZERO, 12);
        proxies.step(1, "web-1", DOCUMENT_TYPE, "v1", Step::Sent, 13);
        assert!(proxies.list()[0].connected);
        assert_eq!(proxies.list()[0].config.sent, None);
        assert_eq!(proxies.connected_count(), 1);
    }

    #[test]
    fn a_sidecar_that_left_is_listed_for_a_while() {
        let proxies = Proxies::default();
        proxies.connected(1, &node("web-1"), 10);
        proxies.disconnected(1, "web-1", Duration::from_secs(5), 11);
        proxies.sweep(Duration::from_secs(6));
        assert!(!proxies.list()[0].connected);
        proxies.sweep(Duration::from_secs(5) + KEEP_GONE);
        assert!(proxies.list().is_empty());
    }
}
