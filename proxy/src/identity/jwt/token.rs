//! One token: its parts, its claims, its signature.
//!
//! Pure: the time is passed in. Never panics, whatever a caller sends. On the head of a request's
//! life.

use std::collections::BTreeMap;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use outrigger_core::authz::Claims;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::keys::{Algorithm, Key};

/// Longer ones are not looked at; the whole head is bounded anyway.
const MAX_BYTES: usize = 16 * 1024;
/// Claims within claims, as `realm_access.roles`.
const MAX_DEPTH: usize = 4;

/// Why a token is not good. Fits behind "the token".
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Invalid {
    #[error("is malformed")]
    Malformed,
    #[error("is signed with {0}, which is never accepted")]
    Algorithm(String),
    #[error("asks for an extension that is not known (crit)")]
    Critical,
    #[error("is of the issuer {0:?}, which this service does not know")]
    Issuer(String),
    #[error("is for another audience")]
    Audience,
    #[error("has no exp")]
    NoExpiry,
    #[error("has a malformed {0}")]
    Claim(&'static str),
    #[error("has expired")]
    Expired,
    #[error("is not valid yet")]
    NotYetValid,
    #[error("is signed with a key that its issuer does not have ({0})")]
    UnknownKey(String),
    #[error("has a signature that is not its issuer's")]
    Signature,
}

#[derive(Deserialize)]
struct Head {
    alg: String,
    kid: Option<String>,
    crit: Option<Value>,
}

/// A token that was taken apart, and not believed yet.
pub(super) struct Parsed<'a> {
    head: Head,
    algorithm: Algorithm,
    claims: Map<String, Value>,
    signed: &'a str,
    signature: Vec<u8>,
}

impl<'a> Parsed<'a> {
    pub(super) fn read(text: &'a str) -> Result<Self, Invalid> {
        if text.len() > MAX_BYTES {
            return Err(Invalid::Malformed);
        }
        let (signed, signature) = text.rsplit_once('.').ok_or(Invalid::Malformed)?;
        let (head, claims) = signed.split_once('.').ok_or(Invalid::Malformed)?;
        let decode = |part: &str| {
            let decoded = URL_SAFE_NO_PAD.decode(part);
            decoded.map_err(|_| Invalid::Malformed)
        };
        let head: Head = serde_json::from_slice(&decode(head)?).map_err(|_| Invalid::Malformed)?;
        let Some(algorithm) = Algorithm::parse(&head.alg) else {
            let name: String = head.alg.chars().take(20).collect();
            return Err(Invalid::Algorithm(name.escape_default().to_string()));
        };
        if head.crit.is_some() {
            return Err(Invalid::Critical);
        }
        Ok(Self {
            algorithm,
            head,
            claims: serde_json::from_slice(&decode(claims)?).map_err(|_| Invalid::Malformed)?,
            signed,
            signature: decode(signature)?,
        })
    }

    /// Who says to have issued it.
    pub(super) fn issuer(&self) -> &str {
        self.claims
            .get("iss")
            .and_then(Value::as_str)
            .unwrap_or_default()
    }

    /// What it says, and until when, in seconds: if it is for one of `audiences` and counts now.
    pub(super) fn claims(
        &self,
        audiences: &[String],
        skew: Duration,
        now: u64,
    ) -> Result<(Claims, u64), Invalid> {
        let meant = |value: &Value| {
            value
                .as_str()
                .is_some_and(|name| audiences.iter().any(|ours| ours == name))
        };
        let for_us = match self.claims.get("aud") {
            Some(Value::Array(list)) => list.iter().any(meant),
            Some(one) => meant(one),
            None => false,
        };
        if !for_us {
            return Err(Invalid::Audience);
        }
        let skew = skew.as_secs();
        let until = self.time("exp")?.ok_or(Invalid::NoExpiry)?;
        let until = until.saturating_add(skew);
        if until <= now {
            return Err(Invalid::Expired);
        }
        for name in ["nbf", "iat"] {
            if self
                .time(name)?
                .is_some_and(|from| from > now.saturating_add(skew))
            {
                return Err(Invalid::NotYetValid);
            }
        }
        let subject = match self.claims.get("sub") {
            None => "",
            Some(Value::String(subject)) => subject,
            Some(_) => return Err(Invalid::Claim("sub")),
        };
        let mut values = BTreeMap::new();
        flatten("", &self.claims, MAX_DEPTH, &mut values);
        let claims = Claims {
            issuer: self.issuer().to_owned(),
            subject: subject.to_owned(),
            values,
        };
        Ok((claims, until))
    }

