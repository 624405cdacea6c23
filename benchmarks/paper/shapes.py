"""Analysis 4: what the paper draws of gradients: entropy, spectra, surfaces, histograms.

Matrix entropy is that of one factor of one client, and that of the ensemble: the matrix whose rows
are all clients' snapshots. A codec that always says the same may leave each factor its entropy, but
the ensemble has none.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from benchmarks.paper.fidelity import pairs
from benchmarks.paper.measures import factors
from benchmarks.paper.recordings import Recording
from benchmarks.paper.setup import Setup
from gradcodec.describe.spectrum import energies
from gradcodec.metrics import matrix_entropy

QUANTILES = (0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999)
BINS, REACH = 60, 4.0
"""Bins of histograms, from ``-REACH`` to ``REACH`` times the RMS of all rounds."""

Row = dict[str, Any]


def shape(setup: Setup, what: str) -> Row:
    """One object, round by round: by factor, and the surface ``[tensors]`` of extremes."""
    test = setup.test()
    x = test.of(what)
    masks = factors(test.spec)
    rms = {f: float(x[..., masks[f]].double().square().mean().sqrt()) for f in "AB"}
    rounds = []
    for number, own in enumerate(x):
        parts = torch.split(own, [t.numel for t in test.spec], dim=1)
        found: Row = {
            "number": number + 1,
            "highest": [float(part.max()) for part in parts],
            "lowest": [float(part.min()) for part in parts],
        }
        for factor in "AB":
            matrices = _matrices(test, own, factor)
            found[factor] = {
                **_histogram(own[:, masks[factor]], rms[factor]),
                "entropy": _entropy(matrices),
                "spectrum": torch.stack([energies(m) for m in matrices]).mean(0).tolist(),
            }
        rounds.append(found)
    tensors = [t.name for t in test.spec]
    entropy = [r["A"]["entropy"] for r in rounds]
    return {"tensors": tensors, "rms": rms, "rounds": rounds, "loss": sum(entropy) / len(entropy)}


def product(setup: Setup) -> Row:
    """Spectrum of what a client changes in the weights, ``(B + dB)(A + dA) - B A``, by round."""
    rounds = []
    for number in range(setup.rounds):
        changes = [
            change
            for (a, da), (b, db) in pairs(setup.test(), number)
            for change in (b + db) @ (a + da) - b @ a
        ]
        rank = 2 * pairs(setup.test(), number)[0][0][0].shape[1]
        spectra = torch.stack([energies(c)[:rank] for c in changes]).mean(0)
        largest = max(float(c.abs().max()) for c in changes)
        rounds.append({"number": number + 1, "spectrum": spectra.tolist(), "largest": largest})
    return {"rounds": rounds, "loss": 1 - sum(rounds[-1]["spectrum"][: rank // 2])}


def entropy(setup: Setup, name: str) -> Row:
    """Matrix entropy, in nats, of what a coder makes of all clients' updates.

    ``ensemble`` is that of ``[R K, n]``, each snapshot scaled to norm one; at most ``log(R K)``.
    """
    test = setup.test()
    decode = setup.coder(name)
    y = torch.stack([decode(x, seed=k) for k, x in enumerate(test.updates.flatten(0, 1))])
    scaled = y / y.norm(dim=1, keepdim=True).clamp_min(torch.finfo(y.dtype).tiny)
    ensemble = matrix_entropy(scaled) if bool(y.any()) else 0.0
    by_factor = {f: _entropy(_matrices(test, y, f)) for f in "AB"}
    return {"ensemble": ensemble, "most": math.log(len(y)), **by_factor, "loss": ensemble}


def _matrices(test: Recording, x: Tensor, factor: str) -> list[Tensor]:
    """All clients' matrices of a factor, of ``[K, n]``."""
    parts = torch.split(x, [t.numel for t in test.spec], dim=1)
    return [
        one.reshape(t.shape)
        for t, part in zip(test.spec, parts, strict=True)
        if f"lora_{factor}" in t.name
        for one in part
    ]


def _entropy(matrices: list[Tensor]) -> float:
    """The mean; 0 for a matrix of zeros."""
    found = [matrix_entropy(m) if bool(m.any()) else 0.0 for m in matrices]
    return sum(found) / len(found)


def _histogram(x: Tensor, rms: float) -> Row:
    """Counts and quantiles of values; ``excess`` kurtosis is 0 for a Gaussian."""
    values = x.flatten().double()
    edge = REACH * rms
    centred = values - values.mean()
    variance = centred.square().mean()
    fourth = centred.square().square().mean()
    ordered = values.sort().values
    at = [ordered[min(len(ordered) - 1, int(q * len(ordered)))] for q in QUANTILES]
    return {
        "counts": torch.histc(values, BINS, -edge, edge).int().tolist(),
        "quantiles": [float(q) for q in at],
        "rms": float(values.square().mean().sqrt()),
        "excess": float(fourth / variance.square()) - 3 if float(variance) else 0.0,
        "inside_001": float((values.abs() <= 0.01).double().mean()),
    }
