//! Protocol switches: WebSocket and others, over HTTP/1.1 (RFC 9110 §7.8) and over HTTP/2
//! (extended CONNECT, RFC 8441).
//!
//! Both edges make the same of it: a GET with [`Switch`] beside its head, and an answer of 101
//! whose body is a tunnel. Towards the upstream a switch is always HTTP/1.1, which every server
//! of such a protocol speaks.
//!
//! Stands on the life of a request.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::header::{CONNECTION, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, UPGRADE};
use http::{HeaderMap, HeaderValue, Method, StatusCode, request, response};

/// What a caller asks to switch to: the `Upgrade` field of its request.
#[derive(Debug, Clone)]
pub struct Switch(pub HeaderValue);

impl Switch {
    /// What a head over HTTP/1.1 asks for. `h2c` is none: nothing is gained by it, and it has been
    /// used to get past proxies.
    pub fn of_http1(headers: &HeaderMap) -> Option<Self> {
        let token = headers.get(UPGRADE)?;
        let h2c = |byte: &[u8]| byte.trim_ascii().eq_ignore_ascii_case(b"h2c");
        if token.as_bytes().split(|byte| *byte == b',').any(h2c) {
            return None;
        }
        Some(Self(token.clone()))
    }

    /// Turns an extended CONNECT into the GET that it stands for; none if it is no such request.
    pub fn of_http2(head: &mut request::Parts, key: [u8; 16]) -> Option<Self> {
        let protocol = head.extensions.remove::<h2::ext::Protocol>()?;
        let token = HeaderValue::from_str(protocol.as_str()).ok()?;
        head.method = Method::GET;
        if protocol.as_str() == "websocket" {
            // RFC 8441 §5: over HTTP/2 there is none, over HTTP/1.1 there must be one.
            let key = STANDARD.encode(key);
            if let Ok(key) = HeaderValue::from_str(&key) {
                head.headers.insert(SEC_WEBSOCKET_KEY, key);
            }
        }
        Some(Self(token))
    }

    /// What an upstream has switched to.
    pub fn of_answer(head: &response::Parts) -> Option<Self> {
        if head.status != StatusCode::SWITCHING_PROTOCOLS {
            return None;
        }
        head.headers.get(UPGRADE).cloned().map(Self)
    }

    /// Adds to a request, or keeps of a response, what makes a switch of it.
    pub fn mark(&self, headers: &mut HeaderMap) {
        headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
        headers.insert(UPGRADE, self.0.clone());
    }
}

/// An answer of 101 as an extended CONNECT is answered: 200, without the fields of HTTP/1.1.
pub fn answer_http2(head: &mut response::Parts) {
    head.status = StatusCode::OK;
    for name in [CONNECTION, UPGRADE, SEC_WEBSOCKET_ACCEPT] {
        head.headers.remove(name);
    }
}
