"""A small HTTP proxy before an S3 server, which answers some requests with trouble instead of passing them on."""

from __future__ import annotations

import contextlib
import http.client
import socket
import struct
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SLOW_DOWN = "503"
RESET = "reset"
"""The connection is cut before the request goes on."""
LOST = "lost"
"""The request goes on, and its answer is lost."""
HALF = "half"
"""The answer ends in the middle."""

_SLOW_DOWN = (
    b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)


class Proxy:
    """Passes requests on; ``judge`` says for each, by its method, path and number from 0, what happens to it."""

    def __init__(self, port: int, judge: Callable[[str, str, int], str | None]) -> None:
        self.judge = judge
        self.count = 0
        self.faults = 0
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def _serve(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                fault = outer.next_fault(self.command, self.path)
                if fault == SLOW_DOWN:
                    self._answer(503, {"Content-Type": "application/xml"}, _SLOW_DOWN)
                    return
                if fault == RESET:
                    self._reset()
                    return
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
                try:
                    connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                    for name, value in self.headers.items():
                        connection.putheader(name, value)
                    connection.endheaders(body)
                    answer = connection.getresponse()
                    data = answer.read()
                finally:
                    connection.close()
                if fault == LOST:
                    self._reset()
                    return
                headers = {
                    name: value
                    for name, value in answer.getheaders()
                    if name.lower() not in ("transfer-encoding", "connection", "content-length")
                }
                length = answer.getheader("Content-Length") if self.command == "HEAD" else None
                if fault == HALF and len(data) > 1:
                    self._answer(answer.status, headers, data[: len(data) // 2], length=str(len(data)))
                    self._reset()
                    return
                if fault == HALF:  # there is no half of nothing
                    with outer._lock:
                        outer.faults -= 1
                self._answer(answer.status, headers, data, length=length)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _serve

            def _answer(self, status: int, headers: dict[str, str], data: bytes, *, length: str | None = None) -> None:
                with contextlib.suppress(OSError):
                    self.send_response_only(status)
                    for name, value in headers.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", length or str(len(data)))
                    self.end_headers()
                    if self.command != "HEAD":
                        self.wfile.write(data)
                    self.wfile.flush()

            def _reset(self) -> None:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.close_connection = True
                with contextlib.suppress(OSError):
                    self.connection.shutdown(socket.SHUT_RDWR)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def next_fault(self, method: str, path: str) -> str | None:
        with self._lock:
            fault = self.judge(method, path, self.count)
            self.count += 1
            self.faults += fault is not None
            return fault

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
