"""The proxies that are compared, each with one worker and as near to a sidecar's work as it has
settings for. Every starter returns what to run and its doors: for each kind of call, where to ask
whom. Kinds are what comes in and what the proxy speaks to the service (h1, h2, grpc, and tls for h1
within mutual TLS); slow is h1 to the origin that can wait; chain, chain-h2 and mtls go through a
second proxy. Where TLS is spoken, both sides show a certificate of one authority."""

import dataclasses
import subprocess

from common import TARGET, find_proxy, free_port, is_ready, program


@dataclasses.dataclass
class Origins:
    """Where the services are."""

    h1: int  # nginx
    h2: int  # ours: h1, h2c and gRPC
    certificate: object = None  # what all proxies show; without it none has TLS


@dataclasses.dataclass
class Plan:
    """One process to start. `doors` is kind → (port, authority)."""

    command: list
    doors: dict
    wait: object = None

    @property
    def ports(self):
        return sorted({port for port, _ in self.doors.values()})


#: Only the training of profiles calls it.
LETTERS = """apiVersion: outrigger.dev/v1alpha1
kind: MeshService
metadata: {{name: letters}}
spec: {{discovery: {{static: [{{address: 127.0.0.1, port: {port}}}]}}}}
---
apiVersion: outrigger.dev/v1alpha1
kind: MeshRoute
metadata: {{name: letters}}
spec: {{services: [letters], rules: [{{name: send, async: {{when: Always, queue: letters}}}}]}}
---
apiVersion: outrigger.dev/v1alpha1
kind: Queue
metadata: {{name: letters}}
spec: {{backend: {{embedded: {{allowEphemeral: true}}}}}}
"""

#: The sidecar behind another.
MTLS = """apiVersion: outrigger.dev/v1alpha1
kind: MeshService
metadata: {{name: mtls}}
spec:
  ports: [{{name: p, port: 80, appProtocol: http}}]
  identity: {{spiffeIds: ["{id}"]}}
  mtls: {{mode: Strict}}
  discovery: {{static: [{{address: 127.0.0.1, port: {port}}}]}}
"""


def outrigger(directory, origins, options, second=None):
    outbound, inbound, admin = free_port(), free_port(), free_port()
    name = "second" if second is None else "first"
    services = {
        "orders": (origins.h1, "http"),
        "orders-h2": (origins.h2, "kubernetes.io/h2c"),
        "payments": (origins.h2, "grpc"),
        "slow": (origins.h2, "http"),
    }
    if second:
        services["chain"] = (second.doors["inbound"][0], "http")
        services["chain-h2"] = (second.doors["inbound"][0], "kubernetes.io/h2c")
    certificate = origins.certificate
    identity = ""
    if certificate:
        files = f"certificate: {certificate.chain}, key: {certificate.key}, bundle: {certificate.authority}"
        identity = f"identity: {{files: {{{files}}}}}"
    documents = [
        f"""apiVersion: outrigger.dev/v1alpha1
kind: MeshService
metadata: {{name: {service}}}
spec:
  ports: [{{name: p, port: 80, appProtocol: {protocol}}}]
  discovery: {{static: [{{address: 127.0.0.1, port: {port}}}]}}
"""
        for service, (port, protocol) in services.items()
    ]
    documents.append(LETTERS.format(port=origins.h2))
    if second and certificate:
        documents.append(MTLS.format(id=certificate.id, port=second.doors["inbound"][0]))
    directory.joinpath(f"mesh-{name}.yaml").write_text("---\n".join(documents))
    config = directory / f"outrigger-{name}.yaml"
    config.write_text(
        f"""workload: {{name: {name}-1, service: {name}}}
listen: {{outbound: "127.0.0.1:{outbound}", inbound: "127.0.0.1:{inbound}", admin: "127.0.0.1:{admin}"}}
app: 127.0.0.1:{origins.h1}
{identity}
mesh: mesh-{name}.yaml
stateDir: state-{name}
"""
    )
    doors = {
        "h1": (outbound, "orders"),
        "h2": (outbound, "orders-h2"),
        "grpc": (outbound, "payments"),
        "slow": (outbound, "slow"),
        "inbound": (inbound, "second"),
    }
    if certificate:
        # Mutual TLS is for callers from elsewhere.
        doors["tls"] = doors["inbound"]
    if second:
        doors["chain"] = (outbound, "chain")
        doors["chain-h2"] = (outbound, "chain-h2")
        if certificate:
            doors["mtls"] = (outbound, "mtls")
    return Plan([find_proxy(options.proxy), "--config", config], doors, is_ready(admin))


