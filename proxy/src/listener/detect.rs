//! What a new connection speaks, from its first bytes and without taking them.

use std::io;
use std::time::Duration;

use outrigger_core::sniff::{Protocol, sniff};
use tokio::net::TcpStream;

/// Enough for the HTTP/2 preface, the longest thing that must be seen whole.
const PEEK: usize = 24;

/// A peer that sends its first bytes one by one is asked again after this.
const AGAIN: Duration = Duration::from_millis(1);

/// Peeks until the protocol is certain.
///
/// # Errors
/// The socket's; `UnexpectedEof` when the peer closed before it said enough.
///
/// # Cancel safety
/// No byte is consumed.
pub async fn detect(stream: &TcpStream) -> io::Result<Protocol> {
    let mut bytes = [0; PEEK];
    let mut seen = 0;
    loop {
        let length = stream.peek(&mut bytes).await?;
        if length == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        match sniff(&bytes[..length]) {
            Protocol::NeedMore if length == seen => tokio::time::sleep(AGAIN).await,
            Protocol::NeedMore => seen = length,
            certain => return Ok(certain),
        }
    }
}
