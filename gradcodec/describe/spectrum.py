"""Singular spectra: of an update's matrices, and of the bases that a codec was fitted with."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from gradcodec import layout
from gradcodec.codec import Codec
from gradcodec.describe.chart import Chart, Row
from gradcodec.describe.kinds import kinds, labels
from gradcodec.metrics import matrix_entropy
from gradcodec.per_tensor import PartsTransform
from gradcodec.transforms.subspace.config import Axis
from gradcodec.transforms.subspace.transform import Projection, SubspaceTransform
from gradcodec.transforms.transform import Transform
from gradcodec.types import TensorSpec, Update, UpdateSpec

#: Matrices whose shorter side is longer than this are left out: their spectrum takes minutes.
MAX_SIDE = 2048


def energies(matrix: Tensor) -> Tensor:
    """Share of the energy in each singular value, ``s_i^2 / sum_j s_j^2``, largest first, fp64.

    Args:
        matrix: ``[rows, cols]``, finite.

    Returns:
        ``[min(rows, cols)]``, summing to one; zeros for a matrix of zeros.
    """
    squares: Tensor = torch.linalg.svdvals(matrix.detach().double()).square()
    return squares / squares.sum().clamp_min(torch.finfo(torch.float64).tiny)


def effective_rank(matrix: Tensor) -> float:
    """``exp(matrix_entropy)``: how many equal directions would be spread out as much.

    1 for rank one, at most the shorter side; 0 for a matrix of zeros. (Roy and Vetterli 2007, with
    energies for singular values.)
    """
    return math.exp(matrix_entropy(matrix)) if bool(matrix.any()) else 0.0


def spectrum(update: Update, each: bool = False, *, of: str = "the update") -> Chart | None:
    """Singular spectrum of each kind of matrix, the mean of its tensors'.

    A tensor's matrix is ``[rows, cols]`` as codecs see it (``layout.matrix_shape``). Vectors,
    integers and matrices with a shorter side above ``MAX_SIDE`` have no line.

    Args:
        update: any update.
        each: a line for each tensor instead of each kind.
        of: what the title calls the update.

    Returns:
        A chart whose bars are effective ranks, and whose cells are shares of energy; ``None`` if
        there is no such matrix.

    Raises:
        NonFiniteError: a matrix holds NaN or Inf.
    """
    spec = UpdateSpec.of(update)
    shapes = {t.name: layout.matrix_shape(t) for t in spec if _has_spectrum(t)}
    found = {
        kind: names for kind, names in kinds(spec, each).items() if all(n in shapes for n in names)
    }
    if not found:
        return None
    short, pattern = labels(list(found))
    rows = []
    for kind, names in found.items():
        shares, ranks = [], []
        for name in names:
            layout.check_finite(update[name], f"inspect: {name!r}")
            matrix = update[name].detach().reshape(shapes[name]).double()
            top = matrix.abs().max()
            if top > 0:
                matrix /= top  # the squares of fp64 values may be beyond fp64
                shares.append(energies(matrix))
                ranks.append(effective_rank(matrix))
        rows.append(_row(short[kind], len(names), min(shapes[names[0]]), shares, ranks))
    return Chart(
        title=f"singular spectrum of {of}" + (f", {pattern}" if pattern else ""),
        measure="effective rank",
        cell="share of the energy",
        across="singular values, largest first",
        heads=("tensors", "of rank", "effective", "90 % in"),
        rows=tuple(rows),
        curves=True,
        logarithmic=True,
    )


def _has_spectrum(t: TensorSpec) -> bool:
    return t.dtype.is_floating_point and 2 <= min(layout.matrix_shape(t)) <= MAX_SIDE


def _row(
    name: str, tensors: int, side: int, shares: Sequence[Tensor], ranks: Sequence[float]
) -> Row:
    if not shares:
        return Row(name, 0.0, (), (f"{tensors}", f"{side}", "all zero", ""))
    mean = torch.stack(list(shares)).mean(0)
    # The first index at which the sum reaches 0.9, of values that add up to one.
    most = 1 + int((mean.cumsum(0) < 0.9 - 1e-12).sum())
    rank = sum(ranks) / len(ranks)
    columns = (f"{tensors}", f"{side}", f"{rank:.1f}", f"{most}")
    return Row(name, rank, tuple(mean.tolist()), columns)


def bases(codec: Codec, each: bool = False) -> Chart | None:
    """Singular spectrum of the bases of each kind of parameter, side by side: do layers agree?

    With orthonormal bases ``U_l`` ``[size, k_l]`` of ``L`` parameters, the squared singular values
    of ``[U_1 ... U_L] / sqrt(L)`` are the eigenvalues of the mean projector ``1/L sum U_l U_l^T``.
    Each is the share of layers whose basis holds that direction: 1 for a direction that all of
    them hold, ``1/L`` for one that a single layer holds. They sum to the mean of ``k_l``. So
    ``SubspaceConfig(share="kind")`` would lose little where the effective rank is near that mean.

    Returns:
        A chart whose bars are effective ranks, and whose cells are these shares; ``None`` if the
        codec has no bases.
    """
    parts = {n: p for n, p in projections(codec.transform).items() if p.basis.shape[1]}
    if not parts or codec.spec is None:
        return None
    # Parameters of a kind have one shape, but their bases may be of either side.
    found: dict[tuple[str, Axis], list[Projection]] = defaultdict(list)
    for kind, names in kinds(codec.spec, each).items():
        for name in names:
            if name in parts:
                found[kind, parts[name].axis].append(parts[name])
    short, pattern = labels(list(dict.fromkeys(kind for kind, _ in found)))
    rows = []
    for (kind, axis), its in found.items():
        joint = torch.cat([p.basis.double().cpu() for p in its], dim=1) / math.sqrt(len(its))
        held, rank = torch.linalg.svdvals(joint).square(), effective_rank(joint)
        directions = sum(p.basis.shape[1] for p in its)
        columns = (f"{len(its)}", f"{axis.size}", f"{directions}", f"{rank:.1f}")
        rows.append(Row(short[kind], rank, tuple(held.tolist()), columns))
    return Chart(
        title="singular spectrum of the bases" + (f", {pattern}" if pattern else ""),
        measure="effective rank, side by side",
        cell="share of layers that hold a direction",
        across="directions, most shared first",
        heads=("bases", "size", "directions", "effective"),
        rows=tuple(rows),
        curves=True,
    )


def projections(transform: Transform) -> dict[str, Projection]:
    """The fitted bases by parameter name; none for a transform without."""
    if isinstance(transform, SubspaceTransform):
        return dict(transform.parts)
    found: dict[str, Projection] = {}
    if isinstance(transform, PartsTransform):
        for part in transform.parts:
            found.update(projections(part.transform))
    return found
