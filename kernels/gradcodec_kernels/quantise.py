"""The end of every encoder: steps, codes, bytes, and what is left over."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from gradcodec_kernels.gaussian import FACTOR as GAUSSIAN_FACTOR
from gradcodec_kernels.gaussian import TOP as GAUSSIAN_TOP
from gradcodec_kernels.gaussian import gaussian_codes, gaussian_levels
from gradcodec_kernels.tiles import (
    CHUNK,
    SIDE,
    block_max,
    side_by_side,
    store_cast,
    store_tile,
    tile_offsets,
)

LARGEST = tl.constexpr(3e38)
"""Cap of levels: nearer to the end of the fp32 range, rounding to bf16 could give infinity."""
HEADROOM = tl.constexpr(1.0 + 2.0**-7)
"""With stochastic rounding nothing may be clipped; see ``gradcodec.reference.grid``."""


@triton.jit
def block_sum(y, ROTATE: tl.constexpr):
    """Sum of every row ``[ROWS, 1]``, or of a rotated tile, as a scalar."""
    if ROTATE:
        return tl.sum(y)
    else:
        return tl.sum(y, 1, keep_dims=True)


@triton.jit
def divided(a, B: tl.constexpr):
    """``a / B`` rounded once, for a constant B > 0: a quotient and its correction (Markstein)."""
    inverse = tl.zeros_like(a) + 1.0 / B
    quotient = a * inverse
    remainder = tl.fma(quotient, tl.zeros_like(a) - B, a)  # exact
    return tl.fma(remainder, inverse, quotient)


@triton.jit
def block_delta(
    y,
    rest,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    SCALE: tl.constexpr,
    GAUSSIAN: tl.constexpr,
    ROTATE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    EVEN: tl.constexpr,
):
    """fp32 step of every row, before rounding to bf16; see ``gradcodec.reference.grid``."""
    EVENLY: tl.constexpr = (
        127.0 if BITS == 8 else (7.0 if BITS == 4 else (1.5 if BITS == 2 else 1.0))
    )
    TOP: tl.constexpr = GAUSSIAN_TOP if GAUSSIAN else EVENLY
    if SCALE == "absmax":
        peak = tl.minimum(block_max(y, ROTATE), LARGEST)
        delta = peak if BITS == 1 else divided(peak, TOP)
        if STOCHASTIC:
            delta = delta * HEADROOM
        return delta
    else:
        if EVEN or ROTATE:
            count = 1.0 * BLOCK
        else:
            ROWS: tl.constexpr = CHUNK // BLOCK
            first = tl.arange(0, ROWS)[:, None] * BLOCK
            count = tl.minimum(tl.maximum(rest - first, 1), BLOCK).to(tl.float32)
        if SCALE == "l1":
            total = block_sum(tl.abs(y), ROTATE)
            size = tl.div_rn(total, tl.zeros_like(total) + count)
            return tl.minimum(size * (1.2479 if BITS == 2 else 1.0), LARGEST / TOP)
        else:
            total = block_sum(y * y, ROTATE)
            size = tl.sqrt_rn(tl.div_rn(total, tl.zeros_like(total) + count))
            EVENLY_BY: tl.constexpr = (
                0.0308
                if BITS == 8
                else (0.3535 if BITS == 4 else (0.9957 if BITS == 2 else 0.7979))
            )
            FACTOR: tl.constexpr = GAUSSIAN_FACTOR if GAUSSIAN else EVENLY_BY
            return tl.minimum(size * FACTOR, LARGEST / TOP)


@triton.jit
def stored_scales(
    S, delta, chunk, rest, BLOCK: tl.constexpr, ROTATE: tl.constexpr, EVEN: tl.constexpr
):
    """Store steps as bf16, and return the rounded steps in fp32."""
    ROWS: tl.constexpr = CHUNK // BLOCK
    rounded = store_cast(delta, tl.bfloat16)
    if ROTATE:
        tl.store(S + chunk, rounded)
    else:
        row = tl.arange(0, ROWS)[:, None]
        if EVEN:
            tl.store(S + chunk * ROWS + row, rounded)
        else:
            tl.store(S + chunk * ROWS + row, rounded, mask=row * BLOCK < rest)
    return rounded.to(tl.float32)


@triton.jit
def random_bytes(low, high, chunk, ROWS: tl.constexpr, COLS: tl.constexpr):
    """int32 ``[ROWS, COLS]``: 4,096 bytes of Philox4x32-7, 16 for each counter."""
    start = chunk * (CHUNK // 16)  # a multiple of 256: adding up to 255 never carries
    c0 = (start & 0xFFFFFFFF).to(tl.uint32) + tile_offsets(ROWS, COLS // 16).to(tl.uint32)
    c1 = (start >> 32).to(tl.uint32) + c0 * 0
    c2 = c0 * 0
    c3 = c0 * 0
    k0 = low.to(tl.uint32, bitcast=True)
    k1 = high.to(tl.uint32, bitcast=True)
    for _ in tl.static_range(7):
        p0 = c0
        p2 = c2
        c0 = tl.umulhi(p2, tl.full(p2.shape, 0xCD9E8D57, tl.uint32)) ^ c1 ^ k0
        c1 = p2 * 0xCD9E8D57
        c2 = tl.umulhi(p0, tl.full(p0.shape, 0xD2511F53, tl.uint32)) ^ c3 ^ k1
        c3 = p0 * 0xD2511F53
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    words = side_by_side(c0, c1, c2, c3).to(tl.int32, bitcast=True)
    each = side_by_side(words & 255, (words >> 8) & 255, (words >> 16) & 255, (words >> 24) & 255)
    return tl.reshape(each, (ROWS, COLS))


@triton.jit
def codes_of(
    y,
    step,
    low,
    high,
    chunk,
    BITS: tl.constexpr,
    GAUSSIAN: tl.constexpr,
    ROTATE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """int32 codes of a tile: ``clamp(floor(y / step + zero + u))``."""
    ROWS: tl.constexpr = SIDE if ROTATE else CHUNK // BLOCK
    COLS: tl.constexpr = SIDE if ROTATE else BLOCK
    ZERO: tl.constexpr = 128.0 if BITS == 8 else (8.0 if BITS == 4 else (1.5 if BITS == 2 else 0.5))
    LOW: tl.constexpr = 1.0 if BITS >= 4 else 0.0
    HIGH: tl.constexpr = 2.0**BITS - 1.0
    if BITS == 1 and not STOCHASTIC:
        return (y < 0).to(tl.int32)
    else:
        inverse = tl.where(step > 0, tl.div_rn(tl.zeros_like(step) + 1.0, step), 0.0)
        if GAUSSIAN:
            return gaussian_codes(y, inverse)
        t = y * inverse
        if BITS == 1:
            t = t * -0.5
        if STOCHASTIC:
            u = random_bytes(low, high, chunk, ROWS, COLS).to(tl.float32)
            t = t + tl.fma(
                u,
                tl.full(u.shape, 1.0 / 256.0, tl.float32),
                tl.full(u.shape, ZERO + 0.5 / 256.0, tl.float32),
            )
        else:
            t = t + (ZERO + 0.5)
        # The clamp leaves nothing negative, so that truncation is a floor. A NaN becomes LOW.
        return tl.minimum(tl.maximum(t, LOW), HIGH).to(tl.int32)


@triton.jit
def rest_of(y, codes, step, BITS: tl.constexpr, GAUSSIAN: tl.constexpr):
    """``y`` minus the values of its codes. The product in it is exact."""
    if GAUSSIAN:
        level = -gaussian_levels(codes.to(tl.float32) - 7.5, 0)
        return tl.fma(level, tl.broadcast_to(step, level.shape), y)
    elif BITS == 1:
        return y - tl.where(codes > 0, -step, step)
    else:
        ZERO: tl.constexpr = 128.0 if BITS == 8 else (8.0 if BITS == 4 else 1.5)
        level = ZERO - codes.to(tl.float32)
        return tl.fma(level, tl.broadcast_to(step, level.shape), y)


@triton.jit
def store_codes(
    P,
    codes,
    chunk,
    rest,
    BITS: tl.constexpr,
    ROTATE: tl.constexpr,
    BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Pack a tile of codes, lowest bits first, and store its bytes."""
    ROWS: tl.constexpr = SIDE if ROTATE else CHUNK // BLOCK
    COLS: tl.constexpr = SIDE if ROTATE else BLOCK
    PER: tl.constexpr = 8 // BITS
    whole: tl.constexpr = EVEN or ROTATE
    if not whole:  # values beyond the end become zero bits in the last byte
        codes = tl.where(tile_offsets(ROWS, COLS) < rest, codes, 0)
    if PER == 1:
        packed = codes.to(tl.uint8)
    else:
        lanes = tl.reshape(codes, (ROWS, COLS // PER, PER))
        packed = tl.sum(lanes << (tl.arange(0, PER) * BITS)[None, None, :], axis=2).to(tl.uint8)
    offsets = tile_offsets(ROWS, COLS // PER)
    P += chunk * (CHUNK // PER)
    if whole:
        tl.store(P + offsets, packed)
    else:
        tl.store(P + offsets, packed, mask=offsets * PER < rest)


@triton.jit
def encode_tile(
    y,
    offsets,
    E,
    P,
    S,
    low,
    high,
    chunk,
    rest,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    SCALE: tl.constexpr,
    GAUSSIAN: tl.constexpr,
    ROTATE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    EF: tl.constexpr,
    EVEN: tl.constexpr,
):
    """The end of every encoder: steps, codes, bytes, and what is left over."""
    # A rotated tile has one step, or one for each of its rows of 64; padding is a part of it.
    WHOLE: tl.constexpr = ROTATE and BLOCK == CHUNK
    FULL: tl.constexpr = EVEN or ROTATE
    delta = block_delta(y, rest, BITS, BLOCK, SCALE, GAUSSIAN, WHOLE, STOCHASTIC, FULL)
    step = stored_scales(S, delta, chunk, rest, BLOCK, WHOLE, FULL)
    codes = codes_of(y, step, low, high, chunk, BITS, GAUSSIAN, ROTATE, STOCHASTIC, BLOCK)
    if EF:
        left_over = rest_of(y, codes, step, BITS, GAUSSIAN)
        store_tile(E + chunk * CHUNK, offsets, left_over, rest, EVEN or ROTATE)
    store_codes(P, codes, chunk, rest, BITS, ROTATE, BLOCK, EVEN)
