"""Says client hellos to a TLS 1.3 server that it must refuse, and prints what it answers as JSON.

    tls_hello.py ADDRESS PORT

Each answer is the name of the alert, "hello" for a server that went on, or "closed". The cases
follow RFC 8446; after the alert the connection must be closed.
"""

import json
import os
import socket
import struct
import sys

ALERTS = {
    10: "unexpected_message",
    22: "record_overflow",
    40: "handshake_failure",
    47: "illegal_parameter",
    50: "decode_error",
    70: "protocol_version",
    109: "missing_extension",
    110: "unsupported_extension",
    120: "no_application_protocol",
}
X25519, P256 = 0x001D, 0x0017
SUPPORTED_GROUPS, SIGNATURES, PSK, VERSIONS, PSK_MODES, KEY_SHARE = 10, 13, 41, 43, 45, 51


def vector(size, *parts):
    body = b"".join(parts)
    return len(body).to_bytes(size, "big") + body


def u16(*numbers):
    return b"".join(struct.pack("!H", number) for number in numbers)


def extension(kind, body):
    return u16(kind) + vector(2, body)


def share(group, key):
    return u16(group) + vector(2, key)


def defaults():
    """The extensions of a good hello."""
    return {
        VERSIONS: vector(1, u16(0x0304)),
        SUPPORTED_GROUPS: vector(2, u16(X25519, P256)),
        SIGNATURES: vector(2, u16(0x0403, 0x0807, 0x0804)),
        # The base point: a key of X25519 as good as any.
        KEY_SHARE: vector(2, share(X25519, b"\x09" + bytes(31))),
    }


def hello(change=None, suites=(0x1301, 0x1302, 0x1303), compression=b"\0", more=b"", version=0x0303):
    extensions = defaults()
    for kind, body in (change or {}).items():
        if body is None:
            del extensions[kind]
        else:
            extensions[kind] = body
    listed = b"".join(extension(kind, body) for kind, body in extensions.items())
    body = (
        u16(version)
        + os.urandom(32)
        + vector(1, os.urandom(32))
        + vector(2, u16(*suites))
        + vector(1, compression)
        + vector(2, listed, more)
    )
    return b"\x01" + vector(3, body)


def record(body, kind=22, version=0x0301):
    return bytes([kind]) + u16(version) + vector(2, body)


def p256(key):
    """A hello that can only use this key."""
    groups = {SUPPORTED_GROUPS: vector(2, u16(P256)), KEY_SHARE: vector(2, share(P256, key))}
    return hello(groups)


GOOD = hello()
TICKET = extension(
    PSK, vector(2, vector(2, b"ticket"), bytes(4)) + vector(2, vector(1, bytes(32)))
)
# What nobody knows and everybody must pass over (RFC 8701).
GREASE = {
    0x0A0A: b"",
    VERSIONS: vector(1, u16(0x1A1A, 0x0304)),
    SUPPORTED_GROUPS: vector(2, u16(0x2A2A, X25519)),
}
CASES = {
    "good": record(GOOD),
    "in pieces": record(GOOD[:1]) + record(GOOD[1:40]) + record(GOOD[40:]),
    "grease": record(hello(GREASE, suites=(0x3A3A, 0x1301))),
    "a key of another group": record(hello({KEY_SHARE: vector(2, b"")})),
    # Versions.
    "tls 1.2 at most": record(hello({VERSIONS: None})),
    "tls 1.2 listed only": record(hello({VERSIONS: vector(1, u16(0x0303))})),
    "tls 1.0": record(hello({VERSIONS: None}, version=0x0301)),
    "draft 28 only": record(hello({VERSIONS: vector(1, u16(0x7F1C))})),
    # Negotiation.
    "suites of tls 1.2 only": record(hello(suites=(0xC02B, 0xC02F, 0x009C))),
    "no encryption": record(hello(suites=(0x0000, 0x0001, 0xC0B4))),
    "no signatures listed": record(hello({SIGNATURES: None})),
    "no groups listed": record(hello({SUPPORTED_GROUPS: None})),
    "finite fields only": record(
        hello({SUPPORTED_GROUPS: vector(2, u16(0x0100)), KEY_SHARE: vector(2, b"")})
    ),
    # Keys.
    "no key share": record(hello({KEY_SHARE: None})),
    "short key": record(hello({KEY_SHARE: vector(2, share(X25519, bytes(31)))})),
    "key of small order": record(hello({KEY_SHARE: vector(2, share(X25519, bytes(32)))})),
    "point off the curve": record(p256(b"\x04" + b"\x01" * 64)),
    "compressed point": record(p256(b"\x02" + b"\x01" * 32)),
    "two keys of a group": record(
        hello({KEY_SHARE: vector(2, share(X25519, b"\x09" + bytes(31)) * 2)})
    ),
    # Form.
    "compression": record(hello(compression=b"\x01\x00")),
    "extension twice": record(hello(more=extension(VERSIONS, vector(1, u16(0x0304))))),
    "bytes behind the hello": record(GOOD[:1] + vector(3, GOOD[4:], b"\0")),
    "hello cut short": record(GOOD[:1] + vector(3, GOOD[4:-7])),
    "empty extensions of a length": record(hello({SUPPORTED_GROUPS: b"\x00\x03\x00"})),
    "psk that is not last": record(hello(more=TICKET + extension(PSK_MODES, b"\x01\x01"))),
    "psk without modes": record(hello(more=TICKET)),
    "unknown psk": record(hello(more=extension(PSK_MODES, b"\x01\x01") + TICKET)),
    # Records.
    "finished first": record(b"\x14" + vector(3, bytes(32))),
    "record too long": b"\x16\x03\x01\xff\xff" + GOOD + bytes(65_600),
    "empty record": record(b"") * 2 + record(GOOD),
    "application data inside": record(GOOD[:40]) + record(b"hello", kind=23) + record(GOOD[40:]),
    "change cipher spec first": record(b"\x01", kind=20) + record(GOOD),
    "alert instead": record(b"\x02\x28", kind=21),
}


def answer(address, port, said):
    with socket.create_connection((address, port), timeout=20) as connection:
        connection.sendall(said)
        # Nothing follows: whoever waits for more is told that there is none.
        connection.shutdown(socket.SHUT_WR)
        received = b""
        try:
            while part := connection.recv(4096):
                received += part
        except ConnectionError:
            pass
    if received[:1] == b"\x15":
        return ALERTS.get(received[6], received[6])
    if received[:1] == b"\x16":
        # A retry that asks for another key has a random of its own (RFC 8446 §4.1.3).
        return "retry" if received[11:15] == b"\xcf\x21\xad\x74" else "hello"
    return "closed" if not received else received[:16].hex()


if __name__ == "__main__":
    address, port = sys.argv[1], int(sys.argv[2])
    print(json.dumps({name: answer(address, port, said) for name, said in CASES.items()}))
