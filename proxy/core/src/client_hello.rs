//! What a TLS client says it wants, read from its first bytes: server name and protocols.
//!
//! Owns the reading of a ClientHello (RFC 8446 §4.1.2) across records and in any state of
//! arrival; nothing is decrypted and nothing is answered. Strict: a hello that a server would
//! refuse is malformed here too. On the request's life.

/// The longest hello that is read, records included: one record's worth. Post-quantum key shares
/// make 2 KiB common.
pub const LONGEST: usize = 16 * 1024;

/// TLS record type and handshake message type (RFC 8446 §5.1, §4).
const HANDSHAKE: u8 = 22;
const CLIENT_HELLO: u8 = 1;

/// Extension types (RFC 6066 §3, RFC 7301 §3.1).
const SERVER_NAME: u16 = 0;
const ALPN: u16 = 16;

/// A record carries at most this (RFC 8446 §5.1).
const LONGEST_RECORD: usize = 1 << 14;

/// What a ClientHello asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClientHello {
    /// The host, as it was sent; none when the client names none.
    pub server_name: Option<String>,
    /// Protocols in order of preference.
    pub alpn: Vec<Vec<u8>>,
}

/// How far a hello has come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Hello {
    /// It may still become one.
    NeedMore,
    /// It is whole.
    Complete(ClientHello),
    /// It is none, or longer than [`LONGEST`].
    Malformed,
}

/// Reads the hello at the beginning of `seen`.
pub fn parse(seen: &[u8]) -> Hello {
    let (message, whole) = match join_records(seen) {
        Some(joined) => joined,
        None => return Hello::Malformed,
    };
    if !whole {
        return match seen.len() >= LONGEST {
            true => Hello::Malformed,
            false => Hello::NeedMore,
        };
    }
    let mut message = Reader(&message);
    let mut read = || {
        message.take(4)?;
        hello(&mut message)
    };
    read().map_or(Hello::Malformed, Hello::Complete)
}

/// The bytes of the first handshake message out of its records, and whether it is whole. `None`
/// when the bytes are something else.
fn join_records(seen: &[u8]) -> Option<(Vec<u8>, bool)> {
    let mut message = Vec::new();
    let mut rest = seen;
    loop {
        if let [kind, ..] = message[..]
            && kind != CLIENT_HELLO
        {
            return None;
        }
        if let [_, a, b, c, ..] = message[..] {
            let length = 4 + (usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c));
            if length > LONGEST {
                return None;
            }
            if message.len() >= length {
                message.truncate(length);
                return Some((message, true));
            }
        }
        match rest {
            [kind, ..] if *kind != HANDSHAKE => return None,
            [_, major, ..] if *major != 3 => return None,
            [_, _, _, high, low, body @ ..] => {
                let length = usize::from(*high) << 8 | usize::from(*low);
                if length == 0 || length > LONGEST_RECORD {
                    return None;
                }
                let here = length.min(body.len());
                message.extend_from_slice(&body[..here]);
                rest = &body[here..];
            }
            _ => return Some((message, false)),
        }
    }
}

fn hello(message: &mut Reader<'_>) -> Option<ClientHello> {
    // legacy_version, random, legacy_session_id, cipher_suites, legacy_compression_methods.
    message.take(2 + 32)?;
    let session = message.vector8()?;
    let suites = message.vector16()?;
    let compression = message.vector8()?;
    let fits = session.0.len() <= 32
        && suites.0.len() >= 2
        && suites.0.len().is_multiple_of(2)
        && !compression.0.is_empty();
    if !fits {
        return None;
    }
    let mut found = ClientHello::default();
    if message.0.is_empty() {
        // A hello without extensions is as old as TLS 1.0.
        return Some(found);
    }
    let mut extensions = message.vector16()?;
    if !message.0.is_empty() {
        return None;
    }
    let mut seen = (false, false);
    while !extensions.0.is_empty() {
        let kind = extensions.number16()?;
        let mut body = extensions.vector16()?;
        match kind {
            SERVER_NAME if !std::mem::replace(&mut seen.0, true) => {
                found.server_name = Some(server_name(&mut body)?);
            }
            ALPN if !std::mem::replace(&mut seen.1, true) => found.alpn = protocols(&mut body)?,
            SERVER_NAME | ALPN => return None,
            _ => continue,
        }
        if !body.0.is_empty() {
            return None;
        }
    }
    Some(found)
}

/// One name of type host_name; a list of several was never in use.
fn server_name(body: &mut Reader<'_>) -> Option<String> {
    let mut list = body.vector16()?;
    let host_name = list.take(1)? == [0];
    let name = list.vector16()?.0;
    let text = std::str::from_utf8(name).ok()?;
    let usable = host_name && list.0.is_empty() && !text.is_empty() && text.is_ascii();
    usable.then(|| text.to_owned())
}

fn protocols(body: &mut Reader<'_>) -> Option<Vec<Vec<u8>>> {
    let mut list = body.vector16()?;
    let mut found = Vec::new();
    while !list.0.is_empty() {
        let name = list.vector8()?.0;
        if name.is_empty() {
            return None;
        }
        found.push(name.to_vec());
    }
    (!found.is_empty()).then_some(found)
}

