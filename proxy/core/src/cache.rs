//! What a shared cache may keep, and when it may say it again (RFC 9111).
//!
//! Owns the decisions; keeps nothing itself. Only what an answer says of itself counts: where it
//! names no lifetime none is guessed (§4.2.2 allows a guess), but it may be kept to be validated,
//! or to stand in for an error. On the request's life.

use std::time::Duration;

use http::header::{
    AGE, AUTHORIZATION, CACHE_CONTROL, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE,
    CONTENT_TYPE, DATE, ETAG, EXPIRES, IF_MODIFIED_SINCE, IF_NONE_MATCH, LAST_MODIFIED, PRAGMA,
    SET_COOKIE, VARY,
};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};

use crate::headers::parse_http_date;
use crate::time::UnixMillis;

/// The longest lifetime that is believed (§1.2.2: what is too large to count is this).
const LONGEST: u64 = 1 << 31;

/// What an answer that may be kept says about how long it is good.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kept {
    /// How long it is fresh, counted from when the service made it.
    pub fresh_for: Duration,
    /// How old it was when it came.
    pub age_at_arrival: Duration,
    /// When it came.
    pub arrived: UnixMillis,
    /// It may not be used once it is stale, whatever happens (§4.2.4).
    pub must_revalidate: bool,
    /// How long after its end it says it may stand in for an error (RFC 5861 §4).
    pub stale_if_error: Option<Duration>,
    /// The request fields it was chosen by, with their values.
    pub vary: Vec<(HeaderName, Vec<HeaderValue>)>,
}

impl Kept {
    /// Judges the answer to a GET with the fields `request`; none when it may not be kept.
    pub fn judge(
        request: &HeaderMap,
        status: StatusCode,
        answer: &HeaderMap,
        now: UnixMillis,
    ) -> Option<Self> {
        let asked = Directives::of(request);
        let said = Directives::of(answer);
        let public = said.has("public");
        let lifetime = lifetime(&said, answer, now);
        let understood = match lifetime {
            Some(_) => UNDERSTOOD.contains(&status.as_u16()),
            None => BY_DEFAULT.contains(&status.as_u16()),
        };
        let authorized = !request.contains_key(AUTHORIZATION)
            || public
            || said.has("must-revalidate")
            || said.has("s-maxage");
        // Not in the RFC, but what a cookie is set for is meant for one caller.
        let one_caller = answer.contains_key(SET_COOKIE) && !public;
        let may = understood
            && authorized
            && !one_caller
            && !asked.has("no-store")
            && !said.has("no-store")
            && !said.has("private")
            && !answer.contains_key(CONTENT_RANGE);
        if !may {
            return None;
        }
        let no_cache = said.has("no-cache");
        Some(Self {
            fresh_for: match no_cache {
                true => Duration::ZERO,
                false => lifetime.unwrap_or_default(),
            },
            age_at_arrival: age_at_arrival(answer, now),
            arrived: now,
            must_revalidate: no_cache
                || said.has("must-revalidate")
                || said.has("proxy-revalidate")
                || said.has("s-maxage"),
            stale_if_error: said.seconds("stale-if-error"),
            vary: selected_by(answer, request)?,
        })
    }

    /// How old it is (§4.2.3).
    pub fn age(&self, now: UnixMillis) -> Duration {
        let here = now.as_millis().saturating_sub(self.arrived.as_millis());
        self.age_at_arrival + Duration::from_millis(here)
    }

    /// How much longer it is fresh.
    pub fn fresh_until_now(&self, now: UnixMillis) -> Option<Duration> {
        self.fresh_for
            .checked_sub(self.age(now))
            .filter(|left| !left.is_zero())
    }

    /// Whether it may answer a request that asks so without asking the service.
    pub fn satisfies(&self, asked: &Asked, now: UnixMillis) -> bool {
        let age = self.age(now);
        if asked.no_cache || asked.max_age.is_some_and(|most| age > most) {
            return false;
        }
        match self.fresh_until_now(now) {
            Some(left) => asked.min_fresh.is_none_or(|least| left >= least),
            // What must be validated once it is stale outweighs what a request would take (§4.2.4).
            None => {
                let stale_for = age.saturating_sub(self.fresh_for);
                let taken = asked.max_stale.is_some_and(|most| stale_for <= most);
                taken && asked.min_fresh.is_none() && !self.must_revalidate
            }
        }
    }

    /// Whether it may stand in for an error at `now`; `allowed` is what the config adds to what
    /// the answer allows itself.
    pub fn may_stand_in(&self, allowed: Option<Duration>, now: UnixMillis) -> bool {
        let Some(longest) = self.stale_if_error.max(allowed) else {
            return false;
        };
        !self.must_revalidate && self.age(now) < self.fresh_for.saturating_add(longest)
    }

