//! One check of one endpoint, on a connection of its own.
//!
//! A fresh connection each time: that the endpoint still accepts is part of what is asked. Counts
//! nowhere but in its own metric.

use std::net::SocketAddr;
use std::sync::Arc;

use bytes::{BufMut as _, Bytes, BytesMut};
use http::header::{CONTENT_TYPE, HOST, TE, USER_AGENT};
use http::{HeaderValue, Method, Request, Version};
use http_body_util::{BodyExt as _, Empty, Full, Limited};
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use outrigger_core::grpc::GrpcCode;

use super::Probe;
use crate::app::Shared;
use crate::error::chain;
use crate::identity::expiry::Outlived;
use crate::identity::peers::Peers;
use crate::io::Io;
use crate::listener::Direction;
use crate::upstream::connect::{self, Protocol, Secure, Source};
use crate::wheel::Wheel;

/// What an HTTP check calls itself.
const AGENT: HeaderValue = HeaderValue::from_static("outrigger-health-check");

/// More than any answer to a gRPC health check.
const MAX_ANSWER: usize = 4096;

/// Whom to ask.
pub(super) struct Endpoint {
    pub(super) addr: SocketAddr,
    pub(super) protocol: Protocol,
    /// Who may answer; none is plaintext.
    pub(super) peers: Option<Arc<Peers>>,
}

/// Asks once.
///
/// # Errors
/// Why the endpoint is not well, for a person.
///
/// # Cancel safety
/// Dropping the future closes the connection.
pub(super) async fn ask(shared: &Shared, probe: &Probe, at: &Endpoint) -> Result<(), String> {
    match probe {
        Probe::Tcp => open(shared, at, at.protocol).await.map(|_| ()),
        Probe::Http { path, host, codes } => {
            let io = open(shared, at, at.protocol).await?;
            let request = Request::builder()
                .method(Method::GET)
                .header(USER_AGENT, AGENT);
            let status = match at.protocol {
                Protocol::Http1 => {
                    let request = request.uri(path.as_str()).header(HOST, host);
                    let request = request.body(Empty::<Bytes>::new()).map_err(text)?;
                    let (mut sender, connection) =
                        http1::handshake(TokioIo::new(io)).await.map_err(text)?;
                    tokio::select! {
                        biased;
                        // Until the head; the rest is of no interest.
                        answer = sender.send_request(request) => answer.map_err(text)?.status(),
                        ended = connection => return Err(broke(ended)),
                    }
                }
                Protocol::Http2 => {
                    let request = request.uri(format!("http://{host}{path}"));
                    let request = request.body(Empty::<Bytes>::new()).map_err(text)?;
                    let builder = http2::Builder::new(TokioExecutor::new());
                    let (mut sender, connection) =
                        builder.handshake(TokioIo::new(io)).await.map_err(text)?;
                    tokio::select! {
                        biased;
                        answer = sender.send_request(request) => answer.map_err(text)?.status(),
                        ended = connection => return Err(broke(ended)),
                    }
                }
            };
            match codes.contains(status) {
                true => Ok(()),
                false => Err(format!("answered {}", status.as_u16())),
            }
        }
        Probe::Grpc { service, host } => {
            let io = open(shared, at, Protocol::Http2).await?;
            grpc(io, service, host).await
        }
    }
}

async fn open(shared: &Shared, at: &Endpoint, protocol: Protocol) -> Result<Io, String> {
    // Its timers are not used: the check as a whole has a limit.
    let wheel = Wheel::new();
    let timeless = std::time::Duration::ZERO;
    let stream = connect::tcp(&wheel, at.addr, Source::Any, timeless)
        .await
        .map_err(text)?;
    let Some(peers) = &at.peers else {
        return Ok(Io::Plain(stream));
    };
    let svid = shared.identity.current();
    let svid = svid.ok_or_else(|| shared.identity.missing().to_string())?;
    let secure = Secure { svid: &svid, peers };
    let config = secure.config(at.addr, protocol).map_err(text)?;
    // A check is over long before a certificate is.
    let outlived = Outlived::new(&shared.metrics, Direction::Outbound, timeless);
    connect::tls(&wheel, at.addr, stream, config, &outlived, None)
        .await
        .map_err(text)
}

