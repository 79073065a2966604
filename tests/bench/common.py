"""What the benches share: finding binaries, running servers on a core, reading what they used."""

import contextlib
import ctypes
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
TARGET = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")).absolute()
CORES = sorted(os.sched_getaffinity(0))
LOAD_CORE, PROXY_CORE = CORES[0], CORES[-1]
LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


def find_proxy(given):
    """The binary to measure: the one given, else `dist`, else `release`."""
    candidates = [given] if given else [TARGET / p / "outrigger-proxy" for p in ("dist", "release")]
    for path in candidates:
        if path.is_file():
            return path.resolve()
    looked = ", ".join(map(str, candidates))
    raise SystemExit(f"no {looked}: cargo build --profile dist -p outrigger-proxy")


def bench_tool():
    """Our origin and load. All programs are built at once: chosen apart, their dependencies have
    other features and are built again."""
    command = ["cargo", "build", "--quiet", "--release", "--workspace", "--bins"]
    subprocess.run(command, cwd=ROOT, check=True)
    return TARGET / "release" / "outrigger-bench"


def program(name):
    """A program of the system; servers are often not on a user's path."""
    found = shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin:/sbin")
    if not found:
        raise SystemExit(f"{name} is not installed: tests/run --install-bench")
    return found


def free_port():
    """A port that nobody listens on, below those that the kernel gives to outgoing connections."""
    while True:
        port = random.randrange(10_000, 20_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
                return port
            except OSError:
                pass


def family(pid):
    """A process and its descendants."""
    found = [pid]
    for parent in found:
        for task in pathlib.Path(f"/proc/{parent}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                found += map(int, task.read_text().split())
    return found


def leave_nothing_running(stack):
    """A bench that is stopped stops what it started: by a signal as at its end, by SIGKILL through
    what `on_core` asks for. `stack` is closed at either end; call this before anything is started."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    # Daemons of what we start become our children, to be found below.
    LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

    def end():
        for pid in family(os.getpid())[1:]:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)

    stack.callback(end)


def on_core(core):
    """Pins a child to a core and, where that is allowed, puts it ahead of other work. Kernels that
    group by session weigh sessions against each other, so it gets one of its own. It gets SIGTERM
    when the bench is gone."""

    def prepare():
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if core is not None:
            os.sched_setaffinity(0, {core})
        try:
            os.setsid()
            os.setpriority(os.PRIO_PROCESS, 0, -10)
            pathlib.Path("/proc/self/autogroup").write_text("-10")
        except OSError:
            pass

    return prepare


class Server:
    """A server that a bench started. Its log is kept until it ends."""

    def __init__(self, name, command, ports, directory, core, ready=None, environment=None):
        self.name = name
        self.log_path = directory / f"{name}-{time.monotonic_ns()}.log"
        self.log = open(self.log_path, "w+")
        self.process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=self.log,
            preexec_fn=on_core(core),
            env={**os.environ, **(environment or {})},
        )
        end = time.monotonic() + 60
        for port in ports:
            self.await_(lambda port=port: connects(port), end)
        if ready:
            self.await_(ready, end)

    def await_(self, done, end):
        while not done():
            if self.process.poll() is not None or time.monotonic() > end:
                text = self.log_path.read_text()
                self.stop()
                raise SystemExit(f"{self.name} did not start:\n{text}")
            time.sleep(0.02)

    @property
    def pid(self):
        return self.process.pid

    def cpu(self):
        """Nanoseconds on a core, of all threads."""
        total = 0
        for task in pathlib.Path(f"/proc/{self.pid}/task").iterdir():
            total += int(task.joinpath("schedstat").read_text().split()[0])
        return total

    def resident(self):
        """KiB in memory."""
        for line in pathlib.Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1])
        raise SystemExit(f"{self.name} has ended")

    def stop(self, patience=20):
        """SIGTERM, then the end; the status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(timeout=patience)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.log.close()
        return self.process.returncode


def connects(port):
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
        return True
    except OSError:
        return False


def is_ready(port):
    """Whether /readyz on a port answers 200."""

    def ask():
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False

    return ask


class Load:
    """A run of our load: phases that end when we say so, then a report."""

    def __init__(self, tool, command, port, authority, core, *flags, **options):
        arguments = [tool, command, f"--to=127.0.0.1:{port}", f"--authority={authority}", *flags]
        arguments += [f"--{name}={value}" for name, value in options.items()]
        self.process = subprocess.Popen(
            [str(argument) for argument in arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=on_core(core),
        )

    def phase(self, name):
        """Waits until it says so."""
        line = self.process.stdout.readline().strip()
        if line != name:
            _, error = self.process.communicate()
            raise LoadFailed(f"{line} {error}".strip())

    def next(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def report(self, timeout=180):
        """Lets it finish; what it found."""
        out, error = self.process.communicate(timeout=timeout)
        if self.process.returncode != 0:
            raise LoadFailed(error.strip())
        return json.loads(out)


class LoadFailed(Exception):
    """The load could not do its work; the round counts for nothing."""
