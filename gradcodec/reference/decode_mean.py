"""The mean of several coded vectors, without one dense vector for each."""

from __future__ import annotations

import torch
from torch import Tensor

from gradcodec.reference import grid
from gradcodec.reference.bitpack import unpack_bits
from gradcodec.reference.encode import segment_of
from gradcodec.reference.grid import padded_numel
from gradcodec.reference.hadamard import CHUNK, rotate_chunks_back


def decode_mean(
    packed: Tensor,
    scales: Tensor,
    numel: int,
    *,
    bits: int,
    block: int = CHUNK,
    rotate: bool = False,
    weights: Tensor | None = None,
    levels: str = "uniform",
    dtype: torch.dtype = torch.float32,
    rotation_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``[numel]``: mean over ``W`` of what ``encode`` made, in the order given.

    Args:
        packed: uint8 ``[W, bytes]``.
        scales: bf16 ``[W, blocks]``.
        numel: values before padding.
        bits: as in ``encode``, like the next two.
        block: values that share a scale.
        rotate: rotate back, once, after the mean.
        weights: fp32 ``[W]``: ``sum_w weights_w x_w`` instead of the mean. Without them products
            are exact, sums are rounded to fp32 one by one, and the whole is multiplied by ``1/W``
            once; with them each product is rounded as well.
        levels: as in ``encode``.
        dtype: of the result.
        rotation_dtype: see ``rotate_chunks``.
    """
    out = torch.empty(numel, dtype=dtype, device=packed.device)
    segment = segment_of(block)
    total = padded_numel(numel, rotate)
    for start in range(0, total, segment):
        count = min(segment, total - start)
        mean = mean_rows(packed, scales, start, count, bits, block, weights, levels)
        if rotate:
            mean = rotate_chunks_back(mean.view(-1, CHUNK), rotation_dtype)
        its = out[start : start + count]
        its.copy_(mean.view(-1)[: len(its)])
    return out


def mean_rows(
    packed: Tensor,
    scales: Tensor,
    start: int,
    count: int,
    bits: int,
    block: int,
    weights: Tensor | None = None,
    levels: str = "uniform",
) -> Tensor:
    """fp32 ``[blocks, block]``: the mean of a segment in the domain in which it was coded."""
    blocks = -(-count // block)
    total = torch.zeros(blocks, block, device=packed.device)
    codes = torch.zeros(blocks * block, dtype=torch.int32, device=packed.device)
    for w in range(len(packed)):
        its = packed[w, start * bits // 8 :][: -(-count * bits // 8)]
        codes[:count] = unpack_bits(its, bits, count)
        delta = scales[w, start // block :][:blocks]
        values = grid.values_of(codes.view(blocks, block), delta, bits, levels)
        total += values if weights is None else values.mul_(weights[w])
    return total if weights is not None else total.mul_(1.0 / max(1, len(packed)))
