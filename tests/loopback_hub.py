"""A Hugging Face Hub on 127.0.0.1, for tests: the routes that the real client calls, and no mock.

    with LoopbackHub() as server:
        first = server.commit("user/name", {"config.json": b"{}", "model.safetensors": path})
        ...                       # HF_ENDPOINT=server.endpoint, HF_HOME=somewhere temporary

Reading needs no token unless the repository is private or gated; writing needs one of ``tokens``.
Models and datasets, any files, branches, pinned commits, Range requests, commits from the client.

Set ``HF_ENDPOINT`` in the environment of a subprocess: huggingface_hub reads it when imported.
Uploads are answered with ``regular`` mode. With ``lfs=True`` safetensors files go through the real
LFS batch protocol; the client must then run with ``HF_HUB_DISABLE_XET=1``, since a client that has
hf_xet prefers the Xet service, which is not spoken here.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_loopback"
_BUFFER = 1 << 20
_REPO = r"(?P<repo>[^/]+(?:/[^/]+)?)"
_TYPED = r"/api/(?P<type>model|dataset|space)s/" + _REPO
_PLAIN = r"/(?:(?P<type>dataset|space)s/)?" + _REPO


@dataclass(frozen=True)
class Blob:
    """Content of one file, in memory or on disk; ``oid`` is what the Hub calls its blob id."""

    data: bytes | Path
    size: int
    oid: str
    sha256: str
    lfs: bool = False

    @classmethod
    def of(cls, data: bytes | Path, *, lfs: bool = False) -> Blob:
        """Hash some content as git and as LFS do."""
        size = len(data) if isinstance(data, bytes) else data.stat().st_size
        git, sha = hashlib.sha1(f"blob {size}\0".encode()), hashlib.sha256()
        for part in _parts(data, 0, size):
            git.update(part)
            sha.update(part)
        return cls(data, size, git.hexdigest(), sha.hexdigest(), lfs)

    @property
    def etag(self) -> str:
        """What the client names the cached blob by."""
        return self.sha256 if self.lfs else self.oid


@dataclass
class Repo:
    """Branches point to commits; a commit is a whole table path -> Blob."""

    private: bool = False
    gated: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)


class Refusal(Exception):
    """An error answer of the Hub: status, X-Error-Code, message."""

    def __init__(self, status: int, code: str = "", message: str = "", **headers: str) -> None:
        super().__init__(message or code)
        self.status = status
        self.headers = {"X-Error-Message": message or code, **headers}
        if code:
            self.headers["X-Error-Code"] = code


class LoopbackHub:
    """The server. Switches to misbehave are plain attributes, read at every request.

    Attributes:
        tokens: those that open private and gated repositories and allow writing.
        status: answer every request with this status (401, 503, ...), when set.
        truncated: file paths of which ``resolve`` sends only the first half, as if whole.
        interrupted: file paths of which the next ``resolve`` breaks off half-way, once.
        requests: ``(method, path)`` of all requests so far.
    """

    def __init__(self, *, lfs: bool = False) -> None:
        self.lfs = lfs
        self.tokens = {TOKEN}
        self.status: int | None = None
        self.truncated: set[str] = set()
        self.interrupted: set[str] = set()
        self.requests: list[tuple[str, str]] = []
        self.repos: dict[tuple[str, str], Repo] = {}
        self.uploads: dict[str, Blob] = {}
        self.connections: set[socket.socket] = set()
        self.lock = threading.RLock()
        self._http = ThreadingHTTPServer(
            ("127.0.0.1", 0), type("Bound", (_Handler,), {"hub": self})
        )
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)

    @property
    def endpoint(self) -> str:
        """What ``HF_ENDPOINT`` is to be."""
        return f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> LoopbackHub:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Go down: connections are refused from now on. Also called at the end of ``with``."""
        if self._thread.is_alive():
            self._http.shutdown()
            self._http.server_close()
            self._thread.join()
        for connection in list(self.connections):
            with suppress(OSError):  # it may just have closed by itself
                connection.shutdown(socket.SHUT_RDWR)

    def create(
        self, repo_id: str, *, repo_type: str = "model", private: bool = False, gated: bool = False
    ) -> Repo:
        """A new repository with an empty first commit on ``main``."""
        with self.lock:
            repo = self.repos[repo_type, repo_id] = Repo(private, gated)
            self._advance(repo, "main", {}, f"{repo_type} {repo_id}")
        return repo

    def commit(
        self,
        repo_id: str,
        files: Mapping[str, bytes | Path | None] | Path,
        *,
        revision: str = "main",
        repo_type: str = "model",
    ) -> str:
        """Add, replace or (``None``) delete files on a branch, both created if missing.

        Args:
            repo_id: ``user/name``.
            files: content by path in the repository, or a local folder to take whole.
            revision: the branch.
            repo_type: ``"model"`` or ``"dataset"``.

        Returns:
            The new commit's hash.
        """
        if isinstance(files, Path):
            files = {p.relative_to(files).as_posix(): p for p in files.rglob("*") if p.is_file()}
        changes = {
            name: None if data is None else Blob.of(data, lfs=self.is_lfs(name))
            for name, data in files.items()
        }
        with self.lock:
            key = (repo_type, repo_id)
            repo = (
                self.repos[key] if key in self.repos else self.create(repo_id, repo_type=repo_type)
            )
            return self._advance(repo, revision, changes, "commit")

    def is_lfs(self, path: str) -> bool:
        """Whether a file of this name is stored by LFS."""
        return self.lfs and path.endswith(".safetensors")

    def _advance(
        self, repo: Repo, branch: str, changes: Mapping[str, Blob | None], message: str
    ) -> str:
        parent = repo.branches.get(branch) or repo.branches.get("main", "")
        table = {**repo.commits.get(parent, {}), **changes}
        kept = {name: blob for name, blob in sorted(table.items()) if blob is not None}
        rows = [f"{name} {blob.oid}" for name, blob in kept.items()]
        text = "\n".join([parent, message, str(len(repo.commits)), *rows])
        oid = hashlib.sha1(text.encode()).hexdigest()
        repo.commits[oid] = kept
        repo.branches[branch] = oid
        return oid


