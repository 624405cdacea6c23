"""Parts that all kernels share: numbers, tiles in memory, rotation. All ``@triton.jit``.

A program owns one chunk of 4,096 consecutive values, as a tile ``[ROWS, BLOCK]`` whose rows share a
scale, or ``[64, 64]`` where it is rotated. Arithmetic is that of ``gradcodec.reference``, operation
by operation. Kernels are launched with ``enable_fp_fusion=False``; they use ``tl.fma`` where the
product is exact, so that fusing changes no bit.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

CHUNK = tl.constexpr(4096)
SIDE = tl.constexpr(64)
INTERP = tl.constexpr(triton.knobs.runtime.interpret)
"""Whether kernels run in Triton's interpreter. It is decided when triton is first imported."""


@triton.jit
def store_cast(x, dtype: tl.constexpr):
    """fp32 to ``dtype``, to nearest even, also in the interpreter, whose bf16 cast truncates."""
    if dtype == tl.bfloat16 and INTERP:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        # A NaN stays one: rounding up could carry it into infinity or beyond the sign.
        rounded = tl.where(x != x, (bits >> 16) | 0x40, rounded)
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def bdot(a, b):
    """``a @ b`` in fp32, with operands rounded to bf16. The interpreter cannot multiply bf16."""
    a16 = store_cast(a.to(tl.float32), tl.bfloat16)
    b16 = store_cast(b.to(tl.float32), tl.bfloat16)
    if INTERP:
        return tl.dot(a16.to(tl.float32), b16.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a16, b16)


@triton.jit
def side_by_side(a, b, c, d):
    """Join four ``[..., n]`` to ``[..., n, 2, 2]``, with their elements in turn."""
    return tl.join(tl.join(a, c), tl.join(b, d))


@triton.jit
def tile_offsets(ROWS: tl.constexpr, COLS: tl.constexpr):
    """int32 ``[ROWS, COLS]``: 0, 1, 2 ... in row-major order."""
    return tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]


@triton.jit
def load_tile(X, offsets, rest, EVEN: tl.constexpr):
    """fp32 values at ``offsets``, zero from ``rest`` on."""
    if EVEN:
        return tl.load(X + offsets).to(tl.float32)
    else:
        return tl.load(X + offsets, mask=offsets < rest, other=0.0).to(tl.float32)


@triton.jit
def store_tile(X, offsets, tile, rest, EVEN: tl.constexpr):
    """Store fp32 values as the pointer's dtype, only those before ``rest``."""
    rounded = store_cast(tile, X.dtype.element_ty)
    if EVEN:
        tl.store(X + offsets, rounded)
    else:
        tl.store(X + offsets, rounded, mask=offsets < rest)


@triton.jit
def load_scales(S, chunk, rest, BLOCK: tl.constexpr, ROTATE: tl.constexpr, EVEN: tl.constexpr):
    """fp32 steps ``[ROWS, 1]`` of a chunk, or a scalar where it was rotated."""
    ROWS: tl.constexpr = CHUNK // BLOCK
    if ROTATE:
        return tl.load(S + chunk).to(tl.float32)
    else:
        row = tl.arange(0, ROWS)[:, None]
        if EVEN:
            return tl.load(S + chunk * ROWS + row).to(tl.float32)
        else:
            mask = row * BLOCK < rest
            return tl.load(S + chunk * ROWS + row, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def rotated(x, LEFT, RIGHT):
    """``LEFT @ x @ RIGHT`` of a tile [64, 64] with bf16 operands."""
    o = tile_offsets(SIDE, SIDE)
    return bdot(tl.load(LEFT + o), bdot(x, tl.load(RIGHT + o)))


@triton.jit
def rotated_back(y, LEFT, RIGHT):
    """``LEFT^T @ y @ RIGHT^T``: the inverse of ``rotated``."""
    t = tl.arange(0, SIDE)[None, :] * SIDE + tl.arange(0, SIDE)[:, None]
    return bdot(tl.load(LEFT + t), bdot(y, tl.load(RIGHT + t)))


@triton.jit
def load_y(
    X,
    E,
    LEFT,
    RIGHT,
    chunk,
    rest,
    BLOCK: tl.constexpr,
    ROTATE: tl.constexpr,
    EF: tl.constexpr,
    EVEN: tl.constexpr,
):
    """``y = R x + e`` of a chunk, and the offsets of its tile."""
    ROWS: tl.constexpr = SIDE if ROTATE else CHUNK // BLOCK
    COLS: tl.constexpr = SIDE if ROTATE else BLOCK
    offsets = tile_offsets(ROWS, COLS)
    y = load_tile(X + chunk * CHUNK, offsets, rest, EVEN)
    if ROTATE:
        y = rotated(y, LEFT, RIGHT)
    if EF:
        # A rotated residual is as long as the padded chunk.
        y += load_tile(E + chunk * CHUNK, offsets, rest, EVEN or ROTATE)
    return y, offsets


@triton.jit
def block_max(y, ROTATE: tl.constexpr):
    """Largest magnitude of every row ``[ROWS, 1]``, or of a rotated tile, as a scalar.

    Magnitudes have the order of their bits, and a warp finds the largest integer in one
    instruction. A rotated tile is reduced at once: a nested reduction of a product crashes Triton
    3.6 on sm_100.
    """
    bits = y.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    if ROTATE:
        return tl.max(bits).to(tl.float32, bitcast=True)
    else:
        return tl.max(bits, 1, keep_dims=True).to(tl.float32, bitcast=True)
