//! One form for every spelling of a path, before it is matched, authorized and forwarded.
//!
//! Owns the rules; which of them are in force is the bootstrap's `wire.pathNormalization`. What
//! is forwarded is what was matched: a rule for `/admin` cannot be passed by as `/x/../admin` or
//! `/%61dmin`. Left alone are the query, the case of hexadecimal digits, escapes of anything but
//! the letters that need none (RFC 3986 §2.3), double escapes (`%252e`: an application that
//! decodes twice is on its own), and path parameters (`..;`). On the request's life.

use std::borrow::Cow;

/// What is done to a path; Istio's words, and Envoy's order: decode, dot segments, merge.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Normalization {
    /// Nothing.
    None,
    /// RFC 3986 §6.2.2: unreserved letters decoded, dot segments removed; backslashes become
    /// slashes (WHATWG URL). `%2F` stays: it is data inside a segment.
    #[default]
    Base,
    /// [`Normalization::Base`], and several slashes become one.
    MergeSlashes,
    /// [`Normalization::MergeSlashes`] after `%2F` and `%5C` became slashes, for applications that
    /// take them for such.
    DecodeAndMergeSlashes,
}

/// A path that no two readers would understand alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadPath {
    /// `%00`: ends a string in some languages.
    Nul,
    /// A `%` without two hexadecimal digits, where escapes are decoded.
    Escape,
}

impl std::fmt::Display for BadPath {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Nul => "the path contains an encoded NUL",
            Self::Escape => "the path contains a % without two hexadecimal digits",
        })
    }
}

impl std::error::Error for BadPath {}

/// Brings a path (without query) into its normal form; borrows when it has it already. Anything
/// that does not begin with a slash (`*`, nothing) is no path and comes back as it is.
///
/// The result begins with a slash, has no dot segments, and is its own normal form. A `..` above
/// the root is dropped (RFC 3986 §5.2.4).
///
/// # Errors
/// [`BadPath`]; never with [`Normalization::None`].
pub fn normalize(path: &str, how: Normalization) -> Result<Cow<'_, str>, BadPath> {
    if how == Normalization::None || !path.starts_with('/') || !needs_work(path, how)? {
        return Ok(Cow::Borrowed(path));
    }
    let path = remove_dot_segments(&decode(path, how));
    Ok(Cow::Owned(match merges(how) {
        true => merge_slashes(&path),
        false => path,
    }))
}

fn merges(how: Normalization) -> bool {
    matches!(
        how,
        Normalization::MergeSlashes | Normalization::DecodeAndMergeSlashes
    )
}

/// What an escape stands for under these rules.
enum Escape {
    /// Written without one.
    Plain(u8),
    /// Stays as it is.
    Stays,
}

/// One pass over the bytes: whether anything would change, and what is refused.
fn needs_work(path: &str, how: Normalization) -> Result<bool, BadPath> {
    let bytes = path.as_bytes();
    let mut needed = false;
    for (at, byte) in bytes.iter().enumerate() {
        match byte {
            b'\\' => needed = true,
            b'%' => match escape(&bytes[at..], how)? {
                Some(Escape::Plain(_)) => needed = true,
                Some(Escape::Stays) | None => {}
            },
            b'/' => {
                let rest = &bytes[at + 1..];
                needed |= merges(how) && rest.first() == Some(&b'/');
                needed |= matches!(rest, [b'.'] | [b'.', b'/', ..]);
                needed |= matches!(rest, [b'.', b'.'] | [b'.', b'.', b'/', ..]);
            }
            _ => {}
        }
    }
    Ok(needed)
}

/// Reads the escape that `bytes` begin with; none when it is none.
fn escape(bytes: &[u8], how: Normalization) -> Result<Option<Escape>, BadPath> {
    let decodes = how == Normalization::DecodeAndMergeSlashes;
    let digit = |at: usize| bytes.get(at).and_then(|b| char::from(*b).to_digit(16));
    let (Some(high), Some(low)) = (digit(1), digit(2)) else {
        return if decodes {
            Err(BadPath::Escape)
        } else {
            Ok(None)
        };
    };
    let byte = u8::try_from(high * 16 + low).expect("two hexadecimal digits are a byte");
    match byte {
        0 => Err(BadPath::Nul),
        b'/' | b'\\' if decodes => Ok(Some(Escape::Plain(b'/'))),
        b if b.is_ascii_alphanumeric() || b"-._~".contains(&b) => Ok(Some(Escape::Plain(b))),
        _ => Ok(Some(Escape::Stays)),
    }
}

