//! A head and a body on their way out, over either side's socket.
//!
//! Small pieces are gathered into one write; a large one goes out beside the framing that
//! precedes it, without being copied.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes, BytesMut};
use http_body::Body;
use outrigger_core::http1::{CHUNK_END, write_chunk_head, write_last_chunk};

use crate::http::body::BodyError;
use crate::http1::wire;

/// Pieces below this are copied together, as a copy this short costs less than a segment of
/// its own.
const COPY: usize = 4 * 1024;

/// Copied pieces are written out when there is this much of them.
const FULL: usize = 16 * 1024;

/// How the end of a body is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Length {
    /// No body follows.
    Empty,
    /// This many bytes are still to come.
    Known(u64),
    /// In chunks.
    Chunked,
    /// By closing the connection.
    UntilClose,
}

/// Why a message did not go out whole.
#[derive(Debug)]
pub enum SendingError {
    /// The socket failed.
    Io(io::Error),
    /// The body broke off.
    Body(BodyError),
    /// The body is longer or shorter than was announced.
    Length,
}

/// A message on its way out: the head first, in `out`, then a body.
#[derive(Debug)]
pub struct Sending {
    /// Bytes to write before `data`.
    pub out: BytesMut,
    data: Bytes,
    tail: &'static [u8],
    length: Length,
    /// The body has given everything.
    ended: bool,
    /// The body is not asked for anything before the head is out.
    head_first: bool,
    /// What came is written even when the body breaks off behind it.
    keep_start: bool,
    /// Why the body broke off, until what came before is written.
    broken: Option<SendingError>,
    written: u64,
}

impl Drop for Sending {
    fn drop(&mut self) {
        wire::give_back(std::mem::take(&mut self.out));
    }
}

impl Sending {
    /// A head that is already in `out`, before a body of `length`.
    pub fn new(out: BytesMut, length: Length) -> Self {
        Self {
            out,
            data: Bytes::new(),
            tail: &[],
            length,
            ended: length == Length::Empty,
            head_first: false,
            keep_start: false,
            broken: None,
            written: 0,
        }
    }

    /// Leaves the body alone until the head is out: while nothing is written, nothing is taken,
    /// and a body that cannot be read twice can go another way.
    #[must_use]
    pub fn head_first(mut self, head_first: bool) -> Self {
        self.head_first = head_first;
        self
    }

    /// Writes what came before the body broke off: a peer that gets nothing at all would take its
    /// request for one that nobody answered, and send it again.
    #[must_use]
    pub fn keep_start(mut self) -> Self {
        self.keep_start = true;
        self
    }

    /// Bytes that the kernel has taken.
    pub fn written(&self) -> u64 {
        self.written
    }

    /// Whether everything was written.
    pub fn is_done(&self) -> bool {
        self.ended && self.is_flushed()
    }

    /// Whether there is nothing to write at the moment.
    pub fn is_flushed(&self) -> bool {
        self.out.is_empty() && self.data.is_empty() && self.tail.is_empty()
    }

