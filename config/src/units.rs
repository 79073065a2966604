//! The value types of the config: durations, sizes, percentages, status and gRPC codes, references.
//!
//! Owns how one scalar is written, read and refused. Knows nothing of documents or positions: a
//! refused value says what was expected, and the loader adds where it stood. On the life of a
//! config update, in the proxy, the control plane and the command line alike.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{self, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Why a scalar was refused; a sentence that fits after the path of the key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ValueError(pub String);

/// A duration as in GEP-2257: `^([0-9]{1,5}(h|m|s|ms)){1,4}$`, for example `1h30m` or `250ms`.
///
/// `0s` disables what it limits, where that is allowed. Printed in its standard form.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Dur(pub Duration);

impl Dur {
    /// The duration, or none when it is written `0s`.
    pub fn enabled(self) -> Option<Duration> {
        (!self.0.is_zero()).then_some(self.0)
    }
}

impl FromStr for Dur {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        let refuse = || {
            ValueError(format!(
                "expected a duration such as \"1h30m\", \"10s\" or \"250ms\", found {text:?}"
            ))
        };
        let mut rest = text;
        let mut total = 0u64;
        let mut parts = 0;
        while !rest.is_empty() {
            let digits = rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_digit()).len();
            parts += 1;
            if digits == 0 || digits > 5 || parts > 4 {
                return Err(refuse());
            }
            let number: u64 = rest[..digits].parse().map_err(|_| refuse())?;
            rest = &rest[digits..];
            let (unit, millis) = [("ms", 1), ("h", 3_600_000), ("m", 60_000), ("s", 1_000)]
                .into_iter()
                .find(|(unit, _)| rest.starts_with(unit))
                .ok_or_else(refuse)?;
            rest = &rest[unit.len()..];
            total += number * millis;
        }
        if parts == 0 {
            Err(refuse())
        } else {
            Ok(Self(Duration::from_millis(total)))
        }
    }
}

impl fmt::Display for Dur {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let millis = u64::try_from(self.0.as_millis()).unwrap_or(u64::MAX);
        if millis == 0 {
            return f.write_str("0s");
        }
        let parts = [
            (millis / 3_600_000, "h"),
            (millis / 60_000 % 60, "m"),
            (millis / 1_000 % 60, "s"),
            (millis % 1_000, "ms"),
        ];
        for (number, unit) in parts {
            if number > 0 {
                write!(f, "{number}{unit}")?;
            }
        }
        Ok(())
    }
}

/// A size in bytes: `^[0-9]{1,9}(B|KiB|MiB|GiB)?$`, for example `64KiB`; a bare number is bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct ByteSize(pub u64);

const SIZE_UNITS: [(&str, u64); 4] = [
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("B", 1),
];

impl FromStr for ByteSize {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let factor = match &text[digits..] {
            "" => Some(1),
            unit => SIZE_UNITS
                .iter()
                .find(|(name, _)| *name == unit)
                .map(|(_, factor)| *factor),
        };
        match (text[..digits].parse::<u64>(), factor) {
            (Ok(number), Some(factor)) if digits <= 9 => Ok(Self(number * factor)),
            _ => Err(ValueError(format!(
                "expected a size such as \"64KiB\", \"1MiB\" or \"4GiB\", found {text:?}"
            ))),
        }
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (unit, factor) = SIZE_UNITS
            .into_iter()
            .find(|(_, factor)| self.0 >= *factor && self.0.is_multiple_of(*factor))
            .unwrap_or(("B", 1));
        write!(f, "{}{unit}", self.0 / factor)
    }
}

/// A whole percentage, 0 to 100.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Percent(pub u8);

impl Percent {
    /// The share of one, 0.0 to 1.0.
    pub fn ratio(self) -> f64 {
        f64::from(self.0) / 100.0
    }
}

impl fmt::Display for Percent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}%", self.0)
    }
}

