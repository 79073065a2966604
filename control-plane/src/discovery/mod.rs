//! Pushing: the gRPC server (`server`) and the rules of one stream (`session`).

pub mod server;
pub mod session;
