//! Opens one connection to one endpoint: TCP, then TLS where the endpoint has an identity.
//!
//! Who is connected to, and as whom, is part of [`Target`], so that connections of different
//! identities never share a pool. Stands on the life of a request.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use outrigger_core::time::Mono;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::net::{TcpSocket, TcpStream};
use tokio_rustls::{TlsConnector, TlsStream};

use crate::clock;
use crate::identity::expiry::Outlived;
use crate::identity::peers::Peers;
use crate::identity::svid::{H2, HTTP1, MESH_H2, MESH_HTTP1, Svid};
use crate::identity::verify::Refused;
use crate::io::Io;
use crate::wheel::Wheel;

/// What may be on its way to us unread, by h2 stream: enough for a few hundred Mbit/s at 20 ms
/// without holding megabytes for a slow reader.
pub(crate) const STREAM_WINDOW: u32 = 256 * 1024;
/// The same by upstream connection: room for every stream of a usual one (128), so that streams
/// whose readers stand still stop no other. The h2 crate derives from it how many small frames
/// may wait, too.
pub(crate) const CONNECTION_WINDOW: u32 = 32 * 1024 * 1024;

/// The HTTP version spoken to an endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Protocol {
    /// HTTP/1.1, one exchange at a time per connection.
    #[default]
    Http1,
    /// HTTP/2, multiplexed; with prior knowledge in plaintext.
    Http2,
}

/// Everything that makes two connections interchangeable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Target {
    /// Where to connect.
    pub addr: SocketAddr,
    /// What to speak.
    pub protocol: Protocol,
    /// Where to connect from.
    pub source: Source,
    /// Whom to expect there, and as whom to come; none is plaintext.
    pub session: Option<Session>,
}

/// What tells connections with mutual TLS apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Session {
    /// [`Peers::key`].
    peers: u128,
    /// [`Svid::generation`].
    pub generation: u64,
}

/// Both ends of a connection with mutual TLS.
pub struct Secure<'a> {
    /// Who we are.
    pub svid: &'a Svid,
    /// Who may answer.
    pub peers: &'a Arc<Peers>,
}

impl Secure<'_> {
    /// What tells its connections apart from others.
    pub fn session(&self) -> Session {
        Session {
            peers: self.peers.key(),
            generation: self.svid.generation,
        }
    }

    /// How TLS is spoken for connections that carry `protocol`.
    ///
    /// # Errors
    /// [`ConnectError::Tls`].
    pub fn config(
        &self,
        addr: SocketAddr,
        protocol: Protocol,
    ) -> Result<Arc<ClientConfig>, ConnectError> {
        let alpn = match protocol {
            Protocol::Http1 => [MESH_HTTP1, HTTP1],
            Protocol::Http2 => [MESH_H2, H2],
        };
        self.svid.client(self.peers, &alpn).map_err(|error| {
            let refused = Refused::Protocol(error.to_string());
            ConnectError::Tls { addr, refused }
        })
    }
}

/// The address that a connection leaves from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Source {
    /// The kernel's choice.
    #[default]
    Any,
    /// One on loopback, to an address of this host: to the application, where its callers found
    /// it. The redirect rules leave it alone ([`crate::intercept`]); any other connection of ours
    /// to such an address is for our own inbound listener, so without this one it would never
    /// arrive.
    Loopback,
}

/// Istio's, so that it is known by sight in lists of connections.
const LOOPBACK_V4: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 6);

/// Why no connection came about. No byte of a request was sent.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// Refused, unreachable or reset.
    #[error("connect to {addr}")]
    Io {
        /// The endpoint.
        addr: SocketAddr,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Not established within the connect timeout.
    #[error("connect to {addr} within {after:?}")]
    TimedOut {
        /// The endpoint.
        addr: SocketAddr,
        /// The timeout.
        after: Duration,
    },
    /// The connect that this request shared with others failed.
    #[error("{reason}")]
    Shared {
        /// How it failed.
        reason: String,
        /// Whether TLS was what failed.
        tls: bool,
    },
    /// There is no TLS session: one of the two ends refused the other.
    #[error("TLS with {addr}")]
    Tls {
        /// The endpoint.
        addr: SocketAddr,
        /// Why.
        #[source]
        refused: Refused,
    },
    /// The peer did not speak the protocol.
    #[error("HTTP handshake with {addr}")]
    Handshake {
        /// The endpoint.
        addr: SocketAddr,
        /// What h2 said.
        #[source]
        source: h2::Error,
    },
}

