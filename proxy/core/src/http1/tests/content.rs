use super::*;

#[track_caller]
fn check(framing: Framing, bytes: &[u8], content: &[u8], left: &[u8], ended: bool) {
    let expected = Decoded {
        content: content.to_vec(),
        trailers: None,
        left: left.to_vec(),
        ended,
    };
    let whole = decode(framing, &LIMITS, [bytes]);
    assert_eq!(whole.as_ref(), Ok(&expected), "{}", bytes.escape_ascii());
    let single = decode(framing, &LIMITS, bytes.chunks(1));
    assert_eq!(single.as_ref(), Ok(&expected), "{}", bytes.escape_ascii());
}

#[track_caller]
fn refused(bytes: &[u8], expected: Malformed) {
    let whole = decode(Framing::Chunked, &LIMITS, [bytes]);
    assert_eq!(whole, Err(expected), "{}", bytes.escape_ascii());
    let single = decode(Framing::Chunked, &LIMITS, bytes.chunks(1));
    assert_eq!(single, Err(expected), "{}", bytes.escape_ascii());
}

#[test]
fn content_ends_where_its_framing_says() {
    check(Framing::Empty, b"next", b"", b"next", true);
    check(Framing::Length(0), b"next", b"", b"next", true);
    check(Framing::Length(4), b"datanext", b"data", b"next", true);
    check(Framing::Length(4), b"dat", b"dat", b"", false);
    check(Framing::Length(u64::MAX), b"data", b"data", b"", false);
    check(Framing::UntilClose, b"data", b"data", b"", false);
    check(Framing::Chunked, b"0\r\n\r\nnext", b"", b"next", true);
    check(
        Framing::Chunked,
        b"4\r\ndata\r\n1\r\n;\r\n0\r\n\r\nnext",
        b"data;",
        b"next",
        true,
    );
    check(Framing::Chunked, b"4\r\nda", b"da", b"", false);
}

#[test]
fn chunk_sizes_are_hexadecimal() {
    for (size, length) in [
        ("a", 10),
        ("A", 10),
        ("0f", 15),
        ("000000000000000a", 10),
        ("1a", 26),
        ("3;a", 3),
        ("3;a=b;c=\"d e\t\u{e9}\"", 3),
        ("3;", 3),
        ("3; a", 3),
    ] {
        let data = "x".repeat(length);
        let bytes = format!("{size}\r\n{data}\r\n000;last\r\n\r\n");
        check(
            Framing::Chunked,
            bytes.as_bytes(),
            data.as_bytes(),
            b"",
            true,
        );
    }
    let most = b"ffffffffffffffff\r\ndata";
    check(Framing::Chunked, most, b"data", b"", false);

    let number = Malformed::Chunk("chunk size is not hexadecimal");
    for bytes in [
        "\r\n",
        ";a\r\n",
        " 1\r\n",
        "1 \r\n",
        "1 ;a\r\n",
        "\t1\r\n",
        "+1\r\n",
        "-1\r\n",
        "0x1\r\n",
        "1_0\r\n",
        "g\r\n",
        "1g\r\n",
        "\u{ff11}\r\n",
        "1\n",
        "\n",
        "1\0\r\n",
        "1,\r\n",
    ] {
        refused(bytes.as_bytes(), number);
    }
    let digits = Malformed::Chunk("chunk size of more than 16 digits");
    refused(b"00000000000000001\r\n", digits);
    refused(b"10000000000000000\r\n", digits);
    let bare = Malformed::Chunk("chunk line with a bare carriage return");
    refused(b"1\rx", bare);
    refused(b"1\r\r\n", bare);
    refused(b"1;a\rb\r\n", bare);
    let control = Malformed::Chunk("control character in a chunk extension");
    refused(b"1;a\n", control);
    refused(b"1;a\0\r\n", control);
    refused(b"1;\x7f\r\n", control);
}

#[test]
fn chunk_data_is_followed_by_crlf_and_nothing_else() {
    let expected = Malformed::Chunk("chunk data without CRLF after it");
    for bytes in [
        "1\r\nxx",
        "1\r\nx\n",
        "1\r\nx\rx",
        "1\r\nx0\r\n\r\n",
        "1\r\nx \r\n",
    ] {
        refused(bytes.as_bytes(), expected);
    }
}

