use http::{StatusCode, Uri, Version};

use super::*;

/// A request of these field lines.
fn with_fields(fields: &str) -> Vec<u8> {
    format!("POST /x HTTP/1.1\r\nHost: orders\r\n{fields}\r\n").into_bytes()
}

#[track_caller]
fn accepted(head: impl AsRef<[u8]>) -> RequestHead {
    let head = head.as_ref();
    request(head).unwrap_or_else(|error| panic!("{}: {error}", head.escape_ascii()))
}

#[track_caller]
fn refused(head: impl AsRef<[u8]>, expected: Malformed) {
    let head = head.as_ref();
    assert_eq!(
        request(head).err(),
        Some(expected),
        "{}",
        head.escape_ascii()
    );
}

#[track_caller]
fn refused_response(head: &str, expected: Malformed) {
    let found = response(&Method::GET, head.as_bytes());
    assert_eq!(found.err(), Some(expected), "{head:?}");
}

#[test]
fn a_request_head_is_read() {
    let head = accepted(
        "\r\nPOST /orders?id=7 HTTP/1.1\r\nHost: Orders:8080\r\nX-Empty:\r\nx-a: \t 1 2\t \r\n\
         X-A:3\r\nx-text: caf\u{e9}\r\ncontent-length: 12\r\n\r\n",
    );
    assert_eq!(head.method, Method::POST);
    assert_eq!(head.uri, Uri::from_static("/orders?id=7"));
    assert_eq!(head.version, Version::HTTP_11);
    assert_eq!(head.framing, Framing::Length(12));
    assert!(head.keep_alive && !head.expect_continue && !head.upgrade);
    let all: Vec<_> = head.headers.get_all("x-a").iter().collect();
    assert_eq!(all, ["1 2", "3"]);
    assert_eq!(head.headers["host"], "Orders:8080");
    assert_eq!(head.headers["x-empty"], "");
    assert_eq!(head.headers["x-text"].as_bytes(), "caf\u{e9}".as_bytes());
    assert_eq!(head.headers.len(), 6);
}

#[test]
fn header_values_are_slices_of_the_head() {
    let head = Bytes::copy_from_slice(&with_fields("x-a: value\r\n"));
    let range = head.as_ptr_range();
    let parsed = parse_request(head, &LIMITS).unwrap();
    assert!(range.contains(&parsed.headers["x-a"].as_bytes().as_ptr()));
}

#[test]
fn the_end_of_a_head_is_found_in_any_pieces() {
    let head = b"\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n";
    let bytes = [&head[..], b"content\r\n\r\n"].concat();
    let mut searched = 0;
    for length in 0..head.len() {
        let found = find_end(&bytes[..length], &mut searched, &LIMITS);
        assert_eq!(found, Ok(None), "{length}");
    }
    let found = find_end(&bytes, &mut searched, &LIMITS);
    assert_eq!(found, Ok(Some(head.len())));
    assert_eq!(find_end(&bytes, &mut 0, &LIMITS), Ok(Some(head.len())));
}

#[test]
fn lines_end_in_crlf_only_and_it_shows_at_once() {
    let lf = Malformed::Syntax("line feed without carriage return");
    let cr = Malformed::Syntax("carriage return without line feed");
    for (bytes, expected) in [
        ("GET / HTTP/1.1\n", lf),
        ("\n", lf),
        ("GET / HTTP/1.1\r\nHost: a\n", lf),
        ("GET / HTTP/1.1\r\nHost: a\r\n\n", lf),
        ("GET / HTTP/1.1\r\nHost: a\r\r", cr),
        ("GET / HTTP/1.1\r\nHost: a\rb", cr),
        ("\r\r", cr),
        (
            "\r\n\r\n",
            Malformed::Syntax("several empty lines before the head"),
        ),
    ] {
        let found = find_end(bytes.as_bytes(), &mut 0, &LIMITS);
        assert_eq!(found, Err(expected), "{bytes:?}");
    }
    // And without having been delimited.
    for bytes in [
        "GET / HTTP/1.1\r\nHost: a\nb: c\r\n\r\n",
        "GET / HTTP/1.1\r\n",
        "",
    ] {
        assert!(
            parse_request(Bytes::from(bytes), &LIMITS).is_err(),
            "{bytes:?}"
        );
    }
    let two = "GET / HTTP/1.1\r\nHost: a\r\n\r\nGET / HTTP/1.1\r\n\r\n";
    assert_eq!(
        parse_request(Bytes::from(two), &LIMITS).err(),
        Some(Malformed::Syntax("bytes after the empty line"))
    );
}

