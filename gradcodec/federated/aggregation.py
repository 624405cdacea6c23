"""What a round's replies decode to and how they become one step: at the server, and in a relay."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gradcodec import layout
from gradcodec.codec import Codec
from gradcodec.errors import MalformedBodyError
from gradcodec.federated.envelope import Reply
from gradcodec.federated.relayed import Relayed
from gradcodec.federated.robust import RobustRound
from gradcodec.federated.rounds import HeldRound, Round, Values
from gradcodec.wire import Payload

if TYPE_CHECKING:
    from gradcodec.federated.config import ServerConfig


def value_of(codec: Codec, payload: Payload, config: ServerConfig, in_code: bool) -> Tensor:
    """The code or the update ``[n]`` of a reply, no longer than ``config.max_norm``.

    Raises:
        WireError: the payload is damaged or of another codec.
    """
    if in_code:
        value = codec.read_code(payload)
    else:
        value = layout.flatten(codec.decoder.decode(payload), codec.transform.table())
    most = config.max_norm
    if most is None:
        return value
    norm = float(torch.linalg.vector_norm(value.double()))  # squares of floats leave float32
    return value * (most / norm) if most < norm < math.inf else value


def check_values(value: Tensor, who: str) -> None:
    """Raise ``MalformedBodyError`` if a reply decodes to NaN or Inf."""
    bad = int((~torch.isfinite(value)).sum())
    if bad:
        raise MalformedBodyError(f"{who}: {bad} values are NaN or Inf")


def round_for(
    config: ServerConfig,
    numel: int,
    kept: Mapping[str, Tensor],
    read: Callable[[Reply], Values],
) -> Round:
    """An empty round of these settings; other arguments as of ``Round``."""
    if config.robust:
        return RobustRound(numel, kept, read, config.hold_bytes, config.cut)
    kind = HeldRound if config.relay else Round
    return kind(numel, kept, read, config.hold_bytes, config.aggregation == "sum", config.equal)


class Relay:
    """Reads relayed replies as the server read them, and takes its step from them.

    Both ends decode the same bytes and add up exactly (``ExactSum``), so they come to equal bits
    in whatever order the replies were received.

    Args:
        codec: of replies; bound.
        config: aggregation settings, the server's.
        in_code: whether codes are averaged, not decoded values.
    """

    def __init__(self, codec: Codec, config: ServerConfig, in_code: bool) -> None:
        self._codec, self._config, self._in_code = codec, replace(config, relay=False), in_code

    def step(self, came: Relayed) -> Tensor:
        """The server's learning rate times the aggregate of the replies, fp32 ``[n]``.

        Raises:
            WireError: a reply is damaged, of another codec, or not finite.
        """
        spec = self._codec.transform.table()
        numel = self._codec.code_numel(spec) if self._in_code else spec.numel
        # Nobody drops a reply here, so a sum holds none; a robust mean needs all of them.
        held = came.body_nbytes if self._config.robust else 0
        collected = round_for(replace(self._config, hold_bytes=held), numel, {}, self._values)
        for i, (weight, payload) in enumerate(came.payloads(self._codec.base)):
            reply = Reply(i, 0, weight, payload)
            collected.add(reply, len(payload.body), self._values(reply))
        return self._config.lr * collected.aggregate().update

    def _values(self, reply: Reply) -> Values:
        value = value_of(self._codec, reply.payload, self._config, self._in_code)
        check_values(value, "a relayed reply")
        return value, None
