"""Scans a TLS server with sslyze, as a client with a certificate, and prints what it found as JSON.

    tls_scan.py ADDRESS PORT CERTIFICATE KEY
"""

import json
import socket
import ssl
import sys
from pathlib import Path

from sslyze import (
    ClientAuthenticationCredentials,
    Scanner,
    ServerNetworkConfiguration,
    ServerNetworkLocation,
    ServerScanRequest,
    ServerScanStatusEnum,
)

VERSIONS = ["ssl_2_0", "ssl_3_0", "tls_1_0", "tls_1_1", "tls_1_2", "tls_1_3"]


def scan(address, port, certificate, key):
    request = ServerScanRequest(
        server_location=ServerNetworkLocation("localhost", port, address),
        network_configuration=ServerNetworkConfiguration(
            "localhost",
            tls_client_auth_credentials=ClientAuthenticationCredentials(
                Path(certificate), Path(key)
            ),
        ),
    )
    scanner = Scanner()
    scanner.queue_scans([request])
    (result,) = scanner.get_results()
    if result.scan_status != ServerScanStatusEnum.COMPLETED:
        sys.exit(f"no scan: {result.connectivity_error_trace}")
    found = result.scan_result

    def of(name):
        attempt = getattr(found, name)
        if attempt.result is None:
            # What cannot be tried at all, for example because a version is not spoken.
            return {"not tried": str(attempt.error_reason)}
        return attempt.result

    suites = {
        version: sorted(
            accepted.cipher_suite.name
            for accepted in of(f"{version}_cipher_suites").accepted_cipher_suites
        )
        for version in VERSIONS
    }
    curves = of("elliptic_curves")
    return {
        "suites": suites,
        "curves": sorted(curve.name for curve in curves.supported_curves or []),
        "compression": of("tls_compression").supports_compression,
        "early data": of("tls_1_3_early_data").supports_early_data,
        "heartbleed": of("heartbleed").is_vulnerable_to_heartbleed,
        "ccs injection": of("openssl_ccs_injection").is_vulnerable_to_ccs_injection,
        "renegotiation": of("session_renegotiation").is_vulnerable_to_client_renegotiation_dos,
        "robot": of("robot").robot_result.name,
    }


def tickets(address, port, certificate, key):
    """Whether a session can be resumed: sslyze does not try that with TLS 1.3."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.load_cert_chain(certificate, key)
    with socket.create_connection((address, port), timeout=20) as plain:
        with context.wrap_socket(plain) as tls:
            tls.sendall(b"GET / HTTP/1.1\r\nhost: orders\r\nconnection: close\r\n\r\n")
            # Tickets come behind the handshake, before the answer.
            assert tls.recv(4096).startswith(b"HTTP/1.")
            return bool(tls.session and tls.session.has_ticket)


if __name__ == "__main__":
    address, port, certificate, key = sys.argv[1:]
    found = scan(address, int(port), certificate, key)
    found["tickets"] = tickets(address, int(port), certificate, key)
    print(json.dumps(found))
