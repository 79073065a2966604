"""Shakes hands with a TLS 1.3 server by hand, breaks one rule each time, and prints as JSON what the
server made of it.

    tls_handshake.py ADDRESS PORT CERTIFICATES KEY CASE...

CERTIFICATES and KEY (P-256) are those of a good client. Each answer is the name of the alert,
"answered" with the first line of the application's answer, or "closed". The cases follow RFC 8446;
none but "good" and the key updates may reach the application.
"""

import hashlib
import hmac
import json
import socket
import struct
import sys

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

ALERTS = {
    10: "unexpected_message",
    20: "bad_record_mac",
    22: "record_overflow",
    40: "handshake_failure",
    42: "bad_certificate",
    47: "illegal_parameter",
    48: "unknown_ca",
    49: "access_denied",
    50: "decode_error",
    51: "decrypt_error",
    80: "internal_error",
    116: "certificate_required",
}
HANDSHAKE, DATA, ALERT = 22, 23, 21
CERTIFICATE, VERIFY, FINISHED, KEY_UPDATE, TICKET = 11, 15, 20, 24, 4
REQUEST = b"GET /reached HTTP/1.1\r\nhost: orders\r\nconnection: close\r\n\r\n"
P256_SHA256 = 0x0403


def vector(size, *parts):
    body = b"".join(parts)
    return len(body).to_bytes(size, "big") + body


def u16(*numbers):
    return b"".join(struct.pack("!H", number) for number in numbers)


def message(kind, *parts):
    return bytes([kind]) + vector(3, *parts)


def extension(kind, body):
    return u16(kind) + vector(2, body)


def digest(data):
    return hashlib.sha256(data).digest()


def extract(salt, key):
    return hmac.new(salt, key, "sha256").digest()


def expand(secret, label, context=b"", length=32):
    info = u16(length) + vector(1, b"tls13 " + label) + vector(1, context)
    out = hmac.new(secret, info + b"\x01", "sha256").digest()
    return out[:length]


class Keys:
    """One direction's keys (RFC 8446, 7.3)."""

    def __init__(self, secret):
        self.secret = secret
        self.cipher = AESGCM(expand(secret, b"key", length=16))
        self.iv = expand(secret, b"iv", length=12)
        self.number = 0

    def nonce(self):
        number = self.number.to_bytes(12, "big")
        self.number += 1
        return bytes(a ^ b for a, b in zip(self.iv, number))

    def seal(self, kind, body, padding=0):
        inner = body + bytes([kind]) + bytes(padding)
        head = bytes([DATA]) + u16(0x0303, len(inner) + 16)
        return head + self.cipher.encrypt(self.nonce(), inner, head)

    def open(self, head, body):
        inner = self.cipher.decrypt(self.nonce(), body, head).rstrip(b"\0")
        return inner[-1], inner[:-1]

    def next(self):
        return Keys(expand(self.secret, b"traffic upd"))


class Alert(Exception):
    pass


