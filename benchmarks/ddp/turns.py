"""Schemes that take turns of a few steps in one run, so that a busy machine slows all of them.

    python -m benchmarks.run ddp_auto    # what codec="auto" chooses, and whether that is the best
    python -m benchmarks.run ddp_buckets # whether smaller buckets hide more behind the backward
    python -m benchmarks.run fsdp2       # fully_shard, its reduce-scatters compressed or not

With ``--quick``: two ranks, fewer turns, two links.

Rows: a file of the case's name, one per link and number of ranks, with the seconds of
each turn and what a scheme remarks, such as the line that ``auto`` logs.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks import rows
from benchmarks.ddp.case import Run, execute
from benchmarks.ddp.rank import BLOCK, Phase
from benchmarks.ddp.schemes import REFERENCE, scheme_named
from benchmarks.ddp.work import work_named
from benchmarks.report import Table, aligned
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

    def measure(self, options: Options) -> tuple[list[rows.Row], list[str]]:
        """Measure what is missing; all rows, and what failed."""
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
        return [row for row in rows.read(path) if "failed" not in row], failed

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
        head = ["link", "ranks", *(scheme_named(name).title for name in self.beside[1:])]
        out: Table = [tuple(head)]
        for row in measured:
            cells = [f"{speed:.2f}x" for speed in self.speeds(row).values()]
            out.append((row["link"], f"{row['config']['world']}", *cells))
        return out


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
    measured, failed = LADDER.measure(options)
    print(aligned(ladder_table(measured)))
    for row in measured:
        print(f"{row['link']}, {row['config']['world']} ranks: {row['notes'][AUTO]['auto']}")
    return failed


def ladder_table(measured: Sequence[rows.Row]) -> Table:
    """With how ``auto`` compares with the best of them, plain DDP included."""
    head, *body = LADDER.table(measured)
    out: Table = [(*head, "auto / best of them")]
    for cells, row in zip(body, measured, strict=True):
        speeds = LADDER.speeds(row)
        best = max([1.0, *(speed for name, speed in speeds.items() if name != AUTO)])
        out.append((*cells, f"{speeds[AUTO] / best:.0%}"))
    return out


def buckets(options: Options) -> list[str]:
    """DDP's own buckets and smaller ones."""
    measured, failed = BUCKETS.measure(options)
    print(aligned(BUCKETS.table(measured)))
    return failed


def sharded(options: Options) -> list[str]:
    """``fully_shard`` as torch has it, and with compressed reduce-scatters."""
    measured, failed = SHARDED.measure(options)
    print(aligned(SHARDED.table(measured)))
    return failed
