"""The live view in a browser: one page and one JSON, for this machine alone.

The server listens on the loopback, answers GET and nothing else, and has two fixed routes: no
request names a file. A page of somebody else's cannot read it: the name in the Host header has to
be this machine's, whatever a name server says of other names (DNS rebinding).
"""

import base64
import hashlib
import re
import threading
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from typing import Any

from sim.keeping.records import to_json
from sim.settings import SettingsError
from sim.watching.studies import Follower

HOST = "127.0.0.1"
PORT = 8420
"""Where it is served unless something else is there."""

_NAMES = (HOST, "localhost")
_FRESH_S = 0.5
"""What was looked at so lately is not looked at again, however many pages are open."""


class StudyServer(ThreadingHTTPServer):
    """Serves the live view of one study or run.

    Args:
        folder: of the study or run.
        port: on the loopback; 0: any that is free. None: `PORT` or, where that is taken, another.

    Raises:
        SettingsError: it is no such folder, or the port is taken.
    """

    daemon_threads = True
    # A second one on a port would take its requests.
    allow_reuse_port = False

    def __init__(self, folder: Path, port: int | None = None) -> None:
        self._follower = Follower(folder)
        self._lock = threading.Lock()
        self._state = b""
        self._looked_at = float("-inf")
        page = files("sim.watching").joinpath("page.html").read_text(encoding="utf-8")
        self.page = page.encode()
        self.policy = _policy(page)
        try:
            super().__init__((HOST, PORT if port is None else port), _Handler)
        except OSError as error:
            if port is not None:
                raise SettingsError(
                    f"PORT {port} cannot be listened on ({error.strerror or error}); leave it out "
                    "for one that is free"
                ) from None
            super().__init__((HOST, 0), _Handler)

    @property
    def url(self) -> str:
        """Where a browser on this machine finds it."""
        return f"http://{HOST}:{self.server_port}/"

    def state(self) -> bytes:
        """Return what there is, as JSON; for all pages together it is looked at once."""
        with self._lock:
            if time.monotonic() - self._looked_at >= _FRESH_S:
                try:
                    row = self._follower.look().to_row()
                except SettingsError as error:
                    # Such as a study's folder that was removed; the page says so.
                    row = {"status": "unreadable", "told": str(error), "arms": [], "events": []}
                self._state = to_json(row).encode()
                self._looked_at = time.monotonic()
            return self._state


def _policy(page: str) -> str:
    """Return the policy under which the page can run its own script and style, and no others."""
    own = {
        kind: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for kind in ("script", "style")
        for text in re.findall(rf"<{kind}>(.*?)</{kind}>", page, re.DOTALL)
    }
    return (
        f"default-src 'none'; script-src 'sha256-{own['script']}'; "
        f"style-src 'sha256-{own['style']}'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


class _Handler(BaseHTTPRequestHandler):
    """Answers GET of the two routes; everything else is refused."""

    server: StudyServer
    # Somebody who sends nothing does not keep a thread for long.
    timeout = 10
    server_version = "fedkd"
    sys_version = ""

    def do_GET(self) -> None:
        """Answer the page or its numbers."""
        if not self._is_for_us():
            self._answer(HTTPStatus.MISDIRECTED_REQUEST, b"this is served to 127.0.0.1 alone\n")
        elif self.path == "/":
            self._answer(HTTPStatus.OK, self.server.page, "text/html; charset=utf-8")
        elif self.path == "/state.json":
            self._answer(HTTPStatus.OK, self.server.state(), "application/json")
        else:
            self._answer(HTTPStatus.NOT_FOUND, b"there is / and /state.json\n")

    def _is_for_us(self) -> bool:
        name, _, port = self.headers.get("Host", "").partition(":")
        # Through a tunnel the port may be another.
        return name.lower() in _NAMES and (not port or port.isdecimal())

    def _answer(
        self, status: HTTPStatus, body: bytes, kind: str = "text/plain; charset=utf-8"
    ) -> None:
        self.send_response(status)
        for name, value in {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "Content-Security-Policy": self.server.policy,
            "Cache-Control": "no-store",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Write no log: it would say nothing but that a page looks every second."""
