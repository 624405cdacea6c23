"""The plots of the federated benchmark: loss against bytes, bytes to a target.

Ours are thick and warm, the paper's green, peers thin and muted, fp32 black and dashed; a band
spans the seeds.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.federated.figures import TARGETS, WAYS, cost, sent
from benchmarks.federated.scheme import KINDS, Scheme
from benchmarks.rows import Row
from gradcodec.errors import ConfigError

Line = tuple[Scheme, dict[int, list[Row]]]

MOST_LINES = 14

_COLOURS = {
    "ours": ("#d7191c", "#ff7f00", "#e6007e", "#ffb000", "#8b0000", "#a0522d", "#f781bf"),
    "paper": ("#2e7d32", "#81c784"),
    "peer": (
        "#5b7f95",
        "#8c7aa9",
        "#a08c6c",
        "#5fa8a0",
        "#94727c",
        "#6c7fb0",
        "#9aa67a",
        "#7d7d7d",
        "#b08fa0",
        "#4d6b57",
    ),
}
_MARKERS = "osv^D<>Pph"


def draw(lines: Sequence[Line], reference: Mapping[int, list[Row]], stem: Path) -> list[Path]:
    """Write ``<stem>-uplink.png``, ``-both.png``, ``-codec.png`` and ``-targets.png``.

    Args:
        lines: schemes with their runs by seed, in order; those not ``plotted`` are left out.
        reference: fp32's runs by seed.
        stem: path without suffix.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
    except ImportError as err:
        raise ConfigError("plots need matplotlib: pip install 'gradcodec[examples]'") from err
    mpl.use("Agg")
    wanted = [line for line in lines if line[0].plotted]
    wanted.sort(key=lambda line: KINDS.index(line[0].kind))
    styled = list(_styled(wanted[:MOST_LINES]))
    left = len(lines) - len(styled)
    more = f"(and {left} more in the tables)" if left else "_none"  # matplotlib hides _names
    curves = [
        _curves(styled, reference, way, stem.with_name(f"{stem.name}-{way}.png"), more)
        for way in WAYS
    ]
    return [*curves, _targets(styled, reference, stem.with_name(f"{stem.name}-targets.png"), more)]


def _styled(lines: Iterable[Line]) -> Iterable[tuple[Line, dict[str, Any]]]:
    """Each line with how it is drawn."""
    colours = {kind: itertools.cycle(cycle) for kind, cycle in _COLOURS.items()}
    markers = itertools.cycle(_MARKERS)
    for line in lines:
        kind = line[0].kind
        if kind == "reference":
            yield line, {"color": "black", "linestyle": "--", "linewidth": 2.0, "zorder": 4}
            continue
        style = {"color": next(colours[kind]), "marker": next(markers), "markersize": 4.0}
        thick = kind == "ours"
        yield line, {**style, "linewidth": 2.6 if thick else 1.2, "zorder": 5 if thick else 2}


def _curves(
    styled: Sequence[tuple[Line, dict[str, Any]]],
    reference: Mapping[int, list[Row]],
    way: str,
    path: Path,
    more: str,
) -> Path:
    """Held-out loss against cumulative bytes; mean and span of the seeds."""
    import matplotlib.pyplot as plt

    start = statistics.fmean(run[0]["start_loss"] for run in reference.values())
    best = statistics.fmean(run[-1]["loss"] for run in reference.values())
    # The first round does most of the work; a codec that destroys the model may not flatten the
    # curves that are to be compared.
    fall = start - best
    top = best + 0.55 * fall
    figure, ax = plt.subplots(figsize=(11, 6), layout="constrained")
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
    return path


def _targets(
    styled: Sequence[tuple[Line, dict[str, Any]]],
    reference: Mapping[int, list[Row]],
    path: Path,
    more: str,
) -> Path:
    """Bytes to each share of fp32's gain; a line ends where not all seeds get there."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(17, 6), layout="constrained", sharey=True)
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
    return path


def _finish(figure: Any, ax: Any, path: Path, more: str) -> None:
    """Legend beside the axes, grid, file."""
    import matplotlib.pyplot as plt

    ax.grid(alpha=0.3, which="both", linewidth=0.5)
    ax.plot([], [], " ", label=more)
    ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9, frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
