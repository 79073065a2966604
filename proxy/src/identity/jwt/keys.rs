//! The public keys of an issuer, out of a JWK set (RFC 7517).
//!
//! Owns which keys count: RSA for RS256, P-256 for ES256, Ed25519 for EdDSA. Others, and keys that
//! encrypt, are passed over, as RFC 7517 §5 asks. Pure. On the life of a config update.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::signature::{
    ECDSA_P256_SHA256_FIXED, ED25519, RSA_PKCS1_2048_8192_SHA256, RsaPublicKeyComponents,
    UnparsedPublicKey,
};
use serde::Deserialize;

/// What a signature is checked with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Algorithm {
    /// RSASSA-PKCS1-v1_5 with SHA-256.
    Rs256,
    /// ECDSA with P-256 and SHA-256.
    Es256,
    /// Ed25519.
    EdDsa,
}

impl Algorithm {
    /// As a token's head says it (RFC 7518 §3.1, RFC 8037 §3.1, RFC 9864 §2.2).
    pub fn parse(name: &str) -> Option<Self> {
        match name {
            "RS256" => Some(Self::Rs256),
            "ES256" => Some(Self::Es256),
            "EdDSA" | "Ed25519" => Some(Self::EdDsa),
            _ => None,
        }
    }
}

/// One key.
#[derive(Debug, PartialEq, Eq)]
pub struct Key {
    /// Its name, where it has one.
    pub id: Option<String>,
    /// The one algorithm that it is for.
    pub algorithm: Algorithm,
    parts: [Vec<u8>; 2],
}

impl Key {
    /// Whether it signed `message`.
    pub fn verifies(&self, message: &[u8], signature: &[u8]) -> bool {
        let [first, second] = &self.parts;
        let verified = match self.algorithm {
            Algorithm::Rs256 => RsaPublicKeyComponents {
                n: first,
                e: second,
            }
            .verify(&RSA_PKCS1_2048_8192_SHA256, message, signature),
            Algorithm::Es256 => {
                let point = [&[4], &first[..], &second[..]].concat();
                UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, point).verify(message, signature)
            }
            Algorithm::EdDsa => UnparsedPublicKey::new(&ED25519, first).verify(message, signature),
        };
        verified.is_ok()
    }
}

#[derive(Deserialize)]
struct Set {
    keys: Vec<serde_json::Value>,
}

/// A JWK, as far as it matters.
#[derive(Deserialize)]
struct Jwk {
    kty: String,
    kid: Option<String>,
    #[serde(rename = "use")]
    use_: Option<String>,
    key_ops: Option<Vec<String>>,
    alg: Option<String>,
    crv: Option<String>,
    n: Option<String>,
    e: Option<String>,
    x: Option<String>,
    y: Option<String>,
}

/// The keys of a JWK set.
///
/// # Errors
/// What is wrong with it; one without a key that counts would refuse everybody.
pub fn parse(text: &[u8]) -> Result<Vec<Key>, String> {
    let set: Set =
        serde_json::from_slice(text).map_err(|error| format!("it is no JWK set: {error}"))?;
    let keys: Vec<Key> = set.keys.into_iter().filter_map(key).collect();
    match keys.is_empty() {
        true => Err("it has no key for RS256, ES256 or EdDSA".to_owned()),
        false => Ok(keys),
    }
}

fn key(value: serde_json::Value) -> Option<Key> {
    let jwk: Jwk = serde_json::from_value(value).ok()?;
    let signs = jwk.use_.is_none_or(|purpose| purpose == "sig")
        && jwk
            .key_ops
            .is_none_or(|ops| ops.iter().any(|operation| operation == "verify"));
    let decode = |text: Option<String>| URL_SAFE_NO_PAD.decode(text?).ok();
    let (algorithm, parts) = match (jwk.kty.as_str(), jwk.crv.as_deref()) {
        ("RSA", _) => (
            Algorithm::Rs256,
            [number(decode(jwk.n)?), number(decode(jwk.e)?)],
        ),
        ("EC", Some("P-256")) => {
            let (x, y) = (decode(jwk.x)?, decode(jwk.y)?);
            if x.len() != 32 || y.len() != 32 {
                return None;
            }
            (Algorithm::Es256, [x, y])
        }
        ("OKP", Some("Ed25519")) => (Algorithm::EdDsa, [decode(jwk.x)?, Vec::new()]),
        _ => return None,
    };
    let meant = jwk
        .alg
        .is_none_or(|name| Algorithm::parse(&name) == Some(algorithm));
    (signs && meant).then_some(Key {
        id: jwk.kid,
        algorithm,
        parts,
    })
}

/// Without the zeros that some write before it and RFC 7518 §2 forbids.
fn number(mut bytes: Vec<u8>) -> Vec<u8> {
    let zeros = bytes.iter().take_while(|byte| **byte == 0).count();
    bytes.drain(..zeros);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn which_keys_count() {
        let check = |text: &str, expected: Option<Algorithm>| {
            let set = format!("{{\"keys\": [{text}]}}");
            let found = parse(set.as_bytes()).ok();
            let found = found.map(|keys| keys[0].algorithm);
            assert_eq!(found, expected, "{text}");
        };
        check(
            r#"{"kty":"RSA","n":"AQAB","e":"AQAB"}"#,
            Some(Algorithm::Rs256),
        );
        check(
            r#"{"kty":"OKP","crv":"Ed25519","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo","alg":"EdDSA"}"#,
            Some(Algorithm::EdDsa),
        );
        for none in [
            r#"{"kty":"RSA","n":"AQAB"}"#,
            r#"{"kty":"RSA","n":"AQAB","e":"AQAB","use":"enc"}"#,
            r#"{"kty":"RSA","n":"AQAB","e":"AQAB","key_ops":["encrypt"]}"#,
            r#"{"kty":"RSA","n":"AQAB","e":"AQAB","alg":"RS512"}"#,
            r#"{"kty":"RSA","n":"AQAB","e":"AQAB","alg":"ES256"}"#,
            r#"{"kty":"oct","k":"c2VjcmV0","alg":"HS256"}"#,
            r#"{"kty":"EC","crv":"P-256","x":"AQAB","y":"AQAB"}"#,
            r#"{"kty":"EC","crv":"secp256k1","x":"AQAB","y":"AQAB"}"#,
            "7",
        ] {
            check(none, None);
        }
        for bad in ["", "{}", "[]", "{\"keys\": 1}", "\u{0}"] {
            assert!(parse(bad.as_bytes()).is_err(), "{bad}");
        }
    }
}
