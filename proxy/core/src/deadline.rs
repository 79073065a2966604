//! How long a request may take, and how that is told to the next hop.
//!
//! Owns the arithmetic of deadlines and their two headers. Does not wait: timers are the
//! sidecar's. On the request's life.

use std::time::Duration;

use http::HeaderValue;

/// Eight digits are all that gRPC allows (grpc/grpc `doc/PROTOCOL-HTTP2.md`, Timeout).
const MOST_DIGITS: usize = 8;
const LARGEST: u64 = 99_999_999;

/// Whose limit it is: decides between `upstream_timeout` and `deadline_exceeded`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// `timeouts.request`: ours.
    Route,
    /// The caller's header.
    Caller,
}

/// Which limit ends an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttemptLimit {
    /// `timeouts.perTry`: the attempt is over, the request may go on.
    PerTry,
    /// What remained of the request.
    Request,
}

/// The smaller of the route's and the caller's limit, and whose it is (the route's when equal or
/// when there is none).
pub fn effective(route: Option<Duration>, caller: Option<Duration>) -> (Option<Duration>, Source) {
    match (route, caller) {
        (Some(route), Some(caller)) if caller < route => (Some(caller), Source::Caller),
        (None, Some(caller)) => (Some(caller), Source::Caller),
        (route, _) => (route, Source::Route),
    }
}

/// How long one attempt may take: the smaller of `per_try` and what remains of the request.
pub fn attempt(
    per_try: Option<Duration>,
    remaining: Option<Duration>,
) -> (Option<Duration>, AttemptLimit) {
    match (per_try, remaining) {
        (Some(per_try), Some(remaining)) if per_try < remaining => {
            (Some(per_try), AttemptLimit::PerTry)
        }
        (Some(per_try), None) => (Some(per_try), AttemptLimit::PerTry),
        (_, remaining) => (remaining, AttemptLimit::Request),
    }
}

/// Reads `grpc-timeout`: one to eight digits and a unit of `H M S m u n`.
///
/// `None` for anything else; such a header is treated as absent.
pub fn parse_grpc_timeout(value: &str) -> Option<Duration> {
    let unit = value.chars().next_back()?;
    let digits = value.strip_suffix(unit)?;
    let well_formed =
        (1..=MOST_DIGITS).contains(&digits.len()) && digits.bytes().all(|b| b.is_ascii_digit());
    let number: u64 = digits.parse().ok().filter(|_| well_formed)?;
    match unit {
        'H' => Some(Duration::from_secs(number.saturating_mul(3600))),
        'M' => Some(Duration::from_secs(number.saturating_mul(60))),
        'S' => Some(Duration::from_secs(number)),
        'm' => Some(Duration::from_millis(number)),
        'u' => Some(Duration::from_micros(number)),
        'n' => Some(Duration::from_nanos(number)),
        _ => None,
    }
}

/// Writes `grpc-timeout` in the finest unit that fits eight digits: rounded down, never to zero.
pub fn format_grpc_timeout(timeout: Duration) -> HeaderValue {
    let nanos = u64::try_from(timeout.as_nanos()).unwrap_or(u64::MAX).max(1);
    let units = [
        (1, b'n'),
        (1_000, b'u'),
        (1_000_000, b'm'),
        (1_000_000_000, b'S'),
        (60_000_000_000, b'M'),
        (3_600_000_000_000, b'H'),
    ];
    let (number, unit) = units
        .into_iter()
        .map(|(nanos_per_unit, unit)| (nanos / nanos_per_unit, unit))
        .find(|(number, _)| *number <= LARGEST)
        .unwrap_or((LARGEST, b'H'));
    // Nanoseconds of centuries do not fit.
    let (number, unit) = match u64::try_from(timeout.as_nanos()) {
        Ok(_) => (number, unit),
        Err(_) => ((timeout.as_secs() / 3600).min(LARGEST), b'H'),
    };
    let mut digits = itoa::Buffer::new();
    let digits = digits.format(number).as_bytes();
    let mut text = [0; 9];
    text[..digits.len()].copy_from_slice(digits);
    text[digits.len()] = unit;
    let text = &text[..=digits.len()];
    HeaderValue::from_bytes(text).expect("digits and a letter are visible ASCII")
}

