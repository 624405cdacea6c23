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

import socket
import threading
from contextlib import suppress
from http.server import ThreadingHTTPServer

from loopback_routes import Routes
from loopback_storage import Storage

TOKEN = "hf_loopback"


class LoopbackHub(Storage):
    """The server. Switches to misbehave are plain attributes, read at every request.

    Attributes:
        tokens: those that open private and gated repositories and allow writing.
        status: answer every request with this status (401, 503, ...), when set.
        truncated: file paths of which ``resolve`` sends only the first half, as if whole.
        interrupted: file paths of which the next ``resolve`` breaks off half-way, once.
        requests: ``(method, path)`` of all requests so far.
    """

    def __init__(self, *, lfs: bool = False) -> None:
        super().__init__(lfs=lfs)
        self.tokens = {TOKEN}
        self.status: int | None = None
        self.truncated: set[str] = set()
        self.interrupted: set[str] = set()
        self.requests: list[tuple[str, str]] = []
        self.connections: set[socket.socket] = set()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Routes,), {"hub": self}))
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
