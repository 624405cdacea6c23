"""Sums that do not depend on the order of their terms, to the bit, in memory that does not grow."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gradcodec.errors import NonFiniteError

_LOWEST = -149
"""Exponent of the smallest positive fp32 value; fp32 values times whole weights are multiples."""
_WIDTH = 32
_LEVELS = 36
"""Levels of ``_WIDTH`` bits reach from 2^-149 to 2^1003, for fp64 values too."""
_CHUNK = 1 << 16


class ExactSum:
    """``sum_i w_i x_i`` of vectors ``x_i`` ``[n]`` with whole weights ``0 < w_i < 2^63``.

    Each product is rounded once, to fp64; adding it rounds nothing. It is cut into 32-bit integers
    ``q_k = round(r / 2^(32 k - 149))``, from the highest ``k`` down; ``r`` is what the higher ones
    leave over. The integers of each ``k``, its level, are added in int64. Integer sums are exact,
    so the order does not matter (the binned sums of Demmel and Nguyen, 2015, with fixed bins).
    There is room for 2^30 terms. Levels that no term has reached take no memory; gradients reach
    three, 24 bytes a value. fp64 values lose what is below 2^-149.

    Args:
        numel: length ``n`` of the vectors.
    """

    def __init__(self, numel: int) -> None:
        self.numel = numel
        self.weight = 0
        self._levels: dict[int, Tensor] = {}

    @torch.no_grad()
    def add(self, values: Tensor, weight: int = 1) -> None:
        """Add ``weight * values``; ``values`` are finite, ``[n]``, on the CPU.

        Raises:
            NonFiniteError: a product leaves fp64; nothing is added then.
        """
        if self.numel:
            least, most = (float(end) for end in torch.aminmax(values))
            loudest = max(-least, most) * weight
            if not loudest < 2.0 ** (_LOWEST + _WIDTH * (_LEVELS - 1)):
                raise NonFiniteError(f"expected values within fp64, got {loudest}")
        self.weight += weight
        for at in self._pieces():
            rest = values[at].double() * weight
            while (peak := float(rest.abs().max())) >= 2.0**_LOWEST:
                level = (math.frexp(peak)[1] - 1 - _LOWEST) // _WIDTH
                unit = 2.0 ** (_LOWEST + _WIDTH * level)
                counts = (rest / unit).round_()
                rest -= counts * unit
                self._level(level)[at] += counts.long()

    def total(self, *others: ExactSum) -> Tensor:
        """The sum, and those of ``others``, fp64 ``[n]``."""
        out = torch.empty(self.numel, dtype=torch.float64)
        for at in self._pieces():
            self._total(at, (self, *others), out[at])
        return out

    def mean(self, *others: ExactSum) -> Tensor:
        """The sum divided by the sum of weights, rounded to fp64 and then to fp32 ``[n]``."""
        weight = float(self.weight + sum(other.weight for other in others))
        out = torch.empty(self.numel)
        for at in self._pieces():
            piece = torch.empty(len(out[at]), dtype=torch.float64)
            out[at] = self._total(at, (self, *others), piece) / weight
        return out

    def copy(self) -> ExactSum:
        """An independent copy."""
        made = ExactSum(self.numel)
        made.weight = self.weight
        made._levels = {level: t.clone() for level, t in self._levels.items()}
        return made

    def _pieces(self) -> Iterator[slice]:
        """Pieces that fit a core's cache, since each level reads and writes them again."""
        for start in range(0, self.numel, _CHUNK):
            yield slice(start, min(start + _CHUNK, self.numel))

    @staticmethod
    def _total(at: slice, sums: Sequence[ExactSum], out: Tensor) -> Tensor:
        """The sums' sum there. Carries come first: equal sums then have equal integers."""
        carry = torch.zeros(len(out), dtype=torch.int64)
        digits = {}
        for level in range(_LEVELS + 1):
            found = [one._levels[level][at] for one in sums if level in one._levels]
            if not found and not bool(carry.any()):
                continue
            whole = sum(found, carry)
            carry = (whole + (1 << (_WIDTH - 1))) >> _WIDTH
            digits[level] = whole - (carry << _WIDTH)
        out.zero_()
        for level in sorted(digits, reverse=True):
            out += digits[level].double() * 2.0 ** (_LOWEST + _WIDTH * level)
        return out

    def _level(self, level: int) -> Tensor:
        if level not in self._levels:
            self._levels[level] = torch.zeros(self.numel, dtype=torch.int64)
        return self._levels[level]