class Client:
    """A handshake with a server, up to where a case breaks it."""

    def __init__(self, address, port, chain, key):
        self.socket = socket.create_connection((address, port), timeout=20)
        self.chain, self.key = chain, key
        self.transcript = b""
        self.buffer = b""
        self.reading = self.writing = None
        self.tickets = 0

    def take(self, length):
        while len(self.buffer) < length:
            more = self.socket.recv(65536)
            if not more:
                raise EOFError
            self.buffer += more
        taken, self.buffer = self.buffer[:length], self.buffer[length:]
        return taken

    def record(self):
        while True:
            head = self.take(5)
            body = self.take(struct.unpack("!H", head[3:])[0])
            kind = head[0]
            if kind == 20:
                continue
            if kind == DATA:
                kind, body = self.reading.open(head, body)
            if kind == ALERT:
                if body[1] == 0:
                    raise EOFError
                raise Alert(ALERTS.get(body[1], str(body[1])))
            return kind, body

    def hello(self, early_data=False):
        private = X25519PrivateKey.generate()
        self.private = private
        public = private.public_key().public_bytes_raw()
        listed = [
            extension(43, vector(1, u16(0x0304))),
            extension(10, vector(2, u16(0x001D))),
            extension(13, vector(2, u16(P256_SHA256, 0x0804, 0x0807))),
            extension(51, vector(2, u16(0x001D) + vector(2, public))),
            extension(16, vector(2, vector(1, b"outrigger-http/1.1"))),
        ]
        if early_data:
            listed.append(extension(42, b""))
            listed.append(extension(45, b"\x01\x01"))
            offered = vector(2, vector(2, b"a ticket"), bytes(4)) + vector(2, vector(1, bytes(32)))
            listed.append(extension(41, offered))
        body = u16(0x0303) + bytes(32) + vector(1, bytes(32)) + vector(2, u16(0x1301)) + b"\x01\x00"
        return message(1, body, vector(2, *listed))

    def send(self, kind, body, **more):
        if self.writing is None:
            self.socket.sendall(bytes([kind]) + u16(0x0301) + vector(2, body))
        else:
            self.socket.sendall(self.writing.seal(kind, body, **more))

    def greet(self, early_data=False):
        """Says hello, and reads the server's flight to its end."""
        hello = self.hello(early_data)
        self.send(HANDSHAKE, hello)
        if early_data:
            # Under keys that the server cannot know: to be passed over (RFC 8446, 4.2.10).
            self.send(DATA, bytes(100))
        self.transcript = hello
        _, answer = self.record()
        self.transcript += answer
        at = 4 + 2 + 32
        at += 1 + answer[at] + 3 + 2
        key = None
        while at < len(answer):
            kind, length = struct.unpack("!HH", answer[at : at + 4])
            if kind == 51:
                key = answer[at + 8 : at + 4 + length]
            at += 4 + length
        shared = self.private.exchange(X25519PublicKey.from_public_bytes(key))
        early = extract(bytes(32), bytes(32))
        self.handshake = extract(expand(early, b"derived", digest(b"")), shared)
        of = digest(self.transcript)
        self.client_secret = expand(self.handshake, b"c hs traffic", of)
        self.server_secret = expand(self.handshake, b"s hs traffic", of)
        self.reading, self.writing = Keys(self.server_secret), Keys(self.client_secret)
        pending = b""
        while True:
            _, body = self.record()
            pending += body
            while len(pending) >= 4 and len(pending) >= 4 + int.from_bytes(pending[1:4], "big"):
                end = 4 + int.from_bytes(pending[1:4], "big")
                one, pending = pending[:end], pending[end:]
                self.transcript += one
                if one[0] == FINISHED:
                    master = extract(expand(self.handshake, b"derived", digest(b"")), bytes(32))
                    of = digest(self.transcript)
                    # The server goes on with these, whatever becomes of us.
                    self.reading = Keys(expand(master, b"s ap traffic", of))
                    self.data_secret = expand(master, b"c ap traffic", of)
                    return

    def say(self, one, **more):
        self.transcript += one
        self.send(HANDSHAKE, one, **more)

    def certificate(self):
        entries = [vector(3, der) + vector(2, b"") for der in self.chain]
        return message(CERTIFICATE, vector(1, b""), vector(3, *entries))

    def verify(self, scheme=P256_SHA256, context=b"client", flip=False):
        signed = b" " * 64 + b"TLS 1.3, " + context + b" CertificateVerify\0"
        signed += digest(self.transcript)
        signature = self.key.sign(signed, ec.ECDSA(hashes.SHA256()))
        if flip:
            signature = signature[:-1] + bytes([signature[-1] ^ 1])
        return message(VERIFY, u16(scheme), vector(2, signature))

    def finished(self, flip=False):
        key = expand(self.client_secret, b"finished")
        mac = hmac.new(key, digest(self.transcript), "sha256").digest()
        if flip:
            mac = bytes([mac[0] ^ 1]) + mac[1:]
        return message(FINISHED, mac)

    def applied(self):
        """Changes to the keys of application data."""
        self.writing = Keys(self.data_secret)

    def finish(self):
        self.say(self.certificate())
        self.say(self.verify())
        self.say(self.finished())
        self.applied()

    def answer(self):
        """What the server makes of it."""
        text = b""
        while True:
            kind, body = self.record()
            if kind == HANDSHAKE:
                if body[0] == TICKET:
                    self.tickets += 1
                elif body[0] == KEY_UPDATE:
                    self.reading = self.reading.next()
            elif kind == DATA:
                text += body
                if b"\r\n" in text:
                    return "answered " + text.split(b"\r\n")[0].decode()


def good(client):
    client.finish()
    client.send(DATA, REQUEST)


def corrupted_verify(client):
    client.say(client.certificate())
    client.say(client.verify(flip=True))
    client.say(client.finished())
    client.applied()
    client.send(DATA, REQUEST)


def verify_of_a_server(client):
    client.say(client.certificate())
    client.say(client.verify(context=b"server"))
    client.say(client.finished())
    client.applied()
    client.send(DATA, REQUEST)


def verify_of_another_handshake(client):
    client.say(client.certificate())
    whole, client.transcript = client.transcript, b"of another one"
    one = client.verify()
    client.transcript = whole
    client.say(one)
    client.say(client.finished())
    client.applied()
    client.send(DATA, REQUEST)


