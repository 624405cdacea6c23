"""Codes of an update below one bit a value, from rotated signs.

    Signs     all values alike:      u ------> signs of a few of u's rotated values
    Factors   LoRA's two apart:      u_A, u_B -> signs, more of one than of the other
    Bands     a subspace and the rest:
              u --U^T---> z ------> signs, about a bit a value  | body
              u - U z = w --------> signs of a few of w's        |
              decoded: U z~ + shrink (I - U U^T) w~, so no noise of w~ gets into the subspace

Clients train all parameters that are sent, so nothing is left out for good.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gradcodec import layout
from gradcodec.codecs import RotatedSign, Subspace
from gradcodec.packers.packer import Packer
from gradcodec.packers.rotsign import RotatedSignConfig
from gradcodec.types import UpdateSpec
from gradcodec.wire import raw_bytes, raw_tensor

BLOCK = 4096  # a scale of 16 bits for so many values


class Code(Protocol):
    """An update ``[n]`` as a body of fixed size."""

    @property
    def nbytes(self) -> int:
        """Size of a body."""

    def encode(self, update: Tensor, seed: int) -> bytes:
        """The body of an update."""

    def decode(self, body: bytes) -> Tensor:
        """The update of a body."""


@dataclass(frozen=True)
class Signs:
    """Rotated signs of all values.

    Attributes:
        numel: n.
        kept: of each 4096 rotated values, how many are sent.
        shrink: factor of what is decoded. 1 is unbiased; the least squared error of one message
            is at ``contraction(kept)``, of the mean of ``C`` at about ``1 / (1 + noise / C)`` with
            ``noise = pi/2 4096/kept - 1``.
        which: the ``"first"`` or the ``"largest"`` of them.
    """

    numel: int
    kept: int
    shrink: float = 1.0
    which: str = "first"

    @property
    def packer(self) -> Packer:
        """Draws, rotates, packs."""
        config = RotatedSignConfig(BLOCK, self.kept, self.which)
        return RotatedSign(config).packer

    @property
    def nbytes(self) -> int:
        """As ``Code.nbytes``."""
        return self.packer.nbytes(self.numel)

    def encode(self, update: Tensor, seed: int) -> bytes:
        """As ``Code.encode``."""
        return raw_bytes(self.packer.pack(update, seed=seed))

    def decode(self, body: bytes) -> Tensor:
        """As ``Code.decode``."""
        return self.shrink * self.packer.unpack(raw_tensor(body, torch.uint8), self.numel)


Share = tuple[int, float]


def contraction(kept: int, which: str = "first") -> float:
    """The factor that makes one message's squared error least: ``1 / (1 + its error)``.

    Of the first it is ``2 / pi`` times their share; of the largest, ``(2 phi(t))^2`` over it, with
    ``t`` the threshold above which they lie.
    """
    share = kept / BLOCK
    if which == "first":
        return 2 / math.pi * share
    normal = torch.distributions.Normal(0.0, 1.0)
    threshold = normal.icdf(torch.tensor(1 - share / 2))
    return float((2 * normal.log_prob(threshold).exp()) ** 2 / share)


class Factors:
    """LoRA's factors apart: ``B`` starts at zero and decides early what is learned, ``A`` does not.

    Args:
        spec: the tensor table.
        a, b: values of 4096 that are sent of each, and the factor of what is decoded; ``None`` for
            an A that is frozen.
    """

    def __init__(self, spec: UpdateSpec, a: Share | None, b: Share) -> None:
        ends = torch.tensor([0, *(t.numel for t in spec)]).cumsum(0).tolist()
        of_a = torch.zeros(spec.numel, dtype=torch.bool)
        for entry, first, end in zip(spec, ends, ends[1:], strict=False):
            of_a[first:end] = "lora_A" in entry.name
        self.numel = spec.numel
        self.frozen = a is None
        self.parts = [
            (at, Signs(len(at), *share))
            for at, share in ((of_a.nonzero().flatten(), a), ((~of_a).nonzero().flatten(), b))
            if share is not None
        ]

    @property
    def nbytes(self) -> int:
        """As ``Code.nbytes``."""
        return sum(part.nbytes for _, part in self.parts)

    def encode(self, update: Tensor, seed: int) -> bytes:
        """As ``Code.encode``."""
        return b"".join(p.encode(update[at], seed + i) for i, (at, p) in enumerate(self.parts))

    def decode(self, body: bytes) -> Tensor:
        """As ``Code.decode``."""
        out = torch.zeros(self.numel)
        first = 0
        for at, part in self.parts:
            out[at] = part.decode(body[first : first + part.nbytes])
            first += part.nbytes
        return out


@dataclass(frozen=True)
class Bands:
    """A fitted subspace with many bits a value, and everything outside it with few.

    Attributes:
        spec: the tensor table.
        subspace: its bases, bound.
        inside: packer of the code.
        outside: code of the rest.
    """

    spec: UpdateSpec
    subspace: Subspace
    inside: Packer
    outside: Signs

    @property
    def nbytes(self) -> int:
        """As ``Code.nbytes``."""
        return self.inside.nbytes(self.subspace.code_numel(self.spec)) + self.outside.nbytes

    def encode(self, update: Tensor, seed: int) -> bytes:
        """As ``Code.encode``."""
        z = self.subspace.to_code(layout.unflatten(update, self.spec))
        rest = self.outside.encode(update - self._of_code(z), seed + 1)
        return raw_bytes(self.inside.pack(z, seed=seed)) + rest

    def decode(self, body: bytes) -> Tensor:
        """As ``Code.decode``."""
        size = self.subspace.code_numel(self.spec)
        cut = self.inside.nbytes(size)
        z = self.inside.unpack(raw_tensor(body[:cut], torch.uint8), size)
        rest = self.outside.decode(body[cut:])
        again = self.subspace.to_code(layout.unflatten(rest, self.spec))
        return self._of_code(z) + rest - self._of_code(again)

    def _of_code(self, z: Tensor) -> Tensor:
        return layout.flatten(self.subspace.from_code(z), self.spec)
