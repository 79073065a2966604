//! HTTP at the edge: serving downstream connections, bodies, and our own answers.

pub mod body;
pub mod context;
pub mod http2;
pub mod incoming;
pub mod observe;
pub mod respond;
pub mod streams;
pub mod switch;
pub mod tunnel;
