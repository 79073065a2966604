"""Calls `grpc_server.py` in every way that gRPC has, with grpcio.

    grpc_client.py HOST:PORT AUTHORITY [CHECK...]

Makes the checks that are named, or all. Ends with a line `N calls, 0 failed` and status 0, or with the traceback of the check that failed.
"""

import os
import sys
import threading
import time
from concurrent import futures

import grpc

SERVICE = "/outrigger.test.Echo/"
calls = 0
lock = threading.Lock()


def done(number=1):
    global calls
    with lock:
        calls += number


class Client:
    """The methods of the server."""

    def __init__(self, target, authority):
        self.channel = grpc.insecure_channel(
            target,
            options=[
                ("grpc.default_authority", authority),
                ("grpc.enable_retries", 0),
                ("grpc.max_receive_message_length", -1),
                ("grpc.max_send_message_length", -1),
            ],
        )
        unary = self.channel.unary_unary
        self.echo = unary(SERVICE + "Echo")
        self.sleep = unary(SERVICE + "Sleep")
        self.fail = unary(SERVICE + "Fail")
        self.was_noticed = unary(SERVICE + "WasNoticed")
        self.unknown = unary(SERVICE + "NoSuchMethod")
        self.count = self.channel.unary_stream(SERVICE + "Count")
        self.fail_late = self.channel.unary_stream(SERVICE + "FailLate")
        self.forever = self.channel.unary_stream(SERVICE + "Forever")
        self.total = self.channel.stream_unary(SERVICE + "Total")
        self.chat = self.channel.stream_stream(SERVICE + "Chat")


def expect(condition, what):
    if not condition:
        raise AssertionError(what)


def failure(code, call):
    """The error of a call that must fail with `code`."""
    try:
        call()
    except grpc.RpcError as error:
        expect(error.code() == code, f"expected {code}, got {error.code()}: {error.details()}")
        done()
        return error
    raise AssertionError(f"expected {code}, but the call succeeded")


def unary(client):
    def one(number):
        message = f"message {number}".encode()
        expect(client.echo(message, timeout=20) == message, "another message came back")
        done()

    with futures.ThreadPoolExecutor(16) as pool:
        list(pool.map(one, range(400)))
    expect(client.echo(b"", timeout=20) == b"", "an empty message stays an empty message")
    done()


def streams(client):
    numbers = [int(m) for m in client.count(b"1000", timeout=30)]
    expect(numbers == list(range(1000)), "a message of the server's stream is missing")
    done()
    expect(list(client.count(b"0", timeout=20)) == [], "an empty stream is not empty")
    done()
    messages = [os.urandom(n % 3000) for n in range(1000)]
    answer = client.total(iter(messages), timeout=30).decode()
    expected = f"1000 {sum(map(len, messages))}"
    expect(answer == expected, f"of the client's stream arrived {answer}, not {expected}")
    done()
    conversation(client)
    with futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: conversation(client), range(16)))


def conversation(client):
    """Sends a message only when the last one is answered: nothing may be held back on the way."""
    turn = threading.Semaphore(1)

    def questions():
        for number in range(100):
            expect(turn.acquire(timeout=20), "the answer to the last message never came")
            yield f"{number}".encode()

    answers = []
    for answer in client.chat(questions(), timeout=40):
        answers.append(answer)
        turn.release()
    expect(answers == [f"re: {n}".encode() for n in range(100)], "the conversation went wrong")
    done()


def metadata(client):
    sent = [("x-test-plain", "value"), ("x-test-data-bin", bytes(range(256)))]
    answer, call = client.echo.with_call(b"m", metadata=sent, timeout=20)
    front = [(k, v) for k, v in call.initial_metadata() if k.startswith("x-test-")]
    expect(sorted(front) == sorted(sent), f"metadata came back as {front}")
    behind = dict(call.trailing_metadata())
    expect(behind.get("x-trailing") == "yes", f"trailing metadata came as {behind}")
    expect(behind.get("x-trailing-bin") == b"\x00\xff\x01", f"trailing metadata came as {behind}")
    done()


def deadlines(client):
    start = time.monotonic()
    failure(grpc.StatusCode.DEADLINE_EXCEEDED, lambda: client.sleep(b"5", timeout=0.4))
    expect(time.monotonic() - start < 3, "the deadline was not kept")
    left = float(client.sleep(b"0", timeout=7))
    done()
    expect(4 < left <= 7.1, f"of a deadline of 7 s the server saw {left}")


def errors(client):
    error = failure(grpc.StatusCode.NOT_FOUND, lambda: client.fail(b"", timeout=20))
    expect(error.details() == "no such thing", f"details came as {error.details()!r}")
    failure(grpc.StatusCode.UNIMPLEMENTED, lambda: client.unknown(b"", timeout=20))
    received = []

    def read():
        for message in client.fail_late(b"", timeout=20):
            received.append(message)

    error = failure(grpc.StatusCode.FAILED_PRECONDITION, read)
    expect(received == [b"0", b"1", b"2"], f"before the status came {received}")
    expect(error.details() == "100 % zu spät ✓", f"details came as {error.details()!r}")
    behind = dict(error.trailing_metadata())
    expect(behind.get("x-detail-bin") == b"\x08\x01", f"trailing metadata came as {behind}")


def large(client):
    for size in (64 << 10, 3 << 20, 32 << 20):
        message = os.urandom(size)
        expect(client.echo(message, timeout=60) == message, f"{size} bytes came back changed")
        done()


def cancellation(client):
    call = client.forever(b"", timeout=30)
    expect(next(call) == b"tick", "the stream does not flow")
    call.cancel()
    expect(client.was_noticed(b"", timeout=20) == b"yes", "the server never heard of the cancel")
    done(2)


if __name__ == "__main__":
    echo = Client(sys.argv[1], sys.argv[2])
    for check in (unary, streams, metadata, deadlines, errors, large, cancellation):
        if sys.argv[3:] and check.__name__ not in sys.argv[3:]:
            continue
        check(echo)
        print(f"{check.__name__}: ok", flush=True)
    print(f"{calls} calls, 0 failed")
