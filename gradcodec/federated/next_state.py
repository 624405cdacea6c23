"""From the replies of a round to the next global state, and the bytes that lead there."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

from gradcodec import layout
from gradcodec.errors import NonFiniteError, TrainingError
from gradcodec.federated.participants import ClientId, in_order
from gradcodec.federated.relayed import Relayed
from gradcodec.federated.replica import Replica
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
    blob, residual = _increment(server, wanted, without)
    layout.check_finite(momentum, "momentum")
    layout.check_finite(residual, "feedback")
    replica = server.replica.copy()
    replica.advance(blob)
    replica.kept = replica.kept if aggregate.kept is None else aggregate.kept
    for name, t in replica.moved().items():
        layout.check_finite(t, name)
    return Step(blob, momentum, residual, replica)


def _increment(
    server: Server, wanted: Tensor, without: frozenset[ClientId]
) -> tuple[bytes, Tensor]:
    """The bytes that lead on, and what their quantisation lost."""
    lineage = server.replica.lineage
    if server.config.relay:
        relayed = Relayed.of(lineage, server._replies.replies(without))
        return relayed.to_bytes(), server.residual
    payload, sent = _encode(server, wanted)
    keeps = server.config.feedback and not server.space.absolute
    residual = wanted - sent if keeps else server.residual
    return replace(payload, base=lineage).to_bytes(), residual


def _encode(server: Server, value: Tensor) -> tuple[Payload, Tensor]:
    """Payload of an aggregated vector, and the vector that receivers will decode from it."""
    if server.codes_cross:
        payload = server.downlink.write_code(value, seed=server.round)
        return payload, server.downlink.read_code(payload)
    update = layout.unflatten(value, server.replica.spec)
    payload = server.downlink.encoder.encode(update, seed=server.round)
    return payload, layout.flatten(server.downlink.decoder.decode(payload), server.replica.spec)
