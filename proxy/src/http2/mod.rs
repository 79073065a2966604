//! HTTP/2 towards callers: the h2 crate, without a layer between.
//!
//! One task serves a connection with all of its requests: a request costs one allocation for its
//! future, no task and no channel, and whatever the requests of one turn answer leaves with one
//! write.
//!
//! - [`server`]: the connection, its limits in time and its graceful end
//! - [`streams`]: what its requests add up to, as far as their peer can abuse them
//! - [`exchange`]: one request, from its head to the end of its answer
//! - [`answer`]: the body of an answer on its way out
//! - [`request`]: the body of a request as it comes in
//! - [`duplex`]: the two halves of a stream as one byte stream, for tunnels
//! - [`turn`]: who is woken while the task of a connection runs
//!
//! Stands on the life of a request.

pub mod answer;
pub mod duplex;
pub mod exchange;
pub mod request;
pub mod server;
pub mod streams;
pub mod turn;
