//! HTTP at the edge: serving downstream connections, bodies, and our own answers.

pub mod body;
pub mod context;
pub mod incoming;
pub mod observe;
pub mod respond;
pub mod switch;
pub mod tunnel;
