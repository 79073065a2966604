//! A service to put behind a sidecar: tells what it was sent, and fails on demand.
//!
//! `GET /status/503` is answered 503, `/sleep/250` after 250 ms; anything else is answered 200 with
//! the request line, the headers and the body.

use std::convert::Infallible;
use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use clap::Parser;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;

/// The largest body that is echoed.
const MAX_BODY: usize = 4 << 20;
/// The longest `/sleep/`, in milliseconds.
const MAX_SLEEP: u64 = 60_000;

/// An HTTP/1.1 service that tells what it was sent
#[derive(Debug, Parser)]
struct Options {
    /// Where to listen
    #[arg(long, default_value = "127.0.0.1:9001")]
    listen: SocketAddr,
    /// How to call itself in answers
    #[arg(long, default_value = "echo")]
    name: String,
    /// Answer everything with this status, whatever the path asks for
    #[arg(long, value_name = "STATUS")]
    always: Option<StatusCode>,
}

fn main() -> io::Result<()> {
    let options = Options::parse();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(serve(options))
}

async fn serve(options: Options) -> io::Result<()> {
    let listener = TcpListener::bind(options.listen).await?;
    println!(
        "{} listens on http://{}",
        options.name,
        listener.local_addr()?
    );
    loop {
        let (stream, _) = listener.accept().await?;
        let (name, always) = (options.name.clone(), options.always);
        let service = service_fn(move |request| {
            let name = name.clone();
            async move { Ok::<_, Infallible>(answer(&name, always, request).await) }
        });
        tokio::spawn(async move {
            // A client that goes away is no news.
            let _ = http1::Builder::new()
                .timer(TokioTimer::new())
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
    }
}

async fn answer(
    name: &str,
    always: Option<StatusCode>,
    request: Request<Incoming>,
) -> Response<Full<Bytes>> {
    let (head, body) = request.into_parts();
    let Ok(body) = Limited::new(body, MAX_BODY).collect().await else {
        return plain(
            StatusCode::PAYLOAD_TOO_LARGE,
            "the body is too large or broke off\n",
        );
    };
    let body = body.to_bytes();
    let (status, pause) = wish(head.uri.path());
    tokio::time::sleep(pause).await;
    let mut text = format!("{name} got\n{} {}\n", head.method, head.uri);
    for (field, value) in &head.headers {
        let _ = writeln!(
            text,
            "{field}: {}",
            String::from_utf8_lossy(value.as_bytes())
        );
    }
    if !body.is_empty() {
        let _ = write!(text, "\n{}\n", String::from_utf8_lossy(&body));
    }
    // A reader of our output that goes away does not end the service.
    let _ = writeln!(std::io::stdout(), "{text}");
    plain(always.unwrap_or(status), text)
}

/// What the path asks for: a status, and a pause before it.
fn wish(path: &str) -> (StatusCode, Duration) {
    let number = |prefix: &str| path.strip_prefix(prefix)?.parse::<u64>().ok();
    let status = number("/status/")
        .and_then(|status| StatusCode::from_u16(u16::try_from(status).ok()?).ok())
        .filter(|status| !status.is_informational());
    let pause = number("/sleep/").unwrap_or(0).min(MAX_SLEEP);
    (
        status.unwrap_or(StatusCode::OK),
        Duration::from_millis(pause),
    )
}

fn plain(status: StatusCode, text: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(text.into()));
    *response.status_mut() = status;
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_ask_for_a_status_or_a_pause() {
        let check = |path, status: u16, millis| {
            let (wished, pause) = wish(path);
            assert_eq!(
                (wished.as_u16(), pause.as_millis()),
                (status, millis),
                "{path}"
            );
        };
        check("/", 200, 0);
        check("/status/503", 503, 0);
        check("/status/101", 200, 0);
        check("/status/9999", 200, 0);
        check("/sleep/250", 200, 250);
        check("/sleep/99999999", 200, 60_000);
    }
}
