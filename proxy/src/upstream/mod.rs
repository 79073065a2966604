//! The upstream side: connections to endpoints, per worker.

pub mod connect;
pub mod doorbell;
pub mod endpoint;
pub mod http2;
pub mod pool;
