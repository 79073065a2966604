//! TLS on the inbound listener: told from plaintext by first bytes, ended here, and whose it is.
//!
//! | `mtls.mode` | plaintext | TLS that asks for a protocol of the mesh | other TLS |
//! |---|---|---|---|
//! | Strict | refused: `plaintext` | ended here | ended here |
//! | Permissive | served | ended here | the application's own, passed through |
//! | Disabled | served | ended here | the application's own, passed through |
//!
//! Disabled is about what is asked of callers and what they are told; one that still speaks TLS
//! while a change of mode is on its way is served. In Strict nothing is passed through that was
//! not authenticated, so TLS of the application travels within the mesh's.
//!
//! Stands at the head of the life of a request.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use http::HeaderValue;
use outrigger_config::model::{AppProtocol, MtlsMode};
use outrigger_core::client_hello::ClientHello;
use sha2::{Digest as _, Sha256};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, TlsStream, server};
use tracing::debug;

use crate::clock;
use crate::http::context::{Caller, Connection};
use crate::identity;
use crate::identity::svid::{H2, HTTP1, MESH_H2, MESH_HTTP1, MESH_TCP, Svid};
use crate::identity::verify::{self, Refused};
use crate::io::Io;
use crate::listener::accept::closing;
use crate::listener::detect::{self, Detected};
use crate::listener::orig_dst::Refusal;
use crate::upstream::connect::{self, within};
use crate::worker::Worker;

/// How long a peer whose handshake failed may take to read why, and what it may still send.
const FAREWELL: Duration = Duration::from_secs(1);
const FAREWELL_BYTES: u64 = 64 * 1024;

/// What became of a connection.
pub enum Received {
    /// It is served as it comes.
    Plain(TcpStream),
    /// It is from a verified peer.
    Secure(Io, Carried),
    /// It is refused.
    Refused(TcpStream, Refusal),
    /// It is over.
    Over,
}

/// What a connection carries within TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Carried {
    /// HTTP/1.
    Http1,
    /// HTTP/2.
    Http2,
    /// Opaque bytes.
    Tcp,
}

/// Looks at a new inbound connection of a sidecar with an identity, and ends its TLS.
pub async fn receive(
    worker: &Rc<Worker>,
    stream: TcpStream,
    connection: &mut Connection,
    declared: Option<AppProtocol>,
) -> Received {
    let mode = mode(worker, connection);
    let hello = match first_bytes(worker, &stream, connection, declared, mode).await {
        Some(Some(hello)) => hello,
        Some(None) if mode == MtlsMode::Strict => {
            return Received::Refused(stream, Refusal::Plaintext);
        }
        Some(None) => return Received::Plain(stream),
        None => return Received::Over,
    };
    if mode != MtlsMode::Strict && !is_mesh(&hello) {
        return Received::Plain(stream);
    }
    match handshake(worker, stream, connection).await {
        Ok(session) => {
            let carried = carried(session.get_ref().1.alpn_protocol(), declared);
            let io = Io::mutual_tls(TlsStream::Server(session), &worker.outlived.inbound);
            Received::Secure(io, carried)
        }
        Err(refused) => {
            let (peer, reason) = (connection.peer, refused.reason());
            debug!(%peer, reason, error = %refused, "TLS handshake failed");
            let metrics = &worker.shared.metrics;
            identity::count_refusal(metrics, connection.direction, &refused);
            Received::Over
        }
    }
}

/// What counts on the port that was called.
fn mode(worker: &Worker, connection: &Connection) -> MtlsMode {
    let app = worker.shared.bootstrap.app;
    let port = connection.original.or(app).map(|addr| addr.port());
    let snapshot = worker.snapshot();
    let app = snapshot.app.as_ref();
    app.map_or(MtlsMode::Permissive, |app| app.mtls.at(port))
}

