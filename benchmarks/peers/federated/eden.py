"""EDEN at 1 to 8 bits, by OpenFL's own code."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.federated.methods import State
from benchmarks.peers.federated.base import Peer, flat
from benchmarks.peers.federated.body import Reader, value_bytes
from benchmarks.peers.federated.downlink import Increments
from benchmarks.peers.optional import openfl_eden
from gradcodec.errors import ConfigError

_SEED = struct.Struct("<H")
_SERVER = 0xFFFFFFFF


class EDEN(Peer):
    """EDEN (Vargaftik et al., arXiv 2108.08842) as OpenFL 1.9 ships it.

        update --random rotation--> nearly normal values --Lloyd-Max levels--> bits, and a scale

        body = seed u16 | per piece: fp32 scales | bits

    ``Eden.compress`` and ``Eden.decompress`` are called as they are; only their metadata is
    serialised here. It holds the seed of the rotation, and scale and padded length of each slice
    that they cut a vector into. Lengths follow from the tensor table, so seed and scales are sent.

    Choices and deviations:

    - OpenFL compresses tensor by tensor and draws a seed for each. The default here is one vector
      (``per_tensor=False``): 2 scales instead of 48 in a small adapter. In this serialisation that
      is 1.5 % at one bit; in OpenFL's own, whose metadata is a protobuf map of floats and a shape,
      it is more. The relative error is EDEN's either way; per tensor, each has it by itself.
    - OpenFL sends pieces of at most 100 values raw (``threshold``).
    - The seed is derived from client and round instead of drawn, so that runs can be repeated;
      rotations of different clients differ, as the method's independence needs.
    - Slices that are all zero get the scale 0 (OpenFL's code fails on them with numpy 2).
    - The paper compresses the uplink. ``downlink="eden"`` codes the aggregated difference too, as
      OpenFL's aggregator does, without a residual. EDEN is unbiased: no error feedback.

    Args:
        initial: the state that every participant derives from a seed.
        bits: per value, 1 to 8.
        per_tensor: one rotation and scale per tensor, as OpenFL does.
        downlink: ``"fp32"`` or ``"eden"``.
        threshold: pieces of at most so many values are sent in fp32.
        lr: server step on the mean update.

    Raises:
        ImportError: OpenFL is not installed.
    """

    def __init__(
        self,
        initial: State,
        *,
        bits: int = 2,
        per_tensor: bool = False,
        downlink: str = "fp32",
        threshold: int = 100,
        lr: float = 1.0,
    ) -> None:
        if bits not in range(1, 9) or downlink not in ("fp32", "eden") or threshold < 16:
            raise ConfigError(
                f"expected bits of 1..8, 'fp32' or 'eden', threshold >= 16, got {bits}, "
                f"{downlink!r}, {threshold}"
            )
        self._eden: Any = openfl_eden()(nbits=bits)
        self.bits = bits
        start = flat(initial)
        sizes = [t.numel() for t in initial.values()] if per_tensor else [start.numel()]
        self.pieces = [_Piece.of(n, self._eden, threshold) for n in sizes]
        increments = Increments(
            start, lambda v: self._pack(v, self._seed(_SERVER)), self.decode, feedback=False
        )
        super().__init__(initial, increments if downlink == "eden" else None, lr=lr)

    def encode(self, client: int, update: Tensor) -> bytes:
        """Seed, scales and bits."""
        return self._pack(update, self._seed(client))

    def _pack(self, vector: Tensor, seed: int) -> bytes:
        parts = torch.split(vector, [p.size for p in self.pieces])
        bodies = [
            piece.pack(part, self._eden, seed + i)
            for i, (piece, part) in enumerate(zip(self.pieces, parts, strict=True))
        ]
        return _SEED.pack(seed) + b"".join(bodies)

    def decode(self, body: bytes) -> Tensor:
        """Scaled levels, rotated back."""
        reader = Reader(body, "EDEN")
        (seed,) = _SEED.unpack(reader.take(_SEED.size))
        parts = [
            p.unpack(reader, self._eden, seed + i, self.bits) for i, p in enumerate(self.pieces)
        ]
        reader.end()
        return torch.cat(parts)

    def _seed(self, client: int) -> int:
        version = self.round if client == _SERVER else self.memory(client).version
        return zlib.crc32(struct.pack("<II", client, version)) & 0xFFFF


class _Piece:
    """A vector that EDEN rotates as a whole: its size, and OpenFL's padded slices of it."""

    def __init__(self, size: int, slices: list[int]) -> None:
        self.size, self.slices = size, slices

    @classmethod
    def of(cls, size: int, eden: Any, threshold: int) -> _Piece:
        """Ask OpenFL's code how it slices; no slices where values are sent raw."""
        if size <= threshold:
            return cls(size, [])
        return cls(size, eden.compress(np.ones(size, np.float32), 0)[2])

    def pack(self, part: Tensor, eden: Any, seed: int) -> bytes:
        """Scales, then bits."""
        if not self.slices:
            return value_bytes(part, torch.float32)
        # Every slice but the last is full, so their borders in the vector are sums of lengths.
        chunks = torch.split(part, [*self.slices[:-1], self.size - sum(self.slices[:-1])])
        silent = [not bool(c.any()) for c in chunks]
        filled = [torch.ones_like(c) if z else c for c, z in zip(chunks, silent, strict=True)]
        packed, scales, _, _ = eden.compress(torch.cat(filled).numpy(), seed)
        sent = [0.0 if z else float(s) for s, z in zip(scales, silent, strict=True)]
        return value_bytes(torch.tensor(sent), torch.float32) + bytes(packed.astype(np.uint8))

    def unpack(self, reader: Reader, eden: Any, seed: int, bits: int) -> Tensor:
        """Inverse of ``pack``."""
        if not self.slices:
            return reader.values(self.size, torch.float32)
        scales = reader.values(len(self.slices), torch.float32).tolist()
        packed = np.frombuffer(bytearray(reader.take(sum(self.slices) * bits // 8)), np.uint8)
        # OpenFL's metadata: seed and length, then scale and padded length of every slice.
        metadata = {0: float(seed), 1: float(self.size)}
        for i, (scale, length) in enumerate(zip(scales, self.slices, strict=True)):
            metadata[2 + 2 * i], metadata[3 + 2 * i] = scale, float(length)
        return torch.from_numpy(eden.decompress(packed, metadata))
