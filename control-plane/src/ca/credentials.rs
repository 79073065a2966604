//! Who asks: by a certificate of ours, by a join token, or by a token that another system reviews.
//!
//! Owns the form of a file of join tokens, and which service accounts a credential is good for.
//! Tokens are kept as their hashes only, here and, as `outrigger ca token` writes them, on disk.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use outrigger_core::spiffe::SpiffeId;
use sha2::{Digest as _, Sha256};

use super::Refused;
use super::issuer::hex;

/// What a token must be meant for (Kubernetes' `audiences`).
pub const AUDIENCE: &str = "outrigger-ca";

/// The username of a service account in Kubernetes.
const ACCOUNT_USER: &str = "system:serviceaccount:";

/// The group of all of them.
const ACCOUNT_GROUP: &str = "system:serviceaccounts";

/// The shortest join token: what is shorter can be guessed.
const SHORTEST_TOKEN: usize = 16;

/// `namespace/name`, with `*` for any.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pattern {
    namespace: String,
    name: String,
}

impl Pattern {
    /// Reads one.
    pub fn parse(text: &str) -> Option<Self> {
        let (namespace, name) = text.split_once('/')?;
        let part = |part: &str| !part.is_empty() && !part.contains(['/', ' ']);
        (part(namespace) && part(name)).then(|| Self {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
        })
    }

    fn matches(&self, namespace: &str, name: &str) -> bool {
        let part = |pattern: &str, part: &str| pattern == "*" || pattern == part;
        part(&self.namespace, namespace) && part(&self.name, name)
    }

    fn is_in(&self, namespace: &str) -> bool {
        self.namespace == "*" || self.namespace == namespace
    }

