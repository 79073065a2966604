//! Whatever arrives, in whatever pieces: no panic, one verdict, and nothing that the next parser
//! would read otherwise.

use http::{HeaderName, HeaderValue, StatusCode, Version};
use proptest::prelude::*;

use super::*;

/// Small enough for generated input to run into.
const SMALL: Limits = Limits {
    max_fields: 6,
    max_head_bytes: 160,
};

/// Bits of messages that put together are nearly right.
const HEAD_PARTS: [&str; 34] = [
    "GET / HTTP/1.1\r\n",
    "POST http://a:80/b?c HTTP/1.1\r\n",
    "CONNECT a:80 HTTP/1.1\r\n",
    "HTTP/1.1 200 OK\r\n",
    "HTTP/1.0 204\r\n",
    "Host: a\r\n",
    "Content-Length: 1\r\n",
    "Content-Length: 2, 2\r\n",
    "Transfer-Encoding: chunked\r\n",
    "transfer-encoding : chunked\r\n",
    "Connection: close, upgrade\r\n",
    "Upgrade: x\r\n",
    "Expect: 100-continue\r\n",
    "a:b\r\n",
    "x-long: 0123456789012345678901234567890123456789\r\n",
    "\r\n",
    "\r\n\r\n",
    "\r",
    "\n",
    " ",
    "\t",
    ":",
    ",",
    "\0",
    "\u{e9}",
    "GET",
    "/",
    "#",
    "*",
    "@",
    "HTTP/1.1",
    "chunked",
    "1",
    "a",
];

const CHUNK_PARTS: [&str; 20] = [
    "1\r\nx\r\n",
    "a;b=c\r\n0123456789\r\n",
    "5\r\nabcde\r\n",
    "3\r\n\r\n\r\r\n",
    "0\r\n",
    "0\r\n\r\n",
    "\r\n",
    "a: b\r\n",
    "Host: b\r\n",
    "x: 01234567890123456789012345678901234567890123456789\r\n",
    "ffffffffffffffff\r\n",
    "0000000000000000",
    ";",
    "f",
    "1",
    "\r",
    "\n",
    " ",
    "\0",
    "next",
];

/// Parts after each other, or any bytes.
fn bytes_of(parts: &'static [&'static str]) -> impl Strategy<Value = Vec<u8>> {
    let joined = prop::collection::vec(prop::sample::select(parts), 0..16)
        .prop_map(|parts| parts.concat().into_bytes());
    let padded = (joined.clone(), 0_usize..40, joined.clone()).prop_map(|(start, count, end)| {
        [
            start,
            b"1;padding-of-an-extension\r\nx\r\n".repeat(count),
            end,
        ]
        .concat()
    });
    let noise = prop::collection::vec(any::<u8>(), 0..200);
    prop_oneof![6 => joined, 1 => padded, 1 => noise]
}

/// A head that is right, and then has some bytes replaced, put in or taken out.
fn nearly_a_head(start: &'static [&'static str]) -> impl Strategy<Value = Vec<u8>> {
    let fields = prop::collection::vec(prop::sample::select(&HEAD_PARTS[5..15]), 0..4);
    let edits = prop::collection::vec((any::<prop::sample::Index>(), 0..3, any::<u8>()), 0..3);
    (prop::sample::select(start), fields, edits).prop_map(|(start, fields, edits)| {
        let mut bytes = format!("{start}Host: a\r\n{}\r\n", fields.concat()).into_bytes();
        for (index, kind, byte) in edits {
            let at = index.index(bytes.len());
            match kind {
                0 => bytes[at] = byte,
                1 => bytes.insert(at, byte),
                _ => drop(bytes.remove(at)),
            }
        }
        bytes
    })
}

