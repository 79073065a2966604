//! Faults on purpose: which tries of a request they meet, and what they do.
//!
//! Owns the draw. A fault stands in for the upstream and for nothing else: time limits run, retries
//! decide, and each try draws anew, so that a retry can help. On the request's life.

use std::time::Duration;

use http::{HeaderMap, StatusCode};

use crate::grpc::GrpcCode;
use crate::route::HeaderMatch;

/// `fault`, without its bandwidth.
#[derive(Clone, Debug, Default)]
pub struct Params {
    /// Only requests that have all of these; none is every request.
    pub headers: Vec<HeaderMatch>,
    /// A pause before a try.
    pub delay: Option<(Share, Duration)>,
    /// An answer instead of a try.
    pub abort: Option<(Share, Abort)>,
}

/// How many are met, in percent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share(pub u8);

impl Share {
    /// Whether this one is met.
    pub fn draw(self, rng: &mut fastrand::Rng) -> bool {
        self.0 >= 100 || rng.u8(..100) < self.0
    }
}

/// What an aborted try is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Abort {
    /// To an HTTP caller.
    pub status: StatusCode,
    /// To a gRPC caller.
    pub grpc: GrpcCode,
}

impl Abort {
    /// An HTTP status, and what it means in gRPC.
    pub fn http(status: StatusCode) -> Self {
        Self {
            status,
            grpc: GrpcCode::from_http(status),
        }
    }

    /// A gRPC status; HTTP callers of such a rule get 503.
    pub fn grpc(grpc: GrpcCode) -> Self {
        Self {
            status: StatusCode::SERVICE_UNAVAILABLE,
            grpc,
        }
    }
}

/// What becomes of one try.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fault {
    /// It begins so much later.
    pub delay: Option<Duration>,
    /// It is answered with this, after the delay.
    pub abort: Option<Abort>,
}

impl Params {
    /// Whether faults may meet a request with these fields.
    pub fn concerns(&self, fields: &HeaderMap) -> bool {
        self.headers.iter().all(|header| header.matches(fields))
    }

    /// Draws for one try of a request that is concerned.
    pub fn draw(&self, rng: &mut fastrand::Rng) -> Fault {
        let delay = self.delay.filter(|(share, _)| share.draw(rng));
        let abort = self.abort.filter(|(share, _)| share.draw(rng));
        Fault {
            delay: delay.map(|(_, delay)| delay),
            abort: abort.map(|(_, abort)| abort),
        }
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderName;

    use super::*;
    use crate::route::ValueMatch;

    fn drawn(percent: u8) -> usize {
        let seed = 7;
        println!("seed {seed}");
        let mut rng = fastrand::Rng::with_seed(seed);
        let params = Params {
            abort: Some((Share(percent), Abort::http(StatusCode::SERVICE_UNAVAILABLE))),
            ..Params::default()
        };
        (0..10_000)
            .filter(|_| params.draw(&mut rng).abort.is_some())
            .count()
    }

    #[test]
    fn a_share_is_met_as_often_as_it_says() {
        assert_eq!((drawn(0), drawn(100)), (0, 10_000));
        let tenth = drawn(10);
        assert!((900..1_100).contains(&tenth), "{tenth}");
    }

    #[test]
    fn only_requests_with_the_headers_are_concerned() {
        let params = Params {
            headers: vec![HeaderMatch {
                name: HeaderName::from_static("x-chaos"),
                value: ValueMatch::Exact("1".to_owned()),
            }],
            ..Params::default()
        };
        let mut fields = HeaderMap::new();
        assert!(!params.concerns(&fields));
        fields.insert("x-chaos", "2".parse().unwrap());
        assert!(!params.concerns(&fields));
        fields.insert("x-chaos", "1".parse().unwrap());
        assert!(params.concerns(&fields));
        assert!(Params::default().concerns(&HeaderMap::new()));
    }
}
