"""Repositories of the loopback Hub: branches, commits and the content of files. No network."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_BUFFER = 1 << 20


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
        for part in parts(data, 0, size):
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


class Storage:
    """All repositories by type and name, and LFS objects that were uploaded for a commit to come.

    Attributes:
        lfs: whether safetensors files are stored by LFS.
        lock: held while repositories are changed.
    """

    def __init__(self, *, lfs: bool = False) -> None:
        self.lfs = lfs
        self.repos: dict[tuple[str, str], Repo] = {}
        self.uploads: dict[str, Blob] = {}
        self.lock = threading.RLock()

    def create(
        self, repo_id: str, *, repo_type: str = "model", private: bool = False, gated: bool = False
    ) -> Repo:
        """A new repository with an empty first commit on ``main``."""
        with self.lock:
            repo = self.repos[repo_type, repo_id] = Repo(private, gated)
            self.advance(repo, "main", {}, f"{repo_type} {repo_id}")
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
            return self.advance(repo, revision, changes, "commit")

    def is_lfs(self, path: str) -> bool:
        """Whether a file of this name is stored by LFS."""
        return self.lfs and path.endswith(".safetensors")

    def advance(
        self, repo: Repo, branch: str, changes: Mapping[str, Blob | None], message: str
    ) -> str:
        """Commit to a branch, made from ``main`` if missing; the new commit's hash."""
        parent = repo.branches.get(branch) or repo.branches.get("main", "")
        table = {**repo.commits.get(parent, {}), **changes}
        kept = {name: blob for name, blob in sorted(table.items()) if blob is not None}
        rows = [f"{name} {blob.oid}" for name, blob in kept.items()]
        text = "\n".join([parent, message, str(len(repo.commits)), *rows])
        oid = hashlib.sha1(text.encode()).hexdigest()
        repo.commits[oid] = kept
        repo.branches[branch] = oid
        return oid


def parts(data: bytes | Path, start: int, stop: int) -> Iterator[bytes]:
    """Bytes ``start..stop`` in pieces."""
    if isinstance(data, bytes):
        yield data[start:stop]
        return
    with data.open("rb") as file:
        file.seek(start)
        while start < stop and (part := file.read(min(_BUFFER, stop - start))):
            start += len(part)
            yield part


def rows_of(table: Mapping[str, Blob]) -> list[dict[str, Any]]:
    """Files of a commit as the Hub lists them."""
    rows: list[dict[str, Any]] = []
    for path, blob in table.items():
        row: dict[str, Any] = {"type": "file", "path": path, "size": blob.size, "oid": blob.oid}
        if blob.lfs:
            row["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": 134}
        rows.append(row)
    return rows


def rows_with_folders(table: Mapping[str, Blob]) -> list[dict[str, Any]]:
    """The same after the folders that they are in."""
    folders = {str(p) for path in table for p in list(Path(path).parents)[:-1]}
    rows = [
        {"type": "directory", "path": f, "size": 0, "oid": hashlib.sha1(f.encode()).hexdigest()}
        for f in sorted(folders)
    ]
    return rows + rows_of(table)
