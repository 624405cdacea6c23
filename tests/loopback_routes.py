"""The routes of the loopback Hub: what the client reads, then what it writes."""

from __future__ import annotations

import base64
import json
import re
from urllib.parse import parse_qs

from loopback_requests import Handler, Refusal, route
from loopback_storage import Blob, parts, rows_of, rows_with_folders

_REPO = r"(?P<repo>[^/]+(?:/[^/]+)?)"
_TYPED = r"/api/(?P<type>model|dataset|space)s/" + _REPO
_PLAIN = r"/(?:(?P<type>dataset|space)s/)?" + _REPO


class Routes(Handler):
    """Everything that the client asks of a Hub; a path with no method here is answered with 404."""

    # -- reading -------------------------------------------------------------------------------

    @route("GET HEAD", _PLAIN + r"/resolve/(?P<rev>[^/]+)/(?P<path>.+)")
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

    @route("GET HEAD", r"/cdn/(?P<sha>[0-9a-f]{64})/(?P<path>.+)")
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
        for part in parts(blob.data, start, stop):
            self.wfile.write(part)

    @route("GET", _TYPED + r"(?:/revision/(?P<rev>[^/]+))?")
    def info(self, type: str, repo: str, rev: str = "main") -> None:
        found = self.find(type, repo)
        oid, table = self.table(found, rev)
        siblings = [
            {"rfilename": e["path"], "size": e["size"], "blobId": e["oid"]} for e in rows_of(table)
        ]
        answer = {"id": repo, "sha": oid, "private": found.private, "gated": found.gated}
        answer |= {"tags": [], "downloads": 0, "likes": 0, "siblings": siblings, "disabled": False}
        self.answer(answer)

    @route("GET", _TYPED + r"/tree/(?P<rev>[^/]+)(?:/(?P<path>.+))?")
    def tree(self, type: str, repo: str, rev: str, path: str = "") -> None:
        _, table = self.table(self.find(type, repo), rev)
        under = path.strip("/") + "/" if path else ""
        rows = [r for r in rows_with_folders(table) if r["path"].startswith(under)]
        if under and not rows:
            raise Refusal(404, "EntryNotFound", f"{path} does not exist on {rev}")
        if self.query.get("recursive", ["false"])[0].lower() not in ("true", "1"):
            rows = [r for r in rows if "/" not in r["path"][len(under) :]]
        self.answer(rows)

    @route("POST", _TYPED + r"/paths-info/(?P<rev>[^/]+)")
    def paths_info(self, type: str, repo: str, rev: str) -> None:
        _, table = self.table(self.find(type, repo), rev)
        wanted = parse_qs(self.body.decode()).get("paths", [])
        self.answer([r for r in rows_with_folders(table) if r["path"] in wanted])

    @route("GET", _TYPED + r"/refs")
    def refs(self, type: str, repo: str) -> None:
        branches = self.find(type, repo).branches.items()
        rows = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": c} for n, c in branches]
        self.answer({"branches": rows, "tags": [], "converts": []})

    # -- writing -------------------------------------------------------------------------------

    @route("POST", "/api/repos/create")
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

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self) -> None:
        text = json.loads(self.body)["content"]
        bad = not re.match(r"---\n(.*\n)*?---\n", text)
        warnings = [{"message": "empty or missing yaml metadata in repo card"}] if bad else []
        self.answer({"errors": [], "warnings": warnings})

    @route("POST", _TYPED + r"/branch/(?P<branch>[^/]+)")
    def branch(self, type: str, repo: str, branch: str) -> None:
        self.must_write()
        found = self.find(type, repo)
        if branch in found.branches:
            raise Refusal(409, message="Reference already exists")
        start = json.loads(self.body or b"{}").get("startingPoint", "main")
        found.branches[branch] = self.table(found, start)[0]
        self.answer({})

    @route("POST", _TYPED + r"/preupload/(?P<rev>[^/]+)")
    def preupload(self, type: str, repo: str, rev: str) -> None:
        self.must_write()
        _, table = self.table(self.find(type, repo), rev)
        rows = []
        for path in (f["path"] for f in json.loads(self.body)["files"]):
            mode = "lfs" if self.hub.is_lfs(path) else "regular"
            row = {"path": path, "uploadMode": mode, "shouldIgnore": False}
            rows.append(row | ({"oid": table[path].etag} if path in table else {}))
        self.answer({"files": rows})

    @route("POST", _PLAIN + r"\.git/info/lfs/objects/batch")
    def lfs_batch(self, repo: str, type: str = "model") -> None:
        self.must_write()
        self.find(type, repo)
        rows = json.loads(self.body)["objects"]
        for row in (r for r in rows if r["oid"] not in self.hub.uploads):
            href = f"{self.hub.endpoint}/lfs/{row['oid']}"
            verify = {"href": href + "/verify"}
            row["actions"] = {"upload": {"href": href}, "verify": verify}
        self.answer({"transfer": "basic", "objects": rows})

    @route("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})")
    def lfs_put(self, oid: str) -> None:
        blob = Blob.of(self.body, lfs=True)
        if blob.sha256 != oid:
            raise Refusal(400, message=f"expected SHA-256 {oid}, got {blob.sha256}")
        self.hub.uploads[oid] = blob
        self.answer({})

    @route("POST", r"/lfs/(?P<oid>[0-9a-f]{64})/verify")
    def lfs_verify(self, oid: str) -> None:
        asked = json.loads(self.body)
        if oid not in self.hub.uploads or self.hub.uploads[oid].size != asked["size"]:
            raise Refusal(404, message="not uploaded")
        self.answer({})

    @route("POST", _TYPED + r"/commit/(?P<rev>[^/]+)")
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
            oid = self.hub.advance(found, rev, changes, message)
        url = f"{self.hub.endpoint}/{'' if type == 'model' else type + 's/'}{repo}/commit/{oid}"
        self.answer({"success": True, "commitOid": oid, "commitUrl": url})