#[test]
fn small_chunks_pass_and_padding_does_not() {
    let small = "1\r\nx\r\n".repeat(100_000) + "0\r\n\r\n";
    let whole = decode(Framing::Chunked, &LIMITS, [small.as_bytes()]).unwrap();
    assert_eq!(whole.content.len(), 100_000);

    let longest = format!("1;{}\r\nx\r\n0\r\n\r\n", "e".repeat(254));
    check(Framing::Chunked, longest.as_bytes(), b"x", b"", true);
    let over = format!("1;{}\r\nx\r\n0\r\n\r\n", "e".repeat(255));
    let expected = Malformed::Chunk("chunk extension over the size limit");
    refused(over.as_bytes(), expected);

    let expected = Malformed::Chunk("too much chunk extension for the content");
    let padded = format!("1;{}\r\nx\r\n", "e".repeat(200)).repeat(100);
    refused(padded.as_bytes(), expected);
    let zeros = "000000000001;\r\nx\r\n".repeat(200_000);
    let zeros = decode(Framing::Chunked, &LIMITS, [zeros.as_bytes()]);
    assert!(zeros.is_ok(), "{zeros:?}");
}

#[test]
fn trailers_come_after_the_content_without_forbidden_fields() {
    let bytes = b"1\r\nx\r\n0\r\nGrpc-Status: 0\r\nContent-Length: 9\r\ngrpc-message:\r\n\
        host: a\r\nSet-Cookie: b\r\nTransfer-Encoding: chunked\r\n\r\nnext";
    let found = decode(Framing::Chunked, &LIMITS, [&bytes[..]]).unwrap();
    let trailers = found.trailers.as_ref().unwrap();
    assert_eq!(trailers.len(), 2);
    assert_eq!(trailers["grpc-status"], "0");
    assert_eq!(trailers["grpc-message"], "");
    assert_eq!(
        (&found.content[..], &found.left[..]),
        (&b"x"[..], &b"next"[..])
    );
    assert_eq!(
        decode(Framing::Chunked, &LIMITS, bytes.chunks(1)),
        Ok(found)
    );

    check(Framing::Chunked, b"0\r\nTE: x\r\n\r\n", b"", b"", true);
}

#[test]
fn trailers_are_as_strict_as_heads() {
    let lf = Malformed::Syntax("line feed without carriage return");
    let cr = Malformed::Syntax("carriage return without line feed");
    for (bytes, expected) in [
        ("0\r\n\n", lf),
        (
            "0\r\nHost: \0\r\n\r\n",
            Malformed::Syntax("control character in a field value"),
        ),
        ("0\r\na: b\n", lf),
        ("0\r\n\rx", cr),
        ("0\r\na: b\rc", cr),
        (
            "0\r\na : b\r\n\r\n",
            Malformed::Syntax("whitespace in or after a field name"),
        ),
        (
            "0\r\na: b\r\n c\r\n\r\n",
            Malformed::Syntax("folded field value"),
        ),
        (
            "0\r\na: \0\r\n\r\n",
            Malformed::Syntax("control character in a field value"),
        ),
        (
            "0\r\nGET / HTTP/1.1\r\n\r\n",
            Malformed::Syntax("whitespace in or after a field name"),
        ),
    ] {
        refused(bytes.as_bytes(), expected);
    }
    let limits = Limits {
        max_fields: 1,
        max_head_bytes: 20,
    };
    for (trailers, expected) in [
        ("a: b\r\n", None),
        ("a: b\r\nc: d\r\n", Some(Malformed::TooManyFields)),
        ("a: bbbbbbbbbbbbb\r\n", None),
        ("a: bbbbbbbbbbbbbb\r\n", Some(Malformed::HeadTooLarge)),
    ] {
        let bytes = format!("0\r\n{trailers}\r\n");
        let found = decode(Framing::Chunked, &limits, bytes.as_bytes().chunks(1));
        assert_eq!(found.err(), expected, "{bytes:?}");
    }
}

