//! A socket with its read buffer.
//!
//! The buffer is allocated when bytes arrive and given back when it is empty and nothing is
//! awaited but the next message: an idle connection holds none.

use std::future::Future;
use std::io;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, Waker, ready};

use bytes::{Buf, BytesMut};
use outrigger_core::http1::Malformed;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

/// Why a message did not come whole.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The socket failed.
    #[error("the connection failed")]
    Io(#[from] io::Error),
    /// The peer sent what is not HTTP/1.1, or more than we take.
    #[error("malformed message: {0}")]
    Malformed(#[from] Malformed),
    /// The peer closed in the middle of a message.
    #[error("the peer closed in the middle of a message")]
    Truncated,
    /// The peer closed where a message should have begun.
    #[error("the peer closed")]
    Closed,
}

impl WireError {
    /// Whether the peer broke the protocol, rather than the connection.
    pub fn is_malformed(&self) -> bool {
        matches!(self, Self::Malformed(_))
    }
}

/// A socket and what was read from it beyond what has been understood.
#[derive(Debug)]
pub struct Wire {
    stream: TcpStream,
    /// Bytes read and not yet taken.
    pub buf: BytesMut,
    eof: bool,
}

impl Wire {
    /// A socket from which nothing was read yet.
    pub fn new(stream: TcpStream) -> Self {
        Self {
            stream,
            buf: BytesMut::new(),
            eof: false,
        }
    }

    /// Whether the peer has closed its sending side.
    pub fn eof(&self) -> bool {
        self.eof
    }

    /// Reads what is there, at most about `room` bytes at a time; 0 at the end of the stream.
    ///
    /// # Errors
    /// The socket's.
    pub fn poll_fill(&mut self, cx: &mut Context<'_>, room: usize) -> Poll<io::Result<usize>> {
        if self.eof {
            return Poll::Ready(Ok(0));
        }
        // Asked first, so that a connection without bytes needs no buffer.
        ready!(self.stream.poll_read_ready(cx))?;
        if self.buf.capacity() - self.buf.len() < room {
            self.buf.reserve(room);
        }
        let count = ready!(pin!(self.stream.read_buf(&mut self.buf)).poll(cx))?;
        self.eof = count == 0;
        Poll::Ready(Ok(count))
    }

    /// Gives the buffer back when there is nothing in it.
    pub fn rest(&mut self) {
        if self.buf.is_empty() && self.buf.capacity() > 0 {
            self.buf = BytesMut::new();
        }
    }

    /// Whether a connection on which nothing is awaited is still quiet and open. Costs no system
    /// call unless the kernel has reported something.
    pub fn is_quiet(&mut self) -> bool {
        if self.eof || !self.buf.is_empty() {
            return false;
        }
        let mut nobody = Context::from_waker(Waker::noop());
        let quiet = self.poll_fill(&mut nobody, 64).is_pending();
        self.rest();
        quiet
    }

    /// Writes as much as the kernel takes.
    ///
    /// # Errors
    /// The socket's.
    pub fn poll_write(
        &mut self,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match slices {
            [one] => Pin::new(&mut self.stream).poll_write(cx, one),
            several => Pin::new(&mut self.stream).poll_write_vectored(cx, several),
        }
    }

    /// Ends the sending side.
    ///
    /// # Errors
    /// The socket's.
    pub fn poll_shutdown(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// As a byte stream, after the messages have ended: what was read already comes first.
impl AsyncRead for Wire {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if !self.buf.is_empty() {
            let count = self.buf.len().min(into.remaining());
            into.put_slice(&self.buf[..count]);
            self.buf.advance(count);
            self.rest();
            return Poll::Ready(Ok(()));
        }
        if self.eof {
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.stream).poll_read(cx, into)
    }
}

impl AsyncWrite for Wire {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
