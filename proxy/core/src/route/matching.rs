//! What a rule asks of a request, and whether a request has it.
//!
//! Owns the match types. Their order among each other is [`super::precedence`]'s.

use http::{HeaderMap, HeaderName, Method};
use regex::Regex;

use super::reason::Missed;
use super::{RequestView, header_value, query_value};

/// One match: every part that is set must hold. The default matches everything.
#[derive(Clone, Debug, Default)]
pub struct Match {
    /// The method.
    pub method: Option<Method>,
    /// The path.
    pub path: Option<PathMatch>,
    /// Header fields.
    pub headers: Vec<HeaderMatch>,
    /// Query parameters.
    pub query: Vec<QueryMatch>,
    /// A gRPC service and method; implies POST.
    pub grpc: Option<GrpcMatch>,
}

/// A match of the path (without query, as sent, case-sensitive).
#[derive(Clone, Debug)]
pub enum PathMatch {
    /// The same path.
    Exact(String),
    /// The same first elements: `/v1` takes `/v1` and `/v1/a`, not `/v10`; a trailing slash of the
    /// prefix does not matter.
    Prefix(String),
    /// The whole path matches.
    Regex(Pattern),
}

/// A match of a value.
#[derive(Clone, Debug)]
pub enum ValueMatch {
    /// The same bytes.
    Exact(String),
    /// The whole value matches; never one that is not UTF-8.
    Regex(Pattern),
}

/// A match of a header. Several fields of the name are one value, joined with a comma.
#[derive(Clone, Debug)]
pub struct HeaderMatch {
    /// The field name.
    pub name: HeaderName,
    /// What its value must be.
    pub value: ValueMatch,
}

/// A match of a query parameter: its first occurrence, percent-decoded.
#[derive(Clone, Debug)]
pub struct QueryMatch {
    /// The parameter's name, case-sensitive.
    pub name: String,
    /// What its value must be.
    pub value: ValueMatch,
}

/// A match of a gRPC call: the path `/service/method`. What is not set is not asked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GrpcMatch {
    /// The full service name, such as `shop.Inventory`.
    pub service: Option<String>,
    /// The method's name.
    pub method: Option<String>,
}

/// A regular expression that must match the whole text. Matching takes linear time.
#[derive(Clone, Debug)]
pub struct Pattern {
    source: String,
    anchored: Regex,
}

impl Pattern {
    /// Compiles an expression.
    ///
    /// # Errors
    /// When it is no expression, or compiles to more than the regex crate's size limit.
    pub fn new(source: &str) -> Result<Pattern, regex::Error> {
        // On its own first: `a)(?:b` is an error, not a way out of the group.
        Regex::new(source)?;
        // The line break ends a comment of an expression in `(?x)` mode, and counts only there.
        let anchored = Regex::new(&format!(r"\A(?:{source})\z"))
            .or_else(|_| Regex::new(&format!("\\A(?:{source}\n)\\z")))?;
        Ok(Pattern {
            source: source.to_owned(),
            anchored,
        })
    }

    /// Whether the whole text matches.
    pub fn is_match(&self, text: &str) -> bool {
        self.anchored.is_match(text)
    }

    /// The expression as it was written.
    pub fn as_str(&self) -> &str {
        &self.source
    }
}

impl PathMatch {
    /// A regular expression for the whole path.
    ///
    /// # Errors
    /// When it does not compile.
    pub fn regex(source: &str) -> Result<PathMatch, regex::Error> {
        Pattern::new(source).map(PathMatch::Regex)
    }

    /// Whether the path matches.
    pub fn matches(&self, path: &str) -> bool {
        match self {
            PathMatch::Exact(exact) => path == exact,
            PathMatch::Prefix(prefix) => {
                let prefix = prefix.trim_end_matches('/');
                let Some(rest) = path.strip_prefix(prefix) else {
                    return false;
                };
                prefix.is_empty() || rest.is_empty() || rest.starts_with('/')
            }
            PathMatch::Regex(pattern) => pattern.is_match(path),
        }
    }
}

impl ValueMatch {
    /// A regular expression for the whole value.
    ///
    /// # Errors
    /// When it does not compile.
    pub fn regex(source: &str) -> Result<ValueMatch, regex::Error> {
        Pattern::new(source).map(ValueMatch::Regex)
    }

    /// Whether the value matches.
    pub fn matches(&self, value: &[u8]) -> bool {
        match self {
            ValueMatch::Exact(exact) => exact.as_bytes() == value,
            ValueMatch::Regex(pattern) => {
                std::str::from_utf8(value).is_ok_and(|text| pattern.is_match(text))
            }
        }
    }
}

impl HeaderMatch {
    /// Whether the field is there with such a value.
    pub fn matches(&self, fields: &HeaderMap) -> bool {
        header_value(fields, &self.name).is_some_and(|value| self.value.matches(&value))
    }
}

impl GrpcMatch {
    fn matches(&self, path: &str) -> bool {
        let Some((service, method)) = path.strip_prefix('/').and_then(|p| p.split_once('/')) else {
            return false;
        };
        self.service.as_ref().is_none_or(|wanted| wanted == service)
            && self.method.as_ref().is_none_or(|wanted| wanted == method)
            && !service.is_empty()
            && !method.is_empty()
            && !method.contains('/')
    }
}

impl Match {
    /// Whether the request has all that is asked.
    pub fn matches(&self, request: &RequestView<'_>) -> bool {
        self.check(request).is_ok()
    }

    /// Whether the request has all that is asked; else the first part that it has not.
    pub(super) fn check(&self, request: &RequestView<'_>) -> Result<(), Missed> {
        if let Some(path) = &self.path
            && !path.matches(request.path)
        {
            return Err(Missed::Path);
        }
        if let Some(method) = &self.method
            && method != request.method
        {
            return Err(Missed::Method);
        }
        if let Some(grpc) = &self.grpc {
            if *request.method != Method::POST {
                return Err(Missed::Method);
            }
            if !grpc.matches(request.path) {
                return Err(Missed::Grpc);
            }
        }
        for (index, header) in self.headers.iter().enumerate() {
            if !header.matches(request.headers) {
                return Err(Missed::Header(index));
            }
        }
        for (index, parameter) in self.query.iter().enumerate() {
            let value = query_value(request.query, &parameter.name);
            if !value.is_some_and(|value| parameter.value.matches(&value)) {
                return Err(Missed::Query(index));
            }
        }
        Ok(())
    }
}
