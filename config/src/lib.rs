//! Outrigger's config documents: types, parsing with positions, validation, defaults and schema.
//!
//! The proxy, the control plane and the command line read, check and render the same documents with
//! this crate. It has no runtime and does no I/O but [`read_sources`]. On the life of a config
//! update: text → [`load`] → [`MeshConfig`] → [`effective`] → whatever compiles a snapshot.

pub mod asyncapi;
pub mod bootstrap;
pub mod effective;
pub mod model;
pub mod schema;
pub mod signing;
pub mod suggest;
pub mod units;
pub mod wire;

mod check;
mod config;
pub mod contract;
mod document;
mod format;
mod load;
mod normalise;
mod not_yet;
mod report;
mod source;
mod tree;
mod validate;
mod yaml;

pub use config::{MeshConfig, RuleRef};
pub use document::{API_VERSION, Document, GATEWAY_API_VERSION, Kind};
pub use load::{Loaded, load};
pub use report::{Problem, Report, Severity};
pub use source::{Source, read_source, read_sources};
pub use units::NamespacedName;
