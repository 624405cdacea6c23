"""Links of a given rate between processes of one machine, and the bytes that cross them.

Two ways, under one interface, so that every scheme of a benchmark goes through the same:

- ``namespaces`` (``links.namespaces``): each rank in a network namespace of its own, the two ends
  of its veth pair shaped by ``tc``. The link is real to everything above it; needs root, or
  ``unshare -Urnm sh -c 'mount -t tmpfs none /run && exec python -m benchmarks.run ddp'``.
- ``pacing`` (``links.pacing``): loopback, with every socket of a rank paced by the kernel
  (``SO_MAX_PACING_RATE``). Needs nothing; there is no queue to share; rows say that it was this.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from gradcodec.errors import ConfigError


@dataclass(frozen=True)
class Link:
    """What a rank has to the others, in each direction.

    Attributes:
        name: in rows and on the command line.
        mbit: rate in Mbit/s; ``None`` for as fast as the machine copies.
    """

    name: str
    mbit: int | None = None

    def __post_init__(self) -> None:
        if self.mbit is not None and self.mbit < 1:
            raise ConfigError(f"expected a rate of at least 1 Mbit/s, got {self.mbit}")

    @property
    def bytes_per_second(self) -> float | None:
        """The rate in bytes, ``None`` if there is no limit."""
        return None if self.mbit is None else self.mbit * 1e6 / 8

    def seconds(self, nbytes: float) -> float:
        """The least time that ``nbytes`` in one direction take: the wire's share of a step."""
        rate = self.bytes_per_second
        return 0.0 if rate is None else nbytes / rate


LINKS = {
    link.name: link
    for link in (
        Link("unshaped"),
        Link("1gbit", 1000),
        Link("100mbit", 100),
        Link("10mbit", 10),
    )
}


class Place(Protocol):
    """Where a rank lives; sent to its process, which calls the methods."""

    @property
    def interface(self) -> str:
        """For ``GLOO_SOCKET_IFNAME``."""

    @property
    def master(self) -> str:
        """Address at which rank 0 is found."""

    def enter(self) -> None:
        """Called first in the rank's process, before it opens any socket."""

    def pace(self, link: Link) -> None:
        """Called by every rank after ``Network.shape`` and after a group was made."""

    def sent(self) -> int:
        """Bytes that this rank has put on its link so far, headers included where they are seen."""


class Network(Protocol):
    """The links of one run; a context manager that leaves nothing behind."""

    @property
    def kind(self) -> str:
        """``"namespaces"`` or ``"pacing"``; in every row."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def place(self, rank: int) -> Place:
        """Where that rank is to live."""

    def shape(self, link: Link) -> None:
        """From now on all links are this one."""


def network(world: int, kind: str | None = None) -> Network:
    """The links of ``world`` ranks: namespaces where they can be had, else pacing.

    Raises:
        ConfigError: the kind that was asked for is unknown, or cannot be had here.
    """
    from benchmarks.links import namespaces as link_namespaces
    from benchmarks.links import pacing as link_pacing

    if kind not in (None, "namespaces", "pacing"):
        raise ConfigError(f"expected links by 'namespaces' or 'pacing', got {kind!r}")
    reason = None if kind == "pacing" else link_namespaces.unavailable()
    if kind == "namespaces" and reason:
        raise ConfigError(f"network namespaces cannot be had here: {reason}")
    if kind == "pacing" or reason:
        return link_pacing.Paced(world)
    return link_namespaces.Namespaces(world)
