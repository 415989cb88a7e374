"""Restarts sidecars under load through Envoy, and prints how many requests failed.

Each part starts a control plane, one sidecar or two, an upstream and an Envoy, all on loopback and on ports that the system
chooses, sends requests at a steady rate, and restarts the sidecar again and again.
"""

import argparse
import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SAMPLE = Path("deploy/envoy/envoy.yaml")
CONNECTIONS = 20


class Place:
    """A directory with the processes that were started for it."""

    def __init__(self, args):
        self.args = args
        self.stack = contextlib.ExitStack()
        self.dir = Path(self.stack.enter_context(tempfile.TemporaryDirectory(prefix="relatch-restarts-")))
        os.chmod(self.dir, 0o700)

    def close(self):
        self.stack.close()

    def start(self, name, *command, socket_for=None):
        """Starts a process. A socket is passed as systemd passes it (sd_listen_fds(3))."""
        log = open(self.dir / f"{name}.log", "ab")
        passed = ()
        if socket_for is not None:
            script = 'exec 3<&"$1"; shift; LISTEN_PID=$$ LISTEN_FDS=1 exec "$@"'
            command = ("bash", "-c", script, "bash", str(socket_for.fileno()), *command)
            passed = (socket_for.fileno(),)
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=passed
        )
        log.close()
        self.stack.callback(end, process)
        return process

    def log(self, name):
        return (self.dir / f"{name}.log").read_text()

    def relatch(self, *args):
        done = subprocess.run(
            (self.args.relatch, *args), stdin=subprocess.DEVNULL, capture_output=True, check=False, text=True
        )
        if done.returncode != 0:
            sys.exit(f"relatch {' '.join(args)}: {done.stderr}")
        return done.stdout


def end(process):
    if process.poll() is None:
        process.kill()
    process.wait()


