//! HTTP/1.1 messages as bytes: heads, framing, chunks, and writing them.
//!
//! Owns what is accepted from the wire and what is put on it. Does no I/O, holds no connection and
//! drops no hop-by-hop field ([`crate::headers::strip_hop_by_hop`]). On the request's life.
//!
//! Two parties that disagree about where a message ends are how requests are smuggled, so whatever
//! a recipient may repair is refused here instead:
//!
//! | what | rule | source |
//! |---|---|---|
//! | line ends | CRLF only, and no bare CR or LF anywhere; one empty line before a request | RFC 9112 §2.2 |
//! | request line | single spaces; `HTTP/1.0` or `HTTP/1.1` to the letter | RFC 9112 §3, §2.3 |
//! | target | origin, absolute (`http`, `https`), authority for `CONNECT`, `*` for `OPTIONS`; visible ASCII without `#` | RFC 9112 §3.2 |
//! | `Host` | exactly one in HTTP/1.1, at most one in HTTP/1.0; a name or address with an optional port, never empty | RFC 9112 §3.2 |
//! | status line | three digits from 100 to 599; the reason may be left out | RFC 9112 §4 |
//! | field lines | token, colon, value; no folding, no space before the colon or the first name; no CTL but HTAB | RFC 9112 §5, RFC 9110 §5.5 |
//! | `Content-Length` | one field, digits only, fits 64 bits; never a list, not even of equals | RFC 9110 §8.6 |
//! | `Transfer-Encoding` | one field that says `chunked`, not in HTTP/1.0, not beside `Content-Length` | RFC 9112 §6.1 |
//! | `CONNECT` | announces no content | RFC 9110 §9.3.6 |
//! | `Expect` | `100-continue` or nothing | RFC 9110 §10.1.1 |
//! | 1xx, 204, 2xx to `CONNECT` | no `Transfer-Encoding`; `Content-Length` is dropped | RFC 9112 §6.1, RFC 9110 §8.6 |
//! | chunks | 1 to 16 hex digits, then CRLF or `;` and an extension; bounded padding | RFC 9112 §7.1 |
//! | trailers | fields like any; those that would change the message are dropped | RFC 9110 §6.5.1 |

mod decoder;
mod fields;
mod framing;
mod head;
mod target;
#[cfg(test)]
mod tests;
mod trailers;
mod write;

use std::fmt;

pub use decoder::{Decoder, Item};
pub use framing::Framing;
pub use head::{RequestHead, ResponseHead, find_end, parse_request, parse_response};
pub use write::{
    BodyLength, CHUNK_END, ResponseFraming, write_chunk_head, write_last_chunk, write_request,
    write_response,
};

/// How much of a message's fields is taken in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Field lines in a head, and again in a trailer section.
    pub max_fields: usize,
    /// Bytes of a head from the first line to the empty one, and again of a trailer section.
    pub max_head_bytes: usize,
}

/// Why bytes are no message. Displays as one sentence that names what was wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Malformed {
    /// More than [`Limits::max_head_bytes`]; 431.
    HeadTooLarge,
    /// More than [`Limits::max_fields`]; 431.
    TooManyFields,
    /// Neither HTTP/1.0 nor HTTP/1.1; 505.
    Version,
    /// An `Expect` that is not `100-continue`; 417.
    Expectation,
    /// The grammar of lines and fields.
    Syntax(&'static str),
    /// The request target.
    Target(&'static str),
    /// The `Host` field.
    Host(&'static str),
    /// What is said about the length of the content.
    Framing(&'static str),
    /// The chunked coding.
    Chunk(&'static str),
    /// The connection ended before the message did.
    Truncated,
}

impl Malformed {
    fn sentence(self) -> &'static str {
        match self {
            Malformed::HeadTooLarge => "head or trailer section over the size limit",
            Malformed::TooManyFields => "more header fields than the limit",
            Malformed::Version => "version is neither HTTP/1.0 nor HTTP/1.1",
            Malformed::Expectation => "expectation other than 100-continue",
            Malformed::Truncated => "connection ended within the message",
            Malformed::Syntax(what)
            | Malformed::Target(what)
            | Malformed::Host(what)
            | Malformed::Framing(what)
            | Malformed::Chunk(what) => what,
        }
    }
}

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.sentence())
    }
}

impl std::error::Error for Malformed {}
