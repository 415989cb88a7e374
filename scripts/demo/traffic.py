"""The demo's consumer: steady traffic through Envoy while its key is rotated, and the old version then revoked.

Prints a block that updates on a terminal, plain lines elsewhere. Exit code 0 only if no request failed, no credential
reached the upstream, and the revoked version is denied.
"""

import argparse
import collections
import http.client
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import urllib.request

# Senders and the requests of each in a second: a few hundred together, which Python manages on one core.
SENDERS = 8
RATE_OF_EACH = 40
# Seconds: on the old version alone, switching over, on the new version alone, and after the revocation.
BEFORE, SWITCH, AFTER, REVOKED = 6, 18, 5, 5
# A request that takes longer has failed.
TIMEOUT = 5
# The pause between two tries with the old key while it is revoked: how exactly its end is seen.
PROBE_PAUSE = 0.002


class Relatch:
    """The command line, with the address and the token of the demo's control plane."""

    def __init__(self, program, endpoints):
        self.program = program
        self.environment = dict(
            os.environ,
            RELATCH_ADMIN="http://" + endpoints["admin"],
            RELATCH_TOKEN_FILE=endpoints["admin_token_file"],
        )

    def run(self, *arguments):
        """Runs a command and returns the last line of its JSON."""
        done = subprocess.run(
            [self.program, *arguments, "-o", "json"],
            env=self.environment,
            stdout=subprocess.PIPE,
            check=True,
            text=True,
            timeout=90,
        )
        return json.loads(done.stdout.splitlines()[-1])


class Caller:
    """One connection to Envoy that is kept."""

    def __init__(self, address):
        self.connection = http.client.HTTPConnection(address, timeout=TIMEOUT)

    def call(self, key):
        """Sends a request; returns its status, and what the upstream saw where one answered."""
        try:
            self.connection.request("GET", "/", headers={"x-api-key": key})
            response = self.connection.getresponse()
            response.read()
        except (OSError, http.client.HTTPException) as error:
            self.connection.close()
            return type(error).__name__, None, None
        return response.status, response.getheader("x-seen-key-version"), response.getheader("x-seen-key")


class Traffic:
    """The consumer's requests, and what became of them."""

    def __init__(self, address, key):
        self.address = address
        self.old = self.new = key
        # The part of the requests that use the new key, 0 to 1.
        self.switched = 0.0
        self.stop = threading.Event()
        self.lock = threading.Lock()
        self.versions = collections.Counter()
        self.failures = collections.Counter()
        self.leaks = 0
        self.threads = [threading.Thread(target=self.send, args=(n,), daemon=True) for n in range(SENDERS)]

    def start(self):
        for thread in self.threads:
            thread.start()

    def end(self):
        self.stop.set()
        for thread in self.threads:
            thread.join()

    def send(self, number):
        caller = Caller(self.address)
        due = time.monotonic() + number / (SENDERS * RATE_OF_EACH)
        while not self.stop.wait(max(0.0, due - time.monotonic())):
            due += 1 / RATE_OF_EACH
            key = self.new if random.random() < self.switched else self.old
            status, version, leaked = caller.call(key)
            with self.lock:
                if status == 200:
                    self.versions[version] += 1
                    self.leaks += leaked != "no"
                else:
                    self.failures[status] += 1

    def counts(self):
        """A copy of the counts by version, and the failures."""
        with self.lock:
            return collections.Counter(self.versions), sum(self.failures.values())


class Probe:
    """Somebody who goes on with the old key."""

    def __init__(self, address, key):
        self.caller = Caller(address)
        self.key = key
        self.stop = threading.Event()
        self.answers = []
        self.thread = threading.Thread(target=self.run, daemon=True)

    def run(self):
        while not self.stop.wait(PROBE_PAUSE):
            sent = time.monotonic()
            status, _, _ = self.caller.call(self.key)
            self.answers.append((sent, time.monotonic(), status))

    def end(self):
        self.stop.set()
        self.thread.join()


class Screen:
    """What is shown: on a terminal a block that is drawn again and again, elsewhere a line every other second."""

    BAR = 30

    def __init__(self, traffic):
        self.traffic = traffic
        self.is_terminal = sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        self.every = 0.2 if self.is_terminal else 2.0
        self.phase = "starting"
        self.rotation = "not begun"
        self.revocation = "not begun"
        self.drawn = 0
        self.began = time.monotonic()
        self.history = collections.deque([(self.began, collections.Counter())])
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)

    def run(self):
        while not self.stop.wait(self.every):
            self.draw()

    def end(self):
        self.stop.set()
        self.thread.join()
        self.draw()

    def say(self, phase):
        self.phase = phase
        if not self.is_terminal:
            print(f"-- {phase}", flush=True)

    def draw(self):
        now = time.monotonic()
        versions, failures = self.traffic.counts()
        # Rate and shares are those of about the last second.
        while len(self.history) > 1 and now - self.history[1][0] >= 1:
            self.history.popleft()
        since, before = self.history[0]
        self.history.append((now, versions))
        recent = versions - before
        total = sum(recent.values())
        rate = total / max(now - since, 0.001)
        shares = {version: recent[version] / total if total else 0.0 for version in ("1", "2")}
        requests = f"{sum(versions.values()) + failures:,} requests, {rate:.0f}/s, {failures} failed"
        share = f"version 1 {shares['1']:4.0%}, version 2 {shares['2']:4.0%}"
        if not self.is_terminal:
            print(f"{now - self.began:5.1f} s  {requests:<40} upstream saw {share}", flush=True)
            return
        filled = round(self.BAR * shares["2"])
        lines = [
            f"  now           {self.phase}",
            f"  traffic       {requests}",
            f"  upstream saw  {share}  [{'#' * filled}{'.' * (self.BAR - filled)}]",
            f"  rotation      {self.rotation}",
            f"  revocation    {self.revocation}",
        ]
        up = f"\x1b[{self.drawn}A" if self.drawn else ""
        # A line that wraps would break the block.
        width = os.get_terminal_size(sys.stdout.fileno()).columns or 80
        sys.stdout.write(up + "".join(f"\r{line[: width - 1]}\x1b[K\n" for line in lines))
        sys.stdout.flush()
        self.drawn = len(lines)


