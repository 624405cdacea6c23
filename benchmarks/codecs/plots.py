"""The plot of the codecs benchmark: error against bits on gradients, and speed against a copy.

Ours are warm, peers muted, as in the other plots; bars are thick for encode, thin for decode.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.codecs.coders import SCHEMES
from benchmarks.codecs.data import TITLES
from benchmarks.rows import Row

_OURS, _TORCH, _PEER = report.OURS, "#ffb000", report.PEER
_SHOWN = ("gradient", "update")
_WORST = 3.0


def draw(
    errors: Mapping[str, Row], bars: Sequence[tuple[str, str, float, float]], path: Path
) -> None:
    """Write the plot.

    Args:
        errors: by scheme, with ``bits`` and ``nmse`` on each set.
        bars: scheme, implementation, encode and decode as ratios to a copy.
        path: of the PNG.
    """
    height = max(7.0, 0.24 * len(bars) + 1.5)
    figure, axes = report.figure(1, 3, figsize=(24, height), width_ratios=(1, 1, 0.9))
    for ax, name in zip(axes, _SHOWN, strict=False):
        _errors(ax, name, errors)
    _speeds(axes[-1], bars)
    report.save(figure, path)


def _errors(ax: Any, name: str, errors: Mapping[str, Row]) -> None:
    points = [
        (row[name]["bits"], min(row[name]["nmse"], _WORST), scheme)
        for scheme, row in errors.items()
    ]
    for ours, colour, marker, label in (
        (True, _OURS, "o", "gradcodec"),
        (False, _PEER, "s", "peers"),
    ):
        mine = [p for p in points if (SCHEMES[p[2]].kind == "ours") == ours]
        ax.scatter(
            [p[0] for p in mine],
            [p[1] for p in mine],
            color=colour,
            marker=marker,
            s=36,
            label=label,
            zorder=4 if ours else 3,
        )
    _annotate(ax, points)
    ax.set(
        title=f"Error against bits: {TITLES[name]}",
        xlabel="bits a value, as bytes cross the wire",
        ylabel="NMSE",
        xscale="log",
        yscale="log",
    )
    ticks = [0.0625, 0.125, 0.25, 0.5, 1, 2, 4, 8, 16]
    ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
    ax.minorticks_off()
    ax.set_xlim(0.04, max([40.0, *(4 * p[0] for p in points)]))
    ax.grid(alpha=0.3, linewidth=0.5)
    ax.legend(loc="lower left", frameon=False)


def _annotate(ax: Any, points: Sequence[tuple[float, float, str]]) -> None:
    """Names beside the points, shifted down where one would stand on another."""
    placed: list[tuple[float, float]] = []
    for bits, nmse, scheme in sorted(points, key=lambda p: -p[1]):
        x, y = math.log2(bits), math.log10(nmse)
        while any(abs(x - px) < 2.5 and abs(y - py) < 0.05 for px, py in placed):
            y -= 0.028
        placed.append((x, y))
        colour = _OURS if SCHEMES[scheme].kind == "ours" else _PEER
        ax.annotate(
            scheme if nmse < _WORST else f"{scheme} (above the chart)",
            (bits, nmse),
            xytext=(bits * 1.06, 10**y),
            fontsize=6.5,
            color=colour,
            va="center",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.3, "alpha": 0.6},
        )


def _speeds(ax: Any, bars: Sequence[tuple[str, str, float, float]]) -> None:
    ordered = sorted(bars, key=lambda bar: bar[2])
    for place, (scheme, impl, encode, decode) in enumerate(ordered):
        ours = SCHEMES[scheme].kind == "ours"
        colour = (_TORCH if impl == "reference" else _OURS) if ours else _PEER
        ax.barh(place + 0.14, encode, height=0.5, color=colour)
        ax.barh(place - 0.27, decode, height=0.22, color=colour, alpha=0.45)
    # Colours are those of the legends beside; in torch, ours are yellow and say so.
    names = [f"{s}{' (torch)' if impl == 'reference' else ''}" for s, impl, _, _ in ordered]
    ax.set_yticks(range(len(ordered)), names, fontsize=7.5)
    ax.set_ylim(-0.8, len(ordered) - 0.2)
    ax.axvline(1, color="black", linestyle="--", linewidth=1)
    ax.set(
        title="Speed on one core: thick encode, thin decode",
        xlabel="GB/s of values over those of a copy",
        xscale="log",
    )
    ax.grid(alpha=0.3, axis="x", linewidth=0.5)
