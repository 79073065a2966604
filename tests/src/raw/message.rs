//! Reads messages as RFC 9112 has them, and nothing else.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::io::{AsyncRead, AsyncReadExt as _};
use tokio::time::timeout;

use super::PATIENCE;

/// Why a message was not read to its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cut {
    /// The peer closed between two messages.
    Closed,
    /// The peer closed within this one.
    Short,
    /// The connection was reset.
    Reset,
    /// Nothing more came in time.
    Late,
    /// It is not HTTP/1.1 as it should be sent.
    Malformed(String),
}

/// The first line and the fields.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Head {
    /// The request line or status line, without its end.
    pub line: Vec<u8>,
    /// Names in lower case and values, in order.
    pub fields: Vec<(String, Vec<u8>)>,
}

impl Head {
    /// The first line as text.
    pub fn line(&self) -> String {
        String::from_utf8_lossy(&self.line).into_owned()
    }

    /// The second word of the first line: the target of a request, the status of a response.
    pub fn second(&self) -> String {
        self.line().split(' ').nth(1).unwrap_or_default().to_owned()
    }

    /// The method of a request.
    pub fn method(&self) -> String {
        self.line().split(' ').next().unwrap_or_default().to_owned()
    }

    /// All values of a field, in order.
    pub fn all(&self, name: &str) -> Vec<&[u8]> {
        let named = self.fields.iter().filter(|(known, _)| known == name);
        named.map(|(_, value)| value.as_slice()).collect()
    }

    /// The first value of a field as text; empty when it is not there.
    pub fn get(&self, name: &str) -> String {
        let first = self.all(name).first().copied().unwrap_or_default();
        String::from_utf8_lossy(first).into_owned()
    }

    /// Whether it has the field.
    pub fn has(&self, name: &str) -> bool {
        self.fields.iter().any(|(known, _)| known == name)
    }
}

impl fmt::Debug for Head {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.line.escape_ascii())?;
        for (name, value) in &self.fields {
            write!(f, " | {name}: {}", value.escape_ascii())?;
        }
        Ok(())
    }
}

/// A whole message.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Message {
    /// Its head.
    pub head: Head,
    /// Its content, out of its chunks.
    pub body: Vec<u8>,
    /// What followed the last chunk.
    pub trailers: Vec<(String, Vec<u8>)>,
}

impl Message {
    /// The content as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The first value of a trailer as text; empty when it is not there.
    pub fn trailer(&self, name: &str) -> String {
        let found = self.trailers.iter().find(|(known, _)| known == name);
        found.map_or_else(String::new, |(_, value)| {
            String::from_utf8_lossy(value).into_owned()
        })
    }
}

impl fmt::Debug for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let start = &self.body[..self.body.len().min(300)];
        write!(f, "{:?} || {}", self.head, start.escape_ascii())?;
        for (name, value) in &self.trailers {
            write!(f, " || {name}: {}", value.escape_ascii())?;
        }
        Ok(())
    }
}

/// How the end of a body is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Framing {
    /// There is none.
    None,
    /// This much is left.
    Length(u64),
    /// In chunks.
    Chunked,
    /// Until the connection closes.
    UntilClose,
}

/// All bytes that ever came on a connection.
pub type Log = Arc<Mutex<Vec<u8>>>;

/// A sending half that is read message by message.
pub struct Reader<S> {
    stream: S,
    log: Log,
    at: usize,
    chunk_left: u64,
}

impl<S: AsyncRead + Unpin> Reader<S> {
    /// Reads `stream` and remembers it in `log`.
    pub fn new(stream: S, log: Log) -> Self {
        Self {
            stream,
            log,
            at: 0,
            chunk_left: 0,
        }
    }

