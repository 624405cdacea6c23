"""Largest magnitude of every block of what ``encode`` would quantise."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gradcodec_kernels.launch import Rotation, launches, options
from gradcodec_kernels.tiles import CHUNK, block_max, load_y


@triton.jit(do_not_specialize=["first", "rest"])
def chunk_absmax_kernel(
    X,
    E,
    LEFT,
    RIGHT,
    OUT,
    first,
    rest,
    BLOCK: tl.constexpr,
    ROTATE: tl.constexpr,
    EF: tl.constexpr,
    EVEN: tl.constexpr,
):
    """A program owns a chunk; see ``chunk_absmax``."""
    chunk = tl.program_id(0).to(tl.int64) + first
    y, _ = load_y(X, E, LEFT, RIGHT, chunk, rest, BLOCK, ROTATE, EF, EVEN)
    peak = block_max(y, ROTATE)
    if ROTATE:
        tl.store(OUT + chunk, peak)
    else:
        ROWS: tl.constexpr = CHUNK // BLOCK
        row = tl.arange(0, ROWS)[:, None]
        if EVEN:
            tl.store(OUT + chunk * ROWS + row, peak)
        else:
            tl.store(OUT + chunk * ROWS + row, peak, mask=row * BLOCK < rest)


def chunk_absmax(
    values: Tensor,
    out: Tensor,
    *,
    block: int,
    rotation: Rotation | None = None,
    residual: Tensor | None = None,
) -> None:
    """``max |y|`` of every block, ``y = R x + e``; for scales that ranks share.

    Args:
        values: ``[n]``, fp32, bf16 or fp16.
        out: fp32 ``[blocks]``, written.
        block: values that share a scale.
        rotation: rotate chunks of 4,096 first.
        residual: as in ``encode``, read only.
    """
    left, right = rotation or (values, values)
    for grid, first, rest, even in launches(values.numel()):
        chunk_absmax_kernel[grid](
            values,
            values if residual is None else residual,
            left,
            right,
            out,
            first,
            rest,
            BLOCK=block,
            ROTATE=rotation is not None,
            EF=residual is not None,
            EVEN=even,
            **options("chunk_absmax", values, 0),
        )
