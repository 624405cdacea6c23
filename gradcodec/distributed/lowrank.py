"""Low rank with a basis that follows the gradient: the learned counterpart of PowerSGD.

With a fixed basis, what lies outside of it is never sent, not even with error feedback. Here the
basis of each matrix is learned while training, by power iteration on gradient plus residual, every
``refresh`` steps; in between only coordinates are exchanged. With ``refresh=1`` and
``code="fp32"`` this is PowerSGD (Vogels et al. 2019, arXiv 1905.13727), but for the 16 bits in
which power iterations travel: its ``P`` is our basis, its ``Q`` our coordinates. New here are
coordinates of fewer bits, and bases that live longer than a step, which saves their half of the
bytes.
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

    A step sends ``rank`` coordinates per element of a matrix's short side, and every ``refresh``
    steps two bytes for ``rank`` elements per element of its long side.

    Attributes:
        rank: columns of a basis; 1 or more.
        refresh: steps between power iterations. 1 is PowerSGD; what lies outside a basis waits
            longer where it is larger, which training notices before long.
        code: codec of the coordinates: ``"fp32"``, ``"int8"``, ``"int4"`` and so on. What it loses
            is fed back with the rest.
        other: codec of parameters that are no matrices or too small to gain.
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
        """Whether a parameter is a matrix that basis and coordinates are smaller than."""
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

    ``U`` and ``Q`` are made of exchanged values by the same operations on every rank, hence equal
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
        """Move what is kept to the gradient's device."""
        if self.start.device != device:
            self.start = self.start.to(device)
            self.basis = None if self.basis is None else self.basis.to(device)
            self.error = None if self.error is None else self.error.to(device)

    def due(self, step: int) -> bool:
        """Whether step 1 takes place."""
        return self.basis is None or step % self.settings.refresh == 0

    def with_error(self, values: Tensor, feedback: bool) -> Tensor:
        """``M``: a new tensor, or the gradient itself without a residual."""
        gradient = self.oriented(values)
        return gradient + self.error if feedback and self.error is not None else gradient

    def powered(self, m: Tensor) -> Tensor:
        """This rank's ``M Q``, flat."""
        return (m @ self.start).reshape(-1)

    def renew(self, powered: Tensor) -> None:
        """Take the basis of the averaged ``P``; keeps the old one if a gradient was not finite."""
        p = powered.view(self.long, -1).float()
        if bool(torch.isfinite(p).all()):
            # Columns of very different size would lose their small ones to rounding.
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
        """Start the next power iteration where this gradient pointed."""
        z = mean.view(-1, self.short)
        # A step without gradient (nothing used this parameter) points nowhere.
        if bool(z.any()):
            self.start = z.T.clone()

    def state_dict(self, name: str) -> dict[str, Tensor | int]:
        """``start.NAME``, and ``basis.NAME`` and ``error.NAME`` once they are there."""
        kept = {"start": self.start, "basis": self.basis, "error": self.error}
        return {f"{k}.{name}": t.detach().cpu().clone() for k, t in kept.items() if t is not None}

    def misfit(self, name: str, state: Mapping[str, Tensor | int]) -> str:
        """Which shape in a state is not that of this matrix and rank; empty if all are."""
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
            ConfigError: a shape is not that of this matrix and rank.
        """
        if text := self.misfit(name, state):
            raise ConfigError(text)
        for key in ("start", "basis", "error"):
            value = state.get(f"{key}.{name}")
            if isinstance(value, Tensor):
                setattr(self, key, value.detach().float().clone())
            elif key != "start":
                setattr(self, key, None)
