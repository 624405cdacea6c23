"""The plots of the federated benchmark: loss against bytes, bytes to a target; a band is seeds."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.federated.figures import TARGETS, WAYS, cost, sent
from benchmarks.federated.scheme import KINDS, Scheme
from benchmarks.rows import Row

Line = tuple[Scheme, dict[int, list[Row]]]
Styled = Sequence[tuple[Line, dict[str, Any]]]

MOST_LINES = 14


def drawings(lines: Sequence[Line], reference: Mapping[int, list[Row]]) -> dict[str, report.Draw]:
    """One plot of the losses for each way of counting bytes, and one of the targets.

    Args:
        lines: schemes with their runs by seed, in order; those not ``plotted`` are left out.
        reference: fp32's runs by seed.
    """
    wanted = [line for line in lines if line[0].plotted]
    wanted.sort(key=lambda line: KINDS.index(line[0].kind))
    styles = report.Styles()
    styled = [(line, styles.next(line[0].kind)) for line in wanted[:MOST_LINES]]
    left = len(lines) - len(styled)
    more = f"(and {left} more in the tables)" if left else "_none"  # matplotlib hides _names
    return {
        **{f"-{way}": functools.partial(_curves, styled, reference, way, more) for way in WAYS},
        "-targets": functools.partial(_targets, styled, reference, more),
    }


def _curves(
    styled: Styled, reference: Mapping[int, list[Row]], way: str, more: str, path: Path
) -> None:
    """Held-out loss against cumulative bytes; mean and span of the seeds."""
    start = statistics.fmean(run[0]["start_loss"] for run in reference.values())
    best = statistics.fmean(run[-1]["loss"] for run in reference.values())
    # The first round does most of the work; a codec that destroys the model may not flatten the
    # curves that are to be compared.
    fall = start - best
    top = best + 0.55 * fall
    figure, ax = report.figure(figsize=(11, 6))
    for (scheme, by_seed), style in styled:
        # A curve ends with its shortest run: a diverged one has no more rounds.
        together = list(zip(*by_seed.values(), strict=False))
        together = [rs for rs in together if not any(r["diverged"] for r in rs)]
        if not together:
            continue
        xs = [statistics.fmean(sent(r, way) for r in rs) for rs in together]
        losses = [[r["loss"] for r in rs] for rs in together]
        means = [statistics.fmean(ys) for ys in losses]
        above = " (above the chart)" if min(means) > top else ""
        ax.plot(xs, means, label=scheme.title + above, **style)
        lows, highs = [min(ys) for ys in losses], [max(ys) for ys in losses]
        ax.fill_between(xs, lows, highs, color=style["color"], alpha=0.12, linewidth=0)
    ax.set(
        title="Held-out loss against bytes",
        xlabel=f"cumulative wire bytes of all clients: {WAYS[way]}",
        ylabel="nats per answer token",
        xscale="log",
        ylim=(best - 0.05 * fall, top),
    )
    _finish(figure, ax, path, more)


def _targets(styled: Styled, reference: Mapping[int, list[Row]], more: str, path: Path) -> None:
    """Bytes to each share of fp32's gain; a line ends where not all seeds get there."""
    figure, axes = report.figure(1, 3, figsize=(17, 6), sharey=True)
    for ax, (way, words) in zip(axes, WAYS.items(), strict=True):
        for (scheme, by_seed), style in styled:
            costs = [cost(by_seed, reference, share, way) for share in TARGETS]
            means = [statistics.fmean(c) if c else math.nan for c in costs]
            lows = [min(c) if c else math.nan for c in costs]
            highs = [max(c) if c else math.nan for c in costs]
            places = range(len(TARGETS))
            drawn = {"marker": "o", **style}
            missed = " (not reached)" if all(map(math.isnan, means)) else ""
            ax.plot(places, means, label=scheme.title + missed, **drawn)
            ax.fill_between(places, lows, highs, color=style["color"], alpha=0.12, linewidth=0)
        ax.set(
            title=words,
            xlabel="share of fp32's final gain",
            yscale="log",
            xticks=range(len(TARGETS)),
            xticklabels=[f"{share:.0%}" for share in TARGETS],
        )
        ax.grid(alpha=0.3, which="both", linewidth=0.5)
    axes[0].set_ylabel("wire bytes of all clients")
    figure.suptitle("Bytes to a share of the uncompressed run's gain")
    _finish(figure, axes[-1], path, more)


def _finish(figure: Any, ax: Any, path: Path, more: str) -> None:
    """Legend beside the axes, grid, file."""
    ax.grid(alpha=0.3, which="both", linewidth=0.5)
    ax.plot([], [], " ", label=more)
    ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9, frameon=False)
    report.save(figure, path)