    /// A NumericDate (RFC 7519 §2), rounded down; one of another kind is no reason to pass it over.
    fn time(&self, name: &'static str) -> Result<Option<u64>, Invalid> {
        let Some(value) = self.claims.get(name) else {
            return Ok(None);
        };
        let seconds = value.as_f64().filter(|seconds| *seconds >= 0.0);
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // saturates
        seconds
            .map(|seconds| Some(seconds as u64))
            .ok_or(Invalid::Claim(name))
    }

    /// Whether one of `keys` signed it.
    pub(super) fn verify(&self, keys: &[Key]) -> Result<(), Invalid> {
        let fits = |key: &&Key| {
            let named = self.head.kid.is_none() || key.id == self.head.kid;
            named && key.algorithm == self.algorithm
        };
        let mut candidates = keys.iter().filter(fits).peekable();
        if candidates.peek().is_none() {
            let name = self.head.kid.as_deref().unwrap_or("no kid");
            let name: String = name.chars().take(100).collect();
            return Err(Invalid::UnknownKey(name.escape_default().to_string()));
        }
        match candidates.any(|key| key.verifies(self.signed.as_bytes(), &self.signature)) {
            true => Ok(()),
            false => Err(Invalid::Signature),
        }
    }
}

/// Claims as texts: lists have several values, `scope` is a list in one text (RFC 8693 §4.2), and
/// what is within another claim has a dot in its name.
fn flatten(
    base: &str,
    claims: &Map<String, Value>,
    depth: usize,
    into: &mut BTreeMap<String, Vec<String>>,
) {
    for (name, value) in claims {
        let name = format!("{base}{name}");
        let values: Vec<String> = match value {
            Value::Object(inner) if depth > 0 => {
                flatten(&format!("{name}."), inner, depth - 1, into);
                continue;
            }
            Value::String(scope) if name == "scope" => scope
                .split(' ')
                .filter(|one| !one.is_empty())
                .map(str::to_owned)
                .collect(),
            Value::Array(list) => list.iter().filter_map(text).collect(),
            one => text(one).into_iter().collect(),
        };
        if !values.is_empty() {
            into.insert(name, values);
        }
    }
}

