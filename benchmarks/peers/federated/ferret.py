"""Ferret: local first-order training, its update as coordinates of seeded random directions."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from benchmarks.federated.methods import State
from benchmarks.peers.federated.base import Peer
from benchmarks.peers.federated.body import Reader, value_bytes
from gradcodec.errors import ConfigError

_SEED = struct.Struct("<I")


class Ferret(Peer):
    """Ferret (Shu et al., arXiv 2409.06277).

        block [d] --<v_k, .> / K with v_k ~ N(0, I) from a seed--> K coordinates, fp32
        coordinates --sum_k c_k v_k--> an unbiased estimate, relative squared error about d / K

    Deviations: the paper's directions are truncated normal and its blocks are groups of parameters;
    here they are normal, and blocks have ``block`` values. The paper sends the coordinates of all
    clients' updates down; here the exact state goes down in fp32, as of the other peers that
    compress the uplink only.

    Args:
        initial: the state that every participant derives from a seed.
        kept: directions for a block.
        block: values of a block.
        lr: server step on the mean update; below 1 tames the noise.
    """

    def __init__(
        self, initial: State, *, kept: int = 64, block: int = 4096, lr: float = 1.0
    ) -> None:
        if not 1 <= kept <= block:
            raise ConfigError(f"expected kept of 1..{block}, got {kept}")
        super().__init__(initial, lr=lr)
        self.kept, self.block = kept, block

    def encode(self, client: int, update: Tensor) -> bytes:
        """``seed u32 | coordinates fp32``; the seed is of the client and its round."""
        seed = (client << 16 | self.memory(client).version) & 0xFFFFFFFF
        rows = self._rows(update)
        codes = [v @ row / self.kept for v, row in zip(self._directions(seed), rows, strict=True)]
        return _SEED.pack(seed) + value_bytes(torch.cat(codes), torch.float32)

    def decode(self, body: bytes) -> Tensor:
        """The sum of the directions."""
        numel = self.start.numel()
        blocks = -(-numel // self.block)
        reader = Reader(body, "ferret")
        (seed,) = _SEED.unpack(reader.take(_SEED.size))
        codes = reader.values(blocks * self.kept, torch.float32).view(blocks, self.kept)
        reader.end()
        rows = [v.T @ code for v, code in zip(self._directions(seed), codes, strict=True)]
        return torch.cat(rows)[:numel]

    def _rows(self, update: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(update, (0, -update.numel() % self.block))
        return padded.view(-1, self.block)

    def _directions(self, seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        blocks = -(-self.start.numel() // self.block)
        return [torch.randn(self.kept, self.block, generator=generator) for _ in range(blocks)]