#[test]
fn size_and_number_of_fields_are_bounded() {
    let head = with_fields("a: 1\r\nb: 2\r\n");
    let limits = |max_fields, max_head_bytes| Limits {
        max_fields,
        max_head_bytes,
    };
    let exact = limits(3, head.len());
    assert_eq!(find_end(&head, &mut 0, &exact), Ok(Some(head.len())));
    assert!(parse_request(Bytes::from(head.clone()), &exact).is_ok());

    let short = limits(3, head.len() - 1);
    let found = find_end(&head, &mut 0, &short);
    assert_eq!(found, Err(Malformed::HeadTooLarge));
    let found = find_end(&head[..head.len() - 1], &mut 0, &short);
    assert_eq!(
        found,
        Err(Malformed::HeadTooLarge),
        "also an incomplete one"
    );
    let found = parse_request(Bytes::from(head.clone()), &short);
    assert_eq!(found.err(), Some(Malformed::HeadTooLarge));

    let few = limits(2, head.len());
    let found = parse_request(Bytes::from(head), &few);
    assert_eq!(found.err(), Some(Malformed::TooManyFields));

    // More names than a header map can hold.
    let lines: String = (0..40_000).map(|n| format!("a{n}:\r\n")).collect();
    let head = with_fields(&lines);
    let found = parse_request(Bytes::from(head), &limits(usize::MAX, usize::MAX));
    assert_eq!(found.err(), Some(Malformed::TooManyFields));
}

#[test]
fn request_lines_are_exact() {
    let lines = [
        "GET / HTTP/1.1",
        "GET / HTTP/1.0",
        "PURGE /x HTTP/1.1",
        "M-SEARCH /x HTTP/1.1",
        "get /x HTTP/1.1",
    ];
    for line in lines {
        accepted(format!("{line}\r\nHost: a\r\n\r\n"));
    }
    let target = Malformed::Target("empty request target");
    let version = Malformed::Version;
    let method = Malformed::Syntax("method is not a token");
    for (line, expected) in [
        ("GET / HTTP/1.2", version),
        ("GET / HTTP/2.0", version),
        ("GET / HTTP/0.9", version),
        ("GET / HTTP/1.10", version),
        ("GET / http/1.1", version),
        ("GET / HTTP/1.1 ", version),
        ("GET /  HTTP/1.1", version),
        ("GET /a b HTTP/1.1", version),
        ("GET / ", version),
        ("GET  / HTTP/1.1", version),
        ("GET  HTTP/1.1", target),
        ("GET\t/ HTTP/1.1", method),
        ("GET /", Malformed::Syntax("request line without a version")),
        ("GET", Malformed::Syntax("request line without a target")),
        (" GET / HTTP/1.1", method),
        ("G{T / HTTP/1.1", method),
        ("GET: / HTTP/1.1", method),
        ("G\u{e9}T / HTTP/1.1", method),
        ("G\0T / HTTP/1.1", method),
    ] {
        refused(format!("{line}\r\nHost: a\r\n\r\n"), expected);
    }
}

