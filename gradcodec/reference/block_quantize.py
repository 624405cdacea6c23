"""Block quantisation: 8/4/2/1-bit codes with bf16 scales for every block of consecutive values.

| bits | levels of a block                              | scales                          |
|------|------------------------------------------------|---------------------------------|
| 8, 4 | ``s * q``, ``|q| <= 2**(bits-1) - 1``          | ``s = max|x| / (2**(bits-1)-1)`` |
| 2    | ``+-lo, +-hi`` (sign and magnitude class)      | two means, by Lloyd's iteration |
| 1    | ``+-s`` (sign)                                 | ``s = mean|x|``                 |

The mean magnitude is the least-squares scale of a sign code; the two means are the least-squares
levels once the classes are chosen (Lloyd 1982, least squares quantisation in PCM).
"""

from __future__ import annotations

import torch
from torch import Tensor

LLOYD_STEPS = 8


def scales_per_block(bits: int) -> int:
    """How many bf16 scales a block carries: two at 2 bits, else one."""
    return 2 if bits == 2 else 1


def block_quantize(x: Tensor, bits: int, block: int) -> tuple[Tensor, Tensor]:
    """Quantise ``x`` ``[n]`` fp32 to codes uint8 ``[n]`` and scales bf16 ``[blocks, 1 or 2]``."""
    n = x.numel()
    blocks = -(-n // block)
    padded = torch.zeros(blocks * block, dtype=torch.float32, device=x.device)
    padded[:n] = x
    rows = padded.view(blocks, block)
    if bits >= 4:
        scales, codes = _uniform(rows, bits)
    else:
        # Padding must not pull the last block's means towards zero.
        count = torch.full((blocks, 1), block, dtype=torch.float32, device=x.device)
        if blocks:
            count[-1] = n - (blocks - 1) * block
        scales, codes = (_two_means if bits == 2 else _sign)(rows, count)
    return codes.reshape(-1)[:n], scales


def block_dequantize(codes: Tensor, scales: Tensor, bits: int, block: int) -> Tensor:
    """Inverse: codes int ``[n]`` and scales ``[blocks, 1 or 2]`` -> fp32 ``[n]``.

    Every product is of at most 8 by 8 significant bits, so the result is exact and equal on all
    devices.
    """
    index = torch.arange(codes.numel(), device=codes.device) // block
    s = scales.float()[index]
    if bits >= 4:
        return (codes.to(torch.int32) - (1 << (bits - 1))).float() * s[:, 0]
    sign = 1.0 - 2.0 * (codes & 1).float()
    if bits == 1:
        return sign * s[:, 0]
    return sign * torch.where((codes >> 1).bool(), s[:, 1], s[:, 0])


def _uniform(rows: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    top = (1 << (bits - 1)) - 1
    # Kept clear of the end of the fp32 range, where bf16 rounding would make the largest level Inf.
    scales = (rows.abs().amax(1, keepdim=True).clamp_max(3e38) / top).to(torch.bfloat16)
    step = scales.float()
    q = torch.where(step > 0, rows / step.clamp_min(torch.finfo(torch.float32).tiny), 0.0)
    codes = q.round().clamp(-top, top).to(torch.int32) + (1 << (bits - 1))
    return scales, codes.to(torch.uint8)


def _sign(rows: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    scales = (rows.abs().sum(1, keepdim=True) / count).to(torch.bfloat16)
    return scales, (rows < 0).to(torch.uint8)


def _two_means(rows: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
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
    levels = scales.float()
    large = size > levels.mean(1, keepdim=True)
    return scales, (rows < 0).to(torch.uint8) | (large.to(torch.uint8) << 1)
