"""The sixteen levels that fit a Gaussian, ``gradcodec.reference.gaussian``: codes and values."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

TOP = tl.constexpr(104.0)
FACTOR = tl.constexpr(0.026217)
ROUND = tl.constexpr(12582912.0)
"""1.5 * 2**23: a sum with it has no bits below one."""


@triton.jit
def gaussian_codes(y, inverse):
    """int32 codes of the nearest levels: the middles below a magnitude, counted by bisection."""
    size = tl.abs(y * inverse)
    four = size > 42.0
    two = size > tl.where(four, 70.5, 20.0)
    middle = tl.where(four, tl.where(two, 91.5, 55.0), tl.where(two, 30.5, 10.0))
    above = four.to(tl.int32) * 4 + two.to(tl.int32) * 2 + (size > middle).to(tl.int32)
    return (above + 8) ^ tl.where(y < 0, 15, 0)


@triton.jit
def gaussian_levels(t, J: tl.constexpr):
    """fp32 values, in units of a step, of ``t = (code - 7.5) * 2**(4 J)``.

    An odd polynomial is within 0.4 of each of the whole numbers, and is rounded to them: that takes
    half the instructions of looking them up.
    """
    A: tl.constexpr = 10.1032 * 2.0 ** (-4 * J)
    B: tl.constexpr = 0.0017385 * 2.0 ** (-12 * J)
    C: tl.constexpr = 0.00114183 * 2.0 ** (-20 * J)
    square = t * t
    factor = tl.fma(square, tl.full(t.shape, C, tl.float32), tl.full(t.shape, B, tl.float32))
    factor = tl.fma(square, factor, tl.full(t.shape, A, tl.float32))
    return tl.fma(t, factor, tl.full(t.shape, ROUND, tl.float32)) - ROUND