    /// Whether it was chosen by what these fields say too (§4.1).
    pub fn is_selected(&self, request: &HeaderMap) -> bool {
        self.vary
            .iter()
            .all(|(name, values)| request.get_all(name).iter().eq(values))
    }
}

/// What a request says of the answers it takes (§5.2.1).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Asked {
    /// The service must be asked; said by `Pragma` too, where nothing newer is said (§5.4).
    pub no_cache: bool,
    /// The answer must not be kept.
    pub no_store: bool,
    /// The service must not be asked.
    pub only_if_cached: bool,
    /// No older one.
    pub max_age: Option<Duration>,
    /// None that is fresh for less.
    pub min_fresh: Option<Duration>,
    /// One that has been stale for no longer, too.
    pub max_stale: Option<Duration>,
}

impl Asked {
    /// What `request` says.
    pub fn of(request: &HeaderMap) -> Self {
        if !request.contains_key(CACHE_CONTROL) {
            let pragma = request.get(PRAGMA);
            let no_cache = |pragma: &HeaderValue| {
                let pragma = pragma.as_bytes().trim_ascii();
                pragma.eq_ignore_ascii_case(b"no-cache")
            };
            return Self {
                no_cache: pragma.is_some_and(no_cache),
                ..Self::default()
            };
        }
        let said = Directives::of(request);
        Self {
            no_cache: said.has("no-cache"),
            no_store: said.has("no-store"),
            only_if_cached: said.has("only-if-cached"),
            max_age: said.seconds("max-age"),
            min_fresh: said.longest("min-fresh"),
            max_stale: match said.is_bare("max-stale") {
                true => Some(Duration::MAX),
                false => said.seconds("max-stale"),
            },
        }
    }
}

/// Statuses that are kept without a lifetime (RFC 9110 §15.1), but for 206.
const BY_DEFAULT: [u16; 10] = [200, 203, 204, 300, 301, 308, 404, 405, 410, 414];

/// Statuses that are kept with one.
const UNDERSTOOD: [u16; 14] = [
    200, 203, 204, 300, 301, 302, 303, 307, 308, 404, 405, 410, 414, 501,
];

/// §4.2.1: of several the first kind counts, and of one kind the shortest.
fn lifetime(said: &Directives, answer: &HeaderMap, now: UnixMillis) -> Option<Duration> {
    let directive = said.seconds("s-maxage").or_else(|| said.seconds("max-age"));
    if directive.is_some() {
        return directive;
    }
    let expires = answer.get(EXPIRES)?;
    let date = date(answer, DATE, now).unwrap_or(now);
    // A date that is none has passed (§5.3).
    let at = (expires.to_str().ok()).and_then(|text| parse_http_date(text, now));
    let left = at.map_or(0, |at| at.as_millis().saturating_sub(date.as_millis()));
    Some(Duration::from_millis(left))
}

fn age_at_arrival(answer: &HeaderMap, now: UnixMillis) -> Duration {
    let apparent =
        date(answer, DATE, now).map_or(0, |date| now.as_millis().saturating_sub(date.as_millis()));
    let told = answer
        .get(AGE)
        .and_then(|age| delta(age.to_str().ok()?))
        .unwrap_or_default();
    told.max(Duration::from_millis(apparent / 1000 * 1000))
}

fn date(fields: &HeaderMap, name: HeaderName, now: UnixMillis) -> Option<UnixMillis> {
    parse_http_date(fields.get(name)?.to_str().ok()?, now)
}

/// What `Vary` names, with the values of the request; none for `*`.
fn selected_by(
    answer: &HeaderMap,
    request: &HeaderMap,
) -> Option<Vec<(HeaderName, Vec<HeaderValue>)>> {
    let mut names: Vec<HeaderName> = Vec::new();
    for value in answer.get_all(VARY) {
        for name in value.to_str().ok()?.split(',').map(str::trim) {
            if name == "*" {
                return None;
            }
            let name = HeaderName::from_bytes(name.as_bytes()).ok();
            names.extend(name.filter(|name| !names.contains(name)));
        }
    }
    let values = |name: HeaderName| {
        let values = request.get_all(&name).iter().cloned().collect();
        (name, values)
    };
    Some(names.into_iter().map(values).collect())
}

