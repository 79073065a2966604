//! Outrigger's sidecar: an L7 proxy that gives service-to-service calls timeouts, retries,
//! breakers and balancing, and turns designated calls into durable messages.
//!
//! Three straight paths, each through named files:
//! * a request: `listener` → `http1::server` or `http2::server` → [`forward`] → [`attempt`] → `upstream` → `http::body`
//! * a message: [`forward`] → `queueing::accept` → `outrigger-queue` → `queueing::dispatch` →
//!   [`forward`]
//! * a config update: `source` → `outrigger-config` → `snapshot::compile` → one atomic store
//!
//! Worker threads own everything that carries traffic; see [`worker`].

pub mod admin;
pub mod app;
pub mod attempt;
pub mod authorize;
pub mod bulkhead;
pub mod call;
pub mod cli;
pub mod clock;
pub mod connect;
pub mod deadline;
pub mod destination;
pub mod drain;
pub mod error;
pub mod features;
pub mod forward;
pub mod health;
pub mod hedge;
pub mod home;
pub mod http;
pub mod http1;
pub mod http2;
pub mod identity;
pub mod intercept;
pub mod io;
pub mod listener;
pub mod overload;
pub mod queueing;
pub mod snapshot;
pub mod source;
pub mod tcp;
pub mod telemetry;
pub mod unknown;
pub mod upstream;
pub mod wheel;
pub mod worker;
