"""Charts of ``gradcodec inspect`` as one PNG; needs matplotlib, which is imported when it draws.

A chart of curves becomes a panel of lines, any other a map of rows and tensors, or bars where every
row has one tensor only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gradcodec import files
from gradcodec.describe import Chart, Row
from gradcodec.errors import ConfigError
from gradcodec.recipes.report import require_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

#: Rows of a panel; more can be read only as text.
MAX_ROWS = 40
_WIDTH = 10.0
_DPI = 120
_LABEL = 40


def check(path: str | Path) -> None:
    """Whether a picture could be drawn to this path; to be called before the work is done.

    Raises:
        ConfigError: the name does not end in ``.png``, or matplotlib is not installed.
    """
    if Path(path).suffix.lower() != ".png":
        raise ConfigError(f"expected a picture's name that ends in .png, got {str(path)!r}")
    require_matplotlib()


def save(charts: Sequence[Chart], title: str, facts: Sequence[str], path: str | Path) -> None:
    """Draw charts below each other into a PNG of 1,200 pixels width, written whole or not at all.

    Args:
        charts: from top to bottom; those without cells are left out.
        title: of the whole picture.
        facts: what the line below the title says.
        path: the file.

    Raises:
        ConfigError: as ``check``, or there is no chart.
        OSError: the file cannot be written.
    """
    check(path)
    drawable = [c for c in charts if any(row.cells for row in c.rows)]
    if not drawable:
        raise ConfigError(
            "nothing to draw: give an update's file with --update, or a codec that was fitted"
        )
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    heights = [_height(chart) for chart in drawable]
    head = 0.5 if facts else 0.3
    figure = Figure(figsize=(_WIDTH, head + sum(heights)), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    # Every panel is laid out by itself: a long legend of one takes no room from the others.
    shares = [head, *heights]
    top, *panels = figure.subfigures(len(shares), 1, squeeze=False, height_ratios=shares).ravel()
    lines = [_short(title, 90), *([_short(" · ".join(facts), 120)] if facts else [])]
    top.text(0.5, 0.45, "\n".join(lines), ha="center", va="center", fontsize=10)
    for chart, panel in zip(drawable, panels, strict=True):
        ax = panel.subplots()
        left = len(chart.rows) - MAX_ROWS
        more = f" (the first {MAX_ROWS} of {len(chart.rows)} rows)" if left > 0 else ""
        ax.set_title(_short(chart.title + more, 90), fontsize=10, loc="left", fontweight="bold")
        rows = chart.rows[:MAX_ROWS]
        if chart.curves:
            _curves(ax, chart, rows)
        elif max(len(row.cells) for row in rows) > 1:
            _map(panel, ax, chart, rows)
        else:
            _bars(ax, chart, rows)
    with files.replacing(path) as file:
        figure.savefig(file, format="png", dpi=_DPI)


def _height(chart: Chart) -> float:
    """Inches of a panel, axis and title included."""
    rows = min(len(chart.rows), MAX_ROWS)
    return max(3.2, 0.18 * rows + 1.0) if chart.curves else max(1.9, 0.22 * rows + 1.1)


def _curves(ax: Axes, chart: Chart, rows: Sequence[Row]) -> None:
    """One line for each row, its cells against their number."""
    from matplotlib import colormaps

    colours = colormaps["tab20"]
    longest = 1
    for i, row in enumerate(r for r in rows if r.cells):
        cells = [c if c > 0 or not chart.logarithmic else math.nan for c in row.cells]
        longest = max(longest, len(cells))
        ax.plot(
            range(1, len(cells) + 1),
            [100 * c for c in cells],
            color=colours((2 * i % 20 + i // 10) % 20),
            linestyle=("-", "--", ":")[i // 20 % 3],
            marker="o" if len(cells) <= 32 else None,
            markersize=3,
            linewidth=1.5,
            label=f"{_short(row.name)}  ({_number(row.value)})",
        )
    if chart.logarithmic:
        ax.set_yscale("log")
        # What rounding leaves of exact zeros would flatten everything else.
        top = max(c for r in rows for c in r.cells)
        ax.set_ylim(max(100 * top * 1e-8, ax.get_ylim()[0]), 200 * top)
    else:
        ax.set_ylim(bottom=0)
    if longest > 64:
        ax.set_xscale("log")
    else:
        ax.locator_params(axis="x", integer=True)
    ax.set_xlabel(chart.across)
    ax.set_ylabel(f"{chart.cell}, %", fontsize=9)
    ax.grid(alpha=0.3)
    ax.legend(
        fontsize=8,
        title=f"({chart.measure})",
        title_fontsize=8,
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
        frameon=False,
    )


def _map(panel: SubFigure, ax: Axes, chart: Chart, rows: Sequence[Row]) -> None:
    """One coloured square for each cell; white where a row has no such tensor, ∞ if infinite."""
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm, Normalize

    wide = max(len(row.cells) for row in rows)
    finite = [[c if math.isfinite(c) else math.nan for c in row.cells] for row in rows]
    grid = [[*cells, *[math.nan] * (wide - len(cells))] for cells in finite]
    positive = [c for cells in finite for c in cells if c > 0]
    colours = colormaps["viridis"].with_extremes(bad="white", under="0.85")
    norm: Normalize = Normalize(0, max(positive, default=1.0))
    if chart.logarithmic and positive:
        norm = LogNorm(min(positive), max(positive))
    image = ax.imshow(grid, aspect="auto", cmap=colours, norm=norm, interpolation="none")
    for i, row in enumerate(rows):
        for j, cell in enumerate(row.cells):
            if not math.isfinite(cell):
                ax.text(j, i, "∞", ha="center", va="center", color="red", fontsize=8)
    _name_rows(ax, chart, rows)
    ax.locator_params(axis="x", integer=True)
    ax.set_xlabel(chart.across)
    panel.colorbar(image, ax=ax, label=chart.cell, pad=0.01, fraction=0.06)


def _bars(ax: Axes, chart: Chart, rows: Sequence[Row]) -> None:
    """One bar for each row; without end if it is infinite."""
    finite = [row.value for row in rows if math.isfinite(row.value)]
    top = max(finite, default=0.0) or 1.0
    values = [row.value if math.isfinite(row.value) else 1.05 * top for row in rows]
    colours = ["tab:blue" if math.isfinite(row.value) else "tab:red" for row in rows]
    ax.barh(range(len(rows)), values, color=colours, height=0.7)
    ax.set_xlim(0, 1.1 * max(*values, top))
    ax.set_ylim(len(rows) - 0.5, -0.5)
    if chart.logarithmic:
        ax.set_xscale("log")
        ax.set_xlim(min((v for v in finite if v > 0), default=top) / 2, 2 * top)
    _name_rows(ax, chart, rows)
    ax.set_xlabel(chart.measure)
    ax.grid(axis="x", alpha=0.3)


def _name_rows(ax: Axes, chart: Chart, rows: Sequence[Row]) -> None:
    names = [f"{_short(row.name)}  ({_number(row.value)})" for row in rows]
    ax.set_yticks(range(len(rows)), names, fontsize=8)
    ax.set_ylabel(f"kind ({chart.measure.partition(' (')[0]})", fontsize=9)


def _short(text: str, limit: int = _LABEL) -> str:
    # matplotlib reads text between dollar signs as a formula.
    text = text.replace("$", r"\$")
    return text if len(text) <= limit else "…" + text[-limit + 1 :]


def _number(x: float) -> str:
    if not math.isfinite(x):
        return "∞"
    return f"{x:,.0f}" if x >= 1000 or x == int(x) else f"{x:.3g}"
