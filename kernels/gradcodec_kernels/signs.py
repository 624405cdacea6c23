"""What both ``rotsign`` kernels are made of: random signs, butterflies, the factors of a block."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

import math

import triton
import triton.language as tl

from gradcodec_kernels.tiles import CHUNK
from gradcodec_kernels.unpack import load_codes


def factors(block: int) -> tuple[float, float]:
    """Two factors of ``1 / sqrt(block)``, as the reference: a power of two, 1 or ``sqrt(1/2)``."""
    power = block.bit_length() - 1
    return 2.0 ** -(power // 2), math.sqrt(0.5) if power % 2 else 1.0


@triton.jit
def flipped(x, D, chunk, total, ROWS: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    """``D x``: flip the tile's signs where bits at ``D`` are set; ``D`` has ``total`` of them."""
    minus = load_codes(D + chunk * (CHUNK // 8), total, 1, BLOCK, ROWS, BLOCK, EVEN) << 31
    return (x.to(tl.int32, bitcast=True) ^ minus).to(tl.float32, bitcast=True)


@triton.jit
def butterfly(x, SPAN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Sums and differences of values ``SPAN`` apart, in fp32 and in the reference's order."""
    pairs = tl.reshape(x, (ROWS * BLOCK // (2 * SPAN), 2, SPAN))
    a, b = tl.split(tl.permute(pairs, (0, 2, 1)))
    return tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), (ROWS, BLOCK))


@triton.jit
def butterflies(x, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """``H x`` of every row, without the factor: stages of span 1, 2, 4 .. half a block."""
    x = butterfly(x, 1, ROWS, BLOCK)
    x = butterfly(x, 2, ROWS, BLOCK)
    x = butterfly(x, 4, ROWS, BLOCK)
    x = butterfly(x, 8, ROWS, BLOCK)
    x = butterfly(x, 16, ROWS, BLOCK)
    x = butterfly(x, 32, ROWS, BLOCK)
    if BLOCK >= 128:
        x = butterfly(x, 64, ROWS, BLOCK)
    if BLOCK >= 256:
        x = butterfly(x, 128, ROWS, BLOCK)
    if BLOCK >= 512:
        x = butterfly(x, 256, ROWS, BLOCK)
    if BLOCK >= 1024:
        x = butterfly(x, 512, ROWS, BLOCK)
    if BLOCK >= 2048:
        x = butterfly(x, 1024, ROWS, BLOCK)
    if BLOCK >= 4096:
        x = butterfly(x, 2048, ROWS, BLOCK)
    return x


@triton.jit
def values_of(
    minus,
    scale,
    D,
    chunk,
    total,
    after,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    KEPT: tl.constexpr,
    EVEN: tl.constexpr,
):
    """``D H y``, fp32, from signs (1 is minus) and a scale for every row; ``KEPT`` signs were sent.

    Scales include the power of two of ``1 / sqrt(BLOCK)``; ``after`` is the other factor.
    """
    y = tl.where(minus == 1, -scale, scale)
    if KEPT < BLOCK:
        y = tl.where(tl.arange(0, BLOCK)[None, :] < KEPT, y, 0.0)
    return flipped(butterflies(y, ROWS, BLOCK) * after, D, chunk, total, ROWS, BLOCK, EVEN)
