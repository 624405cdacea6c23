"""Encode: rotate, add the residual, quantise, pack, keep what is left; one pass over memory."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gradcodec_kernels.launch import CHUNK, Rotation, check_block, halves, launches, options
from gradcodec_kernels.quantise import encode_tile
from gradcodec_kernels.tiles import load_y


@triton.jit(do_not_specialize=["low", "high", "first", "rest"])
def encode_kernel(
    X,
    E,
    LEFT,
    RIGHT,
    P,
    S,
    low,
    high,
    first,
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
    """A program owns a chunk; see ``encode``."""
    chunk = tl.program_id(0).to(tl.int64) + first
    y, offsets = load_y(X, E, LEFT, RIGHT, chunk, rest, BLOCK, ROTATE, EF, EVEN)
    encode_tile(
        y,
        offsets,
        E,
        P,
        S,
        low,
        high,
        chunk,
        rest,
        BITS,
        BLOCK,
        SCALE,
        GAUSSIAN,
        ROTATE,
        STOCHASTIC,
        EF,
        EVEN,
    )


def encode(
    values: Tensor,
    packed: Tensor,
    scales: Tensor,
    *,
    bits: int,
    block: int,
    scale: str,
    rotation: Rotation | None = None,
    stochastic: bool = False,
    seed: int = 0,
    residual: Tensor | None = None,
    levels: str = "uniform",
) -> None:
    """``y = R x + e``, ``code = Q(y / delta)``, ``e <- y - delta (code - zero)``.

    The maths is that of ``gradcodec.reference.encode``. Without rotation, bytes and residual are
    equal to the reference's, bit by bit. So are scales with ``"absmax"``; those of ``"l1"`` and
    ``"rms"`` are sums in fp32 and may be one bf16 number off. Rotation is by bf16 products, whose
    order of summation is not specified.

    Args:
        values: ``[n]``, fp32, bf16 or fp16.
        packed: uint8 ``[ceil(N bits / 8)]``, written; ``N`` is ``n``, padded to chunks if rotated.
        scales: bf16 ``[ceil(N / block)]``, written.
        bits: 1, 2, 4 or 8.
        block: values that share a scale, a power of two from 64 to 4096; 64 or 4096 if rotated.
        scale: ``"absmax"``, ``"l1"`` or ``"rms"``.
        rotation: if given, rotate chunks of 4,096 first.
        stochastic: dither instead of rounding to nearest.
        seed: 64 bits.
        residual: ``[N]``, updated in place.
        levels: ``"uniform"`` or ``"gaussian"``.
    """
    check_block(block)
    if rotation and block not in (64, CHUNK):
        raise ValueError(f"expected a block of 64 or {CHUNK} with rotation, got {block}")
    low, high = halves(seed)
    left, right = rotation or (values, values)
    for grid, first, rest, even in launches(values.numel()):
        encode_kernel[grid](
            values,
            values if residual is None else residual,
            left,
            right,
            packed,
            scales,
            low,
            high,
            first,
            rest,
            BITS=bits,
            BLOCK=block,
            SCALE=scale,
            GAUSSIAN=levels == "gaussian",
            ROTATE=rotation is not None,
            STOCHASTIC=stochastic,
            EF=residual is not None,
            EVEN=even,
            **options("encode", values, bits),
        )
