//! One GET to a registry: a connection, a request, an answer read to its end.
//!
//! A registry is asked a few times a minute, and a question may wait there for minutes: a pool
//! would keep nothing warm.

use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::client::conn::http1;
use hyper::header::{ACCEPT, HOST, HeaderMap, HeaderName, HeaderValue, USER_AGENT};
use hyper::{Request, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::time::timeout;

/// Connecting to a registry; it is near, or it is away.
const CONNECT_WITHIN: Duration = Duration::from_secs(5);

/// The longest answer that is read: some hundred thousand instances.
const MAX_BYTES: usize = 64 << 20;

/// `http://host:port/base`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Base {
    host: String,
    port: u16,
    authority: String,
    path: String,
}

/// What came back, whatever its status.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

impl Base {
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let uri: Uri = text
            .parse()
            .map_err(|e| format!("{text:?} is not a URL: {e}"))?;
        let authority = uri
            .authority()
            .filter(|_| uri.scheme_str() == Some("http"))
            .ok_or_else(|| format!("{text:?}: only http:// is supported"))?;
        if authority.as_str().contains('@') {
            return Err("a URL with a user name is not supported".to_owned());
        }
        let host = authority.host();
        Ok(Self {
            host: host.trim_matches(['[', ']']).to_owned(),
            port: authority.port_u16().unwrap_or(80),
            authority: authority.to_string(),
            path: uri.path().trim_end_matches('/').to_owned(),
        })
    }
}

/// Asks for `path` (with its query) below `base`. The whole takes no longer than `within`.
///
/// # Errors
/// For people: no connection, a broken answer, one that is too long, or none in time.
pub(crate) async fn get(
    base: &Base,
    path: &str,
    headers: &[(HeaderName, HeaderValue)],
    within: Duration,
) -> Result<Reply, String> {
    let at = &base.authority;
    match timeout(within, exchange(base, path, headers)).await {
        Ok(result) => result.map_err(|problem| format!("{at}: {problem}")),
        Err(_) => Err(format!("{at}: no answer within {within:?}")),
    }
}

async fn exchange(
    base: &Base,
    path: &str,
    headers: &[(HeaderName, HeaderValue)],
) -> Result<Reply, String> {
    let connect = TcpStream::connect((base.host.as_str(), base.port));
    let tcp = timeout(CONNECT_WITHIN, connect)
        .await
        .map_err(|_| "it takes no connection".to_owned())?
        .map_err(|e| e.to_string())?;
    let handshake = http1::handshake::<_, Empty<Bytes>>(TokioIo::new(tcp));
    let (mut sender, connection) = handshake.await.map_err(|e| e.to_string())?;
    let mut request = Request::get(format!("{}{path}", base.path))
        .header(HOST, &base.authority)
        .header(ACCEPT, "application/json")
        .header(USER_AGENT, concat!("outrigger/", env!("CARGO_PKG_VERSION")))
        .body(Empty::new())
        .map_err(|e| e.to_string())?;
    for (name, value) in headers {
        request.headers_mut().insert(name, value.clone());
    }
    let answer = async {
        let response = sender.send_request(request).await;
        let (parts, body) = response.map_err(|e| e.to_string())?.into_parts();
        let body = Limited::new(body, MAX_BYTES).collect().await;
        let body = body.map_err(|e| format!("the answer broke off: {e}"))?;
        Ok(Reply {
            status: parts.status,
            headers: parts.headers,
            body: body.to_bytes(),
        })
    };
    // Side by side in one task: the connection ends with the question.
    let answer = std::pin::pin!(answer);
    match futures_util::future::select(answer, std::pin::pin!(connection)).await {
        futures_util::future::Either::Left((answer, _)) => answer,
        // The connection is over; what it has read is still to be taken.
        futures_util::future::Either::Right((ended, answer)) => match ended {
            Ok(()) => answer.await,
            Err(e) => Err(e.to_string()),
        },
    }
}

/// Percent-encodes a path segment or the value of a query (RFC 3986 §2.3).
pub(crate) fn encode(text: &str) -> String {
    use std::fmt::Write as _;
    text.bytes().fold(String::new(), |mut out, byte| {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                out.push(char::from(byte));
            }
            _ => {
                let _ = write!(out, "%{byte:02X}");
            }
        }
        out
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_taken_apart() {
        let base = Base::parse("http://127.0.0.1:8761/eureka/").expect("good");
        assert_eq!((base.host.as_str(), base.port), ("127.0.0.1", 8761));
        assert_eq!(base.path, "/eureka");
        let base = Base::parse("http://[::1]").expect("good");
        assert_eq!((base.host.as_str(), base.port), ("::1", 80));
        assert_eq!(base.path, "");
        for bad in ["https://a", "a", "", "http://", "http://user:word@a/"] {
            assert!(Base::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn names_cannot_change_the_path() {
        assert_eq!(encode("a b/../c?d=é"), "a%20b%2F..%2Fc%3Fd%3D%C3%A9");
    }
}
