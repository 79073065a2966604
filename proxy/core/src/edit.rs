//! What a rule changes in a request or an answer on its way: header fields, host and path, and
//! where a redirect leads.
//!
//! Owns the rules of Gateway API for them; which rule is in force is the snapshot's. On the
//! request's life.

use http::{HeaderMap, HeaderName, HeaderValue};

/// Edits of header fields; in the order remove, set, add.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HeaderEdits {
    /// Fields that go.
    pub remove: Vec<HeaderName>,
    /// Fields that stand alone afterwards.
    pub set: Vec<(HeaderName, HeaderValue)>,
    /// Fields that stand beside what is there.
    pub add: Vec<(HeaderName, HeaderValue)>,
}

impl HeaderEdits {
    /// Makes the edits.
    pub fn apply(&self, fields: &mut HeaderMap) {
        for name in &self.remove {
            fields.remove(name);
        }
        for (name, value) in &self.set {
            fields.insert(name, value.clone());
        }
        for (name, value) in &self.add {
            fields.append(name, value.clone());
        }
    }
}

/// A change of the path; the query stays.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PathEdit {
    /// The whole path becomes this.
    Full(String),
    /// The prefix that the rule matched becomes another.
    Prefix {
        /// The prefix, as the rule has it.
        matched: String,
        /// What stands in its place; may be empty.
        replacement: String,
    },
}

impl PathEdit {
    /// The new path. A trailing slash of either prefix does not matter, and the path never loses
    /// its first slash (Gateway API, `replacePrefixMatch`).
    pub fn apply(&self, path: &str) -> String {
        if !path.starts_with('/') {
            // `OPTIONS *` names no path.
            return path.to_owned();
        }
        let (matched, replacement) = match self {
            Self::Full(path) => return path.clone(),
            Self::Prefix {
                matched,
                replacement,
            } => (
                matched.trim_end_matches('/'),
                replacement.trim_end_matches('/'),
            ),
        };
        // A path that the rule did not match by its prefix stays as it is.
        let Some(rest) = path.strip_prefix(matched) else {
            return path.to_owned();
        };
        let whole = format!("{replacement}{rest}");
        if whole.is_empty() {
            return "/".to_owned();
        }
        whole
    }

    /// The new path with the query of the old.
    pub fn apply_to_target(&self, path: &str, query: Option<&str>) -> String {
        let mut target = self.apply(path);
        if let Some(query) = query {
            target.push('?');
            target.push_str(query);
        }
        target
    }
}

/// Where a redirect leads; what is not set is the request's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Redirect {
    /// `http` or `https`.
    pub scheme: Option<String>,
    /// The host, without a port.
    pub host: Option<String>,
    /// The port.
    pub port: Option<u16>,
    /// The path.
    pub path: Option<PathEdit>,
}

/// What of a request a redirect may keep.
#[derive(Clone, Copy, Debug)]
pub struct Redirected<'a> {
    /// The scheme by which it came.
    pub scheme: &'a str,
    /// The host it asked for, without a port.
    pub host: &'a str,
    /// The port it asked for, if it named one.
    pub port: Option<u16>,
    /// Its path.
    pub path: &'a str,
    /// Its query.
    pub query: Option<&'a str>,
}

impl Redirect {
    /// The value of `Location`.
    ///
    /// The port is the redirect's own, else that of its scheme where it names one, else the
    /// request's; the well-known port of the scheme is left out (Gateway API, `RequestRedirect`).
    pub fn location(&self, request: &Redirected<'_>) -> String {
        let scheme = self.scheme.as_deref().unwrap_or(request.scheme);
        let host = self.host.as_deref().unwrap_or(request.host);
        let asked = request.port.filter(|_| self.scheme.is_none());
        let port = self.port.or(asked);
        let port = port.filter(|port| well_known(scheme) != Some(*port));
        let target = match &self.path {
            Some(edit) => edit.apply_to_target(request.path, request.query),
            None => match request.query {
                Some(query) => format!("{}?{query}", request.path),
                None => request.path.to_owned(),
            },
        };
        match port {
            Some(port) => format!("{scheme}://{host}:{port}{target}"),
            None => format!("{scheme}://{host}{target}"),
        }
    }
}