impl ConnectError {
    /// Whether TLS was what failed.
    pub fn is_tls(&self) -> bool {
        matches!(self, Self::Tls { .. } | Self::Shared { tls: true, .. })
    }
}

/// When a connect that begins now must be done; none when there is no limit.
pub fn due(timeout: Duration) -> Option<Mono> {
    (!timeout.is_zero()).then(|| clock::now() + timeout)
}

/// Waits for `work` until `due`; none when that passed first.
pub async fn within<T>(
    wheel: &Wheel,
    due: Option<Mono>,
    work: impl Future<Output = T>,
) -> Option<T> {
    let Some(due) = due else {
        return Some(work.await);
    };
    tokio::select! {
        biased;
        done = work => Some(done),
        () = wheel.sleep_until(due) => None,
    }
}

/// Puts TLS over a connection to `addr`, until `due`; it ends as `outlived` says.
///
/// # Errors
/// [`ConnectError::Tls`]. That the peer refuses our certificate shows later, with the first read.
///
/// # Cancel safety
/// Dropping the future closes the socket.
pub async fn tls(
    wheel: &Wheel,
    addr: SocketAddr,
    stream: TcpStream,
    config: Arc<ClientConfig>,
    outlived: &Outlived,
    due: Option<Mono>,
) -> Result<Io, ConnectError> {
    // Its name is its address: who it is, the verifier asks of the certificate.
    let name = ServerName::IpAddress(addr.ip().into());
    let handshake = TlsConnector::from(config).connect(name, stream);
    let refused = match within(wheel, due, handshake).await {
        Some(Ok(session)) => {
            return Ok(Io::mutual_tls(TlsStream::Client(session), outlived));
        }
        Some(Err(error)) => Refused::of(&error),
        None => Refused::TimedOut,
    };
    Err(ConnectError::Tls { addr, refused })
}

/// Opens a TCP connection, at most `timeout` long.
///
/// # Errors
/// [`ConnectError::Io`] and [`ConnectError::TimedOut`].
///
/// # Cancel safety
/// Dropping the future closes the half-open socket.
pub async fn tcp(
    wheel: &Wheel,
    addr: SocketAddr,
    source: Source,
    timeout: Duration,
) -> Result<TcpStream, ConnectError> {
    let connecting = async {
        match source {
            Source::Any => TcpStream::connect(addr).await,
            Source::Loopback => from_loopback(addr)?.connect(addr).await,
        }
    };
    let stream = if timeout.is_zero() {
        connecting.await
    } else {
        tokio::select! {
            biased;
            connected = connecting => connected,
            () = wheel.sleep_until(clock::now() + timeout) => {
                return Err(ConnectError::TimedOut { addr, after: timeout });
            }
        }
    };
    let stream = stream.map_err(|source| ConnectError::Io { addr, source })?;
    // Small writes must not wait for an acknowledgement. A socket that refuses the option is
    // already dead, which the first write reports better.
    let _ = stream.set_nodelay(true);
    Ok(stream)
}

fn from_loopback(addr: SocketAddr) -> io::Result<TcpSocket> {
    let (socket, source) = match addr {
        SocketAddr::V4(_) => (TcpSocket::new_v4()?, SocketAddr::from((LOOPBACK_V4, 0))),
        SocketAddr::V6(_) => (
            TcpSocket::new_v6()?,
            SocketAddr::from((Ipv6Addr::LOCALHOST, 0)),
        ),
    };
    socket.bind(source)?;
    Ok(socket)
}

/// What an upstream may send in a head.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Header fields in one head.
    pub max_headers: usize,
    /// Bytes of one head.
    pub max_header_bytes: usize,
}

impl Limits {
    /// As the HTTP/1.1 codec takes them.
    pub fn http1(&self) -> outrigger_core::http1::Limits {
        outrigger_core::http1::Limits {
            max_fields: self.max_headers,
            max_head_bytes: self.max_header_bytes,
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn the_application_is_reached_from_loopback() {
        for (at, from) in [("127.0.0.1:0", "127.0.0.6"), ("[::1]:0", "::1")] {
            let Ok(listener) = TcpListener::bind(at).await else {
                continue; // A machine without IPv6.
            };
            let addr = listener.local_addr().unwrap();
            let connecting = tcp(&Wheel::new(), addr, Source::Loopback, Duration::ZERO).await;
            let (_, peer) = listener.accept().await.unwrap();
            assert_eq!(peer.ip().to_string(), from);
            assert_eq!(connecting.unwrap().local_addr().unwrap(), peer);
        }
    }
}
