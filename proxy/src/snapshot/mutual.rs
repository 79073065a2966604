//! What a config says of mutual TLS: who the workloads of a service are, and what their ports take.
//!
//! Stands on the life of a config update.

use outrigger_config::model::{MeshService, MtlsMode, StaticEndpoint};
use outrigger_config::{MeshConfig, NamespacedName};
use outrigger_core::spiffe::SpiffeId;

use crate::app::Shared;
use crate::identity::peers::Peers;
use crate::snapshot::Mtls;
use crate::snapshot::live::Spoken;

/// How a service is called: with mutual TLS when we have a source of identity, the registry knows
/// the service's, and `mtls.mode` does not forbid it.
pub(super) fn spoken(
    shared: &Shared,
    config: &MeshConfig,
    name: &NamespacedName,
    spec: &MeshService,
) -> Spoken {
    let first = spec.ports.first().map(|port| port.port);
    let mode = mtls(config, Some(spec)).at(first);
    let trust_domain = config.mesh.trust_domain.as_deref();
    let (mut ids, mut paths) = (Vec::new(), Vec::new());
    let identity = spec.identity.as_ref();
    for account in identity.map_or(&[][..], |identity| &identity.service_accounts) {
        let (namespace, account) = account
            .split_once('/')
            .unwrap_or((&name.namespace, account));
        match trust_domain {
            Some(domain) => ids.extend(SpiffeId::of_account(domain, namespace, account)),
            None => paths.push(format!("/ns/{namespace}/sa/{account}")),
        }
    }
    let listed = identity.map_or(&[][..], |identity| &identity.spiffe_ids);
    ids.extend(listed.iter().filter_map(|id| SpiffeId::parse(id)));
    Spoken {
        mtls: shared.identity.configured() && mode != MtlsMode::Disabled,
        peers: Peers::new(ids, paths),
        ..Spoken::default()
    }
}

/// What callers of a service must speak: as its port says, else the service, else the mesh.
pub(super) fn mtls(config: &MeshConfig, spec: Option<&MeshService>) -> Mtls {
    let of_mesh = config.mesh.mtls.as_ref().and_then(|mtls| mtls.mode);
    let of_service = spec
        .and_then(|spec| spec.mtls.as_ref())
        .and_then(|mtls| mtls.mode);
    let ports = spec.map_or(&[][..], |spec| &spec.ports);
    let own = ports.iter().filter_map(|port| {
        let mode = port.mtls.as_ref().and_then(|mtls| mtls.mode)?;
        Some((port.port, mode))
    });
    Mtls {
        // Only asked where there is an identity: without one everything is plaintext.
        mode: of_service.or(of_mesh).unwrap_or(MtlsMode::Permissive),
        ports: own.collect(),
    }
}

/// Who a listed endpoint is, where that differs from its service.
pub(super) fn identity(endpoint: &StaticEndpoint) -> Option<std::sync::Arc<Peers>> {
    let id = endpoint.identity.as_deref()?;
    SpiffeId::parse(id).and_then(Peers::one)
}