/// An HTTP status, or a class of them: `503` or `"5xx"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum CodeOrClass {
    /// Exactly this status, 100 to 599.
    Code(u16),
    /// Every status with this first digit, 1 to 5.
    Class(u8),
}

impl CodeOrClass {
    /// Whether `status` is meant.
    pub fn matches(self, status: u16) -> bool {
        match self {
            Self::Code(code) => code == status,
            Self::Class(class) => status / 100 == u16::from(class),
        }
    }

    fn from_number(number: u64) -> Result<Self, ValueError> {
        match u16::try_from(number) {
            Ok(code @ 100..=599) => Ok(Self::Code(code)),
            _ => Err(ValueError(format!(
                "expected a status from 100 to 599, found {number}"
            ))),
        }
    }
}

impl FromStr for CodeOrClass {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        match text.as_bytes() {
            [class @ b'1'..=b'5', b'x', b'x'] => Ok(Self::Class(class - b'0')),
            [b'1'..=b'5', b'0'..=b'9', b'0'..=b'9'] => {
                Self::from_number(text.parse().expect("three digits are a number"))
            }
            _ => Err(ValueError(format!(
                "expected a status such as 503 or a class such as \"5xx\", found {text:?}"
            ))),
        }
    }
}

impl fmt::Display for CodeOrClass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Code(code) => write!(f, "{code}"),
            Self::Class(class) => write!(f, "{class}xx"),
        }
    }
}

/// A gRPC status code by its canonical upper-case name, for example `UNAVAILABLE`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GrpcCode(u8);

/// The canonical names in the order of their numbers, 0 to 16 (grpc/doc/statuscodes.md).
pub const GRPC_CODES: [&str; 17] = [
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
];

impl GrpcCode {
    /// UNKNOWN.
    pub const UNKNOWN: Self = Self(2);
    /// DEADLINE_EXCEEDED.
    pub const DEADLINE_EXCEEDED: Self = Self(4);
    /// RESOURCE_EXHAUSTED.
    pub const RESOURCE_EXHAUSTED: Self = Self(8);
    /// INTERNAL.
    pub const INTERNAL: Self = Self(13);
    /// UNAVAILABLE.
    pub const UNAVAILABLE: Self = Self(14);
    /// DATA_LOSS.
    pub const DATA_LOSS: Self = Self(15);

    /// The code with this number; UNKNOWN above 16, as gRPC says.
    pub fn from_number(number: u8) -> Self {
        if number > 16 {
            Self::UNKNOWN
        } else {
            Self(number)
        }
    }

    /// The number on the wire, 0 to 16.
    pub fn number(self) -> u8 {
        self.0
    }

    /// The canonical name.
    pub fn name(self) -> &'static str {
        GRPC_CODES[usize::from(self.0)]
    }
}

impl FromStr for GrpcCode {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        match GRPC_CODES.iter().position(|name| *name == text) {
            Some(number) => Ok(Self(u8::try_from(number).expect("17 codes"))),
            None => {
                let hint = crate::suggest::closest(&text.to_ascii_uppercase(), GRPC_CODES)
                    .map(|name| format!("; did you mean {name}?"))
                    .unwrap_or_default();
                Err(ValueError(format!(
                    "expected a gRPC code such as UNAVAILABLE, found {text:?}{hint}"
                )))
            }
        }
    }
}

impl fmt::Display for GrpcCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The name of an object within its namespace; printed and read as `namespace/name`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NamespacedName {
    /// The namespace; `default` where a document names none.
    pub namespace: String,
    /// The name.
    pub name: String,
}

/// The namespace of a document that names none.
pub const DEFAULT_NAMESPACE: &str = "default";

impl NamespacedName {
    /// A name in a namespace.
    pub fn new(namespace: impl Into<String>, name: impl Into<String>) -> Self {
        Self {
            namespace: namespace.into(),
            name: name.into(),
        }
    }
}

impl fmt::Display for NamespacedName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl FromStr for NamespacedName {
    type Err = ValueError;

    /// Reads `namespace/name`, or `name` in the namespace `default`.
    fn from_str(text: &str) -> Result<Self, ValueError> {
        Ok(text.parse::<Reference>()?.target())
    }
}