/// Whether a request asks only for what has changed, and nothing has (RFC 9110 §13.2.2).
pub fn not_modified(request: &HeaderMap, kept: &HeaderMap, now: UnixMillis) -> bool {
    if request.contains_key(IF_NONE_MATCH) {
        let Some(tag) = kept.get(ETAG).and_then(|tag| tag.to_str().ok()) else {
            return false;
        };
        let opaque = |tag: &str| tag.trim_start_matches("W/").to_owned();
        let mut tags = request
            .get_all(IF_NONE_MATCH)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .flat_map(|value| value.split(','))
            .map(str::trim);
        return tags.any(|asked| asked == "*" || opaque(asked) == opaque(tag));
    }
    let since = date(request, IF_MODIFIED_SINCE, now);
    let changed = date(kept, LAST_MODIFIED, now);
    matches!((since, changed), (Some(since), Some(changed)) if changed <= since)
}

/// The fields by which the service is asked whether an answer is still good (§4.3.1); none when
/// it has no validator.
pub fn validators(kept: &HeaderMap) -> Option<Vec<(HeaderName, HeaderValue)>> {
    let pairs = [(ETAG, IF_NONE_MATCH), (LAST_MODIFIED, IF_MODIFIED_SINCE)];
    let found: Vec<_> = pairs
        .into_iter()
        .filter_map(|(from, to)| Some((to, kept.get(from)?.clone())))
        .collect();
    (!found.is_empty()).then_some(found)
}

/// The fields of a kept answer after the service called it good (§3.2, §4.3.4): what describes
/// the body stays.
pub fn updated(kept: &HeaderMap, confirmed: &HeaderMap) -> HeaderMap {
    const OF_THE_BODY: [HeaderName; 4] = [
        CONTENT_LENGTH,
        CONTENT_ENCODING,
        CONTENT_RANGE,
        CONTENT_TYPE,
    ];
    let mut fields = kept.clone();
    // Of the old answer, as it came then.
    fields.remove(AGE);
    for name in confirmed.keys().filter(|name| !OF_THE_BODY.contains(name)) {
        fields.remove(name);
        for value in confirmed.get_all(name) {
            fields.append(name, value.clone());
        }
    }
    fields
}

/// `Cache-Control`, in lower case.
struct Directives(Vec<(String, Option<String>)>);

impl Directives {
    fn of(fields: &HeaderMap) -> Self {
        let mut found = Vec::new();
        for value in fields.get_all(CACHE_CONTROL) {
            let text = String::from_utf8_lossy(value.as_bytes());
            for member in members(&text) {
                let (name, value) = match member.split_once('=') {
                    Some((name, value)) => (name, Some(value.trim().trim_matches('"'))),
                    None => (member, None),
                };
                let name = name.trim().to_ascii_lowercase();
                if !name.is_empty() {
                    found.push((name, value.map(str::to_owned)));
                }
            }
        }
        Self(found)
    }

    fn has(&self, name: &str) -> bool {
        self.0.iter().any(|(known, _)| known == name)
    }

    /// Whether it is there, and nowhere with a value.
    fn is_bare(&self, name: &str) -> bool {
        let mut named = self.0.iter().filter(|(known, _)| known == name).peekable();
        named.peek().is_some() && named.all(|(_, value)| value.is_none())
    }

    /// The longest; one that is no number asks for more than anything has.
    fn longest(&self, name: &str) -> Option<Duration> {
        let named = self.0.iter().filter(|(known, _)| known == name);
        named
            .map(|(_, value)| value.as_deref().and_then(delta).unwrap_or(Duration::MAX))
            .max()
    }

    /// The shortest; one that is no number has passed (§4.2.1).
    fn seconds(&self, name: &str) -> Option<Duration> {
        let named = self.0.iter().filter(|(known, _)| known == name);
        named
            .map(|(_, value)| value.as_deref().and_then(delta).unwrap_or_default())
            .min()
    }
}

/// The members of a list, with commas in quotes left alone.
fn members(text: &str) -> impl Iterator<Item = &str> {
    let mut quoted = false;
    text.split(move |c: char| {
        quoted ^= c == '"';
        c == ',' && !quoted
    })
}

