"""Low rank with a basis that follows the gradient: the learned counterpart of PowerSGD.

With a fixed basis, what lies outside of it is never sent, not even with error feedback. Here the
basis of each matrix is learned while training, by power iteration on gradient plus residual, every
``refresh`` steps; in between only coordinates are exchanged. With ``refresh=1`` and
``code="fp32"`` this is PowerSGD (Vogels et al. 2019, arXiv 1905.13727), except that power
iterations travel in 16 bits: its ``P`` is our basis, its ``Q`` our coordinates. Two things are new
here: coordinates of fewer bits, and bases that live longer than a step, which saves the half of the
bytes that bases take.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gradcodec.distributed.shards import derive_seed
from gradcodec.errors import ConfigError
from gradcodec.layout import matrix_shape
from gradcodec.types import TensorSpec


@dataclass(frozen=True)
class LowRank:
    """Settings of the adaptive low-rank scheme.

    A step sends ``rank`` coordinates per element of a matrix's short side. Every ``refresh`` steps
    it also sends ``rank`` values of two bytes per element of the long side.

    Attributes:
        rank: columns of a basis; 1 or more.
        refresh: steps between power iterations. 1 is PowerSGD. With more steps, what lies outside
            the basis waits longer, which training soon notices.
        code: codec of the coordinates: ``"fp32"``, ``"int8"``, ``"int4"`` and so on. Its loss is
            part of the error feedback.
        other: codec of parameters that are not matrices, or are too small to gain.
    """

    rank: int = 4
    refresh: int = 1
    code: str = "int8"
    other: str = "fp32"

    def __post_init__(self) -> None:
        for name in ("rank", "refresh"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ConfigError(f"lowrank: expected {name} of 1 or more, got {value!r}")

    def serves(self, shape: tuple[int, ...]) -> bool:
        """Whether a parameter is a matrix larger than its basis and coordinates together."""
        rows, cols = matrix_shape(TensorSpec("", shape))
        return len(shape) > 1 and self.rank * (rows + cols) < rows * cols


class AdaptiveBasis:
    """Basis, start vectors and residual of one matrix ``G [rows, cols]``.

    Let ``M [long, short]`` be ``G + E``, transposed if it has more columns than rows.

        1. every ``refresh`` steps   P = mean over ranks of M Q          [long, rank]
                                     U = orth(P)                         by Householder QR
        2. every step                z = U^T M,  z^ as it is sent        [rank, short]
                                     E <- M - U z^                       this rank's rest
        3.                           G~ = U (mean over ranks of z^),  Q <- (mean of z^)^T

    Every rank makes ``U`` and ``Q`` from exchanged values by the same operations, so they are equal
    to the bit on equal hardware. Without error feedback ``E`` stays zero.
    """

    def __init__(self, name: str, shape: tuple[int, ...], settings: LowRank, seed: int) -> None:
        rows, cols = matrix_shape(TensorSpec("", shape))
        self.settings = settings
        self.transposed = cols > rows
        self.long, self.short = max(rows, cols), min(rows, cols)
        generator = torch.Generator().manual_seed(derive_seed(seed, zlib.crc32(name.encode())))
        self.start = torch.randn(self.short, settings.rank, generator=generator)
        self.basis: Tensor | None = None
        self.error: Tensor | None = None

    def oriented(self, values: Tensor) -> Tensor:
        """Flat gradient ``[n]`` -> ``[long, short]``, fp32; a view where it can be."""
        if self.transposed:
            return values.view(self.short, self.long).T.float()
        return values.view(self.long, self.short).float()

    def flat(self, matrix: Tensor) -> Tensor:
        """Inverse of ``oriented``."""
        return (matrix.T if self.transposed else matrix).reshape(-1)

    def to(self, device: torch.device) -> None:
        """Move start vectors, basis and residual to the gradient's device."""
        if self.start.device != device:
            self.start = self.start.to(device)
            self.basis = None if self.basis is None else self.basis.to(device)
            self.error = None if self.error is None else self.error.to(device)

    def due(self, step: int) -> bool:
        """Whether step 1 takes place in this step."""
        return self.basis is None or step % self.settings.refresh == 0

    def with_error(self, values: Tensor, feedback: bool) -> Tensor:
        """``M``: a new tensor, or without a residual the gradient itself."""
        gradient = self.oriented(values)
        return gradient + self.error if feedback and self.error is not None else gradient

    def powered(self, m: Tensor) -> Tensor:
        """This rank's ``M Q``, flat."""
        return (m @ self.start).reshape(-1)

    def renew(self, powered: Tensor) -> None:
        """Make the basis from the averaged ``P``; keep the old one if a gradient was not finite."""
        p = powered.view(self.long, -1).float()
        if bool(torch.isfinite(p).all()):
            # If columns differed much in size, the small ones would be lost to rounding.
            scale = p.norm(dim=0, keepdim=True)
            self.basis = torch.linalg.qr(p / scale.clamp_min(torch.finfo(p.dtype).tiny)).Q

    def code(self, m: Tensor) -> Tensor:
        """This rank's ``z``, flat."""
        assert self.basis is not None
        return (self.basis.T @ m).reshape(-1)

    def values(self, z: Tensor) -> Tensor:
        """``U z``, ``[long, short]``."""
        assert self.basis is not None
        return self.basis @ z.view(-1, self.short)

    def follow(self, mean: Tensor) -> None:
        """Start the next power iteration from the mean coordinates of this step."""
        z = mean.view(-1, self.short)
        # In a step without gradient (nothing used this parameter) they are zero.
        if bool(z.any()):
            self.start = z.T.clone()

    def state_dict(self, name: str) -> dict[str, Tensor | int]:
        """``start.NAME``, and ``basis.NAME`` and ``error.NAME`` if they exist yet."""
        kept = {"start": self.start, "basis": self.basis, "error": self.error}
        return {f"{k}.{name}": t.detach().cpu().clone() for k, t in kept.items() if t is not None}

    def misfit(self, name: str, state: Mapping[str, Tensor | int]) -> str:
        """The first shape in a state that does not fit this matrix and rank; empty if all fit."""
        rank = self.settings.rank
        shapes = {
            "start": (self.short, rank),
            "basis": (self.long, rank),
            "error": (self.long, self.short),
        }
        for key, shape in shapes.items():
            value = state.get(f"{key}.{name}")
            if isinstance(value, Tensor) and tuple(value.shape) != shape:
                return f"{key}.{name}: expected {list(shape)}, got {list(value.shape)}"
        return ""

    def load_state_dict(self, name: str, state: Mapping[str, Tensor | int]) -> None:
        """Inverse of ``state_dict``.

        Raises:
            ConfigError: a shape does not fit this matrix and rank.
        """
        if text := self.misfit(name, state):
            raise ConfigError(text)
        for key in ("start", "basis", "error"):
            value = state.get(f"{key}.{name}")
            if isinstance(value, Tensor):
                setattr(self, key, value.detach().float().clone())
            elif key != "start":
                setattr(self, key, None)
