"""Schemes that take turns of a few steps in one run, so that a busy machine slows all of them.

    python -m benchmarks.run ddp_auto    # what codec="auto" chooses, and whether that is the best
    python -m benchmarks.run ddp_buckets # whether smaller buckets hide more behind the backward
    python -m benchmarks.run fsdp2       # fully_shard, its reduce-scatters compressed or not

With ``--quick``: two ranks, fewer turns, two links.

Rows: a file of the case's name, one per link and number of ranks, with the seconds of
each turn and what a scheme remarks, such as the line that ``auto`` logs. A page and a plot.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import report, rows
from benchmarks.ddp.case import Run, execute
from benchmarks.ddp.rank import BLOCK, Phase
from benchmarks.ddp.schemes import REFERENCE, scheme_named
from benchmarks.ddp.work import work_named
from benchmarks.report import Page, Table
from benchmarks.run import Options

AUTO = "auto-wide"


QUICK: Mapping[int, Mapping[str, int]] = {2: {"100mbit": 2, "1gbit": 4}}


@dataclass(frozen=True)
class Turns:
    """Schemes beside each other.

    Attributes:
        case: names the file of rows.
        beside: the schemes; the first is what the others are compared with.
        blocks: turns of so many ranks on each link.
    """

    case: str
    beside: tuple[str, ...]
    blocks: Mapping[int, Mapping[str, int]]

    def run(self, options: Options, page: Callable[[Path], Page | None]) -> list[str]:
        """Measure what is missing and write the page; what failed, as text."""
        work = work_named("llama")
        path = options.out / f"{self.case}.jsonl"
        name = "+".join(self.beside)
        runs = []
        for world, blocks in (QUICK if options.quick else self.blocks).items():
            phases = tuple(Phase(n, BLOCK * count, self.beside) for n, count in blocks.items())
            steps = max(phase.steps for phase in phases)
            recipe = work.recipe
            runs.append(Run(work.name, world, name, 0, recipe.lr, steps, phases, case=self.case))
        failed = execute(runs, path, again=options.again)
        made = page(path)
        if made is not None:
            print(made.write(path))
        return failed

    def speeds(self, row: rows.Row) -> dict[str, float]:
        """Speed of each other scheme as a multiple of the first's: the median over the turns."""
        blocks = row["blocks"]
        first = blocks[self.beside[0]]
        return {
            name: statistics.median(p / s for p, s in zip(first, blocks[name], strict=True))
            for name in self.beside[1:]
        }

    def table(self, measured: Sequence[rows.Row]) -> Table:
        """A row per link and number of ranks."""
        head = ["link", "ranks", *(_title(name) for name in self.beside[1:])]
        out: Table = [tuple(head)]
        for row in measured:
            cells = [f"{speed:.2f}x" for speed in self.speeds(row).values()]
            out.append((row["link"], f"{row['config']['world']}", *cells))
        return out

    def parts(self, row: rows.Row) -> Table:
        """Of each scheme, the means of what its hook did; what they hide is what a step saves.

        Hidden is what goes on beside the backward pass, or beside each other; it is not told where
        a step exchanges something else too, as parameters are gathered under FSDP.
        """
        names = ("encode", "exchange", "decode")
        out: Table = [("scheme", "step", "compute", *names, "hidden")]
        compute = 1000 * row["compute_s"]
        for scheme in self.beside:
            step, found = 1000 * statistics.median(row["blocks"][scheme]), row["parts"][scheme]
            if not any(found.values()):  # left to DDP, which tells no times
                found = {}
            told = [f"{1000 * found[part]:.1f}" if part in found else "" for part in names]
            spent = 1000 * sum(found.values())
            known = found and self.beside[0] == REFERENCE
            hidden = f"{spent - (step - compute):.1f}" if known else ""
            out.append((_title(scheme), f"{step:.1f}", f"{compute:.1f}", *told, hidden))
        return out

    def page(self, measured: Sequence[rows.Row], title: str, table: Table | None = None) -> Page:
        """The speeds, the spread of the steps behind them, and a plot.

        Args:
            measured: rows, at least one.
            title: of the page.
            table: in place of the plain one.
        """
        first = _title(self.beside[0])
        page = Page(f"{title}: in turns with {first}", f"python -m benchmarks.run {self.case}")
        page.table(f"Speed, as a multiple of {first}'s", table or self.table(measured))
        steps: Table = [("link", "ranks", *(_title(name) for name in self.beside))]
        for row in measured:
            each = [sorted(1000 * s for s in row["blocks"][name]) for name in self.beside]
            cells = [f"{statistics.median(b):.0f} [{b[0]:.0f}..{b[-1]:.0f}] ms" for b in each]
            steps.append((row["link"], f"{row['config']['world']}", *cells))
        page.table("A step: median [fastest..slowest] of the turns", steps)
        for row in measured:
            if any(row.get("parts", {}).values()):
                where = f"{row['link']}, {row['config']['world']} ranks"
                page.table(f"Where the milliseconds of a step go: {where}", self.parts(row))
        last = measured[-1]
        page.lines(
            [
                f"the embedded LLaMA, all parameters trained; a turn is {BLOCK} steps, its median "
                "counts; speeds are medians over turns of the ratio within a turn",
                f"torch {last['versions']['torch']}, {last['machine']}; links: {last['network']}",
            ],
            "How to read this",
        )
        page.plots({"-speed": functools.partial(_plot, self, measured)})
        return page


