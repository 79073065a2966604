//! Moves bytes between two connections until both directions have ended.
//!
//! Serves opaque TCP, and whatever turns into it: upgrades and tunnels hand over the bytes that
//! were read too much on either side. Knows nothing of services.
//!
//! Each direction ends by itself: an end of file is carried on as a shutdown of the writing side
//! (half-close), while the other direction goes on. A buffer is held only while it has bytes that
//! were not written; a silent connection holds none.
//!
//! Stands on the life of a request.

use std::cell::RefCell;
use std::future::Future as _;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf as _, Bytes};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::clock;
use crate::wheel::Wheel;

/// What is read at once: as much as the kernel usually hands over, and few enough bytes to be
/// held for a slow reader.
const BUFFER: usize = 32 * 1024;

/// Buffers that a worker keeps for the next read.
const SPARE: usize = 16;

/// Reads of one direction before others have their turn.
const ROUNDS: usize = 16;

/// Which way bytes move.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// From the first connection to the second.
    Sent,
    /// From the second to the first.
    Received,
}

/// One of the two connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The first.
    A,
    /// The second.
    B,
}

/// How it ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// Both directions were finished properly.
    Complete,
    /// Nothing moved for too long.
    Idle,
    /// This side broke off: the other should be reset, for a proper end would tell it that it
    /// has everything.
    Reset(Side),
}

/// How long nothing may move.
#[derive(Clone, Copy)]
pub struct Idle<'a> {
    /// The worker's timers.
    pub wheel: &'a Wheel,
    /// None is for ever.
    pub after: Option<Duration>,
}

/// Copies between `a` and `b` in both directions. `a_left` was read from `a` already and goes to
/// `b` first, `b_left` the other way. `moved` is told of all bytes that were written.
///
/// # Cancel safety
/// Bytes in a buffer are lost: the connections cannot be used for anything else afterwards.
pub async fn both_ways<A, B>(
    a: &mut A,
    a_left: Bytes,
    b: &mut B,
    b_left: Bytes,
    idle: Idle<'_>,
    moved: &dyn Fn(Way, u64),
) -> Ended
where
    A: AsyncRead + AsyncWrite + Unpin,
    B: AsyncRead + AsyncWrite + Unpin,
{
    let (mut there, mut back) = (Pipe::new(a_left), Pipe::new(b_left));
    let mut broken: Option<Side> = None;
    let mut last = clock::now();
    let mut timer = idle.after.map(|after| idle.wheel.sleep_until(last + after));
    std::future::poll_fn(|cx| {
        let before = there.bytes + back.bytes;
        let sides = [(Side::A, Side::B), (Side::B, Side::A)];
        for ((from, to), way) in sides.into_iter().zip([Way::Sent, Way::Received]) {
            let told = |count| moved(way, count);
            let polled = match way {
                Way::Sent => there.poll(cx, &mut *a, &mut *b, &told),
                Way::Received => back.poll(cx, &mut *b, &mut *a, &told),
            };
            match polled {
                Poll::Ready(Err(Broken::Reading)) => return Poll::Ready(Ended::Reset(from)),
                // What it sent before may still be read: the other direction goes on to its end,
                // which comes by itself now.
                Poll::Ready(Err(Broken::Writing)) => broken = broken.or(Some(to)),
                Poll::Ready(Ok(())) | Poll::Pending => {}
            }
        }
        if there.is_done() && back.is_done() {
            return Poll::Ready(broken.map_or(Ended::Complete, Ended::Reset));
        }
        if let (Some(timer), Some(after)) = (&mut timer, idle.after) {
            if there.bytes + back.bytes != before {
                last = clock::now();
            }
            while Pin::new(&mut *timer).poll(cx).is_ready() {
                if last + after <= clock::now() {
                    return Poll::Ready(Ended::Idle);
                }
                timer.reset(last + after);
            }
        }
        Poll::Pending
    })
    .await
}

/// Which end of a direction failed.
enum Broken {
    Reading,
    Writing,
}

#[derive(PartialEq, Eq)]
enum Stage {
    /// Bytes may come. → `Ending` at the end of file.
    Open,
    /// What is left is written, then the end is passed on. → `Done`
    Ending,
    /// Ended or failed.
    Done,
}

/// One direction.
struct Pipe {
    left: Bytes,
    buffer: Option<Buffer>,
    start: usize,
    end: usize,
    stage: Stage,
    unflushed: bool,
    bytes: u64,
}

impl Pipe {
    fn new(left: Bytes) -> Self {
        Self {
            left,
            buffer: None,
            start: 0,
            end: 0,
            stage: Stage::Open,
            unflushed: false,
            bytes: 0,
        }
    }

    fn is_done(&self) -> bool {
        self.stage == Stage::Done
    }

