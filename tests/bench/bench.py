"""The scenarios, and the machinery that measures one cell of the table."""

import contextlib
import dataclasses
import pathlib
import re
import subprocess
import tempfile
import time

from common import (
    LOAD_CORE, PROXY_CORE, Load, LoadFailed, Server, bench_tool, free_port, on_core, program,
)
from peers import PEERS, Origins, make_certificate, temp_paths

RATE = 4_000


@dataclasses.dataclass
class Scenario:
    """`kind` is a door of the proxies (peers.py). Saturating load is h2load's, which costs least; it
    takes an answer without a reason phrase, as HAProxy makes of HTTP/2, for a failure."""

    about: str
    kind: str
    path: str = "/small"
    h2load: tuple = ()
    command: str = ""
    options: dict = dataclasses.field(default_factory=dict)
    requests: int = 40_000


H1, H2 = ("--h1", "-c32", "-t1"), ("-c4", "-m32", "-t1")
SCENARIOS = {
    "h1": Scenario("HTTP/1.1 keep-alive, 100 B, 32 connections", "h1", h2load=H1),
    "h1-10k": Scenario("HTTP/1.1 keep-alive, 10 KiB, 32 connections", "h1", "/10k", h2load=H1),
    "h2c": Scenario("h2c, 100 B, 4 connections of 32 streams (nginx: h1 upstream)", "h2", h2load=H2),
    "grpc": Scenario("gRPC unary, 100 B each way, 4 connections of 32 streams", "grpc", h2load=H2),
    "tls": Scenario("mutual TLS 1.3 in, HTTP/1.1 out, 100 B, 32 connections", "tls",
                    command="closed", options={"connections": 32}),
    "handshakes": Scenario("a new mutual TLS 1.3 connection per request, nothing resumed", "tls",
                           command="connect", options={"concurrency": 16}, requests=4_000),
    "chain": Scenario("two proxies, HTTP/1.1 between them, CPU of both", "chain",
                      command="closed", options={"connections": 32}),
    "chain-h2": Scenario("two proxies, h2c between them, CPU of both", "chain-h2",
                         command="closed", options={"connections": 32}),
    "mtls": Scenario("two proxies, mutual TLS between them (h2; nginx: HTTP/1.1), CPU of both",
                     "mtls", command="closed", options={"connections": 32}),
    "connect": Scenario("a new connection per request", "h1", command="connect",
                        options={"concurrency": 16}, requests=10_000),
    "in-flight": Scenario("4,500 connections, a request of 500 ms in flight on each", "slow",
                          "/slow/500", command="closed", options={"connections": 4_500},
                          requests=27_000),
    "rate-h1": Scenario(f"HTTP/1.1 at {RATE:,} requests/s, 32 connections, open loop", "h1",
                        command="rate", options={"rate": RATE, "connections": 32}),
    "rate-grpc": Scenario(f"gRPC at {RATE:,} requests/s, 4 connections, open loop", "grpc",
                          command="rate", options={"rate": RATE, "connections": 4, "protocol": "grpc"}),
}