/// The peer's hello; `Some(None)` when it speaks something else or waits to be spoken to, `None`
/// when the connection is over.
async fn first_bytes(
    worker: &Worker,
    stream: &TcpStream,
    connection: &Connection,
    declared: Option<AppProtocol>,
    mode: MtlsMode,
) -> Option<Option<ClientHello>> {
    let wire = &worker.shared.wire;
    // Only where plaintext may be served can there be a server that speaks first.
    let opaque = matches!(declared, Some(AppProtocol::Tcp | AppProtocol::Tls));
    let patience = match wire.detect_timeout {
        Some(detect) if mode != MtlsMode::Strict && (opaque || declared.is_none()) => {
            detect.min(wire.header_timeout)
        }
        _ => wire.header_timeout,
    };
    tokio::select! {
        biased;
        detected = detect::detect(stream) => match detected {
            Ok(Detected::Tls(hello)) => Some(Some(hello.unwrap_or_default())),
            Ok(_) => Some(None),
            Err(error) => {
                debug!(peer = %connection.peer, %error, "connection closed before its first byte");
                None
            }
        },
        () = worker.wheel.sleep_until(clock::now() + patience) => Some(None),
        () = closing(&worker.shared.drain, connection.direction) => None,
    }
}

fn is_mesh(hello: &ClientHello) -> bool {
    let ours = [MESH_H2, MESH_HTTP1, MESH_TCP];
    hello.alpn.iter().any(|asked| ours.contains(&&asked[..]))
}

fn carried(alpn: Option<&[u8]>, declared: Option<AppProtocol>) -> Carried {
    match (alpn, declared) {
        (Some(MESH_H2 | H2), _) => Carried::Http2,
        (Some(MESH_HTTP1 | HTTP1), _) => Carried::Http1,
        (Some(_), _) => Carried::Tcp,
        // Whoever asks for nothing knows what is there.
        (None, Some(AppProtocol::Tcp | AppProtocol::Tls)) => Carried::Tcp,
        (None, Some(AppProtocol::H2c | AppProtocol::Grpc)) => Carried::Http2,
        (None, Some(AppProtocol::Http) | None) => Carried::Http1,
    }
}

async fn handshake(
    worker: &Worker,
    stream: TcpStream,
    connection: &mut Connection,
) -> Result<server::TlsStream<TcpStream>, Refused> {
    let Some(svid) = worker.shared.identity.current() else {
        return Err(worker.shared.identity.missing());
    };
    let accepting = TlsAcceptor::from(Arc::clone(&svid.server)).accept(stream);
    let due = connect::due(worker.shared.wire.header_timeout);
    let accepted = within(&worker.wheel, due, accepting.into_fallible()).await;
    let session = match accepted {
        Some(Ok(session)) => session,
        Some(Err((error, stream))) => {
            farewell(worker, stream).await;
            return Err(Refused::of(&error));
        }
        None => return Err(Refused::TimedOut),
    };
    let leaf = session.get_ref().1.peer_certificates();
    let leaf = leaf.and_then(<[_]>::first).ok_or(Refused::NoCertificate)?;
    connection.caller = Some(Rc::new(caller(&svid, leaf)?));
    Ok(session)
}

/// Lets the alert arrive: closing on unread bytes would reset the connection and destroy it.
async fn farewell(worker: &Worker, mut stream: TcpStream) {
    let reading = async {
        stream.shutdown().await?;
        let mut rest = stream.take(FAREWELL_BYTES);
        tokio::io::copy(&mut rest, &mut tokio::io::sink()).await
    };
    // Whatever it still says, and however that fails: it is over.
    let _ = within(&worker.wheel, connect::due(FAREWELL), reading).await;
}

/// The peer, and how it is told to the application, in Envoy's words.
fn caller(svid: &Svid, leaf: &rustls::pki_types::CertificateDer<'_>) -> Result<Caller, Refused> {
    let id = verify::subject(leaf)?;
    let hash: String = Sha256::digest(leaf)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let text = format!("By={};Hash={hash};URI={id}", svid.id);
    let forwarded = HeaderValue::from_str(&text).map_err(|_| Refused::NotSpiffe(id.to_string()))?;
    Ok(Caller { id, forwarded })
}
