//! gRPC status codes: numbers, names, sets, and what an HTTP status stands for.
//!
//! Owns the code table. Does not decide whether a code is a failure ([`crate::outcome`]) or worth
//! another try ([`crate::retry`], [`crate::redelivery`]). On the request's and the message's life.

use std::fmt;
use std::str::FromStr;

use http::{HeaderMap, StatusCode};

/// A gRPC status code, 0 to 16 (grpc/grpc `doc/statuscodes.md`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
#[allow(missing_docs)] // the names are the specification's own
pub enum GrpcCode {
    Ok = 0,
    Cancelled = 1,
    Unknown = 2,
    InvalidArgument = 3,
    DeadlineExceeded = 4,
    NotFound = 5,
    AlreadyExists = 6,
    PermissionDenied = 7,
    ResourceExhausted = 8,
    FailedPrecondition = 9,
    Aborted = 10,
    OutOfRange = 11,
    Unimplemented = 12,
    Internal = 13,
    Unavailable = 14,
    DataLoss = 15,
    Unauthenticated = 16,
}

impl GrpcCode {
    /// Every code in numeric order: `ALL[n]` has number `n`.
    pub const ALL: [GrpcCode; 17] = [
        GrpcCode::Ok,
        GrpcCode::Cancelled,
        GrpcCode::Unknown,
        GrpcCode::InvalidArgument,
        GrpcCode::DeadlineExceeded,
        GrpcCode::NotFound,
        GrpcCode::AlreadyExists,
        GrpcCode::PermissionDenied,
        GrpcCode::ResourceExhausted,
        GrpcCode::FailedPrecondition,
        GrpcCode::Aborted,
        GrpcCode::OutOfRange,
        GrpcCode::Unimplemented,
        GrpcCode::Internal,
        GrpcCode::Unavailable,
        GrpcCode::DataLoss,
        GrpcCode::Unauthenticated,
    ];

    /// The code of a number; `None` above 16.
    pub fn from_number(number: u32) -> Option<GrpcCode> {
        Self::ALL.get(usize::try_from(number).ok()?).copied()
    }

    /// The number on the wire.
    pub const fn number(self) -> u8 {
        self as u8
    }

    /// The canonical name, such as `DEADLINE_EXCEEDED`.
    pub const fn name(self) -> &'static str {
        match self {
            GrpcCode::Ok => "OK",
            GrpcCode::Cancelled => "CANCELLED",
            GrpcCode::Unknown => "UNKNOWN",
            GrpcCode::InvalidArgument => "INVALID_ARGUMENT",
            GrpcCode::DeadlineExceeded => "DEADLINE_EXCEEDED",
            GrpcCode::NotFound => "NOT_FOUND",
            GrpcCode::AlreadyExists => "ALREADY_EXISTS",
            GrpcCode::PermissionDenied => "PERMISSION_DENIED",
            GrpcCode::ResourceExhausted => "RESOURCE_EXHAUSTED",
            GrpcCode::FailedPrecondition => "FAILED_PRECONDITION",
            GrpcCode::Aborted => "ABORTED",
            GrpcCode::OutOfRange => "OUT_OF_RANGE",
            GrpcCode::Unimplemented => "UNIMPLEMENTED",
            GrpcCode::Internal => "INTERNAL",
            GrpcCode::Unavailable => "UNAVAILABLE",
            GrpcCode::DataLoss => "DATA_LOSS",
            GrpcCode::Unauthenticated => "UNAUTHENTICATED",
        }
    }

    /// The `grpc-status` of a head (trailers-only answer) or of trailers; `None` without one.
    ///
    /// A value that is no number from 0 to 16 is [`GrpcCode::Unknown`], as gRPC clients see it.
    pub fn from_headers(headers: &HeaderMap) -> Option<GrpcCode> {
        let value = headers.get(crate::headers::GRPC_STATUS)?;
        let number = value
            .to_str()
            .ok()
            .and_then(|text| text.trim().parse::<u32>().ok());
        Some(
            number
                .and_then(GrpcCode::from_number)
                .unwrap_or(GrpcCode::Unknown),
        )
    }

    /// What a client makes of an HTTP status that came without a `grpc-status`
    /// (grpc/grpc `doc/http-grpc-status-mapping.md`).
    pub fn from_http(status: StatusCode) -> GrpcCode {
        match status.as_u16() {
            400 => GrpcCode::Internal,
            401 => GrpcCode::Unauthenticated,
            403 => GrpcCode::PermissionDenied,
            404 => GrpcCode::Unimplemented,
            429 | 502 | 503 | 504 => GrpcCode::Unavailable,
            _ => GrpcCode::Unknown,
        }
    }
}

