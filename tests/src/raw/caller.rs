//! An application that writes whatever it is told.

use std::net::SocketAddr;

use fastrand::Rng;
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};

use super::message::{Cut, Framing, Head, Log, Message, Piece, Reader, declared};

/// An answer as far as it came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    /// What came.
    pub message: Message,
    /// Why it is not whole; none when it is.
    pub cut: Option<Cut>,
}

impl Reply {
    /// The status.
    ///
    /// # Panics
    /// When the status line has none.
    pub fn status(&self) -> u16 {
        self.message.head.second().parse().expect("a status")
    }

    /// `outrigger-error`.
    pub fn code(&self) -> String {
        self.message.head.get("outrigger-error")
    }
}

/// One connection of an application.
pub struct Caller {
    reader: Reader<OwnedReadHalf>,
    write: OwnedWriteHalf,
}

impl Caller {
    /// Connects.
    pub async fn connect(addr: SocketAddr) -> Self {
        let stream = TcpStream::connect(addr).await.expect("connected");
        stream.set_nodelay(true).expect("an option");
        let (read, write) = stream.into_split();
        Self {
            reader: Reader::new(read, Log::default()),
            write,
        }
    }

    /// Writes bytes; a peer that has closed takes none, which is for the reading side to see.
    pub async fn send(&mut self, bytes: impl AsRef<[u8]>) {
        let _ = self.write.write_all(bytes.as_ref()).await;
    }

    /// Writes bytes in pieces of at most `longest`, so that most arrive by themselves.
    pub async fn send_split(&mut self, bytes: &[u8], longest: usize, rng: &mut Rng) {
        let mut rest = bytes;
        while !rest.is_empty() {
            let (piece, after) = rest.split_at(rng.usize(1..=longest).min(rest.len()));
            self.send(piece).await;
            if rng.u8(..4) == 0 {
                tokio::time::sleep(std::time::Duration::from_millis(1)).await;
            } else {
                tokio::task::yield_now().await;
            }
            rest = after;
        }
    }

    /// Ends the sending half.
    pub async fn half_close(&mut self) {
        let _ = self.write.shutdown().await;
    }

    /// Reads one answer to a request with this method, an interim one (100 to 199) too.
    ///
    /// # Errors
    /// When not even its head came.
    pub async fn answer(&mut self, method: &str) -> Result<Reply, Cut> {
        let head = self.reader.head().await?;
        let framing = framing(&head, method)?;
        let (body, ended) = self.reader.body(framing).await;
        let (trailers, cut) = match ended {
            Ok(trailers) => (trailers, None),
            Err(cut) => (Vec::new(), Some(cut)),
        };
        let message = Message {
            head,
            body,
            trailers,
        };
        Ok(Reply { message, cut })
    }

    /// Reads a head.
    ///
    /// # Errors
    /// When none came.
    pub async fn head(&mut self) -> Result<Head, Cut> {
        self.reader.head().await
    }

    /// Reads the next piece of a body.
    ///
    /// # Errors
    /// When none came.
    pub async fn piece(&mut self, framing: &mut Framing) -> Result<Piece, Cut> {
        self.reader.piece(framing).await
    }

    /// Waits until the peer has closed and said nothing more.
    ///
    /// # Errors
    /// What it said instead, or that it did not close.
    pub async fn closed(&mut self) -> Result<(), String> {
        loop {
            match self.reader.fill().await {
                Ok(true) => {}
                Ok(false) | Err(Cut::Reset) => break,
                Err(cut) => return Err(format!("still open ({cut:?})")),
            }
        }
        let rest = self.reader.rest();
        if rest.is_empty() {
            return Ok(());
        }
        Err(format!("said more: {}", rest.escape_ascii()))
    }

    /// Both halves apart, to write and read at the same time.
    pub fn split(self) -> (Reader<OwnedReadHalf>, OwnedWriteHalf) {
        (self.reader, self.write)
    }
}

/// How a response to `method` is framed (RFC 9112 §6.3).
///
/// # Errors
/// When its fields contradict each other.
fn framing(head: &Head, method: &str) -> Result<Framing, Cut> {
    let declared = declared(head)?;
    let line = head.line();
    let shaped = line.starts_with("HTTP/1.1 ") || line.starts_with("HTTP/1.0 ");
    let status = head.second();
    if !shaped || status.len() != 3 || !status.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(Cut::Malformed(format!("status line: {line}")));
    }
    let bodiless = status.starts_with('1') || status == "204" || status == "304";
    if (status.starts_with('1') || status == "204") && declared.is_some() {
        return Err(Cut::Malformed(format!("{status} with a body: {head:?}")));
    }
    if method == "HEAD" || bodiless {
        return Ok(Framing::None);
    }
    Ok(declared.unwrap_or(Framing::UntilClose))
}