    fn poll<R, W>(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut R,
        to: &mut W,
        moved: &dyn Fn(u64),
    ) -> Poll<Result<(), Broken>>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        for _ in 0..ROUNDS {
            if self.is_done() {
                return Poll::Ready(Ok(()));
            }
            if ready!(self.poll_write(cx, to, moved)).is_err() {
                self.stage = Stage::Done;
                self.buffer = None;
                return Poll::Ready(Err(Broken::Writing));
            }
            if self.stage == Stage::Ending {
                // A peer that is gone already needs no end.
                let _ = ready!(Pin::new(&mut *to).poll_shutdown(cx));
                self.stage = Stage::Done;
                return Poll::Ready(Ok(()));
            }
            let mut buffer = self.buffer.take().unwrap_or_else(Buffer::take);
            let mut read = ReadBuf::new(&mut buffer.0);
            match Pin::new(&mut *from).poll_read(cx, &mut read) {
                Poll::Pending => return self.poll_flush(cx, to),
                Poll::Ready(Err(_)) => {
                    self.stage = Stage::Done;
                    return Poll::Ready(Err(Broken::Reading));
                }
                Poll::Ready(Ok(())) => {}
            }
            let length = read.filled().len();
            if length == 0 {
                self.stage = Stage::Ending;
            } else {
                (self.start, self.end) = (0, length);
                self.buffer = Some(buffer);
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Ready when nothing is left to write.
    fn poll_write<W: AsyncWrite + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        to: &mut W,
        moved: &dyn Fn(u64),
    ) -> Poll<io::Result<()>> {
        loop {
            let waiting = match &self.buffer {
                _ if !self.left.is_empty() => &self.left[..],
                Some(buffer) => &buffer.0[self.start..self.end],
                None => &[],
            };
            if waiting.is_empty() {
                return Poll::Ready(Ok(()));
            }
            let written = ready!(Pin::new(&mut *to).poll_write(cx, waiting))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            if self.left.is_empty() {
                self.start += written;
            } else {
                self.left.advance(written);
            }
            self.unflushed = true;
            self.bytes += written as u64;
            moved(written as u64);
        }
    }

    /// Nothing can be read now: what was written must not wait in a buffer of `to`.
    fn poll_flush<W: AsyncWrite + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        to: &mut W,
    ) -> Poll<Result<(), Broken>> {
        if self.unflushed {
            if ready!(Pin::new(to).poll_flush(cx)).is_err() {
                self.stage = Stage::Done;
                return Poll::Ready(Err(Broken::Writing));
            }
            self.unflushed = false;
        }
        Poll::Pending
    }
}

thread_local! {
    static SPARES: RefCell<Vec<Box<[u8]>>> = const { RefCell::new(Vec::new()) };
}

/// A buffer of the worker's, given back when dropped.
struct Buffer(Box<[u8]>);

impl Buffer {
    fn take() -> Self {
        let spare = SPARES.with_borrow_mut(Vec::pop);
        Self(spare.unwrap_or_else(|| vec![0; BUFFER].into_boxed_slice()))
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let bytes = std::mem::take(&mut self.0);
        // A thread that ends has no use for it.
        let _ = SPARES.try_with(|spares| {
            let mut spares = spares.borrow_mut();
            if spares.len() < SPARE {
                spares.push(bytes);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};
    use tokio::task::LocalSet;

    /// Both outer ends of a copy that runs, and its end.
    fn copying(
        after: Option<Duration>,
    ) -> (
        DuplexStream,
        DuplexStream,
        tokio::task::JoinHandle<(Ended, u64, u64)>,
    ) {
        let (client, mut a) = duplex(64);
        let (mut b, server) = duplex(64);
        let running = tokio::task::spawn_local(async move {
            let wheel = Wheel::new();
            tokio::task::spawn_local(wheel.clone().drive());
            let (sent, received) = (Cell::new(0), Cell::new(0));
            let moved = |way, count| {
                let sum = if way == Way::Sent { &sent } else { &received };
                sum.set(sum.get() + count);
            };
            let (a_left, b_left) = (Bytes::from_static(b"<"), Bytes::from_static(b">"));
            let idle = Idle {
                wheel: &wheel,
                after,
            };
            let ended = both_ways(&mut a, a_left, &mut b, b_left, idle, &moved).await;
            (ended, sent.get(), received.get())
        });
        (client, server, running)
    }

    #[tokio::test]
    async fn each_direction_ends_by_itself_and_leftovers_come_first() {
        let local = LocalSet::new();
        local
            .run_until(async {
                let (mut client, mut server, running) = copying(None);
                let long = vec![b'x'; 100_000];
                let asking = async {
                    client.write_all(&long).await.unwrap();
                    client.shutdown().await.unwrap();
                    let mut answer = String::new();
                    client.read_to_string(&mut answer).await.unwrap();
                    answer
                };
                let answering = async {
                    let mut asked = Vec::new();
                    server.read_to_end(&mut asked).await.unwrap();
                    server.write_all(b"seen").await.unwrap();
                    server.shutdown().await.unwrap();
                    asked
                };
                let (answer, asked) = tokio::join!(asking, answering);
                assert_eq!(answer, ">seen");
                assert_eq!(asked.len(), 100_001);
                assert!(asked.starts_with(b"<x"));
                assert_eq!(running.await.unwrap(), (Ended::Complete, 100_001, 5));
            })
            .await;
    }

    #[tokio::test]
    async fn silence_ends_it() {
        let local = LocalSet::new();
        local
            .run_until(async {
                let (mut client, mut server, running) = copying(Some(Duration::from_millis(60)));
                let start = clock::now();
                for _ in 0..4 {
                    client.write_all(b".").await.unwrap();
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                let mut seen = [0; 5];
                server.read_exact(&mut seen).await.unwrap();
                let (ended, sent, _) = running.await.unwrap();
                assert_eq!((ended, sent), (Ended::Idle, 5));
                assert!(clock::now().saturating_since(start) >= Duration::from_millis(120));
            })
            .await;
    }

    #[tokio::test]
    async fn a_side_that_takes_nothing_more_is_a_reset() {
        let local = LocalSet::new();
        local
            .run_until(async {
                let (mut client, server, running) = copying(None);
                drop(server);
                // One end is a proper one; what is sent after it meets nobody.
                let _ = client.write_all(&[0; 1000]).await;
                assert_eq!(running.await.unwrap().0, Ended::Reset(Side::B));
            })
            .await;
    }
}
