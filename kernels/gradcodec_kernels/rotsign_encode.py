"""Signs of rotated blocks: flip, rotate, measure, pack; one pass over memory."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradcodec_kernels.launch import check_block, check_kept, launches, options
from gradcodec_kernels.signs import butterflies, factors, flipped, values_of
from gradcodec_kernels.tiles import CHUNK, block_max, load_y, store_cast, store_tile


@triton.jit
def power_of_two(exponent):
    """fp32 ``2**exponent``, built from its bits."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["first", "rest", "total"])
def rotsign_encode_kernel(
    X,
    E,
    D,
    P,
    S,
    before,
    after,
    first,
    rest,
    total,
    BLOCK: tl.constexpr,
    KEPT: tl.constexpr,
    EF: tl.constexpr,
    EVEN: tl.constexpr,
):
    """A program owns a chunk, with ``total`` values in whole blocks; see ``rotsign_encode``."""
    chunk = tl.program_id(0).to(tl.int64) + first
    ROWS: tl.constexpr = CHUNK // BLOCK
    x, offsets = load_y(X, E, X, X, chunk, rest, BLOCK, False, EF, EVEN)
    peak = block_max(x, False).to(tl.int32, bitcast=True)
    exponent = tl.minimum((peak >> 23) - 126, 126)
    y = flipped(x * power_of_two(-exponent), D, chunk, total, ROWS, BLOCK, EVEN)
    y = butterflies(y, ROWS, BLOCK)
    wide = tl.abs(y).to(tl.float64)
    energy = tl.sum(wide * wide, 1, keep_dims=True)
    column = tl.arange(0, BLOCK)[None, :]
    sent = tl.where(column < KEPT, wide, 0.0) if KEPT < BLOCK else wide
    size = tl.sum(sent, 1, keep_dims=True)
    scale = energy / tl.where(size > 0, size, 1.0) * before * after
    scale = tl.where(size > 0, scale, 0.0) * power_of_two(exponent).to(tl.float64)
    rounded = store_cast(scale.to(tl.float32), tl.bfloat16)
    row = tl.arange(0, ROWS)[:, None]
    tl.store(S + chunk * ROWS + row, rounded, mask=row * BLOCK < total)
    minus = (y < 0).to(tl.int32)
    lanes = tl.reshape(minus, (ROWS, BLOCK // 8, 8))
    its = tl.sum(lanes << tl.arange(0, 8)[None, None, :], axis=2).to(tl.uint8)
    byte = tl.arange(0, BLOCK // 8)[None, :]
    at = P + chunk * (ROWS * KEPT // 8) + row * (KEPT // 8) + byte
    tl.store(at, its, mask=(byte < KEPT // 8) & (row * BLOCK < total))
    if EF:
        used = rounded.to(tl.float32) * before
        came = values_of(minus, used, D, chunk, total, after, ROWS, BLOCK, KEPT, EVEN)
        store_tile(E + chunk * CHUNK, offsets, x - came, rest, EVEN)


def rotsign_encode(
    values: Tensor,
    signs: Tensor,
    packed: Tensor,
    scales: Tensor,
    *,
    block: int,
    kept: int,
    residual: Tensor | None = None,
) -> None:
    """``gradcodec.reference.rotsign.encode``; equal bytes, but a scale may be one bf16 number off.

    Args:
        values: ``[n]``, fp32, bf16 or fp16.
        signs: int64 ``[ceil(blocks block / 64)]``.
        packed: uint8 ``[blocks kept / 8]``, written.
        scales: bf16 ``[blocks]``, written.
        block: a power of two from 64 to 4096.
        kept: signs that each block keeps, a multiple of 8.
        residual: ``[n]``, updated in place.
    """
    check_block(block)
    check_kept(kept)
    for grid, first, rest, even in launches(values.numel()):
        rotsign_encode_kernel[grid](
            values,
            values if residual is None else residual,
            signs.view(torch.uint8),
            packed,
            scales,
            *factors(block),
            first,
            rest,
            -(-rest // block) * block,
            BLOCK=block,
            KEPT=kept,
            EF=residual is not None,
            EVEN=even,
            **options("rotsign_encode", values, 1),
        )
