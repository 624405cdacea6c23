"""Two bits with two fitted magnitudes: fit the levels of every block, classify, pack."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gradcodec_kernels.launch import check_block, launches, options
from gradcodec_kernels.quantise import store_codes
from gradcodec_kernels.tiles import CHUNK, load_y, store_cast, store_tile

STEPS = tl.constexpr(8)


@triton.jit
def fitted(size, count):
    """fp64 levels ``[ROWS, 1]`` of magnitudes; the first ``count`` of each row are not padding.

    Sums are in fp64, as in the reference, and give its bits except for rare ties.
    """
    wide = size.to(tl.float64)
    total = tl.sum(wide, 1, keep_dims=True)
    count = count.to(tl.float64)
    lo = total / count
    hi = lo
    for _ in tl.static_range(STEPS):
        threshold = ((lo + hi) * 0.5).to(tl.float32)
        large = size > threshold
        n_hi = tl.sum(large.to(tl.int32), 1, keep_dims=True).to(tl.float64)
        sum_hi = tl.sum(tl.where(large, wide, 0.0), 1, keep_dims=True)
        hi = tl.where(n_hi > 0, sum_hi / tl.maximum(n_hi, 1.0), threshold.to(tl.float64))
        rest = tl.where(n_hi < count, total - sum_hi, 0.0)
        lo = rest / tl.maximum(count - n_hi, 1.0)
    return tl.maximum(lo, 0.0), hi


@triton.jit(do_not_specialize=["first", "rest"])
def lloyd_encode_kernel(
    X, E, P, S, first, rest, BLOCK: tl.constexpr, EF: tl.constexpr, EVEN: tl.constexpr
):
    """A program owns a chunk; see ``lloyd_encode``."""
    chunk = tl.program_id(0).to(tl.int64) + first
    ROWS: tl.constexpr = CHUNK // BLOCK
    y, offsets = load_y(X, E, X, X, chunk, rest, BLOCK, False, EF, EVEN)
    size = tl.abs(y)
    row = tl.arange(0, ROWS)[:, None]
    count = tl.minimum(tl.maximum(rest - row * BLOCK, 1), BLOCK)
    lo, hi = fitted(size, count)
    lo = store_cast(lo.to(tl.float32), tl.bfloat16)
    hi = store_cast(hi.to(tl.float32), tl.bfloat16)
    at = S + (chunk * ROWS + row) * 2
    tl.store(at, lo, mask=row * BLOCK < rest)
    tl.store(at + 1, hi, mask=row * BLOCK < rest)
    lo = lo.to(tl.float32)
    hi = hi.to(tl.float32)
    large = size > (lo + hi) * 0.5
    minus = y < 0
    store_codes(
        P, minus.to(tl.int32) | (large.to(tl.int32) << 1), chunk, rest, 2, False, BLOCK, EVEN
    )
    if EF:
        level = tl.where(large, hi, lo)
        left_over = y - tl.where(minus, -level, level)
        store_tile(E + chunk * CHUNK, offsets, left_over, rest, EVEN)


def lloyd_encode(
    values: Tensor,
    packed: Tensor,
    scales: Tensor,
    *,
    block: int,
    residual: Tensor | None = None,
) -> None:
    """``gradcodec.reference.two_means.encode``, bit by bit except for rare ties in fp64 sums.

    Args:
        values: ``[n]``, fp32, bf16 or fp16.
        packed: uint8 ``[ceil(n / 4)]``, written.
        scales: levels, bf16 ``[blocks, 2]``, written.
        block: values that share their levels, a power of two from 64 to 4096.
        residual: ``[n]``, updated in place.
    """
    check_block(block)
    for grid, first, rest, even in launches(values.numel()):
        lloyd_encode_kernel[grid](
            values,
            values if residual is None else residual,
            packed,
            scales,
            first,
            rest,
            BLOCK=block,
            EF=residual is not None,
            EVEN=even,
            **options("lloyd_encode", values, 2),
        )
