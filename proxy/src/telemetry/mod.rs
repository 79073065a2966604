//! What the sidecar tells about itself: metrics and the access log.

pub mod access_log;
pub mod limits;
pub mod metrics;
