//! Where endpoints come from that neither stand in a document nor register themselves: DNS, Consul
//! and Eureka.
//!
//! [`Sources`] follows the services of a config, each through one [`Source`], and always has an
//! answer: an error keeps what was known, and an answer that suddenly lacks most of a set is held
//! back for a while ([`guard`]). The control plane runs it for the whole mesh; a sidecar without
//! one runs it for itself. Stands on the life of a config update, at its source.

mod consul;
mod dns;
mod eureka;
pub mod guard;
mod http;
pub mod kubernetes;
mod names;
mod origin;
mod source;
mod sources;

pub use origin::Origin;
pub use source::{Answer, Asked, Source, SourceError};
pub use sources::{NothingHeld, Sources, Standing};
