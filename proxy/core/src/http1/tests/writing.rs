use http::{HeaderName, HeaderValue, StatusCode, Version};

use super::*;

const DATE: &[u8; 29] = b"Sun, 06 Nov 1994 08:49:37 GMT";

fn headers(fields: &[(&'static str, &'static str)]) -> HeaderMap {
    fields
        .iter()
        .map(|(name, value)| {
            (
                HeaderName::from_static(name),
                HeaderValue::from_static(value),
            )
        })
        .collect()
}

/// What every header map here holds too much of.
fn framed() -> HeaderMap {
    headers(&[
        ("content-length", "7"),
        ("x-a", "1"),
        ("transfer-encoding", "gzip"),
    ])
}

#[test]
fn request_heads_are_framed_by_the_argument() {
    let check = |target, host, body, expected: &str| {
        let mut out = BytesMut::new();
        let mut fields = framed();
        fields.insert("host", HeaderValue::from_static("given"));
        write_request(&mut out, &Method::POST, target, host, &fields, body);
        assert_eq!(String::from_utf8_lossy(&out), expected);
    };
    check(
        "/",
        None,
        BodyLength::Empty,
        "POST / HTTP/1.1\r\nx-a: 1\r\nhost: given\r\n\r\n",
    );
    check(
        "/a?b",
        Some("orders:80"),
        BodyLength::Known(12),
        "POST /a?b HTTP/1.1\r\nhost: orders:80\r\nx-a: 1\r\ncontent-length: 12\r\n\r\n",
    );
    check(
        "*",
        Some("a"),
        BodyLength::Chunked,
        "POST * HTTP/1.1\r\nhost: a\r\nx-a: 1\r\ntransfer-encoding: chunked\r\n\r\n",
    );
}

#[test]
fn response_heads_are_framed_by_the_argument() {
    let check = |version, status: u16, framing, keep_alive, date, expected: &str| {
        let status = StatusCode::from_u16(status).unwrap();
        let mut out = BytesMut::new();
        write_response(
            &mut out,
            version,
            status,
            &framed(),
            framing,
            keep_alive,
            date,
        );
        assert_eq!(String::from_utf8_lossy(&out), expected);
    };
    use ResponseFraming::{Chunked, Known, None as Without, UntilClose};
    use Version as V;
    check(
        V::HTTP_11,
        200,
        Known(3),
        true,
        Some(DATE),
        "HTTP/1.1 200 OK\r\nx-a: 1\r\ncontent-length: 3\r\n\
         date: Sun, 06 Nov 1994 08:49:37 GMT\r\n\r\n",
    );
    check(
        V::HTTP_11,
        503,
        Chunked,
        false,
        None,
        "HTTP/1.1 503 Service Unavailable\r\nx-a: 1\r\ntransfer-encoding: chunked\r\n\
         connection: close\r\n\r\n",
    );
    check(
        V::HTTP_10,
        299,
        Known(0),
        true,
        None,
        "HTTP/1.0 299 \r\nx-a: 1\r\ncontent-length: 0\r\nconnection: keep-alive\r\n\r\n",
    );
    check(
        V::HTTP_10,
        200,
        UntilClose,
        true,
        None,
        "HTTP/1.0 200 OK\r\nx-a: 1\r\n\r\n",
    );
    check(
        V::HTTP_11,
        200,
        UntilClose,
        true,
        None,
        "HTTP/1.1 200 OK\r\nx-a: 1\r\nconnection: close\r\n\r\n",
    );
    check(
        V::HTTP_11,
        304,
        Without,
        true,
        None,
        "HTTP/1.1 304 Not Modified\r\ncontent-length: 7\r\nx-a: 1\r\n\r\n",
    );
    check(
        V::HTTP_11,
        204,
        Without,
        true,
        None,
        "HTTP/1.1 204 No Content\r\nx-a: 1\r\n\r\n",
    );
    check(
        V::HTTP_11,
        103,
        Without,
        false,
        None,
        "HTTP/1.1 103 Early Hints\r\nx-a: 1\r\n\r\n",
    );
}

#[test]
fn a_given_date_stays() {
    let fields = headers(&[("date", "yesterday")]);
    let mut out = BytesMut::new();
    let framing = ResponseFraming::Known(0);
    write_response(
        &mut out,
        Version::HTTP_11,
        StatusCode::OK,
        &fields,
        framing,
        true,
        Some(DATE),
    );
    assert_eq!(
        &out[..],
        b"HTTP/1.1 200 OK\r\ndate: yesterday\r\ncontent-length: 0\r\n\r\n"
    );
}

#[test]
fn chunks_are_written_as_they_are_read() {
    for length in [0, 1, 9, 10, 15, 16, 255, 4096, usize::MAX] {
        let mut out = BytesMut::new();
        write_chunk_head(&mut out, length);
        let expected = match length {
            0 => String::new(),
            _ => format!("{length:x}\r\n"),
        };
        assert_eq!(&out[..], expected.as_bytes());
    }
    let mut out = BytesMut::new();
    write_chunk_head(&mut out, 4);
    out.extend_from_slice(b"data");
    out.extend_from_slice(CHUNK_END);
    let trailers = headers(&[("grpc-status", "0"), ("content-length", "1")]);
    write_last_chunk(&mut out, Some(&trailers));
    assert_eq!(&out[..], b"4\r\ndata\r\n0\r\ngrpc-status: 0\r\n\r\n");

    let mut out = BytesMut::new();
    write_last_chunk(&mut out, None);
    assert_eq!(&out[..], b"0\r\n\r\n");
    out.clear();
    write_last_chunk(&mut out, Some(&HeaderMap::new()));
    assert_eq!(&out[..], b"0\r\n\r\n");
}
