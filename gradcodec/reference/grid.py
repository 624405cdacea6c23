"""The levels of a block: evenly spaced, ``value = (code - zero) * delta``, and what ``delta`` is.

With ``levels="gaussian"`` they are those of ``gradcodec.reference.gaussian`` instead.

| bits | zero | codes    | values            | absmax   | l1               | rms              |
|------|------|----------|-------------------|----------|------------------|------------------|
| 8    | 128  | 1 .. 255 | -127 .. 127       | max/127  | -                | rms * 0.0308     |
| 4    | 8    | 1 .. 15  | -7 .. 7           | max/7    | -                | rms * 0.3535     |
| 2    | 1.5  | 0 .. 3   | -1.5 .. 1.5       | max/1.5  | mean * 1.2479    | rms * 0.9957     |
| 1    |      | 0, 1     | +1, -1            | max      | mean             | rms * 0.7979     |

Values are in units of ``delta``; ``max``, ``mean`` and ``rms`` are taken over the magnitudes of a
block. One bit is a sign bit: set means minus, ``value = (1 - 2 code) delta``. At 8 and 4 bits zero
is a level, so zeros stay zeros. The factors of ``l1`` and ``rms`` at 1 and 2 bits have the least
squared error for a Gaussian (Max 1960, Quantizing for minimum distortion); those at 4 and 8 bits
are of the best evenly spaced levels with one at zero.

``delta`` is rounded to bf16 first and used as rounded. A product of a code and a bf16 number is
exact in fp32, so decoding gives equal bits on every machine.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradcodec.errors import ConfigError
from gradcodec.reference import gaussian
from gradcodec.reference.hadamard import CHUNK

BITS = (1, 2, 4, 8)
SCALES = ("absmax", "l1", "rms")
LEVELS = ("uniform", "gaussian")

ZERO = {8: 128.0, 4: 8.0, 2: 1.5, 1: 0.5}
LOW = {8: 1, 4: 1, 2: 0, 1: 0}
TOP = {8: 127.0, 4: 7.0, 2: 1.5, 1: 1.0}
#: delta over the mean magnitude, or over the root mean square.
FACTORS = {
    "l1": {2: 1.2479, 1: 1.0},
    "rms": {8: 0.0308, 4: 0.3535, 2: 0.9957, 1: 0.7979},
}
#: With stochastic rounding nothing may be clipped, so delta must not be rounded below the maximum.
HEADROOM = 1.0 + 2.0**-7
#: Below the end of the fp32 range, where rounding to bf16 could make an infinity.
_LARGEST = 3e38


def padded_numel(numel: int, rotate: bool) -> int:
    """How many values are coded: with rotation, ``numel`` rounded up to whole chunks."""
    return -(-numel // CHUNK) * CHUNK if rotate else numel


def check_grid(bits: int, block: int, rotate: bool = False) -> None:
    """Raise ``ConfigError`` unless values can be coded in these bits and blocks."""
    if bits not in BITS:
        raise ConfigError(f"expected bits of {BITS}, got {bits!r}")
    if not isinstance(block, int) or not 8 <= block <= 1 << 20:
        raise ConfigError(f"expected a block of 8..{1 << 20}, got {block!r}")
    if rotate and CHUNK % block:
        raise ConfigError(
            f"rotation works on {CHUNK} values, which a block must divide, got a block of {block}"
        )


def check_scale(scale: str, bits: int) -> None:
    """Raise ``ConfigError`` unless this scale exists at this number of bits."""
    if scale not in SCALES or bits not in FACTORS.get(scale, TOP):
        raise ConfigError(
            f"expected a scale of {SCALES} ('l1' at 1 and 2 bits only), got {scale!r} at "
            f"{bits} bits"
        )


def check_levels(levels: str, bits: int, stochastic: bool = False) -> None:
    """Raise ``ConfigError`` unless these levels exist at this number of bits and rounding."""
    if levels not in LEVELS:
        raise ConfigError(f"expected levels of {LEVELS}, got {levels!r}")
    if levels == "gaussian" and (bits != gaussian.BITS or stochastic):
        raise ConfigError(
            f"'gaussian' levels are for {gaussian.BITS} bits, to nearest, got {bits} bits"
            f"{' and stochastic rounding' if stochastic else ''}"
        )


def top_of(bits: int, levels: str = "uniform") -> float:
    """The largest level in units of delta."""
    return gaussian.TOP if levels == "gaussian" else TOP[bits]


def deltas(
    rows: Tensor,
    counts: Tensor,
    bits: int,
    scale: str,
    stochastic: bool,
    levels: str = "uniform",
) -> Tensor:
    """bf16 ``[blocks]`` of fp32 rows ``[blocks, block]``; ``counts [blocks]`` excludes padding.

    Sums are taken in fp64: after rounding to bf16 their order makes no difference, except in rare
    ties.
    """
    top = top_of(bits, levels)
    if scale == "absmax":
        peak = rows.abs().amax(1).clamp_max(_LARGEST) if rows.numel() else rows.new_empty(0)
        delta = peak / top
        return (delta * HEADROOM if stochastic else delta).to(torch.bfloat16)
    wide = rows.double()
    mean = (wide.abs() if scale == "l1" else wide.square()).sum(1) / counts
    size = mean if scale == "l1" else mean.sqrt()
    factor = gaussian.FACTOR if levels == "gaussian" else FACTORS[scale][bits]
    return (size.float() * factor).clamp_max(_LARGEST / top).to(torch.bfloat16)


def codes_of(
    rows: Tensor, delta: Tensor, bits: int, dither: Tensor | None, levels: str = "uniform"
) -> Tensor:
    """uint8 codes of fp32 rows ``[blocks, block]`` on grids of bf16 ``delta [blocks]``.

        code = clamp(floor(y / delta + zero + u)),   u = 1/2 or a dither in (0, 1)

    computed as ``y * (1 / delta) + (zero + u)``, product and sum rounded to fp32. ``dither`` is
    fp32 of the rows' shape; ``None`` rounds to nearest, halves up.
    """
    if levels == "gaussian":
        return gaussian.codes_of(rows, delta)
    if bits == 1 and dither is None:
        return (rows < 0).to(torch.uint8)
    step = delta.float()[:, None]
    inverse = torch.where(step > 0, 1.0 / step, 0.0)
    shift = ZERO[bits] + (0.5 if dither is None else dither)
    t = rows * inverse
    t = (t * -0.5 if bits == 1 else t).add_(shift)
    # A NaN stays in its own block; which code it gets is of no consequence.
    return t.floor_().clamp_(LOW[bits], (1 << bits) - 1).nan_to_num_(LOW[bits]).to(torch.uint8)


def values_of(codes: Tensor, delta: Tensor, bits: int, levels: str = "uniform") -> Tensor:
    """fp32 values of codes ``[blocks, block]``; exact."""
    if levels == "gaussian":
        return gaussian.values_of(codes, delta)
    step = delta.float()[:, None]
    if bits == 1:
        return (1.0 - 2.0 * codes.float()) * step
    return (codes.float() - ZERO[bits]) * step