fn decode(path: &str, how: Normalization) -> String {
    let bytes = path.as_bytes();
    let mut decoded = Vec::with_capacity(bytes.len());
    // Where the output has a `%` that begins no escape: no digit may be decoded that would make
    // one of it (`%%32e` is not `%2e`). A dot is no digit, and after anything else none is near.
    let mut stray = None;
    let mut at = 0;
    while let Some(byte) = bytes.get(at) {
        let completes = |plain: u8| {
            let near = |stray| decoded.len() - stray <= 2;
            plain.is_ascii_hexdigit()
                && stray
                    .filter(|stray| near(*stray))
                    .is_some_and(|stray| decoded[stray + 1..].iter().all(u8::is_ascii_hexdigit))
        };
        match byte {
            b'\\' => decoded.push(b'/'),
            b'%' => match escape(&bytes[at..], how) {
                Ok(Some(Escape::Plain(plain))) if !completes(plain) => {
                    decoded.push(plain);
                    at += 2;
                }
                Ok(Some(_)) => {
                    decoded.extend_from_slice(&bytes[at..at + 3]);
                    at += 2;
                }
                Ok(None) | Err(_) => {
                    stray = Some(decoded.len());
                    decoded.push(b'%');
                }
            },
            other => decoded.push(*other),
        }
        at += 1;
    }
    String::from_utf8(decoded).expect("ASCII took the place of ASCII")
}

/// RFC 3986 §5.2.4 for a path that begins with a slash; an empty segment is one.
fn remove_dot_segments(path: &str) -> String {
    let mut out = String::with_capacity(path.len());
    let mut segments = path.split('/').skip(1).peekable();
    while let Some(segment) = segments.next() {
        let last = segments.peek().is_none();
        match segment {
            "." => {}
            ".." => out.truncate(out.rfind('/').unwrap_or(0)),
            kept => {
                out.push('/');
                out.push_str(kept);
                continue;
            }
        }
        if last {
            out.push('/');
        }
    }
    if out.is_empty() {
        out.push('/');
    }
    out
}

