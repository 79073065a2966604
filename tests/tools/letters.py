"""Servers and clients of async calls on `requests`, curl and grpcio, none of which knows of them.

Prints the ports of an HTTP and of a gRPC server, reads where the sidecar takes calls, and sends
letters to both through it: `mailer` is the HTTP server's name, `orders` the gRPC server's.
"""

import http.server
import json
import subprocess
import sys
import threading
from concurrent import futures

import grpc
import requests

# Every byte, several times, with what a careless relay would take for an end.
BODY = bytes(range(256)) * 41 + b"\r\n0\r\n\r\n"
seen, calls = [], []


class Mailer(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        seen.append((self.path, self.headers, body))
        self.send_response(201, "Made")
        self.send_header("content-type", "application/x-echo")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


class Orders(grpc.GenericRpcHandler):
    def service(self, details):
        assert details.method == "/shop.Orders/Send", details.method

        def send(request, context):
            calls.append((request, dict(context.invocation_metadata())))
            return b"made"

        return grpc.unary_unary_rpc_method_handler(send)


mailer = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Mailer)
threading.Thread(target=mailer.serve_forever, daemon=True).start()
orders = grpc.server(futures.ThreadPoolExecutor(4), handlers=[Orders()])
print(mailer.server_address[1], orders.add_insecure_port("127.0.0.1:0"), flush=True)
orders.start()
sidecar = sys.stdin.readline().strip()
url = f"http://{sidecar}/v1/mails?to=a%20b&to=c"


def send(prefer, key, body=BODY):
    headers = {"Host": "mailer", "Prefer": prefer, "Idempotency-Key": f'"{key}"'}
    return requests.post(url, data=body, headers=headers, timeout=60)


def follow(location):
    """The status once it is final, and the result."""
    place = f"http://{sidecar}{location}"
    headers = {"Host": "mailer", "Prefer": "wait=50"}
    status = requests.get(place, headers=headers, timeout=60).json()
    return status, requests.get(f"{place}/result", headers={"Host": "mailer"}, timeout=60)


receipt = send("respond-async", "one")
assert receipt.status_code == 202, receipt.text
assert receipt.headers["Preference-Applied"] == "respond-async"
status, result = follow(receipt.headers["Location"])
assert status["status"] == "succeeded", status
assert (result.status_code, result.content) == (201, BODY)
assert result.headers["content-type"] == "application/x-echo"
path, headers, body = seen[0]
assert (path, body) == ("/v1/mails?to=a%20b&to=c", BODY), path
assert headers["outrigger-message-id"] == receipt.json()["id"]
assert headers["idempotency-key"] == '"one"' and headers["host"] == "mailer", headers
again = send("respond-async", "one")
assert again.json() == receipt.json(), again.text

waited = send("respond-async, wait=50", "two")
assert (waited.status_code, waited.content) == (201, BODY), waited.status_code
chunks = (BODY[at : at + 1000] for at in range(0, len(BODY), 1000))
chunked = send("respond-async, wait=50", "three", chunks)
assert (chunked.status_code, chunked.content) == (201, BODY), chunked.status_code
assert len(seen) == 3, len(seen)

fields = ["Host: mailer", "Prefer: respond-async", "Content-Type: application/octet-stream"]
options = [option for field in fields for option in ("-H", field)]
command = ["curl", "-sSf", "--data-binary", "@-", "-o", "-", "-w", "%{http_code}", *options, url]
curled = subprocess.run(command, input=BODY, stdout=subprocess.PIPE, check=True).stdout
assert curled.endswith(b"202"), curled
status, result = follow(json.loads(curled[:-3])["statusUrl"])
assert status["status"] == "succeeded" and result.content == BODY, status

channel = grpc.insecure_channel(sidecar, options=[("grpc.default_authority", "orders")])
call = channel.unary_unary("/shop.Orders/Send").with_call(BODY, timeout=60)
assert call[0] == b"", "the acknowledgement is an empty message"
message = dict(call[1].initial_metadata())["outrigger-message-id"]
status, _ = follow(f"/.outrigger/messages/{message}")
assert status["status"] == "succeeded", status
request, metadata = calls[0]
assert request == BODY and metadata["outrigger-message-id"] == message, metadata
assert len(calls) == 1, len(calls)
print("letters ok")
