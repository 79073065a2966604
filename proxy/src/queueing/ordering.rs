//! Which messages keep their order: the value of `async.orderingKey` in a request.
//!
//! Reads a header, or one value of a JSON body without building the rest of it. What order means is
//! the queue's. Pure. On the message's life.

use std::fmt;

use bytes::Bytes;
use http::{HeaderMap, HeaderName};
use outrigger_core::error_code::ErrorCode;
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use crate::error::ProxyError;

/// The longest key, in bytes: it is held in memory with every message.
const MAX_KEY_BYTES: usize = 256;

/// A body up to this size is read on the worker: about half a millisecond for the largest.
const READ_AT_ONCE: usize = 64 * 1024;

/// Where a message's ordering key is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OrderingKey {
    /// In a header field.
    Header(HeaderName),
    /// In the JSON body: the steps of an RFC 6901 pointer.
    JsonPointer(Vec<String>),
}

impl OrderingKey {
    /// Reads a pointer such as `/order/id`; `~1` is a slash and `~0` a tilde.
    pub fn pointer(text: &str) -> Self {
        let steps = text.split('/').skip(1);
        Self::JsonPointer(
            steps
                .map(|step| step.replace("~1", "/").replace("~0", "~"))
                .collect(),
        )
    }

    /// The key of a request. None, and so no order, where it is absent, empty, no single value, or
    /// the body is no JSON.
    ///
    /// # Errors
    /// `bad_request` for a header that is given twice or is no text, and for a key over 256 bytes.
    pub async fn read(
        &self,
        fields: &HeaderMap,
        body: &Bytes,
    ) -> Result<Option<String>, ProxyError> {
        let key = match self {
            Self::Header(name) => header(fields, name)?,
            Self::JsonPointer(steps) if body.len() <= READ_AT_ONCE => at(body, steps),
            Self::JsonPointer(steps) => {
                let (body, steps) = (body.clone(), steps.clone());
                let reading = tokio::task::spawn_blocking(move || at(&body, &steps));
                reading.await.ok().flatten()
            }
        };
        match key {
            Some(key) if key.len() > MAX_KEY_BYTES => Err(bad(&format!(
                "the ordering key has {} bytes, at most {MAX_KEY_BYTES} are allowed",
                key.len()
            ))),
            key => Ok(key.filter(|key| !key.is_empty())),
        }
    }
}

fn header(fields: &HeaderMap, name: &HeaderName) -> Result<Option<String>, ProxyError> {
    let mut values = fields.get_all(name).iter();
    let Some(value) = values.next() else {
        return Ok(None);
    };
    match value.to_str().ok().filter(|_| values.next().is_none()) {
        Some(text) => Ok(Some(text.trim().to_owned())),
        None => Err(bad(&format!(
            "{name} is the route's ordering key: expected one value of text"
        ))),
    }
}

fn bad(detail: &str) -> ProxyError {
    ProxyError::downstream(ErrorCode::BadRequest, detail)
}

/// The value that `steps` lead to, as text.
fn at(body: &[u8], steps: &[String]) -> Option<String> {
    let mut input = serde_json::Deserializer::from_slice(body);
    let found = Steps(steps).deserialize(&mut input).ok()?;
    input.end().ok()?;
    found
}

/// Walks towards one value and skips the others.
struct Steps<'a>(&'a [String]);

impl<'de> DeserializeSeed<'de> for Steps<'_> {
    type Value = Option<String>;

    fn deserialize<D: Deserializer<'de>>(self, input: D) -> Result<Self::Value, D::Error> {
        input.deserialize_any(self)
    }
}

impl Steps<'_> {
    fn here(&self, text: impl fmt::Display) -> Option<String> {
        self.0.is_empty().then(|| text.to_string())
    }
}

