//! Whatever a pod throws at its sidecar: opaque bytes, TLS, servers that speak first, and
//! connections that were redirected, in network namespaces of the tests' own.

#![allow(clippy::unwrap_used)]

mod inbound;
mod intercepted;
mod passthrough;
mod tls;

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr};

use outrigger_tests::netns::{End, connect, read_to_end};
use outrigger_tests::upstream;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

/// A server that greets everybody with `greeting` and then sends back what it gets, in upper
/// case.
async fn shouter(addr: &str, greeting: &'static str) -> upstream::Raw {
    upstream::Raw::on(
        addr.parse().expect("an address"),
        move |mut stream| async move {
            let _ = stream.write_all(greeting.as_bytes()).await;
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = stream.read(&mut buffer).await {
                let _ = stream
                    .write_all(&buffer[..count].to_ascii_uppercase())
                    .await;
            }
            let _ = stream.write_all(b"bye").await;
        },
    )
    .await
}

/// Sends `text`, ends its side, and reads what comes back.
async fn say(stream: &mut TcpStream, text: &str) -> (String, End) {
    let _ = stream.write_all(text.as_bytes()).await;
    let _ = stream.shutdown().await;
    read_to_end(stream).await
}

/// As [`say`], on a new connection. One that is refused may be reset before it is even known here.
async fn dial(source: IpAddr, to: SocketAddr, text: &str) -> (String, End) {
    match connect(source, to).await {
        Ok(mut stream) => say(&mut stream, text).await,
        Err(error) if error.kind() == ErrorKind::ConnectionReset => (String::new(), End::Reset),
        Err(error) => panic!("{to}: {error}"),
    }
}
