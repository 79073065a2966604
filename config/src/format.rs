//! The named formats of scalars that the JSON Schema carries in `format`.
//!
//! Owns what each accepts. A format that is not known here is not checked.

use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use crate::tree::{Node, Value, shorten};
use crate::units::{
    ByteSize, CodeOrClass, Dur, GrpcCode, KeySource, Reference, is_object_name, is_token,
};

/// Checks a node against a format; none when the format is not known.
pub(crate) fn check(format: &str, node: &Node) -> Option<Result<(), String>> {
    let outcome = match format {
        "duration" => text(node, "a duration such as \"10s\"", parsed::<Dur>),
        "byte-size" => match &node.value {
            Value::Number(number) => parsed::<ByteSize>(&number.to_string()),
            _ => text(node, "a size such as \"64KiB\"", parsed::<ByteSize>),
        },
        "status" => match &node.value {
            Value::Number(number) => parsed::<CodeOrClass>(&number.to_string()),
            _ => text(
                node,
                "a status such as 503 or \"5xx\"",
                parsed::<CodeOrClass>,
            ),
        },
        "grpc-code" => text(node, "a gRPC code such as UNAVAILABLE", parsed::<GrpcCode>),
        "reference" => text(node, "\"name\" or \"namespace/name\"", parsed::<Reference>),
        "key-source" => text(node, "a key such as header:NAME", parsed::<KeySource>),
        "percent" => whole(node, "a whole percentage from 0 to 100", 0, 100),
        "port" => whole(node, "a port from 1 to 65535", 1, 65_535),
        "redirect-status" => whole(node, "301, 302, 303, 307 or 308", 301, 308).and_then(|()| {
            match node.to_json().as_u64() {
                Some(304..=306) => Err(refusal("301, 302, 303, 307 or 308", node)),
                _ => Ok(()),
            }
        }),
        "ip" => matching(node, "an IP address", |text| text.parse::<IpAddr>().is_ok()),
        "socket-address" => matching(node, "an address such as \"127.0.0.1:15001\"", |text| {
            text.parse::<SocketAddr>().is_ok()
        }),
        "cidr" => matching(node, "an address range such as \"10.0.0.0/8\"", is_cidr),
        "object-name" => matching(
            node,
            "a name in lower-case letters, digits, '-' and '.'",
            is_object_name,
        ),
        "hostname" => matching(
            node,
            "a host name such as \"orders.shop\", without a port",
            is_hostname,
        ),
        "trust-domain" => matching(
            node,
            "a trust domain such as \"shop.local\"",
            is_trust_domain,
        ),
        "spiffe-id" => matching(
            node,
            "a SPIFFE ID such as \"spiffe://shop.local/ns/shop/sa/web\"",
            |text| spiffe_trust_domain(text).is_some() && !text.contains('*'),
        ),
        "spiffe-pattern" => matching(
            node,
            "a SPIFFE ID such as \"spiffe://shop.local/ns/shop/sa/*\"",
            |text| {
                let stem = text.strip_suffix('*').unwrap_or(text);
                spiffe_trust_domain(text).is_some() && !stem.contains('*')
            },
        ),
        "method" => matching(node, "a method such as GET, in upper case", |text| {
            is_token(text) && !text.bytes().any(|byte| byte.is_ascii_lowercase())
        }),
        "token" => matching(node, "a header name such as \"x-canary\"", is_token),
        "path" => matching(node, "a path that begins with \"/\"", is_path),
        "http-url" => matching(node, "a URL such as \"http://127.0.0.1:8500\"", is_http_url),
        _ => return None,
    };
    Some(outcome)
}

/// The trust domain of a SPIFFE ID (SPIFFE-ID §2), or none when it is not one.
pub(crate) fn spiffe_trust_domain(id: &str) -> Option<&str> {
    let (domain, path) = id.strip_prefix("spiffe://")?.split_once('/')?;
    (is_trust_domain(domain) && !path.is_empty()).then_some(domain)
}

/// Whether `text` is a path, without a query.
pub(crate) fn is_path(text: &str) -> bool {
    text.starts_with('/')
        && text.len() <= 1024
        && !text
            .bytes()
            .any(|byte| byte <= b' ' || byte == 0x7f || byte == b'?' || byte == b'#')
}

fn is_trust_domain(text: &str) -> bool {
    !text.is_empty()
        && text.len() <= 255
        && text.bytes().all(|byte| {
            byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'.' | b'-' | b'_')
        })
}

fn is_hostname(text: &str) -> bool {
    let label = |label: &str| {
        !label.is_empty()
            && label.len() <= 63
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'))
    };
    text.len() <= 253 && text.split('.').all(label)
}

fn is_cidr(text: &str) -> bool {
    let Some((address, bits)) = text.split_once('/') else {
        return false;
    };
    let widest = match address.parse::<IpAddr>() {
        Ok(IpAddr::V4(_)) => 32,
        Ok(IpAddr::V6(_)) => 128,
        Err(_) => return false,
    };
    bits.parse::<u8>().is_ok_and(|bits| bits <= widest)
}

fn is_http_url(text: &str) -> bool {
    let rest = text
        .strip_prefix("http://")
        .or_else(|| text.strip_prefix("https://"));
    rest.is_some_and(|rest| {
        let authority = rest.split('/').next().unwrap_or_default();
        !authority.is_empty() && !rest.bytes().any(|byte| byte <= b' ' || byte == 0x7f)
    })
}

fn refusal(expected: &str, node: &Node) -> String {
    format!("expected {expected}, found {}", node.describe())
}

fn parsed<T: FromStr<Err: ToString>>(text: &str) -> Result<(), String> {
    shorten(text)
        .parse::<T>()
        .map(drop)
        .or_else(|short| match text.parse::<T>() {
            Ok(_) => Ok(()),
            Err(_) => Err(short.to_string()),
        })
}

fn text(
    node: &Node,
    expected: &str,
    check: impl Fn(&str) -> Result<(), String>,
) -> Result<(), String> {
    match node.text() {
        Some(text) => check(text),
        None => Err(refusal(expected, node)),
    }
}

fn matching(node: &Node, expected: &str, is: impl Fn(&str) -> bool) -> Result<(), String> {
    match node.text() {
        Some(text) if is(text) => Ok(()),
        _ => Err(refusal(expected, node)),
    }
}

fn whole(node: &Node, expected: &str, least: u64, most: u64) -> Result<(), String> {
    match &node.value {
        Value::Number(number) if number.as_u64().is_some_and(|n| (least..=most).contains(&n)) => {
            Ok(())
        }
        _ => Err(refusal(expected, node)),
    }
}
