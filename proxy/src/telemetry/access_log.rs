//! The access log: one JSON line a request, written off the worker threads.
//!
//! A worker formats a line into a buffer and hands buffers over now and then; a thread of its
//! own writes them to standard output. When that thread cannot keep up, lines are dropped and
//! counted: logging never holds up traffic. No bodies, no query strings, no credentials.

use std::io::Write as _;
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};

use metrics::Counter;

/// Which requests are logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// None.
    Off,
    /// Those that Outrigger refused or that ended with 5xx or a broken body.
    Errors,
    /// Errors, and one in a hundred of the others.
    Sampled,
    /// Every request.
    All,
}

/// One in this many is logged under [`When::Sampled`].
pub const SAMPLE: u64 = 100;

/// Buffers that may wait for the writer, each at most [`CHUNK`] bytes.
const QUEUE: usize = 64;

/// A worker's buffer is handed over when it is larger than this, or at the next housekeeping.
pub const CHUNK: usize = 16 * 1024;

/// The sending side; cheap to clone.
#[derive(Clone)]
pub struct AccessLog {
    when: When,
    lines: Option<SyncSender<Vec<u8>>>,
    dropped: Counter,
}

impl AccessLog {
    /// Starts the writer thread unless `when` is [`When::Off`]; it ends with the last clone.
    pub fn start(when: When, dropped: Counter) -> Self {
        if when == When::Off {
            return Self {
                when,
                lines: None,
                dropped,
            };
        }
        let (lines, receiver) = sync_channel::<Vec<u8>>(QUEUE);
        let spawned = std::thread::Builder::new()
            .name("access-log".into())
            .spawn(move || {
                let mut out = std::io::stdout();
                for chunk in receiver {
                    // A closed standard output is the reader's choice; traffic goes on.
                    let _ = out.write_all(&chunk).and_then(|()| out.flush());
                }
            });
        Self {
            when,
            lines: spawned.is_ok().then_some(lines),
            dropped,
        }
    }

    /// Which requests are wanted.
    pub fn when(&self) -> When {
        self.when
    }

    /// Hands a worker's buffer to the writer.
    pub fn write(&self, chunk: Vec<u8>) {
        let Some(lines) = &self.lines else { return };
        if let Err(TrySendError::Full(chunk)) = lines.try_send(chunk) {
            let lost = chunk.iter().filter(|byte| **byte == b'\n').count();
            self.dropped.increment(lost as u64);
        }
    }
}