    /// What came and was not taken yet.
    pub fn rest(&self) -> Vec<u8> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)[self.at..].to_vec()
    }

    fn waiting(&self) -> usize {
        self.log
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .len()
            - self.at
    }

    /// Waits for more bytes; false at the end.
    ///
    /// # Errors
    /// [`Cut::Reset`] and [`Cut::Late`].
    pub async fn fill(&mut self) -> Result<bool, Cut> {
        let mut buffer = vec![0; 16 * 1024];
        let read = timeout(PATIENCE, self.stream.read(&mut buffer)).await;
        let count = read.map_err(|_| Cut::Late)?.map_err(|_| Cut::Reset)?;
        let mut log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        log.extend_from_slice(&buffer[..count]);
        Ok(count > 0)
    }

    async fn fill_within(&mut self) -> Result<(), Cut> {
        self.fill().await?.then_some(()).ok_or(Cut::Short)
    }

    async fn take(&mut self, count: usize) -> Result<Vec<u8>, Cut> {
        while self.waiting() < count {
            self.fill_within().await?;
        }
        let taken =
            self.log.lock().unwrap_or_else(PoisonError::into_inner)[self.at..][..count].to_vec();
        self.at += count;
        Ok(taken)
    }

    async fn line(&mut self) -> Result<Vec<u8>, Cut> {
        loop {
            let rest = self.rest();
            if let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
                self.at += end + 1;
                let line = rest[..end].strip_suffix(b"\r");
                let line = line.ok_or_else(|| malformed("bare LF", &rest[..end]))?;
                if line
                    .iter()
                    .any(|b| (*b < 0x20 && *b != b'\t') || *b == 0x7f)
                {
                    return Err(malformed("control byte", line));
                }
                return Ok(line.to_vec());
            }
            self.fill_within().await?;
        }
    }

    /// Reads a head.
    ///
    /// # Errors
    /// Why there is none.
    pub async fn head(&mut self) -> Result<Head, Cut> {
        while self.waiting() == 0 {
            if !self.fill().await? {
                return Err(Cut::Closed);
            }
        }
        let line = self.line().await?;
        let fields = self.fields().await?;
        Ok(Head { line, fields })
    }

    async fn fields(&mut self) -> Result<Vec<(String, Vec<u8>)>, Cut> {
        let mut fields = Vec::new();
        loop {
            let line = self.line().await?;
            if line.is_empty() {
                return Ok(fields);
            }
            let colon = line.iter().position(|byte| *byte == b':');
            let colon = colon.ok_or_else(|| malformed("no colon", &line))?;
            let (name, value) = (&line[..colon], &line[colon + 1..]);
            if name.is_empty() || !name.iter().all(|byte| is_token(*byte)) {
                return Err(malformed("field name", &line));
            }
            let name = String::from_utf8_lossy(name).to_ascii_lowercase();
            fields.push((name, value.trim_ascii().to_vec()));
        }
    }

    /// The next piece of a body; none at its end, and then the trailers.
    ///
    /// # Errors
    /// Why there is none.
    pub async fn piece(&mut self, framing: &mut Framing) -> Result<Piece, Cut> {
        match framing {
            Framing::None | Framing::Length(0) => Ok(Piece::End(Vec::new())),
            Framing::Length(left) => {
                let piece = self.some(*left).await?;
                *left -= piece.len() as u64;
                Ok(Piece::Data(piece))
            }
            Framing::UntilClose => {
                if self.waiting() == 0 && !self.fill().await? {
                    return Ok(Piece::End(Vec::new()));
                }
                self.some(u64::MAX).await.map(Piece::Data)
            }
            Framing::Chunked => self.chunked().await,
        }
    }

    async fn some(&mut self, at_most: u64) -> Result<Vec<u8>, Cut> {
        while self.waiting() == 0 {
            self.fill_within().await?;
        }
        let count = usize::try_from(at_most).unwrap_or(usize::MAX);
        self.take(count.min(self.waiting())).await
    }

    async fn chunked(&mut self) -> Result<Piece, Cut> {
        if self.chunk_left == 0 {
            let line = self.line().await?;
            let text = String::from_utf8_lossy(&line).into_owned();
            // We send none of the extensions, signs and blanks that parsers disagree about.
            let plain = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_hexdigit());
            let size = u64::from_str_radix(&text, 16);
            let size = size.ok().filter(|_| plain);
            match size.ok_or_else(|| malformed("chunk size", &line))? {
                0 => return self.fields().await.map(Piece::End),
                size => self.chunk_left = size,
            }
        }
        let piece = self.some(self.chunk_left).await?;
        self.chunk_left -= piece.len() as u64;
        if self.chunk_left == 0 && self.take(2).await? != b"\r\n" {
            return Err(malformed("end of a chunk", &piece));
        }
        Ok(Piece::Data(piece))
    }

    /// Reads a body to its end: what came of it, and how it ended.
    pub async fn body(&mut self, mut framing: Framing) -> (Vec<u8>, Result<Trailers, Cut>) {
        let mut body = Vec::new();
        loop {
            match self.piece(&mut framing).await {
                Ok(Piece::Data(data)) => body.extend(data),
                Ok(Piece::End(trailers)) => return (body, Ok(trailers)),
                Err(cut) => return (body, Err(cut)),
            }
        }
    }
}

/// The fields after the last chunk.
pub type Trailers = Vec<(String, Vec<u8>)>;

/// A part of a body.
#[derive(Debug)]
pub enum Piece {
    /// Some of it.
    Data(Vec<u8>),
    /// Its end, with the trailers.
    End(Trailers),
}

fn malformed(what: &str, bytes: &[u8]) -> Cut {
    Cut::Malformed(format!("{what}: {}", bytes.escape_ascii()))
}

fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

/// How the fields of a head frame its body, if they say anything.
///
/// # Errors
/// When they contradict each other, or could be read in two ways.
pub fn declared(head: &Head) -> Result<Option<Framing>, Cut> {
    let (lengths, codings) = (head.all("content-length"), head.all("transfer-encoding"));
    let bad = |what: &str| Err(Cut::Malformed(format!("{what}: {head:?}")));
    match (lengths.as_slice(), codings.as_slice()) {
        ([], []) => Ok(None),
        ([], [coding]) if *coding == b"chunked" => Ok(Some(Framing::Chunked)),
        ([], _) => bad("transfer codings"),
        ([length], []) => {
            let text = String::from_utf8_lossy(length);
            let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
            match text.parse().ok().filter(|_| digits) {
                Some(length) => Ok(Some(Framing::Length(length))),
                None => bad("length"),
            }
        }
        (_, []) => bad("several lengths"),
        _ => bad("length and transfer coding"),
    }
}
