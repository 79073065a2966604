//! What `explain` says about a match: chosen, beaten, or what the request lacks.
//!
//! Owns the words. Off the hot path: [`Missed`] is what matching yields, and costs nothing.

use std::fmt;

use http::{HeaderName, Method};

use super::matching::{GrpcMatch, Match, PathMatch, ValueMatch};
use super::{RequestView, header_value, query_value};

/// One match that was looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Considered {
    /// The rule's number in the order of the configuration.
    pub rule: usize,
    /// The number of the match within the rule; 0 for a rule without.
    pub match_index: usize,
    /// What came of it.
    pub verdict: Verdict,
}

/// What came of a match.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It takes the request.
    Chosen,
    /// It matches, but one before it does too.
    LowerPrecedence,
    /// It does not match.
    Missed(Reason),
}

/// What a request lacks: the first part that did not match.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reason {
    /// Another method.
    Method {
        /// The rule's.
        want: Method,
        /// The request's.
        got: Method,
    },
    /// Another path.
    Path {
        /// The rule's, such as `prefix /v1`.
        want: String,
        /// The request's.
        got: String,
    },
    /// No such gRPC service or method.
    Grpc {
        /// The rule's, such as `shop.Inventory/Reserve` or `*/Reserve`.
        want: String,
        /// The request's path.
        got: String,
    },
    /// A header is missing or other.
    Header {
        /// The field's name.
        name: HeaderName,
        /// The rule's value.
        want: String,
        /// The request's value; `None` without one.
        got: Option<String>,
    },
    /// A query parameter is missing or other.
    Query {
        /// The parameter's name.
        name: String,
        /// The rule's value.
        want: String,
        /// The request's value; `None` without one.
        got: Option<String>,
    },
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let other = |got: &Option<String>| match got {
            Some(got) => format!("is \"{got}\""),
            None => "is missing".to_owned(),
        };
        match self {
            Reason::Method { want, got } => write!(f, "method is {got}, not {want}"),
            Reason::Path { want, got } => write!(f, "path {got} is not {want}"),
            Reason::Grpc { want, got } => write!(f, "path {got} is not gRPC {want}"),
            Reason::Header { name, want, got } => {
                write!(f, "header {name} {}, wanted {want}", other(got))
            }
            Reason::Query { name, want, got } => {
                write!(f, "query parameter {name} {}, wanted {want}", other(got))
            }
        }
    }
}

/// Which part of a match did not hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Missed {
    Method,
    Path,
    Grpc,
    Header(usize),
    Query(usize),
}

impl Missed {
    /// Says it in full, for a person.
    pub(super) fn describe(self, on: &Match, request: &RequestView<'_>) -> Reason {
        let lossy = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        match self {
            Missed::Method => Reason::Method {
                want: on.method.clone().unwrap_or(Method::POST), // only gRPC asks without naming it
                got: request.method.clone(),
            },
            Missed::Path => Reason::Path {
                want: on.path.as_ref().map(path_words).unwrap_or_default(),
                got: request.path.to_owned(),
            },
            Missed::Grpc => Reason::Grpc {
                want: on.grpc.as_ref().map(grpc_words).unwrap_or_default(),
                got: request.path.to_owned(),
            },
            Missed::Header(index) => {
                let header = &on.headers[index];
                let got = header_value(request.headers, &header.name);
                Reason::Header {
                    name: header.name.clone(),
                    want: value_words(&header.value),
                    got: got.map(|value| lossy(&value)),
                }
            }
            Missed::Query(index) => {
                let parameter = &on.query[index];
                let got = query_value(request.query, &parameter.name);
                Reason::Query {
                    name: parameter.name.clone(),
                    want: value_words(&parameter.value),
                    got: got.map(|value| lossy(&value)),
                }
            }
        }
    }
}

fn path_words(path: &PathMatch) -> String {
    match path {
        PathMatch::Exact(exact) => format!("exactly {exact}"),
        PathMatch::Prefix(prefix) => format!("under {prefix}"),
        PathMatch::Regex(pattern) => format!("matching {}", pattern.as_str()),
    }
}

fn value_words(value: &ValueMatch) -> String {
    match value {
        ValueMatch::Exact(exact) => format!("\"{exact}\""),
        ValueMatch::Regex(pattern) => format!("a match of {}", pattern.as_str()),
    }
}

fn grpc_words(grpc: &GrpcMatch) -> String {
    let or_any = |name: &Option<String>| name.clone().unwrap_or_else(|| "*".to_owned());
    format!("{}/{}", or_any(&grpc.service), or_any(&grpc.method))
}
