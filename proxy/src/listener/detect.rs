//! What a new connection speaks, from its first bytes and without taking them.
//!
//! Stands at the head of the life of a request.

use std::io;

use outrigger_core::client_hello::{self, ClientHello, Hello};
use outrigger_core::sniff::{Protocol, sniff};
use tokio::io::Interest;
use tokio::net::TcpStream;

/// Enough for the HTTP/2 preface, the longest thing that must be seen whole.
const PEEK: usize = 24;

/// What a connection speaks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Detected {
    /// HTTP/1.
    Http1,
    /// HTTP/2 with prior knowledge.
    Http2,
    /// TLS; with what the client asked for when its hello could be read.
    Tls(Option<ClientHello>),
    /// Something else.
    Opaque,
}

/// Peeks until the protocol is certain. Whoever ends its side before that speaks none that we
/// know.
///
/// # Errors
/// The socket's; `UnexpectedEof` when the peer closed before it said anything.
///
/// # Cancel safety
/// No byte is consumed.
pub async fn detect(stream: &TcpStream) -> io::Result<Detected> {
    let mut bytes = [0; PEEK];
    let mut ended = false;
    loop {
        let length = peek(stream, &mut bytes).await?;
        match sniff(&bytes[..length]) {
            Protocol::Http1 => return Ok(Detected::Http1),
            Protocol::Http2 => return Ok(Detected::Http2),
            Protocol::Opaque => return Ok(Detected::Opaque),
            // Boxed: the buffer for a hello is large, and few connections need it.
            Protocol::Tls => return Ok(Detected::Tls(Box::pin(hello(stream)).await?)),
            Protocol::NeedMore if ended || length == PEEK => return Ok(Detected::Opaque),
            Protocol::NeedMore => ended = await_more(stream).await?,
        }
    }
}

/// The client's hello, once it is whole; none when it is broken.
async fn hello(stream: &TcpStream) -> io::Result<Option<ClientHello>> {
    let mut bytes = vec![0; 2048];
    let mut ended = false;
    loop {
        let length = peek(stream, &mut bytes).await?;
        match client_hello::parse(&bytes[..length]) {
            Hello::Complete(hello) => return Ok(Some(hello)),
            Hello::Malformed => return Ok(None),
            Hello::NeedMore if length == bytes.len() => bytes.resize(client_hello::LONGEST, 0),
            Hello::NeedMore if ended => return Ok(None),
            Hello::NeedMore => ended = await_more(stream).await?,
        }
    }
}

async fn peek(stream: &TcpStream, bytes: &mut [u8]) -> io::Result<usize> {
    match stream.peek(bytes).await? {
        0 => Err(io::ErrorKind::UnexpectedEof.into()),
        length => Ok(length),
    }
}

/// Waits for bytes beyond those that are there; true when the next peek sees the last of them.
///
/// Without forgetting that the socket is readable it would stay so for the bytes that are there.
/// The kernel tells of every arrival (edge-triggered), and nothing is awaited between the peek and
/// this, so none is missed. An end is never forgotten: who waited for more after it would be told
/// at once, again and again.
async fn await_more(stream: &TcpStream) -> io::Result<bool> {
    let seen: io::Result<()> = Err(io::ErrorKind::WouldBlock.into());
    let _ = stream.try_io(Interest::READABLE, || seen);
    let ready = stream.ready(Interest::READABLE).await?;
    Ok(ready.is_read_closed())
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;

    async fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap())
            .await
            .unwrap();
        client.set_nodelay(true).unwrap();
        (client, listener.accept().await.unwrap().0)
    }

    #[tokio::test]
    async fn bytes_that_come_one_by_one_are_told_and_left_where_they_are() {
        for (sent, expected) in [
            (&b"GET / HTTP/1.1\r\n"[..], Detected::Http1),
            (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", Detected::Http2),
            (b"EHLO example.org\r\n", Detected::Opaque),
            (
                b"\r\n\r\n\r\n\r\n\r\n\r\n\r\n\r\n\r\n\r\n\r\n\r\n",
                Detected::Opaque,
            ),
        ] {
            let (mut client, mut server) = pair().await;
            let sending = async {
                for byte in sent {
                    client.write_all(&[*byte]).await.unwrap();
                    tokio::task::yield_now().await;
                }
            };
            let (detected, ()) = tokio::join!(detect(&server), sending);
            assert_eq!(detected.unwrap(), expected);
            let mut received = vec![0; sent.len()];
            server.read_exact(&mut received).await.unwrap();
            assert_eq!(received, sent);
        }
    }

    #[tokio::test]
    async fn a_hello_in_pieces_is_read_whole() {
        // One record: a hello without extensions but with a session of 32 bytes.
        let mut body = [vec![3, 3], vec![7; 32], vec![32], vec![9; 32]].concat();
        body.extend([0, 2, 0x13, 1, 1, 0]);
        // An unknown extension of 4000 bytes.
        let extension = [vec![0x12, 0x34, 0x0f, 0xa0], vec![1; 4000]].concat();
        body.extend(u16::try_from(extension.len()).unwrap().to_be_bytes());
        body.extend(extension);
        let message = [
            vec![1],
            u32::try_from(body.len()).unwrap().to_be_bytes()[1..].to_vec(),
            body,
        ]
        .concat();
        let length = u16::try_from(message.len()).unwrap().to_be_bytes();
        let record = [vec![22, 3, 1], length.to_vec(), message].concat();
        let (mut client, server) = pair().await;
        let sending = async {
            for piece in record.chunks(500) {
                client.write_all(piece).await.unwrap();
                tokio::task::yield_now().await;
            }
        };
        let (detected, ()) = tokio::join!(detect(&server), sending);
        assert_eq!(
            detected.unwrap(),
            Detected::Tls(Some(ClientHello::default()))
        );
    }

    #[tokio::test]
    async fn a_peer_that_ends_too_early_is_not_waited_for() {
        for (sent, expected) in [
            (&b"P"[..], Detected::Opaque),
            (b"PRI * HTTP/2", Detected::Opaque),
            (b"GET / HTTP/1.1\r\n", Detected::Http1),
            (b"\x16\x03\x01\x02\x00\x01", Detected::Tls(None)),
        ] {
            let (mut client, server) = pair().await;
            client.write_all(sent).await.unwrap();
            let ending = async {
                // The first bytes have been looked at by now.
                tokio::task::yield_now().await;
                client.shutdown().await.unwrap();
            };
            let within = std::time::Duration::from_secs(5);
            let detecting = tokio::time::timeout(within, detect(&server));
            let (detected, ()) = tokio::join!(detecting, ending);
            assert_eq!(detected.expect("no waiting").unwrap(), expected);
        }
    }

    #[tokio::test]
    async fn a_peer_that_closes_said_nothing() {
        let (client, server) = pair().await;
        drop(client);
        let error = detect(&server).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}
