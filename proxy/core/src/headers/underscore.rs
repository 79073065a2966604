//! Header names with an underscore.
//!
//! CGI and its heirs (WSGI, PHP, Rack) turn `x-real-ip` and `x_real-ip` into the same variable. A
//! proxy that replaces or removes the one and passes the other lets a caller forge what the proxy
//! vouches for. Owns what is done about it; `wire.underscores` says which.

use http::{HeaderMap, HeaderName};

/// What is done with header names that contain an underscore.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Underscores {
    /// They pass.
    #[default]
    Keep,
    /// They are left out.
    Drop,
    /// The request is refused.
    Refuse,
}

/// A header name with an underscore where none may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HasUnderscore;

impl std::fmt::Display for HasUnderscore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a header name contains an underscore")
    }
}

impl std::error::Error for HasUnderscore {}

/// Applies the rule to the fields of a request.
///
/// # Errors
/// [`HasUnderscore`] with [`Underscores::Refuse`].
pub fn screen_underscores(headers: &mut HeaderMap, rule: Underscores) -> Result<(), HasUnderscore> {
    let has = |name: &&HeaderName| name.as_str().contains('_');
    match rule {
        Underscores::Keep => Ok(()),
        Underscores::Refuse if headers.keys().any(|name| has(&name)) => Err(HasUnderscore),
        Underscores::Refuse => Ok(()),
        Underscores::Drop => {
            super::hop::remove_where(headers, |name| has(&name));
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    #[test]
    fn an_underscore_passes_goes_or_is_refused() {
        let check = |rule, expected: Result<usize, HasUnderscore>| {
            let mut headers = HeaderMap::new();
            for name in ["x-real-ip", "x_real-ip", "x_real_ip"] {
                headers.append(HeaderName::from_static(name), HeaderValue::from_static("1"));
            }
            let screened = screen_underscores(&mut headers, rule);
            assert_eq!(screened.map(|()| headers.len()), expected, "{rule:?}");
        };
        check(Underscores::Keep, Ok(3));
        check(Underscores::Drop, Ok(1));
        check(Underscores::Refuse, Err(HasUnderscore));
        let mut clean = HeaderMap::new();
        clean.append("x-a", HeaderValue::from_static("1"));
        assert_eq!(screen_underscores(&mut clean, Underscores::Refuse), Ok(()));
    }
}
