//! Whether a caller may make a call.
//!
//! Owns the policies of one service, compiled, and the order in which they are asked: Deny first,
//! then Allow, then the mesh's default for services that no Allow policy protects. Who the caller
//! is was proved before; a caller without proof has no name, and conditions on names never hold
//! for it. On the request's and the message's life.

use std::collections::BTreeMap;
use std::net::IpAddr;

use http::Method;

use crate::route::{HeaderMatch, Match, PathMatch, RequestView};
use crate::spiffe::SpiffeId;

/// What policies may look at.
#[derive(Clone, Copy, Debug)]
pub struct Call<'a> {
    /// Who calls, where that is proved.
    pub caller: Option<&'a SpiffeId>,
    /// From where; none when only the callee can know.
    pub address: Option<IpAddr>,
    /// The token that it brings.
    pub token: Token<'a>,
    /// What is asked for; none for opaque bytes.
    pub request: Option<RequestView<'a>>,
}

/// What is known of the token (JWT) of a call.
#[derive(Clone, Copy, Debug, Default)]
pub enum Token<'a> {
    /// It has none.
    #[default]
    None,
    /// It has one that only the callee can read.
    Unread,
    /// It has a good one.
    Good(&'a Claims),
}

/// What a good token says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Claims {
    /// `iss`.
    pub issuer: String,
    /// `sub`; empty without one.
    pub subject: String,
    /// All claims as texts, lists with each of their values.
    pub values: BTreeMap<String, Vec<String>>,
}

/// The policies of one service.
#[derive(Clone, Debug, Default)]
pub struct Policies {
    /// Who must not call.
    pub deny: Vec<Policy>,
    /// Who may call; with any, nobody else may.
    pub allow: Vec<Policy>,
    /// Whose calls are noted.
    pub audit: Vec<Policy>,
    /// What counts for a service without Allow policies.
    pub default: Fallback,
}

/// The mesh's word on services that no Allow policy protects.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fallback {
    /// Everybody may call.
    #[default]
    Allow,
    /// Nobody may call.
    Deny,
    /// Everybody may call, and every call is noted.
    Audit,
}

/// One policy.
#[derive(Clone, Debug)]
pub struct Policy {
    /// `namespace/name`.
    pub name: String,
    /// Any of these; none meets no call.
    pub rules: Vec<Rule>,
}

/// Some callers, and what they call.
#[derive(Clone, Debug, Default)]
pub struct Rule {
    /// Any of these; none is every caller.
    pub from: Vec<CallerMatch>,
    /// Any of these; none is every call.
    pub to: Vec<CallMatch>,
}

/// A condition on the caller: any value of each member that is not empty.
#[derive(Clone, Debug, Default)]
pub struct CallerMatch {
    /// Namespace and service account.
    pub accounts: Vec<(Text, Text)>,
    /// Namespaces.
    pub namespaces: Vec<Text>,
    /// Whole SPIFFE IDs.
    pub principals: Vec<Text>,
    /// Addresses.
    pub blocks: Vec<Block>,
    /// Tokens.
    pub tokens: Vec<TokenMatch>,
}

/// A condition on a token: any value of each member that is not empty, and all claims.
#[derive(Clone, Debug, Default)]
pub struct TokenMatch {
    /// Issuers.
    pub issuers: Vec<Text>,
    /// Subjects.
    pub subjects: Vec<Text>,
    /// Claims, each with any of these values.
    pub claims: Vec<(String, Vec<Text>)>,
}

impl TokenMatch {
    fn meets(&self, claims: &Claims) -> bool {
        any(&self.issuers, |issuer| issuer.matches(&claims.issuer))
            && any(&self.subjects, |subject| subject.matches(&claims.subject))
            && self.claims.iter().all(|(name, wanted)| {
                let values = claims.values.get(name).map_or(&[][..], Vec::as_slice);
                values
                    .iter()
                    .any(|value| any(wanted, |wanted| wanted.matches(value)))
            })
    }
}

