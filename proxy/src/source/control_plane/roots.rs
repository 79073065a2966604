//! The roots that the control plane hands out to sidecars whose certificates it signs.
//!
//! They count at once: a root that is replaced is known everywhere long before the certificates of
//! all sidecars have been renewed. Stands on the life of a config update.

use outrigger_config::wire::{self, BUNDLE_NAME, DeltaDiscoveryResponse, TrustBundle};

use crate::app::Shared;
use crate::identity::svid::certificates;

/// Whether this sidecar believes the roots of the control plane. Who has its certificate from
/// elsewhere has the roots from there, too.
pub(super) fn are_wanted(shared: &Shared) -> bool {
    let source = shared.bootstrap.identity.as_ref();
    source.is_some_and(|source| source.control_plane.is_some())
}

/// Takes up the roots of a response. One without them says that there is no authority there, and
/// changes nothing.
///
/// # Errors
/// Why they are not taken up; those before stay.
pub(super) fn take_up(response: &DeltaDiscoveryResponse, shared: &Shared) -> Result<(), String> {
    let mut resources = response.resources.iter();
    let Some(resource) = resources.find(|resource| resource.name == BUNDLE_NAME) else {
        return Ok(());
    };
    let content = resource.resource.as_ref();
    let bundle: TrustBundle = wire::unpack(content.ok_or("the bundle has no content")?)?;
    let roots = certificates(bundle.pem.as_bytes(), "bundle").map_err(|e| e.to_string())?;
    shared
        .identity
        .hear_roots(roots, &shared.metrics)
        .map_err(|unusable| format!("the bundle: {unusable}"))
}
