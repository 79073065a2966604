//! Which of the fields that a proxy looks for a head has.
//!
//! Owns the one look at every name that takes the place of a look-up for each: most heads have few
//! of these fields, and a look-up hashes the whole name to find nothing. What a field means is its
//! reader's.

use http::{HeaderMap, HeaderName};

use super::PREFIX;

/// A field, or a family of them, that a proxy looks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Field {
    /// What ends at this hop: `connection`, `te`, `upgrade` and the like.
    HopByHop = 1,
    /// `outrigger-*` and `x-forwarded-client-cert`.
    Ours = 1 << 1,
    /// `host`.
    Host = 1 << 2,
    /// `expect`.
    Expect = 1 << 3,
    /// `content-type`.
    ContentType = 1 << 4,
    /// `grpc-timeout`.
    GrpcTimeout = 1 << 5,
    /// `x-request-id`.
    RequestId = 1 << 6,
    /// `x-forwarded-proto`.
    ForwardedProto = 1 << 7,
    /// `idempotency-key`.
    IdempotencyKey = 1 << 8,
}

/// What of [`Field`] a head had when it was looked at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Present(u16);

impl Present {
    /// Looks at every name of `headers`.
    pub fn of(headers: &HeaderMap) -> Self {
        Self(
            headers
                .keys()
                .map(|name| field(name).map_or(0, |field| field as u16))
                .fold(0, |all, one| all | one),
        )
    }

    /// Whether it has the field, or one of the family.
    pub const fn has(self, field: Field) -> bool {
        self.0 & field as u16 != 0
    }
}

/// Told by the length first: nearly all names end there.
fn field(name: &HeaderName) -> Option<Field> {
    let name = name.as_str();
    if name.starts_with(PREFIX) {
        return Some(Field::Ours);
    }
    let known: &[(&str, Field)] = match name.len() {
        2 => &[("te", Field::HopByHop)],
        4 => &[("host", Field::Host)],
        6 => &[("expect", Field::Expect)],
        7 => &[("upgrade", Field::HopByHop)],
        10 => &[
            ("connection", Field::HopByHop),
            ("keep-alive", Field::HopByHop),
        ],
        12 => &[
            ("content-type", Field::ContentType),
            ("grpc-timeout", Field::GrpcTimeout),
            ("x-request-id", Field::RequestId),
        ],
        15 => &[("idempotency-key", Field::IdempotencyKey)],
        16 => &[("proxy-connection", Field::HopByHop)],
        17 => &[
            ("x-forwarded-proto", Field::ForwardedProto),
            ("transfer-encoding", Field::HopByHop),
        ],
        18 => &[("proxy-authenticate", Field::HopByHop)],
        19 => &[("proxy-authorization", Field::HopByHop)],
        23 => &[("x-forwarded-client-cert", Field::Ours)],
        _ => return None,
    };
    known
        .iter()
        .find(|(known, _)| *known == name)
        .map(|(_, field)| *field)
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;
    use proptest::prelude::*;

    use super::*;
    use crate::headers::{StripPolicy, strip_hop_by_hop, strip_outrigger};

    const ALL: [Field; 9] = [
        Field::HopByHop,
        Field::Ours,
        Field::Host,
        Field::Expect,
        Field::ContentType,
        Field::GrpcTimeout,
        Field::RequestId,
        Field::ForwardedProto,
        Field::IdempotencyKey,
    ];

    #[test]
    fn each_name_is_one_field() {
        let check = |name: &'static str, expected: Option<Field>| {
            let mut headers = HeaderMap::new();
            headers.insert(name, HeaderValue::from_static("1"));
            let present = Present::of(&headers);
            for field in ALL {
                assert_eq!(
                    present.has(field),
                    Some(field) == expected,
                    "{name}, {field:?}"
                );
            }
        };
        for name in [
            "connection",
            "te",
            "keep-alive",
            "proxy-connection",
            "proxy-authenticate",
            "proxy-authorization",
            "transfer-encoding",
            "upgrade",
        ] {
            check(name, Some(Field::HopByHop));
        }
        check("outrigger-attempt", Some(Field::Ours));
        check("x-forwarded-client-cert", Some(Field::Ours));
        check("host", Some(Field::Host));
        check("expect", Some(Field::Expect));
        check("content-type", Some(Field::ContentType));
        check("grpc-timeout", Some(Field::GrpcTimeout));
        check("x-request-id", Some(Field::RequestId));
        check("x-forwarded-proto", Some(Field::ForwardedProto));
        check("idempotency-key", Some(Field::IdempotencyKey));
        for name in [
            "accept",
            "cookie",
            "content-length",
            "x-outrigger-a",
            "user-agent",
        ] {
            check(name, None);
        }
    }

    proptest! {
        #[test]
        fn what_is_not_seen_is_not_there_to_be_stripped(
            names in prop::collection::vec("(outrigger-[a-z]{1,4}|te|upgrade|connection|[a-z-]{1,20})", 0..6),
        ) {
            let mut headers = HeaderMap::new();
            for name in names.iter().filter_map(|name| name.parse::<HeaderName>().ok()) {
                headers.append(name, HeaderValue::from_static("x-a"));
            }
            let present = Present::of(&headers);
            let mut left = headers.clone();
            if !present.has(Field::HopByHop) {
                strip_hop_by_hop(&mut left);
            }
            if !present.has(Field::Ours) {
                strip_outrigger(&mut left, StripPolicy::Untrusted);
            }
            prop_assert_eq!(left, headers);
        }
    }
}
