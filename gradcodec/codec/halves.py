"""The two halves of a codec: Encoder and Decoder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gradcodec.codec.folder import load
from gradcodec.codec.pins import payload_of, table_of
from gradcodec.encodable import shown
from gradcodec.errors import CodecMismatchError, ConfigError
from gradcodec.types import Update, checked_table
from gradcodec.wire import Payload

if TYPE_CHECKING:
    from gradcodec.codec.codec import Codec


class Encoder:
    """The client's half of a codec."""

    def __init__(self, codec: Codec) -> None:
        self.codec = codec

    @torch.no_grad()
    def encode(self, update: Update, *, seed: int = 0) -> Payload:
        """Encode named tensors; ``update`` is not modified.

        Args:
            update: tensors by name; for a bound codec exactly those of its table.
            seed: for codecs that round stochastically; equal seeds give equal bytes.

        Raises:
            UpdateError: names, shapes or dtypes do not fit.
            NonFiniteError: NaN or Inf given to a lossy codec.
        """
        spec = checked_table(update, self.codec.spec)
        return payload_of(self.codec, self.codec.pipeline.encode(update, spec, seed), spec)

    @classmethod
    def from_pretrained(cls, name: str | Path, *, revision: str | None = None) -> Encoder:
        """Load the encoder half alone."""
        return cls(load(name, revision, "encoder"))


class Decoder:
    """The server's half of a codec."""

    def __init__(self, codec: Codec) -> None:
        self.codec = codec

    @torch.no_grad()
    def decode(self, payload: Payload) -> dict[str, Tensor]:
        """Restore an update: same names, shapes and dtypes, in the same order.

        Raises:
            CodecMismatchError: the payload is of another codec, other weights or another base.
            MalformedBodyError: the body cannot come from this codec's encoder.
        """
        spec = table_of(self.codec, payload)
        return self.codec.pipeline.decode(payload.body, spec)

    @torch.no_grad()
    def decode_mean(
        self, payloads: Sequence[Payload], weights: Sequence[float] | None = None
    ) -> dict[str, Tensor]:
        """Weighted mean of updates, ``sum_i w_i x_i / sum_i w_i``, added in payload order in fp32.

        Linear codecs average codes and decode once; others decode each payload.

        Raises:
            ConfigError: there is no payload, or not one positive finite weight for each.
        """
        payloads = list(payloads)
        shares = mean_shares(len(payloads), weights)
        codec = self.codec
        spec = table_of(codec, payloads[0])
        if any(table_of(codec, payload) != spec for payload in payloads[1:]):
            raise CodecMismatchError("the payloads of one mean must share their tensor table")
        return codec.pipeline.mean([payload.body for payload in payloads], shares, spec)

    @classmethod
    def from_pretrained(cls, name: str | Path, *, revision: str | None = None) -> Decoder:
        """Load the decoder half alone."""
        return cls(load(name, revision, "decoder"))


def mean_shares(count: int, weights: Sequence[float] | None) -> list[float]:
    """Weights normalised to sum to one; ``ConfigError`` unless they are ``count`` positive ones."""
    if count == 0:
        raise ConfigError("a mean needs at least one payload")
    given = [1.0] * count if weights is None else list(weights)
    try:
        given = [float(w) for w in given]
    except (TypeError, ValueError, OverflowError) as err:
        raise ConfigError(f"expected {count} positive finite weights, got {shown(given)}") from err
    if len(given) != count or not all(w > 0 and math.isfinite(w) for w in given):
        raise ConfigError(f"expected {count} positive finite weights, got {shown(given)}")
    total = sum(given)
    return [w / total for w in given]