fn text(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(_) | Value::Bool(_) => Some(value.to_string()),
        Value::Null | Value::Array(_) | Value::Object(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use ring::rand::SystemRandom;
    use ring::signature::{Ed25519KeyPair, KeyPair as _};
    use serde_json::json;

    use super::super::keys;
    use super::*;

    const NOW: u64 = 1_700_000_000;

    fn encode(value: &Value) -> String {
        URL_SAFE_NO_PAD.encode(value.to_string())
    }

    struct Signer(Ed25519KeyPair);

    impl Signer {
        fn new() -> Self {
            let document = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).unwrap();
            Self(Ed25519KeyPair::from_pkcs8(document.as_ref()).unwrap())
        }

        fn keys(&self, id: &str) -> Vec<Key> {
            let x = URL_SAFE_NO_PAD.encode(self.0.public_key());
            let set = json!({"keys": [{"kty": "OKP", "crv": "Ed25519", "x": x, "kid": id}]});
            keys::parse(set.to_string().as_bytes()).unwrap()
        }

        fn token(&self, head: &Value, claims: &Value) -> String {
            let signed = format!("{}.{}", encode(head), encode(claims));
            let signature = URL_SAFE_NO_PAD.encode(self.0.sign(signed.as_bytes()));
            format!("{signed}.{signature}")
        }
    }

    fn good() -> Value {
        json!({"iss": "https://issuer", "aud": ["orders", "stock"], "sub": "me", "exp": NOW + 60})
    }

    fn judge(text: &str, keys: &[Key]) -> Result<Claims, Invalid> {
        let parsed = Parsed::read(text)?;
        let skew = Duration::from_secs(30);
        let (claims, _) = parsed.claims(&["orders".to_owned()], skew, NOW)?;
        parsed.verify(keys)?;
        Ok(claims)
    }

    #[test]
    fn claims_are_texts_whatever_they_were() {
        let signer = Signer::new();
        let mut claims = good();
        claims["scope"] = json!("read  write");
        claims["groups"] = json!(["a", 7, null, ["b"]]);
        claims["admin"] = json!(true);
        claims["realm_access"] = json!({"roles": ["r"]});
        let token = signer.token(&json!({"alg": "EdDSA", "kid": "1"}), &claims);
        let found = judge(&token, &signer.keys("1")).unwrap();
        assert_eq!(
            (found.issuer.as_str(), found.subject.as_str()),
            ("https://issuer", "me")
        );
        let value = |name: &str| found.values[name].join(",");
        assert_eq!(value("scope"), "read,write");
        assert_eq!(value("groups"), "a,7");
        assert_eq!(value("admin"), "true");
        assert_eq!(value("realm_access.roles"), "r");
    }

    #[test]
    fn what_is_not_good() {
        let signer = Signer::new();
        let keys = signer.keys("1");
        let head = json!({"alg": "EdDSA", "kid": "1"});
        let with = |name: &str, value: Value| {
            let mut claims = good();
            claims[name] = value;
            judge(&signer.token(&head, &claims), &keys).err()
        };
        assert_eq!(with("x", json!(1)), None);
        assert_eq!(with("aud", json!("orders")), None);
        assert_eq!(with("exp", json!(NOW - 29)), None);
        assert_eq!(with("exp", json!(NOW - 30)), Some(Invalid::Expired));
        assert_eq!(with("exp", json!(NOW as f64 + 0.5)), None);
        assert_eq!(
            with("exp", json!("9999999999")),
            Some(Invalid::Claim("exp"))
        );
        assert_eq!(with("exp", json!(-1)), Some(Invalid::Claim("exp")));
        assert_eq!(with("exp", Value::Null), Some(Invalid::Claim("exp")));
        assert_eq!(with("nbf", json!(NOW + 30)), None);
        assert_eq!(with("nbf", json!(NOW + 31)), Some(Invalid::NotYetValid));
        assert_eq!(with("nbf", json!("0")), Some(Invalid::Claim("nbf")));
        assert_eq!(with("iat", json!(NOW + 31)), Some(Invalid::NotYetValid));
        assert_eq!(with("aud", json!("stock")), Some(Invalid::Audience));
        assert_eq!(with("aud", json!([])), Some(Invalid::Audience));
        assert_eq!(with("sub", json!(1)), Some(Invalid::Claim("sub")));
        let mut endless = good();
        endless.as_object_mut().unwrap().remove("exp");
        assert_eq!(
            judge(&signer.token(&head, &endless), &keys).err(),
            Some(Invalid::NoExpiry)
        );

        let headed = |head: Value| judge(&signer.token(&head, &good()), &keys).err();
        for name in ["none", "None", "HS256", "HS512", "RS1", ""] {
            assert_eq!(
                headed(json!({"alg": name})),
                Some(Invalid::Algorithm(name.to_owned()))
            );
        }
        assert_eq!(
            headed(json!({"alg": "EdDSA"})),
            None,
            "one key needs no name"
        );
        assert_eq!(
            headed(json!({"alg": "EdDSA", "kid": "2"})),
            Some(Invalid::UnknownKey("2".to_owned()))
        );
        // The key says what it is for, never the token.
        assert_eq!(
            headed(json!({"alg": "ES256", "kid": "1"})),
            Some(Invalid::UnknownKey("1".to_owned()))
        );
        assert_eq!(
            headed(json!({"alg": "EdDSA", "kid": "1", "crit": ["b64"], "b64": false})),
            Some(Invalid::Critical)
        );

        let token = signer.token(&head, &good());
        assert_eq!(
            judge(&token, &Signer::new().keys("1")).err(),
            Some(Invalid::Signature)
        );
        let (signed, _) = token.rsplit_once('.').unwrap();
        assert_eq!(
            judge(&format!("{signed}."), &keys).err(),
            Some(Invalid::Signature)
        );
        for text in ["", ".", "..", "a.b.c", "....", signed, &"x.".repeat(10_000)] {
            assert_eq!(
                judge(text, &keys).err(),
                Some(Invalid::Malformed),
                "{text:.20}"
            );
        }
    }

    /// RFC 7515 appendix A.3.
    #[test]
    fn the_token_of_the_rfc_is_verified() {
        let set = br#"{"keys": [{"kty":"EC","crv":"P-256",
            "x":"f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU",
            "y":"x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0"}]}"#;
        let keys = keys::parse(set).unwrap();
        let text = "eyJhbGciOiJFUzI1NiJ9.eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6\
                    Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ.DtEhU3ljbEg8L38VWAfUAqOyKAM6-Xx-F4GawxaepmXFCgfTjDxw5djxLa8ISlSApmWQxfKTUJqPP3-Kg6NU1Q";
        let text: String = text.split_whitespace().collect();
        let parsed = Parsed::read(&text).unwrap();
        assert_eq!(parsed.issuer(), "joe");
        assert_eq!(parsed.verify(&keys), Ok(()));
    }
}
