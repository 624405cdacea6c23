"""Each rank in a network namespace of its own, behind a shaped veth pair and a common bridge.

    rank 0 [eth0] --tbf--> [p0]  bridge  [p1] --tbf--> [eth0] rank 1
                  <--tbf--                    <--tbf--

Both ends of each pair are shaped, so that a rank sends *and* receives at the link's rate at most:
an all-to-all of four ranks shares its receiver's link as it does on a switch. There is no added
delay. Bytes are those of the rank's interface, which is behind its shaper: whole frames with
headers. On the unshaped link frames are as large as the kernel likes (up to 64 KB), hence fewer
headers there.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from benchmarks.links.link import Link
from gradcodec.errors import ConfigError

_CLONE_NEWNET = 0x40000000
_NAMES = Path("/run/netns")
_QUEUE_BYTES = 8 << 20
"""Never full here: what a queue drops is a study of TCP, not of codecs."""


def tbf(link: Link) -> list[str]:
    """The token bucket of a link as arguments of ``tc``.

    The bucket is what passes at once after a pause, hence free: 1 ms of the rate, but no less than
    16 KB, below which the kernel cannot keep the rate. At 100 Mbit/s that is 1.3 ms.

    Raises:
        ConfigError: the link has no rate.
    """
    if link.bytes_per_second is None:
        raise ConfigError(f"the link {link.name!r} has no rate: there is nothing to shape")
    bucket = max(16_384, int(link.bytes_per_second / 1000))
    return ["tbf", "rate", f"{link.mbit}mbit", "burst", f"{bucket}b", "limit", f"{_QUEUE_BYTES}b"]


def sent_bytes(table: str, interface: str) -> int:
    """Bytes sent by an interface, from the text of ``/proc/net/dev``.

    Raises:
        ConfigError: the interface is not in it.
    """
    for line in table.splitlines():
        name, colon, counters = line.partition(":")
        if colon and name.strip() == interface:
            return int(counters.split()[8])
    raise ConfigError(f"no interface {interface!r} in /proc/net/dev")


@functools.cache
def unavailable() -> str | None:
    """Why namespaces cannot be had here, ``None`` if they can: by making a small shaped one."""
    missing = [name for name in ("ip", "tc") if shutil.which(name) is None]
    if missing:
        return f"no {' and '.join(missing)} (apt-get install iproute2)"
    try:
        with Namespaces(1) as trial:
            trial.shape(Link("trial", 100))
    except ConfigError as err:
        return str(err)
    return None


@dataclass(frozen=True)
class NamespacePlace:
    """A rank's namespace (see ``links.Place``)."""

    namespace: str
    interface: str = "eth0"
    master: str = "10.77.0.1"

    def enter(self) -> None:
        """Move this process's only thread there."""
        libc = ctypes.CDLL(None, use_errno=True)
        handle = os.open(_NAMES / self.namespace, os.O_RDONLY)
        try:
            if libc.setns(handle, _CLONE_NEWNET):
                number = ctypes.get_errno()
                raise OSError(number, f"setns {self.namespace}: {os.strerror(number)}")
        finally:
            os.close(handle)

    def pace(self, link: Link) -> None:
        """Nothing: ``tc`` does."""

    def sent(self) -> int:
        """The interface's own counter."""
        return sent_bytes(Path("/proc/self/net/dev").read_text(), self.interface)


class Namespaces:
    """``world`` namespaces and a bridge in one more (see ``links.Network``).

    Raises:
        ConfigError: the kernel or a lack of rights refuse it, on entering.
    """

    kind = "namespaces"
    _made = 0

    def __init__(self, world: int) -> None:
        Namespaces._made += 1
        stem = f"gradcodec-{os.getpid()}-{Namespaces._made}"
        self._switch = f"{stem}-switch"
        self._ranks = [f"{stem}-{rank}" for rank in range(world)]

    def __enter__(self) -> Self:
        try:
            self._make()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def _make(self) -> None:
        _ip("netns", "add", self._switch)
        _ip("-n", self._switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", self._switch, "link", "set", "bridge", "up")
        for rank, name in enumerate(self._ranks):
            port = f"p{rank}"
            _ip("netns", "add", name)
            pair = ("eth0", "type", "veth", "peer", "name", port, "netns", self._switch)
            _ip("-n", name, "link", "add", *pair)
            _ip("-n", self._switch, "link", "set", port, "master", "bridge", "up")
            _ip("-n", name, "address", "add", f"10.77.0.{rank + 1}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")
            _ip("-n", name, "link", "set", "lo", "up")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for name in (*self._ranks, self._switch):
            if (_NAMES / name).exists():
                _ip("netns", "delete", name)

    def place(self, rank: int) -> NamespacePlace:
        """The namespace of a rank."""
        return NamespacePlace(self._ranks[rank])

    def shape(self, link: Link) -> None:
        """Put the link's bucket at all ends, or take it away."""
        for rank, name in enumerate(self._ranks):
            for namespace, interface in ((name, "eth0"), (self._switch, f"p{rank}")):
                place = ("-n", namespace, "qdisc")
                if link.mbit is not None:
                    _tc(*place, "replace", "dev", interface, "root", *tbf(link))
                elif "tbf" in _tc(*place, "show", "dev", interface):
                    _tc(*place, "delete", "dev", interface, "root")


def _ip(*arguments: str) -> str:
    return _run("ip", *arguments)


def _tc(*arguments: str) -> str:
    return _run("tc", *arguments)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise ConfigError(f"{' '.join(command)}: {said[-1] if said else done.returncode}")
    return done.stdout
