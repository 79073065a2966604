//! The types of every kind of mesh config document, as users write them.
//!
//! Owns names, shapes and doc comments (which become the JSON Schema). Defaults are not here but in
//! `effective`; what the values may be beyond their shape is in `validate`. Unions are structs with
//! optional members of which exactly one is set, so that an error can name the member.

mod gateway;
mod mesh;
mod policy;
mod queue;
mod route;
mod service;

pub use gateway::*;
pub use mesh::*;
pub use policy::*;
pub use queue::*;
pub use route::*;
pub use service::*;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A union member that has no settings of its own: `{}`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Empty {}
