"""``z = left^T grad right`` in slices of its sum, then the sum of the slices, then ``encode``."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradcodec_kernels.encode import encode
from gradcodec_kernels.launch import options
from gradcodec_kernels.tiles import INTERP

TILES = {2: (64, 64, 128), 4: (32, 32, 64)}
"""Most rows, terms of the sum and columns of a product, by bytes of an operand's number: what fits
into registers without spilling (``benchmarks/kernels/aot_gate.py``)."""
PROGRAMS = 512
"""About this many are enough to fill a device; sums are cut into slices until there are."""


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """``a^T b`` in fp32; 16-bit operands as they are, except in the interpreter."""
    if PRECISION == "16" and not INTERP:
        return tl.dot(tl.trans(a), b)
    elif PRECISION == "16":
        return tl.dot(tl.trans(a.to(tl.float32)), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(tl.trans(a.to(tl.float32)), b.to(tl.float32), input_precision=PRECISION)


@triton.jit
def project_kernel(
    A,
    B,
    OUT,
    depth,
    rows,
    cols,
    a_depth,
    a_row,
    b_depth,
    slice_depth,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``OUT[slice] = A^T B`` over a slice of ``A [depth, rows]`` and ``B [depth, cols]``."""
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    piece = tl.program_id(2).to(tl.int64)
    first = piece * slice_depth
    inner = tl.arange(0, DEEP)
    a = A + first * a_depth + (inner[:, None] * a_depth + row[None, :] * a_row)
    b = B + first * b_depth + (inner[:, None] * b_depth + col[None, :])
    left = tl.minimum(depth - first, slice_depth).to(tl.int32)
    acc = tl.zeros([ROWS, COLS], tl.float32)
    for at in range(0, slice_depth, DEEP):
        inside = (at + inner < left)[:, None]
        x = tl.load(a, mask=inside & (row < rows)[None, :], other=0.0)
        y = tl.load(b, mask=inside & (col < cols)[None, :], other=0.0)
        acc += product(x, y, PRECISION)
        a += tl.cast(a_depth, tl.int64) * DEEP
        b += tl.cast(b_depth, tl.int64) * DEEP
    out = OUT + piece * rows * cols + (row[:, None].to(tl.int64) * cols + col[None, :])
    tl.store(out, acc, mask=(row < rows)[:, None] & (col < cols)[None, :])


@triton.jit
def sum_kernel(PARTS, OUT, numel, slices, BLOCK: tl.constexpr):
    """The slices of a sum, added in their order."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(slices):
        total += tl.load(PARTS + i, mask=i < numel, other=0.0)
        PARTS += tl.cast(numel, tl.int64)
    tl.store(OUT + i, total, mask=i < numel)


def transposed_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """``out = a^T b`` of ``[depth, rows]``, any strides, and ``[depth, cols]``, rows contiguous."""
    depth, rows = a.shape
    cols = b.shape[1]
    exact = precision(a, b)
    most, deep, wide = TILES[2 if exact == "16" else 4]
    tall = max(16, min(most, triton.next_power_of_2(rows)))
    grid = (triton.cdiv(cols, wide), triton.cdiv(rows, tall))
    slices = max(1, min(triton.cdiv(depth, 4 * deep), PROGRAMS // (grid[0] * grid[1])))
    slice_depth = triton.cdiv(triton.cdiv(depth, slices), deep) * deep
    slices = triton.cdiv(depth, slice_depth)
    parts = out if slices == 1 else torch.empty(slices, *out.shape, device=out.device)
    project_kernel[(*grid, slices)](
        a,
        b,
        parts,
        depth,
        rows,
        cols,
        a.stride(0),
        a.stride(1),
        b.stride(0),
        slice_depth,
        ROWS=tall,
        COLS=wide,
        DEEP=deep,
        PRECISION=exact,
        **options("project_quantise", b),
    )
    if slices > 1:
        numel = out.numel()
        sum_kernel[(triton.cdiv(numel, 1024),)](
            parts, out, numel, slices, BLOCK=1024, **options("project_quantise", out)
        )


def precision(a: Tensor, b: Tensor) -> str:
    """Operands of 16 bits are multiplied exactly; of fp32, in three parts where that is fast."""
    if a.dtype == b.dtype and a.element_size() == 2:
        return "16"
    return "ieee" if torch.version.hip else "tf32x3"


def project_quantise(
    grad: Tensor,
    left: Tensor,
    packed: Tensor,
    scales: Tensor,
    code: Tensor,
    *,
    bits: int,
    block: int,
    scale: str,
    right: Tensor | None = None,
) -> None:
    """Project, then ``encode`` the code to nearest.

    Args:
        grad: ``[m, n]``, rows contiguous, floating; like the other matrices.
        left: ``[m, r]``.
        packed: uint8, written.
        scales: bf16, written.
        code: ``z``, fp32 ``[r, n]`` or ``[r, s]``, written.
        bits: of ``encode``, like the next two.
        block: values that share a scale.
        scale: what the step comes from.
        right: ``[n, s]``.
    """
    if right is None:
        transposed_product(left, grad, code)
    else:
        half = torch.empty(left.shape[1], grad.shape[1], device=grad.device)
        transposed_product(left, grad, half)
        transposed_product(half.T, right, code)
    encode(code.view(-1), packed, scales, bits=bits, block=block, scale=scale)
