"""Chunk-wise top-k sparsification: the class of SparseLoCo, DeMo and FLASC."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from gradcodec import layout, ops, wire
from gradcodec.codecs.base import Codec, register
from gradcodec.codecs.blockquant import BlockQuant, BlockQuantConfig
from gradcodec.codecs.settings import CodecConfig, check_one_of, check_whole
from gradcodec.codecs.topk_positions import FORMS, Positions
from gradcodec.errors import ConfigError, MalformedBodyError
from gradcodec.reference.top_rows import ROW

STRUCTURES = ("chunk", "rows")


@dataclass(frozen=True)
class TopKConfig(CodecConfig):
    """What is kept, and in how many bits.

    Attributes:
        k: largest magnitudes kept of every chunk.
        chunk: values of a chunk, 2..65536.
        bits: of a kept value: 1, 2, 4 or 8.
        structure: ``"chunk"`` finds the exact ``k``; ``"rows"`` keeps 1 or 2 of every 64
            neighbours, which takes no search, and counts magnitudes within ``2**-17`` as equal.
        index: positions in ``ceil(log2(chunk))`` bits each (``"packed"``) or ``"elias-fano"``
            coded: 8 bits instead of 12 for 64 of 4096.
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
        """Kept values that share a scale: a chunk's, and of rows those of 4096 values."""
        per = ops.CHUNK // ROW if self.structure == "rows" else 1
        return max(8, self.k * per)


@register
class TopK(Codec):
    """Keep the ``k`` largest magnitudes of every chunk (SparseLoCo, arXiv 2508.15706).

        values --chunks--> positions, values --quantise, pack--> body = values | positions

    Values go through ``BlockQuant`` with one block per chunk, positions through ``Positions``. Of
    equal magnitudes the first are kept. The last chunk may be short: it keeps ``min(k, its
    length)``. Payloads add, but sparsity does not: ``linear`` here means that a mean may be taken
    of decoded vectors.
    Deviation from the paper: error feedback is the caller's, or ``pack_flat``'s.
    """

    Config = TopKConfig
    config: TopKConfig
    finite: ClassVar[bool] = True

    def __init__(self, config: CodecConfig | None = None, **parts: Any) -> None:
        super().__init__(config or TopKConfig(), **parts)
        self._values = BlockQuant(BlockQuantConfig(self.config.bits, self.config.value_block))

    def _positions(self, numel: int) -> Positions:
        return Positions(self.config.index, numel, self.config.k, self.config.chunk)

    @property
    def grain(self) -> int:
        """A chunk, or as many as share the scale of a block of kept values."""
        c = self.config
        if c.structure == "rows":
            return ops.CHUNK
        return c.chunk * (c.value_block // math.gcd(c.value_block, c.k))

    def packed_nbytes(self, numel: int) -> int:
        """Quantised values, then packed positions, each rounded up to a byte."""
        positions = self._positions(numel)
        return self._values.packed_nbytes(positions.count) + positions.nbytes

    def _pack(self, z: Tensor, seed: int) -> bytes:
        return wire.raw_bytes(self._coded(z, seed, None))

    @torch.no_grad()
    def pack_flat(self, vector: Tensor, *, seed: int = 0, residual: Tensor | None = None) -> Tensor:
        """As ``Codec.pack_flat``; nothing is decoded to know what was lost."""
        return self._coded(vector, seed, residual)

    def _coded(self, z: Tensor, seed: int, residual: Tensor | None) -> Tensor:
        layout.check_finite(z, "topk")
        c, positions = self.config, self._positions(z.numel())
        if c.structure == "rows":
            kept, index = ops.top_rows(z.float(), k=c.k, residual=residual)
            # Largest first, which on the wire would be one more thing to be checked.
            index, order = index.sort(1)
            kept = kept.gather(1, order)
        else:
            kept, index = ops.topk_encode(z.float(), k=c.k, chunk=c.chunk, residual=residual)
        # Padding comes last in its chunk, hence last of all.
        kept = kept.reshape(-1)[: positions.count]
        at = (index.reshape(-1)[: positions.count].long() & 0xFFFF) + positions.starts(z.device)
        lost = None if residual is None else torch.zeros_like(kept)
        values = self._values.pack_flat(kept, seed=seed, residual=lost)
        if residual is not None and lost is not None:
            residual[at] = lost.to(residual.dtype)
        return torch.cat([values, positions.write(at)])

    def _unpack(self, body: bytes, numel: int) -> Tensor:
        return self.unpack_flat(wire.raw_tensor(body, torch.uint8), numel)

    @torch.no_grad()
    def unpack_flat(self, body: Tensor, numel: int) -> Tensor:
        """As ``Codec.unpack_flat``."""
        values, at = self._lists(body, numel)
        return torch.zeros(numel, device=body.device).index_copy_(0, at, values)

    @torch.no_grad()
    def mean_flat(self, bodies: Tensor, numel: int) -> Tensor:
        """As ``Codec.mean_flat``, without a dense vector for each.

        Values are multiplied by ``1/W`` before they are added, not after.
        """
        c, positions = self.config, self._positions(numel)
        chunks = -(-numel // c.chunk)
        kept = torch.zeros(len(bodies), chunks * c.k, device=bodies.device)
        # Where a short chunk keeps less than k, the rest lies behind its end and is dropped.
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
        expected = self.packed_nbytes(numel)
        if body.numel() != expected:
            raise MalformedBodyError(
                f"topk: expected {expected} bytes for {numel} values, got {body.numel()}"
            )
        positions = self._positions(numel)
        cut = self._values.packed_nbytes(positions.count)
        return self._values.unpack_flat(body[:cut], positions.count), positions.read(body[cut:])
