//! `Retry-After`, and the dates of HTTP in their three forms.
//!
//! Owns their reading.

use std::time::Duration;

use http::HeaderValue;

use crate::time::UnixMillis;

/// Reads `Retry-After` (RFC 9110 §10.2.3): seconds, or a date, which is taken from `now`. A date
/// that has passed is zero. `None` for anything else.
pub fn parse_retry_after(value: &HeaderValue, now: UnixMillis) -> Option<Duration> {
    let text = value.to_str().ok()?.trim();
    if !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit()) {
        return Some(Duration::from_secs(text.parse().unwrap_or(u64::MAX)));
    }
    let at = parse_http_date(text, now)?;
    Some(at.saturating_since(now))
}

/// Reads a date of HTTP (RFC 9110 §5.6.7): `Sun, 06 Nov 1994 08:49:37 GMT`, and the two obsolete
/// forms that recipients must still read. `now` tells the century of a two-digit year.
pub fn parse_http_date(text: &str, now: UnixMillis) -> Option<UnixMillis> {
    let mut words = text.split_ascii_whitespace();
    let weekday = words.next()?;
    let (day, month, year, time) = if weekday.ends_with(',') {
        let second = words.next()?;
        let (day, month, year) = match second.split_once('-') {
            Some((day, rest)) => {
                let (month, year) = rest.split_once('-')?;
                (day, month, century(year, now)?) // Sunday, 06-Nov-94 08:49:37 GMT
            }
            None => (second, words.next()?, number(words.next()?, 4)?),
        };
        let time = words.next()?;
        words.next().filter(|zone| *zone == "GMT")?;
        (number(day, 2)?, month, year, time)
    } else {
        let month = words.next()?; // Sun Nov  6 08:49:37 1994
        let day = words.next()?;
        let time = words.next()?;
        (
            number(day, day.len().clamp(1, 2))?,
            month,
            number(words.next()?, 4)?,
            time,
        )
    };
    if words.next().is_some() {
        return None;
    }
    let seconds =
        days_since_epoch(year, month_number(month)?, day)? * 86_400 + second_of_day(time)?;
    Some(UnixMillis(seconds.checked_mul(1000)?))
}

fn number(text: &str, digits: usize) -> Option<u64> {
    let well_formed = text.len() == digits && text.bytes().all(|b| b.is_ascii_digit());
    if well_formed { text.parse().ok() } else { None }
}

/// A two-digit year that would lie more than 50 years ahead is in the past (RFC 9110 §5.6.7).
fn century(text: &str, now: UnixMillis) -> Option<u64> {
    let this_year = 1970 + now.as_secs() / 31_556_952;
    let year = this_year / 100 * 100 + number(text, 2)?;
    Some(if year > this_year + 50 {
        year - 100
    } else {
        year
    })
}

fn month_number(name: &str) -> Option<u64> {
    let names = [
        "Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec",
    ];
    names
        .iter()
        .position(|known| *known == name)
        .map(|index| index as u64 + 1)
}

fn second_of_day(text: &str) -> Option<u64> {
    let mut parts = text.split(':');
    let hour = number(parts.next()?, 2).filter(|hour| *hour < 24)?;
    let minute = number(parts.next()?, 2).filter(|minute| *minute < 60)?;
    let second = number(parts.next()?, 2).filter(|second| *second <= 60)?; // a leap second
    parts
        .next()
        .is_none()
        .then_some(hour * 3600 + minute * 60 + second)
}

/// Howard Hinnant's `days_from_civil`, for years from 1970.
fn days_since_epoch(year: u64, month: u64, day: u64) -> Option<u64> {
    if year < 1970 || !(1..=31).contains(&day) {
        return None;
    }
    let year = if month <= 2 { year - 1 } else { year };
    let (era, year_of_era) = (year / 400, year % 400);
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    (era * 146_097 + day_of_era).checked_sub(719_468)
}

/// Reads `grpc-retry-pushback-ms` (gRFC A6): milliseconds. None forbids another try: a negative
/// number, and whatever is no number.
pub fn parse_retry_pushback(value: &HeaderValue) -> Option<Duration> {
    let text = value.to_str().ok()?;
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let millis = text.parse().ok().filter(|_| digits)?;
    Some(Duration::from_millis(millis))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// 2026-11-22 00:00:00 GMT.
    const NOW: UnixMillis = UnixMillis(1_795_305_600_000);

    #[test]
    fn dates_of_all_three_forms_read() {
        let check = |text: &str, expected: Option<u64>| {
            assert_eq!(
                parse_http_date(text, NOW).map(UnixMillis::as_secs),
                expected,
                "{text}"
            );
        };
        check("Sun, 06 Nov 1994 08:49:37 GMT", Some(784_111_777));
        check("Sunday, 06-Nov-94 08:49:37 GMT", Some(784_111_777));
        check("Sun Nov  6 08:49:37 1994", Some(784_111_777));
        check("Sun, 22 Nov 2026 00:00:00 GMT", Some(NOW.as_secs()));
        check("Thu, 01 Jan 1970 00:00:00 GMT", Some(0));
        check("Thu, 29 Feb 2024 12:00:00 GMT", Some(1_709_208_000));
        check("Sun, 06 Nov 1994 08:49:37 CET", None);
        check("Sun, 06 Nov 1994 24:49:37 GMT", None);
        check("Sun, 06 Non 1994 08:49:37 GMT", None);
        check("Sun, 06 Nov 1950 08:49:37 GMT", None);
        check("Sun, 06 Nov 1994 08:49:37 GMT x", None);
        check("soon", None);
        check("", None);
    }

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        let check = |text: &str, expected: Option<u64>| {
            let value = HeaderValue::from_str(text).unwrap();
            let expected = expected.map(Duration::from_secs);
            assert_eq!(parse_retry_after(&value, NOW), expected, "{text}");
        };
        check("120", Some(120));
        check("0", Some(0));
        check("99999999999999999999", Some(u64::MAX));
        check("Sun, 22 Nov 2026 00:01:30 GMT", Some(90));
        check("Sun, 06 Nov 1994 08:49:37 GMT", Some(0));
        check("-1", None);
        check("1.5", None);
        check("", None);
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "[A-Za-z0-9:, -]{0,40}") {
            let _ = parse_http_date(&text, NOW);
        }
    }

    #[test]
    fn a_pushback_that_is_no_number_of_milliseconds_forbids_another_try() {
        let check = |text: &'static str, expected: Option<u64>| {
            let read = parse_retry_pushback(&HeaderValue::from_static(text));
            assert_eq!(read, expected.map(Duration::from_millis), "{text:?}");
        };
        check("0", Some(0));
        check("1500", Some(1500));
        for forbidding in ["-1", "", "soon", "1.5", "+5", "99999999999999999999999"] {
            check(forbidding, None);
        }
    }
}
