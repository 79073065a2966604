//! Whether a caller may make the call, which policy decides it and why the others do not.
//!
//! The policies are those of the config; a sidecar asks them with what only it knows, so what hangs
//! on a token, or on an address that was not given, is said to.

use std::fmt::Write as _;
use std::net::IpAddr;

use clap::Args;
use outrigger_config::{MeshConfig, NamespacedName};
use outrigger_core::authz::{Call, Meets, Policies, Policy, Refused, Token};
use outrigger_core::route::RequestView;
use outrigger_core::spiffe::SpiffeId;
use outrigger_proxy::snapshot::authorization::policies;
use serde_json::{Value, json};

use crate::output::{Failure, items, table};

/// Who calls.
#[derive(Debug, Default, Args)]
pub(super) struct Caller {
    /// The caller: a SPIFFE ID, or `nobody` for a caller in plaintext
    #[arg(long = "as", value_name = "ID")]
    id: Option<String>,
    /// The address that the caller calls from
    #[arg(long, value_name = "ADDRESS", requires = "id")]
    from: Option<IpAddr>,
}

/// A caller as policies see it.
pub(super) struct Asked {
    id: Option<SpiffeId>,
    from: Option<IpAddr>,
}

impl Caller {
    /// None when nobody was asked for.
    pub(super) fn asked(&self) -> Result<Option<Asked>, Failure> {
        let Some(text) = &self.id else {
            return Ok(None);
        };
        let id = match text.as_str() {
            "nobody" => None,
            text => Some(SpiffeId::parse(text).ok_or_else(|| {
                let expected = "expected a SPIFFE ID such as spiffe://shop.local/ns/shop/sa/web";
                Failure::errors(format!("{text}: {expected}, or nobody"))
            })?),
        };
        let from = self.from;
        Ok(Some(Asked { id, from }))
    }
}

/// What the policies of `service` say.
pub(super) fn judge(
    config: &MeshConfig,
    service: &str,
    asked: &Asked,
    request: RequestView<'_>,
) -> Value {
    let (namespace, name) = service.split_once('/').unwrap_or(("default", service));
    let name = NamespacedName {
        namespace: namespace.to_owned(),
        name: name.to_owned(),
    };
    let call = Call {
        caller: asked.id.as_ref(),
        address: asked.from,
        token: Token::None,
        request: Some(request),
    };
    let found = policies(config, Some(&name));
    let found = found.as_deref().cloned().unwrap_or_default();
    let reads_tokens = config
        .services
        .get(&name)
        .is_some_and(|spec| !spec.jwt.is_empty());
    let open = Call {
        token: match reads_tokens {
            true => Token::Unread,
            false => Token::None,
        },
        ..call
    };
    let (verdict, why) = verdict(&found, &open);
    json!({
        "service": service,
        "caller": asked.id.as_ref().map(SpiffeId::as_str),
        "verdict": verdict,
        "why": why,
        "policies": considered(&found, &open),
    })
}

/// One word, and why: Deny first, then Allow, then the default.
fn verdict(policies: &Policies, call: &Call<'_>) -> (&'static str, String) {
    let how = |listed: &[Policy], wanted| {
        let mut names = listed.iter().filter(|one| one.explain(call) == wanted);
        names.next().map(|one| one.name.clone())
    };
    let decided = policies.decide(call);
    match decided.refused {
        Some(Refused::Denied(policy)) => ("refused", format!("{policy} denies it")),
        Some(Refused::NotAllowed(names)) => {
            let names = names.join(", ");
            ("refused", format!("{names} does not allow it"))
        }
        Some(Refused::Default) => (
            "refused",
            "no Allow policy protects the service, and authorization.default is Deny".to_owned(),
        ),
        None => {
            if let Some(policy) = how(&policies.deny, Meets::Perhaps) {
                return ("depends", format!("{policy} may deny it"));
            }
            if let Some(policy) = how(&policies.allow, Meets::Yes) {
                return ("allowed", format!("{policy} allows it"));
            }
            match how(&policies.allow, Meets::Perhaps) {
                Some(policy) => ("depends", format!("{policy} may allow it")),
                None => (
                    "allowed",
                    "no Allow policy protects the service, and authorization.default is not Deny"
                        .to_owned(),
                ),
            }
        }
    }
}

fn considered(policies: &Policies, call: &Call<'_>) -> Vec<Value> {
    let listed = [
        ("Deny", &policies.deny),
        ("Allow", &policies.allow),
        ("Audit", &policies.audit),
    ];
    let each = listed
        .into_iter()
        .flat_map(|(action, listed)| listed.iter().map(move |policy| (action, policy)));
    let one = |(action, policy): (&str, &Policy)| {
        let says = match policy.explain(call) {
            Meets::Yes => "meets this call",
            Meets::Perhaps => "hangs on the caller's address or token",
            Meets::OtherCallers => "is about other callers",
            Meets::OtherCalls => "is about other calls of this caller",
            Meets::Nothing => "has no rules",
        };
        json!({"policy": policy.name, "action": action, "says": says})
    };
    each.map(one).collect()
}

