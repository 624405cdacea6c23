"""Mean of W payloads with two fitted levels, in rank order."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gradcodec_kernels.launch import check_block, launches, options
from gradcodec_kernels.tiles import CHUNK, store_tile, tile_offsets
from gradcodec_kernels.unpack import load_codes


@triton.jit(do_not_specialize=["first", "rest"])
def lloyd_mean_kernel(
    P,
    S,
    WEIGHTS,
    OUT,
    packed_stride,
    scales_stride,
    world,
    first,
    rest,
    BLOCK: tl.constexpr,
    WEIGHTED: tl.constexpr,
    EVEN: tl.constexpr,
):
    """A program owns a chunk of all payloads; see ``lloyd_mean``."""
    chunk = tl.program_id(0).to(tl.int64) + first
    ROWS: tl.constexpr = CHUNK // BLOCK
    row = tl.arange(0, ROWS)[:, None]
    inside = row * BLOCK < rest
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for w in range(world):
        its = P + w * tl.cast(packed_stride, tl.int64) + chunk * (CHUNK // 4)
        codes = load_codes(its, rest, 2, BLOCK, ROWS, BLOCK, EVEN)
        at = S + w * tl.cast(scales_stride, tl.int64) + (chunk * ROWS + row) * 2
        lo = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        hi = tl.load(at + 1, mask=inside, other=0.0).to(tl.float32)
        size = tl.where(codes > 1, hi, lo)
        value = tl.where((codes & 1) == 1, -size, size)
        if WEIGHTED:
            value = value * tl.load(WEIGHTS + w)
        total += value
    if not WEIGHTED:
        total = total * tl.div_rn(tl.zeros_like(total) + 1.0, tl.zeros_like(total) + world)
    store_tile(OUT + chunk * CHUNK, tile_offsets(ROWS, BLOCK), total, rest, EVEN)


def lloyd_mean(
    packed: Tensor,
    scales: Tensor,
    out: Tensor,
    *,
    block: int,
    weights: Tensor | None = None,
) -> None:
    """``gradcodec.reference.two_means.decode_mean``, bit by bit.

    Args:
        packed: uint8 ``[W, bytes]``; any row stride.
        scales: bf16 ``[W, 2 blocks]``.
        out: fp32 ``[n]``, written.
        block: as in ``lloyd_encode``.
        weights: fp32 ``[W]`` for a weighted sum instead of the mean.
    """
    check_block(block)
    for grid, first, rest, even in launches(out.numel()):
        lloyd_mean_kernel[grid](
            packed,
            scales,
            scales if weights is None else weights,
            out,
            packed.stride(0),
            scales.stride(0),
            len(packed),
            first,
            rest,
            BLOCK=block,
            WEIGHTED=weights is not None,
            EVEN=even,
            **options("lloyd_mean", out, 2),
        )