    /// Moves bytes from `body` to `write` until the body has none, the kernel takes none, or all
    /// is done. `write` is called between the polls of the body, never within one.
    ///
    /// # Errors
    /// [`SendingError`]; the connection cannot be used for another message then.
    pub fn poll<B, W>(
        &mut self,
        cx: &mut Context<'_>,
        body: &mut B,
        mut write: W,
    ) -> Poll<Result<(), SendingError>>
    where
        B: Body<Data = Bytes, Error = BodyError> + Unpin,
        W: FnMut(&mut Context<'_>, &[io::IoSlice<'_>]) -> Poll<io::Result<usize>>,
    {
        if self.head_first {
            ready!(self.poll_flush(cx, &mut write)).map_err(SendingError::Io)?;
            self.head_first = false;
        }
        loop {
            let waiting = self.broken.is_some()
                || match self.gather(cx, body) {
                    Ok(waiting) => waiting,
                    Err(error) if self.keep_start => {
                        self.broken = Some(error);
                        true
                    }
                    Err(error) => return Poll::Ready(Err(error)),
                };
            if !self.is_flushed() {
                ready!(self.poll_flush(cx, &mut write)).map_err(SendingError::Io)?;
                if !waiting && !self.ended {
                    continue;
                }
            }
            if let Some(error) = self.broken.take() {
                return Poll::Ready(Err(error));
            }
            return if self.ended {
                Poll::Ready(Ok(()))
            } else {
                Poll::Pending
            };
        }
    }

    /// Takes what the body has; true when it has no more for now.
    fn gather<B>(&mut self, cx: &mut Context<'_>, body: &mut B) -> Result<bool, SendingError>
    where
        B: Body<Data = Bytes, Error = BodyError> + Unpin,
    {
        while !self.ended && self.data.is_empty() && self.tail.is_empty() && self.out.len() < FULL {
            match Pin::new(&mut *body).poll_frame(cx) {
                Poll::Pending => return Ok(true),
                Poll::Ready(None) => self.end(None)?,
                Poll::Ready(Some(Err(error))) => return Err(SendingError::Body(error)),
                Poll::Ready(Some(Ok(frame))) => match frame.into_data() {
                    Ok(data) => {
                        self.push(data)?;
                        if body.is_end_stream() {
                            self.end(None)?;
                        }
                    }
                    Err(frame) => self.end(frame.into_trailers().ok().as_ref())?,
                },
            }
        }
        Ok(false)
    }

    fn push(&mut self, data: Bytes) -> Result<(), SendingError> {
        if data.is_empty() {
            return Ok(());
        }
        match &mut self.length {
            Length::Empty => return Err(SendingError::Length),
            Length::Known(left) => {
                *left = left
                    .checked_sub(data.len() as u64)
                    .ok_or(SendingError::Length)?;
            }
            Length::Chunked => write_chunk_head(&mut self.out, data.len()),
            Length::UntilClose => {}
        }
        let end = if self.length == Length::Chunked {
            CHUNK_END
        } else {
            &[]
        };
        if data.len() < COPY {
            self.out.extend_from_slice(&data);
            self.out.extend_from_slice(end);
        } else {
            self.data = data;
            self.tail = end;
        }
        Ok(())
    }

    fn end(&mut self, trailers: Option<&http::HeaderMap>) -> Result<(), SendingError> {
        if self.ended {
            return Ok(());
        }
        match self.length {
            Length::Known(left) if left > 0 => return Err(SendingError::Length),
            Length::Chunked if self.tail.is_empty() => write_last_chunk(&mut self.out, trailers),
            // The last chunk follows the data that is still held; trailers are read only after it.
            Length::Chunked => self.tail = b"\r\n0\r\n\r\n",
            _ => {}
        }
        self.ended = true;
        Ok(())
    }

    fn poll_flush<W>(&mut self, cx: &mut Context<'_>, write: &mut W) -> Poll<io::Result<()>>
    where
        W: FnMut(&mut Context<'_>, &[io::IoSlice<'_>]) -> Poll<io::Result<usize>>,
    {
        while !self.is_flushed() {
            let all = [
                io::IoSlice::new(&self.out),
                io::IoSlice::new(&self.data),
                io::IoSlice::new(self.tail),
            ];
            let slices = if self.data.is_empty() && self.tail.is_empty() {
                &all[..1]
            } else {
                &all[..]
            };
            let count = ready!(write(cx, slices))?;
            if count == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.written += count as u64;
            self.advance(count);
        }
        Poll::Ready(Ok(()))
    }

    fn advance(&mut self, mut count: usize) {
        let head = count.min(self.out.len());
        self.out.advance(head);
        count -= head;
        let data = count.min(self.data.len());
        self.data.advance(data);
        if data > 0 && self.data.is_empty() {
            wire::give_back_piece(std::mem::take(&mut self.data));
        }
        count -= data;
        self.tail = &self.tail[count.min(self.tail.len())..];
    }
}
