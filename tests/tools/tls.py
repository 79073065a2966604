"""A TLS server that shouts back, and a client that verifies it.

tls.py server                    serves cert.pem and key.pem of the current directory
tls.py client ADDRESS PORT NAME  prints version, protocol and answer, or the error
"""

import socket
import ssl
import sys
import threading


def serve_one(context, connection):
    try:
        with context.wrap_socket(connection, server_side=True) as tls:
            tls.sendall(tls.recv(1000).upper())
    except OSError as error:
        print("failed", error)


def server():
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain("cert.pem", "key.pem")
    context.set_alpn_protocols(["h2", "http/1.1"])
    listener = socket.create_server(("127.0.0.1", 0))
    print("listening on 127.0.0.1:%d" % listener.getsockname()[1])
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=serve_one, args=(context, connection), daemon=True).start()


def client(address, port, name):
    context = ssl.create_default_context(cafile="cert.pem")
    context.set_alpn_protocols(["h2"])
    try:
        with socket.create_connection((address, int(port)), timeout=15) as plain:
            with context.wrap_socket(plain, server_hostname=name) as tls:
                tls.sendall(b"hello")
                print(tls.version(), tls.selected_alpn_protocol(), tls.recv(1000).decode())
    except OSError as error:
        print(type(error).__name__, error)


if sys.argv[1] == "server":
    server()
else:
    client(*sys.argv[2:])