/// Cuts `bytes` at `cuts`, in order.
fn pieces<'a>(bytes: &'a [u8], cuts: &[prop::sample::Index]) -> Vec<&'a [u8]> {
    let mut ends: Vec<usize> = cuts.iter().map(|cut| cut.index(bytes.len() + 1)).collect();
    ends.push(bytes.len());
    ends.sort_unstable();
    let mut start = 0;
    let cut = |end| {
        let piece = &bytes[start..end];
        start = end;
        piece
    };
    ends.into_iter().map(cut).collect()
}

fn cuts() -> impl Strategy<Value = Vec<prop::sample::Index>> {
    prop::collection::vec(any::<prop::sample::Index>(), 0..8)
}

fn framing() -> impl Strategy<Value = Framing> {
    prop_oneof![
        1 => Just(Framing::Empty),
        1 => (0_u64..300).prop_map(Framing::Length),
        1 => Just(Framing::UntilClose),
        4 => Just(Framing::Chunked),
    ]
}

fn find_in(pieces: &[&[u8]], limits: &Limits) -> Result<Option<usize>, Malformed> {
    let mut bytes = Vec::new();
    let mut searched = 0;
    for piece in pieces {
        bytes.extend_from_slice(piece);
        if let Some(end) = find_end(&bytes, &mut searched, limits)? {
            return Ok(Some(end));
        }
    }
    Ok(None)
}

/// Fields that neither frame nor route, so that they are to come back as they are.
fn plain_fields() -> impl Strategy<Value = HeaderMap> {
    let name = "x-[a-z0-9!#$%&'*+.^_`|~-]{0,12}|accept|user-agent|cookie|date";
    let value = "([!-~\u{80}-\u{ff}]([ -~\t]{0,20}[!-~])?)?";
    prop::collection::vec((name, value), 0..12).prop_map(|fields| {
        fields
            .iter()
            .map(|(name, value)| {
                let name = HeaderName::from_bytes(name.as_bytes()).unwrap();
                (name, HeaderValue::from_bytes(value.as_bytes()).unwrap())
            })
            .collect()
    })
}

/// Framing as it would come from the other side, to be left out when writing.
fn with_stale_framing(mut fields: HeaderMap) -> HeaderMap {
    fields.append("content-length", HeaderValue::from_static("99"));
    fields.append("transfer-encoding", HeaderValue::from_static("gzip"));
    fields
}

fn without_ours(mut fields: HeaderMap) -> HeaderMap {
    for name in ["host", "content-length", "transfer-encoding", "connection"] {
        fields.remove(name);
    }
    fields
}

