"""Values to packed codes: rotate, add the residual, quantise, pack, keep the new residual."""

from __future__ import annotations

import torch
from torch import Tensor

from gradcodec.reference import grid
from gradcodec.reference.bitpack import pack_bits, packed_nbytes
from gradcodec.reference.hadamard import CHUNK, rotate_chunks
from gradcodec.reference.philox import random_bytes

SEGMENT = 1 << 18
"""Values processed at a time, about: avoids copies of the whole vector, and fits a cache."""


def segment_of(block: int) -> int:
    """Values of a segment: whole blocks, whole bytes and whole calls of Philox."""
    return 16 * block * max(1, SEGMENT // (16 * block))


def encode(
    values: Tensor,
    *,
    bits: int,
    block: int = CHUNK,
    scale: str = "absmax",
    rotate: bool = False,
    stochastic: bool = False,
    seed: int = 0,
    residual: Tensor | None = None,
    levels: str = "uniform",
    rotation_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Quantise ``values [n]`` on the grids of ``gradcodec.reference.grid``.

        y = R x + e;   code = Q(y / delta);   e <- y - delta (code - zero)

    with ``R`` the rotation of ``rotate_chunks`` (or nothing) and ``e`` the residual of error
    feedback (Seide et al. 2014; Karimireddy et al. 2019, arXiv 1901.09847), kept in the rotated
    domain, which saves the inverse transform and is equivalent because ``R`` is orthonormal.

    Args:
        values: 1-D, floating; converted to fp32.
        bits: 1, 2, 4 or 8 per value.
        block: values that share a scale; when rotated, a divisor of 4096.
        scale: ``"absmax"``, ``"l1"`` or ``"rms"``.
        rotate: rotate chunks of 4096 values first; the last is padded with zeros and sent whole.
        stochastic: dither with ``(byte + 1/2) / 256`` from ``random_bytes`` instead of 1/2. The
            expectation is then the value, to 1/512 of a step.
        seed: 64 bits; callers put the step number in the high half.
        residual: ``[padded_numel(n, rotate)]``, any floating dtype, updated in place.
        levels: ``"uniform"``, or ``"gaussian"`` at 4 bits, to nearest.
        rotation_dtype: what the rotation is computed in; see ``rotate_chunks``.

    Returns:
        packed uint8 ``[ceil(N bits / 8)]`` and scales bf16 ``[ceil(N / block)]``, with ``N`` the
        padded number of values. NaN and Inf spoil their block (rotated: chunk) and no other.
    """
    total = grid.padded_numel(values.numel(), rotate)
    segment = segment_of(block)
    packed = torch.empty(packed_nbytes(total, bits), dtype=torch.uint8, device=values.device)
    used = torch.empty(-(-total // block), dtype=torch.bfloat16, device=values.device)
    for start in range(0, total, segment):
        count = min(segment, total - start)
        rows, counts = _rows(values[start : start + count], count, block, rotate, rotation_dtype)
        flat = rows.view(-1)[:count]
        if residual is not None:
            flat += residual[start : start + count].float()
        at = slice(start // block, start // block + len(rows))
        used[at] = grid.deltas(rows, counts, bits, scale, stochastic, levels)
        dither = None
        if stochastic:
            u8 = random_bytes(start, rows.numel(), seed, values.device)
            dither = ((u8.float() + 0.5) / 256).view(rows.shape)
        codes = grid.codes_of(rows, used[at], bits, dither, levels)
        if residual is not None:
            rest = rows - grid.values_of(codes, used[at], bits, levels)
            residual[start : start + count] = rest.view(-1)[:count].to(residual.dtype)
        its = pack_bits(codes.view(-1)[:count], bits)
        packed[start * bits // 8 :][: len(its)] = its
    return packed, used


def _rows(
    part: Tensor, count: int, block: int, rotate: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The segment as fp32 rows ``[blocks, block]`` and how many of each row's values are real."""
    blocks = -(-count // block)
    rows = torch.zeros(blocks * block, device=part.device)
    rows[: part.numel()] = part
    counts = torch.full((blocks,), block, dtype=torch.float64, device=part.device)
    counts[-1] = count - (blocks - 1) * block
    if rotate:
        rows = rotate_chunks(rows.view(-1, CHUNK), dtype)
    return rows.view(blocks, block), counts
