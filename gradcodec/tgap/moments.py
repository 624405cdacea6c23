"""Streaming second moments: what a linear codec needs to know of all gradients seen."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol, Self

import torch
from torch import Tensor

from gradcodec import layout
from gradcodec.errors import ConfigError, UpdateError
from gradcodec.transforms.subspace.config import Axis, SubspaceConfig
from gradcodec.transforms.subspace.groups import groups
from gradcodec.types import Update, UpdateSpec

EXACT_LIMIT = 2048


class Moment(Protocol):
    """Second moment ``C = sum_t G_t G_t^T`` of one parameter's projected side."""

    def add(self, rows: Tensor) -> None:
        """Add samples, one per row: ``rows`` ``[n, size]`` contributes ``rows^T rows``."""

    @property
    def nbytes(self) -> int:
        """Bytes it takes to send what was gathered."""

    @property
    def energy(self) -> float:
        """Sum of all eigenvalues that ``top`` can return."""

    def absorb(self, other: Self, weight: float) -> None:
        """``C += weight C_other``."""

    def top(self, count: int) -> tuple[Tensor, Tensor]:
        """The ``count`` largest eigenvalues, descending, and their vectors ``[size, .]``."""

    def kept(self) -> Tensor:
        """All that was gathered, for ``restore``; not a copy."""

    def restore(self, kept: Tensor) -> None:
        """Go back to what ``kept`` returned; ``ConfigError`` if that is of another size."""


class ExactMoment:
    """The whole ``[size, size]`` matrix, fp32 sums; for sides up to ``EXACT_LIMIT``."""

    def __init__(self, size: int) -> None:
        self.sum = torch.zeros(size, size)

    def add(self, rows: Tensor) -> None:
        """``C += rows^T rows``."""
        self.sum.addmm_(rows.T, rows)

    @property
    def nbytes(self) -> int:
        """Bytes of one triangle of the symmetric matrix."""
        size = len(self.sum)
        return 4 * size * (size + 1) // 2

    @property
    def energy(self) -> float:
        """Sum of the positive eigenvalues: a difference of moments may be indefinite."""
        return float(torch.linalg.eigvalsh(self.sum.double()).clamp_min(0).sum())

    def absorb(self, other: Self, weight: float) -> None:
        """Add to the matrix."""
        self.sum.add_(other.sum, alpha=weight)

    def top(self, count: int) -> tuple[Tensor, Tensor]:
        """By full symmetric eigendecomposition in fp64."""
        values, vectors = torch.linalg.eigh(self.sum.double())
        return _signed(values.flip(0)[:count].clamp_min(0), vectors.flip(1)[:, :count])

    def kept(self) -> Tensor:
        """The matrix."""
        return self.sum

    def restore(self, kept: Tensor) -> None:
        """Use ``kept`` as the matrix."""
        if kept.shape != self.sum.shape:
            raise ConfigError(f"expected sums {list(self.sum.shape)}, got {list(kept.shape)}")
        self.sum = kept.float()


class SketchedMoment:
    """Frequent Directions (Ghashami et al., arXiv 1501.01711): ``[2 l, size]`` numbers only.

    The sketch ``B`` of ``l`` rows obeys ``0 <= C - B^T B <= ||C - C_k||_F^2 / (l - k)`` in the
    spectral order, for every ``k < l``.
    """

    def __init__(self, size: int, rows: int) -> None:
        self.rows = min(rows, size)
        self.buffer = torch.zeros(2 * self.rows, size)
        self.filled = 0

    def add(self, rows: Tensor) -> None:
        """Append rows; shrink whenever the buffer is full."""
        while len(rows):
            room = len(self.buffer) - self.filled
            taken, rows = rows[:room], rows[room:]
            self.buffer[self.filled : self.filled + len(taken)] = taken
            self.filled += len(taken)
            if self.filled == len(self.buffer):
                self._shrink()

    def _shrink(self) -> None:
        values, vectors = self._spectrum()
        kept = (values[: self.rows] - values[self.rows]).clamp_min(0).sqrt()
        self.buffer[: self.rows] = (kept[:, None] * vectors[:, : self.rows].T).float()
        self.buffer[self.rows :] = 0
        self.filled = self.rows

    def _spectrum(self) -> tuple[Tensor, Tensor]:
        # Eigenvectors through the small Gram matrix [2l, 2l].
        b = self.buffer[: max(self.filled, 1)].double()
        values, left = torch.linalg.eigh(b @ b.T)
        values, left = values.flip(0).clamp_min(0), left.flip(1)
        vectors = b.T @ left / values.sqrt().clamp_min(1e-30)
        return values, vectors

    @property
    def nbytes(self) -> int:
        """Bytes of a shrunk sketch."""
        return 4 * self.rows * self.buffer.shape[1]

    @property
    def energy(self) -> float:
        """Energy of the sketch alone; what shrinking removed is not known any more."""
        return float(self.buffer.double().square().sum())

    def absorb(self, other: Self, weight: float) -> None:
        """Add the other sketch's rows; the bound holds for the sum (sketches are mergeable)."""
        self.add(math.sqrt(weight) * other.buffer[: other.filled])

    def top(self, count: int) -> tuple[Tensor, Tensor]:
        """Eigenpairs of the sketch; fewer than ``count`` if fewer directions were ever seen."""
        values, vectors = self._spectrum()
        seen = int((values > values[0] * 1e-12).sum()) if float(values[0]) > 0 else 0
        count = min(count, seen)
        # Orthonormal to fp64 rounding even where eigenvalues are close.
        q = torch.linalg.qr(vectors[:, :count]).Q
        return _signed(values[:count], q)

    def kept(self) -> Tensor:
        """The rows in use; the others are zero."""
        return self.buffer[: self.filled]

    def restore(self, kept: Tensor) -> None:
        """Use ``kept`` as the rows in use."""
        most, size = self.buffer.shape
        if kept.ndim != 2 or kept.shape[1] != size or len(kept) > most:
            raise ConfigError(f"expected a sketch [at most {most}, {size}], got {list(kept.shape)}")
        self.buffer = torch.zeros(most, size)
        self.buffer[: len(kept)] = kept
        self.filled = len(kept)


