"""The report of an experiment, served on this machine while the experiment runs (`tfkd report --follow`).

The page asks every other second for what has changed (`page_script`). Only the reports themselves
are served, by name and from memory: no request names a file. The server listens on the loopback
address alone, takes GET and HEAD, and refuses other names in the Host header, with which a foreign
site could reach it through the reader's browser (DNS rebinding).
"""

import hashlib
import sys
import threading
import time
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.show.page import Page, main_html, page_html
from tfkd_ray.show.status import changed_last, is_running, status
from tfkd_ray.space.arms import comparisons_of

HERE_ALONE = "127.0.0.1"
HOSTS = (HERE_ALONE, "localhost", "[::1]")
"""Names by which a browser may ask; the port may be another one, at the near end of an `ssh -L`."""
RENEW_S = 1.0
"""Least seconds between two looks at the files."""
SHARE = 0.1
"""Most of the time that is spent on making reports, so that trials on this machine keep their cores."""
SILENT_S = 30
"""Seconds after which a silent connection is closed."""
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "frame-ancestors 'none'",  # the page has the rest of it
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Followed:
    """The newest report on an experiment, made again when a file has changed and somebody asks.

    Args:
        experiment: directory of the experiment whose state the page tells.
        make: makes the report.
        beside: other experiments on the page.
    """

    def __init__(
        self, experiment: Path, make: Callable[[], Page], beside: Sequence[Path] = ()
    ) -> None:
        self._experiment, self._make, self._beside = experiment, make, beside
        self._lock = threading.Lock()
        self._next = 0.0
        self._seen = self._look()
        self._take()

    def whole(self) -> str:
        """Return the whole page, with scripts and style."""
        self._renew(wait=True)
        return page_html(self._page, self._live)

    def changing(self) -> str:
        """Return the part of the page that changes."""
        self._renew(wait=False)
        return self._main

    def _take(self) -> None:
        """Make the report; its sentence is read first, so that one called final is whole."""
        live = live_sentence(self._experiment)
        self._page, self._live = self._make(), live
        self._main = main_html(self._page, self._live)

    def _look(self) -> list[tuple[float, bool]]:
        """Return what differs once there is news: the last changes, and which of them run."""
        confirmed = comparisons_of(self._experiment)
        return [
            (changed_last(place), is_running(place))
            for place in (self._experiment, *self._beside, *confirmed)
        ]

    def _renew(self, *, wait: bool) -> None:
        """Make the report again if there is news; without `wait`, not if another thread does."""
        if not self._lock.acquire(blocking=wait):
            return
        begun = time.monotonic()
        try:
            if begun < self._next:
                return
            seen = self._look()
            if seen != self._seen:
                self._take()
                self._seen = seen
            took = time.monotonic() - begun
            self._next = begun + max(RENEW_S, took / SHARE)
        finally:
            self._lock.release()


def live_sentence(experiment: Path) -> str:
    """Return the line of a followed page that tells whether it may still change."""
    found = status(experiment)
    what = "comparison" if found["kind"] == "comparison" else "sweep"
    if found["state"] == "running":
        return f"Live: the {what} runs, and this page follows it"
    if found["state"] == "finished":
        return f"The {what} has ended: this is its final report"
    return (
        f"The {what} was interrupted; after tfkd resume {found['name']} this page follows it again"
    )


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, address: tuple[str, int], followed: Followed) -> None:
        self.followed = followed
        super().__init__(address, _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing about a reader that has gone; anything else is our mistake."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """Answers a request; the base class reads it, within its own limits of size."""

    protocol_version = "HTTP/1.1"
    timeout = SILENT_S
    server: _Server

    def parse_request(self) -> bool:
        """Return whether to go on with a request; otherwise it is answered."""
        if not super().parse_request():
            return False
        host = self.headers.get("Host", "").rpartition(":")[0] or self.headers.get("Host", "")
        if self.command not in ("GET", "HEAD"):
            return self._refuse(405, "only GET and HEAD: this page changes nothing")
        if host.lower() not in HOSTS:
            return self._refuse(
                421, f"open it as http://{HERE_ALONE}: or http://localhost: and port"
            )
        return True

    def do_GET(self) -> None:
        path, followed = self.path.partition("?")[0], self.server.followed
        made = {"/": followed.whole, "/page": followed.changing}.get(path)
        if made is None:
            self._answer(404, "there is only the report here: /\n", "text/plain")
            return
        try:
            self._answer(200, made(), "text/html")
        except ConfigError as error:
            self._answer(503, f"{error}\n", "text/plain")

    do_HEAD = do_GET

    def _refuse(self, code: int, why: str) -> bool:
        self.close_connection = True  # what a refused request carries is not read
        self._answer(code, f"{why}\n", "text/plain")
        return False

    def _answer(self, code: int, text: str, kind: str) -> None:
        body = text.encode()
        tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
        if code == 200 and self.headers.get("If-None-Match") == tag:
            code, body = 304, b""
        self.send_response(code)
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.send_header("ETag", tag)
        if code == 405:
            self.send_header("Allow", "GET, HEAD")
        if code != 304:
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def version_string(self) -> str:
        return "tfkd"

    def log_message(self, *args: Any) -> None:
        """Write no line for each request."""


def server_of(followed: Followed, port: int) -> ThreadingHTTPServer:
    """Return a server of a report; its `serve_forever` answers until it is shut down.

    Args:
        port: 0 for any free one; `server_address` has it.
    """
    return _Server(("127.0.0.1", port), followed)