/// A condition on the call: any value of each member that is not empty, and all headers.
#[derive(Clone, Debug, Default)]
pub struct CallMatch {
    /// Methods.
    pub methods: Vec<Method>,
    /// Paths.
    pub paths: Vec<PathMatch>,
    /// Header fields.
    pub headers: Vec<HeaderMatch>,
    /// gRPC services and methods.
    pub grpc: Vec<Match>,
}

/// A text, or with `*` at its end whatever begins so.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Text {
    /// The same.
    Exact(String),
    /// The same beginning.
    Prefix(String),
}

impl Text {
    /// As config writes it.
    pub fn new(pattern: &str) -> Self {
        match pattern.strip_suffix('*') {
            Some(prefix) => Self::Prefix(prefix.to_owned()),
            None => Self::Exact(pattern.to_owned()),
        }
    }

    fn matches(&self, text: &str) -> bool {
        match self {
            Self::Exact(exact) => exact == text,
            Self::Prefix(prefix) => text.starts_with(prefix),
        }
    }
}

/// An address range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Block {
    base: IpAddr,
    bits: u8,
}

impl Block {
    /// Reads `10.0.0.0/8`, `fd00::/8` or one address.
    pub fn parse(text: &str) -> Option<Self> {
        let (address, bits) = match text.split_once('/') {
            Some((address, bits)) => (address, Some(bits.parse().ok()?)),
            None => (text, None),
        };
        let base: IpAddr = address.parse().ok()?;
        let longest = if base.is_ipv4() { 32 } else { 128 };
        let bits = bits.unwrap_or(longest);
        (bits <= longest).then_some(Self { base, bits })
    }

    /// Whether `address` is in it; one of IPv4 in the form of IPv6 is one of IPv4.
    pub fn contains(&self, address: IpAddr) -> bool {
        let apart = match (self.base, address.to_canonical()) {
            (IpAddr::V4(base), IpAddr::V4(address)) => {
                u128::from(base.to_bits() ^ address.to_bits()) << 96
            }
            (IpAddr::V6(base), IpAddr::V6(address)) => base.to_bits() ^ address.to_bits(),
            _ => return false,
        };
        apart.leading_zeros() >= u32::from(self.bits)
    }
}

/// What the policies say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict<'a> {
    /// Why it may not be; none when it may.
    pub refused: Option<Refused<'a>>,
    /// Policies that want it noted; the mesh's default is `""`.
    pub audited: Vec<&'a str>,
}

/// Why a call may not be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refused<'a> {
    /// This policy forbids it.
    Denied(&'a str),
    /// None of these policies allows it.
    NotAllowed(Vec<&'a str>),
    /// The mesh allows nothing that no policy allows.
    Default,
}

/// How one policy looks at a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Meets {
    /// It meets the call.
    Yes,
    /// It does if the callee finds an address or a token that it asks for.
    Perhaps,
    /// It is about other callers.
    OtherCallers,
    /// It is about this caller, and other calls.
    OtherCalls,
    /// It has no rules.
    Nothing,
}

/// How a condition is read that cannot be decided here.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Doubt {
    /// As one that holds.
    Holds,
    /// As one that does not.
    Fails,
}

impl Policies {
    /// Whether there is nothing to ask.
    pub fn is_empty(&self) -> bool {
        self.deny.is_empty()
            && self.allow.is_empty()
            && self.audit.is_empty()
            && self.default == Fallback::Allow
    }