fn merge_slashes(path: &str) -> String {
    let mut out = String::with_capacity(path.len());
    for letter in path.chars() {
        if letter != '/' || !out.ends_with('/') {
            out.push(letter);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use Normalization::{Base, DecodeAndMergeSlashes, MergeSlashes, None};
    use proptest::prelude::*;

    #[test]
    fn every_spelling_has_one_form() {
        let check = |path: &str, how, expected: &str| {
            assert_eq!(
                normalize(path, how).as_deref(),
                Ok(expected),
                "{path} {how:?}"
            );
        };
        for (path, expected) in [
            ("/", "/"),
            ("/a/b", "/a/b"),
            ("/a/./b", "/a/b"),
            ("/a/../b", "/b"),
            ("/a/..", "/"),
            ("/a/b/..", "/a/"),
            ("/a/.", "/a/"),
            ("/..", "/"),
            ("/../../etc", "/etc"),
            ("/a/%2e%2e/b", "/b"),
            ("/a/.%2E/b", "/b"),
            ("/a/%2e/b", "/a/b"),
            ("/%61dmin/%7Ea", "/admin/~a"),
            ("/a\\..\\b", "/b"),
            ("/a//b", "/a//b"),
            ("/a//../b", "/a/b"),
            ("/a/...", "/a/..."),
            ("/a/.b/..c", "/a/.b/..c"),
            ("/a/..;/b", "/a/..;/b"),
            ("/a%2fb%5c%3f%c3%a9", "/a%2fb%5c%3f%c3%a9"),
            ("/é/../x", "/x"),
            ("/%252e%252e/a", "/%252e%252e/a"),
            ("/%zz%", "/%zz%"),
            ("/%%32e%%32e/a", "/%%32e%%32e/a"),
            ("/%2%65/a", "/%2%65/a"),
            ("/%/%2e%2e/admin", "/admin"),
            ("/a%/%2e", "/a%/"),
            ("/%g%32", "/%g2"),
            ("/%1%32", "/%1%32"),
            ("*", "*"),
            ("", ""),
        ] {
            check(path, Base, expected);
        }
        check("/a//b///c//", MergeSlashes, "/a/b/c/");
        check("/a//../b", MergeSlashes, "/a/b");
        check("//a", MergeSlashes, "/a");
        check("/a%2fb", MergeSlashes, "/a%2fb");
        check("/a%2F%2fb%5C..%5cc", DecodeAndMergeSlashes, "/a/c");
        check("/a/..%2f..%2fetc", DecodeAndMergeSlashes, "/etc");
        check("/a/%252f", DecodeAndMergeSlashes, "/a/%252f");
        check("/a/..//%2e%zz%00", None, "/a/..//%2e%zz%00");
    }

    #[test]
    fn what_readers_understand_differently_is_refused() {
        for how in [Base, MergeSlashes, DecodeAndMergeSlashes] {
            assert_eq!(normalize("/a%00.png", how), Err(BadPath::Nul), "{how:?}");
        }
        for path in ["/%", "/%2", "/%zz", "/%%32e", "/a%u002f"] {
            let refused = normalize(path, DecodeAndMergeSlashes);
            assert_eq!(refused, Err(BadPath::Escape), "{path}");
        }
    }

    #[test]
    fn nothing_is_allocated_for_a_normal_path() {
        for path in ["/", "/v1/orders/17", "/a.b/..c/%C3%A9%2F", "/a;x=.."] {
            let normal = normalize(path, MergeSlashes);
            assert!(matches!(normal, Ok(Cow::Borrowed(_))), "{path}");
        }
    }

    fn any_rule() -> impl Strategy<Value = Normalization> {
        prop::sample::select(vec![None, Base, MergeSlashes, DecodeAndMergeSlashes])
    }

    fn a_rule_that_changes() -> impl Strategy<Value = Normalization> {
        prop::sample::select(vec![Base, MergeSlashes, DecodeAndMergeSlashes])
    }

    /// What an attacker would combine.
    fn spelling() -> impl Strategy<Value = String> {
        let pieces = [
            "/", "\\", ".", "..", "%2e", "%2E", "%2f", "%5C", "%", "%2", "%25", "%32", "%65", "2",
            "e", "a", ";", "%00", "%61", "é", "%c3", "f",
        ];
        prop::collection::vec(prop::sample::select(pieces.to_vec()), 0..14)
            .prop_map(|pieces| format!("/{}", pieces.concat()))
    }

    /// What a reader that decodes once makes of a path: its segments.
    fn read(path: &str, slashes: bool) -> Vec<Vec<u8>> {
        let mut bytes = Vec::new();
        let mut rest = path.as_bytes();
        while let [first, tail @ ..] = rest {
            let digits = tail.get(..2).and_then(|two| std::str::from_utf8(two).ok());
            let digits = digits.filter(|two| two.bytes().all(|b| b.is_ascii_hexdigit()));
            match digits.and_then(|two| u8::from_str_radix(two, 16).ok()) {
                Some(byte) if *first == b'%' && (slashes || !b"/\\".contains(&byte)) => {
                    bytes.push(byte);
                    rest = &tail[2..];
                }
                _ => {
                    bytes.push(*first);
                    rest = tail;
                }
            }
        }
        let separator = |b: &u8| *b == b'/' || *b == b'\\';
        bytes.split(separator).map(<[u8]>::to_vec).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: Option::None, ..Default::default() })]

        #[test]
        fn the_normal_form_is_its_own(path in spelling(), how in any_rule()) {
            if let Ok(once) = normalize(&path, how) {
                let twice = normalize(&once, how);
                prop_assert_eq!(twice.as_deref(), Ok(once.as_ref()));
            }
        }

        #[test]
        fn no_reader_finds_a_way_up(path in spelling(), how in a_rule_that_changes()) {
            if let Ok(normal) = normalize(&path, how) {
                prop_assert!(normal.starts_with('/'));
                let segments = read(&normal, how == DecodeAndMergeSlashes);
                prop_assert!(!segments.iter().any(|s| s == b".." || s == b"."), "{normal}");
                prop_assert!(!merges(how) || !normal.contains("//"), "{normal}");
            }
        }

        #[test]
        fn no_text_panics(path in "\\PC{0,40}", how in any_rule()) {
            let _ = normalize(&path, how);
        }
    }
}