pub(super) fn render(judged: &[Value]) -> String {
    let text_of = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let mut text = String::new();
    for one in judged {
        let caller = one["caller"].as_str().unwrap_or("a caller in plaintext");
        let _ = writeln!(
            text,
            "\n{caller} calls {}: {}, for {}",
            text_of(&one["service"]),
            text_of(&one["verdict"]),
            text_of(&one["why"]),
        );
        let rows: Vec<Vec<String>> = items(&one["policies"])
            .iter()
            .map(|policy| {
                ["action", "policy", "says"]
                    .map(|key| text_of(&policy[key]))
                    .to_vec()
            })
            .collect();
        if !rows.is_empty() {
            text.push_str(&table(&["ACTION", "POLICY", "IT"], &rows));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use http::{HeaderMap, Method};
    use outrigger_config::{Source, load};

    use super::*;

    const MESH: &str = "\
apiVersion: outrigger.dev/v1alpha1
kind: MeshService
metadata: {name: orders, namespace: shop}
spec:
  discovery: {static: [{address: 127.0.0.1, port: 1}]}
  jwt: [{issuer: i, audiences: [orders], jwks: {file: keys.json}}]
---
apiVersion: outrigger.dev/v1alpha1
kind: AuthorizationPolicy
metadata: {name: callers, namespace: shop}
spec:
  services: [orders]
  action: Allow
  rules:
  - from: [{serviceAccounts: [web]}]
    to: [{methods: [GET]}]
  - from: [{ipBlocks: [10.0.0.0/8]}]
    to: [{paths: [{value: /internal}]}]
  - from: [{tokens: [{issuers: [i]}]}]
    to: [{paths: [{value: /users}]}]
---
apiVersion: outrigger.dev/v1alpha1
kind: AuthorizationPolicy
metadata: {name: no-admin, namespace: shop}
spec: {services: [orders], action: Deny, rules: [{to: [{paths: [{value: /admin}]}]}]}
";

    fn judged(id: &str, from: Option<&str>, method: &Method, path: &str) -> Value {
        let config = load(&[Source::new("mesh.yaml", MESH)]).mesh.unwrap();
        let caller = Caller {
            id: Some(id.to_owned()),
            from: from.map(|text| text.parse().unwrap()),
        };
        let headers = HeaderMap::new();
        let request = RequestView {
            method,
            host: "orders",
            path,
            query: None,
            headers: &headers,
        };
        let asked = caller.asked().unwrap().unwrap();
        judge(&config, "shop/orders", &asked, request)
    }

    #[test]
    fn which_policy_decides_and_why_the_others_do_not() {
        const WEB: &str = "spiffe://shop.local/ns/shop/sa/web";
        const OPS: &str = "spiffe://shop.local/ns/shop/sa/ops";
        let check = |id, from, method, path, verdict: &str, why: &str| {
            let found = judged(id, from, &method, path);
            assert_eq!(
                (&found["verdict"], &found["why"]),
                (&json!(verdict), &json!(why))
            );
            found["policies"].clone()
        };
        let allows = "shop/callers allows it";
        let others = "shop/callers does not allow it";
        let may = "shop/callers may allow it";
        let considered = check(WEB, None, Method::GET, "/", "allowed", allows);
        assert_eq!(
            considered,
            json!([
                {"policy": "shop/no-admin", "action": "Deny", "says": "is about other calls of this caller"},
                {"policy": "shop/callers", "action": "Allow", "says": "meets this call"},
            ])
        );
        check(
            WEB,
            None,
            Method::GET,
            "/admin",
            "refused",
            "shop/no-admin denies it",
        );
        check(WEB, None, Method::POST, "/", "refused", others);
        check(OPS, None, Method::GET, "/", "refused", others);
        check("nobody", None, Method::GET, "/", "refused", others);
        check(OPS, None, Method::GET, "/internal", "depends", may);
        let here = Some("10.1.2.3");
        check(OPS, here, Method::GET, "/internal", "allowed", allows);
        check(
            OPS,
            Some("9.9.9.9"),
            Method::GET,
            "/internal",
            "refused",
            others,
        );
        check(OPS, here, Method::GET, "/users", "depends", may);
        let text = render(&[judged(OPS, None, &Method::GET, "/")]);
        assert!(
            text.contains(&format!("{OPS} calls shop/orders: refused, for")),
            "{text}"
        );
    }

    #[test]
    fn what_is_no_caller_is_said() {
        let caller = Caller {
            id: Some("web".to_owned()),
            from: None,
        };
        let failure = caller.asked().err().unwrap();
        assert!(
            failure.message.contains("expected a SPIFFE ID"),
            "{}",
            failure.message
        );
        assert!(Caller::default().asked().unwrap().is_none());
    }
}
