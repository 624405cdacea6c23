"""Base class of packers: a bare vector to bytes and back, and the mean of several.

    x [n] --pack--> body, uint8 [nbytes(n)] --unpack--> x~ [n]

A packer knows no tensor names, no shapes and no files. Data-parallel hooks use packers as they are;
a codec puts one behind a transform.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from gradcodec.errors import MalformedBodyError


class Packer(ABC):
    """Packs fp32 vectors of any length into bytes whose number depends on the length alone."""

    kind: ClassVar[str]
    """The family, as error messages name it."""
    finite: ClassVar[bool] = False
    """Whether ``pack`` refuses NaN and Inf; what is unpacked must then be finite as well."""

    @abstractmethod
    def nbytes(self, numel: int) -> int:
        """The exact size in bytes of ``numel`` packed values."""

    @property
    def grain(self) -> int | None:
        """Vectors whose lengths are multiples of this can be packed in one call or one by one.

        If several vectors, each a multiple of ``grain`` long, are concatenated and packed together,
        the unpacked values and the residuals equal those of packing each vector alone, to the bit
        and for every seed. ``None`` if no such length is known.
        """
        return None

    def residual_numel(self, numel: int) -> int:
        """The length of the residual that ``pack`` takes for ``numel`` values."""
        return numel

    def from_residual(self, residual: Tensor, numel: int) -> Tensor:
        """The values that a residual stands for, fp32 ``[numel]``."""
        return residual

    def to_residual(self, x: Tensor) -> Tensor:
        """Inverse of ``from_residual``: fp32 ``[n]`` -> ``[residual_numel(n)]``."""
        return x

    @torch.no_grad()
    def pack(self, x: Tensor, *, seed: int = 0, residual: Tensor | None = None) -> Tensor:
        """Pack a vector, uint8 ``[nbytes(n)]``.

        With a residual ``e``, this is error feedback (Seide et al. 2014): ``x + e`` is packed, and
        ``e`` becomes what was lost, ``e <- x + e - unpacked``.

        Args:
            x: floating ``[n]``; it is not modified.
            seed: for packers that round at random; equal seeds give equal bytes.
            residual: fp32 ``[residual_numel(n)]``, zeros to begin with, updated in place. A packer
                that rotates keeps it in rotated coordinates.

        Raises:
            NonFiniteError: ``x`` holds NaN or Inf and the packer is ``finite``, or values so large
                that sums of them leave fp32; the residual is then untouched.
        """
        x = x.detach().float()
        if residual is None:
            return self._packed(x, seed)
        x = x + residual
        body = self._packed(x, seed)
        residual.copy_(x - self.unpack(body, x.numel()))
        return body

    @torch.no_grad()
    def unpack(self, body: Tensor, numel: int) -> Tensor:
        """Inverse of ``pack``: uint8 ``[nbytes(numel)]`` -> fp32 ``[numel]``.

        Raises:
            MalformedBodyError: the body has the wrong length, or no ``pack`` makes these bytes.
        """
        self._check_length(body.numel(), numel)
        return self._unpacked(body, numel)

    def surely_finite(self, body: Tensor, numel: int) -> bool:
        """Whether a body that ``unpack`` took holds finite values only, by its scales alone.

        This saves a pass over the values. ``False`` if only the values can tell.
        """
        return False

    @torch.no_grad()
    def mean(self, bodies: Tensor, numel: int, weights: Sequence[float] | None = None) -> Tensor:
        """Mean of ``W`` packed vectors, uint8 ``[W, nbytes(numel)]`` -> fp32 ``[numel]``.

        Vectors are added in the order given, so every participant gets equal bits.

        Args:
            bodies: the packed vectors, ``W >= 1``.
            numel: length of each vector.
            weights: ``[W]``; the result is then ``sum_w weights[w] * x_w``.

        Raises:
            MalformedBodyError: as ``unpack``.
        """
        if weights is None:
            total = self.unpack(bodies[0], numel)
            for body in bodies[1:]:
                total += self.unpack(body, numel)
            return total.mul_(1.0 / len(bodies))
        total = torch.zeros(numel, device=bodies.device)
        for body, weight in zip(bodies, weights, strict=True):
            total.add_(self.unpack(body, numel), alpha=weight)
        return total

    @abstractmethod
    def _packed(self, x: Tensor, seed: int) -> Tensor:
        """``pack`` of an fp32 vector without a residual."""

    @abstractmethod
    def _unpacked(self, body: Tensor, numel: int) -> Tensor:
        """``unpack`` of a body of the right length."""

    def _check_length(self, came: int, numel: int) -> None:
        expected = self.nbytes(numel)
        if came != expected:
            raise MalformedBodyError(
                f"{self.kind}: expected {expected} bytes for {numel} values, got {came}"
            )
