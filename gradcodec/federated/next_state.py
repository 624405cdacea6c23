"""From the replies of a round to the next global state, and the bytes that lead there."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

from gradcodec import layout
from gradcodec.errors import NonFiniteError, TrainingError
from gradcodec.federated.aggregation import decoded
from gradcodec.federated.participants import ClientId, in_order
from gradcodec.federated.relayed import Relayed
from gradcodec.federated.replica import Replica
from gradcodec.federated.rounds import HeldRound
from gradcodec.wire import Payload

if TYPE_CHECKING:
    from gradcodec.federated.server import Server


@dataclass(frozen=True)
class Step:
    """What closing a round leads to."""

    increment: bytes
    momentum: Tensor
    residual: Tensor
    replica: Replica


def finite_step(server: Server) -> tuple[Step, tuple[ClientId, ...]]:
    """The step to a finite state that drops the fewest replies, and the clients it drops."""
    try:
        return _step(server, frozenset()), ()
    except NonFiniteError as err:
        reason = err
    loudest = server._replies.loudest
    found: tuple[Step, tuple[ClientId, ...]] | None = None
    # The more are dropped, the fewer loud ones remain: bisect for the smallest number.
    low, high = 1, min(len(loudest), len(server._replies) - 1)
    while low <= high:
        count = (low + high) // 2
        gone = frozenset(loudest[:count])
        try:
            step = _step(server, gone)
            found, high = (step, tuple(sorted(gone, key=in_order))), count - 1
        except NonFiniteError:
            low = count + 1
    if found is None:
        raise TrainingError(
            f"round {server.round}: the aggregated update diverged: {reason}"
        ) from reason
    return found


def _step(server: Server, without: frozenset[ClientId]) -> Step:
    """What the replies lead to; ``NonFiniteError`` if any of it would not be finite."""
    aggregate = server._replies.aggregate(without)
    momentum = server.config.momentum * server.momentum + aggregate.update
    wanted = server.config.lr * momentum + server.residual
    layout.check_finite(wanted, "aggregate")
    relay = server.config.relay
    blob, residual = _relayed(server, without) if relay else _coded(server, wanted)
    layout.check_finite(momentum, "momentum")
    layout.check_finite(residual, "feedback")
    replica = server.replica.copy()
    replica.advance(blob, wanted if relay else None)
    replica.kept = replica.kept if aggregate.kept is None else aggregate.kept
    for name, t in replica.moved().items():
        layout.check_finite(t, name)
    return Step(blob, momentum, residual, replica)


def _relayed(server: Server, without: frozenset[ClientId]) -> tuple[bytes, Tensor]:
    """The bytes that lead on, and what they have lost: nothing."""
    assert isinstance(server._replies, HeldRound)
    replies = server._replies.replies(without)
    relayed = Relayed.of(server.replica.lineage, server.config.rule, replies)
    return relayed.to_bytes(), server.residual


def _coded(server: Server, wanted: Tensor) -> tuple[bytes, Tensor]:
    """The bytes that lead on, and what they have lost."""
    payload, sent = _encode(server, wanted)
    keeps = server.config.feedback and not server.space.absolute
    residual = wanted - sent if keeps else server.residual
    return replace(payload, base=server.replica.lineage).to_bytes(), residual


def _encode(server: Server, value: Tensor) -> tuple[Payload, Tensor]:
    """Payload of an aggregated vector, and the vector that receivers will decode from it."""
    if server.codes_cross:
        payload = server.downlink.write_code(value, seed=server.round)
        return payload, decoded(server.downlink, payload, in_code=True)
    update = layout.unflatten(value, server.replica.spec)
    payload = server.downlink.encoder.encode(update, seed=server.round)
    return payload, decoded(server.downlink, payload, in_code=False)
