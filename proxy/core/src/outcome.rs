//! The one classification: what came back from an attempt, and whether it was a failure.
//!
//! Retry, breaker, ejection, delivery and metrics all read the same [`Observed`] and, where they
//! ask "was it a failure", the same [`FailureOn`]. Owns neither: each acts on it in its own file.
//! On the request's and the message's life.

use http::StatusCode;

pub use crate::codes::CodeSet;
pub use crate::grpc::{GrpcCode, GrpcSet};

/// What was seen of one attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Observed {
    /// A response head came (and, for gRPC, perhaps a status: in the head or in the trailers).
    Head {
        /// HTTP status of the response.
        status: StatusCode,
        /// `grpc-status` of a gRPC call, or [`GrpcCode::from_http`] when it came without one.
        grpc: Option<GrpcCode>,
    },
    /// No connection: refused, unreachable, connect timeout, TLS handshake failed.
    ConnectFailed,
    /// The request was handed back before a byte of it left (a pooled connection had closed, or
    /// the stream is above GOAWAY's last id).
    Unsent,
    /// The peer said it did nothing with it (REFUSED_STREAM, RFC 9113 §8.7).
    RefusedStream,
    /// The connection or stream broke after the request was sent and before a head.
    ResetBeforeResponse,
    /// It broke after the head.
    ResetInBody,
    /// The limit for one try ran out (`timeouts.perTry`).
    PerTryTimeout,
    /// Our limit for the whole request ran out (`timeouts.request`).
    RequestTimeout,
    /// The caller's own deadline ran out.
    CallerDeadline,
    /// The caller went away.
    CallerGone,
    /// The peer's bytes were not HTTP.
    Protocol,
}

/// What an observation means to breaker, ejection and metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The upstream did its work; most 4xx are this.
    Success,
    /// The upstream is broken; counts against it.
    Failure,
    /// The upstream asks for less (429, RESOURCE_EXHAUSTED): slows, never trips.
    Throttled,
    /// Says nothing about the upstream.
    Neutral,
}

/// Which observations count as failures (`breaker.failureOn`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FailureOn {
    /// HTTP statuses; default 5xx. 429 never counts, even when listed.
    pub codes: CodeSet,
    /// gRPC codes; default UNKNOWN, DEADLINE_EXCEEDED, INTERNAL, UNAVAILABLE, DATA_LOSS.
    /// RESOURCE_EXHAUSTED never counts.
    pub grpc: GrpcSet,
    /// Connections that fail or break, and answers that are not HTTP; default true.
    pub connect: bool,
    /// Our own time limits; default true. The caller's deadline never counts.
    pub timeout: bool,
}

impl Default for FailureOn {
    fn default() -> Self {
        FailureOn {
            codes: CodeSet::class(5),
            grpc: GrpcSet::of(&[
                GrpcCode::Unknown,
                GrpcCode::DeadlineExceeded,
                GrpcCode::Internal,
                GrpcCode::Unavailable,
                GrpcCode::DataLoss,
            ]),
            connect: true,
            timeout: true,
        }
    }
}

impl FailureOn {
    /// Classifies an observation.
    ///
    /// A gRPC status decides over the HTTP status. `Unsent` and `RefusedStream` are neutral: the
    /// request was not worked on, and a peer that drains says so this way.
    pub fn classify(&self, observed: &Observed) -> Outcome {
        match observed {
            Observed::Head {
                grpc: Some(code), ..
            } => self.classify_grpc(*code),
            Observed::Head { status, grpc: None } => self.classify_status(*status),
            Observed::ConnectFailed
            | Observed::ResetBeforeResponse
            | Observed::ResetInBody
            | Observed::Protocol => failure_if(self.connect),
            Observed::PerTryTimeout | Observed::RequestTimeout => failure_if(self.timeout),
            Observed::Unsent
            | Observed::RefusedStream
            | Observed::CallerDeadline
            | Observed::CallerGone => Outcome::Neutral,
        }
    }

    fn classify_grpc(&self, code: GrpcCode) -> Outcome {
        match code {
            GrpcCode::Ok => Outcome::Success,
            GrpcCode::ResourceExhausted => Outcome::Throttled,
            code if self.grpc.contains(code) => Outcome::Failure,
            _ => Outcome::Success,
        }
    }

    fn classify_status(&self, status: StatusCode) -> Outcome {
        match status {
            StatusCode::TOO_MANY_REQUESTS => Outcome::Throttled,
            status if self.codes.contains(status) => Outcome::Failure,
            _ => Outcome::Success,
        }
    }
}

fn failure_if(counts: bool) -> Outcome {
    if counts {
        Outcome::Failure
    } else {
        Outcome::Neutral
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(observed: Observed, expected: Outcome) {
        assert_eq!(
            FailureOn::default().classify(&observed),
            expected,
            "{observed:?}"
        );
    }

    fn http(status: u16) -> Observed {
        Observed::Head {
            status: StatusCode::from_u16(status).unwrap(),
            grpc: None,
        }
    }

    fn grpc(code: GrpcCode) -> Observed {
        Observed::Head {
            status: StatusCode::OK,
            grpc: Some(code),
        }
    }

    #[test]
    fn the_default_table() {
        check(http(200), Outcome::Success);
        check(http(404), Outcome::Success);
        check(http(429), Outcome::Throttled);
        check(http(500), Outcome::Failure);
        check(http(599), Outcome::Failure);
        check(grpc(GrpcCode::Ok), Outcome::Success);
        check(grpc(GrpcCode::NotFound), Outcome::Success);
        check(grpc(GrpcCode::PermissionDenied), Outcome::Success);
        check(grpc(GrpcCode::Unavailable), Outcome::Failure);
        check(grpc(GrpcCode::DataLoss), Outcome::Failure);
        check(grpc(GrpcCode::ResourceExhausted), Outcome::Throttled);
        check(Observed::ConnectFailed, Outcome::Failure);
        check(Observed::ResetBeforeResponse, Outcome::Failure);
        check(Observed::ResetInBody, Outcome::Failure);
        check(Observed::Protocol, Outcome::Failure);
        check(Observed::PerTryTimeout, Outcome::Failure);
        check(Observed::RequestTimeout, Outcome::Failure);
        check(Observed::Unsent, Outcome::Neutral);
        check(Observed::RefusedStream, Outcome::Neutral);
        check(Observed::CallerDeadline, Outcome::Neutral);
        check(Observed::CallerGone, Outcome::Neutral);
    }

    #[test]
    fn throttling_is_no_failure_even_when_listed() {
        let on = FailureOn {
            codes: CodeSet::class(4),
            grpc: GrpcSet::of(&[GrpcCode::ResourceExhausted]),
            ..FailureOn::default()
        };
        assert_eq!(on.classify(&http(429)), Outcome::Throttled);
        assert_eq!(on.classify(&http(404)), Outcome::Failure);
        assert_eq!(
            on.classify(&grpc(GrpcCode::ResourceExhausted)),
            Outcome::Throttled
        );
    }

    #[test]
    fn connection_and_time_can_be_left_out() {
        let on = FailureOn {
            connect: false,
            timeout: false,
            ..FailureOn::default()
        };
        assert_eq!(on.classify(&Observed::ConnectFailed), Outcome::Neutral);
        assert_eq!(on.classify(&Observed::RequestTimeout), Outcome::Neutral);
    }
}
