//! Taking content out of the bytes of a connection.

use bytes::{Buf, Bytes, BytesMut};
use http::HeaderMap;

use super::fields::{EmptyFirstLine, section_end};
use super::framing::Framing;
use super::trailers::parse_trailers;
use super::{CHUNK_END, Limits, Malformed};

/// The longest line of a chunk's size and extension, without its CRLF. Nobody is known to use
/// extensions.
const LONGEST_CHUNK_LINE: usize = 256;

/// 64 bits.
const MOST_SIZE_DIGITS: usize = 16;

/// Bytes that are not content a sender may be ahead by, beyond its allowance per chunk. With the
/// two below it is the rule of Go's `net/http/internal/chunked.go`: many small chunks pass, padding
/// does not.
const MOST_OVERHEAD: u64 = 16 * 1024;

/// What every chunk may cost: a size, a short extension, two CRLF.
const ALLOWED_PER_CHUNK: u64 = 16;

/// And per byte of its data.
const ALLOWED_PER_BYTE: u64 = 2;

/// Chunks that are shorter are handed out together with those that are there already. A peer that
/// speaks HTTP/2 gets each piece as a frame of its own, and takes many tiny frames for an attack.
const SHORT_CHUNK: u64 = 1024;

/// As much as that is put together.
const TOGETHER: usize = 16 * 1024;

/// What [`Decoder::decode`] found.
#[derive(Debug, PartialEq, Eq)]
pub enum Item {
    /// Some of the content, never empty.
    Data(Bytes),
    /// The trailers, never empty, after all content.
    Trailers(HeaderMap),
    /// The message is complete; what is left in the buffer belongs to the next.
    End,
    /// Nothing without more bytes.
    More,
}

/// Where the reading of one message's content stands.
#[derive(Debug)]
pub struct Decoder {
    state: State,
    limits: Limits,
}

#[derive(Debug)]
enum State {
    Length(u64),
    UntilClose,
    Chunked { at: Chunk, overhead: u64 },
    Ended,
    Broken(Malformed),
}

/// Size → Data → DataEnd → Size …, a size of 0 → Trailers.
#[derive(Debug)]
enum Chunk {
    Size,
    Data(u64),
    DataEnd,
    Trailers { searched: usize },
}

impl Decoder {
    /// A decoder for the content of one message. The limits are for its trailers.
    pub fn new(framing: Framing, limits: &Limits) -> Decoder {
        let state = match framing {
            Framing::Empty | Framing::Length(0) => State::Ended,
            Framing::Length(length) => State::Length(length),
            Framing::Chunked => State::Chunked {
                at: Chunk::Size,
                overhead: 0,
            },
            Framing::UntilClose => State::UntilClose,
        };
        Decoder {
            state,
            limits: *limits,
        }
    }

    /// Takes what it can from the front of `buf`. Long content comes without being copied.
    ///
    /// # Errors
    /// When the chunked coding is broken; every further call fails with the same.
    pub fn decode(&mut self, buf: &mut BytesMut) -> Result<Item, Malformed> {
        match &mut self.state {
            State::Ended => Ok(Item::End),
            State::Broken(error) => Err(*error),
            State::UntilClose => Ok(match buf.is_empty() {
                true => Item::More,
                false => {
                    let length = buf.len();
                    Item::Data(take_front(buf, length))
                }
            }),
            State::Length(remaining) => {
                let Some(data) = take(buf, remaining) else {
                    return Ok(Item::More);
                };
                if *remaining == 0 {
                    self.state = State::Ended;
                }
                Ok(Item::Data(data))
            }
            State::Chunked { at, overhead } => {
                let item = decode_chunked(at, overhead, buf, &self.limits);
                match &item {
                    Ok(Item::Trailers(_) | Item::End) => self.state = State::Ended,
                    Ok(Item::Data(_) | Item::More) => {}
                    Err(error) => self.state = State::Broken(*error),
                }
                item
            }
        }
    }

    /// Whether all of the message was taken from the buffer.
    pub fn is_ended(&self) -> bool {
        matches!(self.state, State::Ended)
    }

    /// Tells that the connection will bring no more bytes.
    ///
    /// # Errors
    /// [`Malformed::Truncated`] unless the message was complete or is ended by this; what broke it
    /// before.
    pub fn at_eof(&mut self) -> Result<(), Malformed> {
        match self.state {
            State::Ended => Ok(()),
            State::UntilClose => {
                self.state = State::Ended;
                Ok(())
            }
            State::Length(_) | State::Chunked { .. } => Err(Malformed::Truncated),
            State::Broken(error) => Err(error),
        }
    }

    /// How many bytes of content are still to come, when that is known: with a length, and after
    /// the end.
    pub fn remaining(&self) -> Option<u64> {
        match self.state {
            State::Ended => Some(0),
            State::Length(remaining) => Some(remaining),
            State::UntilClose | State::Chunked { .. } | State::Broken(_) => None,
        }
    }
}

/// At most `remaining` bytes from the front, and counts them off.
fn take(buf: &mut BytesMut, remaining: &mut u64) -> Option<Bytes> {
    if buf.is_empty() {
        return None;
    }
    let length = usize::try_from(*remaining).map_or(buf.len(), |most| most.min(buf.len()));
    *remaining -= length as u64;
    Some(take_front(buf, length))
}

/// Below this a copy costs less than sharing the buffer, which could not be read into again
/// before its reader is done.
const COPIED: usize = 2048;

