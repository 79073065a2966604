//! One request of the admin API as its handler sees it, and the answers that handlers make.
//!
//! Owns the reading of paths, queries and preconditions (RFC 9110 §13.1), and how lists are cut
//! into pages.

use std::borrow::Cow;
use std::sync::Arc;

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{CONTENT_TYPE, ETAG, HeaderMap, HeaderValue, IF_MATCH, IF_NONE_MATCH, LINK};
use hyper::{Response, StatusCode, Uri};
use outrigger_config::units::DEFAULT_NAMESPACE;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use super::problem::Problem;
use crate::app::App;
use crate::render::short_hex;

/// What a handler says.
pub type Answer = Result<Response<Full<Bytes>>, Problem>;

/// The longest page of a list.
pub const MAX_PAGE: usize = 1000;

/// One request whose path, query and right to be here are in order.
#[derive(Debug)]
pub struct Call {
    /// The control plane.
    pub app: Arc<App>,
    /// Who asks, for people.
    pub who: String,
    /// The path, as it came.
    pub path: String,
    /// What stands for the names in the path, in their order.
    pub names: Vec<String>,
    /// Names and values of the query, decoded.
    pub query: Vec<(String, String)>,
    /// The headers.
    pub headers: HeaderMap,
    /// The body.
    pub body: Bytes,
}

impl Call {
    /// A value of the query.
    pub fn parameter(&self, name: &str) -> Option<&str> {
        let mut named = self.query.iter().filter(|(key, _)| key == name);
        named.next().map(|(_, value)| value.as_str())
    }

    /// The service in the path as `namespace/name`. It is written `name` (in the namespace of
    /// `?namespace=`, else `default`) or `namespace%2Fname`.
    ///
    /// # Errors
    /// It is no name of a service.
    pub fn service(&self) -> Result<String, Problem> {
        let name = self.names.first().map_or("", String::as_str);
        service_name(name, self.parameter("namespace"))
    }

    /// The instance in the path.
    pub fn instance(&self) -> &str {
        self.names.get(1).map_or("", String::as_str)
    }

    /// Whether only to say what would happen.
    ///
    /// # Errors
    /// `dryRun` is neither true nor false.
    pub fn is_dry_run(&self) -> Result<bool, Problem> {
        match self.parameter("dryRun") {
            None | Some("false") => Ok(false),
            Some("true") => Ok(true),
            Some(_) => Err(Problem::bad_request("dryRun is true or false")),
        }
    }

    /// The body.
    ///
    /// # Errors
    /// It is not JSON, or not what is expected.
    pub fn json<T: DeserializeOwned>(&self, expected: &str) -> Result<T, Problem> {
        serde_json::from_slice(&self.body)
            .map_err(|e| Problem::bad_request(format!("expected {expected}: {e}")))
    }

    /// A body that may be left out.
    ///
    /// # Errors
    /// It is not JSON, or not what is expected.
    pub fn json_or_default<T: DeserializeOwned + Default>(
        &self,
        expected: &str,
    ) -> Result<T, Problem> {
        if self.body.is_empty() {
            return Ok(T::default());
        }
        self.json(expected)
    }

    /// Whether the resource is the one that the caller has seen; `None`: there is none.
    ///
    /// # Errors
    /// `If-Match` or `If-None-Match` say otherwise: 412.
    pub fn check_conditions(&self, tag: Option<&str>) -> Result<(), Problem> {
        let lists = |name| self.headers.get_all(name).iter();
        let text = |value: &HeaderValue| value.to_str().unwrap_or_default().to_owned();
        if self.headers.contains_key(IF_MATCH)
            && !lists(IF_MATCH).any(|value| is_among(&text(value), tag))
        {
            let detail = match tag {
                Some(tag) => format!("it has changed: its ETag is {tag}; read it again"),
                None => "it does not exist".to_owned(),
            };
            return Err(Problem::precondition(detail));
        }
        if lists(IF_NONE_MATCH).any(|value| is_among(&text(value), tag)) {
            return Err(Problem::precondition("it exists already"));
        }
        Ok(())
    }

