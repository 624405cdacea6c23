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


def encode(values: Tensor, block: int, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Code ``values [n]``, floating, by two bits each, in fp32.

        y = x + e;   e <- y - decoded

    Args:
        values: 1-D.
        block: values that share their two levels.
        residual: ``[n]``, any floating dtype, updated in place.

    Returns:
        packed uint8 ``[ceil(n / 4)]`` and levels ``lo, hi`` bf16 ``[blocks, 2]``. Sums are taken in
        fp64: after rounding their order makes no difference, except in rare ties.
    """
    n, segment = values.numel(), segment_of(block)
    packed = torch.empty(packed_nbytes(n, 2), dtype=torch.uint8, device=values.device)
    scales = torch.empty(-(-n // block), 2, dtype=torch.bfloat16, device=values.device)
    for start in range(0, n, segment):
        part = values[start : start + segment]
        blocks = -(-part.numel() // block)
        rows = torch.zeros(blocks * block, device=values.device)
        flat = rows[: part.numel()]
        flat.copy_(part)
        if residual is not None:
            flat += residual[start : start + segment].float()
        # Padding must not pull the last block's means towards zero.
        count = torch.full((blocks, 1), float(block), dtype=torch.float64, device=values.device)
        count[-1] = part.numel() - (blocks - 1) * block
        rows = rows.view(blocks, block)
        its_scales, codes = _fit(rows, count)
        scales[start // block :][:blocks] = its_scales
        its = pack_bits(codes.view(-1)[: part.numel()], 2)
        packed[start // 4 :][: len(its)] = its
        if residual is not None:
            rest = (rows - _levels(codes, its_scales)).view(-1)[: part.numel()]
            residual[start : start + segment] = rest.to(residual.dtype)
    return packed, scales


def decode_mean(
    packed: Tensor, scales: Tensor, numel: int, block: int, weights: Tensor | None = None
) -> Tensor:
    """fp32 ``[numel]``: mean over ``W`` of packed ``[W, bytes]``, levels ``[W, 2 blocks]``.

    With ``weights`` fp32 ``[W]`` it is ``sum_w weights_w x_w`` instead, as in ``decode_mean``.
    """
    out = torch.zeros(numel, device=packed.device)
    segment = segment_of(block)
    for start in range(0, numel, segment):
        part = out[start : start + segment]
        blocks = -(-part.numel() // block)
        for w in range(len(packed)):
            codes = torch.zeros(blocks * block, dtype=torch.uint8, device=packed.device)
            codes[: part.numel()] = unpack_bits(packed[w, start // 4 :], 2, part.numel())
            its = scales[w].view(-1, 2)[start // block :][:blocks]
            values = _levels(codes.view(blocks, block), its)
            if weights is not None:
                values *= weights[w]
            part += values.view(-1)[: part.numel()]
    return out if weights is not None else out.mul_(1.0 / max(1, len(packed)))


def _fit(rows: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Levels bf16 ``[blocks, 2]`` and codes of rows; ``count`` of a row's values are real."""
    size = rows.abs()
    wide = size.double()
    total = wide.sum(1, keepdim=True)
    mean = total / count
    lo, hi = mean, mean
    for _ in range(LLOYD_STEPS):
        threshold = ((lo + hi) / 2).float()
        large = size > threshold
        n_hi = large.sum(1, keepdim=True).double()
        sum_hi = (wide * large).sum(1, keepdim=True)
        hi = torch.where(n_hi > 0, sum_hi / n_hi.clamp_min(1), threshold.double())
        # If all are large, the rest is zero, but the difference of sums may not be, by rounding.
        rest = torch.where(n_hi < count, total - sum_hi, 0.0)
        lo = rest / (count - n_hi).clamp_min(1)
    # The difference of sums can dip below zero by rounding; a magnitude may not.
    scales = torch.cat([lo.clamp_min(0), hi], 1).float().to(torch.bfloat16)
    large = size > scales.float().mean(1, keepdim=True)
    return scales, (rows < 0).to(torch.uint8) | (large.to(torch.uint8) << 1)


def _levels(codes: Tensor, scales: Tensor) -> Tensor:
    """fp32 values of codes ``[blocks, block]`` with levels ``[blocks, 2]``."""
    levels = scales.float()
    size = torch.where(codes > 1, levels[:, 1:], levels[:, :1])
    return torch.where((codes & 1).bool(), -size, size)