impl fmt::Display for GrpcCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The text is no canonical gRPC code name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoSuchCode;

impl fmt::Display for NoSuchCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("not a gRPC status name such as UNAVAILABLE")
    }
}

impl std::error::Error for NoSuchCode {}

impl FromStr for GrpcCode {
    type Err = NoSuchCode;

    /// Reads a canonical name in upper case.
    fn from_str(name: &str) -> Result<Self, NoSuchCode> {
        Self::ALL
            .into_iter()
            .find(|code| code.name() == name)
            .ok_or(NoSuchCode)
    }
}

/// A set of gRPC codes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GrpcSet(u32);

impl GrpcSet {
    /// The set without members.
    pub const EMPTY: GrpcSet = GrpcSet(0);

    /// A set of these codes.
    pub const fn of(codes: &[GrpcCode]) -> GrpcSet {
        let mut bits = 0;
        let mut i = 0;
        while i < codes.len() {
            bits |= 1 << codes[i].number();
            i += 1;
        }
        GrpcSet(bits)
    }

    /// Adds a code.
    pub fn insert(&mut self, code: GrpcCode) {
        self.0 |= 1 << code.number();
    }

    /// Whether the code is a member.
    pub const fn contains(&self, code: GrpcCode) -> bool {
        self.0 & (1 << code.number()) != 0
    }

    /// Whether nothing is a member.
    pub const fn is_empty(&self) -> bool {
        self.0 == 0
    }
}

impl FromIterator<GrpcCode> for GrpcSet {
    fn from_iter<I: IntoIterator<Item = GrpcCode>>(codes: I) -> Self {
        let mut set = GrpcSet::EMPTY;
        codes.into_iter().for_each(|code| set.insert(code));
        set
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_names_go_both_ways() {
        for (number, code) in GrpcCode::ALL.into_iter().enumerate() {
            assert_eq!(usize::from(code.number()), number);
            assert_eq!(GrpcCode::from_number(number as u32), Some(code));
            assert_eq!(code.name().parse(), Ok(code));
        }
        assert_eq!(GrpcCode::from_number(17), None);
        assert_eq!("unavailable".parse::<GrpcCode>(), Err(NoSuchCode));
    }

    #[test]
    fn a_garbled_status_reads_as_unknown_and_none_reads_as_none() {
        let check = |value: Option<&'static str>, expected| {
            let mut headers = HeaderMap::new();
            if let Some(value) = value {
                headers.insert("grpc-status", http::HeaderValue::from_static(value));
            }
            assert_eq!(GrpcCode::from_headers(&headers), expected, "{value:?}");
        };
        check(None, None);
        check(Some("0"), Some(GrpcCode::Ok));
        check(Some("14"), Some(GrpcCode::Unavailable));
        check(Some("99"), Some(GrpcCode::Unknown));
        check(Some("fine"), Some(GrpcCode::Unknown));
    }

    #[test]
    fn http_statuses_map_as_the_specification_says() {
        let check = |status: u16, code| {
            let status = StatusCode::from_u16(status).unwrap();
            assert_eq!(GrpcCode::from_http(status), code);
        };
        check(400, GrpcCode::Internal);
        check(401, GrpcCode::Unauthenticated);
        check(403, GrpcCode::PermissionDenied);
        check(404, GrpcCode::Unimplemented);
        check(429, GrpcCode::Unavailable);
        check(503, GrpcCode::Unavailable);
        check(200, GrpcCode::Unknown);
    }

    #[test]
    fn a_set_holds_what_was_put_in() {
        let set = GrpcSet::of(&[GrpcCode::Ok, GrpcCode::Unauthenticated]);
        for code in GrpcCode::ALL {
            let expected = matches!(code, GrpcCode::Ok | GrpcCode::Unauthenticated);
            assert_eq!(set.contains(code), expected, "{code}");
        }
        assert!(GrpcSet::default().is_empty());
    }
}
