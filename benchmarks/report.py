"""Pages from rows: tables, lists and plots, for a terminal and as Markdown beside the rows.

    python -m benchmarks.report                  # every page, every plot and docs/report.md
    python -m benchmarks.report federated ddp    # these pages, and docs/report.md
    python -m benchmarks.report --base main      # key figures by its rows, and now; writes nothing

None of this runs a benchmark.

A case builds a ``Page`` from its rows; everything that is alike in all pages is here: tables, how a
plot is begun and saved, colours. Ours are thick and warm, the paper's green, peers thin and muted,
the reference black and dashed.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.run import CASES, RESULTS, check_names
from gradcodec.errors import ConfigError

Table = list[tuple[str, ...]]
"""The heading, then a row each."""

Draw = Callable[[Path], None]
"""Draws a plot into a file."""

OURS, PEER = "#d7191c", "#5b7f95"
COLOURS = {
    "ours": (OURS, "#ff7f00", "#e6007e", "#ffb000", "#8b0000", "#a0522d", "#f781bf"),
    "paper": ("#2e7d32", "#81c784", "#00897b", "#9e9d24", "#1b5e20"),
    "peer": (
        PEER,
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


class Page:
    """A report in the order in which a reader meets it.

    Args:
        title: of the page.
        command: makes it.

    Attributes:
        command: as given.
        tables: by title.
    """

    def __init__(self, title: str, command: str) -> None:
        self.command = command
        self.tables: dict[str, Sequence[tuple[str, ...]]] = {}
        self._markdown = [f"# {title}", f"Made by `{command}`."]
        self._text: list[str] = []
        self._plots: dict[str, Draw] = {}

    def table(self, title: str, table: Sequence[tuple[str, ...]]) -> None:
        """A section with one table; the first row is the heading."""
        self.tables[title] = table
        self._markdown += [f"## {title}", "\n".join(markdown(table))]
        self._text += [title, aligned(table)]

    def lines(self, lines: Sequence[str], title: str | None = None) -> None:
        """A list, as a section of its own if it has a title."""
        heads = [] if title is None else [title]
        self._markdown += [*(f"## {t}" for t in heads), "\n".join(f"- {line}" for line in lines)]
        self._text += [*heads, "\n".join(lines)]

    def plots(self, plots: dict[str, Draw]) -> None:
        """Plots by the ends of their names: ``-loss`` of ``ddp.jsonl`` is ``ddp-loss.png``."""
        self._plots |= plots
        self._markdown.append("\n".join(f"![{{stem}}{end}]({{stem}}{end}.png)" for end in plots))

    @property
    def ends(self) -> tuple[str, ...]:
        """The ends of the plots' names."""
        return tuple(self._plots)

    def sources(self, cites: Iterable[str]) -> None:
        """Where what was measured is from; only in the file."""
        lines = [f"- {cite}" for cite in cites]
        if lines:
            self._markdown += ["## Sources", "\n".join(lines)]

    def markdown(self, stem: str) -> str:
        """The page, whose plots are called after ``stem``."""
        text = "\n\n".join(block for block in self._markdown if block)
        return text.replace("{stem}", stem) + "\n"

    def text(self) -> str:
        """The page for a terminal."""
        return "\n\n".join(block for block in self._text if block)

    def write(self, rows: Path) -> str:
        """Write the page and its plots beside the rows.

        Returns:
            ``text()``.

        Raises:
            ConfigError: the page has plots, and matplotlib is not installed.
        """
        stem = rows.stem
        for end, draw in self._plots.items():
            draw(rows.with_name(f"{stem}{end}.png"))
        rows.with_suffix(".md").write_text(self.markdown(stem))
        return self.text()


# -- tables ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Goal:
    """A goal of the project and what came of it; ``met`` is ``None`` if it was not measured."""

    words: str
    met: bool | None
    found: str


def goal_rows(found: Iterable[Goal]) -> Table:
    """A table of goals, plainly."""
    words = {True: "met", False: "**missed**", None: "not measured"}
    return [("goal", "", "found"), *((g.words, words[g.met], g.found) for g in found)]


def spread(values: Sequence[float]) -> str:
    """Mean over seeds and their standard deviation, if there are several."""
    more = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4f}{more}"


def times(ratio: float) -> str:
    """A ratio for people: ``9.8x``, ``120x``, ``1,040x``."""
    return f"{ratio:.1f}x" if ratio < 10 else f"{ratio:,.0f}x"


def aligned(table: Sequence[tuple[str, ...]]) -> str:
    """A table as text; the first column to the left."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = []
    for row in table:
        cells = [
            c.rjust(w) if i else c.ljust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)


def markdown(table: Sequence[tuple[str, ...]]) -> list[str]:
    """A table's lines in Markdown."""
    lines = ["| " + " | ".join(row) + " |" for row in table]
    lines.insert(1, "|---" + "|--:" * (len(table[0]) - 1) + "|")
    return lines


# -- plots -----------------------------------------------------------------------------------------


def figure(rows: int = 1, columns: int = 1, **options: Any) -> tuple[Any, Any]:
    """An empty figure and its axes, as ``pyplot.subplots`` returns them; no window is opened.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
    except ImportError as err:
        raise ConfigError("plots need matplotlib: pip install 'gradcodec[examples]'") from err
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    made: tuple[Any, Any] = plt.subplots(rows, columns, layout="constrained", **options)
    return made


def save_with_legend(made: Any, ax: Any, path: Path) -> None:
    """Write a figure with the legend of one of its axes to its right."""
    handles, labels = ax.get_legend_handles_labels()
    made.legend(handles, labels, loc="outside right center", fontsize=9, frameon=False)
    save(made, path)


def save(made: Any, path: Path) -> None:
    """Write a figure and forget it."""
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    made.savefig(path, dpi=130)
    plt.close(made)


class Styles:
    """How the lines of one plot are drawn: each call gives the next style of a kind."""

    def __init__(self) -> None:
        self._colours = {kind: itertools.cycle(cycle) for kind, cycle in COLOURS.items()}
        self._markers = itertools.cycle(_MARKERS)

    def next(self, kind: str) -> dict[str, Any]:
        """Options of ``Axes.plot``; ``kind`` is ``"reference"`` or a key of ``COLOURS``."""
        if kind == "reference":
            return {"color": "black", "linestyle": "--", "linewidth": 2.0, "zorder": 4}
        thick = kind == "ours"
        return {
            "color": next(self._colours[kind]),
            "marker": next(self._markers),
            "markersize": 4.0,
            "linewidth": 2.6 if thick else 1.2,
            "zorder": 5 if thick else 2,
        }


# -- the command -----------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Make pages again from the rows that are there."""
    from benchmarks import overview

    reported = [name for name, case in CASES.items() if case.page]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"all by default: {reported}")
    parser.add_argument("--rows", type=Path, default=RESULTS, help="folder of the rows")
    parser.add_argument("--base", metavar="REF", help="compare with the rows of a git revision")
    args = parser.parse_args(argv)
    check_names(args.cases, reported)
    if args.base is not None:
        print(overview.compared(args.base, args.rows))
        return 0
    for name in args.cases or reported:
        for stem in CASES[name].pages():
            path = args.rows / f"{stem}.jsonl"
            if not path.exists():
                print(f"no rows yet: {path}")
                continue
            page: Page | None = CASES[name].load_page()(path)
            print(f"no finished reference run in {path}" if page is None else page.write(path))
    if args.rows == RESULTS:
        overview.DOCS.write_text(overview.document())
    return 0


if __name__ == "__main__":
    sys.exit(main())
