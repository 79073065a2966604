//! Request and response heads.

use bytes::Bytes;
use http::{HeaderMap, Method, StatusCode, Uri, Version};
use memchr::memchr;

use super::fields::{EmptyFirstLine, Keep, line_end, parse_fields, section_end};
use super::framing::{Control, Framing};
use super::target::{check_host, parse_target};
use super::{Limits, Malformed};

/// The length of the complete head at the start of `bytes`, with its empty line; `None` when more
/// bytes are needed. One empty line before a request counts as part of its head.
///
/// `searched` starts at 0 for every head and remembers how far was looked, as long as `bytes` only
/// grows.
///
/// # Errors
/// A CR or LF on its own, or a size over the limit, as soon as it is there.
pub fn find_end(
    bytes: &[u8],
    searched: &mut usize,
    limits: &Limits,
) -> Result<Option<usize>, Malformed> {
    section_end(bytes, searched, EmptyFirstLine::Skipped, limits)
}

/// The head of a request.
#[derive(Clone, Debug)]
pub struct RequestHead {
    /// Any token.
    pub method: Method,
    /// In the form it was sent in. The authority of an absolute one takes precedence over `Host`
    /// (RFC 9112 §3.2.2).
    pub uri: Uri,
    /// HTTP/1.0 or HTTP/1.1.
    pub version: Version,
    /// All fields, hop-by-hop ones too.
    pub headers: HeaderMap,
    /// Never [`Framing::UntilClose`].
    pub framing: Framing,
    /// Whether the client lets the connection carry another request.
    pub keep_alive: bool,
    /// The client waits for 100 before it sends the content. An HTTP/1.0 client cannot, its
    /// `Expect` is dropped (RFC 9110 §10.1.1).
    pub expect_continue: bool,
    /// `Connection: upgrade` and exactly one `Upgrade` field; never in HTTP/1.0.
    pub upgrade: bool,
}

/// Reads a complete request head, as [`find_end`] delimits it. Header values are slices of `head`.
///
/// # Errors
/// Whatever the table in the module's documentation refuses.
#[allow(clippy::needless_pass_by_value)] // the head belongs to its fields from here on
pub fn parse_request(head: Bytes, limits: &Limits) -> Result<RequestHead, Malformed> {
    if head.len() > limits.max_head_bytes {
        return Err(Malformed::HeadTooLarge);
    }
    let start = match head.starts_with(b"\r\n") {
        true => 2,
        false => 0,
    };
    let end = line_end(&head, start)?;
    let line = &head[start..end];
    let method_end =
        memchr(b' ', line).ok_or(Malformed::Syntax("request line without a target"))?;
    let method = Method::from_bytes(&line[..method_end])
        .map_err(|_| Malformed::Syntax("method is not a token"))?;
    let target = &line[method_end + 1..];
    let target_end =
        memchr(b' ', target).ok_or(Malformed::Syntax("request line without a version"))?;
    let version = parse_version(&target[target_end + 1..])?;
    let target_start = start + method_end + 1;
    let uri = parse_target(&method, head.slice(target_start..target_start + target_end))?;

    let mut control = Control::new(version, false);
    let mut hosts = 0_u32;
    let mut expect_continue = false;
    let mut upgrades = 0_u32;
    let headers = parse_fields(&head, end + 2, limits, |name, value| {
        match name.len() {
            4 if name.eq_ignore_ascii_case(b"host") => {
                if hosts > 0 {
                    return Err(Malformed::Host("several Host fields"));
                }
                check_host(value)?;
                hosts += 1;
            }
            6 if name.eq_ignore_ascii_case(b"expect") => {
                if version == Version::HTTP_10 {
                    return Ok(Keep::No);
                }
                if expect_continue || !value.eq_ignore_ascii_case(b"100-continue") {
                    return Err(Malformed::Expectation);
                }
                expect_continue = true;
            }
            7 if name.eq_ignore_ascii_case(b"upgrade") => upgrades += 1,
            _ => return control.inspect(name, value),
        }
        Ok(Keep::Yes)
    })?;
    if hosts == 0 && version == Version::HTTP_11 {
        return Err(Malformed::Host("no Host"));
    }
    let framing = match control.framing(Framing::Empty) {
        // Nothing in the tunnel is content.
        Framing::Length(0) if method == Method::CONNECT => Framing::Empty,
        Framing::Length(_) | Framing::Chunked if method == Method::CONNECT => {
            return Err(Malformed::Framing("CONNECT with content"));
        }
        framing => framing,
    };
    Ok(RequestHead {
        method,
        uri,
        version,
        headers,
        framing,
        keep_alive: control.keep_alive(),
        expect_continue,
        upgrade: control.upgrade && upgrades == 1 && version == Version::HTTP_11,
    })
}

