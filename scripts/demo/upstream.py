"""The demo's API: answers every request with 200, and with the key version that it was told of.

Usage: upstream.py PORT_FILE. Listens on a loopback port that the system chooses and writes it to PORT_FILE.
"""

import os
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Api(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # One segment for each answer.
    wbufsize = -1
    disable_nagle_algorithm = True

    def do_GET(self):
        body = b"ok\n"
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.send_header("x-seen-key-version", self.headers.get("x-relatch-key-version", "none"))
        self.send_header("x-seen-key", "yes" if "x-api-key" in self.headers else "no")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format, *args):
        """Says nothing: thousands of lines would tell nothing."""


def main():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Api)
    server.daemon_threads = True
    draft = sys.argv[1] + ".draft"
    with open(draft, "w", encoding="ascii") as file:
        file.write(str(server.server_port))
    os.rename(draft, sys.argv[1])
    server.serve_forever()


if __name__ == "__main__":
    main()
