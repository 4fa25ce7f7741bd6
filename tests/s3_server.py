"""An S3 endpoint of this machine: moto's server behind a proxy that answers, on demand, as a failing store or network does."""

from __future__ import annotations

import http.client
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from rayft.data import store

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "tests", "AWS_SECRET_ACCESS_KEY": "kept-from-logs", "AWS_DEFAULT_REGION": "us-east-1"}
KINDS = ("403", "500", "503", "stall", "hang-up", "cut", "short")
"""Answers: refused; failed; busy; none for STALL_S; the connection closed; a body that ends too early; the same with a length to match."""
STALL_S = 1.0
SKIPPED = {"transfer-encoding", "connection", "content-length", "server", "date"}
CODES = {"403": "AccessDenied", "500": "InternalError", "503": "ServiceUnavailable"}

Match = Callable[[str, str], bool]


@dataclass
class Fault:
    """One way to fail.

    Attributes:
        kind: one of KINDS.
        match: (method, path with query) -> whether the request is hit.
        skip: matching requests to let through first.
        times: how many to hit.
        hits: how many were.
    """

    kind: str
    match: Match = lambda method, path: True
    skip: int = 0
    times: int = 1
    hits: int = 0


@dataclass
class S3:
    """The endpoint.

    Attributes:
        url: what AWS_ENDPOINT_URL is to be.
        fault: the fault in force.
        seen: method -> requests.
    """

    url: str
    fault: Fault | None = None
    seen: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def next_kind(self, method: str, path: str) -> str | None:
        """How to answer this request; None for well."""
        with self.lock:
            self.seen[method] += 1
            fault = self.fault
            if fault is None or not fault.match(method, path) or fault.hits >= fault.times:
                return None
            if fault.skip:
                fault.skip -= 1
                return None
            fault.hits += 1
            return fault.kind


@contextmanager
def serve(bucket: str = "bucket") -> Iterator[S3]:
    """Run server and proxy, with a bucket, while the block runs."""
    from moto.moto_server.threaded_moto_server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    connection = http.client.HTTPConnection(host, port)
    for method, path in (("POST", "/moto-api/reset"), ("PUT", f"/{bucket}")):  # what it stores is the process's, not the server's
        connection.request(method, path)
        answer = connection.getresponse()
        assert answer.status == 200 and answer.read() is not None
    state = S3("")
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), _proxy(state, port))
    proxy.daemon_threads = True
    state.url = f"http://127.0.0.1:{proxy.server_port}"
    thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        proxy.shutdown()
        proxy.server_close()
        moto.stop()


@contextmanager
def reached(s3: S3, *, retry_s: float = 5.0, request_s: float = 1.0) -> Iterator[None]:
    """Let this process use the endpoint, with short waits."""
    from s3fs import S3FileSystem

    S3FileSystem.clear_instance_cache()  # they know endpoints of before
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": s3.url}.items():
            patch.setenv(name, value)
        for name, number in {"RETRY_S": retry_s, "REQUEST_S": request_s, "REQUEST_TRIES": 1, "PAUSE_S": 0.05}.items():
            patch.setattr(store, name, number)
        yield


def _proxy(state: S3, port: int) -> type[BaseHTTPRequestHandler]:
    class Proxy(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            kind = state.next_kind(self.command, self.path)
            if kind == "hang-up":
                self.close_connection = True
                return
            if kind == "stall":
                time.sleep(STALL_S)
                self.close_connection = True
                return
            if kind in CODES:
                text = f"<Error><Code>{CODES[kind]}</Code><Message>injected</Message></Error>".encode()
                self.reply(int(kind), [("Content-Type", "application/xml")], b"" if self.command == "HEAD" else text, None)
                return
            connection = http.client.HTTPConnection("127.0.0.1", port)
            connection.request(self.command, self.path, body, {name: value for name, value in self.headers.items()})
            answer = connection.getresponse()
            content = answer.read()
            self.reply(answer.status, answer.getheaders(), content, kind, answer.getheader("Content-Length"))
            connection.close()

        def reply(self, status: int, headers: list[tuple[str, str]], content: bytes, kind: str | None, length: str | None = None) -> None:
            sent = content[: len(content) // 2] if kind in ("cut", "short") else content
            told = length if self.command == "HEAD" and length else str(len(sent) if kind != "cut" else len(content))
            self.send_response(status)
            for name, value in headers:
                if name.lower() not in SKIPPED and not (kind == "short" and name.lower().startswith("x-amz-checksum")):
                    self.send_header(name, value)
            self.send_header("Content-Length", told)
            self.end_headers()
            self.wfile.write(sent)
            if kind == "cut":
                self.wfile.flush()
                self.close_connection = True

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            return

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = answer

    return Proxy