/// A reference to another object: `name`, or `namespace/name` across namespaces.
///
/// After `load` every reference of a `MeshConfig` carries its namespace: [`Reference::target`] is
/// then the key of the object.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Reference {
    /// The namespace, when it was written or has been filled in.
    pub namespace: Option<String>,
    /// The name.
    pub name: String,
}

impl Reference {
    /// The object meant.
    pub fn target(&self) -> NamespacedName {
        self.within(DEFAULT_NAMESPACE)
    }

    /// The object meant when read in a document of `namespace`.
    pub fn within(&self, namespace: &str) -> NamespacedName {
        NamespacedName::new(self.namespace.as_deref().unwrap_or(namespace), &self.name)
    }

    pub(crate) fn qualify(&mut self, namespace: &str) {
        self.namespace.get_or_insert_with(|| namespace.to_owned());
    }
}

impl FromStr for Reference {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        let (namespace, name) = match text.split_once('/') {
            Some((namespace, name)) => (Some(namespace), name),
            None => (None, text),
        };
        if !namespace.is_none_or(is_object_name) || !is_object_name(name) {
            return Err(ValueError(format!(
                "expected \"name\" or \"namespace/name\" in lower-case letters, digits, '-' and '.', found {text:?}"
            )));
        }
        Ok(Self {
            namespace: namespace.map(str::to_owned),
            name: name.to_owned(),
        })
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.namespace {
            Some(namespace) => write!(f, "{namespace}/{}", self.name),
            None => f.write_str(&self.name),
        }
    }
}

/// Whether `text` may name an object: an RFC 1123 subdomain of at most 253 characters.
pub(crate) fn is_object_name(text: &str) -> bool {
    let bytes = text.as_bytes();
    let edge = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
    text.len() <= 253
        && edge(bytes.first())
        && edge(bytes.last())
        && bytes
            .iter()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'.'))
}

/// Where a key for ordering, hashing or limiting comes from: `header:NAME`, `cookie:NAME`,
/// `jsonpointer:/POINTER`, or one of the words `Route`, `Identity`, `Source`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum KeySource {
    /// The value of a request header, by its lower-case name.
    Header(String),
    /// The value of a cookie.
    Cookie(String),
    /// A value of the JSON body, by RFC 6901 pointer.
    JsonPointer(String),
    /// One key for the whole route.
    Route,
    /// The identity of the caller.
    Identity,
    /// The address of the caller.
    Source,
}

impl FromStr for KeySource {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        let refuse = || {
            ValueError(format!(
                "expected header:NAME, cookie:NAME, jsonpointer:/POINTER, Route, Identity or Source, found {text:?}"
            ))
        };
        match text.split_once(':') {
            Some(("header", name)) if is_token(name) => Ok(Self::Header(name.to_ascii_lowercase())),
            Some(("cookie", name)) if is_token(name) => Ok(Self::Cookie(name.to_owned())),
            Some(("jsonpointer", pointer)) if pointer.starts_with('/') => {
                Ok(Self::JsonPointer(pointer.to_owned()))
            }
            Some(_) => Err(refuse()),
            None => match text {
                "Route" => Ok(Self::Route),
                "Identity" => Ok(Self::Identity),
                "Source" => Ok(Self::Source),
                _ => Err(refuse()),
            },
        }
    }
}

impl fmt::Display for KeySource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Header(name) => write!(f, "header:{name}"),
            Self::Cookie(name) => write!(f, "cookie:{name}"),
            Self::JsonPointer(pointer) => write!(f, "jsonpointer:{pointer}"),
            Self::Route => f.write_str("Route"),
            Self::Identity => f.write_str("Identity"),
            Self::Source => f.write_str("Source"),
        }
    }
}

/// Whether `text` is a token of RFC 9110 §5.6.2: a method or a header name.
pub(crate) fn is_token(text: &str) -> bool {
    !text.is_empty()
        && text.len() <= 256
        && text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b))
}

