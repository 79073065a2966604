//! Hostile clients against a real sidecar: broken HTTP/2, frame by frame, and slow HTTP/1.1.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use outrigger_tests::process::http::Client;
use outrigger_tests::process::{
    Process, Sidecar, SidecarFiles, now, output, printed, python, scratch, tool, wait_until,
};

/// A server that remembers every byte. It answers 200 as soon as a request is there, 8 MiB at
/// `/served/large`, and never at `/served/hold…`.
struct Origin {
    addr: SocketAddr,
    bytes: Arc<Mutex<Vec<u8>>>,
    stopped: Arc<AtomicBool>,
}

impl Origin {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("loopback has a free port");
        let origin = Self {
            addr: listener.local_addr().expect("it is bound"),
            bytes: Arc::default(),
            stopped: Arc::default(),
        };
        let (bytes, stopped) = (Arc::clone(&origin.bytes), Arc::clone(&origin.stopped));
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if stopped.load(Ordering::Relaxed) {
                    return;
                }
                let (bytes, stopped) = (Arc::clone(&bytes), Arc::clone(&stopped));
                // How a connection ends is the client's affair.
                std::thread::spawn(move || serve(stream, &bytes, &stopped));
            }
        });
        origin
    }

    /// Whether any byte sequence of this text arrived.
    fn saw(&self, text: &str) -> bool {
        let bytes = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        bytes
            .windows(text.len())
            .any(|part| part == text.as_bytes())
    }
}

impl Drop for Origin {
    fn drop(&mut self) {
        self.stopped.store(true, Ordering::Relaxed);
        // Wakes the accept loop.
        let _ = TcpStream::connect(self.addr);
    }
}

/// What bodies are made of; the large one is a multiple of it.
static PIECE: [u8; 65536] = [b'x'; 65536];

fn serve(mut stream: TcpStream, bytes: &Mutex<Vec<u8>>, stopped: &AtomicBool) -> Option<()> {
    let mut seen = Vec::new();
    loop {
        let head = loop {
            if let Some(at) = find(&seen, b"\r\n\r\n") {
                break seen.drain(..at + 4).collect::<Vec<u8>>();
            }
            more(&mut stream, &mut seen, bytes)?;
        };
        let head = String::from_utf8_lossy(&head).to_ascii_lowercase();
        let path = head.split(' ').nth(1)?.to_owned();
        if path.starts_with("/served/hold") {
            // Without reading, until nobody is interested any more.
            while !stopped.load(Ordering::Relaxed) && still_there(&stream) {
                std::thread::sleep(Duration::from_millis(50));
            }
            return None;
        }
        let field = |name: &str| Some(head.split(name).nth(1)?.split("\r\n").next()?.trim());
        if field("transfer-encoding:").is_some() {
            while !seen.ends_with(b"\r\n\r\n") {
                more(&mut stream, &mut seen, bytes)?;
            }
            seen.clear();
        } else if let Some(length) = field("content-length:") {
            let length: usize = length.parse().ok()?;
            while seen.len() < length {
                more(&mut stream, &mut seen, bytes)?;
            }
            seen.drain(..length);
        }
        let size: usize = if path == "/served/large" { 8 << 20 } else { 2 };
        let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {size}\r\n\r\n");
        stream.write_all(answer.as_bytes()).ok()?;
        for _ in 0..size.div_ceil(PIECE.len()) {
            stream.write_all(&PIECE[..size.min(PIECE.len())]).ok()?;
        }
    }
}

fn find(bytes: &[u8], part: &[u8]) -> Option<usize> {
    bytes.windows(part.len()).position(|at| at == part)
}

fn more(stream: &mut TcpStream, seen: &mut Vec<u8>, all: &Mutex<Vec<u8>>) -> Option<()> {
    let mut piece = [0; 16384];
    let length = stream.read(&mut piece).ok().filter(|length| *length > 0)?;
    seen.extend_from_slice(&piece[..length]);
    let mut all = all.lock().unwrap_or_else(PoisonError::into_inner);
    all.extend_from_slice(&piece[..length]);
    Some(())
}

/// False once the other side has closed or reset, unless there are unread bytes before that.
fn still_there(stream: &TcpStream) -> bool {
    let _ = stream.set_nonblocking(true);
    match stream.peek(&mut [0]) {
        Ok(0) => false,
        Ok(_) => true,
        Err(error) => error.kind() == std::io::ErrorKind::WouldBlock,
    }
}

