//! The byte stream of a connection: a socket, or TLS over one.
//!
//! What follows in the life of a request does not care which. Plaintext pays one branch a call.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::TlsStream;

/// The byte stream of a connection.
#[derive(Debug)]
pub enum Io {
    /// As it comes.
    Plain(TcpStream),
    /// Encrypted. Boxed: the state of a session is over a kilobyte.
    Tls(Box<TlsStream<TcpStream>>),
}

impl Io {
    /// The socket itself.
    pub fn socket(&self) -> &TcpStream {
        match self {
            Self::Plain(socket) => socket,
            Self::Tls(session) => session.get_ref().0,
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
            Self::Tls(session) => session,
        };
        if session.get_ref().1.wants_write()
            && let Poll::Ready(Err(error)) = Pin::new(&mut **session).poll_flush(cx)
        {
            return Poll::Ready(Err(error));
        }
        let (socket, seen) = match &mut **session {
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
            Self::Tls(session) => Pin::new(&mut **session).poll_read(cx, into),
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
            Self::Tls(session) => Pin::new(&mut **session).poll_write(cx, bytes),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(socket) => Pin::new(socket).poll_write_vectored(cx, slices),
            Self::Tls(session) => Pin::new(&mut **session).poll_write_vectored(cx, slices),
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(socket) => Pin::new(socket).poll_flush(cx),
            Self::Tls(session) => Pin::new(&mut **session).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(socket) => Pin::new(socket).poll_shutdown(cx),
            Self::Tls(session) => Pin::new(&mut **session).poll_shutdown(cx),
        }
    }
}