    /// The part of a list that was asked for: `limit` items whose name is behind `after`.
    ///
    /// # Errors
    /// `limit` is no number from 1 to [`MAX_PAGE`].
    pub fn page<T>(
        &self,
        items: impl Iterator<Item = T>,
        name: impl Fn(&T) -> String,
    ) -> Result<Page<T>, Problem> {
        let limit = match self.parameter("limit") {
            None => usize::MAX,
            Some(text) => text
                .parse()
                .ok()
                .filter(|limit| (1..=MAX_PAGE).contains(limit))
                .ok_or_else(|| Problem::bad_request(format!("limit is 1 to {MAX_PAGE}")))?,
        };
        let after = self.parameter("after").unwrap_or_default();
        let mut rest = items.filter(|item| after.is_empty() || name(item).as_str() > after);
        let items: Vec<T> = rest.by_ref().take(limit).collect();
        let last = items.last().map(&name);
        Ok(Page {
            next: last.filter(|_| rest.next().is_some()),
            limit,
            items,
        })
    }

    /// A page of a list with the way to the next one, in the body and as `Link` (RFC 8288).
    pub fn paged<T>(&self, page: &Page<T>, mut body: Value) -> Response<Full<Bytes>> {
        body["next"] = page.next.clone().into();
        let mut response = json_answer(StatusCode::OK, &body);
        if let Some(next) = &page.next {
            let (path, limit, after) = (&self.path, page.limit, encode(next));
            let link = format!("<{path}?limit={limit}&after={after}>; rel=\"next\"");
            if let Ok(link) = HeaderValue::from_str(&link) {
                response.headers_mut().insert(LINK, link);
            }
        }
        response
    }
}

/// A part of a list.
#[derive(Debug)]
pub struct Page<T> {
    /// The part.
    pub items: Vec<T>,
    /// Where the next part begins: behind this name. None: this is the end.
    next: Option<String>,
    limit: usize,
}

/// Whether a list of ETags, or `*`, names this one. Weak ones name nothing (RFC 9110 §13.1.1).
fn is_among(list: &str, tag: Option<&str>) -> bool {
    let Some(tag) = tag else { return false };
    list.split(',').map(str::trim).any(|t| t == "*" || t == tag)
}

/// The ETag of whatever these texts tell apart.
pub fn etag<'a>(parts: impl IntoIterator<Item = &'a str>) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_be_bytes());
        hash.update(part);
    }
    format!("\"{}\"", short_hex(&hash.finalize()))
}

/// The service that a path under `/v1/services` is about, as [`Call::service`] says it.
///
/// # Errors
/// It is about none.
pub fn service_of(uri: &Uri) -> Result<String, Problem> {
    let name = uri.path().split('/').nth(3).unwrap_or_default();
    let query = query(uri.query())?;
    let mut namespaces = query.iter().filter(|(key, _)| key == "namespace");
    let namespace = namespaces.next().map(|(_, value)| value.as_str());
    service_name(&decode(name)?, namespace)
}

/// `name` or `namespace/name` to `namespace/name`.
fn service_name(name: &str, namespace: Option<&str>) -> Result<String, Problem> {
    let (namespace, name) = match name.split_once('/') {
        Some((own, name)) if namespace.is_none_or(|n| n == own) => (own, name),
        Some(_) => return Err(Problem::bad_request("the path and ?namespace= disagree")),
        None => (namespace.unwrap_or(DEFAULT_NAMESPACE), name),
    };
    if namespace.is_empty() || name.is_empty() || name.contains('/') {
        return Err(Problem::bad_request(
            "a service is written as name or namespace%2Fname",
        ));
    }
    Ok(format!("{namespace}/{name}"))
}

/// The names and values of a query.
///
/// # Errors
/// One is not properly percent-encoded.
pub fn query(text: Option<&str>) -> Result<Vec<(String, String)>, Problem> {
    let pairs = text.unwrap_or_default().split('&');
    pairs
        .filter(|pair| !pair.is_empty())
        .map(|pair| {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            Ok((decode(name)?.into_owned(), decode(value)?.into_owned()))
        })
        .collect()
}