fn delta(text: &str) -> Option<Duration> {
    let text = text.trim();
    if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    Some(Duration::from_secs(
        text.parse().unwrap_or(LONGEST).min(LONGEST),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 2026-01-01T00:00:00Z.
    const NOW: UnixMillis = UnixMillis(1_767_225_600_000);

    fn later(seconds: u64) -> UnixMillis {
        UnixMillis(NOW.as_millis() + seconds * 1000)
    }

    fn map(fields: &[(&str, &str)]) -> HeaderMap {
        let mut map = HeaderMap::new();
        for (name, value) in fields {
            map.append(name.parse::<HeaderName>().unwrap(), value.parse().unwrap());
        }
        map
    }

    fn judge(request: &[(&str, &str)], answer: &[(&str, &str)]) -> Option<Kept> {
        Kept::judge(&map(request), StatusCode::OK, &map(answer), NOW)
    }

    #[test]
    fn what_may_be_kept() {
        type Fields = &'static [(&'static str, &'static str)];
        let auth: Fields = &[("authorization", "x")];
        let rows: [(Fields, Fields, Option<u64>); 24] = [
            (&[], &[("cache-control", "max-age=60")], Some(60)),
            (&[], &[("Cache-Control", "MAX-AGE=\"60\"")], Some(60)),
            (&[], &[("cache-control", "max-age=60, s-maxage=5")], Some(5)),
            (&[], &[("cache-control", "max-age=60, max-age=5")], Some(5)),
            (&[], &[("cache-control", "max-age=soon")], Some(0)),
            (
                &[],
                &[("cache-control", "max-age=99999999999999999999")],
                Some(LONGEST),
            ),
            (&[], &[], Some(0)),
            (&[], &[("cache-control", "no-cache, max-age=60")], Some(0)),
            (&[], &[("cache-control", "no-store")], None),
            (&[], &[("cache-control", "private, max-age=60")], None),
            (
                &[],
                &[("cache-control", "private=\"a, b\", max-age=60")],
                None,
            ),
            (
                &[],
                &[("cache-control", "x=\"no-store\", max-age=60")],
                Some(60),
            ),
            (
                &[("cache-control", "no-store")],
                &[("cache-control", "max-age=60")],
                None,
            ),
            (auth, &[("cache-control", "max-age=60")], None),
            (auth, &[("cache-control", "max-age=60, public")], Some(60)),
            (auth, &[("cache-control", "s-maxage=60")], Some(60)),
            (
                auth,
                &[("cache-control", "max-age=60, must-revalidate")],
                Some(60),
            ),
            (
                &[],
                &[("cache-control", "max-age=60"), ("set-cookie", "a=b")],
                None,
            ),
            (
                &[],
                &[
                    ("cache-control", "max-age=60, public"),
                    ("set-cookie", "a=b"),
                ],
                Some(60),
            ),
            (&[], &[("cache-control", "max-age=60"), ("vary", "*")], None),
            (
                &[],
                &[("expires", "Thu, 01 Jan 2026 00:01:00 GMT")],
                Some(60),
            ),
            (
                &[],
                &[
                    ("expires", "Thu, 01 Jan 2026 00:01:00 GMT"),
                    ("date", "Wed, 31 Dec 2025 23:59:00 GMT"),
                ],
                Some(120),
            ),
            (&[], &[("expires", "0")], Some(0)),
            (
                &[],
                &[
                    ("expires", "Thu, 01 Jan 2026 00:01:00 GMT"),
                    ("cache-control", "max-age=5"),
                ],
                Some(5),
            ),
        ];
        for (request, answer, expected) in rows {
            let kept = judge(request, answer);
            let seconds = kept.map(|kept| kept.fresh_for.as_secs());
            assert_eq!(seconds, expected, "{request:?} {answer:?}");
        }
        let status = |status, fields: &[(&str, &str)]| {
            let status = StatusCode::from_u16(status).unwrap();
            Kept::judge(&map(&[]), status, &map(fields), NOW).is_some()
        };
        let lasting = [("cache-control", "max-age=60")];
        assert!(status(404, &[]) && status(302, &lasting));
        assert!(!status(302, &[]) && !status(500, &lasting) && !status(206, &lasting));
    }

    #[test]
    fn age_counts_what_it_was_when_it_came() {
        let kept = judge(&[], &[("cache-control", "max-age=60"), ("age", "20")]).unwrap();
        assert_eq!(kept.age(later(5)).as_secs(), 25);
        assert!(kept.satisfies(&Asked::default(), later(39)));
        assert!(!kept.satisfies(&Asked::default(), later(40)));
        let dated = [
            ("cache-control", "max-age=60"),
            ("date", "Wed, 31 Dec 2025 23:59:30 GMT"),
        ];
        assert_eq!(judge(&[], &dated).unwrap().age(NOW).as_secs(), 30);
    }

    #[test]
    fn a_request_may_ask_for_more() {
        let kept = judge(&[], &[("cache-control", "max-age=60")]).unwrap();
        let satisfied =
            |fields: &[(&str, &str)]| kept.satisfies(&Asked::of(&map(fields)), later(30));
        assert!(satisfied(&[]) && satisfied(&[("cache-control", "max-age=30")]));
        assert!(!satisfied(&[("cache-control", "no-cache")]));
        assert!(!satisfied(&[("cache-control", "max-age=29")]));
        assert!(satisfied(&[("cache-control", "min-fresh=30")]));
        assert!(!satisfied(&[("cache-control", "min-fresh=31")]));
        assert!(!satisfied(&[("cache-control", "min-fresh=soon")]));
        assert!(satisfied(&[("cache-control", "no-store, only-if-cached")]));
        assert!(!satisfied(&[("pragma", "no-cache")]));
        assert!(satisfied(&[
            ("pragma", "no-cache"),
            ("cache-control", "max-age=40")
        ]));
    }

    #[test]
    fn a_request_may_take_what_is_stale() {
        let taken = |said: &str, asked: &str, at| {
            let kept = judge(&[], &[("cache-control", said)]).unwrap();
            kept.satisfies(&Asked::of(&map(&[("cache-control", asked)])), later(at))
        };
        assert!(taken("max-age=10", "max-stale=5", 15));
        assert!(!taken("max-age=10", "max-stale=5", 16));
        assert!(taken("max-age=10", "max-stale", 100_000));
        assert!(!taken("max-age=10", "max-stale=long", 11));
        assert!(!taken("max-age=10", "max-stale=9, max-stale=5", 16));
        assert!(!taken("max-age=10", "max-stale, max-age=12", 13));
        assert!(!taken("max-age=10", "max-stale, min-fresh=1", 11));
        assert!(!taken("max-age=10", "max-stale, no-cache", 5));
        for strict in ["must-revalidate", "s-maxage=10", "no-cache"] {
            let said = format!("max-age=10, {strict}");
            assert!(!taken(&said, "max-stale", 11), "{strict}");
        }
    }

    #[test]
    fn what_is_stale_stands_in_only_where_it_may() {
        let minute = Some(Duration::from_secs(60));
        let stands = |said: &str, allowed, at| {
            let kept = judge(&[], &[("cache-control", said)]).unwrap();
            kept.may_stand_in(allowed, later(at))
        };
        assert!(stands("max-age=10", minute, 69) && !stands("max-age=10", minute, 70));
        assert!(!stands("max-age=10", None, 11));
        assert!(stands("max-age=10, stale-if-error=100", None, 100));
        for strict in [
            "must-revalidate",
            "proxy-revalidate",
            "s-maxage=10",
            "no-cache",
        ] {
            assert!(
                !stands(&format!("max-age=10, {strict}"), minute, 11),
                "{strict}"
            );
        }
    }

    #[test]
    fn answers_are_chosen_by_what_they_vary_on() {
        let answer = [
            ("vary", "Accept-Language, x-b"),
            ("cache-control", "max-age=60"),
        ];
        let kept = judge(&[("accept-language", "de"), ("x-a", "1")], &answer).unwrap();
        assert!(kept.is_selected(&map(&[("accept-language", "de"), ("x-a", "2")])));
        assert!(!kept.is_selected(&map(&[("accept-language", "en")])));
        assert!(!kept.is_selected(&map(&[("accept-language", "de"), ("x-b", "")])));
        assert!(!kept.is_selected(&HeaderMap::new()));
    }

    #[test]
    fn conditions_are_met_by_tag_before_date() {
        let kept = map(&[
            ("etag", "W/\"a\""),
            ("last-modified", "Wed, 31 Dec 2025 00:00:00 GMT"),
        ]);
        let met = |fields: &[(&str, &str)]| not_modified(&map(fields), &kept, NOW);
        let since = ("if-modified-since", "Wed, 31 Dec 2025 00:00:00 GMT");
        assert!(met(&[("if-none-match", "\"b\", \"a\"")]) && met(&[("if-none-match", "*")]));
        assert!(!met(&[("if-none-match", "\"b\""), since]));
        assert!(met(&[since]));
        assert!(!met(&[(
            "if-modified-since",
            "Tue, 30 Dec 2025 00:00:00 GMT"
        )]));
        assert!(!met(&[]));
    }

    #[test]
    fn a_confirmed_answer_keeps_its_body_and_takes_the_new_fields() {
        let kept = map(&[
            ("content-length", "5"),
            ("age", "9"),
            ("x-a", "1"),
            ("link", "a"),
        ]);
        let fresh = map(&[("content-length", "0"), ("x-a", "2"), ("x-a", "3")]);
        let expected = map(&[
            ("content-length", "5"),
            ("x-a", "2"),
            ("x-a", "3"),
            ("link", "a"),
        ]);
        assert_eq!(updated(&kept, &fresh), expected);
    }
}
