"""The plots of the DDP benchmark: held-out loss against steps, and against seconds on each link."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.ddp.figures import Group
from benchmarks.ddp.schemes import REFERENCE, SCHEMES
from benchmarks.ddp.work import WORKS
from benchmarks.links.link import LINKS
from gradcodec.errors import ConfigError

_COLOURS = {
    "ours": ("#d7191c", "#ff7f00", "#e6007e", "#ffb000", "#8b0000", "#a0522d", "#f781bf"),
    "peer": ("#5b7f95", "#8c7aa9", "#a08c6c", "#5fa8a0", "#94727c", "#6c7fb0", "#9aa67a"),
}
_MARKERS = "osv^D<>Pph"


def draw(loaded: Mapping[tuple[str, int], Mapping[int, Group]], stem: Path) -> list[Path]:
    """Write ``<stem>-loss.png`` and ``<stem>-time.png``: two ranks, the first seed.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
    except ImportError as err:
        raise ConfigError("plots need matplotlib: pip install 'gradcodec[examples]'") from err
    mpl.use("Agg")
    groups = {
        work: by_seed[min(by_seed)] for (work, world), by_seed in loaded.items() if world == 2
    }
    if not groups:
        return []
    return [
        _steps(groups, stem.with_name(f"{stem.name}-loss.png")),
        _seconds(groups, stem.with_name(f"{stem.name}-time.png")),
    ]


def _steps(groups: Mapping[str, Group], path: Path) -> Path:
    import matplotlib.pyplot as plt

    size = (6.5 * len(groups) + 2.5, 5.5)
    figure, axes = plt.subplots(1, len(groups), figsize=size, layout="constrained", squeeze=False)
    for ax, (work, group) in zip(axes[0], groups.items(), strict=True):
        for name, style in _styles(group).items():
            points = group[name].base["evaluations"]
            ax.plot([p[0] for p in points], [p[1] for p in points], label=_label(name), **style)
        _frame(ax, group, "steps")
        ax.set_title(WORKS[work].title)
    _finish(figure, axes[0][0], path)
    return path


def _seconds(groups: Mapping[str, Group], path: Path) -> Path:
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    links = [k for k in reversed(LINKS) if any(k in g[REFERENCE].links for g in groups.values())]
    size = (4.8 * len(links) + 2.5, 4.2 * len(groups))
    figure, axes = plt.subplots(
        len(groups), len(links), figsize=size, layout="constrained", squeeze=False
    )
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
    _finish(figure, axes[0][0], path)
    return path


def _styles(group: Group) -> dict[str, dict[str, Any]]:
    """How each line is drawn: ours thick and warm, peers thin and muted, plain DDP dashed."""
    colours = {kind: itertools.cycle(cycle) for kind, cycle in _COLOURS.items()}
    markers = itertools.cycle(_MARKERS)
    out: dict[str, dict[str, Any]] = {}
    for name, scheme in SCHEMES.items():
        if not scheme.plotted:
            continue
        # A colour is a scheme's own, in this group or not, so that figures can be compared.
        if scheme.kind == "reference":
            style: dict[str, Any] = {
                "color": "black",
                "linestyle": "--",
                "linewidth": 2,
                "zorder": 6,
            }
        else:
            thick = scheme.kind == "ours"
            style = {
                "color": next(colours[scheme.kind]),
                "marker": next(markers),
                "markersize": 3.5,
                "linewidth": 2.2 if thick else 1.1,
                "zorder": 5 if thick else 3,
            }
        if name in group:
            out[name] = style
    return out


def _label(name: str) -> str:
    return SCHEMES[name].title


def _frame(ax: Any, group: Group, along: str) -> None:
    """The last part of the way, where schemes differ; one that fails may not flatten the others."""
    plain = [point[1] for point in group[REFERENCE].base["evaluations"]]
    least, first = min(plain), plain[min(1, len(plain) - 1)]
    span = max(first - least, 1e-3)
    ax.set(xlabel=along, ylabel="held-out loss", ylim=(least - 0.1 * span, first + 0.1 * span))
    ax.grid(alpha=0.3, linewidth=0.5)


def _finish(figure: Any, ax: Any, path: Path) -> None:
    import matplotlib.pyplot as plt

    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=9, frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
