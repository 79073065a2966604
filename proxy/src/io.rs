//! The byte stream of a connection: a socket, or TLS over one.
//!
//! What follows in the life of a request does not care which. Plaintext pays one branch a call.

use std::fmt;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::TlsStream;

use crate::identity::expiry::{Expiry, Outlived};

/// The byte stream of a connection.
pub enum Io {
    /// As it comes.
    Plain(TcpStream),
    /// Encrypted. Boxed: the state of a session is over a kilobyte.
    Tls(Box<Session>),
}

impl fmt::Debug for Io {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self {
            Self::Plain(_) => "Plain",
            Self::Tls(_) => "Tls",
        };
        f.debug_tuple(kind).field(self.socket()).finish()
    }
}

/// TLS over a socket.
pub struct Session {
    stream: TlsStream<TcpStream>,
    expiry: Option<Expiry>,
}

impl Io {
    /// TLS with a peer that is known by its name, if at all.
    pub fn tls(stream: TlsStream<TcpStream>) -> Self {
        Self::Tls(Box::new(Session {
            stream,
            expiry: None,
        }))
    }

    /// The same with a peer of the mesh: the connection ends with the peer's certificate.
    pub fn mutual_tls(stream: TlsStream<TcpStream>, outlived: &Outlived) -> Self {
        let leaf = stream.get_ref().1.peer_certificates();
        let expiry = leaf.and_then(|chain| Expiry::of(chain.first()?, outlived));
        Self::Tls(Box::new(Session { stream, expiry }))
    }

    /// When the peer's certificate ends the connection, if one does.
    pub fn expiry(&self) -> Option<&Expiry> {
        match self {
            Self::Plain(_) => None,
            Self::Tls(session) => session.expiry.as_ref(),
        }
    }

    /// The socket itself.
    pub fn socket(&self) -> &TcpStream {
        match self {
            Self::Plain(socket) => socket,
            Self::Tls(session) => session.stream.get_ref().0,
        }
    }

    /// Makes the end of the socket a reset: a proper end would tell the peer that it has all.
    pub fn reset(&self) {
        // A socket that refuses this is gone already.
        let _ = self.socket().set_zero_linger();
    }

    /// Whether nothing has come and nobody has closed. Takes what it finds away: whatever it is,
    /// the connection is not to be used.
    pub fn is_quiet(&self) -> bool {
        // Not polled: a task that has used up its turn would be told that nothing is there.
        let found = self.socket().try_read(&mut [0]);
        matches!(found, Err(error) if error.kind() == io::ErrorKind::WouldBlock)
    }

    /// Ready when a read may find something. Moves on what TLS still holds of the last writes.
    ///
    /// # Errors
    /// The socket's, and those of a peer that breaks TLS.
    pub fn poll_read_ready(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let session = match self {
            Self::Plain(socket) => return socket.poll_read_ready(cx),
            Self::Tls(session) => &mut session.stream,
        };
        if session.get_ref().1.wants_write()
            && let Poll::Ready(Err(error)) = Pin::new(&mut *session).poll_flush(cx)
        {
            return Poll::Ready(Err(error));
        }
        let (socket, seen) = match session {
            TlsStream::Client(session) => {
                let (socket, state) = session.get_mut();
                (socket, state.process_new_packets())
            }
            TlsStream::Server(session) => {
                let (socket, state) = session.get_mut();
                (socket, state.process_new_packets())
            }
        };
        let seen = seen.map_err(io::Error::other)?;
        if seen.plaintext_bytes_to_read() > 0 || seen.peer_has_closed() {
            return Poll::Ready(Ok(()));
        }
        ready!(socket.poll_read_ready(cx))?;
        Poll::Ready(Ok(()))
    }
}

impl AsyncRead for Io {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(socket) => Pin::new(socket).poll_read(cx, into),
            Self::Tls(session) => Pin::new(&mut session.stream).poll_read(cx, into),
        }
    }
}

impl AsyncWrite for Io {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(socket) => Pin::new(socket).poll_write(cx, bytes),
            Self::Tls(session) => Pin::new(&mut session.stream).poll_write(cx, bytes),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(socket) => Pin::new(socket).poll_write_vectored(cx, slices),
            Self::Tls(session) => Pin::new(&mut session.stream).poll_write_vectored(cx, slices),
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(socket) => Pin::new(socket).poll_flush(cx),
            Self::Tls(session) => Pin::new(&mut session.stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(socket) => Pin::new(socket).poll_shutdown(cx),
            Self::Tls(session) => Pin::new(&mut session.stream).poll_shutdown(cx),
        }
    }
}
