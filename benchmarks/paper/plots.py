"""The plots of the page of ``paper.jsonl``: ours warm, the paper's green, controls grey."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.paper.coders import CODERS
from benchmarks.paper.results import Results, mean

_LINES = ("--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)), (0, (6, 3)), (0, (3, 2, 1, 2)))


def styles(names: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Label and line style of each coder."""
    known = report.Styles()
    controls = 0
    for name in names:
        coder = CODERS[name]
        if coder.kind == "control":
            line = _LINES[controls % len(_LINES)]
            controls += 1
            yield coder.title, {"color": "#808080", "linestyle": line, "linewidth": 1.2}
        else:
            yield coder.title, known.next(coder.kind)


def _legend(ax: Any) -> None:
    ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, frameon=False)


def snr(results: Results, path: Path) -> None:
    """The paper's SNR, and cosines of clients' updates and of the round's mean, over rounds."""
    figure, axes = report.figure(1, 3, figsize=(16, 4.6))
    names = results.schemes("snr")
    panels = (
        ("SNR as in the paper", "client", "snr_paper"),
        ("Cosine of a client's update", "client", "cosine"),
        ("Cosine of the round's mean", "mean", "cosine"),
    )
    for ax, (title, whose, metric) in zip(axes, panels, strict=True):
        for name, (label, style) in zip(names, styles(names), strict=True):
            rows = results("snr", name)
            numbers = [r["number"] for r in rows[0]["rounds"]]
            values = [
                mean(row["rounds"][at][whose]["all"][metric] for row in rows)
                for at in range(len(numbers))
            ]
            if None not in values:  # infinite: nothing to draw
                ax.plot(numbers, values, label=label, **style)
        ax.set(title=title, xlabel="round", xticks=numbers)
        ax.grid(alpha=0.3, linewidth=0.5)
    axes[0].set_yscale("log")
    size = results("size", "identity")
    if size:
        n = size[0]["numel"]
        axes[0].axhline(n, color="black", linewidth=0.8)
        axes[0].annotate(
            f"n = {n:,}: sending nothing",
            (0.02, n),
            xycoords=("axes fraction", "data"),
            xytext=(0, 4),
            textcoords="offset points",
            fontsize=8,
        )
    _legend(axes[-1])
    report.save(figure, path)
