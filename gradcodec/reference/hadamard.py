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


def signs_of(words: Tensor, count: int) -> Tensor:
    """fp32 ``[count]`` of +-1 from 64-bit words ``[sign_words(count)]``; set bits mean minus."""
    places = torch.arange(64, device=words.device)
    bits = (words[:, None] >> places) & 1
    return 1.0 - 2.0 * bits.view(-1)[:count].float()


def sign_words(count: int) -> int:
    """How many 64-bit words hold ``count`` random signs."""
    return -(-count // 64)


def random_sign_words(count: int, seed: int) -> Tensor:
    """``count`` random signs as bits, int64 ``[sign_words(count)]``: set means minus.

    The raw bits of numpy's PCG64, which no version changes.
    """
    words = np.random.PCG64(seed).random_raw(sign_words(count))
    return torch.from_numpy(words.view(np.int64))


CHUNK = 4096
"""Values that ``rotate_chunks`` turns together: a tile of 64 x 64."""

_SIDE = 64
#: Set bits are minus signs of the rows and the columns of the tile; 64 random bits each.
_ROW_BITS, _COLUMN_BITS = 0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F


@functools.cache
def chunk_signs() -> tuple[Tensor, Tensor]:
    """Fixed signs of a tile's rows and columns, two fp32 ``[64]`` of +-1."""
    bits = torch.arange(_SIDE)
    signs = [
        torch.tensor([1.0 - 2.0 * ((word >> int(b)) & 1) for b in bits])
        for word in (_ROW_BITS, _COLUMN_BITS)
    ]
    return signs[0], signs[1]


def rotate_chunks(chunks: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """``H (s * x) / 64`` of every chunk ``[chunks, 4096]``; orthonormal, a new fp32 tensor.

    ``H`` is the 4,096-point Walsh-Hadamard matrix in Sylvester's order and ``s`` the outer product
    of ``chunk_signs``: with a chunk as a 64 x 64 tile ``X``, this is ``(H D_r) X (D_c H) / 64``.
    The signs never change, because error feedback keeps its residual in rotated coordinates.

    With fp32: butterflies of span 1, 2, 4 .. 2048, sums and differences in that order, so that
    every implementation on a CPU gives the same bits. With ``dtype`` bfloat16: what two
    tensor-core products do, operands rounded to bf16 and fp32 sums.
    """
    if dtype == torch.float32:
        return butterflies(chunks.float() * _flat_signs(chunks.device)).mul_(1.0 / _SIDE)
    left, right = rotation_factors(chunks.device)
    tile = _bf16(chunks.float()).view(-1, _SIDE, _SIDE)
    return (left @ _bf16(tile @ right)).reshape(chunks.shape)


def rotate_chunks_back(chunks: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Inverse of ``rotate_chunks``: ``s * (H y) / 64``."""
    if dtype == torch.float32:
        rotated = butterflies(chunks.float()).mul_(1.0 / _SIDE)
        return rotated.mul_(_flat_signs(chunks.device))
    left, right = rotation_factors(chunks.device)
    tile = _bf16(chunks.float()).view(-1, _SIDE, _SIDE)
    return (left.T @ _bf16(tile @ right.T)).reshape(chunks.shape)


def rotation_factors(device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """``H D_r / 8`` and ``D_c H / 8``: fp32 ``[64, 64]`` of +-1/8, exact in bf16."""
    rows, columns = chunk_signs()
    h = hadamard(_SIDE)
    return (h * rows).to(device), (columns[:, None] * h).to(device)


def _flat_signs(device: torch.device) -> Tensor:
    rows, columns = chunk_signs()
    return torch.outer(rows, columns).reshape(-1).to(device)


def _bf16(values: Tensor) -> Tensor:
    return values.to(torch.bfloat16).float()


def butterflies(rows: Tensor) -> Tensor:
    """``H x`` without its factor, of every row ``[rows, size]``; a new fp32 tensor.

    Stages of span 1, 2, 4 .. ``size / 2``, each with sums and differences of pairs. Every
    implementation adds in this order, so that all give the same bits.
    """
    size = rows.shape[1]
    read, write, spare = rows.contiguous(), torch.empty_like(rows), torch.empty_like(rows)
    span = 1
    while span < size:
        pairs, out = (t.view(-1, size // (2 * span), 2, span) for t in (read, write))
        torch.add(pairs[:, :, 0], pairs[:, :, 1], out=out[:, :, 0])
        torch.sub(pairs[:, :, 0], pairs[:, :, 1], out=out[:, :, 1])
        # The caller's own values are read once and never written.
        read, write, spare = write, spare, write
        span *= 2
    return read
