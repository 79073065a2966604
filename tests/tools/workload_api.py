"""A SPIFFE Workload API on grpcio, over a Unix socket.

    workload_api.py SOCKET FILE

FILE is JSON: {"svids": [{"id", "chain", "key", "bundle", "hint"}]}, PEM texts, or {"deny": "why"}.
It is read for every stream, and again for all that are open at SIGUSR1. Prints "serving", and
"stream N" for each stream that it opened. A call without the metadata that the standard asks for
is refused.
"""

import base64
import json
import os
import queue
import signal
import ssl
import sys
import threading
from concurrent import futures

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

FETCH = "/SpiffeWorkloadAPI/FetchX509SVID"
TEXT, BYTES, MESSAGE = 9, 12, 11

# workload.proto of the SPIFFE Workload API, as far as X.509 goes.
FIELDS = {
    "X509SVID": [
        ("spiffe_id", 1, TEXT),
        ("x509_svid", 2, BYTES),
        ("x509_svid_key", 3, BYTES),
        ("bundle", 4, BYTES),
        ("hint", 5, TEXT),
    ],
    "X509SVIDResponse": [("svids", 1, MESSAGE), ("crl", 2, BYTES)],
}


def messages():
    """The message classes by name; no code is generated."""
    file = descriptor_pb2.FileDescriptorProto(name="workload.proto", syntax="proto3")
    for name, fields in FIELDS.items():
        message = file.message_type.add(name=name)
        for field, number, kind in fields:
            repeated = name == "X509SVIDResponse"
            one = message.field.add(name=field, number=number, type=kind, label=3 if repeated else 1)
            if kind == MESSAGE:
                one.type_name = ".X509SVID"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {n: message_factory.GetMessageClass(pool.FindMessageTypeByName(n)) for n in FIELDS}


MESSAGES = messages()


def der(text):
    """Certificates of a PEM text, one after another as DER."""
    end = "-----END CERTIFICATE-----"
    parts = [part + end for part in text.split(end) if part.strip()]
    return b"".join(ssl.PEM_cert_to_DER_cert(part.strip()) for part in parts)


def key(text):
    """A PEM key (PKCS#8) as DER."""
    lines = [line for line in text.strip().splitlines() if not line.startswith("-----")]
    return base64.b64decode("".join(lines))


def answer(said):
    response = MESSAGES["X509SVIDResponse"]()
    for svid in said["svids"]:
        response.svids.add(
            spiffe_id=svid["id"],
            x509_svid=der(svid["chain"]),
            x509_svid_key=key(svid["key"]),
            bundle=der(svid["bundle"]),
            hint=svid.get("hint", ""),
        )
    return response


class Api(grpc.GenericRpcHandler):
    def __init__(self, path):
        self.path = path
        self.lock = threading.Lock()
        self.streams = []
        self.opened = 0

    def push(self, *_):
        with self.lock:
            for stream in self.streams:
                stream.put(None)

    def fetch(self, request, context):
        if ("workload.spiffe.io", "true") not in context.invocation_metadata():
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "security header missing")
        changed = queue.SimpleQueue()
        context.add_callback(lambda: changed.put("gone"))
        with self.lock:
            self.streams.append(changed)
            self.opened += 1
            print(f"stream {self.opened}", flush=True)
        while True:
            with open(self.path) as file:
                said = json.load(file)
            if "deny" in said:
                context.abort(grpc.StatusCode.PERMISSION_DENIED, said["deny"])
            yield answer(said)
            if changed.get() == "gone":
                return

    def service(self, details):
        if details.method != FETCH:
            return None
        return grpc.unary_stream_rpc_method_handler(
            self.fetch, None, lambda message: message.SerializeToString()
        )


if __name__ == "__main__":
    address, path = sys.argv[1:]
    if os.path.exists(address):
        os.unlink(address)
    api = Api(path)
    # grpcio's threads hold the lock, never the one that handlers of signals interrupt.
    signal.signal(signal.SIGUSR1, api.push)
    server = grpc.server(futures.ThreadPoolExecutor(8), handlers=[api])
    assert server.add_insecure_port(f"unix:{address}")
    server.start()
    print("serving", flush=True)
    server.wait_for_termination()
