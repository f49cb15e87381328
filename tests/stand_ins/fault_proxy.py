"""A proxy in front of an S3 server that delays, breaks or refuses its answers.

    with fault_proxy(endpoint, latency_ms=50, every=20, kinds=FAULTS) as proxy:
        ...  # use proxy.url instead of endpoint

Every `every`-th request is faulty, cycling through the kinds. `choose`, which can be set at any
time, maps a request's method and path to a kind of fault, '' for none; `changes` lists the writes
and deletes requested. From request `expire_after` on, the session token then in use is expired; a
new one works. The Host header is passed on unchanged, so that signatures stay valid.
"""

from __future__ import annotations

import itertools
import os
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import urllib3

FAULTS = (
    "slow down",
    "internal error",
    "reset",
    "truncated",
    "long length",
    "short length",
    "no answer",
)
STALLS = ("stall", "stall before the headers")  # each costs the client its read timeout
ERROR = "<?xml version='1.0'?><Error><Code>{0}</Code><Message>{0}, says the proxy</Message></Error>"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        server, length = self.server, int(self.headers.get("Content-Length", 0))
        sent = self.rfile.read(length)
        fault = server.fault(self.headers.get("x-amz-security-token"), self.command, self.path)
        server.closing.wait(server.latency_ms / 1000)
        if fault == "stall before the headers":
            server.closing.wait()
        if fault in ("reset", "no answer", "stall before the headers"):
            return self.hang_up(fault == "reset")
        if fault in ERRORS:
            status, code = ERRORS[fault]
            return self.reply(
                status, {"Content-Type": "application/xml"}, ERROR.format(code).encode()
            )
        asked = {
            name: text
            for name, text in self.headers.items()
            if name.lower() not in ("connection", "expect")
        }
        how = {"retries": False, "redirect": False, "decode_content": False}
        came = server.pool.request(
            self.command, server.target + self.path, body=sent, headers=asked, **how
        )
        if fault == "lost answer":
            return self.hang_up(False)
        headers = {
            name: text for name, text in came.headers.items() if name.lower() not in HOP_BY_HOP
        }
        return self.reply(came.status, headers, came.data, fault)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer

    def reply(self, status: int, headers: dict[str, str], body: bytes, fault: str = "") -> None:
        half = len(body) // 2
        length = {"long length": len(body) + 100, "short length": half}.get(fault, len(body))
        self.send_response_only(status)
        for name, text in {**headers, "Content-Length": str(length)}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:half] if fault in ("truncated", "stall") else body)
        if fault == "stall":
            self.server.closing.wait()
        self.close_connection |= bool(fault)

    def hang_up(self, reset: bool) -> None:
        # Without lingering, closing the socket sends RST; its close() would wait for rfile.
        if reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())
        self.close_connection = True

    def handle(self) -> None:
        try:
            super().handle()
        # The client has gone, or this end was reset.
        except (OSError, ValueError):
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


ERRORS = {
    "slow down": (503, "SlowDown"), "internal error": (500, "InternalError"), "expired": (400, "ExpiredToken"),
    "denied": (403, "AccessDenied"),
}  # fmt: skip
HOP_BY_HOP = {"connection", "content-length", "date", "keep-alive", "server", "transfer-encoding"}


class Proxy(ThreadingHTTPServer):
    """Serves at `url`; `requests` and `injected` count requests and, by kind, faults so far."""

    daemon_threads, request_queue_size = True, 128

    def __init__(
        self,
        endpoint: str,
        latency_ms: float,
        every: int,
        kinds: Sequence[str],
        expire_after: int,
        host: str,
    ) -> None:
        super().__init__((host, 0), Handler)
        self.url, self.target = f"http://{host}:{self.server_address[1]}", endpoint.rstrip("/")
        self.latency_ms, self.every, self.expire_after = latency_ms, every, expire_after
        self.kinds, self.requests, self.injected = itertools.cycle(kinds), 0, Counter()
        self.expired: str | None = None
        self.choose: Callable[[str, str], str] = lambda method, path: ""
        self.changes: list[tuple[str, str]] = []
        self.lock, self.closing = threading.Lock(), threading.Event()
        self.pool = urllib3.PoolManager(maxsize=64)

    def fault(self, token: str | None, method: str, path: str) -> str:
        """The kind of fault for this request; '' for none."""
        with self.lock:
            self.requests += 1
            kind = next(self.kinds) if self.every and self.requests % self.every == 0 else ""
            if self.expire_after and self.requests == self.expire_after:
                self.expired = token
            if self.expired and token == self.expired:
                kind = "expired"
            kind = kind or self.choose(method, path)
            if method in ("PUT", "DELETE"):
                self.changes.append((method, path))
            self.injected.update([kind] if kind else [])
            return kind

    def handle_error(self, *_: object) -> None:
        pass


@contextmanager
def fault_proxy(
    endpoint: str,
    latency_ms: float = 0,
    every: int = 0,
    kinds: Sequence[str] = FAULTS,
    expire_after: int = 0,
    host: str = "127.0.0.1",
) -> Iterator[Proxy]:
    """A proxy to the S3 server at `endpoint` for as long as the block lasts: use its `url`.

    `host` is an address of this machine.
    """
    with Proxy(endpoint, latency_ms, every, kinds, expire_after, host) as proxy:
        threading.Thread(
            target=proxy.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        ).start()
        try:
            yield proxy
        finally:
            proxy.closing.set()
            proxy.shutdown()
