"""Signs of a randomly rotated vector, with a scale that makes them unbiased (DRIVE, EDEN)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gradcodec.reference.bitpack import pack_bits, packed_nbytes, unpack_bits
from gradcodec.reference.encode import SEGMENT
from gradcodec.reference.hadamard import butterflies, signs_of


def segment_of(block: int) -> int:
    """Values of a segment: whole blocks, whole bytes of sent signs, whole words of ``D``.

    ``block`` is a power of two up to 4096.
    """
    return block * max(64, SEGMENT // block)


def encode(
    values: Tensor,
    signs: Tensor,
    *,
    block: int,
    kept: int,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Code ``values [n]`` by the signs of ``kept`` of every ``block`` rotated values.

        y = H D (x + e);   scale = |y|^2 / sum |y_kept|;   e <- x + e - decoded

    with ``H`` the orthonormal Walsh-Hadamard matrix and ``D`` the diagonal of random signs. Blocks
    are scaled by a power of two before they are rotated, so that no sum overflows fp32. The sums of
    the scale are taken in fp64: after rounding to bf16 their order makes no difference, except in
    rare ties.

    Args:
        values: 1-D, floating; converted to fp32.
        signs: int64 ``[sign_words(blocks * block)]``, see ``random_sign_words``.
        block: a power of two, 8 .. 4096. The last block is padded with zeros and sent whole.
        kept: 1 .. ``block``.
        residual: ``[n]``, any floating dtype, updated in place.

    Returns:
        packed uint8 ``[ceil(blocks kept / 8)]``, a set bit for minus, and scales bf16 ``[blocks]``.
        Whole numbers are rotated exactly.
    """
    n, segment = values.numel(), segment_of(block)
    blocks = -(-n // block)
    packed = torch.empty(packed_nbytes(blocks * kept, 1), dtype=torch.uint8, device=values.device)
    scales = torch.empty(blocks, dtype=torch.bfloat16, device=values.device)
    for start in range(0, n, segment):
        part = values[start : start + segment]
        rows = blocks_of(part, block, None if residual is None else residual[start:][:segment])
        its_signs = signs_at(signs, start, rows)
        y, exponent = rotated(rows, its_signs)
        its_scales = scales_of(y, y[:, :kept], exponent, 1.0 / math.sqrt(block))
        bits = y[:, :kept] < 0
        at = start // block
        scales[at : at + len(rows)] = its_scales
        its = pack_bits(bits.reshape(-1), 1)
        packed[at * kept // 8 :][: len(its)] = its
        if residual is not None:
            rest = rows - _decoded(bits, its_scales, its_signs)
            residual[start : start + segment] = rest.view(-1)[: part.numel()].to(residual.dtype)
    return packed, scales


def decode_mean(
    packed: Tensor,
    scales: Tensor,
    signs: Tensor,
    numel: int,
    *,
    block: int,
    kept: int,
    weights: Tensor | None = None,
) -> Tensor:
    """fp32 ``[numel]``: mean over ``W`` of what ``encode`` made, in the order given.

        x = D H y / sqrt(block),   y = +-scale for the first ``kept`` of a block, 0 for the others

    Sums of ``y`` are exact, so a single vector is decoded with one rounding, whatever the order.

    Args:
        packed: uint8 ``[W, bytes]``.
        scales: bf16 ``[W, blocks]``.
        signs: int64 ``[W, words]``, a row for each payload.
        numel: values before padding.
        block: as in ``encode``, like the next.
        kept: signs of each block.
        weights: fp32 ``[W]``: ``sum_w weights_w x_w`` instead of the mean, as in ``decode_mean``.
    """
    segment = segment_of(block)
    # Added to -0, every value stays as it is, even the sign of a zero.
    out = torch.full((numel,), -0.0, device=packed.device)
    for start in range(0, numel, segment):
        part = out[start : start + segment]
        blocks, at = -(-part.numel() // block), start // block
        for w in range(len(packed)):
            its = unpack_bits(packed[w, at * kept // 8 :], 1, blocks * kept).view(blocks, kept)
            like = part.new_empty(blocks, block)
            x = _decoded(its.bool(), scales[w, at : at + blocks], signs_at(signs[w], start, like))
            if weights is not None:
                x *= weights[w]
            part += x.view(-1)[: part.numel()]
    return out if weights is not None else out.mul_(1.0 / max(1, len(packed)))


def factors(block: int) -> tuple[float, float]:
    """``1 / sqrt(block)`` as two factors: a power of two, and the rest, 1 or ``sqrt(1/2)``.

    Scales are multiplied by the first before they are summed, which is exact and keeps the sums
    within fp32; the sums are multiplied by the second.
    """
    power = block.bit_length() - 1
    return 2.0 ** -(power // 2), math.sqrt(0.5) if power % 2 else 1.0


# -- parts, of which ``RotatedPeaksPacker`` is made too -------------------------------------------


def blocks_of(values: Tensor, block: int, residual: Tensor | None = None) -> Tensor:
    """fp32 ``[blocks, block]`` of ``values + residual``, the last block padded with zeros."""
    rows = torch.zeros(-(-values.numel() // block), block, device=values.device)
    flat = rows.view(-1)[: values.numel()]
    flat.copy_(values)
    if residual is not None:
        flat += residual.float()
    return rows


def rotated(rows: Tensor, signs: Tensor) -> tuple[Tensor, Tensor]:
    """``H D x`` of every block without the factors ``2**exponent`` and ``1 / sqrt(block)``.

    Returns:
        ``y`` fp32 like ``rows``, and exponents int32 ``[blocks]``: no sum overflows.
    """
    exponent = _exponent(rows)
    return butterflies(rows * _power(-exponent)[:, None] * signs), exponent


def signs_at(words: Tensor, start: int, rows: Tensor) -> Tensor:
    """fp32 like ``rows``: the diagonal of ``D`` from value ``start`` on, a multiple of 64."""
    its = words[start // 64 :][: -(-rows.numel() // 64)]
    return signs_of(its, rows.numel()).view(rows.shape)


def _exponent(rows: Tensor) -> Tensor:
    """int32 ``[blocks]``: the power of two above the largest magnitude, -126 .. 126."""
    bits = rows.abs().amax(1).view(torch.int32) if rows.numel() else rows.new_empty(0).int()
    return ((bits >> 23) - 126).clamp(-126, 126)


def _power(exponent: Tensor) -> Tensor:
    """fp32 ``2**exponent``, exactly: made of its bits."""
    return ((exponent + 127) << 23).view(torch.float32)


def scales_of(y: Tensor, sent: Tensor, exponent: Tensor, factor: float) -> Tensor:
    """bf16 ``[blocks]``: ``|y|^2 / sum |sent|`` of ``y`` and ``sent`` that lack the factors."""
    energy, total = y.double().square().sum(1), sent.double().abs().sum(1)
    size = energy / torch.where(total > 0, total, 1.0) * factor
    size = torch.where(total > 0, size, torch.zeros_like(size))
    return (size * _power(exponent).double()).float().to(torch.bfloat16)


def _decoded(bits: Tensor, scales: Tensor, signs: Tensor) -> Tensor:
    """fp32 ``[blocks, block]`` of sign bits ``[blocks, kept]`` and scales ``[blocks]``."""
    before, after = factors(signs.shape[1])
    y = torch.zeros_like(signs)
    y[:, : bits.shape[1]] = (1.0 - 2.0 * bits.float()) * (scales.float() * before)[:, None]
    return butterflies(y).mul_(after).mul_(signs)