#[test]
fn targets_have_the_form_of_their_method() {
    for (method, target, expected) in [
        ("GET", "/", "/"),
        ("GET", "//a/../b;c=%20?d=/?", "//a/../b;c=%20?d=/?"),
        ("GET", "http://orders", "http://orders/"),
        ("GET", "HTTP://orders:80/a?b", "http://orders:80/a?b"),
        ("GET", "https://[::1]:8443/", "https://[::1]:8443/"),
        ("OPTIONS", "*", "*"),
        ("OPTIONS", "/a", "/a"),
        ("CONNECT", "orders:80", "orders:80"),
        ("CONNECT", "[::1]:80", "[::1]:80"),
    ] {
        let head = accepted(format!("{method} {target} HTTP/1.1\r\nHost: a\r\n\r\n"));
        assert_eq!(head.uri.to_string(), expected);
    }
    let connect = Malformed::Target("CONNECT target is not a host and a port");
    let form = Malformed::Target("request target of no known form");
    let authority = Malformed::Target("invalid authority in the request target");
    let character = Malformed::Target("invalid character in the request target, or too long");
    let fragment = Malformed::Target("fragment in the request target");
    for (method, target, expected) in [
        ("CONNECT", "/", connect),
        ("CONNECT", "orders", connect),
        ("CONNECT", "orders:", connect),
        ("CONNECT", "orders:0", connect),
        ("CONNECT", "orders:65536", connect),
        ("CONNECT", "orders:+80", connect),
        ("CONNECT", ":80", connect),
        ("CONNECT", "a@orders:80", connect),
        ("CONNECT", "http://orders:80/", connect),
        ("GET", "orders:80", form),
        ("GET", "x", form),
        ("GET", "**", form),
        ("GET", "?a", form),
        ("GET", "ftp://orders/", form),
        ("GET", "http:/orders/", form),
        ("GET", "http:///x", authority),
        ("GET", "http://", authority),
        ("GET", "http://u:p@orders/", authority),
        ("GET", "http://orders:99999/", authority),
        ("GET", "http://a,b/", authority),
        ("GET", "http://[::1/", authority),
        (
            "GET",
            "http://orders?a",
            Malformed::Target("absolute target with a query and no path"),
        ),
        (
            "GET",
            "*",
            Malformed::Target("asterisk target of a method but OPTIONS"),
        ),
        ("GET", "/a#b", fragment),
        ("GET", "http://orders#b", fragment),
        ("GET", "/a\tb", character),
        ("GET", "/a\0", character),
        ("GET", "/a\x7f", character),
        ("GET", "/a?b\x01", character),
        (
            "GET",
            "/\u{e9}",
            Malformed::Target("request target is not ASCII"),
        ),
    ] {
        refused(
            format!("{method} {target} HTTP/1.1\r\nHost: a\r\n\r\n"),
            expected,
        );
    }
    let long = format!("GET /{} HTTP/1.1\r\nHost: a\r\n\r\n", "a".repeat(65_535));
    let limits = Limits {
        max_head_bytes: 100_000,
        ..LIMITS
    };
    let found = parse_request(Bytes::from(long), &limits);
    assert_eq!(found.err(), Some(character));
}