def _parts(data: bytes | Path, start: int, stop: int) -> Any:
    """Bytes ``start..stop`` in pieces."""
    if isinstance(data, bytes):
        yield data[start:stop]
        return
    with data.open("rb") as file:
        file.seek(start)
        while start < stop and (part := file.read(min(_BUFFER, stop - start))):
            start += len(part)
            yield part


Route = Callable[..., None]
_ROUTES: list[tuple[str, re.Pattern[str], Route]] = []


def _route(methods: str, pattern: str) -> Callable[[Route], Route]:
    def enter(function: Route) -> Route:
        for method in methods.split():
            _ROUTES.append((method, re.compile(pattern), function))
        return function

    return enter


class _Handler(BaseHTTPRequestHandler):
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
            for method, pattern, function in _ROUTES:
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

    # -- reading -------------------------------------------------------------------------------

    @_route("GET HEAD", _PLAIN + r"/resolve/(?P<rev>[^/]+)/(?P<path>.+)")
    def resolve(self, repo: str, rev: str, path: str, type: str = "model") -> None:
        found = self.find(type, repo)
        if found.gated and not self.writer:
            raise Refusal(401, "GatedRepo", f"Access to {type} {repo} is restricted")
        oid, table = self.table(found, rev)
        if path not in table:
            headers = {"X-Repo-Commit": oid}
            raise Refusal(404, "EntryNotFound", "Entry not found", **headers)
        blob = table[path]
        if not blob.lfs:
            return self.send_blob(blob, path, {"X-Repo-Commit": oid})
        linked = {"X-Linked-Etag": f'"{blob.etag}"', "X-Linked-Size": str(blob.size)}
        # Another host name, as the real one has: the client must not look for Hub headers there.
        host = self.hub.endpoint.replace("127.0.0.1", "localhost")
        linked["Location"] = f"{host}/cdn/{blob.sha256}/{path}"
        self.answer({}, 302, **{"X-Repo-Commit": oid}, **linked)

    @_route("GET HEAD", r"/cdn/(?P<sha>[0-9a-f]{64})/(?P<path>.+)")
    def cdn(self, sha: str, path: str) -> None:
        repos = list(self.hub.repos.values())
        blobs = (b for r in repos for t in r.commits.values() for b in t.values())
        self.send_blob(next(b for b in blobs if b.sha256 == sha), path, {})

    def send_blob(self, blob: Blob, path: str, headers: dict[str, str]) -> None:
        start, stop, status = 0, blob.size, 200
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if match:
            start, stop = int(match[1]), min(int(match[2] or blob.size - 1) + 1, blob.size)
            if start >= stop:
                raise Refusal(416, message=f"{path} has {blob.size} bytes")
            status, headers["Content-Range"] = 206, f"bytes {start}-{stop - 1}/{blob.size}"
        if self.command == "GET" and path in self.hub.truncated:
            stop = (start + stop) // 2
        self.send_response(status)
        headers |= {"ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes"}
        for name, text in {**headers, "Content-Length": str(stop - start)}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command == "HEAD":
            return
        if path in self.hub.interrupted:
            self.hub.interrupted.discard(path)
            self.close_connection = True
            stop = (start + stop) // 2
        for part in _parts(blob.data, start, stop):
            self.wfile.write(part)

    @_route("GET", _TYPED + r"(?:/revision/(?P<rev>[^/]+))?")
    def info(self, type: str, repo: str, rev: str = "main") -> None:
        found = self.find(type, repo)
        oid, table = self.table(found, rev)
        siblings = [
            {"rfilename": e["path"], "size": e["size"], "blobId": e["oid"]} for e in _rows(table)
        ]
        answer = {"id": repo, "sha": oid, "private": found.private, "gated": found.gated}
        answer |= {"tags": [], "downloads": 0, "likes": 0, "siblings": siblings, "disabled": False}
        self.answer(answer)

    @_route("GET", _TYPED + r"/tree/(?P<rev>[^/]+)(?:/(?P<path>.+))?")
    def tree(self, type: str, repo: str, rev: str, path: str = "") -> None:
        _, table = self.table(self.find(type, repo), rev)
        under = path.strip("/") + "/" if path else ""
        rows = [r for r in _with_folders(table) if r["path"].startswith(under)]
        if under and not rows:
            raise Refusal(404, "EntryNotFound", f"{path} does not exist on {rev}")
        if self.query.get("recursive", ["false"])[0].lower() not in ("true", "1"):
            rows = [r for r in rows if "/" not in r["path"][len(under) :]]
        self.answer(rows)

    @_route("POST", _TYPED + r"/paths-info/(?P<rev>[^/]+)")
    def paths_info(self, type: str, repo: str, rev: str) -> None:
        _, table = self.table(self.find(type, repo), rev)
        wanted = parse_qs(self.body.decode()).get("paths", [])
        self.answer([r for r in _with_folders(table) if r["path"] in wanted])

    @_route("GET", _TYPED + r"/refs")
    def refs(self, type: str, repo: str) -> None:
        branches = self.find(type, repo).branches.items()
        rows = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": c} for n, c in branches]
        self.answer({"branches": rows, "tags": [], "converts": []})

    # -- writing -------------------------------------------------------------------------------

    @_route("POST", "/api/repos/create")
    def create(self) -> None:
        self.must_write()
        asked = json.loads(self.body)
        type, repo = asked.get("type") or "model", asked["name"]
        if asked.get("organization"):
            repo = f"{asked['organization']}/{repo}"
        url = f"{self.hub.endpoint}/{'' if type == 'model' else type + 's/'}{repo}"
        if (type, repo) in self.hub.repos:
            return self.answer({"error": "You already created this repo", "url": url}, 409)
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.create(repo, repo_type=type, private=private)
        self.answer({"url": url, "name": repo})

    @_route("POST", "/api/validate-yaml")
    def validate_yaml(self) -> None:
        text = json.loads(self.body)["content"]
        bad = not re.match(r"---\n(.*\n)*?---\n", text)
        warnings = [{"message": "empty or missing yaml metadata in repo card"}] if bad else []
        self.answer({"errors": [], "warnings": warnings})

    @_route("POST", _TYPED + r"/branch/(?P<branch>[^/]+)")
    def branch(self, type: str, repo: str, branch: str) -> None:
        self.must_write()
        found = self.find(type, repo)
        if branch in found.branches:
            raise Refusal(409, message="Reference already exists")
        start = json.loads(self.body or b"{}").get("startingPoint", "main")
        found.branches[branch] = self.table(found, start)[0]
        self.answer({})

    @_route("POST", _TYPED + r"/preupload/(?P<rev>[^/]+)")
    def preupload(self, type: str, repo: str, rev: str) -> None:
        self.must_write()
        _, table = self.table(self.find(type, repo), rev)
        rows = []
        for path in (f["path"] for f in json.loads(self.body)["files"]):
            mode = "lfs" if self.hub.is_lfs(path) else "regular"
            row = {"path": path, "uploadMode": mode, "shouldIgnore": False}
            rows.append(row | ({"oid": table[path].etag} if path in table else {}))
        self.answer({"files": rows})

    @_route("POST", _PLAIN + r"\.git/info/lfs/objects/batch")
    def lfs_batch(self, repo: str, type: str = "model") -> None:
        self.must_write()
        self.find(type, repo)
        rows = json.loads(self.body)["objects"]
        for row in (r for r in rows if r["oid"] not in self.hub.uploads):
            href = f"{self.hub.endpoint}/lfs/{row['oid']}"
            verify = {"href": href + "/verify"}
            row["actions"] = {"upload": {"href": href}, "verify": verify}
        self.answer({"transfer": "basic", "objects": rows})

    @_route("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})")
    def lfs_put(self, oid: str) -> None:
        blob = Blob.of(self.body, lfs=True)
        if blob.sha256 != oid:
            raise Refusal(400, message=f"expected SHA-256 {oid}, got {blob.sha256}")
        self.hub.uploads[oid] = blob
        self.answer({})

    @_route("POST", r"/lfs/(?P<oid>[0-9a-f]{64})/verify")
    def lfs_verify(self, oid: str) -> None:
        asked = json.loads(self.body)
        if oid not in self.hub.uploads or self.hub.uploads[oid].size != asked["size"]:
            raise Refusal(404, message="not uploaded")
        self.answer({})

    @_route("POST", _TYPED + r"/commit/(?P<rev>[^/]+)")
    def commit(self, type: str, repo: str, rev: str) -> None:
        self.must_write()
        with self.hub.lock:
            found = self.find(type, repo)
            tip, _ = self.table(found, rev)
            changes: dict[str, Blob | None] = {}
            message = ""
            for line in self.body.splitlines():
                item = json.loads(line)
                key, value = item["key"], item["value"]
                if key == "header":
                    message = value["summary"]
                    if value.get("parentCommit", tip) != tip:
                        raise Refusal(412, message="A commit has happened since")
                elif key == "file":
                    changes[value["path"]] = Blob.of(base64.b64decode(value["content"]))
                elif key == "lfsFile":
                    if value["oid"] not in self.hub.uploads:
                        raise Refusal(400, message=f"LFS object {value['oid']} was not uploaded")
                    changes[value["path"]] = self.hub.uploads[value["oid"]]
                elif key == "deletedFile":
                    changes[value["path"]] = None
                else:
                    raise Refusal(400, message=f"the loopback Hub does not do {key}")
            oid = self.hub._advance(found, rev, changes, message)
        url = f"{self.hub.endpoint}/{'' if type == 'model' else type + 's/'}{repo}/commit/{oid}"
        self.answer({"success": True, "commitOid": oid, "commitUrl": url})


def _rows(table: Mapping[str, Blob]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for path, blob in table.items():
        row: dict[str, Any] = {"type": "file", "path": path, "size": blob.size, "oid": blob.oid}
        if blob.lfs:
            row["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": 134}
        rows.append(row)
    return rows


def _with_folders(table: Mapping[str, Blob]) -> list[dict[str, Any]]:
    folders = {str(p) for path in table for p in list(Path(path).parents)[:-1]}
    rows = [
        {"type": "directory", "path": f, "size": 0, "oid": hashlib.sha1(f.encode()).hexdigest()}
        for f in sorted(folders)
    ]
    return rows + _rows(table)