    /// What they say of `call`.
    ///
    /// Opaque bytes have no method, path or header: a Deny policy that asks for one meets them, an
    /// Allow policy does not. An address or a token that only the callee can know is no reason to
    /// refuse.
    pub fn decide(&self, call: &Call<'_>) -> Verdict<'_> {
        let mut audited: Vec<&str> = self
            .audit
            .iter()
            .filter(|policy| policy.meets(call, Doubt::Fails, Doubt::Fails))
            .map(|policy| policy.name.as_str())
            .collect();
        let denies = |policy: &&Policy| policy.meets(call, Doubt::Holds, Doubt::Fails);
        let allows = |policy: &Policy| policy.meets(call, Doubt::Fails, Doubt::Holds);
        let refused = if let Some(policy) = self.deny.iter().find(denies) {
            Some(Refused::Denied(&policy.name))
        } else if self.allow.iter().any(allows) {
            None
        } else if !self.allow.is_empty() {
            let names = self.allow.iter().map(|policy| policy.name.as_str());
            Some(Refused::NotAllowed(names.collect()))
        } else {
            if self.default == Fallback::Audit {
                audited.push("");
            }
            (self.default == Fallback::Deny).then_some(Refused::Default)
        };
        Verdict { refused, audited }
    }
}

impl Policy {
    /// How it looks at `call`, for a person.
    pub fn explain(&self, call: &Call<'_>) -> Meets {
        if self.meets(call, Doubt::Fails, Doubt::Fails) {
            return Meets::Yes;
        }
        if self.meets(call, Doubt::Fails, Doubt::Holds) {
            return Meets::Perhaps;
        }
        let of_caller = |rule: &Rule| {
            let mut from = rule.from.iter();
            rule.from.is_empty() || from.any(|from| from.meets(call, Doubt::Holds))
        };
        match self.rules.iter().any(of_caller) {
            _ if self.rules.is_empty() => Meets::Nothing,
            true => Meets::OtherCalls,
            false => Meets::OtherCallers,
        }
    }

