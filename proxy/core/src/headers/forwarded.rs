//! Fields that a proxy adds on the way.
//!
//! Owns `x-forwarded-*` and `x-request-id`.

use std::net::IpAddr;

use http::{HeaderMap, HeaderValue};

use super::{Field, Present, X_FORWARDED_FOR, X_FORWARDED_PROTO, X_REQUEST_ID};

/// An id from outside is taken over up to this length.
const LONGEST_ID: usize = 128;

/// Appends the address of the peer to `x-forwarded-for` (as one field). What stood there is kept
/// when the peer is `trusted`, else forgotten.
pub fn append_forwarded_for(headers: &mut HeaderMap, peer: IpAddr, trusted: bool) {
    let mut list = String::new();
    if trusted {
        for value in headers.get_all(X_FORWARDED_FOR) {
            if let Ok(text) = value.to_str() {
                list.push_str(text);
                list.push_str(", ");
            }
        }
    }
    list.push_str(&peer.to_canonical().to_string());
    if let Ok(value) = HeaderValue::try_from(list) {
        headers.insert(X_FORWARDED_FOR, value);
    }
}

/// Sets `x-forwarded-proto` to `http` or `https`; keeps what a `trusted` peer said. `present` is
/// what the head had.
pub fn set_forwarded_proto(headers: &mut HeaderMap, present: Present, tls: bool, trusted: bool) {
    if trusted && present.has(Field::ForwardedProto) {
        return;
    }
    let proto = HeaderValue::from_static(if tls { "https" } else { "http" });
    headers.insert(X_FORWARDED_PROTO, proto);
}

/// The request's id: the one it came with, if it is 1 to 128 visible characters, else a new one
/// (a random UUID). Marked sensitive, which keeps a value that never repeats out of HPACK's tables.
/// `present` is what the head had.
pub fn ensure_request_id(
    headers: &mut HeaderMap,
    present: Present,
    rng: &mut fastrand::Rng,
) -> HeaderValue {
    let usable = |id: &&HeaderValue| {
        (1..=LONGEST_ID).contains(&id.len()) && id.as_bytes().iter().all(u8::is_ascii_graphic)
    };
    let came = match present.has(Field::RequestId) {
        true => headers.get(X_REQUEST_ID).filter(usable).cloned(),
        false => None,
    };
    let mut id = came
        .unwrap_or_else(|| HeaderValue::from_bytes(&uuid(rng)).expect("hexadecimal and dashes"));
    id.set_sensitive(true);
    headers.insert(X_REQUEST_ID, id.clone());
    id
}

/// A random UUID (RFC 9562 §5.4).
fn uuid(rng: &mut fastrand::Rng) -> [u8; 36] {
    const HEX: [u8; 16] = *b"0123456789abcdef";
    let mut bits = rng.u128(..) & !(0xf << 76) & !(0b11 << 62) | 4 << 76 | 0b10 << 62;
    let mut text = [b'-'; 36];
    for (at, place) in text.iter_mut().enumerate() {
        if ![8, 13, 18, 23].contains(&at) {
            *place = HEX[(bits >> 124) as usize];
            bits <<= 4;
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_peer_is_appended_to_a_trusted_list_and_replaces_any_other() {
        let check = |trusted, peer: &str, expected: &str| {
            let mut headers = HeaderMap::new();
            headers.append(X_FORWARDED_FOR, HeaderValue::from_static("1.1.1.1"));
            headers.append(X_FORWARDED_FOR, HeaderValue::from_static("2.2.2.2"));
            append_forwarded_for(&mut headers, peer.parse().unwrap(), trusted);
            let values: Vec<_> = headers.get_all(X_FORWARDED_FOR).iter().collect();
            assert_eq!(values, [expected]);
        };
        check(true, "10.0.0.1", "1.1.1.1, 2.2.2.2, 10.0.0.1");
        check(false, "10.0.0.1", "10.0.0.1");
        check(false, "::ffff:10.0.0.1", "10.0.0.1");
        check(false, "::1", "::1");
    }

    #[test]
    fn a_trusted_proto_stands() {
        let check = |trusted, expected: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(X_FORWARDED_PROTO, HeaderValue::from_static("https"));
            let present = Present::of(&headers);
            set_forwarded_proto(&mut headers, present, false, trusted);
            assert_eq!(headers[X_FORWARDED_PROTO], expected);
        };
        check(true, "https");
        check(false, "http");
    }

    #[test]
    fn a_usable_id_is_kept_and_any_other_replaced() {
        let mut rng = fastrand::Rng::with_seed(3);
        let mut check = |id: &str, kept: bool| {
            let mut headers = HeaderMap::new();
            headers.insert(X_REQUEST_ID, HeaderValue::from_str(id).unwrap());
            let present = Present::of(&headers);
            let now = ensure_request_id(&mut headers, present, &mut rng);
            assert_eq!(now == id, kept, "{id:?}");
            assert_eq!(headers[X_REQUEST_ID], now);
        };
        check("abc-123", true);
        check("", false);
        check("a b", false);
        check(&"a".repeat(129), false);
        let made = String::from_utf8(uuid(&mut rng).to_vec()).unwrap();
        assert_eq!((made.len(), &made[14..15]), (36, "4"));
        assert!("89ab".contains(&made[19..20]));
    }
}