impl<'de> Visitor<'de> for Steps<'_> {
    type Value = Option<String>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut found = None;
        while let Some(name) = map.next_key::<String>()? {
            match self.0.split_first() {
                // Of a name that is given twice the last counts, as almost everywhere.
                Some((step, rest)) if *step == name => found = map.next_value_seed(Steps(rest))?,
                _ => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        Ok(found)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
        let step = self.0.split_first();
        let wanted = step.and_then(|(step, rest)| Some((step.parse::<usize>().ok()?, rest)));
        let mut found = None;
        for n in 0_usize.. {
            match wanted {
                Some((at, rest)) if at == n => match list.next_element_seed(Steps(rest))? {
                    Some(value) => found = value,
                    None => break,
                },
                _ => {
                    if list.next_element::<IgnoredAny>()?.is_none() {
                        break;
                    }
                }
            }
        }
        Ok(found)
    }

    fn visit_str<E>(self, text: &str) -> Result<Self::Value, E> {
        Ok(self.here(text))
    }

    fn visit_u64<E>(self, number: u64) -> Result<Self::Value, E> {
        Ok(self.here(number))
    }

    fn visit_i64<E>(self, number: i64) -> Result<Self::Value, E> {
        Ok(self.here(number))
    }

    fn visit_f64<E>(self, number: f64) -> Result<Self::Value, E> {
        Ok(self.here(number))
    }

    fn visit_bool<E>(self, truth: bool) -> Result<Self::Value, E> {
        Ok(self.here(truth))
    }

    fn visit_unit<E>(self) -> Result<Self::Value, E> {
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn find(pointer: &str, body: &str) -> Option<String> {
        let OrderingKey::JsonPointer(steps) = OrderingKey::pointer(pointer) else {
            unreachable!("a pointer")
        };
        at(body.as_bytes(), &steps)
    }

    #[test]
    fn a_pointer_leads_to_a_value_that_is_text_number_or_truth() {
        let body = r#"{"a": {"id": "x"}, "order": {"skip": [1, {"id": 2}], "id": 7, "id": 42},
            "list": [null, {"id": -3}], "a/b": {"~": true}, "f": 1.5, "none": null}"#;
        let check = |pointer, expected: Option<&str>| {
            assert_eq!(find(pointer, body).as_deref(), expected, "{pointer}");
        };
        check("/a/id", Some("x"));
        check("/order/id", Some("42"));
        check("/list/1/id", Some("-3"));
        check("/a~1b/~0", Some("true"));
        check("/f", Some("1.5"));
        for absent in [
            "/order",
            "/list",
            "/none",
            "/b",
            "/a/id/more",
            "/list/9",
            "/list/x",
        ] {
            check(absent, None);
        }
        assert_eq!(find("/a", "not JSON"), None);
        assert_eq!(find("/a", r#"{"a": 1} and more"#), None);
        assert_eq!(find("/a", r#"{"a": 1"#), None);
    }

    #[tokio::test]
    async fn a_key_is_one_short_text() {
        let key = OrderingKey::Header(HeaderName::from_static("x-order"));
        let read = async |values: &[&[u8]]| {
            let mut fields = HeaderMap::new();
            for value in values {
                fields.append("x-order", HeaderValue::from_bytes(value).expect("a value"));
            }
            let read = key.read(&fields, &Bytes::new()).await;
            read.map_err(|error| error.code)
        };
        let bad = Err(ErrorCode::BadRequest);
        assert_eq!(read(&[]).await, Ok(None));
        assert_eq!(read(&[b""]).await, Ok(None));
        assert_eq!(read(&[b" 42 "]).await, Ok(Some("42".to_owned())));
        assert_eq!(read(&[b"1", b"2"]).await, bad);
        assert_eq!(read(&[&[0xff]]).await, bad);
        assert_eq!(
            read(&[&[b'x'; MAX_KEY_BYTES]]).await.map(|k| k.is_some()),
            Ok(true)
        );
        assert_eq!(read(&[&[b'x'; MAX_KEY_BYTES + 1]]).await, bad);
    }

    #[tokio::test]
    async fn a_long_body_is_read_elsewhere_and_gives_the_same_key() {
        let body = format!(r#"{{"pad": "{}", "id": 5}}"#, "x".repeat(READ_AT_ONCE));
        let key = OrderingKey::pointer("/id");
        let read = key.read(&HeaderMap::new(), &body.into()).await;
        assert_eq!(read.map_err(|error| error.code), Ok(Some("5".to_owned())));
    }
}