    fn meets(&self, call: &Call<'_>, opaque: Doubt, afar: Doubt) -> bool {
        self.rules.iter().any(|rule| {
            let from = rule.from.is_empty() || rule.from.iter().any(|from| from.meets(call, afar));
            let to = rule.to.is_empty() || rule.to.iter().any(|to| to.meets(call, opaque));
            from && to
        })
    }
}

/// Whether any of `listed` holds; an empty list asks for nothing.
fn any<T>(listed: &[T], holds: impl Fn(&T) -> bool) -> bool {
    listed.is_empty() || listed.iter().any(holds)
}

impl CallerMatch {
    fn meets(&self, call: &Call<'_>, afar: Doubt) -> bool {
        let account = call.caller.and_then(SpiffeId::account);
        any(&self.accounts, |(namespace, name)| {
            account.is_some_and(|(ns, sa)| namespace.matches(ns) && name.matches(sa))
        }) && any(&self.namespaces, |namespace| {
            account.is_some_and(|(ns, _)| namespace.matches(ns))
        }) && any(&self.principals, |principal| {
            call.caller
                .is_some_and(|caller| principal.matches(caller.as_str()))
        }) && any(&self.blocks, |block| match call.address {
            Some(address) => block.contains(address),
            None => afar == Doubt::Holds,
        }) && any(&self.tokens, |token| match call.token {
            Token::None => false,
            Token::Unread => afar == Doubt::Holds,
            Token::Good(claims) => token.meets(claims),
        })
    }
}

impl CallMatch {
    fn meets(&self, call: &Call<'_>, opaque: Doubt) -> bool {
        let Some(request) = &call.request else {
            let asks = !(self.methods.is_empty()
                && self.paths.is_empty()
                && self.headers.is_empty()
                && self.grpc.is_empty());
            return !asks || opaque == Doubt::Holds;
        };
        any(&self.methods, |method| method == request.method)
            && any(&self.paths, |path| path.matches(request.path))
            && self
                .headers
                .iter()
                .all(|field| field.matches(request.headers))
            && any(&self.grpc, |grpc| grpc.matches(request))
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderMap;

    use super::*;

    fn policy(name: &str, rule: Rule) -> Policy {
        Policy {
            name: name.to_owned(),
            rules: vec![rule],
        }
    }

    fn from(from: CallerMatch) -> Rule {
        Rule {
            from: vec![from],
            to: Vec::new(),
        }
    }

    fn account(namespace: &str, name: &str) -> Rule {
        from(CallerMatch {
            accounts: vec![(Text::new(namespace), Text::new(name))],
            ..CallerMatch::default()
        })
    }

    fn to(methods: &[&str], path: &str) -> Rule {
        Rule {
            from: Vec::new(),
            to: vec![CallMatch {
                methods: methods.iter().map(|name| name.parse().unwrap()).collect(),
                paths: vec![PathMatch::Prefix(path.to_owned())],
                ..CallMatch::default()
            }],
        }
    }

    /// Whether `caller` may do `GET /v1/orders` from 10.1.2.3.
    fn may(policies: &Policies, caller: Option<&str>) -> bool {
        let caller = caller.map(|id| SpiffeId::parse(id).unwrap());
        let headers = HeaderMap::new();
        let call = Call {
            caller: caller.as_ref(),
            address: Some("10.1.2.3".parse().unwrap()),
            token: Token::None,
            request: Some(RequestView {
                method: &Method::GET,
                host: "orders",
                path: "/v1/orders",
                query: None,
                headers: &headers,
            }),
        };
        policies.decide(&call).refused.is_none()
    }

    const WEB: Option<&str> = Some("spiffe://a/ns/shop/sa/web");
    const MAILER: Option<&str> = Some("spiffe://a/ns/shop/sa/mailer");

    #[test]
    fn an_allow_policy_denies_everybody_else_and_a_deny_policy_comes_first() {
        let mut policies = Policies {
            allow: vec![policy("shop/callers", account("shop", "*"))],
            ..Policies::default()
        };
        assert!(may(&policies, WEB) && may(&policies, MAILER));
        assert!(!may(&policies, Some("spiffe://a/ns/ops/sa/web")));
        assert!(!may(&policies, Some("spiffe://a/billing")));
        assert!(!may(&policies, None));
        policies.deny = vec![policy("shop/not-mailer", account("shop", "mailer"))];
        assert!(may(&policies, WEB) && !may(&policies, MAILER));
        policies.default = Fallback::Deny;
        assert!(
            may(&policies, WEB),
            "the default is for services without Allow policies"
        );
    }

    #[test]
    fn the_default_counts_where_no_allow_policy_does() {
        let mut policies = Policies::default();
        assert!(policies.is_empty() && may(&policies, None));
        policies.default = Fallback::Deny;
        assert!(!may(&policies, WEB));
        policies.default = Fallback::Audit;
        assert!(may(&policies, WEB));
        let call = Call {
            caller: None,
            address: None,
            token: Token::None,
            request: None,
        };
        assert_eq!(policies.decide(&call).audited, [""]);
        policies.deny = vec![policy("a/b", Rule::default())];
        assert!(!may(&policies, WEB));
    }

    #[test]
    fn every_member_that_is_set_must_hold() {
        let block = |text| vec![Block::parse(text).unwrap()];
        let both = |blocks| Policies {
            allow: vec![policy(
                "a/b",
                from(CallerMatch {
                    principals: vec![Text::new("spiffe://a/ns/shop/*")],
                    blocks,
                    ..CallerMatch::default()
                }),
            )],
            ..Policies::default()
        };
        assert!(may(&both(block("10.0.0.0/8")), WEB));
        assert!(!may(&both(block("10.0.0.0/8")), None));
        assert!(!may(&both(block("192.168.0.0/16")), WEB));
        let calls = |rule| Policies {
            allow: vec![policy("a/b", rule)],
            ..Policies::default()
        };
        assert!(may(&calls(to(&["GET", "POST"], "/v1")), None));
        assert!(!may(&calls(to(&["POST"], "/v1")), None));
        assert!(!may(&calls(to(&["GET"], "/v2")), None));
        let no_rules = Policies {
            allow: vec![Policy {
                name: "a/b".to_owned(),
                rules: Vec::new(),
            }],
            ..Policies::default()
        };
        assert!(!may(&no_rules, WEB));
    }

    #[test]
    fn what_cannot_be_known_here_is_read_in_favour_of_safety_and_not_of_refusal() {
        let opaque = Call {
            caller: None,
            address: None,
            token: Token::None,
            request: None,
        };
        let refuses = |policies: &Policies| policies.decide(&opaque).refused.is_some();
        let deny = |rule| Policies {
            deny: vec![policy("a/b", rule)],
            ..Policies::default()
        };
        let allow = |rule| Policies {
            allow: vec![policy("a/b", rule)],
            ..Policies::default()
        };
        assert!(refuses(&deny(to(&["DELETE"], "/"))));
        assert!(refuses(&allow(to(&["GET"], "/"))));
        let block = || {
            from(CallerMatch {
                blocks: vec![Block::parse("10.0.0.0/8").unwrap()],
                ..CallerMatch::default()
            })
        };
        assert!(!refuses(&deny(block())));
        assert!(!refuses(&allow(block())));
    }

    #[test]
    fn blocks() {
        let check = |block, address: &str, expected| {
            let block = Block::parse(block).unwrap();
            assert_eq!(
                block.contains(address.parse().unwrap()),
                expected,
                "{block:?} {address}"
            );
        };
        check("10.0.0.0/8", "10.255.0.1", true);
        check("10.0.0.0/8", "11.0.0.1", false);
        check("10.0.0.0/8", "::ffff:10.0.0.1", true);
        check("10.0.0.0/8", "fd00::1", false);
        check("0.0.0.0/0", "192.0.2.1", true);
        check("0.0.0.0/0", "fd00::1", false);
        check("fd00::/8", "fd12::1", true);
        check("fd00::/8", "fe80::1", false);
        check("192.0.2.1", "192.0.2.1", true);
        check("192.0.2.1", "192.0.2.2", false);
        for bad in ["10.0.0.0/33", "10.0.0/8", "::/129", "a", ""] {
            assert_eq!(Block::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_token_is_asked_for_its_issuer_subject_and_every_claim() {
        let text = |text: &str| Text::new(text);
        let rule = from(CallerMatch {
            tokens: vec![TokenMatch {
                issuers: vec![text("https://issuer")],
                subjects: vec![text("user-*")],
                claims: vec![
                    ("scope".to_owned(), vec![text("read"), text("write")]),
                    ("team".to_owned(), Vec::new()),
                ],
            }],
            ..CallerMatch::default()
        });
        let allow = Policies {
            allow: vec![policy("a/b", rule.clone())],
            ..Policies::default()
        };
        let deny = Policies {
            deny: vec![policy("a/b", rule)],
            ..Policies::default()
        };
        let judged = |token: Token<'_>| {
            let call = Call {
                caller: None,
                address: None,
                token,
                request: None,
            };
            let passes = |policies: &Policies| policies.decide(&call).refused.is_none();
            (passes(&allow), passes(&deny))
        };
        assert_eq!(judged(Token::None), (false, true));
        // Only the callee knows, and it is asked.
        assert_eq!(judged(Token::Unread), (true, true));
        let claims = |issuer: &str, subject: &str, values: &[(&str, &str)]| Claims {
            issuer: issuer.to_owned(),
            subject: subject.to_owned(),
            values: values
                .iter()
                .map(|(name, value)| ((*name).to_owned(), vec![(*value).to_owned()]))
                .collect(),
        };
        let both: &[_] = &[("scope", "write"), ("team", "any")];
        for (found, met) in [
            (claims("https://issuer", "user-1", both), true),
            (claims("https://other", "user-1", both), false),
            (claims("https://issuer", "admin", both), false),
            (claims("https://issuer", "user-1", &both[..1]), false),
            (
                claims("https://issuer", "user-1", &[("scope", "x"), ("team", "t")]),
                false,
            ),
        ] {
            assert_eq!(judged(Token::Good(&found)), (met, !met), "{found:?}");
        }
    }
}
