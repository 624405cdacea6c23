"""The k largest magnitudes of every chunk, exactly: their threshold is found bit by bit."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradcodec_kernels.launch import options
from gradcodec_kernels.tiles import load_tile, store_cast

MAX_CHUNK = 16384
"""Longest chunk: two counts share an integer, and a program holds the chunk in registers."""

#: Bits of an fp32 magnitude, from the top, that a value of this dtype can set.
_BITS = {torch.bfloat16: 15, torch.float16: 18}


@triton.jit(do_not_specialize=["first", "rest"])
def topk_encode_kernel(
    X,
    E,
    KEPT,
    INDEX,
    first,
    rest,
    K: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    NBITS: tl.constexpr,
    EF: tl.constexpr,
    EVEN: tl.constexpr,
):
    """A program owns a chunk. ``TILE`` is its length rounded up to a power of two."""
    chunk = tl.program_id(0).to(tl.int64) + first
    i = tl.arange(0, TILE)
    y = load_tile(X + chunk * CHUNK, i, rest, EVEN)
    if EF:
        y += load_tile(E + chunk * CHUNK, i, rest, EVEN)
    u = y.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    if TILE > CHUNK:
        u = tl.where(i < CHUNK, u, -1)  # below every threshold, zero included
    # The K-th largest magnitude: the largest threshold that K values reach.
    threshold = 0
    for b in tl.static_range(NBITS):
        candidate = threshold | (1 << (30 - b))
        count = tl.sum((u >= candidate).to(tl.int32), 0)
        threshold = tl.where(count >= K, candidate, threshold)
    above = (u > threshold).to(tl.int32)
    equal = (u == threshold).to(tl.int32)
    # One scan counts both: values above in the low half, equal values in the high half.
    scan = tl.cumsum(above + (equal << 16), 0)
    ties = K - tl.sum(above, 0)
    take = (above == 1) | ((equal == 1) & ((scan >> 16) <= ties))
    place = (scan & 0xFFFF) + tl.minimum(scan >> 16, ties) - 1
    tl.store(KEPT + chunk * K + place, store_cast(y, KEPT.dtype.element_ty), mask=take)
    tl.store(INDEX + chunk * K + place, i.to(tl.int16), mask=take)
    if EF:
        left_over = store_cast(tl.where(take, 0.0, y), E.dtype.element_ty)
        if EVEN:
            tl.store(E + chunk * CHUNK + i, left_over)
        else:
            tl.store(E + chunk * CHUNK + i, left_over, mask=i < rest)


def topk_encode(
    values: Tensor,
    kept: Tensor,
    index: Tensor,
    *,
    k: int,
    chunk: int,
    residual: Tensor | None = None,
) -> None:
    """The ``k`` largest ``|y|`` of every chunk in order of position, ties to the lower one.

    Args:
        values: ``[n]``, fp32, bf16 or fp16.
        kept: ``[chunks, k]`` of the same dtype, written.
        index: int16 ``[chunks, k]``, written.
        k: at most ``chunk``.
        chunk: any length up to ``MAX_CHUNK``; powers of two waste nothing.
        residual: ``[n]``, updated in place: ``y`` without what was kept.
    """
    if chunk > MAX_CHUNK:
        raise ValueError(f"expected a chunk of at most {MAX_CHUNK}, got {chunk}")
    whole, rest = divmod(values.numel(), chunk)
    tile = triton.next_power_of_2(chunk)
    nbits = _BITS.get(values.dtype, 31) if residual is None else 31
    launches = [(whole, 0, chunk, tile == chunk), (min(rest, 1), whole, rest, False)]
    for programs, first, count, even in launches:
        if programs:
            topk_encode_kernel[(programs,)](
                values,
                values if residual is None else residual,
                kept,
                index,
                first,
                count,
                K=k,
                CHUNK=chunk,
                TILE=tile,
                NBITS=nbits,
                EF=residual is not None,
                EVEN=even,
                **options("topk_encode", values, tile),
            )
