//! SPIFFE IDs: who a workload is.
//!
//! Owns what such a name may look like (SPIFFE-ID §2) and its parts. Believes nothing: that a
//! peer has the name is the verifier's to say. On the request's life.

use std::fmt;

/// The longest ID (SPIFFE-ID §2.3).
const LONGEST: usize = 2048;
/// The longest trust domain (SPIFFE-ID §2.1).
const LONGEST_DOMAIN: usize = 255;
const SCHEME: &str = "spiffe://";

/// The name of a workload: `spiffe://<trust domain>/<path>`, with a path.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SpiffeId {
    text: Box<str>,
    /// Where the path begins.
    path: usize,
}

impl SpiffeId {
    /// Reads an ID. Scheme and trust domain compare without case, so they are kept in lower case.
    ///
    /// `None` for anything else: a query, a fragment, a port, a user, an escape, an empty or dot
    /// segment, and for the ID of a trust domain itself, which is no workload's.
    pub fn parse(text: &str) -> Option<Self> {
        if text.len() > LONGEST || !text.get(..SCHEME.len())?.eq_ignore_ascii_case(SCHEME) {
            return None;
        }
        let (domain, segments) = text[SCHEME.len()..].split_once('/')?;
        let domain = domain.to_ascii_lowercase();
        let good = |segment: &str| {
            let safe = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
            !segment.is_empty() && segment.bytes().all(safe) && segment != "." && segment != ".."
        };
        if !is_trust_domain(&domain) || !segments.split('/').all(good) {
            return None;
        }
        Some(Self {
            path: SCHEME.len() + domain.len(),
            text: format!("{SCHEME}{domain}/{segments}").into(),
        })
    }

    /// The ID of a service account, as Istio and Kubernetes' tools name it.
    pub fn of_account(trust_domain: &str, namespace: &str, account: &str) -> Option<Self> {
        Self::parse(&format!(
            "{SCHEME}{trust_domain}/ns/{namespace}/sa/{account}"
        ))
    }

    /// All of it.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Who vouches for it.
    pub fn trust_domain(&self) -> &str {
        &self.text[SCHEME.len()..self.path]
    }

    /// From the slash on.
    pub fn path(&self) -> &str {
        &self.text[self.path..]
    }

    /// Namespace and service account, where the path is `/ns/<namespace>/sa/<account>`.
    pub fn account(&self) -> Option<(&str, &str)> {
        let (namespace, account) = self.path().strip_prefix("/ns/")?.split_once("/sa/")?;
        let one = |part: &str| !part.contains('/');
        (one(namespace) && one(account)).then_some((namespace, account))
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

fn is_trust_domain(domain: &str) -> bool {
    let safe = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'-' | b'_');
    (1..=LONGEST_DOMAIN).contains(&domain.len()) && domain.bytes().all(safe)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_an_id_and_its_parts() {
        let id = SpiffeId::parse("SPIFFE://Shop.Local/ns/shop/sa/Web").unwrap();
        assert_eq!(id.as_str(), "spiffe://shop.local/ns/shop/sa/Web");
        assert_eq!(id.trust_domain(), "shop.local");
        assert_eq!(id.path(), "/ns/shop/sa/Web");
        assert_eq!(id.account(), Some(("shop", "Web")));
        assert_eq!(SpiffeId::of_account("shop.local", "shop", "Web"), Some(id));
        let other = SpiffeId::parse("spiffe://a/billing/payments").unwrap();
        assert_eq!(other.account(), None);
        let deeper = SpiffeId::parse("spiffe://a/ns/b/sa/c/d").unwrap();
        assert_eq!(deeper.account(), None);
    }

    #[test]
    fn what_is_none() {
        for text in [
            "",
            "spiffe://",
            "spiffe://a",
            "spiffe://a/",
            "spiffe:///b",
            "spiffe://a/b/",
            "spiffe://a//b",
            "spiffe://a/./b",
            "spiffe://a/../b",
            "spiffe://a/b?c",
            "spiffe://a/b#c",
            "spiffe://a:1/b",
            "spiffe://u@a/b",
            "spiffe://a/%62",
            "spiffe://a/é",
            "https://a/b",
            "spiffe:/a/b",
            &format!("spiffe://a/{}", "b".repeat(2048)),
            &format!("spiffe://{}/b", "a".repeat(256)),
        ] {
            assert_eq!(SpiffeId::parse(text), None, "{text}");
        }
    }
}