class SecondMoments:
    """One streaming moment per parameter; memory does not grow with the number of updates.

    Args:
        spec: the parameters.
        config: decides which side of each matrix is projected, and how many directions at most are
            needed when a side is too long for the whole matrix.
        sketch_rows: rows of each sketch; default twice the directions that the config can use.
    """

    def __init__(
        self, spec: UpdateSpec, config: SubspaceConfig, *, sketch_rows: int | None = None
    ) -> None:
        self.spec = spec
        self.config = config
        self.count = 0
        self.axes = {t.name: Axis.choose(t, config) for t in spec if t.numel}
        self._sketch_rows = sketch_rows
        self._moments = {n: self._empty(axis) for n, axis in self.axes.items()}

    def _empty(self, axis: Axis) -> Moment:
        if axis.size <= EXACT_LIMIT:
            return ExactMoment(axis.size)
        need = 2 * max(self.config.min_rank, int(axis.size / self.config.ratio))
        return SketchedMoment(axis.size, self._sketch_rows or need)

    @torch.no_grad()
    def add(self, update: Update) -> None:
        """Add one gradient or update; parameters that are missing from it count as zero.

        On an error nothing is added.

        Raises:
            UpdateError, NonFiniteError: unknown names or shapes, NaN or Inf.
        """
        known = {t.name: t for t in self.spec}
        for name, tensor in update.items():
            if name not in known:
                raise UpdateError(f"gradient of an unknown parameter: {name!r}")
            if tuple(tensor.shape) != known[name].shape:
                raise UpdateError(f"expected {known[name]}, got a shape of {list(tensor.shape)}")
            layout.check_finite(tensor, name)
        for name, tensor in update.items():
            if name not in self.axes:
                continue
            axis = self.axes[name]
            matrix = tensor.detach().reshape(layout.matrix_shape(known[name]))
            rows = matrix.T if axis.left else matrix
            self._moments[name].add(rows.float().cpu())
        self.count += 1

    def state_dict(self) -> dict[str, Tensor]:
        """What was gathered, as plain tensors; they share memory with this object."""
        kept = {f"moment.{n}": m.kept() for n, m in self._moments.items()}
        return {"count": torch.tensor(self.count), **kept}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on where ``state_dict`` was taken, to the bit.

        Raises:
            ConfigError: the state is of other parameters or of another config.
        """
        expected = {"count", *(f"moment.{n}" for n in self._moments)}
        if set(state) != expected:
            raise ConfigError(
                f"moments: expected {sorted(expected)[:3]}... ({len(expected)} tensors), "
                f"differing in {sorted(expected ^ set(state))[:3]}"
            )
        fresh = {n: self._empty(axis) for n, axis in self.axes.items()}
        for name, moment in fresh.items():
            try:
                moment.restore(state[f"moment.{name}"])
            except ConfigError as err:
                raise ConfigError(f"moments of {name}: {err}") from err
        self._moments, self.count = fresh, int(state["count"])

    @property
    def nbytes(self) -> int:
        """Bytes to send these statistics: one triangle of each fp32 matrix, or the sketch."""
        return sum(m.nbytes for m in self._moments.values())

    def spectra(self) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Per parameter: eigenvalues, descending, and eigenvectors ``[size, .]``, fp64."""
        return {n: m.top(self.axes[n].size) for n, m in self._moments.items()}

    def merged(self, share: str) -> Mapping[str, tuple[Tensor, Tensor]]:
        """``spectra`` for parameters that share bases (``subspace.groups``): one for each group.

        A group's spectrum is that of the mean of its members' moments. Each moment is first scaled
        to the members' mean energy, so no layer with large gradients decides alone.
        """
        out = {}
        for members in groups(self.spec, share).values():
            energies = {n: self._moments[n].energy for n in members}
            mean = sum(energies.values()) / len(members)
            axis = self.axes[members[0]]
            total = self._empty(axis)
            for name, energy in energies.items():
                if energy > 0:
                    total.absorb(self._moments[name], mean / energy / len(members))
            out.update(dict.fromkeys(members, total.top(axis.size)))
        return out


def _signed(values: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Fix each eigenvector's sign (largest entry positive), so that fits are reproducible."""
    if vectors.numel():
        peak = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
        vectors = vectors * torch.where(peak < 0, -1.0, 1.0)
    return values, vectors