fn start(dir: &std::path::Path, origin: &Origin, wire: &str) -> Sidecar {
    let files = SidecarFiles::write(dir, "web", None, &format!("wire: {wire}"));
    files.set_mesh(&format!(
        "apiVersion: outrigger.dev/v1alpha1\n\
         kind: MeshService\n\
         metadata: {{name: orders}}\n\
         spec: {{discovery: {{static: [{{address: 127.0.0.1, port: {}}}]}}}}\n\
         ---\n\
         apiVersion: outrigger.dev/v1alpha1\n\
         kind: MeshRoute\n\
         metadata: {{name: orders}}\n\
         spec: {{services: [orders], rules: [{{timeouts: {{request: 2s, idle: 2s}}}}]}}\n",
        origin.addr.port()
    ));
    files.start()
}

#[test]
fn broken_and_hostile_http_2_gets_the_documented_answers() {
    let dir = scratch();
    let origin = Origin::start();
    let wire = "{maxStreams: 16, maxHeaders: 50, maxHeaderBytes: 16KiB, sendTimeout: 1s, \
                idleTimeout: 3s}";
    let mut sidecar = start(dir.path(), &origin, wire);
    let mut command = python("h2_frames.py");
    let done = output(command.arg(sidecar.outbound.to_string()).arg("orders"));
    assert!(done.status.success(), "{}", printed(&done));
    assert!(origin.saw("/served/after"), "the origin remembers");
    // Neither the path of a refused request nor what was injected into a served one.
    for text in ["never", "injected", "elsewhere"] {
        assert!(!origin.saw(text), "{text} was forwarded");
    }
    assert!(sidecar.process.is_running());
    for limit in ["wire.maxHeaders", "wire.sendTimeout", "h2.resets"] {
        let label = format!("limit=\"{limit}\"");
        let count = sidecar.metric("outrigger_limit_rejected_total", &[&label]);
        assert!(count > Some(0.0), "{limit}: {count:?}");
    }
}

/// Runs slowhttptest while a good client goes on, and waits until the sidecar has closed all of
/// the slow connections by itself.
fn while_slow(kind: &[&str], limit: Option<&str>) {
    const CONNECTIONS: f64 = 100.0;
    let dir = scratch();
    let origin = Origin::start();
    let wire = "{headerTimeout: 1s, sendTimeout: 1s, idleTimeout: 2s}";
    let sidecar = start(dir.path(), &origin, wire);
    let open = || sidecar.metric("outrigger_connections", &["side=\"outbound\""]);
    // As fast as it can, for at most 20 s.
    let mut command = tool("slowhttptest");
    command.args(["-c", "100", "-r", "200", "-l", "20", "-p", "1"]);
    command.args(["-u", "http://orders/served/large", "-d"]);
    command.arg(sidecar.outbound.to_string()).args(kind);
    let mut slow = Process::start("slowhttptest", &mut command);
    wait_until(
        "the slow connections are there",
        Duration::from_secs(15),
        || open() > Some(CONNECTIONS / 2.0),
    );
    let good = || {
        let began = now();
        let mut client = Client::connect(sidecar.outbound).expect("a connection");
        let answer = client.send("GET", "/served/good", &["Host: orders"], b"");
        assert_eq!(answer.expect("an answer").status, 200);
        began.elapsed()
    };
    let mut slowest = Duration::ZERO;
    wait_until(
        "the sidecar has closed them",
        Duration::from_secs(15),
        || {
            slowest = slowest.max(good());
            open() < Some(5.0)
        },
    );
    assert!(slowest < Duration::from_secs(2), "{slowest:?}");
    if let Some(limit) = limit {
        let label = format!("limit=\"{limit}\"");
        let count = sidecar.metric("outrigger_limit_rejected_total", &[&label]);
        assert!(count > Some(CONNECTIONS / 2.0), "{count:?}");
    }
    slow.kill();
}

#[test]
fn slow_heads_do_not_keep_others_out() {
    while_slow(&["-H", "-i", "5", "-x", "20"], Some("wire.headerTimeout"));
}

#[test]
fn slow_bodies_do_not_keep_others_out() {
    while_slow(&["-B", "-i", "5", "-s", "8192"], None);
}

#[test]
fn slow_readers_do_not_keep_others_out() {
    let slow = ["-X", "-w", "256", "-y", "512", "-n", "5", "-z", "16"];
    while_slow(&slow, Some("wire.sendTimeout"));
}
