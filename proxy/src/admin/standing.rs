//! Whether an endpoint may be picked, since when, and why not: the registry's word, the checks'
//! and our own experience as one answer for people and gauges.

use outrigger_core::ejection;
use outrigger_core::time::Mono;

use crate::snapshot::live::{AdminState, Endpoint};

/// All names, as in `outrigger_endpoints{state}`.
pub(super) const STANDINGS: [&str; 5] =
    ["available", "ejected", "unhealthy", "draining", "disabled"];

/// Where an endpoint stands.
pub(super) struct Standing {
    /// One of [`STANDINGS`].
    pub(super) name: &'static str,
    /// Since when.
    pub(super) since: Mono,
}

impl Standing {
    /// Where `endpoint` stands; the registry's word counts before what we found out.
    pub(super) fn of(endpoint: &Endpoint, now: Mono) -> Self {
        let moved = endpoint.state.moved_at();
        let (name, since) = match endpoint.spec.admin {
            AdminState::Draining => ("draining", moved),
            AdminState::Disabled => ("disabled", moved),
            AdminState::Unhealthy => ("unhealthy", moved),
            AdminState::Serving if endpoint.spec.weight == 0 => ("draining", moved),
            AdminState::Serving => match endpoint.state.health.standing(now) {
                ejection::Standing::Available { since } => ("available", since.max(moved)),
                ejection::Standing::Ejected { since, .. } => ("ejected", since),
                ejection::Standing::Unhealthy { since } => ("unhealthy", since),
            },
        };
        Self { name, since }
    }

    /// Why it is not available.
    pub(super) fn why(&self, endpoint: &Endpoint) -> Option<String> {
        let reasons = &endpoint.state.reasons;
        match self.name {
            "available" => None,
            "ejected" => reasons.last_ejection(),
            "unhealthy" if endpoint.spec.admin == AdminState::Serving => {
                let failure = reasons.last_check().and_then(|check| check.failure);
                let passed = || "its last check passed; it needs more in a row".to_owned();
                Some(failure.unwrap_or_else(passed))
            }
            "unhealthy" => Some("it missed its heartbeats".to_owned()),
            _ if endpoint.spec.admin == AdminState::Serving => Some("its weight is 0".to_owned()),
            _ => Some(format!(
                "the registry says {}",
                endpoint.spec.admin.as_str()
            )),
        }
    }
}
