//! What a listener makes of a request's head before anything is decided by it.
//!
//! Owns which hosts, paths and header names are refused because two readers could understand them
//! differently, and the one form of those that pass. Messages were screened when they were
//! accepted. Stands on the life of a request.

use std::borrow::Cow;

use http::header::HOST;
use http::uri::PathAndQuery;
use http::{HeaderValue, Method, Uri, Version};
use outrigger_core::error_code::ErrorCode;
use outrigger_core::headers::{Field, screen_underscores};
use outrigger_core::host::parse_authority;
use outrigger_core::path;

use super::Call;
use crate::error::ProxyError;
use crate::telemetry::limits::WireLimit;

impl Call {
    /// Reads the host, brings the path into the form that is matched, authorized and forwarded,
    /// and applies the rule for underscores.
    ///
    /// # Errors
    /// `bad_request`; nobody has seen the request then.
    pub fn screen(&mut self) -> Result<(), ProxyError> {
        self.screen_size()?;
        self.screen_host()?;
        self.screen_path()?;
        let rule = self.worker.shared.wire.underscores;
        screen_underscores(&mut self.parts.headers, rule).map_err(|error| bad(&error.to_string()))
    }

    /// `wire.maxHeaders` for HTTP/2, whose library counts bytes only; our HTTP/1 codec does both.
    /// Each piece of a split cookie counts.
    fn screen_size(&self) -> Result<(), ProxyError> {
        let shared = &self.worker.shared;
        if self.parts.headers.len() <= shared.wire.max_headers {
            return Ok(());
        }
        shared.refusals.count(WireLimit::Headers);
        let detail = format!("more than {} header fields", shared.wire.max_headers);
        Err(ProxyError::downstream(ErrorCode::HeadersTooLarge, detail))
    }

    /// RFC 9112 §3.2 and RFC 9113 §8.3.1: one host, well-formed, and in HTTP/2 the same in
    /// `:authority` and `Host`. HTTP/1.0 needs none.
    fn screen_host(&mut self) -> Result<(), ProxyError> {
        let mut host = None;
        if self.present.has(Field::Host) {
            let mut hosts = self.parts.headers.get_all(HOST).iter();
            host = hosts.next();
            if hosts.next().is_some() {
                return Err(bad("the request has several Host fields"));
            }
        }
        let asked = self.parts.uri.authority();
        if let (Version::HTTP_2, Some(asked), Some(host)) = (self.parts.version, asked, host)
            && !same_host(asked.as_str(), host)
        {
            return Err(bad(":authority and Host name different hosts"));
        }
        let Some(authority) = self.find_authority()? else {
            return match self.parts.version {
                Version::HTTP_09 | Version::HTTP_10 => Ok(()),
                _ => Err(bad("the request has no Host")),
            };
        };
        if parse_authority(authority.as_str()).is_none() {
            return Err(bad("the host is malformed"));
        }
        self.authority = Some(authority);
        Ok(())
    }

    fn screen_path(&mut self) -> Result<(), ProxyError> {
        // RFC 9112 §3.2, for which HTTP/2 is not looked at before.
        let target = self.parts.uri.path_and_query();
        if target.is_some_and(|target| !target.as_str().is_ascii()) {
            return Err(bad("the path is not ASCII"));
        }
        let path = self.parts.uri.path();
        let whole_server = path == "*" && self.parts.method == Method::OPTIONS;
        let no_path = path.is_empty() && self.parts.method == Method::CONNECT;
        if !path.starts_with('/') && !whole_server && !no_path {
            return Err(bad("the path does not begin with a slash"));
        }
        let how = self.worker.shared.wire.path_normalization;
        let normal = path::normalize(self.parts.uri.path(), how);
        let Cow::Owned(mut target) = normal.map_err(|error| bad(&error.to_string()))? else {
            return Ok(());
        };
        if let Some(query) = self.parts.uri.query() {
            target.push('?');
            target.push_str(query);
        }
        let malformed = |_| bad("the path is malformed");
        let target = PathAndQuery::try_from(target).map_err(malformed)?;
        let mut uri = std::mem::take(&mut self.parts.uri).into_parts();
        uri.path_and_query = Some(target);
        self.parts.uri = Uri::from_parts(uri).map_err(|_| bad("the path is malformed"))?;
        Ok(())
    }
}

fn same_host(asked: &str, host: &HeaderValue) -> bool {
    let Ok(host) = host.to_str() else {
        return false;
    };
    let read = parse_authority(host);
    host.eq_ignore_ascii_case(asked) || (read.is_some() && read == parse_authority(asked))
}

fn bad(detail: &str) -> ProxyError {
    ProxyError::downstream(ErrorCode::BadRequest, detail)
}
