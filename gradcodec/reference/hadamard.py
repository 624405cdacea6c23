"""Randomised Hadamard rotation of blocks: spreads every value over its block."""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from torch import Tensor


@functools.cache
def hadamard(size: int) -> Tensor:
    """The orthonormal, symmetric Walsh-Hadamard matrix ``[size, size]`` fp32; a power of two."""
    h = torch.ones(1, 1)
    while len(h) < size:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h / math.sqrt(size)


def random_signs(count: int, seed: int) -> Tensor:
    """``[count]`` fp32 of +-1 from the raw bits of numpy's PCG64, which no version changes."""
    words = np.random.PCG64(seed).random_raw(-(-count // 64)).astype("<u8")
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")[:count]
    return torch.from_numpy(1.0 - 2.0 * bits.astype(np.float32))


def rotate(rows: Tensor, signs: Tensor) -> Tensor:
    """``H D x`` for each row ``[blocks, size]``, ``D`` the diagonal of ``signs``; norms stay."""
    return (rows * signs) @ hadamard(rows.shape[1]).to(rows.device)


def rotate_back(rows: Tensor, signs: Tensor) -> Tensor:
    """Inverse of ``rotate``: ``D H y``. Fewer columns than the block's size count as its first."""
    h = hadamard(signs.shape[1]).to(rows.device)
    return (rows @ h[: rows.shape[1]]) * signs