/// Bytes not yet read.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(taken)
    }

    fn number16(&mut self) -> Option<u16> {
        let bytes = self.take(2)?;
        Some(u16::from_be_bytes([bytes[0], bytes[1]]))
    }

    fn vector8(&mut self) -> Option<Reader<'a>> {
        let length = self.take(1)?[0];
        self.take(usize::from(length)).map(Reader)
    }

    fn vector16(&mut self) -> Option<Reader<'a>> {
        let length = self.number16()?;
        self.take(usize::from(length)).map(Reader)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sized16(body: &[u8]) -> Vec<u8> {
        let mut out = u16::try_from(body.len()).unwrap().to_be_bytes().to_vec();
        out.extend_from_slice(body);
        out
    }

    fn extension(kind: u16, body: &[u8]) -> Vec<u8> {
        [kind.to_be_bytes().to_vec(), sized16(body)].concat()
    }

    fn sni(name: &[u8]) -> Vec<u8> {
        let entry = [vec![0], sized16(name)].concat();
        extension(SERVER_NAME, &sized16(&entry))
    }

    fn alpn(names: &[&[u8]]) -> Vec<u8> {
        let entry = |name: &&[u8]| [vec![u8::try_from(name.len()).unwrap()], name.to_vec()];
        let list: Vec<u8> = names.iter().flat_map(entry).flatten().collect();
        extension(ALPN, &sized16(&list))
    }

    /// A hello with these extensions, in records of at most `size` bytes.
    fn message(extensions: &[Vec<u8>], size: usize) -> Vec<u8> {
        let mut body = [vec![3, 3], vec![7; 32], vec![32], vec![9; 32]].concat();
        body.extend([0, 4, 0x13, 1, 0x13, 2, 1, 0]);
        body.extend(sized16(&extensions.concat()));
        let length = u32::try_from(body.len()).unwrap().to_be_bytes();
        let whole = [vec![1], length[1..].to_vec(), body].concat();
        let record = |part: &[u8]| [vec![22, 3, 1], sized16(part)].concat();
        whole.chunks(size).flat_map(record).collect()
    }

    fn wants(name: Option<&str>, protocols: &[&[u8]]) -> Hello {
        Hello::Complete(ClientHello {
            server_name: name.map(str::to_owned),
            alpn: protocols.iter().map(|name| name.to_vec()).collect(),
        })
    }

    #[test]
    fn name_and_protocols_are_found_among_other_extensions() {
        let big = extension(51, &[5; 3000]);
        let all = [big, sni(b"orders.shop"), alpn(&[b"h2", b"http/1.1"])];
        for size in [1, 100, 16_000] {
            let bytes = message(&all, size);
            assert_eq!(
                parse(&bytes),
                wants(Some("orders.shop"), &[b"h2", b"http/1.1"]),
                "records of {size}"
            );
        }
        assert_eq!(parse(&message(&[], 16_000)), wants(None, &[]));
        // What follows the hello is not looked at.
        let more = [message(&[sni(b"a")], 16_000), vec![0xff; 10]].concat();
        assert_eq!(parse(&more), wants(Some("a"), &[]));
    }

    #[test]
    fn a_hello_that_a_server_would_refuse_is_malformed() {
        let twice = [sni(b"a"), sni(b"b")];
        let trailing = [extension(SERVER_NAME, &[0, 4, 0, 0, 1, b'a', 9])];
        let bad: [&[Vec<u8>]; 7] = [
            &twice,
            &trailing,
            &[sni(b"")],
            &[sni("ö".as_bytes())],
            &[extension(ALPN, &[0, 1, 0])],
            &[extension(ALPN, &[0, 0])],
            &[extension(SERVER_NAME, &[0, 9])],
        ];
        for extensions in bad {
            let bytes = message(extensions, 16_000);
            assert_eq!(parse(&bytes), Hello::Malformed, "{extensions:?}");
        }
        assert_eq!(parse(b"GET / HTTP/1.1\r\n"), Hello::Malformed);
        assert_eq!(parse(&[22, 3, 1, 0, 0]), Hello::Malformed);
        assert_eq!(
            parse(&[22, 3, 1, 0, 4, 1, 0xff, 0xff, 0xff]),
            Hello::Malformed
        );
        assert_eq!(parse(&[22, 3, 1, 0, 4, 2]), Hello::Malformed);
    }

    #[test]
    fn a_hello_is_not_awaited_for_ever() {
        let padding = extension(21, &[0; 16_000]);
        let bytes = message(&[padding], 100);
        assert!(bytes.len() > LONGEST);
        assert_eq!(parse(&bytes[..LONGEST]), Hello::Malformed);
    }

    proptest! {
        #[test]
        fn every_beginning_asks_for_more(
            name in "[a-z][a-z0-9.-]{0,40}", other in prop::collection::vec(any::<u8>(), 0..600),
            size in 1_usize..700, cut in 0.0_f64..1.0,
        ) {
            let bytes = message(&[extension(0x1234, &other), sni(name.as_bytes())], size);
            prop_assert_eq!(parse(&bytes), wants(Some(&name), &[]));
            let cut = (bytes.len() as f64 * cut) as usize;
            prop_assert_eq!(parse(&bytes[..cut]), Hello::NeedMore);
        }

        #[test]
        fn no_bytes_break_it(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            parse(&bytes);
            parse(&[&[22, 3, 1, 1, 0x90, 1, 0, 1, 0x8c][..], &bytes].concat());
        }

        #[test]
        fn a_broken_byte_breaks_nothing_else(at in 0_usize..140, to in any::<u8>()) {
            let mut bytes = message(&[sni(b"orders.shop"), alpn(&[b"h2"])], 60);
            let at = at.min(bytes.len() - 1);
            bytes[at] = to;
            parse(&bytes);
        }
    }
}
