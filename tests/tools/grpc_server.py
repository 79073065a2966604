"""A gRPC server on grpcio, for the process tests.

    grpc_server.py [HOST:PORT]

Messages are plain bytes: the sidecars must not care what is in them, and so no code is generated.
Beside it runs grpcio's own health service: SIGUSR1 makes the service NOT_SERVING, SIGUSR2 SERVING.
Prints the port that it listens on; the default is one on loopback that is free.
"""

import signal
import sys
import threading
import time
from concurrent import futures

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

SERVICE = "outrigger.test.Echo"
noticed = threading.Event()


def echo(request, context):
    """Answers with the message, and with the caller's metadata in front and behind."""
    own = [(k, v) for k, v in context.invocation_metadata() if k.startswith("x-test-")]
    context.send_initial_metadata(own)
    context.set_trailing_metadata([("x-trailing", "yes"), ("x-trailing-bin", b"\x00\xff\x01")])
    return request


def count(request, context):
    """Streams as many numbers as the message says."""
    for number in range(int(request)):
        yield str(number).encode()


def total(requests, context):
    """Adds up the lengths of all messages."""
    messages, size = 0, 0
    for request in requests:
        messages += 1
        size += len(request)
    return f"{messages} {size}".encode()


def chat(requests, context):
    """Answers every message before the next one is sent."""
    for request in requests:
        yield b"re: " + request


def sleep(request, context):
    """Takes as many seconds as the message says; answers with the time its caller left it."""
    remaining = context.time_remaining()
    time.sleep(float(request))
    return str(remaining).encode()


def fail_late(request, context):
    """Three messages, and then the status in the trailers."""
    for number in range(3):
        yield str(number).encode()
    context.set_trailing_metadata([("x-detail-bin", b"\x08\x01")])
    context.abort(grpc.StatusCode.FAILED_PRECONDITION, "100 % zu spät ✓")


def fail(request, context):
    """Nothing but a status."""
    context.abort(grpc.StatusCode.NOT_FOUND, "no such thing")


def forever(request, context):
    """Streams until the caller goes away, and remembers that it went."""
    # Not after the loop: grpcio may drop the generator where it stands.
    context.add_callback(noticed.set)
    while not noticed.wait(0.02):
        yield b"tick"


def was_noticed(request, context):
    """Whether the end of a `Forever` was noticed within two seconds."""
    return b"yes" if noticed.wait(2) else b"no"


class Handler(grpc.GenericRpcHandler):
    """All methods by name."""

    methods = {
        "Echo": grpc.unary_unary_rpc_method_handler(echo),
        "Count": grpc.unary_stream_rpc_method_handler(count),
        "Total": grpc.stream_unary_rpc_method_handler(total),
        "Chat": grpc.stream_stream_rpc_method_handler(chat),
        "Sleep": grpc.unary_unary_rpc_method_handler(sleep),
        "FailLate": grpc.unary_stream_rpc_method_handler(fail_late),
        "Fail": grpc.unary_unary_rpc_method_handler(fail),
        "Forever": grpc.unary_stream_rpc_method_handler(forever),
        "WasNoticed": grpc.unary_unary_rpc_method_handler(was_noticed),
    }

    def service(self, details):
        package, method = details.method.lstrip("/").split("/")
        return self.methods.get(method) if package == SERVICE else None


if __name__ == "__main__":
    server = grpc.server(
        futures.ThreadPoolExecutor(32),
        handlers=[Handler()],
        options=[("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)],
    )
    checks = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)

    def serving(status):
        return lambda _number, _frame: checks.set(SERVICE, status)

    status = health_pb2.HealthCheckResponse
    checks.set(SERVICE, status.SERVING)
    signal.signal(signal.SIGUSR1, serving(status.NOT_SERVING))
    signal.signal(signal.SIGUSR2, serving(status.SERVING))
    port = server.add_insecure_port(sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:0")
    server.start()
    print(f"listening on port {port}", flush=True)
    server.wait_for_termination()
