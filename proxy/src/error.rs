//! The one error that crosses the seam between deciding and answering.

use std::time::Duration;

use http::StatusCode;
use outrigger_core::error_code::ErrorCode;
use outrigger_core::outcome::GrpcCode;

/// Who caused a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The peer that connected to us.
    Downstream,
    /// The peer we connected to.
    Upstream,
    /// We refused by policy.
    Local,
}

/// Why Outrigger answers a request itself. Turned into a response by
/// [`respond`](crate::http::respond) and nowhere else.
#[derive(Debug)]
pub struct ProxyError {
    /// The stable code: header, body, log and metric all carry it.
    pub code: ErrorCode,
    /// Who caused it.
    pub side: Side,
    /// One sentence for a person, without addresses of other tenants or bodies.
    pub detail: String,
    /// When trying again may help.
    pub retry_after: Option<Duration>,
    /// What an HTTP caller is told instead of the code's own status.
    pub status: Option<StatusCode>,
    /// What a gRPC caller is told instead of the code's own status.
    pub grpc: Option<GrpcCode>,
}

impl ProxyError {
    /// We refused by policy.
    pub fn local(code: ErrorCode, detail: impl Into<String>) -> Self {
        Self {
            code,
            side: Side::Local,
            detail: detail.into(),
            retry_after: None,
            status: None,
            grpc: None,
        }
    }

    /// The upstream failed us.
    pub fn upstream(code: ErrorCode, detail: impl Into<String>) -> Self {
        Self {
            code,
            side: Side::Upstream,
            detail: detail.into(),
            retry_after: None,
            status: None,
            grpc: None,
        }
    }

    /// The downstream sent something we cannot serve.
    pub fn downstream(code: ErrorCode, detail: impl Into<String>) -> Self {
        Self {
            code,
            side: Side::Downstream,
            detail: detail.into(),
            retry_after: None,
            status: None,
            grpc: None,
        }
    }

    /// Answers a gRPC caller with `status` instead of the code's own.
    #[must_use]
    pub fn grpc(mut self, status: GrpcCode) -> Self {
        self.grpc = Some(status);
        self
    }

    /// Answers with these instead of the code's own.
    #[must_use]
    pub fn answered(mut self, status: StatusCode, grpc: Option<GrpcCode>) -> Self {
        (self.status, self.grpc) = (Some(status), grpc);
        self
    }

    /// Adds `Retry-After`.
    #[must_use]
    pub fn retry_after(mut self, after: Duration) -> Self {
        self.retry_after = Some(after);
        self
    }
}

/// Renders an error and its causes on one line: hyper and io errors say little at their top.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}
