mod content;
mod heads;
mod properties;
mod writing;

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, Method};

use super::*;

const LIMITS: Limits = Limits {
    max_fields: 100,
    max_head_bytes: 64 * 1024,
};

/// Delimits and reads the request head that `bytes` are.
fn request(bytes: &[u8]) -> Result<RequestHead, Malformed> {
    let end = find_end(bytes, &mut 0, &LIMITS)?.ok_or(Malformed::Truncated)?;
    assert_eq!(end, bytes.len(), "the head is all of the input");
    parse_request(Bytes::copy_from_slice(bytes), &LIMITS)
}

/// Delimits and reads the response head that `bytes` are.
fn response(method: &Method, bytes: &[u8]) -> Result<ResponseHead, Malformed> {
    let end = find_end(bytes, &mut 0, &LIMITS)?.ok_or(Malformed::Truncated)?;
    assert_eq!(end, bytes.len(), "the head is all of the input");
    parse_response(Bytes::copy_from_slice(bytes), method, &LIMITS)
}

/// Everything a decoder makes of a message: content, trailers, and what it left in the buffer.
#[derive(Debug, PartialEq, Eq)]
struct Decoded {
    content: Vec<u8>,
    trailers: Option<HeaderMap>,
    left: Vec<u8>,
    ended: bool,
}

/// Feeds `pieces` one after the other, decoding all there is each time.
fn decode<'a>(
    framing: Framing,
    limits: &Limits,
    pieces: impl IntoIterator<Item = &'a [u8]>,
) -> Result<Decoded, Malformed> {
    let mut decoder = Decoder::new(framing, limits);
    let mut buf = BytesMut::new();
    let mut content = Vec::new();
    let mut trailers = None;
    for piece in pieces {
        buf.extend_from_slice(piece);
        loop {
            match decoder.decode(&mut buf)? {
                Item::Data(data) => {
                    assert!(!data.is_empty() && trailers.is_none());
                    content.extend_from_slice(&data);
                }
                Item::Trailers(map) => {
                    assert!(trailers.is_none() && decoder.is_ended());
                    trailers = Some(map);
                }
                Item::End => {
                    assert!(decoder.is_ended());
                    break;
                }
                Item::More => {
                    assert!(!decoder.is_ended());
                    break;
                }
            }
        }
    }
    Ok(Decoded {
        content,
        trailers,
        left: buf.to_vec(),
        ended: decoder.is_ended(),
    })
}