def scheme(number):
    def of(client):
        client.say(client.certificate())
        client.say(client.verify(scheme=number))
        client.say(client.finished())
        client.applied()
        client.send(DATA, REQUEST)

    return of


def no_verify(client):
    client.say(client.certificate())
    client.say(client.finished())
    client.applied()
    client.send(DATA, REQUEST)


def no_certificate(client):
    client.say(message(CERTIFICATE, vector(1, b""), vector(3, b"")))
    client.say(client.finished())
    client.applied()
    client.send(DATA, REQUEST)


def certificate_twice(client):
    client.say(client.certificate())
    client.say(client.certificate())


def corrupted_finished(client):
    client.say(client.certificate())
    client.say(client.verify())
    client.say(client.finished(flip=True))
    client.applied()
    client.send(DATA, REQUEST)


def no_finished(client):
    client.say(client.certificate())
    client.say(client.verify())
    client.applied()
    client.send(DATA, REQUEST)


def data_before_finished(client):
    client.say(client.certificate())
    client.say(client.verify())
    client.send(DATA, REQUEST)


def corrupted_record(client):
    sealed = client.writing.seal(HANDSHAKE, client.certificate())
    client.socket.sendall(sealed[:-1] + bytes([sealed[-1] ^ 1]))


def second_hello(client):
    client.finish()
    client.send(HANDSHAKE, client.hello())
    client.send(DATA, REQUEST)


def second_finished(client):
    client.finish()
    client.send(HANDSHAKE, client.finished())
    client.send(DATA, REQUEST)


def unknown_message(client):
    client.finish()
    client.send(HANDSHAKE, message(99, b""))
    client.send(DATA, REQUEST)


def oversized(client):
    client.finish()
    client.send(DATA, bytes(2**14 + 1))
    client.send(DATA, REQUEST)


def oversized_padding(client):
    client.finish()
    client.send(DATA, b"", padding=2**14 + 300)
    client.send(DATA, REQUEST)


def key_update(client, asked=0):
    client.finish()
    client.send(HANDSHAKE, message(KEY_UPDATE, bytes([asked])))
    client.writing = client.writing.next()
    client.send(DATA, REQUEST)


def key_update_asked_for(client):
    key_update(client, asked=1)


def bad_key_update(client):
    client.finish()
    client.send(HANDSHAKE, message(KEY_UPDATE, b"\x07"))
    client.send(DATA, REQUEST)


def key_updates(count):
    """All of them asked for, and none of the answers read."""

    def of(client):
        client.finish()
        for _ in range(count):
            client.send(HANDSHAKE, message(KEY_UPDATE, b"\x01"))
            client.writing = client.writing.next()
        client.send(DATA, REQUEST)

    return of


CASES = {
    "good": good,
    "corrupted verify": corrupted_verify,
    "verify of a server": verify_of_a_server,
    "verify of another handshake": verify_of_another_handshake,
    "scheme of another curve": scheme(0x0503),
    "scheme of rsa": scheme(0x0804),
    "scheme of tls 1.2": scheme(0x0401),
    "scheme of sha-1": scheme(0x0203),
    "no verify": no_verify,
    "no certificate": no_certificate,
    "certificate twice": certificate_twice,
    "corrupted finished": corrupted_finished,
    "no finished": no_finished,
    "data before finished": data_before_finished,
    "corrupted record": corrupted_record,
    "second hello": second_hello,
    "second finished": second_finished,
    "unknown message": unknown_message,
    "oversized": oversized,
    "oversized padding": oversized_padding,
    "key update": key_update,
    "key update asked for": key_update_asked_for,
    "bad key update": bad_key_update,
    "many key updates": key_updates(2000),
    "early data": good,
}


def meet(name, *to):
    client = Client(*to)
    try:
        client.greet(early_data=name == "early data")
        CASES[name](client)
        made = client.answer()
    except Alert as alert:
        made = str(alert)
    except (EOFError, ConnectionError, BrokenPipeError):
        made = "closed"
    if client.tickets:
        made += " and a ticket"
    return made


def main():
    address, port, certificates, key, *names = sys.argv[1:]
    with open(certificates, "rb") as file:
        listed = x509.load_pem_x509_certificates(file.read())
    chain = [one.public_bytes(serialization.Encoding.DER) for one in listed]
    with open(key, "rb") as file:
        private = serialization.load_pem_private_key(file.read(), None)
    to = (address, int(port), chain, private)
    print(json.dumps({name: meet(name, *to) for name in names or CASES}))


main()
