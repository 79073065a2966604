//! Putting heads and chunks on the wire.
//!
//! What is written here is what the readers of this module accept: framing fields come from the
//! arguments, never from the headers.

use bytes::BytesMut;
use http::header::{CONTENT_LENGTH, DATE, HOST, TRANSFER_ENCODING};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Version};

use super::trailers::is_forbidden;

/// What ends the data of a chunk.
pub const CHUNK_END: &[u8] = b"\r\n";

/// More than a start line and the fields written here need, without method, target and host.
const OUR_LINES: usize = 192;

/// How a request's content is announced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BodyLength {
    /// No content and no field about it. A `POST` without content is `Known(0)` (RFC 9110 §8.6).
    Empty,
    /// `Content-Length`.
    Known(u64),
    /// `Transfer-Encoding: chunked`.
    Chunked,
}

/// How a response's content is announced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResponseFraming {
    /// No content: 1xx, 204, 304, or the answer to `HEAD` or `CONNECT`. A given `Content-Length`
    /// stays, but in 1xx and 204.
    None,
    /// `Content-Length`.
    Known(u64),
    /// `Transfer-Encoding: chunked`; not for HTTP/1.0.
    Chunked,
    /// The content ends with the connection, which is therefore not kept.
    UntilClose,
}

/// Writes the head of an HTTP/1.1 request.
///
/// `target` is in origin, absolute, authority or asterisk form and, like `host`, taken from a
/// checked URI or field: neither holds whitespace or control characters. `host` is written first
/// and replaces the `Host` in `headers`; without it that one is written in its place.
pub fn write_request(
    out: &mut BytesMut,
    method: &Method,
    target: &str,
    host: Option<&str>,
    headers: &HeaderMap,
    body: BodyLength,
) {
    debug_assert!(is_one_word(target), "target from a URI: {target:?}");
    debug_assert!(host.is_none_or(is_one_word), "checked host: {host:?}");
    let method = method.as_str();
    out.reserve(
        method.len() + target.len() + host.map_or(0, str::len) + size_of(headers) + OUR_LINES,
    );
    put(out, &[method, " ", target, " HTTP/1.1\r\n"]);
    if let Some(host) = host {
        put(out, &["host: ", host, "\r\n"]);
    }
    for (name, value) in headers {
        let is_ours = is_framing(name) || (host.is_some() && *name == HOST);
        if !is_ours {
            put_field(out, name, value);
        }
    }
    match body {
        BodyLength::Empty => {}
        BodyLength::Known(length) => put_length(out, length),
        BodyLength::Chunked => put(out, &["transfer-encoding: chunked\r\n"]),
    }
    out.extend_from_slice(b"\r\n");
}

/// Writes the head of a response to a peer that speaks `version`.
///
/// `Connection` is added where the version's default says otherwise than `keep_alive`, but not to
/// 1xx. `date` is added unless `headers` have one.
pub fn write_response(
    out: &mut BytesMut,
    version: Version,
    status: StatusCode,
    headers: &HeaderMap,
    framing: ResponseFraming,
    keep_alive: bool,
    date: Option<&[u8; 29]>,
) {
    let is_http_10 = version == Version::HTTP_10;
    debug_assert!(
        !is_http_10 || framing != ResponseFraming::Chunked,
        "HTTP/1.0 knows no chunks"
    );
    out.reserve(size_of(headers) + OUR_LINES);
    let reason = status.canonical_reason().unwrap_or("");
    let version = match is_http_10 {
        true => "HTTP/1.0 ",
        false => "HTTP/1.1 ",
    };
    put(out, &[version, status.as_str(), " ", reason, "\r\n"]);

    let keeps_length = framing == ResponseFraming::None
        && !status.is_informational()
        && status != StatusCode::NO_CONTENT;
    let mut has_date = false;
    for (name, value) in headers {
        if is_framing(name) && !(keeps_length && *name == CONTENT_LENGTH) {
            continue;
        }
        has_date |= *name == DATE;
        put_field(out, name, value);
    }
    match framing {
        ResponseFraming::None | ResponseFraming::UntilClose => {}
        ResponseFraming::Known(length) => put_length(out, length),
        ResponseFraming::Chunked => put(out, &["transfer-encoding: chunked\r\n"]),
    }
    let keep_alive = keep_alive && framing != ResponseFraming::UntilClose;
    match (keep_alive, is_http_10) {
        _ if status.is_informational() => {}
        (true, true) => put(out, &["connection: keep-alive\r\n"]),
        (false, false) => put(out, &["connection: close\r\n"]),
        (true, false) | (false, true) => {}
    }
    if let Some(date) = date.filter(|_| !has_date) {
        out.extend_from_slice(b"date: ");
        out.extend_from_slice(date);
        out.extend_from_slice(b"\r\n");
    }
    out.extend_from_slice(b"\r\n");
}

/// Writes the line before a chunk's data; [`CHUNK_END`] goes after it. A length of 0 writes
/// nothing, for it would end the message: leave the chunk out.
pub fn write_chunk_head(out: &mut BytesMut, len: usize) {
    if len == 0 {
        return;
    }
    let mut line = *b"................\r\n";
    let mut rest = len as u64;
    let mut start = 16;
    while rest > 0 {
        start -= 1;
        line[start] = b"0123456789abcdef"[(rest & 15) as usize];
        rest >>= 4;
    }
    out.extend_from_slice(&line[start..]);
}

/// Writes the last chunk, the trailers that are allowed as such, and the end of the message.
pub fn write_last_chunk(out: &mut BytesMut, trailers: Option<&HeaderMap>) {
    let Some(trailers) = trailers else {
        out.extend_from_slice(b"0\r\n\r\n");
        return;
    };
    out.reserve(size_of(trailers) + 5);
    out.extend_from_slice(b"0\r\n");
    for (name, value) in trailers {
        if !is_forbidden(name.as_str().as_bytes()) {
            put_field(out, name, value);
        }
    }
    out.extend_from_slice(b"\r\n");
}

fn is_framing(name: &HeaderName) -> bool {
    *name == CONTENT_LENGTH || *name == TRANSFER_ENCODING
}

fn is_one_word(text: &str) -> bool {
    !text.bytes().any(|byte| byte <= b' ' || byte == 0x7f)
}

fn size_of(headers: &HeaderMap) -> usize {
    let line = |(name, value): (&HeaderName, &HeaderValue)| name.as_str().len() + value.len() + 4;
    headers.iter().map(line).sum()
}

fn put(out: &mut BytesMut, parts: &[&str]) {
    for part in parts {
        out.extend_from_slice(part.as_bytes());
    }
}

fn put_field(out: &mut BytesMut, name: &HeaderName, value: &HeaderValue) {
    out.extend_from_slice(name.as_str().as_bytes());
    out.extend_from_slice(b": ");
    out.extend_from_slice(value.as_bytes());
    out.extend_from_slice(b"\r\n");
}

fn put_length(out: &mut BytesMut, length: u64) {
    let mut buffer = itoa::Buffer::new();
    put(out, &["content-length: ", buffer.format(length), "\r\n"]);
}
