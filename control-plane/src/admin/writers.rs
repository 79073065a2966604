//! Who may change something: whoever is on this machine, or comes with a token.
//!
//! Owns the judgement and whose name a change goes by in the history. The files of tokens are read
//! with every change that brings one, so that a token that was taken out of its file is good for
//! nothing more.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use hyper::header::{AUTHORIZATION, HOST, HeaderMap, ORIGIN};
use outrigger_config::bootstrap::ApiSpec;
use tokio::task::spawn_blocking;
use tracing::warn;

use super::problem::Problem;
use crate::ca::credentials::JoinTokens;
use crate::clock;

/// Who may change something.
#[derive(Debug, Default)]
pub struct Writers {
    tokens: Vec<(String, PathBuf)>,
    required: bool,
}

impl Writers {
    /// As `api` says; without it whoever is on this machine.
    pub fn new(spec: Option<&ApiSpec>) -> Self {
        let spec = spec.cloned().unwrap_or_default();
        let tokens = spec.tokens.into_iter();
        Self {
            tokens: tokens.map(|token| (token.name, token.file)).collect(),
            required: spec.require_token,
        }
    }

    /// Who makes this change, by the name that the history shows.
    ///
    /// # Errors
    /// 401 and 403; 503 where a file of tokens cannot be read, and none of the others has the token.
    pub async fn judge(&self, peer: SocketAddr, headers: &HeaderMap) -> Result<String, Problem> {
        if let Some(credentials) = headers.get(AUTHORIZATION) {
            let bearer = credentials.to_str().ok().and_then(|text| {
                let (scheme, token) = text.split_once(' ')?;
                scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
            });
            let bearer = bearer.ok_or_else(|| Problem::unauthenticated("expected a Bearer token"));
            return self.bearer(bearer?, peer).await;
        }
        if self.required {
            return Err(Problem::unauthenticated(
                "changes need a token of one of api.tokens",
            ));
        }
        from_here(peer, headers)?;
        Ok(peer.ip().to_canonical().to_string())
    }

    /// Whose token it is.
    async fn bearer(&self, token: &str, peer: SocketAddr) -> Result<String, Problem> {
        let mut problem = Problem::unauthenticated("the token is none of api.tokens");
        for (name, file) in &self.tokens {
            let path = file.clone();
            // Off the threads that serve streams: a disk may take its time.
            let read = spawn_blocking(move || std::fs::read_to_string(path)).await;
            let read = read.unwrap_or_else(|_| Err(io::ErrorKind::Other.into()));
            let tokens = read
                .map_err(|error| error.to_string())
                .and_then(|text: String| {
                    let mut tokens = JoinTokens::default();
                    tokens.add(&text, &[]).map(|()| tokens)
                });
            let tokens = match tokens {
                Ok(tokens) => tokens,
                Err(error) => {
                    warn!(file = %file.display(), error, "a file of tokens cannot be read");
                    let detail = format!("the tokens of {name} cannot be read");
                    problem = Problem::unavailable("tokens_unreadable", detail);
                    continue;
                }
            };
            let now = clock::wall_millis() / 1000;
            match tokens.bearer(token, &peer.to_string(), now) {
                Ok(Some(_)) => return Ok(name.clone()),
                Ok(None) => {}
                Err(_) => return Err(Problem::unauthenticated("the token has expired")),
            }
        }
        Err(problem)
    }
}

/// Without a token only this machine may change anything; and not a web page that happens to be
/// open in a browser on it, by its own origin or by a name that points here.
fn from_here(peer: SocketAddr, headers: &HeaderMap) -> Result<(), Problem> {
    if !peer.ip().to_canonical().is_loopback() {
        return Err(Problem::unauthorized(
            "without a token changes are accepted from this machine only",
        ));
    }
    let text = |name| headers.get(name).and_then(|v| v.to_str().ok());
    let host = text(HOST).unwrap_or_default();
    if !is_own_name(host) {
        return Err(Problem::unauthorized(
            "address the control plane by IP address or localhost",
        ));
    }
    match text(ORIGIN) {
        Some(origin) if origin.strip_prefix("http://") != Some(host) => Err(Problem::unauthorized(
            "changes are not accepted from web pages of other origins",
        )),
        _ => Ok(()),
    }
}

fn is_own_name(host: &str) -> bool {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name,
        _ => host,
    };
    let bare = name
        .strip_prefix('[')
        .and_then(|n| n.strip_suffix(']'))
        .unwrap_or(name);
    name.eq_ignore_ascii_case("localhost") || bare.parse::<IpAddr>().is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_this_machine_and_no_foreign_page_may_write() {
        let check = |peer: &str, host: &'static str, origin: Option<&'static str>, ok: bool| {
            let mut headers = HeaderMap::new();
            headers.insert(HOST, host.parse().expect("a value"));
            if let Some(origin) = origin {
                headers.insert(ORIGIN, origin.parse().expect("a value"));
            }
            let peer = SocketAddr::new(peer.parse().expect("an address"), 1);
            assert_eq!(
                from_here(peer, &headers).is_ok(),
                ok,
                "{peer} {host} {origin:?}"
            );
        };
        check("127.0.0.1", "127.0.0.1:15011", None, true);
        check("::1", "[::1]:15011", None, true);
        check("::ffff:127.0.0.1", "localhost", None, true);
        check("127.0.0.1", "localhost:1", Some("http://localhost:1"), true);
        check("10.0.0.1", "127.0.0.1:15011", None, false);
        check("127.0.0.1", "rebound.example:15011", None, false);
        check(
            "127.0.0.1",
            "localhost:1",
            Some("http://evil.example"),
            false,
        );
        check("127.0.0.1", "localhost:1", Some("null"), false);
    }

    #[tokio::test]
    async fn a_token_is_good_from_anywhere() {
        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join("tokens");
        std::fs::write(&file, "a-token-that-is-long\n").expect("written");
        let writers = Writers {
            tokens: vec![("ops".to_owned(), file)],
            required: false,
        };
        let away = SocketAddr::from(([10, 0, 0, 1], 1));
        let mut headers = HeaderMap::new();
        headers.insert(HOST, "control-plane.example".parse().expect("a value"));
        let refused = writers.judge(away, &headers).await;
        assert!(refused.is_err(), "{refused:?}");
        let bearer = "Bearer a-token-that-is-long".parse().expect("a value");
        headers.insert(AUTHORIZATION, bearer);
        assert_eq!(writers.judge(away, &headers).await, Ok("ops".to_owned()));
    }
}
