//! A connection's stream with its read buffer.
//!
//! The buffer is taken from this thread's spare ones when bytes arrive and given back as soon as
//! it is empty: a connection that waits, for a request or for an answer, holds none.

use std::cell::RefCell;
use std::future::Future;
use std::io;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes, BytesMut};
use outrigger_core::http1::Malformed;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};

use crate::identity::expiry::Expiry;
use crate::io::Io;

/// Read at a time: a typical message in one piece.
const READ: usize = 16 * 1024;
/// Read at a time of a message that fills what it is given.
const READ_MORE: usize = 64 * 1024;

/// Spare buffers kept by a thread: 1 MiB of usual ones, 4 MiB at most.
const SPARE: usize = 64;

thread_local! {
    static BUFFERS: RefCell<Vec<BytesMut>> = const { RefCell::new(Vec::new()) };
}

/// An empty buffer with room for [`READ`] bytes.
pub(super) fn buffer() -> BytesMut {
    let spare = BUFFERS.with(|spare| spare.borrow_mut().pop());
    spare.unwrap_or_else(|| BytesMut::with_capacity(READ))
}

/// Keeps a buffer for others, unless parts of it are still in use or there are enough.
pub(super) fn give_back(mut buffer: BytesMut) {
    if buffer.capacity() == 0 {
        return;
    }
    buffer.clear();
    // A thread that ends has no more use for it.
    let _ = BUFFERS.try_with(|spare| {
        let mut spare = spare.borrow_mut();
        if spare.len() < SPARE && buffer.try_reclaim(READ) && buffer.capacity() < READ_MORE {
            spare.push(buffer);
        }
    });
}

/// Keeps the buffer that a written piece was part of, if it was the last part: the next message
/// then comes into memory that is still in the core's cache.
pub(super) fn give_back_piece(piece: Bytes) {
    if let Ok(buffer) = piece.try_into_mut() {
        give_back(buffer);
    }
}

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
    stream: Io,
    /// Bytes read and not yet taken.
    pub buf: BytesMut,
    /// The last read took all the room there was.
    filled: bool,
    eof: bool,
}

impl Wire {
    /// A socket from which nothing was read yet.
    pub fn new(stream: Io) -> Self {
        Self {
            stream,
            buf: BytesMut::new(),
            filled: false,
            eof: false,
        }
    }

    /// When the peer's certificate ends the connection, if one does.
    pub fn expiry(&self) -> Option<&Expiry> {
        self.stream.expiry()
    }

    /// Whether the peer has closed its sending side.
    pub fn eof(&self) -> bool {
        self.eof
    }

    /// Reads what is there, a buffer's length at a time; 0 at the end of the stream.
    ///
    /// # Errors
    /// The socket's.
    pub fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        if self.eof {
            return Poll::Ready(Ok(0));
        }
        // Asked first, so that a connection without bytes needs no buffer.
        ready!(self.stream.poll_read_ready(cx))?;
        if self.buf.capacity() == 0 {
            self.buf = buffer();
        }
        let room = if self.filled { READ_MORE } else { READ };
        if self.buf.capacity() - self.buf.len() < room / 4 {
            self.buf.reserve(room);
        }
        let room = self.buf.capacity() - self.buf.len();
        let count = ready!(pin!(self.stream.read_buf(&mut self.buf)).poll(cx))?;
        self.filled = count == room;
        self.eof = count == 0;
        Poll::Ready(Ok(count))
    }

    /// Takes the first `length` bytes, copied: what is short and kept for long must not keep the
    /// buffer.
    pub fn take_head(&mut self, length: usize) -> Bytes {
        let head = Bytes::copy_from_slice(&self.buf[..length]);
        self.buf.advance(length);
        self.rest();
        head
    }

    /// Gives the buffer back when there is nothing in it.
    pub fn rest(&mut self) {
        if self.buf.is_empty() {
            give_back(std::mem::take(&mut self.buf));
        }
    }

    /// Whether a connection on which nothing is awaited is still quiet and open. Costs no system
    /// call unless the kernel has reported something.
    pub fn is_quiet(&self) -> bool {
        if self.eof || !self.buf.is_empty() {
            return false;
        }
        self.stream.is_quiet()
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

    /// Makes the end of the socket a reset: a proper end would tell the peer that it has all.
    pub fn reset(&self) {
        self.stream.reset();
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

#[cfg(test)]
mod tests {
    use super::*;

    /// What a message leaves behind: the piece that is written, and the rest of the buffer.
    fn split() -> (Bytes, *const u8) {
        let mut buf = buffer();
        let start = buf.as_ptr();
        buf.extend_from_slice(&[7; 10_000]);
        buf.advance(100);
        let piece = buf.split_to(9_900).freeze();
        give_back(buf);
        (piece, start)
    }

    #[test]
    fn the_buffer_of_a_written_piece_is_used_again() {
        let (mut piece, start) = split();
        piece.advance(9_900);
        give_back_piece(piece);
        let next = buffer();
        assert_eq!(next.as_ptr(), start);
        assert!(next.is_empty() && next.capacity() >= READ);
    }

    #[test]
    fn a_piece_that_somebody_holds_keeps_its_buffer() {
        let (piece, start) = split();
        let held = piece.clone();
        give_back_piece(piece);
        assert_ne!(buffer().as_ptr(), start);
        assert_eq!(held, [7; 9_900][..]);
    }
}
