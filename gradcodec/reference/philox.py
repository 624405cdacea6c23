"""Philox4x32-7: random bytes that depend on a seed and a position alone (Salmon et al., SC'11)."""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 7
"""Seven pass BigCrush (Salmon et al., table 2); ten are the usual safety margin."""

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF


def random_bytes(start: int, count: int, seed: int, device: torch.device | None = None) -> Tensor:
    """``[count]`` uint8: bytes ``start .. start+count`` of the stream of ``seed`` (64 bits).

    Key ``(seed & 0xffffffff, seed >> 32)``; the counter ``i // 16`` gives four words, which in
    little-endian order are the bytes ``16 (i//16) .. 16 (i//16) + 15``. Triton's ``randint4x(seed,
    i // 16, 7)`` gives the same words.
    """
    first = start // 16
    blocks = -(-(start + count) // 16) - first if count else 0
    counter = torch.arange(first, first + blocks, dtype=torch.int64, device=device)
    c0, c1 = counter & _LOW, counter >> 32
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(ROUNDS):
        hi0, lo0 = _product(c0, _M0)
        hi1, lo1 = _product(c2, _M1)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    words = torch.stack([c0, c1, c2, c3], 1)
    shifts = torch.tensor([0, 8, 16, 24], dtype=torch.int64, device=device)
    stream = ((words[:, :, None] >> shifts) & 0xFF).to(torch.uint8).reshape(-1)
    return stream[start - 16 * first :][:count]


def _product(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low half of a 32 x 32 bit product, which int64 cannot hold in one piece."""
    upper, lower = (word >> 16) * factor, (word & 0xFFFF) * factor
    middle = upper + (lower >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (lower & 0xFFFF)
