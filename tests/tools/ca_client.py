"""An independent client of the control plane's authority, on grpcio and cryptography.

    ca_client.py ADDRESS BUNDLE CASE...

Each case is a JSON object: {"token", "account", "key": "ec" | "rsa" | "weak" | "ed25519",
"names": [URI], "authority": bool, "forged": bool, "seconds", "chain", "chain_key"}, all optional,
and is answered with a line: {"code", "detail", "chain": [PEM], "private": PEM}. With chain and
chain_key it comes with that certificate. BUNDLE is who must vouch for the server; "-" is plaintext.
"""

import base64
import json
import sys

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, struct_pb2

CREATE = "/istio.v1.auth.IstioCertificateService/CreateCertificate"
STRING, INT64, MESSAGE = 9, 3, 11

# security/v1alpha1/ca.proto of istio/api.
FIELDS = {
    "IstioCertificateRequest": [
        ("csr", 1, STRING, 1),
        ("validity_duration", 3, INT64, 1),
        ("metadata", 4, MESSAGE, 1),
    ],
    "IstioCertificateResponse": [("cert_chain", 1, STRING, 3)],
}


def messages():
    """The message classes by name; no code is generated."""
    file = descriptor_pb2.FileDescriptorProto(
        name="ca.proto",
        syntax="proto3",
        package="istio.v1.auth",
        dependency=["google/protobuf/struct.proto"],
    )
    for name, fields in FIELDS.items():
        message = file.message_type.add(name=name)
        for field, number, kind, label in fields:
            one = message.field.add(name=field, number=number, type=kind, label=label)
            if kind == MESSAGE:
                one.type_name = ".google.protobuf.Struct"
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(struct_pb2.DESCRIPTOR.serialized_pb)
    pool.Add(file)
    find = lambda name: pool.FindMessageTypeByName(f"istio.v1.auth.{name}")
    return {name: message_factory.GetMessageClass(find(name)) for name in FIELDS}


MESSAGES = messages()


def make_key(kind):
    match kind:
        case "rsa":
            return rsa.generate_private_key(65537, 2048)
        case "weak":
            return rsa.generate_private_key(65537, 1024)
        case "ed25519":
            return ed25519.Ed25519PrivateKey.generate()
        case _:
            return ec.generate_private_key(ec.SECP256R1())


def request(case, key):
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    if names := case.get("names"):
        names = [x509.UniformResourceIdentifier(name) for name in names]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=True)
    if case.get("authority"):
        builder = builder.add_extension(x509.BasicConstraints(True, None), critical=True)
    algorithm = None if case.get("key") == "ed25519" else hashes.SHA256()
    signed = builder.sign(key, algorithm).public_bytes(serialization.Encoding.DER)
    if case.get("forged"):
        # The last byte is the signature's.
        signed = signed[:-1] + bytes([signed[-1] ^ 1])
    csr = pem(signed)
    wanted = MESSAGES["IstioCertificateRequest"](
        csr=csr, validity_duration=case.get("seconds", 0)
    )
    if account := case.get("account"):
        field = "ImpersonatedIdentity" if "://" in account else "ServiceAccount"
        wanted.metadata.update({field: account})
    return wanted


def pem(der):
    text = base64.encodebytes(der).decode()
    return f"-----BEGIN CERTIFICATE REQUEST-----\n{text}-----END CERTIFICATE REQUEST-----\n"


def channel(address, bundle, case):
    if bundle == "-":
        return grpc.insecure_channel(address)
    with open(bundle, "rb") as file:
        roots = file.read()
    chain, key = case.get("chain"), case.get("chain_key")
    credentials = grpc.ssl_channel_credentials(
        roots, key and key.encode(), chain and chain.encode()
    )
    return grpc.secure_channel(address, credentials)


def ask(address, bundle, case):
    key = make_key(case.get("key"))
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    ).decode()
    metadata = []
    if token := case.get("token"):
        metadata.append(("authorization", f"Bearer {token}"))
    with channel(address, bundle, case) as connection:
        call = connection.unary_unary(
            CREATE,
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=MESSAGES["IstioCertificateResponse"].FromString,
        )
        try:
            answer = call(request(case, key), metadata=metadata, timeout=30)
        except grpc.RpcError as error:
            return {"code": error.code().name, "detail": error.details(), "chain": []}
    return {"code": "OK", "detail": "", "chain": list(answer.cert_chain), "private": private}


if __name__ == "__main__":
    address, bundle, *cases = sys.argv[1:]
    for case in cases:
        print(json.dumps(ask(address, bundle, json.loads(case))), flush=True)