/// Reads `outrigger-deadline-ms`: digits only; more than fit saturate. `None` for anything else.
pub fn parse_deadline_ms(value: &str) -> Option<Duration> {
    if value.is_empty() || !value.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    Some(Duration::from_millis(value.parse().unwrap_or(u64::MAX)))
}

/// Writes `outrigger-deadline-ms`: rounded down, never to zero.
pub fn format_deadline_ms(timeout: Duration) -> HeaderValue {
    let millis = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
    HeaderValue::from(millis.max(1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn grpc_timeouts_read() {
        let check = |text: &str, expected| assert_eq!(parse_grpc_timeout(text), expected, "{text}");
        check("300m", Some(Duration::from_millis(300)));
        check("1H", Some(Duration::from_secs(3600)));
        check("2M", Some(Duration::from_secs(120)));
        check("5S", Some(Duration::from_secs(5)));
        check("7u", Some(Duration::from_micros(7)));
        check("99999999n", Some(Duration::from_nanos(99_999_999)));
        check("0n", Some(Duration::ZERO));
        check("999999999n", None);
        check("m", None);
        check("", None);
        check("5", None);
        check("5s", None);
        check("+5S", None);
        check("5é", None);
        check("-1S", None);
    }

    #[test]
    fn grpc_timeouts_are_written_in_the_finest_unit_that_fits() {
        let check = |timeout, text: &str| assert_eq!(format_grpc_timeout(timeout), text);
        check(Duration::ZERO, "1n");
        check(Duration::from_nanos(99_999_999), "99999999n");
        check(Duration::from_nanos(100_000_999), "100000u");
        check(Duration::from_secs(15), "15000000u");
        check(Duration::from_secs(100), "100000m");
        check(Duration::from_secs(100_000), "100000S");
        check(Duration::MAX, "99999999H");
    }

    #[test]
    fn milliseconds_read_and_write() {
        let check = |text: &str, expected| assert_eq!(parse_deadline_ms(text), expected, "{text}");
        check("1500", Some(Duration::from_millis(1500)));
        check("0", Some(Duration::ZERO));
        check(
            "99999999999999999999999",
            Some(Duration::from_millis(u64::MAX)),
        );
        check("", None);
        check("-1", None);
        check("1.5", None);
        assert_eq!(format_deadline_ms(Duration::from_micros(1999)), "1");
        assert_eq!(format_deadline_ms(Duration::ZERO), "1");
    }

    #[test]
    fn the_smaller_limit_wins_and_is_known() {
        let ms = |n| Some(Duration::from_millis(n));
        let check = |route, caller, expected| assert_eq!(effective(route, caller), expected);
        check(ms(1000), ms(300), (ms(300), Source::Caller));
        check(ms(300), ms(1000), (ms(300), Source::Route));
        check(ms(300), ms(300), (ms(300), Source::Route));
        check(None, ms(300), (ms(300), Source::Caller));
        check(ms(300), None, (ms(300), Source::Route));
        check(None, None, (None, Source::Route));
        assert_eq!(attempt(ms(800), ms(900)), (ms(800), AttemptLimit::PerTry));
        assert_eq!(attempt(ms(800), ms(100)), (ms(100), AttemptLimit::Request));
        assert_eq!(attempt(ms(800), None), (ms(800), AttemptLimit::PerTry));
        assert_eq!(attempt(None, ms(100)), (ms(100), AttemptLimit::Request));
        assert_eq!(attempt(None, None), (None, AttemptLimit::Request));
    }

    proptest! {
        #[test]
        fn a_written_timeout_reads_back_a_little_smaller(nanos in 1_u64..=3_000_000_000_000_000_000) {
            let timeout = Duration::from_nanos(nanos);
            let text = format_grpc_timeout(timeout);
            let read = parse_grpc_timeout(text.to_str().unwrap()).unwrap();
            prop_assert!(read <= timeout && !read.is_zero());
            let lost = (timeout - read).as_secs_f64() / timeout.as_secs_f64();
            prop_assert!(lost < 1e-4, "{} lost {}", nanos, lost);
        }

        #[test]
        fn no_text_panics(text in ".{0,12}") {
            let _ = (parse_grpc_timeout(&text), parse_deadline_ms(&text));
        }
    }
}
