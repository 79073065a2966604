//! How a message's end is found (RFC 9112 §6.3).
//!
//! Owns what `Content-Length`, `Transfer-Encoding` and `Connection` say together.

use http::Version;

use super::Malformed;
use super::fields::{Keep, members};

/// Where the content ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// There is none, and nothing announced it.
    Empty,
    /// After so many bytes. A `Content-Length: 0` stays a length of 0.
    Length(u64),
    /// With the last chunk and the trailers.
    Chunked,
    /// With the connection; responses only.
    UntilClose,
}

/// What the fields of a head say about framing and the connection.
pub(super) struct Control {
    version: Version,
    length: Option<u64>,
    chunked: bool,
    /// A response that never has content: its `Content-Length` means nothing.
    ignores_length: bool,
    close: bool,
    keep_alive: bool,
    pub(super) upgrade: bool,
}

impl Control {
    pub(super) fn new(version: Version, ignores_length: bool) -> Control {
        Control {
            version,
            length: None,
            chunked: false,
            ignores_length,
            close: false,
            keep_alive: false,
            upgrade: false,
        }
    }

    pub(super) fn inspect(&mut self, name: &[u8], value: &[u8]) -> Result<Keep, Malformed> {
        // By length first: most fields are none of these.
        match name.len() {
            10 if name.eq_ignore_ascii_case(b"connection") => self.connection(value),
            14 if name.eq_ignore_ascii_case(b"content-length") => {
                return self.content_length(value);
            }
            17 if name.eq_ignore_ascii_case(b"transfer-encoding") => {
                self.transfer_encoding(value)?;
            }
            _ => {}
        }
        Ok(Keep::Yes)
    }

    fn connection(&mut self, value: &[u8]) {
        for option in members(value) {
            match option.len() {
                5 => self.close |= option.eq_ignore_ascii_case(b"close"),
                7 => self.upgrade |= option.eq_ignore_ascii_case(b"upgrade"),
                10 => self.keep_alive |= option.eq_ignore_ascii_case(b"keep-alive"),
                _ => {}
            }
        }
    }

    fn content_length(&mut self, value: &[u8]) -> Result<Keep, Malformed> {
        if self.ignores_length {
            return Ok(Keep::No);
        }
        if self.length.is_some() {
            return Err(Malformed::Framing("several Content-Length fields"));
        }
        self.length = Some(parse_length(value)?);
        self.check_both()?;
        Ok(Keep::Yes)
    }

    fn transfer_encoding(&mut self, value: &[u8]) -> Result<(), Malformed> {
        if self.version == Version::HTTP_10 {
            return Err(Malformed::Framing("Transfer-Encoding in HTTP/1.0"));
        }
        if self.chunked {
            return Err(Malformed::Framing("several Transfer-Encoding fields"));
        }
        if !value.eq_ignore_ascii_case(b"chunked") {
            return Err(Malformed::Framing("Transfer-Encoding other than chunked"));
        }
        if self.ignores_length {
            return Err(Malformed::Framing(
                "Transfer-Encoding in a response without content",
            ));
        }
        self.chunked = true;
        self.check_both()
    }

    fn check_both(&self) -> Result<(), Malformed> {
        match self.chunked && self.length.is_some() {
            true => Err(Malformed::Framing(
                "both Content-Length and Transfer-Encoding",
            )),
            false => Ok(()),
        }
    }

    /// What was announced, or `unannounced`.
    pub(super) fn framing(&self, unannounced: Framing) -> Framing {
        match self.length {
            Some(length) => Framing::Length(length),
            None if self.chunked => Framing::Chunked,
            None => unannounced,
        }
    }

    /// Whether the sender lets the connection carry another message (RFC 9112 §9.3).
    pub(super) fn keep_alive(&self) -> bool {
        !self.close && (self.version == Version::HTTP_11 || self.keep_alive)
    }
}

fn parse_length(value: &[u8]) -> Result<u64, Malformed> {
    if value.is_empty() {
        return Err(Malformed::Framing("empty Content-Length"));
    }
    let mut length = 0_u64;
    for byte in value {
        if !byte.is_ascii_digit() {
            return Err(Malformed::Framing("Content-Length is not a number"));
        }
        length = length
            .checked_mul(10)
            .and_then(|length| length.checked_add(u64::from(byte - b'0')))
            .ok_or(Malformed::Framing("Content-Length over 64 bits"))?;
    }
    Ok(length)
}