    /// The one account that it is good for, if it is one.
    fn single(&self) -> Option<(&str, &str)> {
        let one = self.namespace != "*" && self.name != "*";
        one.then_some((&self.namespace, &self.name))
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// Somebody who is known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    who: Who,
    /// Where it connects from, for the audit.
    pub peer: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Who {
    /// Nobody said who it is.
    Anybody,
    /// The bearer of a certificate of ours.
    Svid(SpiffeId),
    /// The bearer of a token for these accounts.
    Token {
        /// The beginning of the token's hash.
        hint: String,
        accounts: Vec<Pattern>,
    },
}

impl Caller {
    /// Who showed no credential.
    pub fn anybody(peer: String) -> Self {
        Self {
            who: Who::Anybody,
            peer,
        }
    }

    /// Who showed a certificate of ours.
    pub fn svid(id: SpiffeId, peer: String) -> Self {
        Self {
            who: Who::Svid(id),
            peer,
        }
    }

    /// Whether it showed a credential.
    pub fn is_known(&self) -> bool {
        self.who != Who::Anybody
    }

    /// For the audit: how it is known, never the credential itself.
    pub fn credential(&self) -> String {
        match &self.who {
            Who::Anybody => "none".to_owned(),
            Who::Svid(id) => format!("certificate of {id}"),
            Who::Token { hint, .. } => format!("token {hint}"),
        }
    }

    /// Whom a certificate is signed for: `wanted` (`namespace/name` or a SPIFFE ID) if the
    /// credential is good for it; without `wanted` the one account that it is good for.
    ///
    /// # Errors
    /// No credential, one for others, or one for several and nothing wanted.
    pub fn identity(&self, wanted: Option<&str>, trust_domain: &str) -> Result<SpiffeId, Refused> {
        let of_account = |namespace: &str, name: &str| {
            // A slash in a name would be another path.
            let id = SpiffeId::of_account(trust_domain, namespace, name)
                .filter(|id| id.account() == Some((namespace, name)));
            id.ok_or_else(|| Refused::Request(format!("{namespace}/{name} is no service account")))
        };
        let wanted = match wanted {
            None => None,
            Some(text) if text.contains("://") => {
                let no_id = || Refused::Request(format!("{text:.200} is no SPIFFE ID"));
                let id = SpiffeId::parse(text).ok_or_else(no_id)?;
                if id.trust_domain() != trust_domain {
                    let other = format!("{id} is not of the trust domain {trust_domain}");
                    return Err(Refused::Denied(other));
                }
                Some(id)
            }
            Some(text) => {
                let Some((namespace, name)) = text.split_once('/') else {
                    let none = format!("{text:.200} is no namespace/serviceAccount");
                    return Err(Refused::Request(none));
                };
                Some(of_account(namespace, name)?)
            }
        };
        match (&self.who, wanted) {
            (Who::Anybody, _) => Err(Refused::Unauthenticated(
                "no credential: come with a join token, or with a certificate of ours that has \
                 not expired"
                    .to_owned(),
            )),
            (Who::Svid(id), None) => Ok(id.clone()),
            (Who::Svid(id), Some(wanted)) if *id == wanted => Ok(wanted),
            (Who::Svid(id), Some(wanted)) => {
                Err(Refused::Denied(format!("{id} may not become {wanted}")))
            }
            (Who::Token { accounts, .. }, None) => match &accounts[..] {
                [one] if one.single().is_some() => {
                    let (namespace, name) = one.single().unwrap_or_default();
                    of_account(namespace, name)
                }
                _ => Err(Refused::Request(
                    "the token is good for several service accounts: say which".to_owned(),
                )),
            },
            (Who::Token { accounts, .. }, Some(wanted)) => {
                let good = wanted.account().is_some_and(|(namespace, name)| {
                    accounts
                        .iter()
                        .any(|pattern| pattern.matches(namespace, name))
                });
                match good {
                    true => Ok(wanted),
                    false => Err(Refused::Denied(format!("the token is not for {wanted}"))),
                }
            }
        }
    }

    /// Whether it may present itself as a workload of this account.
    ///
    /// # Errors
    /// Why not; for the peer.
    pub fn may_be(&self, namespace: &str, name: &str) -> Result<(), String> {
        let good = match &self.who {
            Who::Anybody => true,
            Who::Svid(id) => id.account() == Some((namespace, name)),
            Who::Token { accounts, .. } => accounts
                .iter()
                .any(|pattern| pattern.matches(namespace, name)),
        };
        match good {
            true => Ok(()),
            false => Err(format!(
                "the node says {namespace}/{name}, its credential is another's: {}",
                self.credential()
            )),
        }
    }

    /// Whether it may be some service account of `namespace`.
    pub fn may_be_in(&self, namespace: &str) -> bool {
        match &self.who {
            Who::Anybody => true,
            Who::Svid(id) => id.account().is_some_and(|(own, _)| own == namespace),
            Who::Token { accounts, .. } => accounts.iter().any(|pattern| pattern.is_in(namespace)),
        }
    }
}

/// Join tokens, by their hashes.
#[derive(Debug, Default)]
pub struct JoinTokens(Vec<Join>);

#[derive(Debug)]
struct Join {
    hash: [u8; 32],
    accounts: Vec<Pattern>,
    /// Seconds since 1970.
    expires: Option<u64>,
}

impl JoinTokens {
    /// Reads a file: a line is `sha256:<hash>`, perhaps `expires=<seconds since 1970>` and
    /// `for=<namespace>/<name>`, or it is a token itself. `accounts` are what the file's tokens are
    /// good for at most.
    ///
    /// # Errors
    /// Which line is wrong, and how; never what is in it.
    pub fn add(&mut self, text: &str, accounts: &[Pattern]) -> Result<(), String> {
        for (n, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let wrong = |what: &str| format!("line {}: {what}", n + 1);
            let mut words = line.split_whitespace();
            let first = words.next().unwrap_or_default();
            let hash = match first.strip_prefix("sha256:") {
                Some(digits) => unhex(digits).ok_or_else(|| wrong("not a SHA-256"))?,
                None if first.len() < SHORTEST_TOKEN => {
                    return Err(wrong("a token of less than 16 characters can be guessed"));
                }
                None => Sha256::digest(first).into(),
            };
            let mut join = Join {
                hash,
                accounts: accounts.to_vec(),
                expires: None,
            };
            for word in words {
                match word.split_once('=') {
                    Some(("expires", at)) => {
                        let at = at.parse().map_err(|_| wrong("expires is no number"))?;
                        join.expires = Some(at);
                    }
                    Some(("for", account)) => {
                        let own = Pattern::parse(account);
                        let own = own.ok_or_else(|| wrong("for is no namespace/name"))?;
                        let within = |outer: &Pattern| outer.matches(&own.namespace, &own.name);
                        if !accounts.iter().any(within) {
                            return Err(wrong("for is none of the file's service accounts"));
                        }
                        join.accounts = vec![own];
                    }
                    _ => return Err(wrong("expected expires= or for= behind the token")),
                }
            }
            self.0.push(join);
        }
        Ok(())
    }

    /// Who comes with `token`; none when nobody does.
    ///
    /// # Errors
    /// It has expired.
    pub fn bearer(&self, token: &str, peer: &str, now: u64) -> Result<Option<Caller>, Refused> {
        let hash: [u8; 32] = Sha256::digest(token).into();
        // Hashes of guesses tell nothing of the tokens, however long the comparison takes.
        let Some(join) = self.0.iter().find(|join| join.hash == hash) else {
            return Ok(None);
        };
        if join.expires.is_some_and(|expires| expires <= now) {
            return Err(Refused::Unauthenticated(
                "the join token has expired".to_owned(),
            ));
        }
        Ok(Some(token_of(&hash, join.accounts.clone(), peer)))
    }
}

fn token_of(hash: &[u8], accounts: Vec<Pattern>, peer: &str) -> Caller {
    Caller {
        who: Who::Token {
            hint: format!("sha256:{}…", hex(&hash[..4])),
            accounts,
        },
        peer: peer.to_owned(),
    }
}

fn unhex(digits: &str) -> Option<[u8; 32]> {
    let mut bytes = [0; 32];
    if digits.len() != 64 || !digits.is_ascii() {
        return None;
    }
    for (n, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(digits.get(2 * n..2 * n + 2)?, 16).ok()?;
    }
    Some(bytes)
}

/// What a TokenReview says of a token (`authentication.k8s.io/v1`, `status`).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Review {
    /// Whether it is good.
    pub authenticated: bool,
    /// Whose it is.
    pub username: String,
    /// The groups that they are in.
    pub groups: Vec<String>,
    /// Which of the audiences that were asked for it is meant for.
    pub audiences: Vec<String>,
    /// Why it is not good.
    pub error: String,
}

impl Review {
    /// The service account that it is for.
    ///
    /// # Errors
    /// Not authenticated, meant for others, or no service account's.
    pub fn caller(self, token: &str, peer: &str) -> Result<Caller, Refused> {
        let refused = |why: &str| Err(Refused::Unauthenticated(why.to_owned()));
        if !self.authenticated {
            return refused(&format!("the token is not good: {:.200}", self.error));
        }
        // An API server that knows no audiences lists none, and has not looked.
        if !self.audiences.iter().any(|audience| audience == AUDIENCE) {
            return refused("the token is not meant for this authority");
        }
        let account = self.username.strip_prefix(ACCOUNT_USER);
        let account = account.and_then(|account| account.split_once(':'));
        // A star would be a pattern, not a name.
        let account = account.filter(|(namespace, name)| !namespace.contains('*') && *name != "*");
        let grouped = self.groups.iter().any(|group| group == ACCOUNT_GROUP);
        let Some((namespace, name)) = account.filter(|_| grouped) else {
            return refused("the token is no service account's");
        };
        let Some(pattern) = Pattern::parse(&format!("{namespace}/{name}")) else {
            return refused("the token is no service account's");
        };
        Ok(token_of(&Sha256::digest(token), vec![pattern], peer))
    }
}

/// Asks another system whose a token is, as Kubernetes' TokenReview does. A good answer must not
/// be remembered: it may have been taken back since.
pub trait TokenReview: fmt::Debug + Send + Sync {
    /// Reviews `token`, which must be meant for `audience`.
    ///
    /// # Errors
    /// The system cannot be asked; why.
    fn review<'a>(
        &'a self,
        token: &'a str,
        audience: &'a str,
    ) -> Pin<Box<dyn Future<Output = Result<Review, String>> + Send + 'a>>;
}

