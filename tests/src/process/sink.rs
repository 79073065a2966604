//! A target that remembers what arrived: the application at the end of the road.

use std::io::{self, BufReader, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::wire::{Head, read_body};

/// A request that arrived whole.
#[derive(Debug, Clone)]
pub struct Received {
    /// Its path and query.
    pub path: String,
    /// The `outrigger-message-id`, when it was a delivery.
    pub message: Option<String>,
    /// Its body.
    pub body: Vec<u8>,
}

#[derive(Debug, Default)]
struct State {
    received: Mutex<Vec<Received>>,
    discarded: AtomicU64,
    stopped: AtomicBool,
}

/// An HTTP/1.1 server with one thread a connection. It answers 200 to everything and remembers
/// it, but for `/discard`, whose body it only counts, and `/sleep/N`, which takes N milliseconds.
#[derive(Debug)]
pub struct Sink {
    /// Where it listens.
    pub addr: SocketAddr,
    state: Arc<State>,
}

impl Sink {
    /// Starts one.
    ///
    /// # Panics
    /// When it cannot listen.
    pub fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("loopback has a free port");
        let addr = listener
            .local_addr()
            .expect("a bound socket has an address");
        let state = Arc::new(State::default());
        let sink = Self {
            addr,
            state: Arc::clone(&state),
        };
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if state.stopped.load(Ordering::Relaxed) {
                    return;
                }
                let state = Arc::clone(&state);
                // How a connection ends is the client's affair.
                std::thread::spawn(move || serve(&state, stream));
            }
        });
        sink
    }

    /// All that arrived so far.
    pub fn received(&self) -> Vec<Received> {
        self.state
            .received
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Bytes that arrived at `/discard`.
    pub fn discarded(&self) -> u64 {
        self.state.discarded.load(Ordering::Relaxed)
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        self.state.stopped.store(true, Ordering::Relaxed);
        // Wakes the accept loop.
        let _ = TcpStream::connect(self.addr);
    }
}

fn serve(state: &State, stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut reader = BufReader::with_capacity(256 * 1024, stream);
    while let Some(head) = Head::read(&mut reader)? {
        let path = head.first.split(' ').nth(1).unwrap_or_default().to_owned();
        if head.field("expect").is_some() {
            reader
                .get_mut()
                .write_all(b"HTTP/1.1 100 Continue\r\n\r\n")?;
        }
        let mut body = Vec::new();
        let keep = path != "/discard";
        read_body(&mut reader, &head, |piece| {
            if keep {
                body.extend_from_slice(piece);
            } else {
                state
                    .discarded
                    .fetch_add(piece.len() as u64, Ordering::Relaxed);
            }
        })?;
        if let Some(millis) = path
            .strip_prefix("/sleep/")
            .and_then(|text| text.parse().ok())
        {
            std::thread::sleep(Duration::from_millis(millis));
        }
        if keep {
            let message = head.field("outrigger-message-id").map(str::to_owned);
            let arrived = Received {
                path,
                message,
                body,
            };
            state
                .received
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(arrived);
        }
        let answer =
            b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: 3\r\n\r\nok\n";
        reader.get_mut().write_all(answer)?;
    }
    Ok(())
}
