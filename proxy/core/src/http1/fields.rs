//! Lines and header fields.
//!
//! Owns where a section of lines ends and how a field line is read. What a field means for the
//! message is its caller's: every field is shown to it first.

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue};
use memchr::{memchr, memchr_iter, memchr2};

use super::{Limits, Malformed};

/// Room for what a hop adds (request id, trace, forwarded-for), so that the map does not grow.
const ADDED_BY_A_HOP: usize = 4;

/// Bytes of a token (RFC 9110 §5.6.2).
pub(super) static TOKEN: [bool; 256] = table(b"!#$%&'*+-.^_`|~");

/// Letters, digits and `others`.
pub(super) const fn table(others: &[u8]) -> [bool; 256] {
    let mut table = [false; 256];
    let mut byte = 0;
    while byte < 128 {
        table[byte] = (byte as u8).is_ascii_alphanumeric();
        byte += 1;
    }
    let mut index = 0;
    while index < others.len() {
        table[others[index] as usize] = true;
        index += 1;
    }
    table
}

/// What an empty first line is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum EmptyFirstLine {
    /// Skipped once: clients were known to send one between requests.
    Skipped,
    /// The end: a trailer section without fields.
    Ends,
}

/// The length of a complete section of lines, with the empty line that ends it. `searched` is
/// where to go on when more bytes are there.
///
/// Looks at no byte beyond the limit, so that the verdict is the same however the bytes arrive.
pub(super) fn section_end(
    bytes: &[u8],
    searched: &mut usize,
    first: EmptyFirstLine,
    limits: &Limits,
) -> Result<Option<usize>, Malformed> {
    let within = &bytes[..bytes.len().min(limits.max_head_bytes)];
    let mut at = *searched;
    loop {
        let Some(offset) = within
            .get(at..)
            .and_then(|rest| memchr2(b'\r', b'\n', rest))
        else {
            *searched = within.len();
            break;
        };
        let end_of_line = at + offset;
        if within[end_of_line] == b'\n' {
            return Err(Malformed::Syntax("line feed without carriage return"));
        }
        match within.get(end_of_line + 1) {
            None => {
                *searched = end_of_line;
                break;
            }
            Some(b'\n') => at = end_of_line + 2,
            Some(_) => return Err(Malformed::Syntax("carriage return without line feed")),
        }
        // Every line feed so far ended a line, so one right before makes this line empty.
        let is_first = end_of_line == 0;
        let is_empty = is_first || within[end_of_line - 1] == b'\n';
        if !is_empty || (is_first && first == EmptyFirstLine::Skipped) {
            continue;
        }
        if end_of_line == 2 && first == EmptyFirstLine::Skipped {
            return Err(Malformed::Syntax("several empty lines before the head"));
        }
        *searched = at;
        return Ok(Some(at));
    }
    match bytes.len() < limits.max_head_bytes {
        true => Ok(None),
        false => Err(Malformed::HeadTooLarge),
    }
}

/// Where the line that starts at `from` ends: the position of its CRLF.
pub(super) fn line_end(bytes: &[u8], from: usize) -> Result<usize, Malformed> {
    let end = memchr(b'\r', &bytes[from..])
        .map(|offset| from + offset)
        .ok_or(Malformed::Syntax("no empty line at the end of the fields"))?;
    match bytes.get(end + 1) {
        Some(b'\n') => Ok(end),
        _ => Err(Malformed::Syntax("carriage return without line feed")),
    }
}

/// Whether a field goes into the map.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Keep {
    Yes,
    No,
}

/// Reads field lines from `from` to the empty line, with which `section` must end. Values are
/// slices of `section`; each field is shown to `inspect` as name and value before it is kept.
pub(super) fn parse_fields(
    section: &Bytes,
    from: usize,
    limits: &Limits,
    mut inspect: impl FnMut(&[u8], &[u8]) -> Result<Keep, Malformed>,
) -> Result<HeaderMap, Malformed> {
    let count = memchr_iter(b'\n', &section[from..]).count();
    let count = count.saturating_sub(1);
    if count > limits.max_fields {
        return Err(Malformed::TooManyFields);
    }
    let mut fields = HeaderMap::try_with_capacity(match count {
        0 => 0,
        _ => count + ADDED_BY_A_HOP,
    })
    .map_err(|_| Malformed::TooManyFields)?;
    let mut at = from;
    loop {
        let end = line_end(section, at)?;
        if end == at {
            break;
        }
        let line = &section[at..end];
        let colon = name_end(line, at == from)?;
        let (start, length) = trim(&line[colon + 1..]);
        let start = at + colon + 1 + start;
        // A field that is not kept must be right too.
        let value = HeaderValue::from_maybe_shared(section.slice(start..start + length))
            .map_err(|_| Malformed::Syntax("control character in a field value"))?;
        if inspect(&line[..colon], value.as_bytes())? == Keep::Yes {
            let name = HeaderName::from_bytes(&line[..colon])
                .map_err(|_| Malformed::Syntax("field name too long"))?;
            fields
                .try_append(name, value)
                .map_err(|_| Malformed::TooManyFields)?;
        }
        at = end + 2;
    }
    match at + 2 == section.len() {
        true => Ok(fields),
        false => Err(Malformed::Syntax("bytes after the empty line")),
    }
}

/// The position of the colon of a field line.
fn name_end(line: &[u8], is_first: bool) -> Result<usize, Malformed> {
    let end = line
        .iter()
        .position(|&byte| !TOKEN[usize::from(byte)])
        .unwrap_or(line.len());
    let what = match (end, line.get(end)) {
        (1.., Some(b':')) => return Ok(end),
        (0, Some(b':')) => "empty field name",
        (0, Some(b' ' | b'\t')) if is_first => "whitespace before the first field",
        (0, Some(b' ' | b'\t')) => "folded field value",
        (_, Some(b' ' | b'\t')) => "whitespace in or after a field name",
        (_, None) => "field line without colon",
        _ => "field name is not a token",
    };
    Err(Malformed::Syntax(what))
}

/// Start and length of `value` without the optional whitespace around it.
fn trim(value: &[u8]) -> (usize, usize) {
    let is_text = |byte: &u8| !matches!(byte, b' ' | b'\t');
    let Some(start) = value.iter().position(is_text) else {
        return (0, 0);
    };
    let end = value
        .iter()
        .rposition(is_text)
        .map_or(start, |last| last + 1);
    (start, end - start)
}

/// The members of a comma-separated list, without the whitespace around them.
pub(super) fn members(value: &[u8]) -> impl Iterator<Item = &[u8]> {
    value
        .split(|&byte| byte == b',')
        .map(<[u8]>::trim_ascii)
        .filter(|member| !member.is_empty())
}