def until(what, condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > deadline:
            sys.exit(f"{what} did not happen within {seconds} s")
        time.sleep(0.002)
    return found


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Setup:
    """A control plane, sidecars, an Envoy and an upstream."""

    def __init__(self, place, sidecars, passes_socket, keeps_file, drain):
        self.place = place
        self.passes_socket = passes_socket
        self.sidecars = {}
        data = place.dir / "data"
        initialised = place.relatch("control", "init", "--data-dir", str(data), "-o", "json")
        token = place.dir / "admin.token"
        token.write_text(json.loads(initialised)["admin_token"])
        os.chmod(token, 0o600)
        discovery, admin, http = free_port(), free_port(), free_port()
        control = place.dir / "control.yaml"
        control.write_text(
            f"data_dir: {data}\ndiscovery: 127.0.0.1:{discovery}\nadmin: 127.0.0.1:{admin}\nhttp: 127.0.0.1:{http}\n"
        )
        place.start("control", place.args.relatch, "control", "--config", str(control))
        until("the start of the control plane", lambda: "control plane started" in place.log("control"))
        self.admin = ("--admin", f"http://127.0.0.1:{admin}", "--token-file", str(token), "-o", "json")
        place.relatch("keyring", "create", "demo", *self.admin)
        for _ in range(place.args.keys):
            created = place.relatch(
                "key", "create", "--keyring", "demo", "--consumer", "acme", "--create-missing", *self.admin
            )
        self.key = json.loads(created.splitlines()[-1])["secret"]
        for number in range(sidecars):
            self.add_sidecar(f"edge-{number + 1}", discovery, keeps_file, drain)

    def add_sidecar(self, name, discovery, keeps_file, drain):
        listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        port = listener.getsockname()[1]
        if not self.passes_socket:
            listener.close()
            listener = None
        yaml = (
            f"node: {{ id: {name} }}\nlisten: 127.0.0.1:{port}\nhttp: 127.0.0.1:{free_port()}\n"
            f"control: {{ endpoints: ['http://127.0.0.1:{discovery}'] }}\nkeyrings: [{{ name: demo }}]\n"
            f"default_keyring: demo\ndrain: {drain}\n"
        )
        if keeps_file:
            key = self.place.dir / f"{name}.key"
            self.place.relatch("config", "snapshot-key", str(key))
            yaml += f"snapshot: {{ path: {self.place.dir / name}.snap, key_file: {key} }}\n"
        file = self.place.dir / f"{name}.yaml"
        file.write_text(yaml)
        self.sidecars[name] = {"port": port, "socket": listener, "file": file, "process": None}
        self.start_sidecar(name)
        until(f"the start of {name}", lambda: "the keyring is fresh" in self.place.log(name))

    def start_sidecar(self, name):
        sidecar = self.sidecars[name]
        command = (self.place.args.relatch, "sidecar", "--config", str(sidecar["file"]))
        sidecar["process"] = self.place.start(name, *command, socket_for=sidecar["socket"])

    def stop_sidecar(self, name, how):
        process = self.sidecars[name]["process"]
        process.send_signal(how)
        process.wait()

    def start_envoy(self, upstream):
        yaml = SAMPLE.read_text()
        endpoint = "              - endpoint: {{ address: {{ socket_address: {{ address: 127.0.0.1, port_value: {} }} }} }}\n"
        ports = [sidecar["port"] for sidecar in self.sidecars.values()]
        yaml = yaml.replace(endpoint.format(9001), "".join(map(endpoint.format, ports)))
        for port, other in ((10000, 0), (9901, 0), (8080, upstream)):
            yaml = yaml.replace(f"port_value: {port}", f"port_value: {other}")
        (self.place.dir / "envoy.yaml").write_text(yaml)
        admin = self.place.dir / "envoy.admin"
        self.place.start(
            "envoy", self.place.args.envoy, "-c", str(self.place.dir / "envoy.yaml"), "--admin-address-path", str(admin),
            "--concurrency", "1", "--disable-hot-restart", "--log-level", "warn",
        )  # fmt: skip
        until("the start of Envoy", lambda: admin.exists() and admin.read_text())
        host, port = admin.read_text().strip().rsplit(":", 1)
        return until("a listener of Envoy", lambda: listener_of(host, int(port)))


def listener_of(host, port):
    try:
        with socket.create_connection((host, port), timeout=1) as admin:
            admin.sendall(b"GET /listeners HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
            page = b"".join(iter(lambda: admin.recv(4096), b"")).decode()
    except OSError:
        return None
    found = re.search(r"ingress::127\.0\.0\.1:(\d+)", page)
    return int(found[1]) if found else None


async def upstream():
    async def serve(reader, writer):
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while await reader.readuntil(b"\r\n\r\n"):
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
                await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    return server, server.sockets[0].getsockname()[1]


class Load:
    """Requests at a steady rate, each on the next of some connections."""

    def __init__(self, port, key, rate):
        self.port, self.rate = port, rate
        self.request = f"GET / HTTP/1.1\r\nhost: a\r\nx-api-key: {key}\r\n\r\n".encode()
        self.sent, self.failed, self.slowest = 0, [], 0.0
        self.free = asyncio.Queue()
        self.stopping = False

    async def run(self):
        for _ in range(CONNECTIONS):
            self.free.put_nowait(await asyncio.open_connection("127.0.0.1", self.port))
        under_way = set()
        begin = time.monotonic()
        while not self.stopping:
            due = begin + self.sent / self.rate
            await asyncio.sleep(max(0, due - time.monotonic()))
            self.sent += 1
            task = asyncio.create_task(self.send())
            under_way.add(task)
            task.add_done_callback(under_way.discard)
        if under_way:
            await asyncio.wait(under_way)

    async def send(self):
        begin = time.monotonic()
        try:
            reader, writer = self.free.get_nowait()
        except asyncio.QueueEmpty:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(self.request)
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = int(re.search(r"content-length: (\d+)", head, re.I)[1])
        body = await reader.readexactly(length)
        self.slowest = max(self.slowest, time.monotonic() - begin)
        if not head.startswith("HTTP/1.1 200"):
            self.failed.append(f"{head.split()[1]} {body.decode()[:120]}")
        self.free.put_nowait((reader, writer))


async def measure(args, title, *, sidecars=1, passes_socket=False, keeps_file=False, drain="0s", how=signal.SIGTERM):
    place = Place(args)
    try:
        setup = await asyncio.to_thread(Setup, place, sidecars, passes_socket, keeps_file, drain)
        server, port = await upstream()
        envoy = await asyncio.to_thread(setup.start_envoy, port)
        load = Load(envoy, setup.key, args.rate)
        running = asyncio.create_task(load.run())
        await asyncio.sleep(1)
        stops = []
        for turn in range(args.restarts):
            name = f"edge-{turn % sidecars + 1}"
            begin = time.monotonic()
            await asyncio.to_thread(setup.stop_sidecar, name, how)
            stops.append(time.monotonic() - begin)
            setup.start_sidecar(name)
            await asyncio.sleep(2)
        load.stopping = True
        await running
        server.close()
        print(
            f"{title:<52} {load.sent:>7,} {len(load.failed):>7,} {statistics.median(stops) * 1000:>9.0f} "
            f"{load.slowest * 1000:>9.0f}",
            flush=True,
        )
        for failure in load.failed[:3]:
            print(f"    {failure}")
        return len(load.failed)
    finally:
        place.close()


async def main():
    parser = argparse.ArgumentParser(description="Restart sidecars under load, and count failed requests")
    parser.add_argument("--relatch", required=True, help="the program")
    parser.add_argument("--envoy", required=True, help="Envoy")
    parser.add_argument("--rate", type=int, default=500, help="requests per second [default: 500]")
    parser.add_argument("--restarts", type=int, default=10, help="restarts of each part [default: 10]")
    parser.add_argument("--keys", type=int, default=5, help="keys in the keyring [default: 5]")
    args = parser.parse_args()
    print(f"{'':<52} {'sent':>7} {'failed':>7} {'stop ms':>9} {'slowest ms':>9}")
    failed = 0
    failed += await measure(args, "one sidecar, socket from systemd, snapshot file", passes_socket=True, keeps_file=True)
    failed += await measure(args, "one sidecar, socket from systemd", passes_socket=True)
    failed += await measure(args, "one sidecar, retries of Envoy, snapshot file", keeps_file=True)
    failed += await measure(args, "two sidecars, SIGTERM to one", sidecars=2)
    failed += await measure(args, "two sidecars, SIGKILL of one", sidecars=2, how=signal.SIGKILL)
    return failed


sys.exit(1 if asyncio.run(main()) else 0)