def milliseconds(seconds):
    return f"{seconds * 1000:.0f} ms" if seconds >= 0.01 else f"{seconds * 1000:.1f} ms"


def ingress(admin):
    """Where Envoy listens, once it does and relatch's keyring lets a request through."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"http://{admin}/listeners?format=json", timeout=TIMEOUT) as page:
                listeners = json.load(page).get("listener_statuses", [])
        except OSError:
            listeners = []
        for listener in listeners:
            address = listener["local_address"]["socket_address"]
            return f"{address['address']}:{address['port_value']}"
        time.sleep(0.05)
    sys.exit("Envoy has no listener")


def until_allowed(address, key):
    """Waits until a first request passes, so that the start of Envoy's clusters is no failure of a rotation."""
    caller = Caller(address)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        status, _, _ = caller.call(key)
        if status == 200:
            return
        time.sleep(0.05)
    sys.exit(f"the first request was not let through: {status}")


def rotate(relatch, traffic, screen, key_id):
    screen.say("relatch rotate start, while the traffic goes on")
    done = relatch.run("rotate", "start", key_id, "--overlap", "1h")
    propagation = milliseconds(done["propagation_seconds"])
    sidecars = f"{done['applied']} of {done['total']} sidecar" + ("s" if done["total"] != 1 else "")
    screen.rotation = f"version {done['version']} committed and accepted by {sidecars} within {propagation}, then handed out"
    screen.say(f"{screen.rotation}; the consumer switches to it")
    traffic.new = done["secret"]
    began = time.monotonic()
    while (elapsed := time.monotonic() - began) < SWITCH:
        traffic.switched = elapsed / SWITCH
        time.sleep(0.1)
    traffic.switched = 1.0
    screen.say("the consumer has switched")
    time.sleep(AFTER)
    return screen.rotation


def revoke(relatch, traffic, screen, key_id):
    probe = Probe(traffic.address, traffic.old)
    probe.thread.start()
    screen.say("relatch revoke of version 1, while somebody goes on using it")
    time.sleep(1)
    began = time.monotonic()
    done = relatch.run("revoke", key_id, "--version", "1", "--reason", "the demo's end", "--wait")
    ended = time.monotonic()
    propagation = milliseconds(done["propagation_seconds"])
    screen.revocation = f"committed and applied by every sidecar within {propagation}"
    screen.say("version 1 is revoked, version 2 goes on")
    time.sleep(REVOKED)
    probe.end()
    denied = [answered for _, answered, status in probe.answers if status == 401 and answered >= began]
    afterwards = [status for sent, _, status in probe.answers if sent >= ended]
    passed = sum(status != 401 for status in afterwards)
    bite = milliseconds(denied[0] - began) if denied else "never"
    screen.revocation += f"; first denial {bite} after the command's start"
    return screen.revocation, len(afterwards), passed


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--relatch", required=True)
    arguments.add_argument("--endpoints", required=True)
    arguments.add_argument("--envoy-admin", required=True)
    arguments = arguments.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

    with open(arguments.endpoints, encoding="utf-8") as file:
        relatch = Relatch(arguments.relatch, json.load(file))
    key = relatch.run("key", "create", "--keyring", "demo", "--consumer", "shop", "--create-missing")
    address = ingress(arguments.envoy_admin)
    until_allowed(address, key["secret"])

    traffic = Traffic(address, key["secret"])
    screen = Screen(traffic)
    print(f"\nA consumer calls http://{address}/ through Envoy with key {key['key_id']}.\n", flush=True)
    traffic.start()
    screen.thread.start()
    screen.say("steady traffic with version 1")
    time.sleep(BEFORE)
    rotation = rotate(relatch, traffic, screen, key["key_id"])
    revocation, tried, passed = revoke(relatch, traffic, screen, key["key_id"])
    traffic.end()
    screen.say("done")
    screen.end()

    versions, failures = traffic.counts()
    print("\nSummary")
    print(f"  requests    {sum(versions.values()) + failures:,}: " + ", ".join(
        f"{count:,} with version {version}" for version, count in sorted(versions.items())))
    print(f"  failed      {failures}" + (f" {dict(traffic.failures)}" if failures else ""))
    print(f"  rotation    {rotation}")
    print(f"  revocation  {revocation}")
    print(f"  old key     {tried:,} requests after the revocation, {tried - passed:,} denied")
    print(f"  leaks       {traffic.leaks} requests brought their key to the upstream")
    succeeded = failures == 0 and tried > 0 and passed == 0 and traffic.leaks == 0
    print("\nNo request failed, and the revoked key is denied." if succeeded else "\nThat was not as it should be.")
    sys.exit(0 if succeeded else 1)


if __name__ == "__main__":
    main()
