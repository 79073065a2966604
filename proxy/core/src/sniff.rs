//! What a connection speaks, told by its first bytes.
//!
//! Owns the rules; waiting for bytes (at most `wire.detectTimeout`) is the listener's. On the request's life.

/// The HTTP/2 client preface (RFC 9113 §3.4).
const H2_PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// The longest registered method has 17 letters (UPDATEREDIRECTREF).
const LONGEST_METHOD: usize = 24;

/// What the first bytes say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// A TLS handshake record.
    Tls,
    /// A request line of HTTP/1.
    Http1,
    /// HTTP/2 with prior knowledge.
    Http2,
    /// None of them: bytes to pass through.
    Opaque,
    /// Could still be several things.
    NeedMore,
}

/// Tells the protocol from the bytes seen so far.
///
/// Never [`Protocol::NeedMore`] for 32 bytes or more that do not start with empty lines.
pub fn sniff(seen: &[u8]) -> Protocol {
    match seen.first() {
        None => Protocol::NeedMore,
        Some(0x16) => tls(seen),
        Some(b'P') if is_prefix_of(seen, H2_PREFACE) => match seen.len() >= H2_PREFACE.len() {
            true => Protocol::Http2,
            false => Protocol::NeedMore,
        },
        Some(_) => http1(seen),
    }
}

fn is_prefix_of(seen: &[u8], whole: &[u8]) -> bool {
    seen.iter().zip(whole).all(|(a, b)| a == b)
}

/// Record type handshake, version 3.x, and a ClientHello inside (RFC 8446 §5.1).
fn tls(seen: &[u8]) -> Protocol {
    match (seen.get(1), seen.get(2), seen.get(5)) {
        (Some(major), _, _) if *major != 3 => Protocol::Opaque,
        (_, Some(minor), _) if *minor > 4 => Protocol::Opaque,
        (_, _, Some(handshake)) if *handshake != 1 => Protocol::Opaque,
        (_, _, Some(_)) => Protocol::Tls,
        _ => Protocol::NeedMore,
    }
}

/// A method in upper case, one space, and the start of a target. Empty lines before it are allowed
/// (RFC 9112 §2.2). Lower-case methods exist on paper; calling them opaque keeps text protocols
/// such as memcached out.
fn http1(seen: &[u8]) -> Protocol {
    let mut line = seen;
    while let [b'\r' | b'\n', rest @ ..] = line {
        line = rest;
    }
    let method_byte = |b: &u8| b.is_ascii_uppercase() || b.is_ascii_digit() || *b == b'-';
    let method_len = line.iter().take_while(|b| method_byte(b)).count();
    let (method, rest) = line.split_at(method_len);
    if method.len() > LONGEST_METHOD {
        return Protocol::Opaque;
    }
    match rest {
        [] => Protocol::NeedMore,
        [b' ', ..] if method.is_empty() => Protocol::Opaque,
        [b' '] => Protocol::NeedMore,
        [b' ', target @ ..] => self::target(method, target),
        _ => Protocol::Opaque,
    }
}

fn target(method: &[u8], target: &[u8]) -> Protocol {
    let scheme = |name: &[u8]| {
        let n = target.len().min(name.len());
        target[..n].eq_ignore_ascii_case(&name[..n])
    };
    match target.first() {
        Some(b'/' | b'*') => Protocol::Http1,
        Some(b) if method == b"CONNECT" && b.is_ascii_graphic() => Protocol::Http1,
        Some(_) if scheme(b"http:") || scheme(b"https:") => match target.len() >= 5 {
            true => Protocol::Http1,
            false => Protocol::NeedMore,
        },
        _ => Protocol::Opaque,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn check(bytes: &[u8], expected: Protocol) {
        assert_eq!(
            sniff(bytes),
            expected,
            "{:?}",
            String::from_utf8_lossy(bytes)
        );
    }

    #[test]
    fn first_bytes_tell() {
        check(b"", Protocol::NeedMore);
        check(b"GET / HTTP/1.1\r\n", Protocol::Http1);
        check(b"OPTIONS * HTTP/1.1\r\n", Protocol::Http1);
        check(b"M-SEARCH * HTTP/1.1\r\n", Protocol::Http1);
        check(b"\r\nPOST /x", Protocol::Http1);
        check(b"GET http://orders/", Protocol::Http1);
        check(b"GET HTTPS://orders/", Protocol::Http1);
        check(b"CONNECT orders:80 HTTP/1.1", Protocol::Http1);
        check(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", Protocol::Http2);
        check(b"PRI * HTTP/2.0\r\n\r\nSM", Protocol::NeedMore);
        check(b"P", Protocol::NeedMore);
        check(b"POST", Protocol::NeedMore);
        check(b"PRI * HTTP/1.1\r\n", Protocol::Http1);
        check(b"GET ", Protocol::NeedMore);
        check(b"GET ht", Protocol::NeedMore);
        check(b"GET key\r\n", Protocol::Opaque);
        check(b"EHLO example.org\r\n", Protocol::Opaque);
        check(b"SSH-2.0-OpenSSH_9.6\r\n", Protocol::Opaque);
        check(b"get key\r\n", Protocol::Opaque);
        check(b" GET /", Protocol::Opaque);
        check(b"\0\0\0\x08\x04\xd2\x16\x2f", Protocol::Opaque);
        check(&[b'A'; 25], Protocol::Opaque);
        check(&[0x16], Protocol::NeedMore);
        check(&[0x16, 3, 1, 2, 0, 1], Protocol::Tls);
        check(&[0x16, 3, 3, 2, 0, 2], Protocol::Opaque);
        check(&[0x16, 2, 1], Protocol::Opaque);
        check(&[0x16, 3, 9], Protocol::Opaque);
    }

    proptest! {
        #[test]
        fn a_verdict_stands_when_more_bytes_arrive(
            bytes in prop::collection::vec(any::<u8>(), 0..64), cut in 0_usize..64,
        ) {
            let first = sniff(&bytes[..cut.min(bytes.len())]);
            prop_assert!(first == Protocol::NeedMore || first == sniff(&bytes));
        }
    }
}
