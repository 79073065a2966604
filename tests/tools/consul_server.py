"""The part of Consul's HTTP API that discovery uses, with its blocking queries, and its bad days.

    consul_server.py

Serves /v1/agent/service/{register,deregister,maintenance}, /v1/agent/check/{pass,warn,fail},
/v1/catalog/services, /v1/health/service/:name and /v1/status/leader; the answers are those of
Consul 1.17 to the same calls. consul_check.py drives it with an independent client.

    PUT /_mode {"status": 500, "text": "No cluster leader"}   every query is refused like that
               {"token": "secret"}          queries without it are 403
               {"leader": false}            X-Consul-KnownLeader: false, and no instances
               {"behind": 60000}            X-Consul-LastContact, and no instances
               {"index": "zero" | "back"}   X-Consul-Index is 0, or goes backwards each time
               {"body": "<html>"}           200 with this
               {"cut": true}                the connection ends in the middle of the answer
               {"hang": true}               no answer before the mode changes
    GET /_count -> {"queries": 3, "immediate": 1, "index": [the indexes asked with]}
"""

import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

changed = threading.Condition()
services = {}  # id -> service
checks = {}  # id -> check
state = {"index": 10, "mode": {}, "queries": 0, "immediate": 0, "asked": []}


def seconds(text):
    units = {"ms": 0.001, "s": 1, "m": 60, "h": 3600}
    found = re.findall(r"([0-9.]+)(ms|s|m|h)", text)
    return sum(float(number) * units[unit] for number, unit in found)


def touch():
    state["index"] += 1
    changed.notify_all()


def register(body):
    # Consul reads JSON as Go does: the case of a key does not matter.
    body = {key.lower(): value for key, value in body.items()}
    name, identity = body["name"], body.get("id") or body["name"]
    weights = body.get("weights") or {"Passing": 1, "Warning": 1}
    services[identity] = {
        "ID": identity, "Service": name, "Tags": body.get("tags") or [],
        "Address": body.get("address") or "", "Port": body.get("port") or 0,
        "Meta": body.get("meta"), "Weights": weights, "EnableTagOverride": False,
    }
    all_checks = ([body["check"]] if body.get("check") else []) + (body.get("checks") or [])
    for number, given in enumerate(all_checks, 1):
        check = f"service:{identity}" if len(all_checks) == 1 else f"service:{identity}:{number}"
        given = {key.lower(): value for key, value in given.items()}
        checks[check] = {
            "CheckID": check, "Name": f"Service '{name}' check", "Node": "n1",
            "Status": given.get("status") or "critical", "ServiceID": identity,
            "ServiceName": name, "Output": "",
        }
    touch()


def health(name):
    node = {"ID": "", "Node": "n1", "Address": "127.0.0.1", "Datacenter": "dc1",
            "TaggedAddresses": None, "Meta": None}
    serf = {"Node": "n1", "CheckID": "serfHealth", "Name": "Serf Health Status",
            "Status": "passing", "ServiceID": "", "ServiceName": "", "Output": ""}
    return [
        {"Node": node, "Service": service,
         "Checks": [serf] + [c for c in checks.values() if c["ServiceID"] == service["ID"]]}
        for service in services.values() if service["Service"] == name
    ]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_PUT(self):
        url = urlsplit(self.path)
        query = parse_qs(url.query, keep_blank_values=True)
        length = int(self.headers.get("content-length") or 0)
        body = self.rfile.read(length)
        with changed:
            parts = url.path.strip("/").split("/")
            if parts == ["_mode"]:
                state["mode"] = json.loads(body)
                changed.notify_all()
            elif parts[:4] == ["v1", "agent", "service", "register"]:
                register(json.loads(body))
            elif parts[:4] == ["v1", "agent", "service", "deregister"]:
                services.pop(parts[4], None)
                checks.pop(f"service:{parts[4]}", None)
                touch()
            elif parts[:4] == ["v1", "agent", "service", "maintenance"]:
                check = f"_service_maintenance:{parts[4]}"
                if query["enable"][0] == "true":
                    checks[check] = {"CheckID": check, "Name": "Service Maintenance Mode",
                                     "Status": "critical", "ServiceID": parts[4],
                                     "ServiceName": "", "Output": "", "Node": "n1"}
                else:
                    checks.pop(check, None)
                touch()
            elif parts[:3] == ["v1", "agent", "check"] and parts[4] in checks:
                status = {"pass": "passing", "warn": "warning", "fail": "critical"}[parts[3]]
                checks[parts[4]]["Status"] = status
                touch()
            else:
                return self.reply(404, "text/plain", f"unknown: {self.path}", {})
        self.reply(200, "application/json", "", {})

    def do_GET(self):
        url = urlsplit(self.path)
        query = parse_qs(url.query, keep_blank_values=True)
        if url.path == "/_count":
            with changed:
                count = {"queries": state["queries"], "immediate": state["immediate"],
                         "index": state["asked"]}
            return self.reply(200, "application/json", json.dumps(count), {})
        if url.path == "/v1/status/leader":
            return self.reply(200, "application/json", '"127.0.0.1:8300"', {})
        asked = int(query.get("index", ["0"])[0])
        with changed:
            state["queries"] += 1
            state["asked"].append(asked)
            mode = state["mode"]
            while mode.get("hang") and state["mode"] is mode:
                changed.wait(1)
            mode = state["mode"]
            if "status" in mode:
                return self.reply(mode["status"], "text/plain", mode["text"], {})
            if "token" in mode and self.headers.get("x-consul-token") != mode["token"]:
                text = "Permission denied: token with AccessorID '' lacks permission"
                return self.reply(403, "text/plain", text, {})
            if "body" in mode:
                return self.reply(200, "application/json", mode["body"], {})
            if asked == 0:
                state["immediate"] += 1
            elif "index" not in mode:
                # A wait of 0 is the default of five minutes, and none is longer than ten.
                wait = seconds(query.get("wait", ["5m"])[0]) or 300
                end = time.monotonic() + min(wait, 600)
                while state["index"] <= asked and state["mode"] is mode:
                    left = end - time.monotonic()
                    if left <= 0:
                        break
                    changed.wait(left)
            mode = state["mode"]
            headers = {"x-consul-index": state["index"], "x-consul-knownleader": "true",
                       "x-consul-lastcontact": 0}
            if url.path.startswith("/v1/health/service/"):
                value = health(url.path.rsplit("/", 1)[1])
            elif url.path == "/v1/catalog/services":
                value = {s["Service"]: s["Tags"] for s in services.values()}
            else:
                return self.reply(404, "text/plain", f"unknown: {self.path}", {})
            if mode.get("index") == "zero":
                headers["x-consul-index"] = 0
            if mode.get("index") == "back":
                headers["x-consul-index"] = 5 if asked > 5 else 9
            if mode.get("leader") is False:
                headers["x-consul-knownleader"], value = "false", []
            if "behind" in mode:
                headers["x-consul-lastcontact"], value = mode["behind"], []
            cut = mode.get("cut")
        self.reply(200, "application/json", json.dumps(value), headers, cut)

    def reply(self, status, kind, text, headers, cut=False):
        body = text.encode()
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection = self.close_connection or bool(cut)

    def log_message(self, *_):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
server.daemon_threads = True
print(f"listening on {server.server_address[1]}", flush=True)
server.serve_forever()
