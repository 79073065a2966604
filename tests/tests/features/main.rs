//! What a rule does with its calls beside forwarding them, through one real sidecar.

mod caches;
mod edits;
mod faults;
mod idempotency;
mod ladder;
mod mirrors;
mod rates;
mod splits;
