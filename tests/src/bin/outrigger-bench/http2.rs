//! A client connection of HTTP/2, for plain requests and for gRPC.

use std::io;
use std::net::SocketAddr;

use bytes::Bytes;
use http::{Method, Request};
use http_body_util::{BodyExt as _, Full};
use hyper::client::conn::http2::{self, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpStream;

use crate::{Protocol, Target};

/// 100 bytes in a gRPC frame: not compressed, then the length.
pub(crate) fn grpc_message() -> Bytes {
    let mut frame = vec![0, 0, 0, 0, 100];
    frame.extend_from_slice(&[b'x'; 100]);
    frame.into()
}

pub(crate) async fn open(to: SocketAddr) -> io::Result<SendRequest<Full<Bytes>>> {
    let stream = TcpStream::connect(to).await?;
    stream.set_nodelay(true)?;
    let (sender, connection) = http2::Builder::new(TokioExecutor::new())
        .handshake(TokioIo::new(stream))
        .await
        .map_err(io::Error::other)?;
    tokio::spawn(connection);
    Ok(sender)
}

/// A request that can be made again and again.
pub(crate) fn request(target: &Target) -> io::Result<Request<Full<Bytes>>> {
    let uri = format!("http://{}{}", target.authority, target.path);
    let request = Request::builder().uri(uri);
    let made = match target.protocol {
        Protocol::Grpc => request
            .method(Method::POST)
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .header("user-agent", "outrigger-bench")
            .body(Full::new(grpc_message())),
        _ => request
            .header("user-agent", "outrigger-bench")
            .body(Full::default()),
    };
    made.map_err(io::Error::other)
}

/// Sends a request and reads the answer to its end. An answer that is not 200, or a gRPC answer
/// without its message or with a status other than 0, is an error.
pub(crate) async fn exchange(
    sender: &mut SendRequest<Full<Bytes>>,
    request: Request<Full<Bytes>>,
    grpc: bool,
) -> io::Result<()> {
    sender.ready().await.map_err(io::Error::other)?;
    let answer = sender
        .send_request(request)
        .await
        .map_err(io::Error::other)?;
    let status = answer.status();
    if status != 200 {
        return Err(io::Error::other(format!("answered {status}")));
    }
    let head = answer.headers().get("grpc-status").cloned();
    let body = answer.collect().await.map_err(io::Error::other)?;
    if grpc {
        let trailer = body
            .trailers()
            .and_then(|trailers| trailers.get("grpc-status"));
        let code = trailer.or(head.as_ref()).map(|value| value.as_bytes());
        if code != Some(b"0") {
            return Err(io::Error::other(format!("grpc-status {code:?}")));
        }
        if body.to_bytes().len() != grpc_message().len() {
            return Err(io::Error::other("a gRPC answer without its message"));
        }
    }
    Ok(())
}
