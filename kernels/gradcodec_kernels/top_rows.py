"""The largest one or two of every 64 neighbours: the position rides in the low bits of the key."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gradcodec_kernels.launch import launches, options
from gradcodec_kernels.tiles import CHUNK, SIDE, load_tile, store_cast, store_tile, tile_offsets


@triton.jit
def largest(y, keys):
    """Value, position and mask of every row's largest key; keys of a row are distinct."""
    best = tl.max(keys, 1)
    hit = keys == best[:, None]
    return tl.sum(tl.where(hit, y, 0.0), 1), (best & (SIDE - 1)) ^ (SIDE - 1), hit


@triton.jit(do_not_specialize=["first", "rest"])
def top_rows_kernel(
    X, E, KEPT, INDEX, first, rest, K: tl.constexpr, EF: tl.constexpr, EVEN: tl.constexpr
):
    """A program owns 64 rows of 64 values; see ``top_rows``."""
    chunk = tl.program_id(0).to(tl.int64) + first
    offsets = tile_offsets(SIDE, SIDE)
    y = load_tile(X + chunk * CHUNK, offsets, rest, EVEN)
    if EF:
        y += load_tile(E + chunk * CHUNK, offsets, rest, EVEN)
    place = tl.arange(0, SIDE)[None, :]
    keys = (y.to(tl.int32, bitcast=True) & 0x7FFFFFC0) | (place ^ (SIDE - 1))
    row = tl.arange(0, SIDE)
    inside = row * SIDE < rest
    value, where, hit = largest(y, keys)
    left_over = tl.where(hit, 0.0, y)
    at = chunk * SIDE + row
    if K == 2:
        second, its_place, its_hit = largest(y, tl.where(hit, -1, keys))
        left_over = tl.where(its_hit, 0.0, left_over)
        value = tl.join(value, second)
        where = tl.join(where, its_place)
        at = at[:, None] * 2 + tl.arange(0, 2)[None, :]
        inside = inside[:, None]
    if EVEN:
        tl.store(KEPT + at, store_cast(value, KEPT.dtype.element_ty))
        tl.store(INDEX + at, where.to(tl.uint8))
    else:
        tl.store(KEPT + at, store_cast(value, KEPT.dtype.element_ty), mask=inside)
        tl.store(INDEX + at, where.to(tl.uint8), mask=inside)
    if EF:
        store_tile(E + chunk * CHUNK, offsets, left_over, rest, EVEN)


def top_rows(
    values: Tensor,
    kept: Tensor,
    index: Tensor,
    *,
    k: int,
    residual: Tensor | None = None,
) -> None:
    """The ``k`` largest ``|y|`` of every 64 values, largest first.

    Magnitudes within ``2**-17`` of each other count as equal; the lower position wins.

    Args:
        values: ``[n]``, fp32, bf16 or fp16.
        kept: ``[rows, k]`` of the same dtype, written.
        index: uint8 ``[rows, k]``, written.
        k: 1 or 2.
        residual: ``[n]``, updated in place: ``y`` without what was kept.
    """
    for grid, first, rest, even in launches(values.numel()):
        top_rows_kernel[grid](
            values,
            values if residual is None else residual,
            kept,
            index,
            first,
            rest,
            K=k,
            EF=residual is not None,
            EVEN=even,
            **options("top_rows", values, 0),
        )
