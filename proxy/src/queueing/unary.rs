//! gRPC framing, as far as a queue needs it: is this body exactly one message?
//!
//! Length-prefixed messages of the gRPC HTTP/2 protocol: one byte for compression, four for the
//! length. Does not read the messages themselves. On the message's life.

/// Bytes before a message.
const PREFIX: usize = 5;

/// What a gRPC body, or its beginning, holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Framing {
    /// Not even one whole message yet.
    Incomplete,
    /// Exactly one message.
    One,
    /// Something behind the first message.
    More,
}

/// Looks at the first bytes of a body (at least five, where there are so many) and at how many
/// there are in all.
pub fn framing(start: &[u8], total: u64) -> Framing {
    let Some(prefix) = start.first_chunk::<PREFIX>() else {
        return Framing::Incomplete;
    };
    let length = u32::from_be_bytes([prefix[1], prefix[2], prefix[3], prefix[4]]);
    let whole = PREFIX as u64 + u64::from(length);
    match total.cmp(&whole) {
        std::cmp::Ordering::Less => Framing::Incomplete,
        std::cmp::Ordering::Equal => Framing::One,
        std::cmp::Ordering::Greater => Framing::More,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_one_whole_message_is_unary() {
        let check = |body: &[u8], expected| {
            assert_eq!(framing(body, body.len() as u64), expected, "{body:?}");
        };
        check(&[], Framing::Incomplete);
        check(&[0, 0, 0, 0], Framing::Incomplete);
        check(&[0, 0, 0, 0, 0], Framing::One);
        check(&[0, 0, 0, 0, 2, 8], Framing::Incomplete);
        check(&[0, 0, 0, 0, 2, 8, 1], Framing::One);
        check(&[1, 0, 0, 0, 1, 7], Framing::One);
        check(&[0, 0, 0, 0, 0, 0], Framing::More);
        check(&[0, 0, 0, 0, 0, 0, 0, 0, 0, 0], Framing::More);
        check(&[0, 255, 255, 255, 255, 1], Framing::Incomplete);
    }

    #[test]
    fn a_cut_body_is_judged_by_its_length() {
        assert_eq!(framing(&[0, 0, 0, 1, 0], 5 + 256), Framing::One);
        assert_eq!(framing(&[0, 0, 0, 1, 0], 5 + 257), Framing::More);
    }
}
