//! Every traffic decision of the sidecar as pure code.
//!
//! No I/O, no clock, no runtime, no serde: time arrives as `now`, randomness as `rng`,
//! parameters as `&Params` with every call. What lives longer than a configuration (a breaker's
//! state, a budget's window) sits in types of atomics that all worker threads share; a reload
//! swaps the parameters and leaves the state alone.
//!
//! In reading order, along the life of a request: [`sniff`] tells the protocol, [`http1`] reads
//! and writes messages, [`path`] gives every spelling one form, [`host`] and [`route`] choose the
//! rule and [`split`] its backend, [`edit`] changes what the rule says, [`deadline`], [`limit`]
//! and [`rate`] bound it, [`fault`] may stand in for what follows, [`balance`] with [`ejection`]
//! and [`check`] chooses the endpoint,
//! [`breaker`] admits, [`cache`] tells what may be said again, [`outcome`] classifies what came back, [`retry`] with [`budget`] and
//! [`backoff`] decides about another try. [`redelivery`] is the same for a
//! message, [`callback`] for the news of its end. [`headers`]
//! and [`error_code`] are the words on the wire.

pub mod time;

pub mod adaptive;
pub mod authz;
pub mod cache;
pub mod client_hello;
pub mod edit;
pub mod error_code;
pub mod grpc;
pub mod headers;
pub mod host;
pub mod http1;
pub mod path;
pub mod route;
pub mod sniff;
pub mod spiffe;
pub mod split;

pub mod bulkhead;
pub mod deadline;
pub mod fault;
pub mod limit;
pub mod quantile;
pub mod rate;

pub mod codes;
pub mod outcome;

pub mod balance;
pub mod breaker;
pub mod check;
pub mod ejection;
mod window;

pub mod backoff;
pub mod budget;
pub mod renewal;
pub mod retry;

pub mod callback;
pub mod redelivery;
