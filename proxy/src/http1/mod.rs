//! HTTP/1.1 on the wire, both sides: a strict codec of our own over plain sockets.
//!
//! What a message may look like is `outrigger_core::http1`'s; this module moves the bytes. There
//! is one task per downstream connection and none per upstream connection: the task that serves a
//! request writes it to the upstream, reads the answer and writes it back, so that a request
//! wakes nobody else and a small one costs four system calls.
//!
//! - [`wire`]: a socket with its read buffer, which exists only while there are bytes in it
//! - [`sending`]: a head and a body on their way out
//! - [`server`]: the downstream side
//! - [`client`]: the upstream side
//!
//! Stands on the life of a request.

pub mod client;
pub mod sending;
pub mod server;
pub mod wire;
