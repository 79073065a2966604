//! Tokens that callers bring (JWT, RFC 7519): whether one is good, and what it says.
//!
//! Who issues good tokens for a service is config; their keys ([`keys`]) come from a file or a URL
//! and are kept up to date ([`source`]). Whether a token that is good allows anything is asked by
//! policies. On the head of a request's life.
//!
//! Signatures are ring's to check, which is here for TLS anyway: `jsonwebtoken` brings a second
//! cryptography, or is of a line that is no longer maintained. RFC 8725 is followed: the key says
//! which algorithm counts, never the token; `none` and shared secrets (HS…) do not exist; issuer,
//! audience and expiry are always asked for.

pub mod keys;
pub mod source;
mod token;

use std::collections::HashMap;
use std::sync::{Arc, RwLock};
use std::time::Duration;

use http::HeaderMap;
use http::header::AUTHORIZATION;
use outrigger_core::authz::Claims;
use outrigger_core::error_code::ErrorCode;
use outrigger_core::time::UnixMillis;
use sha2::{Digest as _, Sha256};

use crate::error::ProxyError;
use source::KeySet;
use token::{Invalid, Parsed};

/// Good tokens that are remembered, so that the next call with one costs a hash. All are forgotten
/// when there are more.
const REMEMBERED: usize = 4096;

/// How soon a caller may come again while the keys are not there.
const COME_BACK: Duration = Duration::from_secs(1);

/// Who issues good tokens for a service.
pub struct Issuers {
    issuers: Vec<Issuer>,
    /// Read by every worker for every token, written for a new one.
    remembered: RwLock<HashMap<[u8; 32], Remembered>>,
}

/// One of them.
pub struct Issuer {
    /// `iss`, to the letter.
    pub issuer: String,
    /// One of these must be among `aud`.
    pub audiences: Vec<String>,
    /// How far clocks may be apart.
    pub skew: Duration,
    /// What it signs with.
    pub keys: Arc<KeySet>,
}

struct Remembered {
    claims: Arc<Claims>,
    until: u64,
    issuer: usize,
    /// Of the keys: one that was withdrawn signs nothing any more.
    generation: u64,
}

impl Issuers {
    /// These; none when there are none.
    pub fn new(issuers: Vec<Issuer>) -> Option<Arc<Self>> {
        (!issuers.is_empty()).then(|| {
            Arc::new(Self {
                issuers,
                remembered: RwLock::default(),
            })
        })
    }

    /// What the token of a request says; none for a request without one.
    ///
    /// # Errors
    /// `unauthenticated` for a token that is not good, and while its issuer's keys are not there.
    pub fn read(
        &self,
        fields: &HeaderMap,
        now: UnixMillis,
    ) -> Result<Option<Arc<Claims>>, ProxyError> {
        let Some(text) = bearer(fields)? else {
            return Ok(None);
        };
        let hash: [u8; 32] = Sha256::digest(text).into();
        let seconds = now.0 / 1000;
        if let Ok(remembered) = self.remembered.read()
            && let Some(known) = remembered.get(&hash)
            && known.until > seconds
            && known.generation == self.issuers[known.issuer].keys.generation()
        {
            return Ok(Some(Arc::clone(&known.claims)));
        }
        let parsed = Parsed::read(text).map_err(|invalid| refusal(&invalid))?;
        let at = self
            .issuers
            .iter()
            .position(|known| known.issuer == parsed.issuer());
        let Some(at) = at else {
            return Err(refusal(&Invalid::Issuer(parsed.issuer().to_owned())));
        };
        let issuer = &self.issuers[at];
        let generation = issuer.keys.generation();
        let Some(keys) = issuer.keys.current() else {
            return Err(no_keys(issuer));
        };
        // Times and audience first: they cost nothing, and no key is asked for in vain.
        let (claims, until) = parsed
            .claims(&issuer.audiences, issuer.skew, seconds)
            .map_err(|invalid| refusal(&invalid))?;
        parsed.verify(&keys).map_err(|invalid| {
            if matches!(invalid, Invalid::UnknownKey(_)) {
                issuer.keys.want();
            }
            refusal(&invalid)
        })?;
        let claims = Arc::new(claims);
        if let Ok(mut remembered) = self.remembered.write() {
            if remembered.len() >= REMEMBERED {
                remembered.clear();
            }
            let known = Remembered {
                claims: Arc::clone(&claims),
                until,
                issuer: at,
                generation,
            };
            remembered.insert(hash, known);
        }
        Ok(Some(claims))
    }
}

/// Whether a request brings a token at all.
pub fn has_bearer(fields: &HeaderMap) -> bool {
    !matches!(bearer(fields), Ok(None))
}

/// The token of `Authorization: Bearer` (RFC 6750 §2.1).
fn bearer(fields: &HeaderMap) -> Result<Option<&str>, ProxyError> {
    let mut values = fields.get_all(AUTHORIZATION).iter();
    let Some(value) = values.next() else {
        return Ok(None);
    };
    if values.next().is_some() {
        let detail = "the request has several Authorization fields";
        return Err(ProxyError::downstream(ErrorCode::Unauthenticated, detail));
    }
    let Ok(text) = value.to_str() else {
        return Ok(None);
    };
    let (scheme, token) = text.split_once(' ').unwrap_or((text, ""));
    Ok(scheme.eq_ignore_ascii_case("bearer").then(|| token.trim()))
}

fn refusal(invalid: &Invalid) -> ProxyError {
    ProxyError::downstream(ErrorCode::Unauthenticated, format!("the token {invalid}"))
}

/// Nobody is let in, but the token may be as good as it can be.
fn no_keys(issuer: &Issuer) -> ProxyError {
    let why = issuer.keys.problem();
    let why = why.unwrap_or_else(|| "they are being fetched".to_owned());
    let detail = format!("the keys of {} are not there: {why}", issuer.issuer);
    ProxyError::local(ErrorCode::Unauthenticated, detail)
        .answered(http::StatusCode::SERVICE_UNAVAILABLE, None)
        .grpc(outrigger_core::outcome::GrpcCode::Unavailable)
        .retry_after(COME_BACK)
}
