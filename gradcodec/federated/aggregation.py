"""What a round's replies decode to and how they become one step: at the server, and in a relay."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gradcodec import layout
from gradcodec.codec import Codec
from gradcodec.errors import CodecMismatchError, MalformedBodyError, NonFiniteError
from gradcodec.federated.envelope import Reply
from gradcodec.federated.exact import ExactSum
from gradcodec.federated.relayed import Relayed
from gradcodec.federated.robust import RobustRound, robust_update
from gradcodec.federated.rounds import HeldRound, Round, Values
from gradcodec.wire import Payload

if TYPE_CHECKING:
    from gradcodec.federated.config import ServerConfig


def decoded(codec: Codec, payload: Payload, in_code: bool) -> Tensor:
    """The code or the update of a payload as a vector ``[n]``; ``WireError`` if it is damaged."""
    if in_code:
        return codec.read_code(payload)
    return layout.flatten(codec.decoder.decode(payload), codec.transform.table())


def bounded(value: Tensor, most: float | None) -> Tensor:
    """The value, scaled down to a norm of ``most``."""
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


class Averager:
    """Takes the server's step from relayed replies.

    Sums are exact (``ExactSum``) and robust means sort, so the order of replies does not matter:
    ends that decode the same bytes to the same values take the same step, to the bit.

    Args:
        codec: of replies; bound.
        config: the server's settings.
        in_code: whether codes are averaged, not decoded values.
    """

    def __init__(self, codec: Codec, config: ServerConfig, in_code: bool) -> None:
        self._codec, self._config, self._in_code = codec, config, in_code
        spec = codec.transform.table()
        self._numel = codec.code_numel(spec) if in_code else spec.numel

    def step(self, came: Relayed) -> Tensor:
        """The server's learning rate times the aggregate of the replies, fp32 ``[n]``.

        Raises:
            CodecMismatchError: they belong to another codec, or the server has other settings.
            WireError: a reply is damaged or not finite, or their sum is not.
        """
        config = self._config
        if came.rule != config.rule:
            raise CodecMismatchError(
                "relayed replies of a server with other settings: mode, aggregation, trim, lr, "
                "max_norm and whether there is privacy must be equal at both ends"
            )
        try:
            if config.robust:
                reads = [partial(self._value, came, body) for _, body in self._replies(came)]
                update = robust_update(reads, self._numel, config.cut)
            else:
                total = ExactSum(self._numel)
                for weight, body in self._replies(came):
                    total.add(self._value(came, body), weight)
                update = total.total().float() if config.aggregation == "sum" else total.mean()
            step = config.lr * update
            layout.check_finite(step, "the step of relayed replies")
        except NonFiniteError as err:
            raise MalformedBodyError(str(err)) from err
        return step

    def _replies(self, came: Relayed) -> Iterator[tuple[int, bytes]]:
        for weight, body in came:
            if self._config.equal and weight != 1:
                raise MalformedBodyError(f"relay: expected a weight of 1, got {weight}")
            yield weight, bytes(body)

    def _value(self, came: Relayed, body: bytes) -> Tensor:
        payload = Payload(came.codec, came.digest, body, base=self._codec.base)
        value = decoded(self._codec, payload, self._in_code)
        check_values(value, "a relayed reply")
        return bounded(value, self._config.max_norm)
