//! A client connection of HTTP/1.1 that costs less than what it measures: one prepared request, one
//! look at the answer.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::Target;

pub(crate) struct Connection {
    stream: Box<dyn Stream>,
    buffer: Vec<u8>,
    any: bool,
}

/// A socket, or TLS over one.
trait Stream: AsyncRead + AsyncWrite + Unpin {}

impl<T: AsyncRead + AsyncWrite + Unpin> Stream for T {}

/// The bytes of a request.
pub(crate) fn request(target: &Target, path: &str, close: bool) -> Vec<u8> {
    let connection = if close { "connection: close\r\n" } else { "" };
    let (method, length, body) = match target.post {
        Some(bytes) => ("POST", format!("content-length: {bytes}\r\n"), bytes),
        None => ("GET", String::new(), 0),
    };
    let head = format!(
        "{method} {path} HTTP/1.1\r\nhost: {}\r\nuser-agent: outrigger-bench\r\n\
         accept: */*\r\n{length}{connection}\r\n",
        target.authority
    );
    let mut request = head.into_bytes();
    request.resize(request.len() + body, b'x');
    request
}

impl Connection {
    pub(crate) async fn open(target: &Target) -> io::Result<Self> {
        let stream = TcpStream::connect(target.to).await?;
        stream.set_nodelay(true)?;
        let stream: Box<dyn Stream> = match &target.tls {
            None => Box::new(stream),
            Some(tls) => Box::new(tls.connect(stream).await?),
        };
        Ok(Self {
            stream,
            buffer: Vec::new(),
            any: target.any,
        })
    }

    /// Sends a request and reads the answer to its end; an answer that is not 200 is an error,
    /// unless any will do.
    pub(crate) async fn exchange(&mut self, request: &[u8]) -> io::Result<()> {
        self.send(request).await?;
        self.receive().await
    }

    pub(crate) async fn send(&mut self, request: &[u8]) -> io::Result<()> {
        self.stream.write_all(request).await?;
        self.stream.flush().await
    }

    pub(crate) async fn receive(&mut self) -> io::Result<()> {
        self.buffer.clear();
        self.buffer.reserve(16 * 1024);
        loop {
            if let Some(end) = end_of_answer(&self.buffer, self.any)?
                && self.buffer.len() >= end
            {
                // Memory of idle connections is the proxy's to show, not ours.
                if self.buffer.len() > end {
                    return Err(invalid("more than one answer"));
                }
                self.buffer = Vec::new();
                return Ok(());
            }
            if self.stream.read_buf(&mut self.buffer).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }

    /// Waits for the peer to close. Who closes first keeps the port for a minute; here the proxy.
    pub(crate) async fn closed(&mut self) -> io::Result<()> {
        match self.stream.read(&mut [0; 16]).await {
            Ok(0) | Err(_) => Ok(()),
            Ok(_) => Err(invalid("bytes after the answer")),
        }
    }
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// Head and body of the answer in bytes, once the head is there.
fn end_of_answer(bytes: &[u8], any: bool) -> io::Result<Option<usize>> {
    let Some(head) = bytes.windows(4).position(|four| four == b"\r\n\r\n") else {
        return Ok(None);
    };
    let text =
        std::str::from_utf8(&bytes[..head]).map_err(|_| invalid("a head that is no text"))?;
    let mut lines = text.split("\r\n");
    let status = lines.next().unwrap_or_default();
    if !any && !status.starts_with("HTTP/1.1 200") {
        return Err(invalid(status));
    }
    let length = lines
        .filter_map(|line| line.split_once(':'))
        .find(|(name, _)| name.eq_ignore_ascii_case("content-length"))
        .and_then(|(_, value)| value.trim().parse::<usize>().ok())
        .ok_or_else(|| invalid("no content-length"))?;
    Ok(Some(head + 4 + length))
}