fn well_known(scheme: &str) -> Option<u16> {
    match scheme {
        "http" => Some(80),
        "https" => Some(443),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_are_replaced_as_gateway_api_has_it() {
        for (path, matched, replacement, expected) in [
            ("/foo/bar", "/foo", "/xyz", "/xyz/bar"),
            ("/foo/bar", "/foo", "/xyz/", "/xyz/bar"),
            ("/foo/bar", "/foo/", "/xyz", "/xyz/bar"),
            ("/foo/bar", "/foo/", "/xyz/", "/xyz/bar"),
            ("/foo", "/foo", "/xyz", "/xyz"),
            ("/foo/", "/foo", "/xyz", "/xyz/"),
            ("/foo/bar", "/foo", "", "/bar"),
            ("/foo/", "/foo", "", "/"),
            ("/foo", "/foo", "", "/"),
            ("/foo/", "/foo", "/", "/"),
            ("/foo", "/foo", "/", "/"),
            ("/a", "/", "/v2", "/v2/a"),
            ("/", "/", "/v2", "/v2/"),
            ("*", "/", "/v2", "*"),
        ] {
            let edit = PathEdit::Prefix {
                matched: matched.to_owned(),
                replacement: replacement.to_owned(),
            };
            assert_eq!(
                edit.apply(path),
                expected,
                "{path} {matched} {replacement:?}"
            );
        }
        let full = PathEdit::Full("/new".to_owned());
        assert_eq!(full.apply_to_target("/a/b", Some("q=1")), "/new?q=1");
    }

    #[test]
    fn a_redirect_keeps_what_it_does_not_say() {
        let check = |redirect: Redirect, port: Option<u16>, expected: &str| {
            let request = Redirected {
                scheme: "http",
                host: "orders",
                port,
                path: "/a",
                query: Some("q=1"),
            };
            assert_eq!(redirect.location(&request), expected);
        };
        let of = |scheme: Option<&str>, host: Option<&str>, port| Redirect {
            scheme: scheme.map(str::to_owned),
            host: host.map(str::to_owned),
            port,
            path: None,
        };
        check(of(None, None, None), None, "http://orders/a?q=1");
        check(of(None, None, None), Some(8080), "http://orders:8080/a?q=1");
        check(of(None, None, None), Some(80), "http://orders/a?q=1");
        // Naming the scheme means its own port.
        check(
            of(Some("https"), None, None),
            Some(8080),
            "https://orders/a?q=1",
        );
        check(
            of(Some("https"), None, Some(8443)),
            None,
            "https://orders:8443/a?q=1",
        );
        check(
            of(Some("https"), Some("shop.example"), Some(443)),
            None,
            "https://shop.example/a?q=1",
        );
        check(
            of(None, Some("shop.example"), None),
            Some(8080),
            "http://shop.example:8080/a?q=1",
        );
    }

    #[test]
    fn headers_go_then_are_set_then_added() {
        let mut fields = HeaderMap::new();
        for (name, value) in [("x-a", "1"), ("x-b", "1"), ("x-b", "2"), ("x-c", "1")] {
            fields.append(name, HeaderValue::from_static(value));
        }
        let field = |name: &'static str, value: &'static str| {
            (
                HeaderName::from_static(name),
                HeaderValue::from_static(value),
            )
        };
        HeaderEdits {
            remove: vec![HeaderName::from_static("x-a")],
            set: vec![field("x-b", "3")],
            add: vec![field("x-c", "2"), field("x-a", "new")],
        }
        .apply(&mut fields);
        let all = |name: &str| -> Vec<_> { fields.get_all(name).iter().collect() };
        assert_eq!(all("x-a"), ["new"]);
        assert_eq!(all("x-b"), ["3"]);
        assert_eq!(all("x-c"), ["1", "2"]);
    }
}
