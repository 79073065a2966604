//! Pushed mode: what the control plane sends, put in force by the same [`Applier`] as a file.
//!
//! Stands on the life of a config update, between the discovery stream and the snapshot.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use outrigger_config::Source;
use outrigger_config::bootstrap::ControlPlaneClient;
use outrigger_config::wire::{Endpoint, EndpointState};
use outrigger_core::spiffe::SpiffeId;
use tracing::{error, warn};

use crate::app::Shared;
use crate::identity::peers::Peers;
use crate::snapshot::live::{AdminState, EndpointSpec};
use crate::source::control_plane::{ConfigSink, DocumentSet, Link, Options, Update, run as follow};
use crate::source::dial::Dialer;
use crate::source::snapshot_cache::SnapshotCache;
use crate::source::{Applier, Registry};

/// Follows the control plane for ever, starting from what the last run kept.
pub async fn run(shared: Arc<Shared>, client: &ControlPlaneClient, applier: Applier) {
    let dialer = match Dialer::new(client) {
        Ok(dialer) => dialer,
        Err(problem) => return error!(problem, "controlPlane.address"),
    };
    let cache = SnapshotCache::new(shared.bootstrap.state_dir());
    let resume = cache.load().unwrap_or_else(|problem| {
        error!(%problem, "the config of the last run is not used");
        None
    });
    let workload = &shared.bootstrap.workload;
    let link = Arc::new(Link::default());
    let options = Options {
        dialer,
        shared: Arc::clone(&shared),
        node_id: format!("{}/{}", workload.namespace(), workload.name),
        service: workload
            .service()
            .map(|service| service.to_string())
            .unwrap_or_default(),
        namespace: workload.namespace().to_owned(),
        service_account: workload.service_account().to_owned(),
        zone: workload.zone.clone().unwrap_or_default(),
        labels: workload.labels.clone(),
        resume,
        cache: Some(cache),
        link: Arc::clone(&link),
    };
    shared.config.follow(Arc::clone(&link));
    let gauge = shared
        .metrics
        .gauge("outrigger_control_plane_connected", &[]);
    tokio::task::spawn_local(async move {
        let mut ticks = tokio::time::interval(Duration::from_millis(250));
        loop {
            ticks.tick().await;
            gauge.set(f64::from(u8::from(link.connected())));
        }
    });
    let sink = Sink {
        applier,
        documents: DocumentSet::default(),
        registry: Registry::new(),
    };
    match follow(options, sink).await {}
}

/// Puts updates in force.
struct Sink {
    applier: Applier,
    documents: DocumentSet,
    registry: Registry,
}

impl ConfigSink for Sink {
    fn apply(&mut self, update: Update) -> Result<(), String> {
        let mut registry = self.registry.clone();
        for endpoints in &update.endpoints {
            registry.insert(
                endpoints.service.clone(),
                specs(&endpoints.service, &endpoints.endpoints),
            );
        }
        for service in &update.removed_endpoints {
            registry.remove(service);
        }
        match &update.documents {
            None => self.applier.endpoints(&registry),
            Some(set) => {
                let sources: Vec<Source> = set
                    .documents
                    .iter()
                    .map(|(name, document)| Source::new(name.clone(), &*document.json))
                    .collect();
                self.applier
                    .apply(&sources, &registry, "control-plane")
                    .map_err(|report| report.render_text())?;
                self.documents = set.clone();
            }
        }
        self.registry = registry;
        Ok(())
    }
}

/// Endpoints as a registry has them, as the snapshot wants them; what cannot be used is left out.
pub(super) fn specs(service: &str, endpoints: &[Endpoint]) -> Vec<EndpointSpec> {
    let spec = |endpoint: &Endpoint| {
        let Ok(ip) = endpoint.address.parse::<IpAddr>() else {
            warn!(
                service,
                address = endpoint.address,
                "endpoint left out: not an IP address"
            );
            return None;
        };
        let port = u16::try_from(endpoint.port).ok().filter(|port| *port > 0)?;
        Some(EndpointSpec {
            addr: SocketAddr::new(ip, port),
            zone: (!endpoint.zone.is_empty()).then(|| endpoint.zone.clone()),
            weight: endpoint.weight,
            priority: endpoint.priority,
            labels: Arc::new(endpoint.labels.clone()),
            admin: match endpoint.state() {
                EndpointState::Serving => AdminState::Serving,
                EndpointState::Draining => AdminState::Draining,
                EndpointState::Unhealthy => AdminState::Unhealthy,
                EndpointState::Disabled => AdminState::Disabled,
            },
            identity: SpiffeId::parse(&endpoint.identity).and_then(Peers::one),
        })
    };
    endpoints.iter().filter_map(spec).collect()
}