def temp_paths(root):
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    return " ".join(f"{kind}_temp_path {root}/{kind};" for kind in kinds)


def nginx(directory, origins, options, second=None):
    name = "second" if second is None else "first"
    root = directory / f"nginx-{name}"
    root.mkdir(exist_ok=True)
    certificate = origins.certificate
    upstreams = {"h1": origins.h1, "slow": origins.h2, "grpc": origins.h2}
    if second:
        upstreams["chain"] = second.doors["h1"][0]
        upstreams["mtls"] = second.doors["tls"][0]
    doors = {kind: (free_port(), "orders") for kind in (*upstreams, "h2", "tls")}
    http = (
        'proxy_http_version 1.1; proxy_set_header Connection ""; proxy_set_header Host $host; '
        "proxy_set_header X-Request-Id $request_id; proxy_set_header X-Forwarded-Proto $scheme; "
        "proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for; proxy_read_timeout 60s;"
    )
    accept = (
        f"ssl_certificate {certificate.chain}; ssl_certificate_key {certificate.key}; "
        f"ssl_client_certificate {certificate.authority}; ssl_verify_client on; "
        "ssl_protocols TLSv1.3; ssl_session_cache off; ssl_session_tickets off;"
    )
    # It can hold a server to a DNS name only.
    connect = (
        f"proxy_ssl_certificate {certificate.chain}; proxy_ssl_certificate_key {certificate.key}; "
        "proxy_ssl_protocols TLSv1.3; proxy_ssl_verify off;"
    )
    pools = "".join(
        f"upstream {kind} {{ server 127.0.0.1:{port}; keepalive 10000; "
        "keepalive_requests 100000000; }\n"
        for kind, port in upstreams.items()
    )
    # It has no HTTP/2 towards the service, but for gRPC.
    servers = "".join(
        f"server {{ listen 127.0.0.1:{doors[kind][0]}{flags}; {more} "
        f"location / {{ {action} }} }}\n"
        for kind, flags, more, action in (
            ("h1", "", "", f"proxy_pass http://h1; {http}"),
            ("h2", " http2", "", f"proxy_pass http://h1; {http}"),
            ("slow", "", "", f"proxy_pass http://slow; {http}"),
            ("grpc", " http2", "", "grpc_pass grpc://grpc; grpc_set_header X-Request-Id $request_id;"),
            ("tls", " ssl", accept, f"proxy_pass http://h1; {http}"),
            ("chain", "", "", f"proxy_pass http://chain; {http}"),
            ("mtls", "", "", f"proxy_pass https://mtls; {http} {connect}"),
        )
        if kind in doors
    )
    config = directory / f"nginx-{name}.conf"
    config.write_text(
        f"""daemon off; master_process off; pid {root}/pid; error_log stderr;
worker_rlimit_nofile 20000;
events {{ worker_connections 20000; }}
http {{ access_log off; {temp_paths(root)} keepalive_requests 100000000; keepalive_timeout 300s;
{pools}{servers}}}
"""
    )
    return Plan([program("nginx"), "-p", root, "-c", config], doors)


