//! A service that remembers every byte it was sent.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::io::AsyncWriteExt as _;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use super::message::{Cut, Framing, Head, Log, Message, Piece, Reader, declared};

/// A request as it was forwarded.
#[derive(Debug, Clone)]
pub struct Forwarded {
    /// Counted from 1, over all connections.
    pub n: usize,
    /// Which connection it came on, counted from 1.
    pub connection: usize,
    /// What came.
    pub message: Message,
    /// Whether it came whole.
    pub complete: bool,
}

/// What to do about a request.
#[derive(Debug, Clone)]
pub enum Act {
    /// Write bytes.
    Send(Vec<u8>),
    /// Wait.
    Pause(Duration),
    /// Read the rest of the request.
    Read,
    /// Answer 200 with what comes, in chunks, while it comes, and with its trailers.
    Echo,
    /// Close.
    Close,
    /// Close with a reset.
    Reset,
    /// Say nothing more until the peer closes.
    Hold,
}

/// What to do, in order. A request of which nothing is said is read whole first, and the
/// connection takes the next when the acts are over.
pub type Plan = Vec<Act>;

type Script = dyn Fn(&Forwarded) -> Plan + Send + Sync;

struct State {
    script: Box<Script>,
    connections: Mutex<Vec<Log>>,
    seen: Mutex<Vec<Forwarded>>,
    malformed: Mutex<Vec<String>>,
}

/// A service below HTTP. Ends with its value, connections and all.
pub struct Origin {
    /// Where it listens.
    pub addr: SocketAddr,
    state: Arc<State>,
    serving: tokio::task::JoinHandle<()>,
}

impl Origin {
    /// Does what `script` says of each head.
    pub async fn start(script: impl Fn(&Forwarded) -> Plan + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let state = Arc::new(State {
            script: Box::new(script),
            connections: Mutex::default(),
            seen: Mutex::default(),
            malformed: Mutex::default(),
        });
        let addr = listener.local_addr().expect("an address");
        let serving = tokio::spawn(serve(listener, Arc::clone(&state)));
        Self {
            addr,
            state,
            serving,
        }
    }

    /// Answers every request with its own number, method and target.
    pub async fn telling() -> Self {
        Self::start(|seen| vec![Act::Read, Act::Send(tell(&seen.message.head))]).await
    }

    /// Every byte of every connection so far.
    pub fn bytes(&self) -> Vec<Vec<u8>> {
        let logs = lock(&self.state.connections);
        logs.iter().map(|log| lock(log).clone()).collect()
    }

    /// All requests of which a head came, in order.
    pub fn seen(&self) -> Vec<Forwarded> {
        lock(&self.state.seen).clone()
    }

    /// What came that is not HTTP/1.1 as it should be sent.
    pub fn malformed(&self) -> Vec<String> {
        lock(&self.state.malformed).clone()
    }
}

impl Drop for Origin {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

/// 200 with method and target as its body; to HEAD without the body.
pub fn tell(head: &Head) -> Vec<u8> {
    let body = format!("{} {}", head.method(), head.second());
    let mut answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", body.len());
    if head.method() != "HEAD" {
        answer.push_str(&body);
    }
    answer.into_bytes()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn serve(listener: TcpListener, state: Arc<State>) {
    let mut connections = JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        let _ = stream.set_nodelay(true);
        let log = Log::default();
        let number = {
            let mut all = lock(&state.connections);
            all.push(Arc::clone(&log));
            all.len()
        };
        connections.spawn(connection(stream, log, number, Arc::clone(&state)));
        while connections.try_join_next().is_some() {}
    }
}

async fn connection(stream: TcpStream, log: Log, number: usize, state: Arc<State>) {
    let (read, write) = stream.into_split();
    let mut peer = Peer {
        reader: Reader::new(read, log),
        write: Some(write),
    };
    loop {
        let head = match peer.reader.head().await {
            Ok(head) => head,
            Err(Cut::Malformed(what)) => return lock(&state.malformed).push(what),
            Err(_) => return,
        };
        let framing = match declared(&head) {
            Ok(framing) => framing.unwrap_or(Framing::None),
            Err(cut) => return lock(&state.malformed).push(format!("{cut:?}")),
        };
        let forwarded = {
            let mut seen = lock(&state.seen);
            let message = Message {
                head,
                ..Message::default()
            };
            let forwarded = Forwarded {
                n: seen.len() + 1,
                connection: number,
                message,
                complete: false,
            };
            seen.push(forwarded.clone());
            forwarded
        };
        let at = forwarded.n - 1;
        let plan = (state.script)(&forwarded);
        if peer.act(plan, framing, at, &state).await.is_none() {
            return;
        }
    }
}

struct Peer {
    reader: Reader<OwnedReadHalf>,
    /// None once the connection is reset.
    write: Option<OwnedWriteHalf>,
}

impl Peer {
    async fn write(&mut self, bytes: &[u8]) -> Option<()> {
        self.write.as_mut()?.write_all(bytes).await.ok()
    }

    /// None when the connection is over.
    async fn act(&mut self, plan: Plan, framing: Framing, at: usize, state: &State) -> Option<()> {
        let mut left = Some(framing);
        for act in plan {
            match act {
                Act::Send(bytes) => self.write(&bytes).await?,
                Act::Pause(time) => tokio::time::sleep(time).await,
                Act::Read => {
                    if let Some(framing) = left.take() {
                        self.read(framing, at, state, false).await?;
                    }
                }
                Act::Echo => {
                    let head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
                    self.write(head).await?;
                    self.read(left.take()?, at, state, true).await?;
                }
                Act::Close => {
                    // With the value.
                    return None;
                }
                Act::Reset => {
                    let write = self.write.take()?;
                    let _ = write.as_ref().set_zero_linger();
                    // Else it would end in peace first.
                    write.forget();
                    return None;
                }
                Act::Hold => {
                    while matches!(self.reader.fill().await, Ok(true)) {}
                    return None;
                }
            }
        }
        match left {
            Some(framing) => self.read(framing, at, state, false).await,
            None => Some(()),
        }
    }

    async fn read(
        &mut self,
        mut framing: Framing,
        at: usize,
        state: &State,
        echo: bool,
    ) -> Option<()> {
        loop {
            match self.reader.piece(&mut framing).await {
                Ok(Piece::Data(data)) => {
                    lock(&state.seen)[at].message.body.extend_from_slice(&data);
                    if echo {
                        let size = format!("{:x}\r\n", data.len());
                        let chunk = [size.as_bytes(), &data, b"\r\n"].concat();
                        self.write(&chunk).await?;
                    }
                }
                Ok(Piece::End(trailers)) => {
                    if echo {
                        let mut end = b"0\r\n".to_vec();
                        for (name, value) in &trailers {
                            end.extend([name.as_bytes(), b": ", value, b"\r\n"].concat());
                        }
                        end.extend(b"\r\n");
                        self.write(&end).await?;
                    }
                    let seen = &mut lock(&state.seen)[at];
                    (seen.message.trailers, seen.complete) = (trailers, true);
                    return Some(());
                }
                Err(Cut::Malformed(what)) => {
                    lock(&state.malformed).push(what);
                    return None;
                }
                Err(_) => return None,
            }
        }
    }
}
