"""The replies of a round and their aggregate; memory does not grow with their number."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gradcodec.errors import ConfigError, UnexpectedReplyError
from gradcodec.federated.envelope import Reply
from gradcodec.federated.exact import ExactSum
from gradcodec.federated.participants import ClientId, in_order
from gradcodec.federated.tensors import KeptMean
from gradcodec.wire import Payload

Values = tuple[Tensor, Mapping[str, Tensor] | None]
"""A decoded reply: its update or code ``[n]``, and its kept tensors if they changed."""


@dataclass(frozen=True)
class Aggregate:
    """The aggregate of a round's replies.

    Attributes:
        update: their weighted mean, or their sum, fp32 ``[n]``.
        kept: the next values of kept tensors; ``None`` if no reply changed any.
    """

    update: Tensor
    kept: dict[str, Tensor] | None


@dataclass(frozen=True)
class _Held:
    reply: Reply
    nbytes: int
    loudness: float


class Round:
    """Collects replies: adds them to running sums, but holds the loudest as bytes.

    Sums are exact (``ExactSum``), so the order of arrival does not matter. The loudest replies
    (largest value times weight) are those that a server may have to drop, so as many of them are
    held as ``hold_bytes`` allows: in a small federation, all. Beyond that, the quietest are added
    to the sums.

    Args:
        numel: length ``n`` of an update.
        kept: kept tensors of the round (``gradcodec.federated.tensors``).
        read: decodes a reply.
        hold_bytes: most bytes of held replies; the loudest is held in any case.
        summed: whether updates are added up instead of averaged.
        equal: whether all replies have the same weight, instead of their number of examples.
    """

    def __init__(
        self,
        numel: int,
        kept: Mapping[str, Tensor],
        read: Callable[[Reply], Values],
        hold_bytes: int,
        summed: bool = False,
        equal: bool = False,
    ) -> None:
        self._updates, self._kept = ExactSum(numel), KeptMean(kept)
        self._read, self._hold_bytes, self._summed = read, hold_bytes, summed
        self._equal = equal or summed
        self._held: dict[ClientId, _Held] = {}
        self._held_nbytes = 0
        self._added: set[ClientId] = set()

    def __contains__(self, client: object) -> bool:
        return client in self._held or client in self._added

    def __len__(self) -> int:
        return len(self._held) + len(self._added)

    @property
    def clients(self) -> tuple[ClientId, ...]:
        """Who has replied, in order of ids."""
        return tuple(sorted({*self._held, *self._added}, key=in_order))

    @property
    def loudest(self) -> list[ClientId]:
        """Who is held, the loudest first."""
        return sorted(self._held, key=lambda c: (-self._held[c].loudness, in_order(c)))

    def add(self, reply: Reply, nbytes: int, values: Values) -> None:
        """Add a reply of ``nbytes`` that was decoded to finite ``values``."""
        update = values[0]
        peak = float(update.abs().amax()) if update.numel() else 0.0
        self._held[reply.client] = _Held(reply, nbytes, peak * self._weight(reply))
        self._held_nbytes += nbytes
        if self._held_nbytes <= self._hold_bytes:
            return
        for client in reversed(self.loudest[1:]):
            if self._held_nbytes <= self._hold_bytes:
                break
            one = self._held.pop(client)
            self._held_nbytes -= one.nbytes
            known = values if client == reply.client else self._read(one.reply)
            self._add(self._updates, self._kept, one.reply, known)
            self._added.add(client)

    def drop(self, client: ClientId) -> None:
        """Forget a reply.

        Raises:
            ConfigError: the client has not replied, or its reply is in the sums already.
        """
        if client in self._added:
            raise ConfigError(
                f"the reply of client {client!r} is in the running sum already: hold more replies "
                "(ServerConfig.hold_bytes), or give the round up (server.abandon_round())"
            )
        if client not in self._held:
            raise ConfigError(f"expected a client that has replied, of {self.clients}: {client!r}")
        self._held_nbytes -= self._held.pop(client).nbytes

    @torch.no_grad()
    def aggregate(self, without: frozenset[ClientId] = frozenset()) -> Aggregate:
        """The aggregate of all replies except those in ``without``, which must be held ones."""
        held, kept = ExactSum(self._updates.numel), self._kept.copy()
        for client, one in self._held.items():
            if client not in without:
                self._add(held, kept, one.reply, self._read(one.reply))
        added = self._updates
        total = added.total(held).float() if self._summed else added.mean(held)
        return Aggregate(total, kept.result() if kept.changed else None)

    def _add(self, updates: ExactSum, kept: KeptMean, reply: Reply, values: Values) -> None:
        updates.add(values[0], self._weight(reply))
        kept.add(values[1], reply.examples)

    def _weight(self, reply: Reply) -> int:
        return 1 if self._equal else reply.examples


class HeldRound(Round):
    """Holds all replies as bytes: to send them on, or because their aggregate needs all at once."""

    def add(self, reply: Reply, nbytes: int, values: Values) -> None:
        """Hold a reply.

        Raises:
            UnexpectedReplyError: it does not fit into ``hold_bytes`` beside the others.
        """
        size = self._held_nbytes + nbytes
        if size > self._hold_bytes:
            raise UnexpectedReplyError(
                f"client {reply.client!r}: a robust aggregate or a relay needs all replies at "
                f"once, and with this one they take {size} bytes, ServerConfig.hold_bytes is "
                f"{self._hold_bytes}"
            )
        super().add(reply, nbytes, values)

    def replies(self, without: frozenset[ClientId] = frozenset()) -> list[tuple[int, Payload]]:
        """Weight and payload of each reply except those in ``without``."""
        found = [one.reply for client, one in self._held.items() if client not in without]
        return [(self._weight(reply), reply.payload) for reply in found]
