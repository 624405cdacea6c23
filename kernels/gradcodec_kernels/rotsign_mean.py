"""Mean of W payloads of rotated signs: each has its own random signs and is rotated back."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradcodec_kernels.launch import check_block, check_kept, launches, options
from gradcodec_kernels.signs import factors, values_of
from gradcodec_kernels.tiles import CHUNK, store_tile, tile_offsets
from gradcodec_kernels.unpack import load_codes


@triton.jit(do_not_specialize=["first", "rest", "total"])
def rotsign_mean_kernel(
    P,
    S,
    D,
    WEIGHTS,
    OUT,
    before,
    after,
    packed_stride,
    scales_stride,
    signs_stride,
    world,
    first,
    rest,
    total,
    BLOCK: tl.constexpr,
    KEPT: tl.constexpr,
    WEIGHTED: tl.constexpr,
    EVEN: tl.constexpr,
):
    """A program owns a chunk, with ``total`` values in whole blocks; see ``rotsign_mean``."""
    chunk = tl.program_id(0).to(tl.int64) + first
    ROWS: tl.constexpr = CHUNK // BLOCK
    row = tl.arange(0, ROWS)[:, None]
    acc = tl.full([ROWS, BLOCK], -0.0, tl.float32)  # adding to -0 keeps the sign of a zero
    for w in range(world):
        its = P + w * tl.cast(packed_stride, tl.int64) + chunk * (ROWS * KEPT // 8)
        minus = load_codes(its, total, 1, KEPT, ROWS, BLOCK, EVEN)
        at = S + w * tl.cast(scales_stride, tl.int64) + chunk * ROWS + row
        scale = tl.load(at, mask=row * BLOCK < total, other=0.0).to(tl.float32) * before
        words = D + w * tl.cast(signs_stride, tl.int64)
        value = values_of(minus, scale, words, chunk, total, after, ROWS, BLOCK, KEPT, EVEN)
        if WEIGHTED:
            value = value * tl.load(WEIGHTS + w)
        acc += value
    if not WEIGHTED:
        acc = acc * tl.div_rn(tl.zeros_like(acc) + 1.0, tl.zeros_like(acc) + world)
    store_tile(OUT + chunk * CHUNK, tile_offsets(ROWS, BLOCK), acc, rest, EVEN)


def rotsign_mean(
    packed: Tensor,
    scales: Tensor,
    signs: Tensor,
    out: Tensor,
    *,
    block: int,
    kept: int,
    weights: Tensor | None = None,
) -> None:
    """``gradcodec.reference.rotsign.decode_mean``, bit by bit.

    Args:
        packed: uint8 ``[W, blocks kept / 8]``; any row stride.
        scales: bf16 ``[W, blocks]``.
        signs: int64 ``[W, words]``.
        out: fp32 ``[n]``, written.
        block: as in ``rotsign_encode``.
        kept: as in ``rotsign_encode``, a multiple of 8.
        weights: fp32 ``[W]`` for a weighted sum instead of the mean.
    """
    check_block(block)
    check_kept(kept)
    for grid, first, rest, even in launches(out.numel()):
        rotsign_mean_kernel[grid](
            packed,
            scales,
            signs.view(torch.uint8),
            scales if weights is None else weights,
            out,
            *factors(block),
            packed.stride(0),
            scales.stride(0),
            8 * signs.stride(0),
            len(packed),
            first,
            rest,
            -(-rest // block) * block,
            BLOCK=block,
            KEPT=kept,
            WEIGHTED=weights is not None,
            EVEN=even,
            **options("rotsign_mean", out, 1),
        )