/// The first `length` bytes.
fn take_front(buf: &mut BytesMut, length: usize) -> Bytes {
    if length > COPIED {
        return buf.split_to(length).freeze();
    }
    let data = Bytes::copy_from_slice(&buf[..length]);
    buf.advance(length);
    data
}

fn decode_chunked(
    at: &mut Chunk,
    overhead: &mut u64,
    buf: &mut BytesMut,
    limits: &Limits,
) -> Result<Item, Malformed> {
    loop {
        match at {
            Chunk::Size => {
                let Some((size, length)) = chunk_line(buf)? else {
                    return Ok(Item::More);
                };
                *overhead = overhead_after(*overhead, size, length);
                if *overhead > MOST_OVERHEAD {
                    return Err(Malformed::Chunk("too much chunk extension for the content"));
                }
                buf.advance(length);
                *at = match size {
                    0 => Chunk::Trailers { searched: 0 },
                    _ => Chunk::Data(size),
                };
            }
            Chunk::Data(remaining) => {
                let Some(mut data) = take(buf, remaining) else {
                    return Ok(Item::More);
                };
                if *remaining == 0 && (data.len() as u64) < SHORT_CHUNK {
                    data = with_short_chunks(data, remaining, overhead, buf);
                }
                if *remaining == 0 {
                    *at = Chunk::DataEnd;
                }
                return Ok(Item::Data(data));
            }
            Chunk::DataEnd => match &buf[..] {
                [] | [b'\r'] => return Ok(Item::More),
                [b'\r', b'\n', ..] => {
                    buf.advance(2);
                    *at = Chunk::Size;
                }
                _ => return Err(Malformed::Chunk("chunk data without CRLF after it")),
            },
            Chunk::Trailers { searched } => {
                let Some(end) = section_end(buf, searched, EmptyFirstLine::Ends, limits)? else {
                    return Ok(Item::More);
                };
                if end == 2 {
                    buf.advance(2);
                    return Ok(Item::End);
                }
                let trailers = parse_trailers(&buf.split_to(end).freeze(), limits)?;
                return Ok(match trailers.is_empty() {
                    true => Item::End,
                    false => Item::Trailers(trailers),
                });
            }
        }
    }
}

/// The data of a chunk together with that of the short ones behind it, as far as they are there.
/// What is not data, or wrong, is left for the next call.
fn with_short_chunks(
    first: Bytes,
    remaining: &mut u64,
    overhead: &mut u64,
    buf: &mut BytesMut,
) -> Bytes {
    let mut together = BytesMut::new();
    while *remaining == 0 && together.len() < TOGETHER {
        let Some(line) = buf.strip_prefix(CHUNK_END) else {
            break;
        };
        let Ok(Some((size @ 1..SHORT_CHUNK, length))) = chunk_line(line) else {
            break;
        };
        let after = overhead_after(*overhead, size, length);
        if after > MOST_OVERHEAD || line.len() == length {
            break;
        }
        *overhead = after;
        *remaining = size;
        buf.advance(CHUNK_END.len() + length);
        if together.is_empty() {
            together.extend_from_slice(&first);
        }
        if let Some(data) = take(buf, remaining) {
            together.extend_from_slice(&data);
        }
    }
    match together.is_empty() {
        true => first,
        false => together.freeze(),
    }
}

/// What the sender is ahead by after the line of one more chunk, whose CRLF after the data is
/// counted too.
fn overhead_after(overhead: u64, size: u64, line: usize) -> u64 {
    let allowed = size
        .saturating_mul(ALLOWED_PER_BYTE)
        .saturating_add(ALLOWED_PER_CHUNK);
    (overhead + line as u64 + 2).saturating_sub(allowed)
}

/// The size of a chunk and the length of its line with the CRLF; `None` when more bytes are
/// needed.
fn chunk_line(bytes: &[u8]) -> Result<Option<(u64, usize)>, Malformed> {
    let mut size = 0_u64;
    let mut at = 0;
    while let Some(digit) = bytes.get(at).and_then(|&byte| hex_value(byte)) {
        if at == MOST_SIZE_DIGITS {
            return Err(Malformed::Chunk("chunk size of more than 16 digits"));
        }
        size = size << 4 | digit;
        at += 1;
    }
    if at == 0 && !bytes.is_empty() {
        return Err(Malformed::Chunk("chunk size is not hexadecimal"));
    }
    match bytes.get(at) {
        None => return Ok(None),
        Some(b'\r') => {}
        Some(b';') => {
            let extension = &bytes[at..bytes.len().min(LONGEST_CHUNK_LINE + 1)];
            let is_text = |&byte: &u8| !byte.is_ascii_control() || byte == b'\t';
            at = match extension.iter().position(|byte| !is_text(byte)) {
                Some(length) => at + length,
                None if bytes.len() > LONGEST_CHUNK_LINE => {
                    return Err(Malformed::Chunk("chunk extension over the size limit"));
                }
                None => return Ok(None),
            };
        }
        Some(_) => return Err(Malformed::Chunk("chunk size is not hexadecimal")),
    }
    match (bytes[at], bytes.get(at + 1)) {
        (b'\r', None) => Ok(None),
        (b'\r', Some(b'\n')) => Ok(Some((size, at + 2))),
        (b'\r', _) => Err(Malformed::Chunk("chunk line with a bare carriage return")),
        _ => Err(Malformed::Chunk("control character in a chunk extension")),
    }
}

fn hex_value(byte: u8) -> Option<u64> {
    char::from(byte).to_digit(16).map(u64::from)
}
