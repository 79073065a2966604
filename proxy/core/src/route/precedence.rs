//! Which of two matches is tried first.
//!
//! Owns Gateway API's order (HTTPRoute and GRPCRoute, `rules[].matches`): an exact path, then a
//! regular expression (which Gateway API leaves to us), then a prefix, longer before shorter; then
//! one with a method; then more headers; then more query parameters; then the earlier rule.

use super::matching::{Match, PathMatch};

/// How specific a match is; greater is tried first. The order of fields is the order of precedence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Specificity {
    path: PathRank,
    path_len: usize,
    /// Of a gRPC match without a service, which comes after every one with.
    grpc_method_len: usize,
    has_method: bool,
    headers: usize,
    query: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum PathRank {
    /// Also no path at all: Gateway API reads it as the prefix `/`, of no length here.
    Prefix,
    Regex,
    Exact,
}

impl Specificity {
    pub(super) fn of(on: &Match) -> Specificity {
        let by_path = match &on.path {
            None => (PathRank::Prefix, 0),
            Some(PathMatch::Prefix(prefix)) => (
                PathRank::Prefix,
                prefix.trim_end_matches('/').chars().count(),
            ),
            Some(PathMatch::Regex(pattern)) => (PathRank::Regex, pattern.as_str().chars().count()),
            Some(PathMatch::Exact(exact)) => (PathRank::Exact, exact.chars().count()),
        };
        let len = |name: &Option<String>| name.as_ref().map_or(0, |name| name.chars().count());
        let service = on.grpc.as_ref().map_or(0, |grpc| len(&grpc.service));
        let method = on.grpc.as_ref().map_or(0, |grpc| len(&grpc.method));
        let by_grpc = match (service, method) {
            (0, _) => (PathRank::Prefix, 0),
            (service, 0) => (PathRank::Prefix, service + 1),
            (service, method) => (PathRank::Exact, service + method + 2),
        };
        let (path, path_len) = by_path.max(by_grpc);
        Specificity {
            path,
            path_len,
            grpc_method_len: if service == 0 { method } else { 0 },
            has_method: on.method.is_some() || on.grpc.is_some(),
            headers: on.headers.len(),
            query: on.query.len(),
        }
    }
}
