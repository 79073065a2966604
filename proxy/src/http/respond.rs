//! Every response that Outrigger makes itself leaves through here.
//!
//! An error carries `outrigger-error: <code>` and problem+json (RFC 9457); to a gRPC caller it is
//! a trailers-only response with the code's gRPC status. Stands on the life of a request.

use std::time::Duration;

use bytes::Bytes;
use http::header::{CACHE_CONTROL, CONTENT_TYPE, RETRY_AFTER, WWW_AUTHENTICATE};
use http::{HeaderMap, HeaderValue, Response, StatusCode};
use outrigger_core::error_code::ErrorCode;
use outrigger_core::headers;
use outrigger_core::outcome::GrpcCode;
use serde::Serialize;

use crate::deadline::Cut;
use crate::error::ProxyError;
use crate::http::body::ResponseBody;
use crate::snapshot::features::Respond;

/// The Internet media type of RFC 9457.
const PROBLEM_JSON: HeaderValue = HeaderValue::from_static("application/problem+json");

/// Where the meaning of a code is documented.
const DOCS: &str = "https://outrigger.dev/errors#";

/// What an error answer says beside the error.
#[derive(Debug, Clone, Copy)]
pub struct About<'a> {
    /// The sidecar and direction that answers, such as `web-1/outbound`.
    pub hop: &'a str,
    /// The route that was chosen, if one was.
    pub route: Option<&'a str>,
    /// Attempts made towards an endpoint.
    pub attempts: u32,
    /// Whether the caller speaks gRPC.
    pub grpc: bool,
}

#[derive(Serialize)]
struct Problem<'a> {
    r#type: String,
    title: &'a str,
    status: u16,
    detail: &'a str,
    code: &'a str,
    hop: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    route: Option<&'a str>,
    attempts: u32,
}

/// The answer to a request that failed with `error`.
pub fn error(error: &ProxyError, about: About<'_>) -> Response<ResponseBody> {
    let mut response = if about.grpc {
        grpc_error(error)
    } else {
        problem(error, about)
    };
    let fields = response.headers_mut();
    fields.insert(
        headers::ERROR,
        HeaderValue::from_static(error.code.as_str()),
    );
    if let Some(after) = error.retry_after {
        fields.insert(RETRY_AFTER, seconds(after));
    }
    if error.code == ErrorCode::Unauthenticated && error.status.is_none() {
        fields.insert(WWW_AUTHENTICATE, challenge(&error.detail));
    }
    response
}

/// What a token must be (RFC 6750 §3).
fn challenge(detail: &str) -> HeaderValue {
    let plain = |char: &char| char.is_ascii_graphic() || *char == ' ';
    let quoted: String = detail
        .chars()
        .filter(|char| plain(char) && !matches!(char, '"' | '\\'))
        .collect();
    let text = format!("Bearer error=\"invalid_token\", error_description=\"{quoted}\"");
    HeaderValue::from_str(&text).unwrap_or(HeaderValue::from_static("Bearer"))
}

fn problem(error: &ProxyError, about: About<'_>) -> Response<ResponseBody> {
    let code = error.code.as_str();
    let status = error.status.unwrap_or(error.code.status());
    let problem = Problem {
        r#type: format!("{DOCS}{code}"),
        title: error.code.title(),
        status: status.as_u16(),
        detail: &error.detail,
        code,
        hop: about.hop,
        route: about.route,
        attempts: about.attempts,
    };
    let mut response = json(status, &problem);
    response.headers_mut().insert(CONTENT_TYPE, PROBLEM_JSON);
    response
}

fn grpc_error(error: &ProxyError) -> Response<ResponseBody> {
    let mut response = Response::new(ResponseBody::full(Bytes::new()));
    let code = error.grpc.unwrap_or(error.code.grpc());
    let message = format!("{}: {}", error.code.as_str(), error.detail);
    grpc_status(response.headers_mut(), code, &percent_encode(&message));
    response
}

/// The trailers of a gRPC answer that a time limit ended after its head.
pub fn cut_trailers(cut: Cut) -> HeaderMap {
    let code = match cut {
        Cut::Caller => ErrorCode::DeadlineExceeded,
        Cut::Idle | Cut::Request | Cut::Stream => ErrorCode::UpstreamTimeout,
    };
    let message = match cut {
        Cut::Caller => "deadline_exceeded: the caller's deadline passed",
        Cut::Request => "upstream_timeout: no message within timeouts.request",
        Cut::Stream => "upstream_timeout: timeouts.stream is over",
        Cut::Idle => "upstream_timeout: nothing moved for timeouts.idle",
    };
    let mut trailers = HeaderMap::with_capacity(3);
    let status = u16::from(code.grpc().number());
    trailers.insert(headers::GRPC_STATUS, HeaderValue::from(status));
    trailers.insert(headers::GRPC_MESSAGE, HeaderValue::from_static(message));
    let code = HeaderValue::from_static(code.as_str());
    trailers.insert(headers::ERROR, code);
    trailers
}

