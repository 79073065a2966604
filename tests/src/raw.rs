//! HTTP/1.1 byte by byte: an [`Origin`] that remembers every byte it was sent and answers scripted
//! ones, and a [`Caller`] that writes whatever it is told and reads answers without mercy.
//!
//! Both read with [`message`], which accepts what RFC 9112 asks of a sender and nothing more, so a
//! test that reads a message through them has also shown that it is well-formed.

mod caller;
pub mod message;
mod origin;

pub use caller::{Caller, Reply};
pub use message::{Cut, Head, Message};
pub use origin::{Act, Forwarded, Origin, Plan, tell};

use std::time::Duration;

use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::time::timeout;

/// Longer than anything here takes, short enough for a table of cases of which many hang.
pub const PATIENCE: Duration = Duration::from_secs(4);

/// A port that accepts no connection and refuses none, and what keeps it so.
pub async fn black_hole() -> (TcpListener, Vec<TcpStream>) {
    let socket = TcpSocket::new_v4().expect("a socket");
    let any = "127.0.0.1:0".parse().expect("an address");
    socket.bind(any).expect("a port");
    let listener = socket.listen(0).expect("listening");
    let addr = listener.local_addr().expect("an address");
    let mut queued = Vec::new();
    let patience = Duration::from_millis(300);
    while let Ok(connected) = timeout(patience, TcpStream::connect(addr)).await {
        queued.push(connected.expect("queued"));
    }
    (listener, queued)
}
