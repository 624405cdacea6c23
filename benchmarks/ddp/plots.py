"""The plots of the DDP benchmark: held-out loss against steps, and against seconds on each link."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.ddp.figures import Group
from benchmarks.ddp.schemes import REFERENCE, SCHEMES
from benchmarks.ddp.work import WORKS
from benchmarks.links.link import LINKS


def drawings(loaded: Mapping[tuple[str, int], Mapping[int, Group]]) -> dict[str, report.Draw]:
    """Losses against steps and against seconds: two ranks, the first seed."""
    groups = {
        work: by_seed[min(by_seed)] for (work, world), by_seed in loaded.items() if world == 2
    }
    if not groups:
        return {}
    return {
        "-loss": functools.partial(_steps, groups),
        "-time": functools.partial(_seconds, groups),
    }


def _steps(groups: Mapping[str, Group], path: Path) -> None:
    size = (6.5 * len(groups) + 2.5, 5.5)
    figure, axes = report.figure(1, len(groups), figsize=size, squeeze=False)
    for ax, (work, group) in zip(axes[0], groups.items(), strict=True):
        for name, style in _styles(group).items():
            points = group[name].base["evaluations"]
            ax.plot([p[0] for p in points], [p[1] for p in points], label=_label(name), **style)
        _frame(ax, group, "steps")
        ax.set_title(WORKS[work].title)
    report.save_with_legend(figure, axes[0][0], path)


def _seconds(groups: Mapping[str, Group], path: Path) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    links = [k for k in reversed(LINKS) if any(k in g[REFERENCE].links for g in groups.values())]
    size = (4.8 * len(links) + 2.5, 4.2 * len(groups))
    figure, axes = report.figure(len(groups), len(links), figsize=size, squeeze=False)
    for line, (work, group) in zip(axes, groups.items(), strict=True):
        for ax, link in zip(line, links, strict=True):
            for name, style in _styles(group).items():
                points = group[name].curve(link)
                if points is not None:
                    xs, ys = [p[1] for p in points[1:]], [p[2] for p in points[1:]]
                    ax.plot(xs, ys, label=_label(name), **style)
            _frame(ax, group, "seconds of training")
            ax.set(title=f"{WORKS[work].title}, {link}", xscale="log")
            ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            ax.xaxis.set_major_formatter(ScalarFormatter())
            ax.xaxis.set_minor_formatter(NullFormatter())
    report.save_with_legend(figure, axes[0][0], path)


def _styles(group: Group) -> dict[str, dict[str, Any]]:
    """How each line is drawn. A colour is a scheme's own, so that figures can be compared."""
    styles = report.Styles()
    drawn = {name: styles.next(s.kind) for name, s in SCHEMES.items() if s.plotted}
    return {name: style for name, style in drawn.items() if name in group}


def _label(name: str) -> str:
    return SCHEMES[name].title


def _frame(ax: Any, group: Group, along: str) -> None:
    """The last part of the way, where schemes differ; one that fails may not flatten the others."""
    plain = [point[1] for point in group[REFERENCE].base["evaluations"]]
    least, first = min(plain), plain[min(1, len(plain) - 1)]
    span = max(first - least, 1e-3)
    ax.set(xlabel=along, ylabel="held-out loss", ylim=(least - 0.1 * span, first + 0.1 * span))
    ax.grid(alpha=0.3, linewidth=0.5)