/// Asserts that httparse reads the same fields.
fn check_fields(theirs: &[httparse::Header<'_>], ours: &HeaderMap) {
    for (name, values) in ours.keys().map(|name| (name, ours.get_all(name))) {
        let ours: Vec<&[u8]> = values.iter().map(HeaderValue::as_bytes).collect();
        let theirs: Vec<&[u8]> = theirs
            .iter()
            .filter(|field| field.name.eq_ignore_ascii_case(name.as_str()))
            .map(|field| field.value)
            .collect();
        assert_eq!(ours, theirs, "{name}");
    }
}

/// Whether httparse reads the whole of `bytes` as the same request.
fn check_request(bytes: &[u8], ours: &RequestHead) {
    let mut fields = [httparse::EMPTY_HEADER; 128];
    let mut theirs = httparse::Request::new(&mut fields);
    let status = theirs.parse(bytes);
    assert_eq!(status, Ok(httparse::Status::Complete(bytes.len())));
    assert_eq!(theirs.method, Some(ours.method.as_str()));
    assert_eq!(theirs.version == Some(1), ours.version == Version::HTTP_11);
    check_fields(theirs.headers, &ours.headers);
}

fn check_response(bytes: &[u8], ours: &ResponseHead) {
    let mut fields = [httparse::EMPTY_HEADER; 128];
    let mut theirs = httparse::Response::new(&mut fields);
    let status = theirs.parse(bytes);
    assert_eq!(status, Ok(httparse::Status::Complete(bytes.len())));
    assert_eq!(theirs.code, Some(ours.status.as_u16()));
    assert_eq!(theirs.version == Some(1), ours.version == Version::HTTP_11);
    check_fields(theirs.headers, &ours.headers);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn pieces_do_not_change_where_a_head_ends(bytes in bytes_of(&HEAD_PARTS), cuts in cuts()) {
        let found = find_end(&bytes, &mut 0, &SMALL);
        prop_assert_eq!(find_in(&pieces(&bytes, &cuts), &SMALL), found);
        let single: Vec<&[u8]> = bytes.chunks(1).collect();
        prop_assert_eq!(find_in(&single, &SMALL), found);
    }

    #[test]
    fn pieces_do_not_change_what_is_decoded(
        framing in framing(), bytes in bytes_of(&CHUNK_PARTS), cuts in cuts(),
    ) {
        let whole = decode(framing, &SMALL, [&bytes[..]]);
        prop_assert_eq!(&decode(framing, &SMALL, pieces(&bytes, &cuts)), &whole);
        prop_assert_eq!(&decode(framing, &SMALL, bytes.chunks(1)), &whole);
        if let Ok(decoded) = whole {
            let taken = bytes.len() - decoded.left.len();
            prop_assert!(decoded.content.len() <= taken);
            prop_assert!(bytes.ends_with(&decoded.left));
            match framing {
                Framing::Empty => prop_assert!(decoded.ended && taken == 0),
                Framing::Length(length) => {
                    prop_assert_eq!(taken as u64, length.min(bytes.len() as u64));
                    prop_assert_eq!(decoded.ended, taken as u64 == length);
                }
                Framing::UntilClose => prop_assert_eq!(taken, bytes.len()),
                Framing::Chunked => {}
            }
        }
    }

    #[test]
    fn a_broken_body_stays_broken(bytes in bytes_of(&CHUNK_PARTS), more in any::<[u8; 8]>()) {
        let mut decoder = Decoder::new(Framing::Chunked, &SMALL);
        let mut buf = BytesMut::from(&bytes[..]);
        let mut error = None;
        for _ in 0..=2 * bytes.len() {
            match decoder.decode(&mut buf) {
                Err(found) => {
                    error = Some(found);
                    break;
                }
                Ok(Item::More | Item::End) => break,
                Ok(_) => {}
            }
        }
        if let Some(error) = error {
            prop_assert_eq!(decoder.decode(&mut buf), Err(error));
            buf.extend_from_slice(&more);
            prop_assert_eq!(decoder.decode(&mut buf), Err(error));
            prop_assert_eq!(decoder.at_eof(), Err(error));
            prop_assert!(!decoder.is_ended());
        }
    }

    #[test]
    fn what_is_no_head_is_refused_without_a_panic(bytes in bytes_of(&HEAD_PARTS)) {
        let bytes = Bytes::from(bytes);
        let request = parse_request(bytes.clone(), &SMALL);
        let response = parse_response(bytes.clone(), &Method::GET, &SMALL);
        let end = find_end(&bytes, &mut 0, &SMALL);
        if request.is_ok() || response.is_ok() {
            prop_assert_eq!(end, Ok(Some(bytes.len())), "both find the same end");
        }
    }

    #[test]
    fn an_accepted_request_is_the_same_to_another_parser(
        bytes in nearly_a_head(&HEAD_PARTS[..3]),
    ) {
        if let Ok(head) = parse_request(Bytes::copy_from_slice(&bytes), &LIMITS) {
            check_request(&bytes, &head);
            let lengths = head.headers.get_all("content-length").iter().count();
            let codings = head.headers.get_all("transfer-encoding").iter().count();
            prop_assert!(lengths + codings <= 1, "nobody can read another framing");
            prop_assert!(head.headers.get_all("host").iter().count() <= 1);
        }
    }

    #[test]
    fn an_accepted_response_is_the_same_to_another_parser(
        bytes in nearly_a_head(&HEAD_PARTS[3..5]),
    ) {
        if let Ok(head) = parse_response(Bytes::copy_from_slice(&bytes), &Method::GET, &LIMITS) {
            check_response(&bytes, &head);
        }
    }
}

proptest! {
    #[test]
    fn a_written_request_reads_as_it_was(
        fields in plain_fields(),
        target in "/[a-zA-Z0-9/._~!$&'()*+,;=:@%-]{0,20}([?][a-z=&?/]{0,10})?",
        host in prop::option::of("[a-z0-9.-]{1,20}(:[0-9]{1,4})?"),
        length in prop_oneof![
            Just(BodyLength::Empty), any::<u64>().prop_map(BodyLength::Known),
            Just(BodyLength::Chunked),
        ],
    ) {
        let mut given = with_stale_framing(fields.clone());
        given.insert("host", HeaderValue::from_static("given"));
        let mut out = BytesMut::new();
        write_request(&mut out, &Method::PATCH, &target, host.as_deref(), &given, length);
        let head = request(&out).unwrap();
        check_request(&out, &head);
        prop_assert_eq!(&head.method, Method::PATCH);
        prop_assert_eq!(head.uri.to_string(), target);
        prop_assert_eq!(&head.headers["host"], host.as_deref().unwrap_or("given"));
        prop_assert_eq!(head.framing, match length {
            BodyLength::Empty => Framing::Empty,
            BodyLength::Known(length) => Framing::Length(length),
            BodyLength::Chunked => Framing::Chunked,
        });
        prop_assert!(head.keep_alive);
        prop_assert_eq!(without_ours(head.headers), fields);
    }

    #[test]
    fn a_written_response_reads_as_it_was(
        fields in plain_fields(),
        status in 200_u16..600,
        is_http_10 in any::<bool>(),
        keep_alive in any::<bool>(),
        framing in prop_oneof![
            any::<u64>().prop_map(ResponseFraming::Known), Just(ResponseFraming::Chunked),
            Just(ResponseFraming::UntilClose),
        ],
    ) {
        prop_assume!(status != 204 && status != 304);
        prop_assume!(!is_http_10 || framing != ResponseFraming::Chunked);
        let version = if is_http_10 { Version::HTTP_10 } else { Version::HTTP_11 };
        let status = StatusCode::from_u16(status).unwrap();
        let given = with_stale_framing(fields.clone());
        let mut out = BytesMut::new();
        write_response(&mut out, version, status, &given, framing, keep_alive, None);
        let head = response(&Method::GET, &out).unwrap();
        check_response(&out, &head);
        prop_assert_eq!(head.status, status);
        prop_assert_eq!(head.version, version);
        let expected = match framing {
            ResponseFraming::Known(length) => Framing::Length(length),
            ResponseFraming::Chunked => Framing::Chunked,
            _ => Framing::UntilClose,
        };
        prop_assert_eq!(head.framing, expected);
        prop_assert_eq!(head.keep_alive, keep_alive && expected != Framing::UntilClose);
        prop_assert_eq!(without_ours(head.headers), fields);
    }

    #[test]
    fn written_chunks_read_as_they_were(
        chunks in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..300), 0..8),
        trailers in plain_fields(),
        cuts in cuts(),
    ) {
        let mut trailers = trailers;
        for forbidden in ["date", "cookie"] {
            trailers.remove(forbidden);
        }
        let mut out = BytesMut::new();
        for chunk in &chunks {
            write_chunk_head(&mut out, chunk.len());
            out.extend_from_slice(chunk);
            out.extend_from_slice(CHUNK_END);
        }
        write_last_chunk(&mut out, Some(&with_stale_framing(trailers.clone())));
        out.extend_from_slice(b"next");
        let found = decode(Framing::Chunked, &LIMITS, pieces(&out, &cuts)).unwrap();
        prop_assert_eq!(found.content, chunks.concat());
        prop_assert_eq!(found.trailers.unwrap_or_default(), trailers);
        prop_assert_eq!((found.left, found.ended), (b"next".to_vec(), true));
    }
}