#: A step of plain DDP takes 20 seconds on the slowest link.
LADDER = Turns(
    "ddp_auto",
    (REFERENCE, "int4", "int2-rot", "sign-rot", AUTO),
    {
        2: {"10mbit": 2, "100mbit": 4, "1gbit": 8, "unshaped": 12},
        4: {"100mbit": 4, "1gbit": 8, "unshaped": 8},
    },
)

BUCKETS = Turns(
    "ddp_buckets",
    (REFERENCE, "ddp-4mb", "int4", "int4-4mb", "sign-rot", "sign-rot-4mb"),
    {2: {"100mbit": 4, "1gbit": 10, "unshaped": 10}},
)

SHARDED = Turns(
    "fsdp2",
    ("fsdp2", "fsdp2-int4-waits", "fsdp2-int4", "fsdp2-int2"),
    {2: {"100mbit": 5, "1gbit": 8, "unshaped": 12}},
)


def auto(options: Options) -> list[str]:
    """``codec="auto"`` with ``quality=0.4``, plain DDP and each codec of the ladder."""
    return LADDER.run(options, auto_page)


def buckets(options: Options) -> list[str]:
    """DDP's own buckets and smaller ones."""
    return BUCKETS.run(options, buckets_page)


def sharded(options: Options) -> list[str]:
    """``fully_shard`` as torch has it, and with compressed reduce-scatters."""
    return SHARDED.run(options, sharded_page)


# -- pages ---------------------------------------------------------------------------------------


def auto_page(path: Path) -> Page | None:
    """How ``auto`` compares with the best of what it chose from, and what it logged."""
    measured = finished(path)
    if not measured:
        return None
    page = LADDER.page(measured, "What `auto` chooses", ladder_table(measured))
    told = [
        f"{row['link']}, {row['config']['world']} ranks: {row['notes'][AUTO]['auto']}"
        for row in measured
    ]
    page.lines(told, "What it logged")
    return page


def buckets_page(path: Path) -> Page | None:
    """Whether smaller buckets hide more."""
    measured = finished(path)
    return BUCKETS.page(measured, "Smaller buckets") if measured else None


def sharded_page(path: Path) -> Page | None:
    """What FSDP2 gains."""
    measured = finished(path)
    return SHARDED.page(measured, "FSDP2") if measured else None


def finished(path: Path) -> list[rows.Row]:
    """The rows of what did not fail."""
    return [row for row in rows.read(path) if "failed" not in row]


def ladder_table(measured: Sequence[rows.Row]) -> Table:
    """With how ``auto`` compares with the best of them, plain DDP included."""
    head, *body = LADDER.table(measured)
    out: Table = [(*head, "auto / best of them")]
    for cells, row in zip(body, measured, strict=True):
        speeds = LADDER.speeds(row)
        best = max([1.0, *(speed for name, speed in speeds.items() if name != AUTO)])
        out.append((*cells, f"{speeds[AUTO] / best:.0%}"))
    return out


def _plot(turns: Turns, measured: Sequence[rows.Row], path: Path) -> None:
    """Speeds as bars, a group for each link and number of ranks."""
    made, ax = report.figure(figsize=(7, 0.9 * len(measured) + 1.4))
    height = 0.8 / (len(turns.beside) - 1)
    for i, name in enumerate(turns.beside[1:]):
        at = [group + height * i for group in range(len(measured))]
        ax.barh(at, [turns.speeds(row)[name] for row in measured], height, label=_title(name))
    middle = height * (len(turns.beside) - 2) / 2
    labels = [f"{row['link']}, {row['config']['world']} ranks" for row in measured]
    ax.set_yticks([group + middle for group in range(len(measured))], labels)
    ax.axvline(1, color="black", linewidth=0.8)
    ax.invert_yaxis()
    ax.set_xscale("log")
    ax.set_xticks(ticks := [0.8, 1, 1.5, 2, 3, 5, 10, 20, 30], [f"{t:g}x" for t in ticks])
    ax.minorticks_off()
    low, high = ax.get_xlim()
    ax.set_xlim(min(low, 0.8), high)
    ax.set_xlabel(f"speed, as a multiple of {_title(turns.beside[0])}'s")
    ax.legend(frameon=False)
    report.save(made, path)


def _title(name: str) -> str:
    return scheme_named(name).title