/// Reads a scalar that is written as a string, or as a whole number where `number` allows it.
struct Scalar<T> {
    expecting: &'static str,
    text: fn(&str) -> Result<T, ValueError>,
    number: fn(u64) -> Result<T, ValueError>,
}

impl<T> Visitor<'_> for Scalar<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.expecting)
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<T, E> {
        (self.text)(text).map_err(E::custom)
    }

    fn visit_u64<E: de::Error>(self, number: u64) -> Result<T, E> {
        (self.number)(number).map_err(E::custom)
    }
}

/// The serde and schema faces of a scalar; `$number` is none where only a string is read.
macro_rules! scalar {
    ($type:ty, $format:literal, $expecting:literal, $schema:tt) => {
        scalar!($type, $format, $expecting, $schema, |number| Err(
            ValueError(format!(
                "expected {}, found the number {number}",
                $expecting
            ))
        ));
    };
    ($type:ty, $format:literal, $expecting:literal, $schema:tt, $number:expr) => {
        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                deserializer.deserialize_any(Scalar {
                    expecting: $expecting,
                    text: str::parse::<$type>,
                    number: $number,
                })
            }
        }

        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl JsonSchema for $type {
            fn schema_name() -> std::borrow::Cow<'static, str> {
                stringify!($type).into()
            }

            fn inline_schema() -> bool {
                true
            }

            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                let mut schema: Schema = json_schema!($schema);
                schema.insert("format".to_owned(), $format.into());
                schema
            }
        }
    };
}

scalar!(Dur, "duration", "a duration such as \"10s\"", {
    "type": "string", "pattern": "^([0-9]{1,5}(h|m|s|ms)){1,4}$"
});
scalar!(ByteSize, "byte-size", "a size such as \"64KiB\"", {
    "type": ["string", "integer"], "pattern": "^[0-9]{1,9}(B|KiB|MiB|GiB)?$",
    "minimum": 0, "maximum": 999_999_999
}, |number| number.to_string().parse());
scalar!(CodeOrClass, "status", "a status such as 503 or \"5xx\"", {
    "type": ["string", "integer"], "pattern": "^[1-5]([0-9]{2}|xx)$", "minimum": 100, "maximum": 599
}, CodeOrClass::from_number);
scalar!(GrpcCode, "grpc-code", "a gRPC code such as UNAVAILABLE", {
    "type": "string", "enum": GRPC_CODES
});
scalar!(Reference, "reference", "\"name\" or \"namespace/name\"", {
    "type": "string", "pattern": "^([a-z0-9]([-.a-z0-9]*[a-z0-9])?/)?[a-z0-9]([-.a-z0-9]*[a-z0-9])?$"
});
scalar!(NamespacedName, "reference", "\"name\" or \"namespace/name\"", {
    "type": "string", "pattern": "^([a-z0-9]([-.a-z0-9]*[a-z0-9])?/)?[a-z0-9]([-.a-z0-9]*[a-z0-9])?$"
});
scalar!(KeySource, "key-source", "a key such as header:NAME", {
    "type": "string", "pattern": "^(header:.+|cookie:.+|jsonpointer:/.*|Route|Identity|Source)$"
});

impl FromStr for Percent {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        Err(ValueError(format!(
            "expected a whole percentage from 0 to 100, found {text:?}"
        )))
    }
}

impl<'de> Deserialize<'de> for Percent {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Scalar {
            expecting: "a whole percentage from 0 to 100",
            text: str::parse::<Self>,
            number: |number| match u8::try_from(number) {
                Ok(percent @ 0..=100) => Ok(Self(percent)),
                _ => Err(ValueError(format!(
                    "expected a whole percentage from 0 to 100, found {number}"
                ))),
            },
        })
    }
}

impl Serialize for Percent {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u8(self.0)
    }
}

impl JsonSchema for Percent {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Percent".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"type": "integer", "format": "percent", "minimum": 0, "maximum": 100})
    }
}
