"""A proxy in front of an S3 server of the tests, with faults that a test switches on."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlparse

BUSY = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


class S3Proxy:
    """Passes requests on from a loopback port, which is the same after `stop` and `start`."""

    def __init__(self, target: str) -> None:
        """Listen.

        Args:
            target: endpoint of the server behind it, http://host:port.
        """
        self.target = urlparse(target).netloc
        self.fault: Callable[[str, str], str] = lambda method, path: ""
        """Asked for each request (`GET`, `/bucket/key?query`), one at a time: "" = pass it on, "busy" = answer 503,
        "drop" = hang up unanswered, "lose" = do it and hang up, "silent" = never answer, "stall" = stop half-way
        through the answer."""
        self.requests: list[tuple[float, str, str, str]] = []
        """(monotonic time, method, path, fault) of every request."""
        self._lock = threading.Lock()
        self._server: ThreadingHTTPServer | None = None
        self._port = 0
        self._ended = threading.Event()
        self.start()

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Listen."""
        self._ended = threading.Event()
        self._server = _Server(("127.0.0.1", self._port), _handler(self, self._ended))
        self._port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Refuse connections, and hang up those that are open."""
        if self._server is not None:
            self._ended.set()
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def asked(self, method: str, path: str) -> str:
        """The fault of a request, which is noted."""
        with self._lock:
            fault = self.fault(method, path)
            self.requests.append((time.monotonic(), method, path, fault))
            return fault

    def times(self, *faults: str) -> int:
        """The number of requests that met one of some faults."""
        return sum(fault in faults for *_, fault in self.requests)


def one_in(count: int, fault: str = "busy") -> Callable[[str, str], str]:
    """A fault for every `count`-th request, by their order."""
    seen = 0

    def choose(method: str, path: str) -> str:
        nonlocal seen
        seen += 1
        return fault if seen % count == 0 else ""

    return choose


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64


def _handler(proxy: S3Proxy, ended: threading.Event) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def pass_on(self) -> None:
            self.close_connection = self.close_connection or ended.is_set()
            fault = proxy.asked(self.command, self.path)
            body = self._body()
            if fault == "silent":
                ended.wait()
            if ended.is_set() or fault in ("silent", "drop"):
                self.close_connection = True
                return
            if fault == "busy":
                self._answer(503, [("Content-Type", "application/xml")], BUSY)
                return
            upstream = http.client.HTTPConnection(proxy.target, timeout=60)
            try:
                upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for name, value in self.headers.items():
                    if name.lower() not in ("connection", "expect"):
                        upstream.putheader(name, value)
                upstream.endheaders(body or None)
                response = upstream.getresponse()
                data = response.read()
            finally:
                upstream.close()
            if fault == "lose":
                self.close_connection = True
                return
            self._answer(response.status, response.getheaders(), data, stall=fault == "stall")

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = pass_on

        def _body(self) -> bytes:
            """The body as it came: chunks stay chunks."""
            if "chunked" not in self.headers.get("Transfer-Encoding", "").lower():
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts = []
            while True:
                line = self.rfile.readline()
                size = int(line.split(b";")[0], 16)
                parts += [line, self.rfile.read(size), self.rfile.readline()]
                if not size:
                    return b"".join(parts)

        def _answer(self, status: int, headers: list[tuple[str, str]], data: bytes, stall: bool = False) -> None:
            self.send_response_only(status)
            length = str(len(data))
            for name, value in headers:
                if name.lower() == "content-length":
                    length = value  # of HEAD, which has no body
                elif name.lower() not in ("connection", "transfer-encoding"):
                    self.send_header(name, value)
            self.send_header("Content-Length", length)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data[: len(data) // 2] if stall else data)
            if stall:
                ended.wait()
                self.close_connection = True

        def handle(self) -> None:
            try:
                super().handle()
            except (OSError, ValueError):
                return  # the client gave up

        def log_message(self, *_: object) -> None:
            """Silent."""

    return Handler
