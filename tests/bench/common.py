"""What the benches share."""

import os
import pathlib
import socket

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent


def find_proxy(given):
    """The binary to measure: the one given, else `dist`, else `release`."""
    target = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    candidates = [given] if given else [target / p / "outrigger-proxy" for p in ("dist", "release")]
    for path in candidates:
        if path.is_file():
            return path.resolve()
    looked = ", ".join(map(str, candidates))
    raise SystemExit(f"no {looked}: cargo build --profile dist -p outrigger-proxy")


def free_port():
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
