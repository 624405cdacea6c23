"""How good a reconstruction is. Pure functions of tensors or of updates."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from gradcodec.errors import UpdateError
from gradcodec.types import Update


def flat64(x: Tensor | Update) -> Tensor:
    """All values of a tensor or update as one fp64 vector."""
    tensors = [x] if isinstance(x, Tensor) else list(x.values())
    parts = [t.detach().reshape(-1).double() for t in tensors]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64)


def _pair(x: Tensor | Update, y: Tensor | Update) -> tuple[Tensor, Tensor]:
    """Both as fp64 vectors, two updates matched by name; ``UpdateError`` if they do not match."""
    if isinstance(x, Mapping) and isinstance(y, Mapping):
        if set(x) != set(y):
            raise UpdateError(f"names differ: {sorted(set(x) ^ set(y))[:3]} are in one update only")
        y = {name: y[name] for name in x}
    a, b = flat64(x), flat64(y)
    if a.numel() != b.numel():
        raise UpdateError(f"expected as many values, got {a.numel()} and {b.numel()}")
    return a, b


def rse(x: Tensor | Update, y: Tensor | Update) -> float:
    """Relative squared error ``||y - x||^2 / ||x||^2`` of reconstruction ``y``; 1 for ``y = 0``.

    0 if both are zero, infinity if only ``x`` is.
    """
    a, b = _pair(x, y)
    error, energy = float((b - a).square().sum()), float(a.square().sum())
    if energy == 0:
        return 0.0 if error == 0 else math.inf
    return error / energy


def snr_db(x: Tensor | Update, y: Tensor | Update) -> float:
    """Signal-to-noise ratio ``-10 log10(rse)`` in decibels; 0 dB for ``y = 0``."""
    error = rse(x, y)
    return math.inf if error == 0 else -10 * math.log10(error) if error < math.inf else -math.inf


def snr_paper(x: Tensor | Update, y: Tensor | Update) -> float:
    """CG-FedLLM's "SNR": summed signal energy over *per-element* squared error.

    Inflated by the number of elements ``n``: sending nothing at all scores exactly ``n``. Only for
    comparison with the paper's tables; use ``snr_db``.
    """
    a, b = _pair(x, y)
    error = float((b - a).square().sum()) / max(a.numel(), 1)
    return math.inf if error == 0 else float(a.square().sum()) / error


def cosine(x: Tensor | Update, y: Tensor | Update) -> float:
    """Cosine of the angle between two updates; 0 if one of them is zero."""
    a, b = _pair(x, y)
    norms = float(a.norm() * b.norm())
    return float(a @ b) / norms if norms else 0.0


def matrix_entropy(matrix: Tensor) -> float:
    """Von Neumann entropy (nats) of ``M M^T`` scaled to trace one; ``M`` is ``[rows, features]``.

    The paper's measure of how spread out representations are: 0 for rank one, at most
    ``log(rows)``.
    """
    p = torch.linalg.svdvals(matrix.detach().double()).square()
    p = p[p > 0] / p.sum()
    return float(-(p * p.log()).sum())
