"""How good a decoded update is, and whether it depends on what was encoded.

The paper's SNR divides by the error *per element*, so it grows with the size of the model: sending
nothing scores ``n``. Beside it stand relative error, decibels and cosine, which do not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from gradcodec.metrics import cosine, rse, snr_paper
from gradcodec.types import UpdateSpec

Errors = dict[str, float | None]
"""``rse``, ``snr_db``, ``cosine`` and ``snr_paper``; ``None`` stands for infinity."""

Decode = Callable[[Tensor], Tensor]
"""A whole round trip, ``[n] -> [n]``."""


def factors(spec: UpdateSpec) -> dict[str, Tensor]:
    """Positions of LoRA's factors A and B in the flat vector, and of everything: masks ``[n]``."""
    owner = [("B" if "lora_B" in t.name else "A", t.numel) for t in spec]
    is_b = torch.cat([torch.full((size,), name == "B") for name, size in owner])
    return {"A": ~is_b, "B": is_b, "all": torch.ones_like(is_b)}


def errors(x: Tensor, y: Tensor) -> Errors:
    """Errors of the reconstruction ``y`` of ``x``, means over rows if they are ``[K, n]``.

    ``snr_db`` is that of the mean relative error.
    """
    pairs = list(zip(torch.atleast_2d(x), torch.atleast_2d(y), strict=True))
    relative = _mean([rse(a, b) for a, b in pairs])
    return {
        "rse": relative,
        "snr_db": None if not relative else -10 * math.log10(relative),
        "cosine": _mean([cosine(a, b) for a, b in pairs]),
        "snr_paper": _mean([snr_paper(a, b) for a, b in pairs]),
    }


def by_factor(x: Tensor, y: Tensor, masks: Mapping[str, Tensor]) -> dict[str, Errors]:
    """``errors`` of each factor and of all."""
    return {name: errors(x[..., mask], y[..., mask]) for name, mask in masks.items()}


def _mean(values: Sequence[float]) -> float | None:
    mean = sum(values) / len(values)
    return mean if math.isfinite(mean) else None


# -- does the output depend on the input? ----------------------------------------------------------


def gain(out: Tensor, into: Tensor) -> float:
    """``|out|^2 / |into|^2``: share of a difference between inputs that comes out, in energy.

    0 for a decoder that ignores its input, 1 for one that changes nothing; a projection on a
    ``k``-th of all dimensions lets ``1/k`` of white noise through.

    Args:
        out: ``D(x) - D(other)``.
        into: ``x - other``.
    """
    return float(out.double().square().sum() / into.double().square().sum())


def shuffled(x: Tensor, spec: UpdateSpec, seed: int) -> Tensor:
    """``x`` with each tensor's values in random order: the same histogram, another update."""
    generator = torch.Generator().manual_seed(seed)
    parts = torch.split(x, [t.numel for t in spec])
    return torch.cat([p[torch.randperm(p.numel(), generator=generator)] for p in parts])


def noise_like(x: Tensor, sigma: float, seed: int) -> Tensor:
    """White Gaussian noise of standard deviation ``sigma``, of the shape of ``x``."""
    return sigma * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
