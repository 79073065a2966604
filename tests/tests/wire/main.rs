//! HTTP/1.1 on the wire, byte by byte, against callers and services that break the rules.
//!
//! Every case has a row in `proxy/WIRE.md`, which says what the answer is and by which section of
//! which RFC; [`docs`] holds the two together.

mod chunks;
mod docs;
mod exchanges;
mod fidelity;
mod passed;
mod refused;
mod responses;
mod rig;
mod streams;
mod upstreams;
