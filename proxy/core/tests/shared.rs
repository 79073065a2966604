//! What lives longer than a snapshot is shared by all worker threads.

use outrigger_core::balance::{EndpointLoad, Layout, Ring};
use outrigger_core::breaker::Breaker;
use outrigger_core::budget::RetryBudget;
use outrigger_core::bulkhead::Bulkhead;
use outrigger_core::ejection::{EjectionGate, EndpointHealth};
use outrigger_core::host::HostTable;
use outrigger_core::limit::Rate;
use outrigger_core::route::RuleSet;

#[test]
fn state_and_compiled_rules_are_shared_between_threads() {
    fn shared<T: Send + Sync + 'static>() {}
    shared::<Breaker>();
    shared::<RetryBudget>();
    shared::<EndpointHealth>();
    shared::<EjectionGate>();
    shared::<EndpointLoad>();
    shared::<Layout>();
    shared::<Ring>();
    shared::<Bulkhead>();
    shared::<Rate>();
    shared::<RuleSet>();
    shared::<HostTable<u8>>();
}
