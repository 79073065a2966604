//! The bytes of stored values.
//!
//! Fields follow each other in the order of the `stored!` lists: integers as LEB128, text and bytes
//! with their length in front, an option or enum as one byte and then its content. The order is the
//! format: a change of a list is a new [`VERSION`](super::rows::VERSION). Written by hand instead of
//! with a serialisation library because two dozen lines of rules are all there is, the bodies go
//! through untouched, and the format on disk then depends on no one's next release.

use bytes::Bytes;
use outrigger_core::time::UnixMillis;

use crate::event::{Event, EventKind};
use crate::message::{AttemptRecord, IdemKey, Message, MessageId, State, StoredResult};
use crate::record::{Record, Totals};

/// The bytes are not what this version writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Malformed;

/// What is left to read of a value.
pub(super) struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn bytes(&mut self, len: usize) -> Result<&'a [u8], Malformed> {
        let (head, rest) = self.0.split_at_checked(len).ok_or(Malformed)?;
        self.0 = rest;
        Ok(head)
    }

    fn byte(&mut self) -> Result<u8, Malformed> {
        self.bytes(1).map(|b| b[0])
    }

    /// Reads a length; never more than what is left, so that it may size an allocation.
    fn len(&mut self) -> Result<usize, Malformed> {
        let len = usize::try_from(u64::take(self)?).map_err(|_| Malformed)?;
        if len > self.0.len() {
            Err(Malformed)
        } else {
            Ok(len)
        }
    }
}

/// A value that is kept in a row.
pub(super) trait Stored: Sized {
    fn put(&self, out: &mut Vec<u8>);
    fn take(input: &mut Input<'_>) -> Result<Self, Malformed>;
}

/// Reads a value that fills `bytes` exactly.
pub(super) fn decode<T: Stored>(bytes: &[u8]) -> Result<T, Malformed> {
    let mut input = Input(bytes);
    let value = T::take(&mut input)?;
    if input.0.is_empty() {
        Ok(value)
    } else {
        Err(Malformed)
    }
}

impl Stored for u64 {
    fn put(&self, out: &mut Vec<u8>) {
        let mut rest = *self;
        while rest >= 0x80 {
            out.push(rest as u8 | 0x80);
            rest >>= 7;
        }
        out.push(rest as u8);
    }

    fn take(input: &mut Input<'_>) -> Result<Self, Malformed> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = input.byte()?;
            if shift == 63 && byte > 1 {
                return Err(Malformed);
            }
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err(Malformed)
    }
}

macro_rules! stored_as_u64 {
    ($($small:ty),*) => {$(
        impl Stored for $small {
            fn put(&self, out: &mut Vec<u8>) {
                u64::from(*self).put(out);
            }

            fn take(input: &mut Input<'_>) -> Result<Self, Malformed> {
                Self::try_from(u64::take(input)?).map_err(|_| Malformed)
            }
        }
    )*};
}
stored_as_u64!(u16, u32);

impl Stored for bool {
    fn put(&self, out: &mut Vec<u8>) {
        out.push(u8::from(*self));
    }

    fn take(input: &mut Input<'_>) -> Result<Self, Malformed> {
        match input.byte()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(Malformed),
        }
    }
}

impl Stored for UnixMillis {
    fn put(&self, out: &mut Vec<u8>) {
        self.0.put(out);
    }

    fn take(input: &mut Input<'_>) -> Result<Self, Malformed> {
        u64::take(input).map(UnixMillis)
    }
}

fn put_bytes(bytes: &[u8], out: &mut Vec<u8>) {
    (bytes.len() as u64).put(out);
    out.extend_from_slice(bytes);
}

fn take_bytes<'a>(input: &mut Input<'a>) -> Result<&'a [u8], Malformed> {
    let len = input.len()?;
    input.bytes(len)
}

impl Stored for String {
    fn put(&self, out: &mut Vec<u8>) {
        put_bytes(self.as_bytes(), out);
    }

    fn take(input: &mut Input<'_>) -> Result<Self, Malformed> {
        String::from_utf8(take_bytes(input)?.to_vec()).map_err(|_| Malformed)
    }
}

impl Stored for Bytes {
    fn put(&self, out: &mut Vec<u8>) {
        put_bytes(self, out);
    }

    fn take(input: &mut Input<'_>) -> Result<Self, Malformed> {
        take_bytes(input).map(Bytes::copy_from_slice)
    }
}

impl Stored for [u8; 32] {
    fn put(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(self);
    }

    fn take(input: &mut Input<'_>) -> Result<Self, Malformed> {
        input.bytes(32)?.try_into().map_err(|_| Malformed)
    }
}

impl Stored for MessageId {
    fn put(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(self.as_bytes());
    }

    fn take(input: &mut Input<'_>) -> Result<Self, Malformed> {
        let bytes: [u8; 16] = input.bytes(16)?.try_into().map_err(|_| Malformed)?;
        Ok(Self::from_bytes(bytes))
    }
}

/// One of several words, as its place in `ALL`.
macro_rules! stored_word {
    ($($word:ty),*) => {$(
        impl Stored for $word {
            fn put(&self, out: &mut Vec<u8>) {
                out.push(*self as u8);
            }

            fn take(input: &mut Input<'_>) -> Result<Self, Malformed> {
                let word = Self::ALL.get(usize::from(input.byte()?));
                word.copied().ok_or(Malformed)
            }
        }
    )*};
}
stored_word!(State, EventKind);