def haproxy(directory, origins, options, second=None):
    name = "second" if second is None else "first"
    certificate = origins.certificate
    mutual = f"ssl crt {certificate.both} ca-file {certificate.authority} verify required"
    servers = {
        "h1": f"127.0.0.1:{origins.h1}",
        "slow": f"127.0.0.1:{origins.h2}",
        "h2": f"127.0.0.1:{origins.h2} proto h2",
        "tls": f"127.0.0.1:{origins.h1}",
    }
    if second:
        servers["chain"] = f"127.0.0.1:{second.doors['h1'][0]}"
        servers["chain-h2"] = f"127.0.0.1:{second.doors['mesh'][0]} proto h2"
        servers["mtls"] = f"127.0.0.1:{second.doors['tls'][0]} {mutual} alpn h2"
    else:
        # Where h2 from the first comes in.
        servers["mesh"] = f"127.0.0.1:{origins.h1}"
    flags = {"h2": "proto h2", "mesh": "proto h2", "tls": f"{mutual} alpn h2,http/1.1"}
    doors = {kind: (free_port(), "orders") for kind in servers}
    sections = "".join(
        f"""frontend {kind}
  bind 127.0.0.1:{doors[kind][0]} {flags.get(kind, "")}
  unique-id-format %{{+X}}o%ci%cp%ts%rt
  unique-id-header X-Request-Id
  option forwardfor
  default_backend {kind}
backend {kind}
  server a {server} pool-max-conn 10000 pool-purge-delay 300s
"""
        for kind, server in servers.items()
    )
    doors["grpc"] = doors["h2"]
    config = directory / f"haproxy-{name}.cfg"
    config.write_text(
        f"""global
  nbthread 1
  maxconn 9500
  # Its default drops idle connections to the service once a quarter of all files is in use.
  tune.pool-high-fd-ratio 100
  tune.pool-low-fd-ratio 100
  ssl-default-bind-options ssl-min-ver TLSv1.3 no-tls-tickets
  ssl-default-server-options ssl-min-ver TLSv1.3
defaults
  mode http
  timeout connect 1s
  timeout client 300s
  timeout server 60s
  http-reuse always
  retries 1
{sections}"""
    )
    return Plan([program("haproxy"), "-db", "-f", config], doors)


def forwarder(directory, origins, options, second=None):
    """HAProxy again, copying bytes: what forwarding costs when nothing is understood."""
    name = "second" if second is None else "first"
    servers = {"h1": origins.h1, "slow": origins.h2, "h2": origins.h2, "grpc": origins.h2}
    if second:
        servers["chain"] = second.doors["h1"][0]
    doors = {kind: (free_port(), "orders") for kind in servers}
    sections = "".join(
        f"listen {kind}\n  bind 127.0.0.1:{doors[kind][0]}\n  server a 127.0.0.1:{port}\n"
        for kind, port in servers.items()
    )
    config = directory / f"forwarder-{name}.cfg"
    config.write_text(
        f"""global
  nbthread 1
  maxconn 9500
defaults
  mode tcp
  timeout connect 1s
  timeout client 300s
  timeout server 300s
{sections}"""
    )
    return Plan([program("haproxy"), "-db", "-f", config], doors)


def envoy(directory, origins, options, second=None):
    name = "second" if second is None else "first"
    clusters = {
        "h1": (origins.h1, False),
        "slow": (origins.h2, False),
        "h2": (origins.h2, True),
        "tls": (origins.h1, False),
    }
    if second:
        clusters["chain"] = (second.doors["h1"][0], False)
        clusters["chain-h2"] = (second.doors["h1"][0], True)
        clusters["mtls"] = (second.doors["tls"][0], True)
    doors = {kind: (free_port(), "orders") for kind in clusters}
    tls = {"accept": envoy_tls(origins.certificate, "Downstream"),
           "connect": envoy_tls(origins.certificate, "Upstream")}
    listeners = "".join(
        envoy_listener(kind, doors[kind][0], tls["accept"] if kind == "tls" else "")
        for kind in clusters
    )
    upstreams = "".join(
        envoy_cluster(kind, *where, tls["connect"] if kind == "mtls" else "")
        for kind, where in clusters.items()
    )
    doors["grpc"] = doors["h2"]
    config = directory / f"envoy-{name}.yaml"
    config.write_text(f"static_resources:\n  listeners:\n{listeners}  clusters:\n{upstreams}")
    binary = options.envoy or TARGET / "bench-venv" / "bin" / "envoy"
    command = [binary, "-c", config, "--concurrency", "1", "--disable-hot-restart", "-l", "error"]
    return Plan(command, doors)


