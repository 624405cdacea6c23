"""Chunk-wise top-k sparsification: the class of SparseLoCo, DeMo and FLASC."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradcodec import layout, ops
from gradcodec.errors import ConfigError
from gradcodec.packers.blockquant import BlockQuantConfig, BlockQuantPacker
from gradcodec.packers.packer import Packer
from gradcodec.packers.positions import FORMS, Positions
from gradcodec.reference.top_rows import ROW
from gradcodec.settings import CodecConfig, check_one_of, check_whole

STRUCTURES = ("chunk", "rows")


@dataclass(frozen=True)
class TopKConfig(CodecConfig):
    """What is kept, and in how many bits.

    Attributes:
        k: how many of the largest magnitudes of every chunk are kept.
        chunk: number of values in a chunk, 2..65536.
        bits: per kept value: 1, 2, 4 or 8.
        structure: ``"chunk"`` finds the exact ``k``; ``"rows"`` keeps 1 or 2 of every 64
            neighbours, which takes no search, and counts magnitudes within ``2**-17`` as equal.
        index: positions in ``ceil(log2(chunk))`` bits each (``"packed"``); ``"elias-fano"`` coded,
            8 bits instead of 12 for 64 of 4096; or a ``"bitmap"``, the smallest where more than a
            quarter is kept.
    """

    kind: ClassVar[str] = "topk"
    LATER: ClassVar[tuple[str, ...]] = ("structure", "index")

    k: int = 64
    chunk: int = 4096
    bits: int = 8
    structure: str = "chunk"
    index: str = "packed"

    def __post_init__(self) -> None:
        check_whole(self.kind, "chunk", self.chunk, 2, 1 << 16)
        check_whole(self.kind, "k", self.k, 1, self.chunk)
        check_one_of(self.kind, "structure", self.structure, STRUCTURES)
        if self.structure == "rows" and (self.chunk != ROW or self.k > 2):
            raise ConfigError(
                f"topk: structure 'rows' keeps 1 or 2 of chunks of {ROW}, got k={self.k}, "
                f"chunk={self.chunk}"
            )
        check_one_of(self.kind, "index", self.index, FORMS)
        BlockQuantConfig(self.bits, self.value_block)

    @property
    def value_block(self) -> int:
        """Kept values that share a scale: those of a chunk, or with rows those of 4096 values."""
        per = ops.CHUNK // ROW if self.structure == "rows" else 1
        return max(8, self.k * per)


class TopKPacker(Packer):
    """Keep the ``k`` largest magnitudes of every chunk (SparseLoCo, arXiv 2508.15706).

        values --chunks--> positions, values --quantise, pack--> body = values | positions

    Kept values go through ``BlockQuantPacker``, positions through ``Positions``. Of equal
    magnitudes the first are kept. The last chunk may be short: it keeps ``min(k, its length)``.
    NaN and Inf raise ``NonFiniteError``.
    """

    kind = "topk"
    finite: ClassVar[bool] = True

    def __init__(self, config: TopKConfig) -> None:
        self.config = config
        self._values = BlockQuantPacker(BlockQuantConfig(config.bits, config.value_block))

    def _positions(self, numel: int) -> Positions:
        return Positions(self.config.index, numel, self.config.k, self.config.chunk)

    @property
    def grain(self) -> int:
        """A chunk, or as many chunks as share one scale of kept values."""
        c = self.config
        if c.structure == "rows":
            return ops.CHUNK
        return c.chunk * (c.value_block // math.gcd(c.value_block, c.k))

    def nbytes(self, numel: int) -> int:
        """Quantised values, then packed positions, each rounded up to a byte."""
        positions = self._positions(numel)
        return self._values.nbytes(positions.count) + positions.nbytes

    @torch.no_grad()
    def pack(self, x: Tensor, *, seed: int = 0, residual: Tensor | None = None) -> Tensor:
        """As ``Packer.pack``, without unpacking the body to update the residual."""
        layout.check_finite(x, "topk")
        x = x.detach().float()
        c, positions = self.config, self._positions(x.numel())
        if c.structure == "rows":
            kept, index = ops.top_rows(x, k=c.k, residual=residual)
            # The op gives the larger one first; in a body, positions increase within each chunk.
            index, order = index.sort(1)
            kept = kept.gather(1, order)
        else:
            kept, index = ops.topk_encode(x, k=c.k, chunk=c.chunk, residual=residual)
        # Padding is only in the last chunk and comes last there, so cutting the end removes it.
        kept = kept.reshape(-1)[: positions.count]
        at = (index.reshape(-1)[: positions.count].long() & 0xFFFF) + positions.starts(x.device)
        lost = None if residual is None else torch.zeros_like(kept)
        values = self._values.pack(kept, seed=seed, residual=lost)
        if residual is not None and lost is not None:
            residual[at] = lost.to(residual.dtype)
        return torch.cat([values, positions.write(at)])

    def _packed(self, x: Tensor, seed: int) -> Tensor:
        return self.pack(x, seed=seed)

    def _unpacked(self, body: Tensor, numel: int) -> Tensor:
        values, at = self._lists(body, numel)
        return torch.zeros(numel, device=body.device).index_copy_(0, at, values)

    def surely_finite(self, body: Tensor, numel: int) -> bool:
        """``unpack`` has checked the values that are kept."""
        return True

    @torch.no_grad()
    def mean(self, bodies: Tensor, numel: int, weights: Sequence[float] | None = None) -> Tensor:
        """As ``Packer.mean``, without a dense vector for each body.

        Values are multiplied by their weight, or by ``1/W``, before they are added, not after.
        """
        c, positions = self.config, self._positions(numel)
        if weights is not None:
            total = torch.zeros(numel, device=bodies.device)
            for body, weight in zip(bodies, weights, strict=True):
                values, at = self._lists(body, numel)
                total.index_add_(0, at, values, alpha=weight)
            return total
        chunks = -(-numel // c.chunk)
        kept = torch.zeros(len(bodies), chunks * c.k, device=bodies.device)
        # Where a short chunk keeps fewer than k, the other entries point behind its end; the op
        # drops them.
        index = torch.arange(c.k, device=bodies.device).repeat(len(bodies), chunks)
        starts = positions.starts(bodies.device)
        for w, body in enumerate(bodies):
            values, at = self._lists(body, numel)
            kept[w, : len(values)], index[w, : len(at)] = values, at - starts
        shape = (len(bodies), chunks, c.k)
        return ops.sparse_mean(
            kept.view(shape), index.to(torch.int16).view(shape), numel, chunk=c.chunk
        )

    def _lists(self, body: Tensor, numel: int) -> tuple[Tensor, Tensor]:
        """Kept values fp32 and their positions in the vector int64, ``[count]`` both."""
        self._check_length(body.numel(), numel)
        positions = self._positions(numel)
        cut = self._values.nbytes(positions.count)
        values = self._values.unpack(body[:cut], positions.count)
        layout.check_unpacked(values, "topk")
        return values, positions.read(body[cut:])
