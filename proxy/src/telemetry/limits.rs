//! Counts what the limits of the wire refused, by limit.
//!
//! Owns the names. They are in the table of `proxy/LIMITS.md`, which a test holds against them.

use metrics::Counter;

use super::metrics::Metrics;

/// A limit that ends a request or a connection before anything was routed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WireLimit {
    /// `wire.maxConnections`.
    Connections,
    /// `wire.maxHeaders`.
    Headers,
    /// `wire.maxHeaderBytes`.
    HeaderBytes,
    /// `wire.headerTimeout`.
    HeaderTimeout,
    /// `wire.sendTimeout`.
    SendTimeout,
    /// Streams that an HTTP/2 peer abandons.
    Resets,
    /// `overload.maxRequests`.
    Requests,
    /// `overload.maxMemory`.
    Memory,
}

impl WireLimit {
    /// All of them, in the order of their counters.
    pub const ALL: [Self; 8] = [
        Self::Connections,
        Self::Headers,
        Self::HeaderBytes,
        Self::HeaderTimeout,
        Self::SendTimeout,
        Self::Resets,
        Self::Requests,
        Self::Memory,
    ];

    /// The value of the label `limit`: the key, where there is one.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Connections => "wire.maxConnections",
            Self::Headers => "wire.maxHeaders",
            Self::HeaderBytes => "wire.maxHeaderBytes",
            Self::HeaderTimeout => "wire.headerTimeout",
            Self::SendTimeout => "wire.sendTimeout",
            Self::Resets => "h2.resets",
            Self::Requests => "overload.maxRequests",
            Self::Memory => "overload.maxMemory",
        }
    }
}

/// `outrigger_limit_rejected_total{limit}`, resolved.
pub struct Refusals([Counter; WireLimit::ALL.len()]);

impl Refusals {
    /// The counters of `metrics`, all of them there from the start.
    pub fn new(metrics: &Metrics) -> Self {
        Self(WireLimit::ALL.map(|limit| {
            let labels = [("limit", limit.as_str())];
            metrics.counter("outrigger_limit_rejected_total", &labels)
        }))
    }

    /// Counts one.
    pub fn count(&self, limit: WireLimit) {
        self.0[limit as usize].increment(1);
    }
}
