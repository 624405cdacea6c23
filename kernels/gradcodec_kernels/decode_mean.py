"""Mean of W payloads: unpack, add in rank order, rotate back once."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gradcodec_kernels.launch import MAGIC, Rotation, check_block, launches, options, payload
from gradcodec_kernels.tiles import CHUNK, SIDE, rotated_back, store_tile, tile_offsets
from gradcodec_kernels.unpack import mean_tile


@triton.jit(do_not_specialize=["magic", "first", "rest"])
def decode_mean_kernel(
    P,
    S,
    WEIGHTS,
    LEFT,
    RIGHT,
    OUT,
    magic,
    packed_stride,
    scales_stride,
    first,
    rest,
    W: tl.constexpr,
    BITS: tl.constexpr,
    GAUSSIAN: tl.constexpr,
    BLOCK: tl.constexpr,
    ROTATE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    EVEN: tl.constexpr,
):
    """A program owns a chunk of all payloads; see ``decode_mean``."""
    chunk = tl.program_id(0).to(tl.int64) + first
    ROWS: tl.constexpr = SIDE if ROTATE else CHUNK // BLOCK
    COLS: tl.constexpr = SIDE if ROTATE else BLOCK
    y = mean_tile(
        P,
        S,
        WEIGHTS,
        chunk,
        rest,
        magic,
        packed_stride,
        scales_stride,
        W,
        BITS,
        GAUSSIAN,
        BLOCK,
        WEIGHTED,
        EVEN or ROTATE,
        ROWS,
        COLS,
    )
    if ROTATE:
        y = rotated_back(y, LEFT, RIGHT)
    store_tile(OUT + chunk * CHUNK, tile_offsets(ROWS, COLS), y, rest, EVEN)


def decode_mean(
    packed: Tensor,
    scales: Tensor,
    out: Tensor,
    *,
    bits: int,
    block: int,
    rotation: Rotation | None = None,
    weights: Tensor | None = None,
    levels: str = "uniform",
) -> None:
    """Mean, or weighted sum, of ``W`` payloads; equal to the reference's bits unless rotated.

    Args:
        packed: uint8 ``[W, bytes]``. Any row stride; multiples of 16 bytes are read fastest.
        scales: bf16 ``[W, blocks]``.
        out: ``[n]``, fp32, bf16 or fp16, written.
        bits: as in ``encode``.
        block: values that share a scale, as in ``encode``.
        rotation: if given, rotate back, once, after the mean; as in ``encode``.
        weights: fp32 ``[W]`` for a weighted sum instead of the mean.
        levels: as in ``encode``.
    """
    check_block(block)
    left, right = rotation or (scales, scales)
    for grid, first, rest, even in launches(out.numel()):
        codes = payload(packed, even or rotation is not None)
        decode_mean_kernel[grid](
            codes,
            scales,
            scales if weights is None else weights,
            left,
            right,
            out,
            MAGIC,
            codes.stride(0),
            scales.stride(0),
            first,
            rest,
            W=len(packed),
            BITS=bits,
            GAUSSIAN=levels == "gaussian",
            BLOCK=block,
            ROTATE=rotation is not None,
            WEIGHTED=weights is not None,
            EVEN=even,
            **options("decode_mean", out, bits),
        )
