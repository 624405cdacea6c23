"""Between the two shots of an all-reduce: decode W payloads, mean, encode the mean; one pass."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gradcodec_kernels.launch import MAGIC, halves, launches, options, payload
from gradcodec_kernels.quantise import encode_tile
from gradcodec_kernels.tiles import CHUNK, load_tile, tile_offsets
from gradcodec_kernels.unpack import mean_tile


@triton.jit(do_not_specialize=["magic", "low", "high", "first", "rest"])
def reduce_requant_kernel(
    P,
    S,
    E,
    OUT,
    SCALES,
    magic,
    packed_stride,
    scales_stride,
    low,
    high,
    first,
    rest,
    W: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    SCALE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    EF: tl.constexpr,
    EVEN: tl.constexpr,
):
    """A program owns a chunk of all payloads; see ``reduce_requant``."""
    chunk = tl.program_id(0).to(tl.int64) + first
    ROWS: tl.constexpr = CHUNK // BLOCK
    y = mean_tile(
        P,
        S,
        S,
        chunk,
        rest,
        magic,
        packed_stride,
        scales_stride,
        W,
        BITS,
        BLOCK,
        False,
        EVEN,
        ROWS,
        BLOCK,
    )
    offsets = tile_offsets(ROWS, BLOCK)
    if not EVEN:  # zero codes of what is beyond the end are no zeros
        y = tl.where(offsets < rest, y, 0.0)
    if EF:
        y += load_tile(E + chunk * CHUNK, offsets, rest, EVEN)
    encode_tile(
        y,
        offsets,
        E,
        OUT,
        SCALES,
        low,
        high,
        chunk,
        rest,
        BITS,
        BLOCK,
        SCALE,
        False,
        STOCHASTIC,
        EF,
        EVEN,
    )


def reduce_requant(
    packed: Tensor,
    scales: Tensor,
    out: Tensor,
    out_scales: Tensor,
    numel: int,
    *,
    bits: int,
    block: int,
    scale: str,
    stochastic: bool = False,
    seed: int = 0,
    residual: Tensor | None = None,
) -> None:
    """``encode`` of the mean of ``W`` payloads, in the domain of their codes.

    Args:
        packed: uint8 ``[W, bytes]``, as in ``decode_mean``.
        scales: bf16 ``[W, blocks]``.
        out: uint8 ``[bytes]``, written.
        out_scales: bf16 ``[blocks]``, written.
        numel: codes; whole chunks where values were rotated.
        bits: as in ``encode``, like the rest.
        block: values that share a scale.
        scale: ``"absmax"``, ``"l1"`` or ``"rms"``.
        stochastic: dither instead of rounding to nearest.
        seed: 64 bits.
        residual: ``[numel]``, updated in place.
    """
    low, high = halves(seed)
    for grid, first, rest, even in launches(numel):
        codes = payload(packed, even)
        reduce_requant_kernel[grid](
            codes,
            scales,
            scales if residual is None else residual,
            out,
            out_scales,
            MAGIC,
            codes.stride(0),
            scales.stride(0),
            low,
            high,
            first,
            rest,
            W=len(packed),
            BITS=bits,
            BLOCK=block,
            SCALE=scale,
            STOCHASTIC=stochastic,
            EF=residual is not None,
            EVEN=even,
            **options("reduce_requant", out, bits),
        )
