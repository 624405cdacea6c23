"""The mean of vectors coded with the same scales: their codes are added as integers."""

from __future__ import annotations

import torch
from torch import Tensor

from gradcodec.reference import grid
from gradcodec.reference.bitpack import unpack_bits
from gradcodec.reference.encode import padded_numel, segment_of
from gradcodec.reference.hadamard import CHUNK, rotate_chunks_back


def decode_sum_shared(
    packed: Tensor,
    scales: Tensor,
    numel: int,
    *,
    bits: int,
    block: int = CHUNK,
    rotate: bool = False,
    dtype: torch.dtype = torch.float32,
    rotation_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``[numel]``: mean over ``W`` of codes uint8 ``[W, bytes]`` with scales bf16 ``[blocks]``.

        mean = (sum_w code_w - W zero) * (delta / W)

    The sum is exact whatever its order; two roundings to fp32 follow, ``delta / W`` as
    ``delta * (1/W)`` and the product. One bit: ``(W - 2 sum_w code_w) * (delta / W)``.
    """
    world = len(packed)
    out = torch.empty(numel, dtype=dtype, device=packed.device)
    segment = segment_of(block)
    total = padded_numel(numel, rotate)
    for start in range(0, total, segment):
        count = min(segment, total - start)
        blocks = -(-count // block)
        codes = torch.zeros(blocks * block, dtype=torch.int32, device=packed.device)
        for row in packed:
            its = row[start * bits // 8 :][: -(-count * bits // 8)]
            codes[:count] += unpack_bits(its, bits, count)
        sums = codes.view(blocks, block).float()
        levels = world - 2 * sums if bits == 1 else sums - world * grid.ZERO[bits]
        step = scales[start // block :][:blocks].float() * (1.0 / world)
        mean = levels * step[:, None]
        if rotate:
            mean = rotate_chunks_back(mean, rotation_dtype)
        its = out[start : start + count]
        its.copy_(mean.view(-1)[: len(its)])
    return out
