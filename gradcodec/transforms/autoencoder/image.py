"""An update as the autoencoders see it: one image, or columns sorted by kind.

Both work on batches of flat vectors ``[N, n]``, ``n = spec.numel``, tensors in spec order and
row-major as ``layout.flatten`` gives them, and are differentiable.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

from gradcodec import layout
from gradcodec.transforms.autoencoder.nets import FOLD
from gradcodec.types import TensorSpec, UpdateSpec

CELL = 64
"""Image sides are multiples of this: six stride-2 stages."""
SMALLEST = 2 * CELL
"""Smallest side: reflection padding needs a latent grid of at least 2."""


@dataclass(frozen=True)
class Image:
    """The paper's canonical image of an update.

        all matrices, one long side d:            anything else:
        +----+----+----+----+---+                 +-----------------+
        | A1 | B1 | A2 | B2 | 0 |  d rows         | values, rowwise |
        | ^T |    | ^T |    |   |                 | ......| 0 0 0 0 |
        +----+----+----+----+---+                 +-----------------+

    On the left the long side is vertical and columns follow spec order; for LoRA adapters of
    square projections listed layer by layer that is ``layer_major_qkvo_AtB`` (A ``[r, d]`` is
    transposed, B ``[d, r]`` is not), the order that the independent reproduction chose, since the
    paper leaves it open. The right layout (grouped-query attention, non-square projections,
    vectors) is our own, a nearly square image. Zeros fill both sides up to multiples of 64, at
    least 128.

    Attributes:
        spec: the tensors.
        columns: whether the left layout applies.
        height: rows of the padded image.
        width: columns of the padded image.
    """

    spec: UpdateSpec
    columns: bool
    height: int
    width: int

    @classmethod
    def of(cls, spec: UpdateSpec) -> Image:
        """Choose the layout and size for these tensors."""
        sides = {max(t.shape) for t in spec if len(t.shape) == 2}
        if len(sides) == 1 and all(len(t.shape) == 2 for t in spec) and spec.numel:
            (side,) = sides
            return cls(spec, True, _padded(side), _padded(spec.numel // side))
        width = _padded(round(math.sqrt(spec.numel) / CELL) * CELL)
        return cls(spec, False, _padded(-(-spec.numel // width)), width)

    def pack(self, x: Tensor) -> Tensor:
        """``[N, n] -> [N, 1, H, W]``."""
        if not self.columns:
            x = functional.pad(x, (0, self.height * self.width - x.shape[1]))
            return x.reshape(-1, 1, self.height, self.width)
        parts = torch.split(x, [t.numel for t in self.spec], dim=1)
        image = torch.cat([_stand(p, t) for p, t in zip(parts, self.spec, strict=True)], dim=2)
        right, below = self.width - image.shape[2], self.height - image.shape[1]
        return functional.pad(image, (0, right, 0, below)).unsqueeze(1)

    def unpack(self, image: Tensor) -> Tensor:
        """``[N, 1, H, W] -> [N, n]``, the inverse of ``pack``; padding is dropped."""
        if not self.columns:
            return image.flatten(1)[:, : self.spec.numel]
        side = max(self.spec.tensors[0].shape)
        widths = [t.numel // side for t in self.spec]
        parts = torch.split(image[:, 0, :side, : sum(widths)], widths, dim=2)
        return torch.cat([_lie(p, t) for p, t in zip(parts, self.spec, strict=True)], dim=1)


@dataclass(frozen=True)
class Group:
    """Tensors of one kind, whose columns share one row basis.

    Attributes:
        side: length of their columns.
        rank: coefficients a column may send, ``ceil(side / ratio)``.
        members: positions of the tensors in the spec.
        width: number of columns of all of them together.
    """

    side: int
    rank: int
    members: tuple[int, ...]
    width: int


@dataclass(frozen=True)
class Columns:
    """Every tensor as columns of its long side, grouped by kind, and their coefficient grid.

    Tensors are of one kind when they differ only in the numbers in their names, such as a layer's
    index (``layers.3.q_proj.lora_A`` and ``layers.7.q_proj.lora_A``), and stand on sides of equal
    length; with ``per_tensor`` every tensor is a separate kind. Long sides may differ between
    kinds, so any model fits without padding its columns.

        grid [oversample * k, W]   column j: the j-th column of the update, in spec order
                                   row s*k + i: coefficient s*rank + i of that column's basis

    ``k`` is the largest rank; a shorter column leaves rows ``rank..k`` of every band empty, and W
    is padded to a multiple of 64. The latent is the filled cells of the first band, row by row.
    """

    spec: UpdateSpec
    ratio: int
    oversample: int
    per_tensor: bool = False

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """The kinds, in order of first appearance."""
        found: dict[tuple[str, int, bool], list[int]] = {}
        for at, t in enumerate(self.spec):
            if t.numel:
                rows, cols = layout.matrix_shape(t)
                parts = t.name.split(".")
                if not self.per_tensor:
                    parts = ["*" if p.isdigit() else p for p in parts]
                kind = ".".join(parts)
                found.setdefault((kind, max(rows, cols), rows < cols), []).append(at)
        tensors = self.spec.tensors
        return tuple(
            Group(
                side, -(-side // self.ratio), tuple(at), sum(tensors[i].numel for i in at) // side
            )
            for (_, side, _), at in found.items()
        )

    @property
    def rank(self) -> int:
        """Rows ``k`` of the latent's band."""
        return max((g.rank for g in self.groups), default=1)

    @cached_property
    def width(self) -> int:
        """Columns W of the grid."""
        return max(FOLD, -(-sum(g.width for g in self.groups) // FOLD) * FOLD)

    def basis_size(self, group: Group) -> int:
        """Basis vectors of a group: ``oversample`` times its rank, at most ``side``."""
        return min(group.side, self.oversample * group.rank)

    def pack(self, x: Tensor) -> list[Tensor]:
        """``[N, n]`` -> per group ``[N, side, width]``."""
        parts = torch.split(x, [t.numel for t in self.spec], dim=1)
        tensors = self.spec.tensors
        return [
            torch.cat([_stand(parts[i], tensors[i]) for i in g.members], dim=2) for g in self.groups
        ]

    def unpack(self, matrices: Sequence[Tensor], like: Tensor) -> Tensor:
        """Inverse of ``pack``: ``[N, n]``; ``like`` ``[N, ...]`` gives the batch size."""
        parts = [like.new_zeros(like.shape[0], 0)] * len(self.spec)
        tensors = self.spec.tensors
        for group, matrix in zip(self.groups, matrices, strict=True):
            widths = [tensors[i].numel // group.side for i in group.members]
            for i, part in zip(group.members, torch.split(matrix, widths, dim=2), strict=True):
                parts[i] = _lie(part, tensors[i])
        return torch.cat(parts, dim=1) if parts else like.new_zeros(like.shape[0], 0)

    def place(self, coefficients: Sequence[Tensor], like: Tensor) -> Tensor:
        """Per group ``[N, basis size, width]`` -> grid ``[N, oversample * k, W]``."""
        bands = []
        for group, c in zip(self.groups, coefficients, strict=True):
            c = functional.pad(c, (0, 0, 0, self.oversample * group.rank - c.shape[1]))
            c = c.reshape(-1, self.oversample, group.rank, group.width)
            bands.append(functional.pad(c, (0, 0, 0, self.rank - group.rank)).flatten(1, 2))
        grid = like.new_zeros(like.shape[0], self.oversample * self.rank, self.width)
        if bands:
            grid = grid.index_copy(2, self._order.to(like.device), torch.cat(bands, dim=2))
        return grid

    def take(self, grid: Tensor) -> list[Tensor]:
        """Inverse of ``place``."""
        found = grid.index_select(2, self._order.to(grid.device))
        out = []
        for group, c in zip(
            self.groups, torch.split(found, [g.width for g in self.groups], dim=2), strict=True
        ):
            c = c.reshape(-1, self.oversample, self.rank, group.width)[:, :, : group.rank]
            c = c.flatten(1, 2)
            out.append(c[:, : self.basis_size(group)])
        return out

    @property
    def latent_numel(self) -> int:
        """Number of code values ``m``."""
        return sum(g.rank * g.width for g in self.groups)

    def send(self, band: Tensor) -> Tensor:
        """Filled cells ``[N, m]`` of a first band ``[N, k, W]``."""
        return band.flatten(1).index_select(1, self._cells.to(band.device))

    def receive(self, latent: Tensor) -> Tensor:
        """Inverse of ``send``; empty cells are zero."""
        flat = latent.new_zeros(latent.shape[0], self.rank * self.width)
        flat = flat.index_copy(1, self._cells.to(latent.device), latent)
        return flat.reshape(-1, self.rank, self.width)

    @cached_property
    def _order(self) -> Tensor:
        """Grid column of each column, counted group by group."""
        start, starts = 0, []
        owner = {i: g for g in self.groups for i in g.members}
        for i, t in enumerate(self.spec):
            starts.append(start)
            start += t.numel // owner[i].side if i in owner else 0
        pieces = [
            torch.arange(starts[i], starts[i] + self.spec.tensors[i].numel // g.side)
            for g in self.groups
            for i in g.members
        ]
        return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.long)

    @cached_property
    def _cells(self) -> Tensor:
        """Flat positions of the filled cells in the first band, ascending."""
        filled = torch.zeros(self.rank, self.width, dtype=torch.bool)
        at = 0
        for group in self.groups:
            filled[: group.rank, self._order[at : at + group.width]] = True
            at += group.width
        return filled.flatten().nonzero()[:, 0]


def _padded(size: int) -> int:
    """The next multiple of 64, at least 128."""
    return max(SMALLEST, -(-size // CELL) * CELL)


def _stand(part: Tensor, spec: TensorSpec) -> Tensor:
    """``[N, numel] -> [N, long side, short side]``."""
    rows, cols = layout.matrix_shape(spec)
    matrix = part.reshape(part.shape[0], rows, cols)
    return matrix.transpose(1, 2) if rows < cols else matrix


def _lie(matrix: Tensor, spec: TensorSpec) -> Tensor:
    """Inverse of ``_stand``."""
    rows, cols = layout.matrix_shape(spec)
    return (matrix.transpose(1, 2) if rows < cols else matrix).reshape(matrix.shape[0], rows * cols)
