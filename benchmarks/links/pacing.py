"""Loopback with paced sockets: the fallback where network namespaces cannot be had.

The kernel spaces the packets of each TCP connection (``SO_MAX_PACING_RATE``). A rank's rate is
dealt out evenly to its neighbours, so with two ranks a link behaves as a real one; with more, a
rank that sends to one neighbour alone gets that share only, and one that receives from all is not
slowed. So numbers of more than two ranks are pessimistic for rings and rooted collectives. Bytes
are those that TCP handed to its connections, without headers.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from benchmarks.links.link import Link

SO_MAX_PACING_RATE = 47
_UNLIMITED = 2**64 - 1
_BYTES_SENT = 200  # offset of tcpi_bytes_sent (Linux 4.19) in struct tcp_info


def rate_per_neighbour(link: Link, world: int) -> int:
    """Bytes per second of one connection, so that all neighbours together have the link's rate."""
    rate = link.bytes_per_second
    return _UNLIMITED if rate is None else max(1, int(rate / max(1, world - 1)))


def pace(connection: socket.socket, rate: int) -> None:
    """Limit one connection; 8 bytes, since a rate may be above 4 GB/s."""
    connection.setsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, struct.pack("Q", rate))


def bytes_sent(connection: socket.socket) -> int:
    """What TCP has sent on a connection, retransmissions included, headers not."""
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    count: int = struct.unpack_from("=Q", info, _BYTES_SENT)[0]
    return count


@contextmanager
def connections() -> Iterator[list[socket.socket]]:
    """All connected TCP sockets of this process, as duplicates that are closed at the end."""
    found: list[socket.socket] = []
    try:
        for name in os.listdir("/proc/self/fd"):
            try:
                if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                    continue
                found.append(socket.socket(fileno=os.dup(int(name))))
            except OSError:  # closed since it was listed
                continue
        yield [s for s in found if _connected(s)]
    finally:
        for each in found:
            each.close()


def _connected(s: socket.socket) -> bool:
    if s.family not in (socket.AF_INET, socket.AF_INET6) or s.type != socket.SOCK_STREAM:
        return False
    try:
        s.getpeername()
    except OSError:
        return False
    return True


@dataclass
class PacedPlace:
    """A rank on loopback (see ``links.Place``)."""

    world: int
    interface: str = "lo"
    master: str = "127.0.0.1"
    _gone: dict[int, int] = field(default_factory=dict)

    def enter(self) -> None:
        """Nothing: everyone is there."""

    def pace(self, link: Link) -> None:
        """All connections that there are now."""
        rate = rate_per_neighbour(link, self.world)
        with connections() as found:
            for connection in found:
                pace(connection, rate)

    def sent(self) -> int:
        """Of all connections ever seen; a closed one keeps its last count."""
        with connections() as found:
            for connection in found:
                self._gone[os.fstat(connection.fileno()).st_ino] = bytes_sent(connection)
        return sum(self._gone.values())


class Paced:
    """Loopback for ``world`` ranks (see ``links.Network``)."""

    kind = "pacing"

    def __init__(self, world: int) -> None:
        self._world = world

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass

    def place(self, rank: int) -> PacedPlace:
        """The same for all."""
        return PacedPlace(self._world)

    def shape(self, link: Link) -> None:
        """Nothing: each rank paces its own sockets."""