/// The head of a response.
#[derive(Clone, Debug)]
pub struct ResponseHead {
    /// From 100 to 599.
    pub status: StatusCode,
    /// HTTP/1.0 or HTTP/1.1.
    pub version: Version,
    /// All fields, hop-by-hop ones too, but a `Content-Length` where there is never content.
    pub headers: HeaderMap,
    /// [`Framing::Empty`] for `HEAD`, 1xx, 204, 304 and 2xx to `CONNECT`.
    pub framing: Framing,
    /// Whether the server lets the connection carry another request.
    pub keep_alive: bool,
}

/// Reads a complete response head, as [`find_end`] delimits it. Header values are slices of
/// `head`.
///
/// # Errors
/// Whatever the table in the module's documentation refuses.
#[allow(clippy::needless_pass_by_value)] // the head belongs to its fields from here on
pub fn parse_response(
    head: Bytes,
    request_method: &Method,
    limits: &Limits,
) -> Result<ResponseHead, Malformed> {
    if head.len() > limits.max_head_bytes {
        return Err(Malformed::HeadTooLarge);
    }
    let end = line_end(&head, 0)?;
    let (version, status) = parse_status_line(&head[..end])?;
    let opens_tunnel = request_method == Method::CONNECT && status.is_success();
    let never_has_content =
        status.is_informational() || status == StatusCode::NO_CONTENT || opens_tunnel;

    let mut control = Control::new(version, never_has_content);
    let headers = parse_fields(&head, end + 2, limits, |name, value| {
        control.inspect(name, value)
    })?;
    // These describe content that was not sent.
    let is_description = request_method == Method::HEAD || status == StatusCode::NOT_MODIFIED;
    let framing = match never_has_content || is_description {
        true => Framing::Empty,
        false => control.framing(Framing::UntilClose),
    };
    Ok(ResponseHead {
        status,
        version,
        headers,
        framing,
        keep_alive: control.keep_alive() && framing != Framing::UntilClose,
    })
}

fn parse_version(version: &[u8]) -> Result<Version, Malformed> {
    match version {
        b"HTTP/1.1" => Ok(Version::HTTP_11),
        b"HTTP/1.0" => Ok(Version::HTTP_10),
        _ => Err(Malformed::Version),
    }
}

/// `HTTP/1.1 200 OK`; the reason is checked and forgotten.
fn parse_status_line(line: &[u8]) -> Result<(Version, StatusCode), Malformed> {
    let (version, rest) = line.split_at_checked(8).ok_or(Malformed::Version)?;
    let version = parse_version(version)?;
    let [b' ', code @ ..] = rest else {
        return Err(Malformed::Syntax("no space after the version"));
    };
    let (digits, reason) = code
        .split_at_checked(3)
        .ok_or(Malformed::Syntax("status is not three digits"))?;
    if !digits.iter().all(u8::is_ascii_digit) {
        return Err(Malformed::Syntax("status is not three digits"));
    }
    let status = StatusCode::from_bytes(digits)
        .ok()
        .filter(|status| status.as_u16() <= 599)
        .ok_or(Malformed::Syntax("status is not in 100 to 599"))?;
    match reason {
        [] => {}
        [b' ', reason @ ..] => {
            let is_control = |&byte: &u8| byte.is_ascii_control() && byte != b'\t';
            if reason.iter().any(is_control) {
                return Err(Malformed::Syntax("control character in the reason"));
            }
        }
        _ => return Err(Malformed::Syntax("status is not three digits")),
    }
    Ok((version, status))
}
