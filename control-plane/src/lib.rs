//! Outrigger's control plane: it validates the mesh config, keeps the registry of instances and
//! pushes both to the sidecars.
//!
//! The life of a config update begins here: `source` notices a change → `app` reads and validates
//! it (config crate), keeps the last good one → `world` puts config and registry together →
//! `render` makes named resources with content-hash versions → `discovery` pushes what each sidecar
//! lacks. The other end is `proxy/src/source/control_plane.rs`. `admin` is the HTTP API for
//! instances, programs and people. `ca` signs the certificates of sidecars; `security` says who may
//! ask for them and for config.
//!
//! [`start`] runs it within the caller's tokio runtime (tests, the demo); [`run`] is the program.

pub mod admin;
pub mod app;
pub mod ca;
pub mod clock;
pub mod discovery;
pub mod history;
pub mod metrics;
pub mod proxies;
pub mod registry;
pub mod render;
pub mod replicas;
pub mod rollout;
pub mod scope;
pub mod security;
pub mod shown;
pub mod source;
pub mod state;
pub mod stop;
pub mod world;

mod program;

pub use app::{App, Running, StartError, start};
pub use outrigger_config::bootstrap::ControlPlaneBootstrap;
pub use program::{Options, run};