class Bench:
    def __init__(self, directory, options):
        self.directory, self.options = directory, options
        self.tool = bench_tool()
        self.grpc_body = directory / "grpc.bin"
        self.grpc_body.write_bytes(b"\0\0\0\0\x64" + b"x" * 100)
        self.started = contextlib.ExitStack()
        self.origins = self.start_origins()

    def server(self, *arguments, **more):
        started = Server(*arguments, **more)
        self.started.callback(started.stop)
        return started

    def start_origins(self):
        origins = Origins(free_port(), free_port(), make_certificate(self.directory))
        root = self.directory / "origin"
        root.mkdir()
        # Answers come from memory: load and origin share a core, and must not be what is full first.
        config = self.directory / "origin.conf"
        config.write_text(
            f"""daemon off; master_process off; pid {root}/pid; error_log stderr;
worker_rlimit_nofile 20000;
events {{ worker_connections 20000; }}
http {{ access_log off; {temp_paths(root)} keepalive_requests 100000000; keepalive_timeout 300s;
server {{ listen 127.0.0.1:{origins.h1} backlog=4096;
location = /small {{ return 200 "{'x' * 100}"; }}
location = /10k {{ set $kib "{'x' * 1024}"; return 200 "{'$kib' * 10}"; }} }} }}
"""
        )
        command = [program("nginx"), "-p", root, "-c", config]
        self.server("origin-h1", command, [origins.h1], self.directory, LOAD_CORE)
        command = [self.tool, "origin", f"--listen=127.0.0.1:{origins.h2}"]
        self.server("origin-h2", command, [origins.h2], self.directory, LOAD_CORE)
        return origins

    def start(self, name, core=PROXY_CORE, chained=True):
        """A proxy and, for the chains, a second one behind it: (doors, servers)."""
        starter, second, servers = PEERS[name], None, []
        directory = pathlib.Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self.directory))
        for place in ("second", "first") if chained else ("second",):
            plan = starter(directory, self.origins, self.options, second)
            servers.insert(0, self.server(
                f"{name}-{place}", plan.command, plan.ports, directory, core, ready=plan.wait
            ))
            second = plan
        return plan.doors, servers

    def direct(self, kind):
        """The door of the origin itself, to see what load and origin cost."""
        if kind in ("h2", "grpc", "slow"):
            return self.origins.h2, "orders"
        return None if kind == "tls" else (self.origins.h1, "orders")

    def measure(self, scenario, door, servers):
        """One cell of one round: CPU us and requests per second, and latencies where they count."""
        port, authority = door
        count = scenario.requests // (4 if self.options.quick else 1)
        if scenario.h2load:
            self.h2load(scenario, door, count // 10)
            before = cpu(servers)
            report = self.h2load(scenario, door, count)
            used = cpu(servers) - before
        else:
            more = dict(scenario.options)
            if scenario.command == "rate":
                more["seconds"] = 2 if self.options.quick else 4
            else:
                more["requests"] = count
            if scenario.kind == "tls":
                more["tls"] = self.directory
            load = Load(self.tool, scenario.command, port, authority, LOAD_CORE,
                        path=scenario.path, **more)
            load.phase("ready")
            before = cpu(servers)
            load.next()
            report = load.report()
            used = cpu(servers) - before
        if report["failed"]:
            raise LoadFailed(f"{report['failed']} of {report['requests']}: {report.get('error')}")
        cell = {
            "cpu_us": used / report["succeeded"] / 1000 if servers else None,
            "requests_per_second": report["succeeded"] / report["seconds"],
        }
        for kind in ("latency_us", "lag_us"):
            if kind in report:
                cell[kind] = report[kind]
        return cell

    def h2load(self, scenario, door, count):
        port, authority = door
        command = [program("h2load"), *scenario.h2load, f"-n{count}", f"--connect-to=127.0.0.1:{port}"]
        if scenario.kind == "grpc":
            command += ["-d", self.grpc_body, "-H", "content-type: application/grpc", "-H", "te: trailers"]
        done = subprocess.run(
            [*command, f"http://{authority}{scenario.path}"],
            capture_output=True, text=True, timeout=180, preexec_fn=on_core(LOAD_CORE),
        )
        codes = re.search(r"status codes: (\d+) 2xx", done.stdout)
        rate = re.search(r"finished in [^,]+, ([\d.]+) req/s", done.stdout)
        if not codes or not rate:
            raise LoadFailed(done.stdout + done.stderr)
        good = int(codes.group(1))
        return {
            "requests": count, "succeeded": good, "failed": count - good,
            "seconds": count / float(rate.group(1)),
            "error": "see the status codes" if good < count else None,
        }

    def memory(self, name):
        """KiB of a fresh proxy: at the start, for an idle connection, for one in flight."""
        connections = 1_000 if self.options.quick else 4_000
        doors, servers = self.start(name, chained=False)
        port, authority = doors["slow"]
        start = servers[0].resident()
        load = Load(self.tool, "hold", port, authority, LOAD_CORE,
                    connections=connections, milliseconds=3_000)
        held = {}
        for phase in ("open", "used", "in flight", "answered"):
            load.phase(phase)
            if phase == "in flight":
                # All were sent; the last has to pass the proxy before its answer is due.
                self.settle(servers[0])
            held[phase] = (servers[0].resident() - start) / connections
            load.next()
        report = load.report()
        for server in servers:
            server.stop()
        if report["failed"]:
            raise LoadFailed(f"{report['failed']} of {report['requests']}: {report['error']}")
        return {
            "start_mib": start / 1024,
            "opened_kib": held["open"],
            "idle_kib": held["used"],
            "in_flight_kib": held["in flight"],
        }

    @staticmethod
    def settle(server):
        """Waits until a proxy has nothing left to do."""
        last = -1
        while (now := server.cpu()) - last > 2_000_000:
            last = now
            time.sleep(0.1)


def cpu(servers):
    return sum(server.cpu() for server in servers)
