"""The start of every decoder: from words of packed codes to the mean of their values."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from gradcodec_kernels.gaussian import gaussian_levels
from gradcodec_kernels.tiles import CHUNK, load_scales, side_by_side, tile_offsets

GROUP = tl.constexpr(8)
"""Ranks in one turn of a decoder's loop; up to two groups of ranks are unrolled, with no loop."""


@triton.jit
def load_words(P, chunk, rest, BITS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """int32 ``[ROWS, BLOCK * BITS / 32]``: the packed codes of a chunk.

    ``P`` points to words if payloads are aligned to words, else to bytes.
    """
    ROWS: tl.constexpr = CHUNK // BLOCK
    WORDS: tl.constexpr = BLOCK * BITS // 32
    if P.dtype.element_ty == tl.int32:
        return tl.load(P + chunk * (ROWS * WORDS) + tile_offsets(ROWS, WORDS))
    else:
        place = tl.arange(0, 4)[None, None, :]
        offsets = tile_offsets(ROWS, WORDS)[:, :, None] * 4 + place
        P += chunk * (ROWS * WORDS * 4)
        if WHOLE:
            each = tl.load(P + offsets)
        else:
            each = tl.load(P + offsets, mask=offsets * (8 // BITS) < rest, other=0)
        return tl.sum(each.to(tl.int32) << (place * 8), axis=2)


@triton.jit
def spread(words, BITS: tl.constexpr):
    """Words ``[R, C]`` to ``[R, C, k]``, each with four codes (two of 8 bits) in its low bits.

    The codes start at bit 1, or at bit 2 if a code is one bit.
    """
    UP: tl.constexpr = 2 if BITS == 1 else 1
    x = tl.join(words << UP, words >> (16 - UP))
    if BITS <= 2:
        x = tl.join(x, x >> 8)
    if BITS == 1:
        x = tl.join(x, x >> 4)
    return tl.reshape(x, (words.shape[0], words.shape[1], 2 if BITS == 8 else 8 // BITS))


@triton.jit
def level(x, magic, BITS: tl.constexpr, GAUSSIAN: tl.constexpr, J: tl.constexpr):
    """fp32 ``(code - zero) * 2**(BITS * J)`` of code ``J``; for 1 bit ``(2 code - 1) * 2**J``.

    With Gaussian levels, ``zero`` is the middle of the codes.

    The code is put into the mantissa of 2**22, whose bits are ``magic``. That is one instruction if
    the compiler does not know ``magic``; with two constants it would be two.
    """
    UP: tl.constexpr = 2 if BITS == 1 else 1
    EVENLY: tl.constexpr = (
        128.0 if BITS == 8 else (8.0 if BITS == 4 else (1.5 if BITS == 2 else 1.0))
    )
    ZERO: tl.constexpr = 7.5 if GAUSSIAN else EVENLY
    mask: tl.constexpr = (2**BITS - 1) << (UP + BITS * J)
    offset: tl.constexpr = 4194304.0 + ZERO * 2.0 ** (BITS * J)
    return ((x & mask) | magic).to(tl.float32, bitcast=True) - offset


@triton.jit
def added(
    acc,
    x,
    step,
    weight,
    magic,
    BITS: tl.constexpr,
    GAUSSIAN: tl.constexpr,
    J: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    """``acc`` plus the values of code ``J``. Products are exact, so fusing them changes nothing."""
    if GAUSSIAN:
        value = gaussian_levels(level(x, magic, BITS, GAUSSIAN, J), J)
        small = tl.broadcast_to(step, value.shape)
    else:
        value = level(x, magic, BITS, GAUSSIAN, J)
        small = tl.broadcast_to(step * 2.0 ** (-BITS * J), value.shape)
    if WEIGHTED:
        return acc + (value * small) * weight
    else:
        return tl.fma(value, small, acc)


@triton.jit
def add_rank(
    P,
    S,
    WEIGHTS,
    w,
    a0,
    a1,
    a2,
    a3,
    chunk,
    rest,
    magic,
    packed_stride,
    scales_stride,
    BITS: tl.constexpr,
    GAUSSIAN: tl.constexpr,
    BLOCK: tl.constexpr,
    WEIGHTED: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Add the values of rank ``w`` to sums of every fourth (8 bits: every second) code."""
    words = load_words(P + w * tl.cast(packed_stride, tl.int64), chunk, rest, BITS, BLOCK, WHOLE)
    step = load_scales(S + w * tl.cast(scales_stride, tl.int64), chunk, rest, BLOCK, False, WHOLE)[
        :, :, None
    ]
    if BITS == 1:
        step = -step
    weight = tl.load(WEIGHTS + w) if WEIGHTED else 1.0
    x = spread(words, BITS)
    a0 = added(a0, x, step, weight, magic, BITS, GAUSSIAN, 0, WEIGHTED)
    a1 = added(a1, x, step, weight, magic, BITS, GAUSSIAN, 1, WEIGHTED)
    if BITS < 8:
        a2 = added(a2, x, step, weight, magic, BITS, GAUSSIAN, 2, WEIGHTED)
        a3 = added(a3, x, step, weight, magic, BITS, GAUSSIAN, 3, WEIGHTED)
    return a0, a1, a2, a3


@triton.jit
def mean_tile(
    P,
    S,
    WEIGHTS,
    chunk,
    rest,
    magic,
    packed_stride,
    scales_stride,
    W: tl.constexpr,
    BITS: tl.constexpr,
    GAUSSIAN: tl.constexpr,
    BLOCK: tl.constexpr,
    WEIGHTED: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """fp32 ``[ROWS, COLS]``: mean (or weighted sum) over ``W`` ranks, in their order."""
    K: tl.constexpr = 2 if BITS == 8 else 8 // BITS
    a0 = tl.zeros([CHUNK // BLOCK, BLOCK * BITS // 32, K], tl.float32)
    a1 = a0
    a2 = a0
    a3 = a0
    TURNS: tl.constexpr = W // GROUP if W > 2 * GROUP else 0
    for turn in range(TURNS):
        for i in tl.static_range(GROUP):
            a0, a1, a2, a3 = add_rank(
                P,
                S,
                WEIGHTS,
                turn * GROUP + i,
                a0,
                a1,
                a2,
                a3,
                chunk,
                rest,
                magic,
                packed_stride,
                scales_stride,
                BITS,
                GAUSSIAN,
                BLOCK,
                WEIGHTED,
                WHOLE,
            )
    for w in tl.static_range(TURNS * GROUP, W):
        a0, a1, a2, a3 = add_rank(
            P,
            S,
            WEIGHTS,
            w,
            a0,
            a1,
            a2,
            a3,
            chunk,
            rest,
            magic,
            packed_stride,
            scales_stride,
            BITS,
            GAUSSIAN,
            BLOCK,
            WEIGHTED,
            WHOLE,
        )
    if BITS == 8:
        total = tl.reshape(tl.join(a0, a1), (ROWS, COLS))
    else:
        total = tl.reshape(side_by_side(a0, a1, a2, a3), (ROWS, COLS))
    if WEIGHTED:
        return total
    else:
        return total * (1.0 / W)


@triton.jit
def load_codes(
    P,
    total,
    BITS: tl.constexpr,
    SENT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """int32 ``[ROWS, COLS]``: codes at ``P``, read by bytes; zero from value ``total`` on.

    The first ``SENT`` codes of every row are stored, in whole bytes; the others are zero.
    """
    PER: tl.constexpr = 8 // BITS
    row = tl.arange(0, ROWS)[:, None]
    byte = tl.arange(0, COLS // PER)[None, :]
    at = P + row * (SENT // PER) + byte
    if EVEN and SENT == COLS:
        each = tl.load(at)
    else:
        mask = (byte < SENT // PER) & (row * COLS + byte * PER < total)
        each = tl.load(at, mask=mask, other=0)
    place = (tl.arange(0, PER) * BITS)[None, None, :]
    codes = (each.to(tl.int32)[:, :, None] >> place) & ((1 << BITS) - 1)
    return tl.reshape(codes, (ROWS, COLS))
