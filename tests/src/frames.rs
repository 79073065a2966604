//! HTTP/2 by hand: what no well-behaved implementation would send, and when.

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::upstream::Raw;

/// A piece of a body.
pub const DATA: u8 = 0;
/// A head, or trailers.
pub const HEADERS: u8 = 1;
/// The end of a stream by force.
pub const RST_STREAM: u8 = 3;
/// What the peer may do.
pub const SETTINGS: u8 = 4;
/// The end of a connection.
pub const GOAWAY: u8 = 7;
/// Room for more of a body.
pub const WINDOW_UPDATE: u8 = 8;

/// Flag: the last of its stream.
pub const END_STREAM: u8 = 1;
/// Flag: the field block is whole.
pub const END_HEADERS: u8 = 4;
const ACK: u8 = 1;

/// `:status: 200`, an entry of the static table.
pub const OK: &[u8] = &[0x88];

/// A frame.
pub struct Frame {
    /// Its type.
    pub kind: u8,
    /// Its flags.
    pub flags: u8,
    /// The stream it belongs to; 0 is the connection.
    pub stream: u32,
    /// What it carries.
    pub payload: Vec<u8>,
}

/// Reads one; none at the end.
pub async fn read(stream: &mut TcpStream) -> Option<Frame> {
    let mut head = [0; 9];
    stream.read_exact(&mut head).await.ok()?;
    let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
    let mut payload = vec![0; length as usize];
    stream.read_exact(&mut payload).await.ok()?;
    let id = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
    Some(Frame {
        kind: head[3],
        flags: head[4],
        stream: id & 0x7fff_ffff,
        payload,
    })
}

/// The bytes of a frame.
///
/// # Panics
/// On a payload over 4 GiB.
pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("a short payload");
    let mut bytes = length.to_be_bytes()[1..].to_vec();
    bytes.extend([kind, flags]);
    bytes.extend(stream.to_be_bytes());
    bytes.extend(payload);
    bytes
}

/// 200 without a body.
pub fn answered(stream: u32) -> Vec<u8> {
    frame(HEADERS, END_HEADERS | END_STREAM, stream, OK)
}

/// RST_STREAM with REFUSED_STREAM.
pub fn refused(stream: u32) -> Vec<u8> {
    frame(RST_STREAM, 0, stream, &7_u32.to_be_bytes())
}

/// A graceful GOAWAY: nothing above `last` was worked on.
pub fn go_away(last: u32) -> Vec<u8> {
    frame(GOAWAY, 0, 0, &[last.to_be_bytes(), [0; 4]].concat())
}

/// A literal field, not to be remembered.
///
/// # Panics
/// On texts over 127 bytes.
pub fn field(name: &str, value: &str) -> Vec<u8> {
    let mut bytes = vec![0];
    for text in [name, value] {
        bytes.push(u8::try_from(text.len()).expect("a short text"));
        bytes.extend(text.as_bytes());
    }
    bytes
}

/// An upstream that greets with `settings` and answers every HEADERS and RST_STREAM with what
/// `answer` makes of its type and stream; it closes the connection when that is none.
pub async fn peer(
    settings: &'static [u8],
    answer: impl Fn(u8, u32) -> Option<Vec<u8>> + Clone + Send + Sync + 'static,
) -> Raw {
    Raw::start(move |mut stream| {
        let answer = answer.clone();
        async move {
            let mut preface = [0; 24];
            let _ = stream.read_exact(&mut preface).await;
            let _ = stream.write_all(&frame(SETTINGS, 0, 0, settings)).await;
            while let Some(got) = read(&mut stream).await {
                let reply = match got.kind {
                    SETTINGS if got.flags & ACK == 0 => Some(frame(SETTINGS, ACK, 0, &[])),
                    HEADERS | RST_STREAM => answer(got.kind, got.stream),
                    _ => continue,
                };
                let Some(reply) = reply else { return };
                if stream.write_all(&reply).await.is_err() {
                    return;
                }
            }
        }
    })
    .await
}