/// A JSON answer.
pub fn json(status: StatusCode, value: &impl Serialize) -> Response<ResponseBody> {
    // Serializing our own structs to memory cannot fail; an empty body would be visible in tests.
    let text = serde_json::to_vec(value).unwrap_or_default();
    let mut response = Response::new(ResponseBody::full(text));
    *response.status_mut() = status;
    let fields = response.headers_mut();
    fields.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    fields.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

/// A plain text answer.
pub fn text(status: StatusCode, text: impl Into<Bytes>) -> Response<ResponseBody> {
    let mut response = Response::new(ResponseBody::full(text));
    *response.status_mut() = status;
    let plain = HeaderValue::from_static("text/plain; charset=utf-8");
    response.headers_mut().insert(CONTENT_TYPE, plain);
    response
}

/// A fixed answer of the config. A gRPC caller gets the status that stands for it, with the body as
/// its message.
pub fn fixed(fixed: &Respond, grpc: bool) -> Response<ResponseBody> {
    let mut response = Response::new(ResponseBody::full(Bytes::new()));
    if grpc {
        let code = GrpcCode::from_http(fixed.status);
        let message = percent_encode(&String::from_utf8_lossy(&fixed.body));
        grpc_status(response.headers_mut(), code, &message);
        return response;
    }
    *response.body_mut() = ResponseBody::full(fixed.body.clone());
    *response.status_mut() = fixed.status;
    if !fixed.body.is_empty() {
        let fields = response.headers_mut();
        fields.insert(CONTENT_TYPE, fixed.content_type.clone());
    }
    response
}

fn grpc_status(fields: &mut HeaderMap, code: GrpcCode, message: &str) {
    fields.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    let code = HeaderValue::from(u16::from(code.number()));
    fields.insert(headers::GRPC_STATUS, code);
    if let Ok(value) = HeaderValue::from_str(message) {
        fields.insert(headers::GRPC_MESSAGE, value);
    }
}

/// The gRPC answer to a call that was accepted as a message: one empty message, status OK, and
/// `metadata` in the head.
pub fn grpc_accepted(metadata: HeaderMap) -> Response<ResponseBody> {
    // An uncompressed message of length zero: google.protobuf.Empty on the wire.
    const EMPTY_MESSAGE: Bytes = Bytes::from_static(&[0, 0, 0, 0, 0]);
    let mut trailers = HeaderMap::with_capacity(1);
    trailers.insert(headers::GRPC_STATUS, HeaderValue::from_static("0"));
    let mut response = Response::new(ResponseBody::grpc(EMPTY_MESSAGE, trailers));
    *response.headers_mut() = metadata;
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    response
}

/// `Retry-After` in whole seconds, rounded up so that nobody comes back early; at least 1.
pub fn seconds(after: Duration) -> HeaderValue {
    let whole = after.as_secs() + u64::from(after.subsec_nanos() > 0);
    HeaderValue::from(whole.max(1))
}

/// `grpc-message` encoding of the gRPC HTTP/2 protocol: visible ASCII except `%` stays.
fn percent_encode(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if (0x20..=0x7e).contains(&byte) && byte != b'%' {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use http_body::Body as _;
    use outrigger_core::error_code::ErrorCode;

    use super::*;

    const ABOUT: About<'_> = About {
        hop: "web-1/outbound",
        route: Some("shop/orders/create"),
        attempts: 2,
        grpc: false,
    };

    #[tokio::test]
    async fn an_error_carries_its_code_in_header_and_problem() {
        let failed = ProxyError::local(ErrorCode::CircuitOpen, "the breaker of orders is open")
            .retry_after(Duration::from_millis(1200));
        let response = error(&failed, ABOUT);
        assert_eq!(response.status(), 503);
        assert_eq!(response.headers()["outrigger-error"], "circuit_open");
        assert_eq!(response.headers()["retry-after"], "2");
        assert_eq!(
            response.headers()["content-type"],
            "application/problem+json"
        );
        let body = response.into_body().collect(4096).await.unwrap();
        let problem: serde_json::Value = serde_json::from_slice(&body.data).unwrap();
        assert_eq!(problem["code"], "circuit_open");
        assert_eq!(problem["status"], 503);
        assert_eq!(problem["hop"], "web-1/outbound");
        assert_eq!(problem["route"], "shop/orders/create");
        assert_eq!(problem["attempts"], 2);
    }

    #[test]
    fn a_grpc_caller_gets_a_trailers_only_status() {
        let failed = ProxyError::upstream(ErrorCode::UpstreamTimeout, "100 % late\n");
        let response = error(
            &failed,
            About {
                grpc: true,
                ..ABOUT
            },
        );
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["grpc-status"], "4");
        assert_eq!(
            response.headers()["grpc-message"],
            "upstream_timeout: 100 %25 late%0A"
        );
        assert!(response.body().is_end_stream());
    }

    #[test]
    fn an_accepted_grpc_call_is_one_empty_message() {
        let response = grpc_accepted(HeaderMap::new());
        assert!(!response.body().is_end_stream());
        assert_eq!(response.headers()["content-type"], "application/grpc");
    }
}
