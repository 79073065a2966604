"""Applications that know nothing of a mesh, and what calls them, for the tests of interception.

    apps.py serve HTTP WEBSOCKET ECHO GREETING     serves each on its port, IPv4 and IPv6
    apps.py call KIND,ADDRESS,PORT...              prints one line for each answer

A kind is `websocket`, `echo` (the client speaks first) or `greeting` (the server does).
"""

import http.server
import json
import socket
import socketserver
import sys
import threading

import websockets.sync.client
import websockets.sync.server


class Web(http.server.BaseHTTPRequestHandler):
    """Answers with what it was asked."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        asked = {"path": self.path, "host": self.headers["host"], "peer": self.client_address[0]}
        body = json.dumps(asked).encode() + b"\n"
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


class Echo(socketserver.StreamRequestHandler):
    """Answers when everything has arrived."""

    def handle(self):
        self.wfile.write(b"echo of " + self.rfile.read())


class Greeting(socketserver.StreamRequestHandler):
    """Speaks first, like SMTP, FTP and MySQL."""

    def handle(self):
        self.wfile.write(b"220 welcome\n")
        self.wfile.write(b"250 " + self.rfile.readline())


class Threads(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """A server on both families."""

    address_family = socket.AF_INET6
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128

    def server_bind(self):
        self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()


def websocket(connection):
    for message in connection:
        connection.send(f"ws {message}")


def serve(http_port, websocket_port, echo_port, greeting_port):
    listener = socket.create_server(
        ("::", websocket_port), family=socket.AF_INET6, dualstack_ipv6=True
    )
    servers = [
        Threads(("::", http_port), Web),
        Threads(("::", echo_port), Echo),
        Threads(("::", greeting_port), Greeting),
        websockets.sync.server.serve(websocket, sock=listener),
    ]
    threads = [threading.Thread(target=server.serve_forever) for server in servers]
    for thread in threads:
        thread.start()
    print("serving", flush=True)
    for thread in threads:
        thread.join()


def call(kind, address, port):
    if kind == "websocket":
        host = f"[{address}]" if ":" in address else address
        with websockets.sync.client.connect(f"ws://{host}:{port}/", open_timeout=10) as ws:
            ws.send("one")
            first = ws.recv(timeout=10)
            ws.send("two")
            return f"{first}, {ws.recv(timeout=10)}"
    with socket.create_connection((address, int(port)), 10) as connection:
        answers = connection.makefile()
        if kind == "echo":
            connection.sendall(b"bytes")
            connection.shutdown(socket.SHUT_WR)
            return answers.read()
        first = answers.readline().strip()
        connection.sendall(b"thanks\n")
        return f"{first}, {answers.readline().strip()}"


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(*map(int, sys.argv[2:]))
    else:
        for peer in sys.argv[2:]:
            print(call(*peer.split(",")), flush=True)
