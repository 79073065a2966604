//! Pushing: the gRPC server (`server`) and the rules of one stream (`session`); and the instances
//! that sidecars announce on the same listener (`registration`).

pub mod registration;
pub mod server;
pub mod session;
