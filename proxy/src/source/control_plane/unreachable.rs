//! Endpoints that this sidecar cannot connect to, as told to the control plane.
//!
//! Owns what is told; who found it out is the request's life (`upstream/endpoint.rs`). The registry
//! cannot see from where it stands that a path is broken, and whoever looks for the reason asks it
//! first.

use std::collections::BTreeSet;

use outrigger_core::time::Mono;

use crate::app::Shared;

/// The most endpoints that are told: beyond that it is this sidecar that is cut off.
const MAX_TOLD: usize = 256;

/// `namespace/name address:port` of each, in order.
pub(super) fn now(shared: &Shared, now: Mono) -> BTreeSet<String> {
    let snapshot = shared.store.load();
    let mut names = BTreeSet::new();
    for service in &snapshot.services {
        for endpoint in &service.state.endpoints().endpoints {
            if endpoint.state.is_unreachable(now) && names.len() < MAX_TOLD {
                names.insert(format!("{} {}", service.name, endpoint.spec.addr));
            }
        }
    }
    names
}