#[test]
fn the_end_of_the_connection_ends_only_what_it_may() {
    let decoder = |framing| Decoder::new(framing, &LIMITS);
    let mut until_close = decoder(Framing::UntilClose);
    assert!(!until_close.is_ended());
    assert_eq!(until_close.at_eof(), Ok(()));
    assert!(until_close.is_ended());
    assert_eq!(until_close.decode(&mut BytesMut::new()), Ok(Item::End));

    assert_eq!(decoder(Framing::Empty).at_eof(), Ok(()));
    assert_eq!(decoder(Framing::Length(0)).at_eof(), Ok(()));
    let truncated = Err(Malformed::Truncated);
    assert_eq!(decoder(Framing::Length(1)).at_eof(), truncated);
    assert_eq!(decoder(Framing::Chunked).at_eof(), truncated);

    let mut chunked = decoder(Framing::Chunked);
    let mut buf = BytesMut::from("0\r\n\r\n");
    assert_eq!(chunked.decode(&mut buf), Ok(Item::End));
    assert_eq!(chunked.at_eof(), Ok(()));
}

#[test]
fn what_is_left_of_a_length_is_known() {
    let mut decoder = Decoder::new(Framing::Length(5), &LIMITS);
    assert_eq!(decoder.remaining(), Some(5));
    let mut buf = BytesMut::from("abc");
    let data = Item::Data(Bytes::from("abc"));
    assert_eq!(decoder.decode(&mut buf), Ok(data));
    assert_eq!(decoder.remaining(), Some(2));
    assert_eq!(decoder.decode(&mut buf), Ok(Item::More));
    buf.extend_from_slice(b"defg");
    let data = Item::Data(Bytes::from("de"));
    assert_eq!(decoder.decode(&mut buf), Ok(data));
    assert_eq!(decoder.remaining(), Some(0));
    assert!(decoder.is_ended(), "before End was asked for");
    assert_eq!(decoder.decode(&mut buf), Ok(Item::End));
    assert_eq!(decoder.decode(&mut buf), Ok(Item::End));
    assert_eq!(&buf[..], b"fg");

    let known = |framing| Decoder::new(framing, &LIMITS).remaining();
    assert_eq!(known(Framing::Empty), Some(0));
    assert_eq!(known(Framing::Chunked), None);
    assert_eq!(known(Framing::UntilClose), None);
}

/// What a chunked message is handed out as, one [`Item::Data`] after the other, and how that ends.
fn pieces(bytes: &[u8]) -> (Vec<usize>, Result<Item, Malformed>) {
    let mut decoder = Decoder::new(Framing::Chunked, &LIMITS);
    let mut buf = BytesMut::from(bytes);
    let mut lengths = Vec::new();
    loop {
        match decoder.decode(&mut buf) {
            Ok(Item::Data(data)) => lengths.push(data.len()),
            end => return (lengths, end),
        }
    }
}

#[test]
fn short_chunks_that_are_there_come_together() {
    let end = Ok(Item::End);
    assert_eq!(
        pieces(b"1\r\na\r\n2\r\nbc\r\n3;x\r\ndef\r\n0\r\n\r\n"),
        (vec![6], end)
    );
    // The start of a chunk is taken along, what is no data is not waited for.
    assert_eq!(pieces(b"1\r\na\r\n5\r\nbc"), (vec![3], Ok(Item::More)));
    assert_eq!(pieces(b"1\r\na\r\n5\r\n"), (vec![1], Ok(Item::More)));
    assert_eq!(pieces(b"1\r\na\r\n5"), (vec![1], Ok(Item::More)));
    // A wrong one is told after those before it.
    let wrong = Err(Malformed::Chunk("chunk size is not hexadecimal"));
    assert_eq!(pieces(b"1\r\na\r\n1\r\nb\r\ng\r\n"), (vec![2], wrong));
    // Long ones are not copied, and not too much is.
    let long = [&b"1\r\na\r\n400\r\n"[..], &[b'b'; 1024], b"\r\n0\r\n\r\n"].concat();
    assert_eq!(pieces(&long), (vec![1, 1024], Ok(Item::End)));
    let many = [b"100\r\n", &[b'a'; 256][..], b"\r\n"].concat().repeat(100);
    let (lengths, _) = pieces(&many);
    assert_eq!(lengths.iter().sum::<usize>(), 25_600);
    assert!(lengths.len() == 2, "{lengths:?}");
}
