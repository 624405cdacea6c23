"""A chart as text: for every row a bar of its value, its columns, and a mark for every cell.

q_proj.lora_A  ██████▌      6   12,288  420  105  12.5%  ▃▄▅▅▇█
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from gradcodec.describe.chart import Chart

BAR = 12
MARKS = 32
NAME = 48

_EIGHTHS = " ▏▎▍▌▋▊▉█"
_HEIGHTS = "▁▂▃▄▅▆▇█"
_NOTHING, _ENDLESS = "·", "∞"


def draw(chart: Chart) -> list[str]:
    """The lines of a chart; the first one is its title.

    Bars are ``value`` over the largest finite value. A mark is a cell over the largest finite one
    of the chart, or of the row if rows are curves; ``·`` is exactly zero, ``∞`` is not finite. If
    the chart is logarithmic, the eight heights of a mark are half a decade each. Rows of more than
    ``MARKS`` cells show means of as many neighbours as necessary.
    """
    top = _top([r.value for r in chart.rows])
    step = max([1, *(-(-len(r.cells) // MARKS) for r in chart.rows)])
    cells = [_thinned(r.cells, step) for r in chart.rows]
    peak = _top([c for its in cells for c in its])
    table = [["", "", *chart.heads, ""]]
    for row, its in zip(chart.rows, cells, strict=True):
        most = _top(its) if chart.curves else peak
        drawn = marks(its, most, chart.logarithmic)
        table.append([_cut(row.name), bar(row.value, top), *row.columns, drawn])
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    several = f", {step} to a mark" if step > 1 else ""
    scale = ", two heights a decade" if chart.logarithmic else ""
    lines = [
        chart.title,
        f"  bars   {chart.measure}",
        f"  marks  {chart.cell}{scale}; {chart.across}{several}",
    ]
    for line in table:
        padded = [c.rjust(w) for c, w in zip(line, widths, strict=True)]
        for i in (0, 1, -1):
            padded[i] = line[i].ljust(widths[i])
        lines.append("  ".join(["", *padded]).rstrip())
    return lines


def bar(value: float, top: float, width: int = BAR) -> str:
    """``value / top`` of ``width`` characters, to an eighth of a character."""
    if not math.isfinite(value):
        return _ENDLESS
    eighths = round(8 * width * min(value / top, 1.0)) if top > 0 else 0
    if value > 0:
        eighths = max(eighths, 1)  # little is not nothing
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()


def marks(cells: Sequence[float], top: float, logarithmic: bool = False) -> str:
    """One character for every cell, as high as the cell over ``top``."""
    return "".join(_mark(c, top, logarithmic) for c in cells)


def _mark(value: float, top: float, logarithmic: bool) -> str:
    if not math.isfinite(value):
        return _ENDLESS
    if value <= 0:
        return _NOTHING
    part = value / top if top > 0 else 0.0
    height = 7 + 2 * math.log10(part) if logarithmic and part > 0 else 8 * part
    return _HEIGHTS[min(max(math.floor(height), 0), 7)]


def _thinned(cells: Sequence[float], step: int) -> list[float]:
    """Means of ``step`` neighbours."""
    parts = [cells[i : i + step] for i in range(0, len(cells), step)]
    return [sum(part) / len(part) for part in parts]


def _top(values: Sequence[float]) -> float:
    return max([0.0, *(v for v in values if math.isfinite(v))])


def _cut(name: str) -> str:
    """A name of at most ``NAME`` characters, which keeps its end: that tells kinds apart."""
    return name if len(name) <= NAME else "…" + name[-NAME + 1 :]