def envoy_tls(certificate, side):
    """A transport socket for mutual TLS, as a mesh sets it up; `side` is Downstream or Upstream."""
    only = {
        "Downstream": "require_client_certificate: true, disable_stateless_session_resumption: true, "
                      "disable_stateful_session_resumption: true, ",
        "Upstream": "",
    }[side]
    alpn = {"Downstream": "h2, http/1.1", "Upstream": "h2"}[side]
    names = f"[{{san_type: URI, matcher: {{exact: '{certificate.id}'}}}}]"
    return f"""
      transport_socket:
        name: tls
        typed_config: {{"@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.{side}TlsContext, {only}
          common_tls_context: {{
            tls_params: {{tls_minimum_protocol_version: TLSv1_3, tls_maximum_protocol_version: TLSv1_3}},
            alpn_protocols: [{alpn}],
            tls_certificates: [{{certificate_chain: {{filename: {certificate.chain}}}, private_key: {{filename: {certificate.key}}}}}],
            validation_context: {{trusted_ca: {{filename: {certificate.authority}}}, match_typed_subject_alt_names: {names}}}}}}}"""


def envoy_listener(name, port, tls):
    # Whoever called is told on, as our sidecar does.
    told = """
          forward_client_cert_details: SANITIZE_SET
          set_current_client_cert_details: {uri: true}""" if tls else ""
    return f"""  - address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}
    filter_chains:
    - filters:
      - name: hcm
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          codec_type: AUTO
          stat_prefix: {name}
          use_remote_address: true{told}
          route_config:
            virtual_hosts:
            - name: orders
              domains: ["*"]
              routes:
              - match: {{prefix: "/"}}
                route:
                  cluster: {name}
                  timeout: 60s
                  retry_policy: {{retry_on: "connect-failure,refused-stream", num_retries: 1}}
          http_filters:
          - name: router
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router{tls}
"""


def envoy_cluster(name, port, http2, tls):
    protocol = "http2_protocol_options: {}" if http2 else "http_protocol_options: {}"
    return f"""  - name: {name}
    connect_timeout: 1s
    type: STATIC
    circuit_breakers: {{thresholds: [{{max_connections: 20000, max_requests: 20000, max_pending_requests: 20000}}]}}
    outlier_detection: {{consecutive_5xx: 5}}
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: {{{protocol}}}
    load_assignment:
      cluster_name: {name}
      endpoints: [{{lb_endpoints: [{{endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}}}}}]}}]{tls.replace("      ", "    ", 1)}
"""


@dataclasses.dataclass
class Certificate:
    """A workload's certificate, its key, both in one file, and the authority that signed it."""

    directory: object
    id: str = "spiffe://cluster.local/ns/bench/sa/sidecar"

    authority = property(lambda self: self.directory / "authority.pem")
    chain = property(lambda self: self.directory / "chain.pem")
    key = property(lambda self: self.directory / "key.pem")
    both = property(lambda self: self.directory / "both.pem")


def make_certificate(directory):
    """One for all proxies and the load."""
    made = Certificate(directory)
    root, request, extensions = (directory / name for name in ("root.key", "leaf.csr", "leaf.ext"))
    extensions.write_text(
        f"subjectAltName=URI:{made.id}\nbasicConstraints=critical,CA:FALSE\n"
        "keyUsage=critical,digitalSignature\nextendedKeyUsage=serverAuth,clientAuth\n"
    )
    key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes".split()
    for command in (
        ["req", "-x509", *key, "-keyout", root, "-out", made.authority, "-days", "2",
         "-subj", "/CN=bench"],
        ["req", *key, "-keyout", made.key, "-out", request, "-subj", "/CN=sidecar"],
        ["x509", "-req", "-in", request, "-CA", made.authority, "-CAkey", root, "-days", "1",
         "-extfile", extensions, "-out", made.chain],
    ):
        subprocess.run(["openssl", *command], check=True, capture_output=True)
    made.both.write_text(made.chain.read_text() + made.key.read_text())
    return made


#: In the order of the tables; ours first, every ratio is ours divided by theirs.
PEERS = {
    "outrigger": outrigger,
    "envoy": envoy,
    "nginx": nginx,
    "haproxy": haproxy,
    "forwarder": forwarder,
}
