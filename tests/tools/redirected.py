"""Both ends of connections that may be redirected, for the tests of interception.

    redirected.py listen PORT...    answers with the port it was reached at and where the
                                    connection was meant to go, as one JSON line
    redirected.py connect PEER...   prints the answer of each peer, which is ADDRESS,PORT or
                                    ADDRESS,PORT,SOURCE
"""

import json
import selectors
import socket
import struct
import sys

SO_ORIGINAL_DST = 80


def original(connection):
    """Where it was meant to go; its own address when it was not redirected."""
    try:
        if connection.family == socket.AF_INET:
            raw = connection.getsockopt(socket.SOL_IP, SO_ORIGINAL_DST, 16)
            port, address = struct.unpack("!2xH4s8x", raw)
        else:
            raw = connection.getsockopt(socket.IPPROTO_IPV6, SO_ORIGINAL_DST, 28)
            port, address = struct.unpack("!2xH4x16s4x", raw)
    except FileNotFoundError:
        # This host has no redirects at all.
        host, port, *_ = connection.getsockname()
        return f"{host},{port}"
    return f"{socket.inet_ntop(connection.family, address)},{port}"


def listen(ports):
    selector = selectors.DefaultSelector()
    for port in ports:
        for family, address in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
            listener = socket.socket(family, socket.SOCK_STREAM)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.bind((address, port))
            listener.listen()
            selector.register(listener, selectors.EVENT_READ, port)
    print("listening")
    while True:
        for key, _ in selector.select():
            connection, _ = key.fileobj.accept()
            with connection:
                answer = {"reached": key.data, "meant": original(connection)}
                connection.sendall(json.dumps(answer).encode())


def ask(address, port, source=None):
    peer = (address, int(port))
    try:
        with socket.create_connection(peer, 5, (source, 0) if source else None) as connection:
            return connection.makefile().read()
    except OSError as error:
        return json.dumps({"error": str(error)})


def main():
    kind, *arguments = sys.argv[1:]
    if kind == "listen":
        listen([int(port) for port in arguments])
        return
    for peer in arguments:
        print(ask(*peer.split(",")))


main()
