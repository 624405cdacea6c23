"""Chunk-wise top-k sparsification: the class of SparseLoCo, DeMo and FLASC."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from gradcodec import layout, wire
from gradcodec.codecs.base import Codec, CodecConfig, register
from gradcodec.codecs.blockquant import SEGMENT, BlockQuant, BlockQuantConfig
from gradcodec.errors import ConfigError, MalformedBodyError
from gradcodec.reference.bitpack import pack_bits, packed_nbytes, unpack_bits


@dataclass(frozen=True)
class TopKConfig(CodecConfig):
    """``k`` largest magnitudes kept of every ``chunk`` values, sent with ``bits`` bits each."""

    kind: ClassVar[str] = "topk"
    k: int = 64
    chunk: int = 4096
    bits: int = 8

    def __post_init__(self) -> None:
        if not (isinstance(self.chunk, int) and 2 <= self.chunk <= 1 << 16):
            raise ConfigError(f"topk: expected a chunk of 2..{1 << 16}, got {self.chunk!r}")
        if not (isinstance(self.k, int) and 1 <= self.k <= self.chunk):
            raise ConfigError(f"topk: expected k of 1..chunk={self.chunk}, got {self.k!r}")
        BlockQuantConfig(self.bits, max(8, self.k))


@register
class TopK(Codec):
    """Keep the ``k`` largest magnitudes of every chunk (SparseLoCo, arXiv 2508.15706).

        values --chunks--> indices, values --quantise, pack--> body = values | packed indices

    Values go through ``BlockQuant`` with one block per chunk; indices take ``ceil(log2(chunk))``
    bits each. The last chunk may be short: it keeps ``min(k, its length)``. Payloads add, but
    sparsity does not: ``linear`` here means that a mean may be taken of decoded vectors.
    Deviation from the paper: no error feedback inside the codec.
    """

    Config = TopKConfig
    config: TopKConfig

    def __init__(self, config: CodecConfig | None = None, **parts: Any) -> None:
        super().__init__(config or TopKConfig(), **parts)
        self._values = BlockQuant(BlockQuantConfig(self.config.bits, max(8, self.config.k)))
        self._index_bits = (self.config.chunk - 1).bit_length()

    def _kept(self, numel: int) -> int:
        full, rest = divmod(numel, self.config.chunk)
        return full * self.config.k + min(self.config.k, rest)

    def packed_nbytes(self, numel: int) -> int:
        """Quantised values, then packed indices, each rounded up to a byte."""
        kept = self._kept(numel)
        return self._values.packed_nbytes(kept) + packed_nbytes(kept, self._index_bits)

    def _pack(self, z: Tensor, seed: int) -> bytes:
        layout.check_finite(z, "topk")
        kept, chunk = [], self.config.chunk
        full = z.numel() // chunk * chunk
        if full:
            rows = z[:full].view(-1, chunk)
            for some in torch.split(rows, max(1, SEGMENT // chunk)):
                largest = some.abs().topk(self.config.k, dim=1).indices
                kept.append(largest.sort(1).values.reshape(-1))
        tail = z[full:]
        if tail.numel():
            kept.append(tail.abs().topk(min(self.config.k, tail.numel())).indices.sort().values)
        index = torch.cat(kept) if kept else torch.empty(0, dtype=torch.int64, device=z.device)
        values = self._values._pack(z[index + self._starts(z.numel()).to(z.device)], seed)
        return values + wire.raw_bytes(pack_bits(index, self._index_bits))

    def _unpack(self, body: bytes, numel: int) -> Tensor:
        kept = self._kept(numel)
        cut = self._values.packed_nbytes(kept)
        values = self._values._unpack(body[:cut], kept)
        packed = wire.raw_tensor(body[cut:], torch.uint8)
        index = unpack_bits(packed, self._index_bits, kept).long() + self._starts(numel)
        if kept and (int(index.max()) >= numel or bool((index.diff() <= 0).any())):
            raise MalformedBodyError(f"topk: expected increasing indices below {numel}")
        return torch.zeros(numel).index_copy_(0, index, values)

    def _starts(self, numel: int) -> Tensor:
        """First position of each kept value's chunk ``[kept]``."""
        chunk_of = torch.arange(self._kept(numel)) // self.config.k
        return chunk_of * self.config.chunk
