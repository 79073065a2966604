//! Asking a sidecar's admin API or the control plane over HTTP/1.1.
//!
//! Owns the addresses with their defaults, and errors that say where was asked and what to do.

use std::time::Duration;

use bytes::Bytes;
use clap::Args;
use http::{HeaderMap, Method, Request, StatusCode, Uri};
use http_body_util::{BodyExt as _, Full};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::output::Failure;

/// Where a sidecar's admin API is, unless said otherwise.
pub(crate) const ADMIN: &str = "http://127.0.0.1:15020";
/// Where the control plane is, unless said otherwise.
pub(crate) const CONTROL_PLANE: &str = "http://127.0.0.1:15011";

/// The variable with the token to come to the control plane with (its `api.tokens`).
const TOKEN: &str = "OUTRIGGER_TOKEN";

/// Longer than a change takes; long-polls of the demo included.
const PATIENCE: Duration = Duration::from_secs(30);
/// Longer than a read takes.
const READ_PATIENCE: Duration = Duration::from_secs(5);

/// Which sidecar to ask.
#[derive(Debug, Clone, Args)]
pub(crate) struct Admin {
    /// The sidecar's admin API
    #[arg(long, value_name = "URL", env = "OUTRIGGER_ADMIN", default_value = ADMIN)]
    pub(crate) admin: String,
}

impl Admin {
    /// A client of it.
    pub(crate) fn client(&self) -> Result<Client, Failure> {
        Client::admin(&self.admin)
    }
}

/// One server.
#[derive(Debug, Clone)]
pub(crate) struct Client {
    authority: String,
    what: &'static str,
    advice: &'static str,
    takes_token: bool,
}

/// A whole response.
#[derive(Debug, Clone)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

impl Answer {
    /// A header as text; empty when it is not there.
    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers
            .get(name)
            .and_then(|value| value.to_str().ok())
            .unwrap_or_default()
    }

    /// The body as text.
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The body as JSON; null when it is none.
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or(Value::Null)
    }
}

impl Client {
    /// A sidecar's admin API.
    pub(crate) fn admin(address: &str) -> Result<Self, Failure> {
        let advice = "is outrigger-proxy running there? Say where with --admin or OUTRIGGER_ADMIN";
        Self::new(address, "the sidecar's admin API", advice)
    }

    /// The control plane.
    pub(crate) fn control_plane(address: &str) -> Result<Self, Failure> {
        let advice = "is outrigger-control-plane running there? \
                      Say where with --control-plane or OUTRIGGER_CONTROL_PLANE";
        let mut client = Self::new(address, "the control plane", advice)?;
        client.takes_token = true;
        Ok(client)
    }

    fn new(address: &str, what: &'static str, advice: &'static str) -> Result<Self, Failure> {
        let authority = authority(address)
            .map_err(|problem| Failure::unusable(format!("{what}: {address}: {problem}")))?;
        Ok(Self {
            authority,
            what,
            advice,
            takes_token: false,
        })
    }

    /// The JSON at a path.
    pub(crate) async fn get(&self, path: &str) -> Result<Value, Failure> {
        self.json(Method::GET, path, None).await
    }

    /// What a write is answered with.
    pub(crate) async fn post(&self, path: &str, body: &Value) -> Result<Value, Failure> {
        self.json(Method::POST, path, Some(body)).await
    }