/// Everything by which somebody can be known.
#[derive(Debug, Default)]
pub struct Credentials {
    /// Join tokens.
    pub tokens: JoinTokens,
    /// Who knows the others.
    pub reviewer: Option<Arc<dyn TokenReview>>,
}

impl Credentials {
    /// Who comes with `token`.
    ///
    /// # Errors
    /// Nobody knows it, it has expired, or who might know it cannot be asked.
    ///
    /// # Cancel safety
    /// Cancel-safe.
    pub async fn bearer(&self, token: &str, peer: &str, now: u64) -> Result<Caller, Refused> {
        if let Some(caller) = self.tokens.bearer(token, peer, now)? {
            return Ok(caller);
        }
        let Some(reviewer) = &self.reviewer else {
            return Err(Refused::Unauthenticated("the token is unknown".to_owned()));
        };
        match reviewer.review(token, AUDIENCE).await {
            Ok(review) => review.caller(token, peer),
            Err(problem) => Err(Refused::Unable(format!(
                "the token cannot be reviewed: {problem}"
            ))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn patterns(texts: &[&str]) -> Vec<Pattern> {
        let pattern = |text: &&str| Pattern::parse(text).expect("a pattern");
        texts.iter().map(pattern).collect()
    }

    fn tokens(text: &str, accounts: &[&str]) -> Result<JoinTokens, String> {
        let mut tokens = JoinTokens::default();
        tokens.add(text, &patterns(accounts)).map(|()| tokens)
    }

    const TOKEN: &str = "correct-horse-battery";

    fn hashed() -> String {
        format!("sha256:{}", hex(&Sha256::digest(TOKEN)))
    }

    #[test]
    fn a_token_is_good_for_its_accounts_and_until_it_expires() {
        let check = |line: &str, accounts: &[&str], wanted, expected: Result<&str, &str>| {
            let tokens = tokens(line, accounts).expect("read");
            let found = tokens.bearer(TOKEN, "peer", 50).and_then(|caller| {
                caller
                    .ok_or(Refused::Unauthenticated("unknown".to_owned()))?
                    .identity(wanted, "td")
            });
            match (found, expected) {
                (Ok(id), Ok(expected)) => assert_eq!(id.path(), expected),
                (Err(refused), Err(expected)) => {
                    assert!(refused.to_string().contains(expected), "{refused}");
                }
                (found, expected) => panic!("{line}: {found:?} instead of {expected:?}"),
            }
        };
        let line = hashed();
        let web = Ok("/ns/shop/sa/web");
        check(&line, &["shop/web"], None, web);
        check(TOKEN, &["shop/web"], None, web);
        check(&line, &["shop/*"], Some("shop/web"), web);
        check(&line, &["*/*"], Some("spiffe://td/ns/shop/sa/web"), web);
        check(&line, &["shop/*"], None, Err("several"));
        check(&line, &["shop/*"], Some("bank/web"), Err("not for"));
        check(
            &line,
            &["shop/*"],
            Some("shop/a/sa/b"),
            Err("no service account"),
        );
        check(
            &line,
            &["*/*"],
            Some("spiffe://other/ns/a/sa/b"),
            Err("trust domain"),
        );
        check(
            &line,
            &["*/*"],
            Some("spiffe://td/somebody"),
            Err("not for"),
        );
        check(&line, &["*/*"], Some("web"), Err("no namespace/"));
        check(&format!("{line} for=shop/web"), &["shop/*"], None, web);
        check(
            &format!("{line} for=shop/web"),
            &["shop/*"],
            Some("shop/db"),
            Err("not for"),
        );
        check(
            &format!("# for web\n\n{line} expires=51"),
            &["shop/web"],
            None,
            web,
        );
        check(
            &format!("{line} expires=50"),
            &["shop/web"],
            None,
            Err("expired"),
        );
        check(
            "another-long-enough-token",
            &["shop/web"],
            None,
            Err("unknown"),
        );
    }

    #[test]
    fn a_wrong_line_is_named_and_not_shown() {
        let check = |line: &str, expected: &str| {
            let text = format!("# tokens\n{line}");
            let refused = tokens(&text, &["shop/*"]).expect_err(expected);
            assert!(
                refused.starts_with("line 2: ") && refused.contains(expected),
                "{refused}"
            );
        };
        check("short", "guessed");
        check("sha256:12", "SHA-256");
        check(&format!("{} expires=soon", hashed()), "no number");
        check(&format!("{} for=bank/web", hashed()), "none of the file's");
        check(&format!("{} what", hashed()), "expected");
    }

    #[test]
    fn a_certificate_is_renewed_for_the_same_and_nobody_gets_one() {
        let id = SpiffeId::of_account("td", "shop", "web").expect("an ID");
        let web = Caller::svid(id.clone(), String::new());
        assert_eq!(web.identity(None, "td"), Ok(id.clone()));
        assert_eq!(web.identity(Some("shop/web"), "td"), Ok(id));
        let denied = web.identity(Some("shop/db"), "td").expect_err("denied");
        assert_eq!(denied.reason(), "denied");
        assert!(web.may_be("shop", "web").is_ok() && web.may_be("shop", "db").is_err());
        let nobody = Caller::anybody(String::new());
        let refused = nobody
            .identity(Some("shop/web"), "td")
            .expect_err("refused");
        assert_eq!(refused.reason(), "unauthenticated");
    }

    #[test]
    fn a_review_counts_when_it_is_meant_for_us_and_a_service_accounts() {
        let good = Review {
            authenticated: true,
            username: "system:serviceaccount:shop:web".to_owned(),
            groups: vec![ACCOUNT_GROUP.to_owned()],
            audiences: vec![AUDIENCE.to_owned()],
            error: String::new(),
        };
        let check = |change: fn(&mut Review), expected: Result<&str, &str>| {
            let mut review = good.clone();
            change(&mut review);
            let found = review
                .caller("token", "peer")
                .and_then(|caller| caller.identity(None, "td"));
            match (found, expected) {
                (Ok(id), Ok(expected)) => assert_eq!(id.path(), expected),
                (Err(refused), Err(expected)) => {
                    assert!(refused.to_string().contains(expected), "{refused}");
                }
                (found, expected) => panic!("{found:?} instead of {expected:?}"),
            }
        };
        check(|_| {}, Ok("/ns/shop/sa/web"));
        check(|review| review.authenticated = false, Err("not good"));
        check(|review| review.audiences.clear(), Err("not meant"));
        check(|review| review.groups.clear(), Err("no service account"));
        check(
            |review| review.username = "system:serviceaccount:shop".to_owned(),
            Err("no service account"),
        );
        check(
            |review| review.username = "kubernetes-admin".to_owned(),
            Err("no service account"),
        );
        check(
            |review| review.username = "system:serviceaccount:*:*".to_owned(),
            Err("no service account"),
        );
    }
}
