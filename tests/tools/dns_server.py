"""A DNS server on dnslib, over UDP and TCP on one loopback port, with a control port beside it.

    dns_server.py

Control, over HTTP:
    PUT /records {"orders.test.": {"SRV": [[priority, weight, port, "a.test.", ttl]],
                                   "A": [["127.0.0.1", ttl]], "AAAA": [["::1", ttl]]}}
        all there is from now on; every other name is NXDOMAIN
    PUT /mode {"rcode": "SERVFAIL"} | {"truncate": true} | {"silent": true} | {"tcp": false} | {}
        how every question is answered from now on
    GET /count -> {"udp": 3, "tcp": 0}
"""

import json
import socket
import socketserver
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from dnslib import AAAA, QTYPE, RCODE, RR, SOA, SRV, A, DNSRecord

lock = threading.Lock()
state = {"records": {}, "mode": {}, "udp": 0, "tcp": 0}


def answer(wire, transport):
    question = DNSRecord.parse(wire)
    with lock:
        state[transport] += 1
        mode, records = state["mode"], state["records"]
    if mode.get("silent"):
        return None
    reply = question.reply()
    if "rcode" in mode:
        reply.header.rcode = getattr(RCODE, mode["rcode"])
        return reply.pack()
    if mode.get("truncate") and transport == "udp":
        reply.header.tc = 1
        return reply.pack()
    name = str(question.q.qname).lower()
    kind = QTYPE[question.q.qtype]
    found = records.get(name)
    if found is None:
        reply.header.rcode = RCODE.NXDOMAIN
    for row in (found or {}).get(kind, []):
        *data, ttl = row
        value = {"A": A, "AAAA": AAAA, "SRV": SRV}[kind](*data)
        reply.add_answer(RR(name, question.q.qtype, ttl=ttl, rdata=value))
    if not (found or {}).get(kind):
        soa = SOA("ns.test.", "root.test.", (1, 60, 60, 60, 1))
        reply.add_auth(RR("test.", QTYPE.SOA, ttl=1, rdata=soa))
    return reply.pack()


class Udp(socketserver.BaseRequestHandler):
    def handle(self):
        wire, sock = self.request
        reply = answer(wire, "udp")
        if reply:
            sock.sendto(reply, self.client_address)


class Tcp(socketserver.StreamRequestHandler):
    def handle(self):
        while head := self.rfile.read(2):
            wire = self.rfile.read(int.from_bytes(head, "big"))
            if state["mode"].get("tcp") is False:
                return
            reply = answer(wire, "tcp")
            if reply:
                self.wfile.write(len(reply).to_bytes(2, "big") + reply)


class Control(BaseHTTPRequestHandler):
    def do_PUT(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with lock:
            state[self.path.strip("/")] = body
        self.reply({})

    def do_GET(self):
        with lock:
            self.reply({"udp": state["udp"], "tcp": state["tcp"]})

    def reply(self, value):
        text = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


class TcpServer(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True


def main():
    while True:
        udp = socketserver.ThreadingUDPServer(("127.0.0.1", 0), Udp)
        try:
            tcp = TcpServer(udp.server_address, Tcp)
            break
        except OSError:
            udp.server_close()
    control = ThreadingHTTPServer(("127.0.0.1", 0), Control)
    for server in udp, tcp:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"listening on {udp.server_address[1]} {control.server_address[1]}", flush=True)
    control.serve_forever()


main()
