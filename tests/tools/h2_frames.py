"""Speaks broken and hostile HTTP/2 to a sidecar, frame by frame, and checks each answer.

    h2_frames.py HOST:PORT AUTHORITY

Paths of requests that must not be forwarded begin with /never, so that the origin can tell; those
of requests that may be begin with /served. Each case has a connection of its own, and each is
followed by an ordinary request on a new one. Prints a line a case, ends with `N cases, M failed`,
and with status 0 when M is 0.

The sidecar is expected to run with: maxStreams 16, maxHeaders 50, maxHeaderBytes 16KiB,
sendTimeout 1s, idleTimeout 3s.
"""

import select
import socket
import struct
import sys
import time

from hpack import Encoder, Decoder
from hyperframe.frame import (
    DataFrame,
    Frame,
    GoAwayFrame,
    HeadersFrame,
    PingFrame,
    PriorityFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
ERRORS = (
    "NO_ERROR PROTOCOL_ERROR INTERNAL_ERROR FLOW_CONTROL_ERROR SETTINGS_TIMEOUT STREAM_CLOSED "
    "FRAME_SIZE_ERROR REFUSED_STREAM CANCEL COMPRESSION_ERROR CONNECT_ERROR ENHANCE_YOUR_CALM "
    "INADEQUATE_SECURITY HTTP_1_1_REQUIRED"
).split()
PATIENCE = 10

HOST, PORT = sys.argv[1].rsplit(":", 1)
AUTHORITY = sys.argv[2]


def raw(kind, flags, stream, payload=b"", length=None):
    """A frame that no library would make."""
    length = len(payload) if length is None else length
    return struct.pack(">I", length)[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


class Closed(Exception):
    """The sidecar closed the connection."""


class Connection:
    """One connection, of which nothing is hidden."""

    def __init__(self, settings=None, greet=True):
        self.socket = socket.create_connection((HOST, int(PORT)), timeout=PATIENCE)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.encoder = Encoder()
        self.decoder = Decoder()
        self.bytes = b""
        self.settings = {}
        if greet:
            frame = SettingsFrame(0)
            frame.settings = settings or {}
            self.send(PREFACE + frame.serialize())

    def send(self, *frames):
        data = b"".join(f if isinstance(f, bytes) else f.serialize() for f in frames)
        try:
            self.socket.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            pass  # what came before the end can still be read

    def block(self, fields):
        return self.encoder.encode(fields)

    def request(self, path, extra=(), end=True, stream=1, method="GET", **pseudo):
        """The HEADERS of a request. A pseudo-header given as None is left out."""
        fields = [
            (":method", method),
            (":scheme", pseudo.get("scheme", "http")),
            (":authority", pseudo.get("authority", AUTHORITY)),
            (":path", path),
        ]
        fields = [(name, value) for name, value in fields if value is not None]
        return self.headers(fields + list(extra), end, stream)

    def headers(self, fields, end=True, stream=1):
        frame = HeadersFrame(stream, self.block(fields))
        frame.flags.add("END_HEADERS")
        if end:
            frame.flags.add("END_STREAM")
        return frame

    def fill(self, size):
        while len(self.bytes) < size:
            try:
                more = self.socket.recv(65536)
            except ConnectionResetError:
                raise Closed() from None
            if not more:
                raise Closed()
            self.bytes += more

    def frame(self):
        """The next frame; settings and pings are answered."""
        self.fill(9)
        frame, length = Frame.parse_frame_header(memoryview(self.bytes[:9]))
        self.fill(9 + length)
        frame.parse_body(memoryview(self.bytes[9 : 9 + length]))
        self.bytes = self.bytes[9 + length :]
        if isinstance(frame, HeadersFrame):
            # Also when nobody reads them: the decoder's state depends on it.
            frame.fields = dict(self.decoder.decode(frame.data))
        if isinstance(frame, SettingsFrame) and "ACK" not in frame.flags:
            self.settings.update(frame.settings)
            self.send(SettingsFrame(0, flags=["ACK"]))
        if isinstance(frame, PingFrame) and "ACK" not in frame.flags:
            self.send(PingFrame(0, frame.opaque_data, flags=["ACK"]))
        return frame

    def outcome(self, stream=1):
        """What became of a stream, or of the connection: the first of answer, reset, goaway."""
        try:
            while True:
                frame = self.frame()
                if isinstance(frame, GoAwayFrame):
                    return f"goaway {ERRORS[frame.error_code]}"
                if frame.stream_id != stream:
                    continue
                if isinstance(frame, RstStreamFrame):
                    return f"reset {ERRORS[frame.error_code]}"
                if isinstance(frame, HeadersFrame):
                    code = frame.fields.get("outrigger-error")
                    status = frame.fields[":status"]
                    return f"{status} {code}" if code else status
        except Closed:
            return "closed"
        except socket.timeout:
            return "nothing"

    def finish(self, stream=1):
        """Reads a stream to its end; the number of body bytes, or how it broke."""
        size = 0
        try:
            while True:
                frame = self.frame()
                if isinstance(frame, GoAwayFrame):
                    return f"goaway {ERRORS[frame.error_code]}"
                if frame.stream_id != stream:
                    continue
                if isinstance(frame, RstStreamFrame):
                    return f"reset {ERRORS[frame.error_code]}"
                size += len(frame.data) if isinstance(frame, DataFrame) else 0
                if "END_STREAM" in frame.flags:
                    return size
        except Closed:
            return "closed"
        except socket.timeout:
            return "nothing"

    def closed(self, patience=PATIENCE):
        """Waits for the end of the connection."""
        self.socket.settimeout(patience)
        try:
            while True:
                self.frame()
        except Closed:
            return "closed"
        except socket.timeout:
            return "open"


CASES = []


def case(*expected):
    """A case and what may come of it."""

    def add(function):
        CASES.append((function, expected))
        return function

    return add


def ask(path, *extra, **more):
    """One request with these fields, and its outcome."""
    connection = Connection()
    connection.send(connection.request(path, extra, **more))
    return connection.outcome()


# Frames -----------------------------------------------------------------------------------------


@case("closed", "goaway PROTOCOL_ERROR")
def bad_preface():
    connection = Connection(greet=False)
    connection.send(PREFACE[:-4] + b"XX\r\n" + SettingsFrame(0).serialize())
    return connection.outcome()


@case("goaway PROTOCOL_ERROR", "goaway NO_ERROR", "closed")
def first_frame_is_not_settings():
    """h2 takes a client that names no settings for one with the defaults; then it is idle."""
    connection = Connection(greet=False)
    connection.send(PREFACE, PingFrame(0, b"12345678"))
    return connection.outcome()


@case("goaway FRAME_SIZE_ERROR")
def frame_over_the_size_limit():
    connection = Connection()
    connection.send(raw(0, 0, 1, b"x" * 16385))
    return connection.outcome()


@case("goaway PROTOCOL_ERROR")
def data_on_stream_0():
    connection = Connection()
    connection.send(raw(0, 0, 0, b"x"))
    return connection.outcome()


@case("goaway PROTOCOL_ERROR")
def data_on_an_idle_stream():
    connection = Connection()
    connection.send(raw(0, 0, 7, b"x"))
    return connection.outcome()


@case("goaway PROTOCOL_ERROR")
def headers_on_stream_0():
    connection = Connection()
    block = connection.request("/never/stream-0").data
    connection.send(raw(1, 5, 0, block))
    return connection.outcome()


@case("goaway PROTOCOL_ERROR")
def headers_on_an_even_stream():
    connection = Connection()
    connection.send(connection.request("/never/even", stream=2))
    return connection.outcome(2)


@case("goaway PROTOCOL_ERROR", "reset STREAM_CLOSED", "goaway STREAM_CLOSED")
def headers_on_a_lower_stream():
    connection = Connection()
    connection.send(connection.request("/served/lower", stream=5))
    connection.finish(5)
    connection.send(connection.request("/never/lower", stream=3))
    return connection.outcome(3)


@case("reset STREAM_CLOSED", "goaway STREAM_CLOSED", "goaway PROTOCOL_ERROR")
def data_after_end_stream():
    connection = Connection()
    connection.send(connection.request("/served/hold"), raw(0, 1, 1, b"more"))
    return connection.outcome()


@case("goaway PROTOCOL_ERROR")
def continuation_without_headers():
    connection = Connection()
    connection.send(raw(9, 4, 1, b""))
    return connection.outcome()


@case("goaway PROTOCOL_ERROR")
def another_frame_between_headers_and_continuation():
    connection = Connection()
    block = connection.request("/never/interleaved").data
    connection.send(raw(1, 1, 1, block), PingFrame(0, b"12345678"), raw(9, 4, 1))
    return connection.outcome()


@case("goaway ENHANCE_YOUR_CALM", "goaway PROTOCOL_ERROR", "goaway COMPRESSION_ERROR")
def continuation_flood():
    connection = Connection()
    block = connection.request("/never/flood").data
    connection.send(raw(1, 1, 1, block))
    for _ in range(1000):
        connection.send(raw(9, 0, 1, connection.block([("x-flood", "y" * 100)])))
    return connection.outcome()


@case("goaway ENHANCE_YOUR_CALM", "goaway PROTOCOL_ERROR")
def continuations_without_a_byte():
    connection = Connection()
    block = connection.request("/never/empty").data
    connection.send(raw(1, 1, 1, block), *[raw(9, 0, 1)] * 1000)
    return connection.outcome()


@case("200")
def unknown_frames_flags_and_settings_are_ignored():
    connection = Connection(settings={0xFFFF: 1})
    connection.send(raw(0xBE, 0xFF, 0, b"what"), raw(0xEF, 0, 1, b"what"))
    connection.send(connection.request("/served/unknown"))
    return connection.outcome()


@case("goaway FRAME_SIZE_ERROR", "goaway PROTOCOL_ERROR")
def ping_of_another_size():
    connection = Connection()
    connection.send(raw(6, 0, 0, b"1234567"))
    return connection.outcome()


@case("goaway FRAME_SIZE_ERROR", "goaway PROTOCOL_ERROR")
def settings_of_another_size():
    connection = Connection()
    connection.send(raw(4, 0, 0, b"12345"))
    return connection.outcome()


@case("goaway FRAME_SIZE_ERROR", "goaway PROTOCOL_ERROR")
def settings_ack_with_a_payload():
    connection = Connection()
    connection.send(raw(4, 1, 0, b"123456"))
    return connection.outcome()


@case("goaway PROTOCOL_ERROR", "goaway FLOW_CONTROL_ERROR")
def initial_window_over_the_maximum():
    connection = Connection()
    connection.send(raw(4, 0, 0, struct.pack(">HI", 4, 2**31)))
    return connection.outcome()


@case("goaway PROTOCOL_ERROR")
def max_frame_size_below_the_minimum():
    connection = Connection()
    connection.send(raw(4, 0, 0, struct.pack(">HI", 5, 100)))
    return connection.outcome()


@case("goaway PROTOCOL_ERROR")
def push_promise_from_a_client():
    connection = Connection()
    connection.send(raw(5, 4, 1, struct.pack(">I", 2)))
    return connection.outcome()


@case("goaway PROTOCOL_ERROR", "reset PROTOCOL_ERROR")
def padding_longer_than_the_frame():
    connection = Connection()
    block = connection.request("/never/padding").data
    connection.send(raw(1, 0xD, 1, bytes([255]) + block))
    return connection.outcome()


@case("200")
def padded_frames():
    connection = Connection()
    block = connection.request("/served/padded", method="POST").data
    padded = raw(0, 9, 1, b"\x05hello" + b"\0" * 5)
    connection.send(raw(1, 0xC, 1, b"\x03" + block + b"\0" * 3), padded)
    return connection.outcome()


@case("200")
def priority_is_ignored():
    connection = Connection()
    frame = PriorityFrame(3, depends_on=0, stream_weight=9)
    connection.send(*[frame] * 100, connection.request("/served/priority"))
    return connection.outcome()


@case("goaway PROTOCOL_ERROR", "reset PROTOCOL_ERROR")
def stream_that_depends_on_itself():
    connection = Connection()
    block = connection.request("/never/self").data
    connection.send(raw(1, 0x25, 1, struct.pack(">IB", 1, 9) + block))
    return connection.outcome()


@case("goaway COMPRESSION_ERROR", "goaway PROTOCOL_ERROR")
def broken_hpack():
    connection = Connection()
    connection.send(raw(1, 5, 1, b"\xff\xff\xff\xff\xff\xff"))
    return connection.outcome()


@case("200")
def goaway_from_the_client_ends_gently():
    connection = Connection()
    connection.send(connection.request("/served/goaway"), GoAwayFrame(0))
    return connection.outcome()


# Floods and windows -----------------------------------------------------------------------------


@case("200")
def ping_flood_is_answered_in_order():
    connection = Connection()
    for number in range(2000):
        connection.send(PingFrame(0, struct.pack(">Q", number)))
    answered = 0
    while answered < 2000:
        frame = connection.frame()
        if isinstance(frame, PingFrame):
            assert struct.unpack(">Q", frame.opaque_data)[0] == answered, "out of order"
            answered += 1
    connection.send(connection.request("/served/pings"))
    return connection.outcome()


def flood_unread(frame, limit=64 << 20):
    """Sends without reading; how many bytes went before the sidecar stopped taking them."""
    connection = Connection()
    connection.socket.settimeout(1)
    piece = frame * (65536 // len(frame))
    sent = 0
    try:
        while sent < limit:
            sent += connection.socket.send(piece)
    except socket.timeout:
        return "held back"
    except (BrokenPipeError, ConnectionResetError):
        return "closed"
    return f"took {sent} bytes"


@case("held back", "closed")
def pings_whose_answers_nobody_reads():
    return flood_unread(PingFrame(0, b"12345678").serialize())


@case("held back", "closed")
def settings_whose_answers_nobody_reads():
    return flood_unread(SettingsFrame(0).serialize())


@case("reset PROTOCOL_ERROR", "goaway PROTOCOL_ERROR")
def window_update_of_0_for_a_stream():
    connection = Connection()
    connection.send(connection.request("/served/hold"), raw(8, 0, 1, struct.pack(">I", 0)))
    return connection.outcome()


@case("goaway PROTOCOL_ERROR")
def window_update_of_0_for_the_connection():
    connection = Connection()
    connection.send(raw(8, 0, 0, struct.pack(">I", 0)))
    return connection.outcome()


@case("reset FLOW_CONTROL_ERROR", "goaway FLOW_CONTROL_ERROR")
def window_over_the_maximum_for_a_stream():
    connection = Connection()
    update = WindowUpdateFrame(1, 2**31 - 1)
    connection.send(connection.request("/served/hold"), update, update)
    return connection.outcome()


@case("goaway FLOW_CONTROL_ERROR")
def window_over_the_maximum_for_the_connection():
    connection = Connection()
    update = WindowUpdateFrame(0, 2**31 - 1)
    connection.send(update, update)
    return connection.outcome()


@case("goaway FLOW_CONTROL_ERROR", "reset FLOW_CONTROL_ERROR")
def data_beyond_the_window():
    connection = Connection()
    connection.send(connection.request("/served/hold-upload", end=False, method="POST"))
    # The origin does not read, so at some point the windows are not given back.
    for _ in range(4096):
        connection.send(raw(0, 0, 1, b"x" * 16384))
        while connection.bytes or select.select([connection.socket], [], [], 0)[0]:
            try:
                frame = connection.frame()
            except Closed:
                return "closed"
            if isinstance(frame, (GoAwayFrame, RstStreamFrame)):
                kind = "goaway" if isinstance(frame, GoAwayFrame) else "reset"
                return f"{kind} {ERRORS[frame.error_code]}"
    return connection.outcome()


@case("goaway ENHANCE_YOUR_CALM", "closed")
def rapid_reset_in_one_burst():
    connection = Connection()
    for number in range(500):
        stream = 2 * number + 1
        connection.send(
            connection.request("/served/rapid", stream=stream), RstStreamFrame(stream, 8)
        )
    return connection.outcome(0)


@case("goaway ENHANCE_YOUR_CALM", "goaway NO_ERROR", "closed")
def rapid_reset_at_a_pace():
    """Each request is accepted before it is reset, so that no backlog shows it."""
    connection = Connection()
    for number in range(1000):
        stream = 2 * number + 1
        connection.send(connection.request("/served/hold", stream=stream))
        connection.send(PingFrame(0, b"accepted"))
        try:
            while not isinstance(connection.frame(), PingFrame):
                pass
        except Closed:
            return "closed" if number < 600 else "late"
        connection.send(RstStreamFrame(stream, 8))
    return "open"


@case("goaway ENHANCE_YOUR_CALM", "goaway NO_ERROR", "closed")
def made_you_reset():
    """CVE-2025-8671: frames that make the sidecar itself reset its streams."""
    connection = Connection()
    overflow = struct.pack(">I", 2**31 - 1)
    for number in range(3000):
        stream = 2 * number + 1
        connection.send(
            connection.request("/served/hold", stream=stream), raw(8, 0, stream, overflow)
        )
    return connection.outcome(0)


@case("reset REFUSED_STREAM")
def streams_over_the_limit():
    connection = Connection()
    for number in range(17):
        connection.send(connection.request("/served/hold", stream=2 * number + 1))
    return connection.outcome(33)


@case("goaway ENHANCE_YOUR_CALM", "closed", "200", "408 bad_request")
def empty_data_flood():
    connection = Connection()
    connection.send(connection.request("/served/upload", end=False, method="POST"))
    connection.send(*[raw(0, 0, 1)] * 5000)
    connection.send(raw(0, 1, 1))
    return connection.outcome()


@case("reset CANCEL", "reset INTERNAL_ERROR", "reset NO_ERROR", "goaway NO_ERROR", "closed")
def reader_with_a_window_of_0():
    connection = Connection(settings={SettingsFrame.INITIAL_WINDOW_SIZE: 0})
    connection.send(connection.request("/served/large"))
    assert connection.outcome() == "200", "the head needs no window"
    return connection.finish()


@case("reset CANCEL", "reset INTERNAL_ERROR", "reset NO_ERROR", "goaway NO_ERROR", "closed")
def reader_that_stops_midway():
    connection = Connection()
    connection.send(connection.request("/served/large"))
    assert connection.outcome() == "200", "there is an answer"
    return connection.finish()


@case("closed")
def connection_without_requests_is_closed():
    connection = Connection()
    return connection.closed()


@case("closed")
def connection_with_pings_only_is_closed():
    connection = Connection()
    connection.socket.settimeout(0.2)
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        connection.send(PingFrame(0, b"12345678"))
        if connection.closed(0.2) == "closed":
            return "closed"
    return "open"


# Fields -----------------------------------------------------------------------------------------


@case("431 headers_too_large", "431")
def header_list_over_the_bytes():
    return ask("/never/bytes", *[(f"x-{n}", "y" * 920) for n in range(18)])


@case("431 headers_too_large")
def header_list_over_the_count():
    return ask("/never/count", *[(f"x-{n}", "y") for n in range(60)])


@case("goaway ENHANCE_YOUR_CALM", "goaway COMPRESSION_ERROR", "goaway PROTOCOL_ERROR")
def hpack_bomb():
    """One large field in the table, named again and again at a byte a time."""
    connection = Connection()
    large = connection.block([("x-bomb", "y" * 3900)])
    block = connection.request("/never/bomb").data + large + b"\xbe" * 12000
    connection.send(raw(1, 5, 1, block[:16000]))
    return connection.outcome()


@case("431 headers_too_large")
def cookie_crumbs_over_the_count():
    return ask("/never/crumbs", *[("cookie", f"c{n}=1") for n in range(60)])


@case("200")
def cookie_crumbs_are_joined():
    return ask("/served/crumbs", *[("cookie", f"c{n}=1") for n in range(10)])


@case("reset PROTOCOL_ERROR", "goaway PROTOCOL_ERROR")
def uppercase_name():
    return ask("/never/uppercase", ("X-Upper", "1"))


@case("reset PROTOCOL_ERROR", "goaway PROTOCOL_ERROR")
def space_in_a_name():
    return ask("/never/space", ("x space", "1"))


@case("reset PROTOCOL_ERROR", "goaway PROTOCOL_ERROR")
def empty_name():
    return ask("/never/empty-name", ("", "1"))


@case("reset PROTOCOL_ERROR", "goaway PROTOCOL_ERROR")
def crlf_in_a_value():
    return ask("/never/crlf", ("x-a", "1\r\nx-injected: 1"))


@case("reset PROTOCOL_ERROR", "goaway PROTOCOL_ERROR")
def newline_in_a_value():
    return ask("/never/lf", ("x-a", "1\nx-injected: 1"))


@case("reset PROTOCOL_ERROR", "goaway PROTOCOL_ERROR")
def nul_in_a_value():
    return ask("/never/nul", ("x-a", "1\x002"))


@case("reset PROTOCOL_ERROR", "goaway PROTOCOL_ERROR")
def crlf_in_the_path():
    return ask("/never/path HTTP/1.1\r\nx-injected: 1\r\n\r\n")


@case("reset PROTOCOL_ERROR", "goaway PROTOCOL_ERROR")
def space_in_the_path():
    return ask("/never/path HTTP/1.1")


@case("reset PROTOCOL_ERROR", "goaway PROTOCOL_ERROR")
def crlf_in_the_method():
    return ask("/never/method", method="GET /x HTTP/1.1\r\n\r\nGET")


@case("reset PROTOCOL_ERROR", "goaway PROTOCOL_ERROR")
def crlf_in_the_authority():
    return ask("/never/authority", authority=AUTHORITY + "\r\nx-injected: 1")


@case("reset PROTOCOL_ERROR", "goaway PROTOCOL_ERROR")
def connection_field():
    return ask("/never/connection", ("connection", "close"))


@case("reset PROTOCOL_ERROR", "goaway PROTOCOL_ERROR")
def transfer_encoding():
    return ask("/never/te-chunked", ("transfer-encoding", "chunked"))


@case("reset PROTOCOL_ERROR", "goaway PROTOCOL_ERROR")
def keep_alive_field():
    return ask("/never/keep-alive", ("keep-alive", "timeout=5"))


@case("reset PROTOCOL_ERROR", "goaway PROTOCOL_ERROR")
def upgrade_field():
    return ask("/never/upgrade", ("upgrade", "websocket"))


@case("reset PROTOCOL_ERROR", "goaway PROTOCOL_ERROR")
def te_other_than_trailers():
    return ask("/never/te", ("te", "gzip"))


@case("200")
def te_trailers():
    return ask("/served/te", ("te", "trailers"))


@case("reset PROTOCOL_ERROR")
def no_method():
    return ask("/never/no-method", method=None)


@case("reset PROTOCOL_ERROR")
def no_scheme():
    return ask("/never/no-scheme", scheme=None)


@case("reset PROTOCOL_ERROR", "400 bad_request")
def no_path():
    return ask(None)


@case("reset PROTOCOL_ERROR", "400 bad_request")
def empty_path():
    return ask("")


@case("400 bad_request")
def asterisk_path_with_get():
    return ask("*", ("x-case", "/never/asterisk"))


@case("reset PROTOCOL_ERROR", "400 bad_request")
def path_without_a_slash():
    return ask("never/slash")


@case("400 bad_request")
def encoded_nul_in_the_path():
    return ask("/never/%00")


@case("reset PROTOCOL_ERROR")
def repeated_pseudo_header():
    return ask("/never/repeated", (":path", "/never/again"))


@case("reset PROTOCOL_ERROR")
def pseudo_header_after_a_field():
    connection = Connection()
    fields = [(":method", "GET"), (":scheme", "http"), ("x-a", "1"), (":path", "/never/late")]
    connection.send(connection.headers(fields))
    return connection.outcome()


@case("reset PROTOCOL_ERROR", "goaway PROTOCOL_ERROR")
def unknown_pseudo_header():
    return ask("/never/pseudo", (":made-up", "1"))


@case("reset PROTOCOL_ERROR")
def status_in_a_request():
    return ask("/never/status", (":status", "200"))


@case("reset PROTOCOL_ERROR")
def protocol_without_connect():
    return ask("/never/protocol", (":protocol", "websocket"))


@case("400 bad_request", "reset PROTOCOL_ERROR")
def authority_and_host_differ():
    return ask("/never/host", ("host", "elsewhere"))


@case("200")
def authority_and_host_agree():
    return ask("/served/host", ("host", AUTHORITY.upper()))


@case("400 bad_request")
def several_hosts():
    return ask("/never/hosts", ("host", AUTHORITY), ("host", AUTHORITY))


@case("200")
def host_in_place_of_the_authority():
    return ask("/served/host-only", ("host", AUTHORITY), authority=None)


@case("400 bad_request")
def neither_authority_nor_host():
    return ask("/never/nobody", authority=None)


@case("reset PROTOCOL_ERROR", "400 bad_request")
def empty_authority():
    return ask("/never/empty-authority", authority="")


@case("400 bad_request")
def authority_with_user_information():
    return ask("/never/user", authority=f"user:secret@{AUTHORITY}")


@case("400 bad_request", "reset PROTOCOL_ERROR")
def connect_with_a_path():
    return ask("/never/connect", method="CONNECT")


# Bodies -----------------------------------------------------------------------------------------


@case("reset PROTOCOL_ERROR")
def content_length_without_a_body():
    return ask("/never/length", ("content-length", "5"), method="POST")


@case("reset PROTOCOL_ERROR", "goaway PROTOCOL_ERROR", "400 bad_request")
def less_data_than_the_content_length():
    connection = Connection()
    extra = [("content-length", "10")]
    request = connection.request("/served/short", extra, end=False, method="POST")
    connection.send(request, raw(0, 1, 1, b"hello"))
    return connection.outcome()


@case("reset PROTOCOL_ERROR", "goaway PROTOCOL_ERROR", "400 bad_request")
def more_data_than_the_content_length():
    connection = Connection()
    extra = [("content-length", "3")]
    request = connection.request("/served/long", extra, end=False, method="POST")
    connection.send(request, raw(0, 1, 1, b"hello"))
    return connection.outcome()


@case("reset PROTOCOL_ERROR", "400 bad_request")
def content_length_that_is_no_number():
    return ask("/never/length", ("content-length", "+5"), method="POST")


@case("reset PROTOCOL_ERROR", "400 bad_request")
def different_content_lengths():
    extra = [("content-length", "5"), ("content-length", "6")]
    connection = Connection()
    request = connection.request("/never/lengths", extra, end=False, method="POST")
    connection.send(request, raw(0, 1, 1, b"hello"))
    return connection.outcome()


@case("200")
def trailers_with_a_pseudo_header():
    """h2 leaves it out; that it goes nowhere is what counts."""
    connection = Connection()
    request = connection.request("/served/trailers", end=False, method="POST")
    trailers = connection.headers([(":path", "/never/trailer")])
    connection.send(request, raw(0, 0, 1, b"hello"), trailers)
    return connection.outcome()


@case("reset PROTOCOL_ERROR", "goaway PROTOCOL_ERROR", "400 bad_request")
def trailers_without_end_stream():
    connection = Connection()
    request = connection.request("/served/trailers", end=False, method="POST")
    trailers = connection.headers([("x-sum", "1")], end=False)
    connection.send(request, raw(0, 0, 1, b"hello"), trailers)
    return connection.outcome()


@case("200")
def trailers():
    connection = Connection()
    request = connection.request("/served/trailers", end=False, method="POST")
    connection.send(request, raw(0, 0, 1, b"hello"), connection.headers([("x-sum", "1")]))
    return connection.outcome()


@case("100, then 200")
def expectation_is_met_when_the_body_is_wanted():
    connection = Connection()
    extra = [("expect", "100-continue"), ("content-length", "5")]
    connection.send(connection.request("/served/expect", extra, end=False, method="POST"))
    first = connection.outcome()
    body = DataFrame(1, b"hello")
    body.flags.add("END_STREAM")
    connection.send(body)
    return f"{first}, then {connection.outcome()}"


@case("404 no_route")
def expectation_of_a_refused_request_is_not_met():
    extra = [("expect", "100-continue"), ("content-length", "5")]
    return ask("/never", *extra, end=False, method="POST", authority="nobody")


@case("404 no_route, 0 bytes")
def answer_of_ours_to_head_has_no_content():
    connection = Connection()
    connection.send(connection.request("/never", method="HEAD", authority="nobody"))
    outcome = connection.outcome()
    # Whatever followed the end of the stream would come before this answer.
    connection.send(connection.request("/served/next", stream=3))
    size = 0
    while True:
        frame = connection.frame()
        size += len(frame.data) if isinstance(frame, DataFrame) and frame.stream_id == 1 else 0
        if frame.stream_id == 3:
            return f"{outcome}, {size} bytes"


def main():
    only = sys.argv[3:]
    failed = 0
    ran = 0
    for function, expected in CASES:
        name = function.__name__
        if only and name not in only:
            continue
        ran += 1
        began = time.monotonic()
        try:
            outcome = function()
        except (Closed, OSError, AssertionError) as error:
            outcome = f"{type(error).__name__} {error}"
        after = ask("/served/after")
        ok = outcome in expected and after == "200"
        failed += not ok
        wanted = "" if ok else f" (expected {' or '.join(expected)}; then 200, was {after})"
        took = time.monotonic() - began
        print(f"{'ok' if ok else 'FAILED'} {name}: {outcome}{wanted} [{took:.2f} s]", flush=True)
    print(f"{ran} cases, {failed} failed")
    sys.exit(failed != 0)


if __name__ == "__main__":
    main()
