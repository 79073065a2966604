//! A small blocking HTTP/1.1 client, for tests that need to know on which side of a kill they are.

use std::io::{self, BufReader, Write as _};
use std::net::{SocketAddr, TcpStream};

use super::PATIENCE;
use super::wire::{Head, read_body};

/// An answer, read to its end.
#[derive(Debug, Clone)]
pub struct Answer {
    /// The status code.
    pub status: u16,
    /// The body.
    pub body: Vec<u8>,
    head: Head,
}

impl Answer {
    /// The first field of this name, in lower case.
    pub fn field(&self, name: &str) -> Option<&str> {
        self.head.field(name)
    }

    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The body as JSON.
    ///
    /// # Panics
    /// When it is not.
    pub fn json(&self) -> serde_json::Value {
        let text = self.text();
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error} in {text}"))
    }
}

/// A connection that is used again.
#[derive(Debug)]
pub struct Client {
    stream: BufReader<TcpStream>,
}

impl Client {
    /// Connects.
    ///
    /// # Errors
    /// The kernel's.
    pub fn connect(addr: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect(addr)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Self {
            stream: BufReader::new(stream),
        })
    }

    /// One exchange. `fields` are lines without their line end, `Host` among them.
    ///
    /// # Errors
    /// The kernel's, and what cannot be an answer.
    pub fn send(
        &mut self,
        method: &str,
        path: &str,
        fields: &[&str],
        body: &[u8],
    ) -> io::Result<Answer> {
        let mut request = format!("{method} {path} HTTP/1.1\r\n").into_bytes();
        for field in fields {
            write!(request, "{field}\r\n")?;
        }
        write!(request, "content-length: {}\r\n\r\n", body.len())?;
        request.extend_from_slice(body);
        self.stream.get_mut().write_all(&request)?;
        let head = Head::read(&mut self.stream)?.ok_or(io::ErrorKind::UnexpectedEof)?;
        let status = head
            .first
            .split(' ')
            .nth(1)
            .and_then(|code| code.parse().ok());
        let status: u16 = status.ok_or(io::ErrorKind::InvalidData)?;
        let mut read = Vec::new();
        if method != "HEAD" && status != 204 && status != 304 {
            read_body(&mut self.stream, &head, |piece| {
                read.extend_from_slice(piece);
            })?;
        }
        Ok(Answer {
            status,
            body: read,
            head,
        })
    }
}

/// One GET on a connection of its own.
///
/// # Errors
/// As [`Client::connect`] and [`Client::send`].
pub fn get(addr: SocketAddr, path: &str) -> io::Result<Answer> {
    let host = format!("host: {addr}");
    Client::connect(addr)?.send("GET", path, &[&host, "connection: close"], b"")
}
