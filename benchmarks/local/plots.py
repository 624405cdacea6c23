"""The plots of the benchmark of local steps: loss against bytes, and against steps."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.local.figures import NEAR, Group, figures, total
from benchmarks.local.schemes import REFERENCE, SCHEMES


def drawings(by_seed: Mapping[int, Group]) -> dict[str, report.Draw]:
    """Last losses against bytes, means over seeds; the way there, of the first seed."""
    first = by_seed[min(by_seed)]
    return {
        "-bytes": functools.partial(_bytes, by_seed),
        "-loss": functools.partial(_losses, first),
    }


def _styles() -> dict[str, dict[str, Any]]:
    """How each scheme is drawn, whichever were run."""
    styles = report.Styles()
    return {name: styles.next(scheme.kind) for name, scheme in SCHEMES.items()}


def _bytes(by_seed: Mapping[int, Group], path: Path) -> None:
    figure, ax = report.figure(figsize=(9.5, 5.5))
    styles = _styles()
    known = {name: f for name, f in figures(by_seed).items() if not f.diverged}
    for name, found in known.items():
        style = {"marker": "*", **styles[name], "linestyle": "", "markersize": 9.0}
        ax.plot([found.nbytes / 1e6], [100 * found.excess], label=SCHEMES[name].title, **style)
    ax.axhline(100 * NEAR, color="black", linewidth=0.8, linestyle=":")
    ax.set(
        xscale="log",
        xlabel="MB sent by a rank in the training",
        ylabel="held-out loss above plain DDP's, %",
    )
    ax.grid(alpha=0.3, linewidth=0.5)
    report.save_with_legend(figure, ax, path)


def _losses(group: Group, path: Path) -> None:
    figure, (left, right) = report.figure(1, 2, figsize=(14.0, 5.5), sharey=True)
    for name, style in _styles().items():
        if name not in group or group[name]["diverged"]:
            continue
        row = group[name]
        points = row["evaluations"][1:]
        losses = [point[1] for point in points]
        left.plot([p[0] for p in points], losses, label=SCHEMES[name].title, **style)
        per_step = total(row) / row["steps"]
        right.plot([p[0] * per_step / 1e6 for p in points], losses, **style)
    low = group[REFERENCE]["loss"]
    left.set(xlabel="steps", ylabel="held-out loss", ylim=(low - 0.1, low + 2.0))
    right.set(xlabel="MB sent by a rank", xscale="log")
    right.grid(alpha=0.3, linewidth=0.5)
    left.grid(alpha=0.3, linewidth=0.5)
    report.save_with_legend(figure, left, path)