impl<T: Stored> Stored for Option<T> {
    fn put(&self, out: &mut Vec<u8>) {
        self.is_some().put(out);
        if let Some(value) = self {
            value.put(out);
        }
    }

    fn take(input: &mut Input<'_>) -> Result<Self, Malformed> {
        if bool::take(input)? {
            T::take(input).map(Some)
        } else {
            Ok(None)
        }
    }
}

impl<T: Stored> Stored for Vec<T> {
    fn put(&self, out: &mut Vec<u8>) {
        (self.len() as u64).put(out);
        for item in self {
            item.put(out);
        }
    }

    fn take(input: &mut Input<'_>) -> Result<Self, Malformed> {
        let len = input.len()?;
        (0..len).map(|_| T::take(input)).collect()
    }
}

/// A header or trailer: name, value.
impl Stored for (String, Vec<u8>) {
    fn put(&self, out: &mut Vec<u8>) {
        self.0.put(out);
        put_bytes(&self.1, out);
    }

    fn take(input: &mut Input<'_>) -> Result<Self, Malformed> {
        Ok((String::take(input)?, take_bytes(input)?.to_vec()))
    }
}

impl Stored for (String, String) {
    fn put(&self, out: &mut Vec<u8>) {
        self.0.put(out);
        self.1.put(out);
    }

    fn take(input: &mut Input<'_>) -> Result<Self, Malformed> {
        Ok((String::take(input)?, String::take(input)?))
    }
}

/// What an idempotency row says: whose the key is, and until when.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Known {
    pub(super) id: MessageId,
    pub(super) fingerprint: [u8; 32],
    pub(super) until: UnixMillis,
}

/// Writes and reads a struct field by field, from one list so that both agree.
macro_rules! stored {
    ($name:ident { $($field:ident),* $(,)? }) => {
        impl Stored for $name {
            fn put(&self, out: &mut Vec<u8>) {
                $(self.$field.put(out);)*
            }

            fn take(input: &mut Input<'_>) -> Result<Self, Malformed> {
                Ok(Self { $($field: Stored::take(input)?),* })
            }
        }
    };
}

stored!(IdemKey {
    scope,
    key,
    fingerprint,
    ttl_ms
});
stored!(AttemptRecord {
    n,
    at,
    endpoint,
    status,
    grpc_status,
    reason,
    ms
});
stored!(StoredResult {
    status,
    headers,
    body,
    trailers,
    finished_at,
    truncated
});
stored!(Known {
    id,
    fingerprint,
    until
});
stored!(Totals {
    enqueued,
    succeeded,
    dead,
    cancelled,
    expired,
    purged,
    corrupt
});
stored!(Message {
    id,
    queue,
    caller,
    route,
    route_version,
    target,
    method,
    authority,
    path_and_query,
    headers,
    body,
    trailers,
    grpc,
    ordering_key,
    block_on_dead,
    idempotency_key,
    enqueued_at,
    not_before,
    expires_at,
    trace_context,
    result_ttl_ms,
    annotations,
});
stored!(Event {
    seq,
    at,
    kind,
    message,
    queue,
    caller,
    route,
    target,
    ordering_key,
    trace_context,
    attempt,
    attempts_spent,
    reason,
    replays,
});
stored!(Record {
    id,
    seq,
    queue,
    caller,
    route,
    target,
    ordering_key,
    block_on_dead,
    trace_context,
    state,
    resume,
    version,
    spent,
    attempts,
    reason,
    last_status,
    excerpt,
    created_at,
    enqueued_at,
    not_before,
    expires_at,
    started_at,
    finished_at,
    result_ttl_ms,
    result_until,
    forget_at,
    weight,
    replays,
    purged,
});

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn full() -> Message {
        let id = MessageId::from_bytes([7; 16]);
        let mut message = Message::new(
            id,
            "q",
            "orders",
            Bytes::from_static(b"\x00\xffbody"),
            UnixMillis(5),
        );
        message.headers = vec![("x-bin".to_owned(), vec![0, 128, 255])];
        message.trailers = Some(vec![("grpc-status".to_owned(), b"0".to_vec())]);
        message.ordering_key = Some("k".to_owned());
        message.idempotency_key = Some(IdemKey {
            scope: "s".to_owned(),
            key: "k".to_owned(),
            fingerprint: [9; 32],
            ttl_ms: u64::MAX,
        });
        message.annotations = vec![("a".to_owned(), "b".to_owned())];
        message
    }

    #[test]
    fn a_message_round_trips() {
        let message = full();
        let mut out = Vec::new();
        message.put(&mut out);
        assert_eq!(decode::<Message>(&out), Ok(message));
    }

    #[test]
    fn every_shortened_message_is_refused() {
        let mut out = Vec::new();
        full().put(&mut out);
        for len in 0..out.len() {
            assert_eq!(
                decode::<Message>(&out[..len]),
                Err(Malformed),
                "{len} bytes"
            );
        }
        out.push(0);
        assert_eq!(decode::<Message>(&out), Err(Malformed), "a byte too many");
    }

    proptest! {
        #[test]
        fn integers_round_trip(value: u64) {
            let mut out = Vec::new();
            value.put(&mut out);
            prop_assert_eq!(decode::<u64>(&out), Ok(value));
        }

        #[test]
        fn any_bytes_are_read_or_refused(bytes: Vec<u8>) {
            let _ = decode::<Message>(&bytes);
            let _ = decode::<Record>(&bytes);
            let _ = decode::<StoredResult>(&bytes);
            let _ = decode::<Event>(&bytes);
        }
    }
}