#[test]
fn host_is_one_and_valid() {
    for host in [
        "a",
        "Orders.example.org:8080",
        "orders:",
        "127.0.0.1:1",
        "[::1]",
        "[2001:db8::1]:443",
        "under_score",
        "a.",
    ] {
        accepted(format!("GET / HTTP/1.1\r\nHost:{host}\r\n\r\n"));
    }
    let invalid = Malformed::Host("invalid Host");
    let empty = Malformed::Host("empty Host");
    for (host, expected) in [
        ("", empty),
        (" \t", empty),
        ("a b", invalid),
        ("a,b", invalid),
        ("a/b", invalid),
        ("a?b", invalid),
        ("u@a", invalid),
        ("a%41", invalid),
        ("a\u{e9}", invalid),
        (":80", invalid),
        ("a:b", invalid),
        ("a:80:80", invalid),
        ("a:65536", invalid),
        ("a:000080", invalid),
        ("a: 80", invalid),
        ("[::1", invalid),
        ("[::1]80", invalid),
        ("[a]", invalid),
        ("[fe80::1%eth0]", invalid),
        ("[v1.a]", invalid),
        ("a]", invalid),
        ("http://a", invalid),
    ] {
        refused(format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n"), expected);
        refused(format!("GET / HTTP/1.0\r\nHost: {host}\r\n\r\n"), expected);
    }
    refused("GET / HTTP/1.1\r\n\r\n", Malformed::Host("no Host"));
    refused("GET http://a/ HTTP/1.1\r\n\r\n", Malformed::Host("no Host"));
    accepted("GET / HTTP/1.0\r\n\r\n");
    for version in ["1.0", "1.1"] {
        refused(
            format!("GET / HTTP/{version}\r\nHost: a\r\nhost: a\r\n\r\n"),
            Malformed::Host("several Host fields"),
        );
    }
}

#[test]
fn field_lines_are_exact() {
    for fields in [
        "!#$%&'*+-.^_`|~09azAZ: x\r\n",
        "a:b:c\r\n",
        "a: \t\r\n",
        "a: b\tc  d\r\n",
        "a: \u{80}\u{ff}\r\n",
    ] {
        accepted(with_fields(fields));
    }
    accepted(b"GET / HTTP/1.0\r\na: \x80\xff\r\n\r\n");
    let token = Malformed::Syntax("field name is not a token");
    let space = Malformed::Syntax("whitespace in or after a field name");
    let folded = Malformed::Syntax("folded field value");
    let control = Malformed::Syntax("control character in a field value");
    for (fields, expected) in [
        (": x\r\n", Malformed::Syntax("empty field name")),
        ("a\r\n", Malformed::Syntax("field line without colon")),
        ("a : x\r\n", space),
        ("a\t: x\r\n", space),
        ("a b: x\r\n", space),
        (" a: x\r\n", folded),
        ("a: x\r\n y\r\n", folded),
        ("a: x\r\n\ty: z\r\n", folded),
        ("a: x\r\n \r\n", folded),
        ("a(: x\r\n", token),
        ("a\0: x\r\n", token),
        ("a\x7f: x\r\n", token),
        ("\u{e9}: x\r\n", token),
        ("a@b: x\r\n", token),
        ("a: x\0y\r\n", control),
        ("a: \x01\r\n", control),
        ("a: x\x0by\r\n", control),
        ("a: x\x7f\r\n", control),
        ("a: \x1b[0m\r\n", control),
    ] {
        refused(with_fields(fields), expected);
    }
    for first in [" Host: a\r\n", "\tHost: a\r\n", " \r\nHost: a\r\n"] {
        refused(
            format!("GET / HTTP/1.1\r\n{first}\r\n"),
            Malformed::Syntax("whitespace before the first field"),
        );
    }
    let long = format!("{}: x\r\n", "a".repeat(70_000));
    let limits = Limits {
        max_head_bytes: 100_000,
        ..LIMITS
    };
    let found = parse_request(Bytes::from(with_fields(&long)), &limits);
    assert_eq!(found.err(), Some(Malformed::Syntax("field name too long")));
}

#[test]
fn a_length_is_one_number() {
    for (value, expected) in [
        ("0", 0),
        ("12", 12),
        (" \t12\t ", 12),
        ("0012", 12),
        ("18446744073709551615", u64::MAX),
    ] {
        let head = accepted(with_fields(&format!("Content-Length:{value}\r\n")));
        assert_eq!(head.framing, Framing::Length(expected));
    }
    let number = Malformed::Framing("Content-Length is not a number");
    let large = Malformed::Framing("Content-Length over 64 bits");
    for (value, expected) in [
        ("", Malformed::Framing("empty Content-Length")),
        (" ", Malformed::Framing("empty Content-Length")),
        ("+1", number),
        ("-1", number),
        ("-0", number),
        ("1 2", number),
        ("1, 1", number),
        ("1,1", number),
        (",1", number),
        ("0x1", number),
        ("1.0", number),
        ("1e1", number),
        ("a", number),
        ("\u{b2}", number),
        ("18446744073709551616", large),
        ("99999999999999999999999", large),
    ] {
        refused(
            with_fields(&format!("Content-Length: {value}\r\n")),
            expected,
        );
        refused_response(
            &format!("HTTP/1.1 200 OK\r\nContent-Length: {value}\r\n\r\n"),
            expected,
        );
    }
    let several = Malformed::Framing("several Content-Length fields");
    for fields in [
        "Content-Length: 1\r\nContent-Length: 1\r\n",
        "content-length: 1\r\na: b\r\nCONTENT-LENGTH: 2\r\n",
    ] {
        refused(with_fields(fields), several);
        refused_response(&format!("HTTP/1.1 200 OK\r\n{fields}\r\n"), several);
    }
}

#[test]
fn the_only_transfer_encoding_is_chunked() {
    for value in ["chunked", "Chunked", " CHUNKED\t"] {
        let head = accepted(with_fields(&format!("transfer-encoding:{value}\r\n")));
        assert_eq!(head.framing, Framing::Chunked);
    }
    let other = Malformed::Framing("Transfer-Encoding other than chunked");
    let both = Malformed::Framing("both Content-Length and Transfer-Encoding");
    let several = Malformed::Framing("several Transfer-Encoding fields");
    for (fields, expected) in [
        ("Transfer-Encoding: gzip, chunked\r\n", other),
        ("Transfer-Encoding: gzip\r\n", other),
        ("Transfer-Encoding: identity\r\n", other),
        ("Transfer-Encoding: chunked, chunked\r\n", other),
        ("Transfer-Encoding: chunked,\r\n", other),
        ("Transfer-Encoding: chunked;a=b\r\n", other),
        ("Transfer-Encoding: \"chunked\"\r\n", other),
        ("Transfer-Encoding: xchunked\r\n", other),
        ("Transfer-Encoding: chunke\u{212a}d\r\n", other),
        ("Transfer-Encoding:\r\n", other),
        (
            "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
            several,
        ),
        (
            "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n",
            several,
        ),
        ("Transfer-Encoding: chunked\r\nContent-Length: 1\r\n", both),
        ("Content-Length: 0\r\ntransfer-encoding: chunked\r\n", both),
    ] {
        refused(with_fields(fields), expected);
        refused_response(&format!("HTTP/1.1 200 OK\r\n{fields}\r\n"), expected);
    }
    let old = Malformed::Framing("Transfer-Encoding in HTTP/1.0");
    refused("POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n", old);
    refused_response("HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", old);
    assert_eq!(accepted(with_fields("")).framing, Framing::Empty);
}

#[test]
fn connect_announces_no_content() {
    let connect = |fields: &str| format!("CONNECT a:80 HTTP/1.1\r\nHost: a:80\r\n{fields}\r\n");
    assert_eq!(accepted(connect("")).framing, Framing::Empty);
    let none = accepted(connect("Content-Length: 0\r\n"));
    assert_eq!(none.framing, Framing::Empty);
    let content = Malformed::Framing("CONNECT with content");
    refused(connect("Content-Length: 1\r\n"), content);
    refused(connect("Transfer-Encoding: chunked\r\n"), content);
}

#[test]
fn connections_are_kept_as_the_version_has_it() {
    for (version, fields, expected) in [
        ("1.1", "", true),
        ("1.1", "Connection: close\r\n", false),
        ("1.1", "Connection: x, Close ,y\r\n", false),
        ("1.1", "Connection: x\r\nConnection: close\r\n", false),
        ("1.1", "Connection: closed\r\n", true),
        ("1.1", "Connection: keep-alive, close\r\n", false),
        ("1.0", "", false),
        ("1.0", "Connection: Keep-Alive\r\n", true),
        ("1.0", "Connection: keep-alive, close\r\n", false),
    ] {
        let head = accepted(format!("GET / HTTP/{version}\r\nHost: a\r\n{fields}\r\n"));
        assert_eq!(head.keep_alive, expected, "{version} {fields:?}");
        let head = format!("HTTP/{version} 200 OK\r\ncontent-length: 0\r\n{fields}\r\n");
        let head = response(&Method::GET, head.as_bytes()).unwrap();
        assert_eq!(head.keep_alive, expected, "{version} {fields:?}");
    }
}

#[test]
fn expectations_and_upgrades_are_told() {
    let head = accepted(with_fields("Expect: 100-Continue\r\n"));
    assert!(head.expect_continue);
    for fields in [
        "Expect: 200-ok\r\n",
        "Expect:\r\n",
        "Expect: 100-continue, x\r\n",
        "Expect: y 100-continue\r\n",
        "Expect: 100-continue\r\nExpect: 100-continue\r\n",
    ] {
        refused(with_fields(fields), Malformed::Expectation);
    }
    let old = accepted("POST / HTTP/1.0\r\nExpect: 100-continue\r\n\r\n");
    assert!(!old.expect_continue && !old.headers.contains_key("expect"));

    for (fields, expected) in [
        ("Connection: Upgrade\r\nUpgrade: websocket\r\n", true),
        ("Connection: keep-alive, upgrade\r\nUpgrade: a, b\r\n", true),
        ("Upgrade: websocket\r\n", false),
        ("Connection: upgrade\r\n", false),
        ("Connection: upgrade\r\nUpgrade: a\r\nUpgrade: b\r\n", false),
    ] {
        assert_eq!(
            accepted(with_fields(fields)).upgrade,
            expected,
            "{fields:?}"
        );
    }
    let old = accepted("GET / HTTP/1.0\r\nConnection: upgrade\r\nUpgrade: a\r\n\r\n");
    assert!(!old.upgrade);
}

#[test]
fn status_lines_are_exact() {
    for (line, version, status) in [
        ("HTTP/1.1 200 OK", Version::HTTP_11, 200),
        ("HTTP/1.1 200 ", Version::HTTP_11, 200),
        ("HTTP/1.1 200", Version::HTTP_11, 200),
        ("HTTP/1.0 404 Not \t Found", Version::HTTP_10, 404),
        ("HTTP/1.1 100 Continue", Version::HTTP_11, 100),
        ("HTTP/1.1 599 caf\u{e9}", Version::HTTP_11, 599),
    ] {
        let head = response(&Method::GET, format!("{line}\r\n\r\n").as_bytes()).unwrap();
        assert_eq!(head.version, version);
        assert_eq!(head.status.as_u16(), status);
        assert!(head.headers.is_empty());
    }
    let digits = Malformed::Syntax("status is not three digits");
    let range = Malformed::Syntax("status is not in 100 to 599");
    let reason = Malformed::Syntax("control character in the reason");
    for (line, expected) in [
        ("HTTP/1.1 20", digits),
        ("HTTP/1.1 2000 OK", digits),
        ("HTTP/1.1 20x OK", digits),
        ("HTTP/1.1 +20 OK", digits),
        ("HTTP/1.1  200 OK", digits),
        ("HTTP/1.1 200OK", digits),
        ("HTTP/1.1 200\tOK", digits),
        ("HTTP/1.1 099 x", range),
        ("HTTP/1.1 000 x", range),
        ("HTTP/1.1 600 x", range),
        ("HTTP/1.1 999 x", range),
        ("HTTP/1.1 200 a\0", reason),
        ("HTTP/1.1 200 a\x7f", reason),
        (
            "HTTP/1.1\t200 OK",
            Malformed::Syntax("no space after the version"),
        ),
        ("HTTP/1.1", Malformed::Syntax("no space after the version")),
        ("HTTP/1.2 200 OK", Malformed::Version),
        ("HTTP/2 200 OK", Malformed::Version),
        ("http/1.1 200 OK", Malformed::Version),
        ("ICY 200 OK", Malformed::Version),
        (" HTTP/1.1 200 OK", Malformed::Version),
    ] {
        refused_response(&format!("{line}\r\n\r\n"), expected);
    }
    refused_response(
        "HTTP/1.1 204 x\r\nContent-Length: \x001\r\n\r\n",
        Malformed::Syntax("control character in a field value"),
    );
    let after_empty_line = response(&Method::GET, b"\r\nHTTP/1.1 200 OK\r\n\r\n");
    assert_eq!(after_empty_line.err(), Some(Malformed::Version));
}

#[test]
fn responses_end_as_method_and_status_have_it() {
    const LENGTH: &str = "content-length: 5\r\n";
    const CHUNKED: &str = "transfer-encoding: chunked\r\n";
    use Framing::{Chunked, Empty, Length, UntilClose};
    for (method, status, fields, framing, kept) in [
        ("GET", 200, LENGTH, Length(5), true),
        ("GET", 200, CHUNKED, Chunked, true),
        ("GET", 200, "", UntilClose, false),
        ("GET", 500, "", UntilClose, false),
        ("GET", 205, LENGTH, Length(5), true),
        ("HEAD", 200, LENGTH, Empty, true),
        ("HEAD", 200, CHUNKED, Empty, true),
        ("HEAD", 200, "", Empty, false),
        ("GET", 304, LENGTH, Empty, true),
        ("GET", 304, CHUNKED, Empty, true),
        ("GET", 204, "", Empty, false),
        ("GET", 204, LENGTH, Empty, false),
        (
            "GET",
            204,
            "content-length: x\r\ncontent-length: 1\r\n",
            Empty,
            false,
        ),
        ("GET", 100, LENGTH, Empty, false),
        ("GET", 101, "", Empty, false),
        ("CONNECT", 200, "", Empty, false),
        ("CONNECT", 299, LENGTH, Empty, false),
        ("CONNECT", 403, LENGTH, Length(5), true),
        ("CONNECT", 403, "", UntilClose, false),
    ] {
        let method = Method::from_bytes(method.as_bytes()).unwrap();
        let bytes = format!("HTTP/1.1 {status} x\r\n{fields}\r\n");
        let head = response(&method, bytes.as_bytes()).unwrap();
        assert_eq!(head.framing, framing, "{method} {bytes:?}");
        assert_eq!(!head.headers.is_empty(), kept, "{method} {bytes:?}");
        assert_eq!(head.keep_alive, framing != UntilClose, "{method} {bytes:?}");
        assert_eq!(head.status, StatusCode::from_u16(status).unwrap());
    }
    let expected = Malformed::Framing("Transfer-Encoding in a response without content");
    for (method, status) in [
        (Method::GET, 204),
        (Method::GET, 103),
        (Method::CONNECT, 200),
    ] {
        let bytes = format!("HTTP/1.1 {status} x\r\n{CHUNKED}\r\n");
        let found = response(&method, bytes.as_bytes());
        assert_eq!(found.err(), Some(expected), "{method} {bytes:?}");
    }
}

#[test]
fn errors_are_one_lowercase_sentence() {
    assert_eq!(
        request(&with_fields(
            "Content-Length: 1\r\nTransfer-Encoding: chunked\r\n"
        ))
        .unwrap_err()
        .to_string(),
        "both Content-Length and Transfer-Encoding"
    );
}
