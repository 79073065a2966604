//! Signatures of Standard Webhooks 1.0: HMAC-SHA256 over id, timestamp and payload.
//!
//! On the message's life.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ring::hmac;

/// What a secret begins with, as it is handed out.
const PREFIX: &str = "whsec_";

/// A secret that signs.
pub(super) struct Secret(hmac::Key);

impl Secret {
    /// Reads `whsec_` and base64; none for anything else.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let text = text.trim();
        let bytes = STANDARD.decode(text.strip_prefix(PREFIX).unwrap_or(text));
        let bytes = bytes.ok().filter(|bytes| !bytes.is_empty())?;
        Some(Self(hmac::Key::new(hmac::HMAC_SHA256, &bytes)))
    }
}

/// `webhook-signature`: one for each secret, so that the receiver may know the old or the new one.
pub(super) fn signatures(secrets: &[Secret], id: &str, timestamp: u64, payload: &[u8]) -> String {
    let signed = secrets.iter().map(|Secret(key)| {
        let mut context = hmac::Context::with_key(key);
        context.update(format!("{id}.{timestamp}.").as_bytes());
        context.update(payload);
        format!("v1,{}", STANDARD.encode(context.sign()))
    });
    signed.collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The example of the specification's libraries.
    const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";

    #[test]
    fn the_example_is_signed_as_others_sign_it() {
        let secrets = [Secret::parse(&format!("{SECRET}\n")).unwrap()];
        let id = "msg_p5jXN8AQM9LWM0D4loKWxJek";
        let signed = signatures(&secrets, id, 1_614_265_330, br#"{"test": 2432232314}"#);
        assert_eq!(signed, "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=");
    }

    #[test]
    fn every_secret_signs_for_itself() {
        let parse = |text| Secret::parse(text).unwrap();
        let both = [parse(SECRET), parse("whsec_c2Vjb25kIHNlY3JldCBzZWNvbmQ=")];
        let signed = signatures(&both, "a", 1, b"x");
        let (first, second) = signed.split_once(' ').unwrap();
        assert_eq!(first, signatures(&both[..1], "a", 1, b"x"));
        assert_eq!(second, signatures(&both[1..], "a", 1, b"x"));
        assert_ne!(first, second);
        assert_eq!(signatures(&[], "a", 1, b"x"), "");
    }

    #[test]
    fn what_is_no_secret_is_none() {
        for text in ["", "whsec_", "whsec_?", "a secret"] {
            assert!(Secret::parse(text).is_none(), "{text}");
        }
    }
}