/// Percent-decoding (RFC 3986 §2.1); the result must be UTF-8 without control characters.
///
/// # Errors
/// It is not.
pub fn decode(segment: &str) -> Result<Cow<'_, str>, Problem> {
    if !segment.contains('%') {
        return Ok(segment.into());
    }
    let bad = || Problem::bad_request("the path is not properly percent-encoded");
    let mut bytes = Vec::with_capacity(segment.len());
    let mut rest = segment.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let mut digit = || rest.next().and_then(|b| char::from(b).to_digit(16));
        let (Some(high), Some(low)) = (digit(), digit()) else {
            return Err(bad());
        };
        bytes.push(u8::try_from(high * 16 + low).map_err(|_| bad())?);
    }
    let text = String::from_utf8(bytes).map_err(|_| bad())?;
    if text.chars().any(char::is_control) {
        Err(bad())
    } else {
        Ok(text.into())
    }
}

fn encode(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'-' | b'.' | b'_' | b'~' => out.push(char::from(byte)),
            byte if byte.is_ascii_alphanumeric() => out.push(char::from(byte)),
            byte => out.push_str(&format!("%{byte:02X}")),
        }
    }
    out
}

/// A text.
pub fn text_answer(status: StatusCode, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    with_type(status, "text/plain; charset=utf-8", body.into())
}

/// A JSON value.
pub fn json_answer(status: StatusCode, value: &Value) -> Response<Full<Bytes>> {
    with_type(status, "application/json", format!("{value:#}\n").into())
}

/// A JSON value that a later write can be bound to.
pub fn tagged(value: &Value, tag: &str) -> Response<Full<Bytes>> {
    let mut response = json_answer(StatusCode::OK, value);
    if let Ok(tag) = HeaderValue::from_str(tag) {
        response.headers_mut().insert(ETAG, tag);
    }
    response
}

/// It is done.
pub fn no_content() -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::default());
    *response.status_mut() = StatusCode::NO_CONTENT;
    response
}

/// It would be done.
pub fn would(what: &Value) -> Response<Full<Bytes>> {
    json_answer(StatusCode::OK, &json!({"dryRun": true, "would": what}))
}

fn with_type(status: StatusCode, kind: &'static str, body: Bytes) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body));
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_is_named_by_path_and_namespace() {
        let check = |name: &str, namespace: Option<&str>, expected: Option<&str>| {
            let named = service_name(name, namespace).ok();
            assert_eq!(named.as_deref(), expected, "{name} {namespace:?}");
        };
        check("orders", None, Some("default/orders"));
        check("orders", Some("shop"), Some("shop/orders"));
        check("shop/orders", None, Some("shop/orders"));
        check("shop/orders", Some("shop"), Some("shop/orders"));
        check("shop/orders", Some("other"), None);
        check("a/b/c", None, None);
        check("", None, None);
    }

    #[test]
    fn paths_and_queries_are_decoded_and_bad_ones_refused() {
        let check = |raw: &str, expected: Option<&str>| {
            assert_eq!(decode(raw).ok().as_deref(), expected, "{raw}");
        };
        check("plain", Some("plain"));
        check("shop%2Forders", Some("shop/orders"));
        check("%c3%A9", Some("é"));
        check("%2", None);
        check("%zz", None);
        check("%ff", None);
        check("a%0ab", None);
        let pairs = query(Some("a=b%2Fc&d")).expect("in order");
        let pair = |a: &str, b: &str| (a.to_owned(), b.to_owned());
        assert_eq!(pairs, [pair("a", "b/c"), pair("d", "")]);
        assert!(query(Some("a=%")).is_err());
        assert_eq!(encode("shop/web-1"), "shop%2Fweb-1");
    }

    #[test]
    fn conditions_name_a_tag_or_anything_that_is_there() {
        let check = |list: &str, tag: Option<&str>, expected: bool| {
            assert_eq!(is_among(list, tag), expected, "{list} {tag:?}");
        };
        check("\"a\"", Some("\"a\""), true);
        check("\"b\", \"a\"", Some("\"a\""), true);
        check("W/\"a\"", Some("\"a\""), false);
        check("*", Some("\"a\""), true);
        check("*", None, false);
        check("\"b\"", Some("\"a\""), false);
        assert_ne!(etag(["ab", ""]), etag(["a", "b"]));
    }
}
