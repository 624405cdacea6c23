"""HTTP of the loopback Hub: a request is read, authorised and given to its route."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

from loopback_storage import Blob, Repo

if TYPE_CHECKING:
    from loopback_hub import LoopbackHub


class Refusal(Exception):
    """An error answer of the Hub: status, X-Error-Code, message."""

    def __init__(self, status: int, code: str = "", message: str = "", **headers: str) -> None:
        super().__init__(message or code)
        self.status = status
        self.headers = {"X-Error-Message": message or code, **headers}
        if code:
            self.headers["X-Error-Code"] = code


Route = Callable[..., None]
ROUTES: list[tuple[str, re.Pattern[str], Route]] = []


def route(methods: str, pattern: str) -> Callable[[Route], Route]:
    """Enter a method of the handler for these HTTP methods and paths."""

    def enter(function: Route) -> Route:
        for method in methods.split():
            ROUTES.append((method, re.compile(pattern), function))
        return function

    return enter


class Handler(BaseHTTPRequestHandler):
    """Finds the route of a request; what routes ask of it and answer with."""

    protocol_version = "HTTP/1.1"
    hub: LoopbackHub

    def setup(self) -> None:
        super().setup()
        self.hub.connections.add(self.connection)

    def finish(self) -> None:
        self.hub.connections.discard(self.connection)
        super().finish()

    def log_message(self, format: str, *args: Any) -> None:
        """Tests do not log."""

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.body = self._read_body()
        self.hub.requests.append((self.command, url.path))
        try:
            if self.hub.status is not None:
                raise Refusal(self.hub.status, message="switched to fail")
            self.writer = self._check_token()
            for method, pattern, function in ROUTES:
                match = pattern.fullmatch(url.path)
                if method == self.command and match:
                    with self.hub.lock:
                        found = {k: unquote(v) for k, v in match.groupdict().items() if v}
                    return function(self, **found)
            raise Refusal(404, message=f"the loopback Hub has no route {self.command} {url.path}")
        except Refusal as refusal:
            error = {"error": str(refusal)}
            self.answer(error, refusal.status, **refusal.headers)

    do_HEAD = do_POST = do_PUT = do_GET

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _check_token(self) -> bool:
        given = self.headers.get("Authorization")
        if given is None:
            return False
        if given.removeprefix("Bearer ") not in self.hub.tokens:
            raise Refusal(401, message="Invalid credentials in Authorization header")
        return True

    def answer(self, value: Any, status: int = 200, **headers: str) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def find(self, type: str, repo: str) -> Repo:
        found = self.hub.repos.get((type, repo))
        if found is None or (found.private and not self.writer):
            raise Refusal(401 if not self.writer else 404, "RepoNotFound", "Repository not found")
        return found

    def table(self, repo: Repo, rev: str) -> tuple[str, dict[str, Blob]]:
        oid = repo.branches.get(rev, rev)
        if oid not in repo.commits:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {rev}")
        return oid, repo.commits[oid]

    def must_write(self) -> None:
        if not self.writer:
            raise Refusal(401, message="Invalid username or password.")
