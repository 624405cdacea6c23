"""Mean of W payloads that share their scales: codes are added as integers, many in a word."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gradcodec_kernels.launch import Rotation, launches, options, payload
from gradcodec_kernels.tiles import (
    CHUNK,
    SIDE,
    load_scales,
    rotated_back,
    store_tile,
    tile_offsets,
)
from gradcodec_kernels.unpack import load_words

RANKS = tl.constexpr(16)
"""Ranks that are added as integers before the sum becomes floats: 17 codes of 4 bits fit a byte."""


@triton.jit
def lanes(words, BITS: tl.constexpr):
    """Words ``[R, C]`` to ``[R, C, k]``: every code alone in a byte (of 8 bits: in two bytes)."""
    if BITS == 8:
        return tl.join(words, words >> 8) & 0x00FF00FF
    elif BITS == 4:
        return tl.join(words, words >> 4) & 0x0F0F0F0F
    elif BITS == 2:
        x = tl.join(words, words >> 4)
        x = tl.join(x, x >> 2) & 0x03030303
        return tl.reshape(x, (words.shape[0], words.shape[1], 4))
    else:
        x = tl.join(words, words >> 4)
        x = tl.join(x, x >> 2)
        x = tl.join(x, x >> 1) & 0x01010101
        return tl.reshape(x, (words.shape[0], words.shape[1], 8))


@triton.jit
def in_order(sums, BITS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Sums in lanes ``[R, C, k]`` to fp32 ``[ROWS, COLS]`` in the order of the codes."""
    if BITS == 8:
        each = tl.join(sums & 0xFFFF, (sums >> 16) & 0xFFFF)
    else:
        low = tl.join(sums & 255, (sums >> 16) & 255)
        high = tl.join((sums >> 8) & 255, (sums >> 24) & 255)
        each = tl.reshape(tl.join(low, high), (sums.shape[0], sums.shape[1], sums.shape[2], 4))
    return tl.reshape(tl.permute(each, (0, 1, 3, 2)), (ROWS, COLS)).to(tl.float32)


@triton.jit(do_not_specialize=["first", "rest"])
def decode_sum_shared_kernel(
    P,
    S,
    LEFT,
    RIGHT,
    OUT,
    packed_stride,
    first,
    rest,
    W: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROTATE: tl.constexpr,
    EVEN: tl.constexpr,
):
    """A program owns a chunk of all payloads; see ``decode_sum_shared``."""
    chunk = tl.program_id(0).to(tl.int64) + first
    ROWS: tl.constexpr = SIDE if ROTATE else CHUNK // BLOCK
    COLS: tl.constexpr = SIDE if ROTATE else BLOCK
    ZERO: tl.constexpr = 128.0 if BITS == 8 else (8.0 if BITS == 4 else 1.5)
    whole: tl.constexpr = EVEN or ROTATE
    K: tl.constexpr = 2 if BITS == 8 else 8 // BITS
    total = tl.zeros([ROWS, COLS], tl.float32)
    for start in tl.static_range(0, W, RANKS):
        sums = tl.zeros([CHUNK // BLOCK, BLOCK * BITS // 32, K], tl.int32)
        for w in tl.static_range(start, min(start + RANKS, W)):
            words = load_words(
                P + w * tl.cast(packed_stride, tl.int64), chunk, rest, BITS, BLOCK, whole
            )
            sums += lanes(words, BITS)
        total += in_order(sums, BITS, ROWS, COLS)
    levels = W - 2.0 * total if BITS == 1 else total - W * ZERO
    y = levels * (load_scales(S, chunk, rest, BLOCK, ROTATE, EVEN) * (1.0 / W))
    if ROTATE:
        y = rotated_back(y, LEFT, RIGHT)
    store_tile(OUT + chunk * CHUNK, tile_offsets(ROWS, COLS), y, rest, EVEN)


def decode_sum_shared(
    packed: Tensor,
    scales: Tensor,
    out: Tensor,
    *,
    bits: int,
    block: int,
    rotation: Rotation | None = None,
) -> None:
    """``(sum of codes - W zero) (delta / W)``; equal to the reference's bits unless rotated.

    Args:
        packed: uint8 ``[W, bytes]``, as in ``decode_mean``.
        scales: bf16 ``[blocks]``.
        out: ``[n]``, fp32, bf16 or fp16, written.
        bits: as in ``encode``, like the next two.
        block: values that share a scale.
        rotation: rotate back, once, after the mean.
    """
    left, right = rotation or (scales, scales)
    for grid, first, rest, even in launches(out.numel()):
        codes = payload(packed, even or rotation is not None)
        decode_sum_shared_kernel[grid](
            codes,
            scales,
            left,
            right,
            out,
            codes.stride(0),
            first,
            rest,
            W=len(packed),
            BITS=bits,
            BLOCK=block,
            ROTATE=rotation is not None,
            EVEN=even,
            **options("decode_sum_shared", out, bits),
        )
