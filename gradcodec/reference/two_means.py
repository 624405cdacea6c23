"""Two bits a value with two fitted magnitudes: levels ``+-lo, +-hi`` of each block.

A code's bit 0 is the sign (1 is negative), bit 1 the magnitude's class. The two means are the
least-squares levels once the classes are chosen (Lloyd 1982, Least squares quantization in PCM).
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradcodec.reference.bitpack import pack_bits, packed_nbytes, unpack_bits
from gradcodec.reference.encode import segment_of

LLOYD_STEPS = 8


def encode(values: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """``values [n]`` -> packed uint8 ``[ceil(n/4)]`` and scales ``lo, hi`` bf16 ``[blocks, 2]``."""
    n, segment = values.numel(), segment_of(block)
    packed = torch.empty(packed_nbytes(n, 2), dtype=torch.uint8, device=values.device)
    scales = torch.empty(-(-n // block), 2, dtype=torch.bfloat16, device=values.device)
    for start in range(0, n, segment):
        part = values[start : start + segment]
        blocks = -(-part.numel() // block)
        rows = torch.zeros(blocks * block, device=values.device)
        rows[: part.numel()] = part
        # Padding must not pull the last block's means towards zero.
        count = torch.full((blocks, 1), float(block), device=values.device)
        count[-1] = part.numel() - (blocks - 1) * block
        its_scales, codes = _fit(rows.view(blocks, block), count)
        scales[start // block :][:blocks] = its_scales
        its = pack_bits(codes.view(-1)[: part.numel()], 2)
        packed[start // 4 :][: len(its)] = its
    return packed, scales


def decode_mean(packed: Tensor, scales: Tensor, numel: int, block: int) -> Tensor:
    """fp32 ``[numel]``: mean over ``W`` of packed ``[W, bytes]``, scales ``[W, 2 blocks]``."""
    out = torch.zeros(numel, device=packed.device)
    segment = segment_of(block)
    for body, of_body in zip(packed, scales, strict=True):
        levels = of_body.float().view(-1, 2)
        for start in range(0, numel, segment):
            part = out[start : start + segment]
            blocks = -(-part.numel() // block)
            rows = torch.zeros(blocks * block, dtype=torch.uint8, device=packed.device)
            rows[: part.numel()] = unpack_bits(body[start // 4 :], 2, part.numel())
            rows = rows.view(blocks, block)
            lo, hi = levels[start // block :][:blocks].split(1, dim=1)
            size = torch.where(rows > 1, hi, lo)
            signed = torch.where((rows & 1).bool(), -size, size)
            part += signed.view(-1)[: part.numel()]
    return out.mul_(1.0 / len(packed)) if len(packed) > 1 else out


def _fit(rows: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    size = rows.abs()
    total = size.sum(1, keepdim=True)
    threshold = total / count
    lo = hi = threshold
    for _ in range(LLOYD_STEPS):
        large = size > threshold
        n_hi = large.sum(1, keepdim=True).float()
        sum_hi = (size * large).sum(1, keepdim=True)
        hi = torch.where(n_hi > 0, sum_hi / n_hi.clamp_min(1), threshold)
        lo = (total - sum_hi) / (count - n_hi).clamp_min(1)
        threshold = (lo + hi) / 2
    # The difference of sums can dip below zero by rounding; a magnitude may not.
    scales = torch.cat([lo.clamp_min(0), hi], 1).to(torch.bfloat16)
    large = size > scales.float().mean(1, keepdim=True)
    return scales, (rows < 0).to(torch.uint8) | (large.to(torch.uint8) << 1)
