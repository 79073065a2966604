//! A rule's message contract, compiled once per config.

use metrics::Counter;
use outrigger_config::contract::Contract;
use outrigger_config::model::{ContractMode, ContractSpec};
use sha2::{Digest as _, Sha256};

use crate::telemetry::metrics::Metrics;

/// What the bodies of a rule must be.
pub struct MessageContract {
    /// None where its file was missing: nothing can be said to keep it.
    pub contract: Option<Contract>,
    /// Whether what breaks it is refused, or only told.
    pub enforced: bool,
    /// Names this content; kept with every message that was checked by it.
    pub version: String,
    /// Calls that broke it.
    pub violations: Counter,
}

impl MessageContract {
    /// Reads what the config crate has put in the place of the files' names.
    pub fn new(spec: &ContractSpec, metrics: &Metrics, route: &str) -> Self {
        let (key, content) = match (&spec.json_schema, &spec.descriptor_set) {
            (Some(schema), _) => ("jsonSchema", schema.as_str()),
            (None, set) => ("descriptorSet", set.as_deref().unwrap_or_default()),
        };
        let hash = Sha256::digest(content);
        let version = hash.iter().take(8).map(|byte| format!("{byte:02x}"));
        let enforced = match spec.mode.unwrap_or_default() {
            ContractMode::Enforce => true,
            ContractMode::Warn => false,
        };
        let mode = if enforced { "Enforce" } else { "Warn" };
        let labels = [("route", route), ("mode", mode)];
        Self {
            contract: Contract::read(key, content).ok(),
            enforced,
            version: version.collect(),
            violations: metrics.counter("outrigger_contract_violations_total", &labels),
        }
    }
}
