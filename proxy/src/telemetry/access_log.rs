//! The access log: one JSON line a request, written off the worker threads.
//!
//! A worker formats a line into a buffer and hands buffers over now and then; a thread of its
//! own writes them out. When that thread cannot keep up, lines are dropped and
//! counted: logging never holds up traffic. No bodies, no query strings, no credentials.

use std::fs::OpenOptions;
use std::io;
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};

use metrics::Counter;

/// Which requests are logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// None.
    Off,
    /// Those that Outrigger refused or that ended with 5xx or a broken body.
    Errors,
    /// Errors, and `accessLog.samplePercent` of the others.
    Sampled,
    /// Every request.
    All,
}

/// Buffers that may wait for the writer, each at most [`CHUNK`] bytes.
const QUEUE: usize = 64;

/// A worker's buffer is handed over when it is larger than this, or at the next housekeeping.
pub const CHUNK: usize = 16 * 1024;

/// The sending side; cheap to clone.
#[derive(Clone)]
pub struct AccessLog {
    when: When,
    every: u64,
    lines: Option<SyncSender<Vec<u8>>>,
    dropped: Counter,
}

/// What is logged, and where to: the `accessLog` of the bootstrap config.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Which requests.
    pub when: When,
    /// One in this many of the others under [`When::Sampled`]; 0 is none.
    pub every: u64,
    /// `stdout`, `stderr` or a file that is appended to.
    pub to: String,
}

impl AccessLog {
    /// Starts the writer thread unless nothing is logged; it ends with the last clone.
    ///
    /// # Errors
    /// When the file cannot be opened for appending, or there is no thread.
    pub fn start(settings: &Settings, dropped: Counter) -> io::Result<Self> {
        let Settings { when, every, .. } = *settings;
        if when == When::Off {
            return Ok(Self {
                when,
                every,
                lines: None,
                dropped,
            });
        }
        let mut out: Box<dyn io::Write + Send> = match settings.to.as_str() {
            "stdout" => Box::new(io::stdout()),
            "stderr" => Box::new(io::stderr()),
            file => Box::new(OpenOptions::new().create(true).append(true).open(file)?),
        };
        let (lines, receiver) = sync_channel::<Vec<u8>>(QUEUE);
        std::thread::Builder::new()
            .name("access-log".into())
            .spawn(move || {
                for chunk in receiver {
                    // A closed output is the reader's choice; traffic goes on.
                    let _ = out.write_all(&chunk).and_then(|()| out.flush());
                }
            })?;
        Ok(Self {
            when,
            every,
            lines: Some(lines),
            dropped,
        })
    }

    /// Which requests are wanted.
    pub fn when(&self) -> When {
        self.when
    }

    /// One in how many is wanted under [`When::Sampled`]; 0 is none.
    pub fn every(&self) -> u64 {
        self.every
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_appended_to_the_file_that_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("access.log");
        std::fs::write(&path, "before\n").unwrap();
        let to = path.display().to_string();
        let settings = Settings {
            when: When::All,
            every: 0,
            to,
        };
        let log = AccessLog::start(&settings, Counter::noop()).unwrap();
        log.write(b"after\n".to_vec());
        drop(log);
        let deadline = std::time::Duration::from_secs(10);
        let mut waited = std::time::Duration::ZERO;
        while std::fs::read_to_string(&path).unwrap() != "before\nafter\n" {
            assert!(waited < deadline, "not written");
            waited += std::time::Duration::from_millis(5);
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    }
}