/// `grpc.health.v1.Health/Check`.
async fn grpc(io: Io, service: &str, host: &str) -> Result<(), String> {
    let request = Request::builder()
        .method(Method::POST)
        .version(Version::HTTP_2)
        .uri(format!("http://{host}/grpc.health.v1.Health/Check"))
        .header(CONTENT_TYPE, "application/grpc")
        .header(TE, "trailers")
        .header(USER_AGENT, AGENT)
        .body(Full::new(question(service)))
        .map_err(text)?;
    let builder = http2::Builder::new(TokioExecutor::new());
    let (mut sender, connection) = builder.handshake(TokioIo::new(io)).await.map_err(text)?;
    let asking = async {
        let answer = sender.send_request(request).await.map_err(text)?;
        let (head, body) = answer.into_parts();
        let body = Limited::new(body, MAX_ANSWER).collect().await;
        let body = body.map_err(|error| error.to_string())?;
        let code = GrpcCode::from_headers(&head.headers)
            .or_else(|| body.trailers().and_then(GrpcCode::from_headers))
            .unwrap_or_else(|| GrpcCode::from_http(head.status));
        if code != GrpcCode::Ok {
            return Err(format!("answered {}", code.name()));
        }
        match status(&body.to_bytes()) {
            Some(SERVING) => Ok(()),
            Some(NOT_SERVING) => Err("answered NOT_SERVING".to_owned()),
            Some(status) => Err(format!("answered the serving status {status}")),
            None => Err("answered with no HealthCheckResponse".to_owned()),
        }
    };
    tokio::select! {
        biased;
        asked = asking => asked,
        ended = connection => Err(broke(ended)),
    }
}

/// `grpc.health.v1.HealthCheckResponse.ServingStatus`.
const SERVING: u64 = 1;
const NOT_SERVING: u64 = 2;

/// A `HealthCheckRequest` as a gRPC message: field 1 is the service.
fn question(service: &str) -> Bytes {
    let mut message = BytesMut::new();
    if !service.is_empty() {
        message.put_u8(0x0a);
        varint(service.len() as u64, &mut message);
        message.put_slice(service.as_bytes());
    }
    let mut framed = BytesMut::new();
    framed.put_u8(0);
    framed.put_u32(u32::try_from(message.len()).unwrap_or(u32::MAX));
    framed.put(message);
    framed.freeze()
}

fn varint(mut value: u64, into: &mut BytesMut) {
    while value >= 0x80 {
        into.put_u8((value as u8) | 0x80);
        value >>= 7;
    }
    into.put_u8(value as u8);
}

/// The status of a `HealthCheckResponse`: field 1, a varint; a message without it says UNKNOWN,
/// 0.
fn status(framed: &[u8]) -> Option<u64> {
    let (prefix, message) = framed.split_at_checked(5)?;
    let length = u32::from_be_bytes(prefix[1..].try_into().ok()?) as usize;
    if prefix[0] != 0 || message.len() != length {
        return None;
    }
    match message {
        [] => Some(0),
        [0x08, value] if *value < 0x80 => Some(u64::from(*value)),
        _ => None,
    }
}

fn text(error: impl std::error::Error) -> String {
    chain(&error)
}

fn broke(ended: Result<(), hyper::Error>) -> String {
    ended
        .err()
        .map_or_else(|| "closed the connection".to_owned(), text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_question_names_the_service_or_asks_for_the_server() {
        assert_eq!(&question("")[..], [0, 0, 0, 0, 0]);
        assert_eq!(&question("ab")[..], [0, 0, 0, 0, 4, 0x0a, 2, b'a', b'b']);
    }

    #[test]
    fn an_answer_is_a_status_or_none() {
        let check = |framed: &[u8], expected| assert_eq!(status(framed), expected, "{framed:?}");
        check(&[0, 0, 0, 0, 2, 8, 1], Some(SERVING));
        check(&[0, 0, 0, 0, 2, 8, 2], Some(NOT_SERVING));
        check(&[0, 0, 0, 0, 0], Some(0));
        check(&[], None);
        check(&[0, 0, 0, 0, 9, 8, 1], None);
        check(&[1, 0, 0, 0, 2, 8, 1], None);
        check(&[0, 0, 0, 0, 2, 8, 0x80], None);
    }
}