    /// The answer, whatever its status.
    pub(crate) async fn ask(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> Result<Answer, Failure> {
        let json = body.map(|body| ("content-type", "application/json", body.to_string()));
        let token = std::env::var(TOKEN).ok().filter(|_| self.takes_token);
        let token = token.map(|token| format!("Bearer {}", token.trim()));
        let mut headers: Vec<(&str, &str)> = json
            .iter()
            .map(|(name, value, _)| (*name, *value))
            .collect();
        if let Some(token) = &token {
            headers.push(("authorization", token));
        }
        let text = json
            .as_ref()
            .map(|(_, _, text)| text.clone())
            .unwrap_or_default();
        let patience = match method {
            Method::GET => READ_PATIENCE,
            _ => PATIENCE,
        };
        send_within(
            patience,
            &self.authority,
            method,
            path,
            &headers,
            text.into(),
        )
        .await
        .map_err(|problem| {
            let Self {
                authority,
                what,
                advice,
                ..
            } = self;
            Failure::unusable(format!(
                "cannot ask {what} at http://{authority}: {problem}; {advice}"
            ))
        })
    }

    async fn json(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> Result<Value, Failure> {
        let answer = self.ask(method, path, body).await?;
        let value = answer.json();
        if !answer.status.is_success() {
            let detail = value["detail"]
                .as_str()
                .map_or_else(|| answer.text(), str::to_owned);
            let shown = path.split('?').next().unwrap_or(path);
            return Err(Failure::errors(format!(
                "{} at http://{} answered {} to {shown}: {}",
                self.what,
                self.authority,
                answer.status.as_u16(),
                detail.trim()
            )));
        }
        if value.is_null() {
            let Self {
                authority,
                what,
                advice,
                ..
            } = self;
            let message =
                format!("{what} at http://{authority}: the answer to {path} is not JSON; {advice}");
            return Err(Failure::unusable(message));
        }
        Ok(value)
    }
}

/// `http://host:port`, or `host:port`, without a path.
fn authority(address: &str) -> Result<String, String> {
    let bare = address.strip_prefix("http://").unwrap_or(address);
    if bare.contains("://") {
        return Err("expected http://host:port".to_owned());
    }
    let authority = bare.trim_end_matches('/');
    let parsed: http::uri::Authority = authority
        .parse()
        .map_err(|error| format!("{error}; expected http://host:port"))?;
    if parsed.as_str().contains('@') {
        return Err("expected http://host:port".to_owned());
    }
    Ok(match parsed.port() {
        Some(_) => parsed.to_string(),
        None => format!("{parsed}:80"),
    })
}

/// One request on a connection of its own. `Host` is the authority unless `headers` say it.
///
/// # Errors
/// What went wrong, as a fragment: a connection, HTTP, or 30 s without an answer.
pub(crate) async fn send(
    authority: &str,
    method: Method,
    path: &str,
    headers: &[(&str, &str)],
    body: Bytes,
) -> Result<Answer, String> {
    send_within(PATIENCE, authority, method, path, headers, body).await
}

/// [`send`] with its own limit instead of 30 s.
async fn send_within(
    patience: Duration,
    authority: &str,
    method: Method,
    path: &str,
    headers: &[(&str, &str)],
    body: Bytes,
) -> Result<Answer, String> {
    let exchange = async {
        let stream = TcpStream::connect(authority)
            .await
            .map_err(|error| error.to_string())?;
        let _ = stream.set_nodelay(true);
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| error.to_string())?;
        let request = request(authority, method, path, headers, body)?;
        let answered = async {
            let response = sender
                .send_request(request)
                .await
                .map_err(|error| told(&error))?;
            let (head, body) = response.into_parts();
            let body = body
                .collect()
                .await
                .map_err(|error| told(&error))?
                .to_bytes();
            Ok(Answer {
                status: head.status,
                headers: head.headers,
                body,
            })
        };
        let mut connection = std::pin::pin!(connection);
        let mut answered = std::pin::pin!(answered);
        tokio::select! {
            answer = &mut answered => answer,
            // Its end is told to the exchange, too.
            _ = &mut connection => answered.await,
        }
    };
    timeout(patience, exchange)
        .await
        .map_err(|_| format!("no answer within {}s", patience.as_secs()))?
}

fn told(error: &hyper::Error) -> String {
    match std::error::Error::source(error) {
        Some(cause) => format!("{error}: {cause}"),
        None => error.to_string(),
    }
}

fn request(
    authority: &str,
    method: Method,
    path: &str,
    headers: &[(&str, &str)],
    body: Bytes,
) -> Result<Request<Full<Bytes>>, String> {
    let path: Uri = path.parse().map_err(|error| format!("{path}: {error}"))?;
    let mut builder = Request::builder().method(method).uri(path);
    if !headers
        .iter()
        .any(|(name, _)| name.eq_ignore_ascii_case("host"))
    {
        builder = builder.header("host", authority);
    }
    for (name, value) in headers {
        builder = builder.header(*name, *value);
    }
    builder
        .body(Full::new(body))
        .map_err(|error| error.to_string())
}

/// Percent-encodes a value of a query, or a segment of a path.
pub(crate) fn encode(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_with_and_without_scheme() {
        let check = |text, expected: Option<&str>| {
            assert_eq!(authority(text).ok().as_deref(), expected, "{text}");
        };
        check("http://127.0.0.1:15020", Some("127.0.0.1:15020"));
        check("127.0.0.1:15020/", Some("127.0.0.1:15020"));
        check("http://sidecar", Some("sidecar:80"));
        check("http://[::1]:1", Some("[::1]:1"));
        check("https://a:1", None);
        check("http://a:1/b", None);
        check("http://user@a:1", None);
        check("", None);
    }

    #[test]
    fn values_are_percent_encoded() {
        assert_eq!(encode("shop/orders é"), "shop%2Forders%20%C3%A9");
    }

    #[tokio::test]
    async fn an_unreachable_sidecar_is_named_with_what_to_do() {
        let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = taken.local_addr().unwrap();
        drop(taken);
        let client = Client::admin(&format!("http://{address}")).unwrap();
        let failure = client.get("/queues").await.unwrap_err();
        assert!(
            failure.message.contains(&address.to_string()),
            "{}",
            failure.message
        );
        assert!(failure.message.contains("--admin"), "{}", failure.message);
    }
}
