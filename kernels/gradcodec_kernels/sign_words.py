"""The random signs of ``rotsign``: numpy's PCG64, every word by a jump of its own."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradcodec_kernels.launch import options

WORDS = 256
"""Words of a program, a power of two."""

_MULTIPLIER = 0x2360ED051FC65DA44385DF649FCCF645
_MASK = (1 << 128) - 1


@triton.jit
def jumped(high, low, T):
    """``a s + c`` modulo ``2**128``, where ``T`` points to the halves of ``a`` and of ``c``."""
    a_high = tl.load(T).to(tl.uint64, bitcast=True)
    a_low = tl.load(T + 1).to(tl.uint64, bitcast=True)
    c_high = tl.load(T + 2).to(tl.uint64, bitcast=True)
    c_low = tl.load(T + 3).to(tl.uint64, bitcast=True)
    product = low * a_low
    carried = tl.umulhi(low, a_low) + high * a_low + low * a_high
    total = product + c_low
    return carried + c_high + (total < product).to(tl.uint64), total


@triton.jit(do_not_specialize=["count"])
def sign_words_kernel(TABLE, OUT, count, BITS: tl.constexpr, LANE_BITS: tl.constexpr):
    """Row ``k`` of ``TABLE`` jumps ``2**k`` words ahead; row ``BITS`` is the state of word 0."""
    program = tl.program_id(0)
    lane = tl.arange(0, 1 << LANE_BITS)
    high = tl.load(TABLE + 4 * BITS).to(tl.uint64, bitcast=True)
    low = tl.load(TABLE + 4 * BITS + 1).to(tl.uint64, bitcast=True)
    # Jumps commute: those that all words of a program make are made once, on scalars.
    for k in range(LANE_BITS, BITS):
        to_high, to_low = jumped(high, low, TABLE + 4 * k)
        set_ = (program >> (k - LANE_BITS)) & 1
        high = tl.where(set_ == 1, to_high, high)
        low = tl.where(set_ == 1, to_low, low)
    high += tl.zeros([1 << LANE_BITS], tl.uint64)
    low += tl.zeros([1 << LANE_BITS], tl.uint64)
    for k in tl.static_range(LANE_BITS):
        to_high, to_low = jumped(high, low, TABLE + 4 * k)
        set_ = (lane >> k) & 1
        high = tl.where(set_ == 1, to_high, high)
        low = tl.where(set_ == 1, to_low, low)
    turn = high >> 58
    mixed = high ^ low
    word = (mixed >> turn) | (mixed << ((64 - turn) & 63))
    at = program.to(tl.int64) * (1 << LANE_BITS) + lane
    tl.store(OUT + at, word.to(tl.int64, bitcast=True), mask=at < count)


def sign_words(out: Tensor, *, state: int, increment: int) -> None:
    """Write the next ``len(out)`` raw words of a PCG64 (O'Neill 2014, XSL-RR 128/64).

    A word is the state after its step, its halves combined and turned by its top six bits. The
    state of word ``i`` is reached by jumps of powers of two (Brown 1994), so no word waits for
    another.

    Args:
        out: int64 ``[words]``, contiguous; fewer than ``2**31``.
        state: of the generator, 128 bits, as numpy shows it.
        increment: likewise.
    """
    if not len(out):
        return
    lane_bits = WORDS.bit_length() - 1
    bits = max(lane_bits, (len(out) - 1).bit_length())
    a, c, table = _MULTIPLIER, increment, []
    first = (a * state + c) & _MASK
    for _ in range(bits):
        table.append((a, c))
        a, c = a * a & _MASK, (a + 1) * c & _MASK
    rows = [[*_halves(a), *_halves(c)] for a, c in table] + [[*_halves(first), 0, 0]]
    there = torch.tensor(rows, dtype=torch.int64).to(out.device)
    grid = (-(-len(out) // WORDS),)
    sign_words_kernel[grid](
        there, out, len(out), BITS=bits, LANE_BITS=lane_bits, **options("sign_words", out)
    )


def _halves(number: int) -> tuple[int, int]:
    """The high and the low 64 bits as signed integers."""
    high, low = number >> 64, number & (_MASK >> 64)
    return high - ((high >> 63) << 64), low - ((low >> 63) << 64)
