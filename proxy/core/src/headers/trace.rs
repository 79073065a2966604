//! `traceparent` (W3C Trace Context, level 1).
//!
//! Owns its reading, writing and continuing. Spans are telemetry's.

use std::fmt;

use http::{HeaderMap, HeaderValue};

use super::TRACEPARENT;

/// Where in which trace a request stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceContext {
    /// The trace; never 0.
    pub trace_id: u128,
    /// The span that sent it; never 0.
    pub parent_id: u64,
    /// Bit 0: the sender records it.
    pub flags: u8,
}

impl TraceContext {
    /// Begins a trace.
    pub fn new_root(sampled: bool, rng: &mut fastrand::Rng) -> Self {
        TraceContext {
            trace_id: rng.u128(1..),
            parent_id: rng.u64(1..),
            flags: u8::from(sampled),
        }
    }

    /// The same trace, a new span.
    pub fn child(&self, rng: &mut fastrand::Rng) -> Self {
        TraceContext {
            parent_id: rng.u64(1..),
            ..*self
        }
    }

    /// Whether the sender records the trace.
    pub const fn is_sampled(&self) -> bool {
        self.flags & 1 == 1
    }

    /// The request's context; `None` without exactly one valid `traceparent`, whereupon a new
    /// trace begins.
    pub fn from_headers(headers: &HeaderMap) -> Option<Self> {
        let mut fields = headers.get_all(TRACEPARENT).iter();
        let (field, None) = (fields.next()?, fields.next()) else {
            return None;
        };
        Self::parse(field.to_str().ok()?)
    }

    /// Reads the header's value. A later version is read as far as this one goes.
    pub fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split('-');
        let version = lower_hex(parts.next()?, 2)?;
        let trace_id = lower_hex(parts.next()?, 32)?;
        let parent_id = lower_hex(parts.next()?, 16)?;
        let flags = lower_hex(parts.next()?, 2)?;
        let invalid_version = version == 0xff || (version == 0 && parts.next().is_some());
        if invalid_version || trace_id == 0 || parent_id == 0 {
            return None;
        }
        let (parent_id, flags) = (u64::try_from(parent_id).ok()?, u8::try_from(flags).ok()?);
        Some(TraceContext {
            trace_id,
            parent_id,
            flags,
        })
    }

    /// The header's value, marked sensitive: it never repeats and has no place in HPACK's tables.
    pub fn to_header(&self) -> HeaderValue {
        let mut value = HeaderValue::from_str(&self.to_string()).expect("hexadecimal and dashes");
        value.set_sensitive(true);
        value
    }
}

impl fmt::Display for TraceContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "00-{:032x}-{:016x}-{:02x}",
            self.trace_id, self.parent_id, self.flags
        )
    }
}

fn lower_hex(text: &str, digits: usize) -> Option<u128> {
    let well_formed =
        text.len() == digits && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    if well_formed {
        u128::from_str_radix(text, 16).ok()
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VALID: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    #[test]
    fn a_valid_context_reads_and_writes_back() {
        let context = TraceContext::parse(VALID).unwrap();
        assert!(context.is_sampled());
        assert_eq!(context.to_string(), VALID);
        assert!(context.to_header().is_sensitive());
        let child = context.child(&mut fastrand::Rng::with_seed(1));
        assert_eq!(child.trace_id, context.trace_id);
        assert_ne!(child.parent_id, context.parent_id);
        let root = TraceContext::new_root(false, &mut fastrand::Rng::with_seed(1));
        assert_eq!(TraceContext::parse(&root.to_string()), Some(root));
    }

    #[test]
    fn what_is_not_valid_is_no_context() {
        let check = |text: &str, valid: bool| {
            assert_eq!(TraceContext::parse(text).is_some(), valid, "{text}");
        };
        check(VALID, true);
        check(&VALID.replacen("00-", "cc-", 1), true);
        check(&format!("{}-future", VALID.replacen("00-", "01-", 1)), true);
        check(&format!("{VALID}-more"), false);
        check(&VALID.replacen("00-", "ff-", 1), false);
        check(&VALID.to_uppercase(), false);
        check(
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            false,
        );
        check(
            "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
            false,
        );
        check("00-0af7-b7ad6b7169203331-01", false);
        check("", false);
        let mut twice = HeaderMap::new();
        twice.append(TRACEPARENT, HeaderValue::from_static(VALID));
        assert!(TraceContext::from_headers(&twice).is_some());
        twice.append(TRACEPARENT, HeaderValue::from_static(VALID));
        assert!(TraceContext::from_headers(&twice).is_none());
    }
}
