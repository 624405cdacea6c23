"""What ``codec="auto"`` chooses on links of four rates, and whether that is the best.

    python -m benchmarks.run ddp_auto [--quick]

Plain DDP, each codec of the ladder and ``auto`` with ``quality=0.4`` take turns of a few steps in
one run of two ranks, or of four, so that a busy machine slows all of them. Rows:
``ddp_auto.jsonl``, one per link, with the seconds of each turn and the line that ``auto`` logs.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from benchmarks import rows
from benchmarks.ddp.case import Run, execute
from benchmarks.ddp.rank import BLOCK, Phase
from benchmarks.ddp.schemes import REFERENCE, SCHEMES
from benchmarks.ddp.work import work_named
from benchmarks.report import Table, aligned
from benchmarks.run import Options

CASE = "ddp_auto"
AUTO = "auto-wide"
BESIDE = (REFERENCE, "int4", "int2-rot", "sign-rot", AUTO)
BLOCKS: Mapping[int, Mapping[str, int]] = {
    2: {"10mbit": 2, "100mbit": 4, "1gbit": 8, "unshaped": 12},
    4: {"100mbit": 4, "1gbit": 8},
}
"""Turns of so many ranks on each link; a step of plain DDP takes 20 seconds on the slowest."""
QUICK: Mapping[int, Mapping[str, int]] = {2: {"100mbit": 2, "1gbit": 4}}


def main(options: Options) -> list[str]:
    """Measure what is missing, then print the table."""
    work = work_named("llama")
    path = options.out / f"{CASE}.jsonl"
    name = "+".join(BESIDE)
    runs = []
    for world, blocks in (QUICK if options.quick else BLOCKS).items():
        phases = tuple(Phase(link, BLOCK * count, BESIDE) for link, count in blocks.items())
        steps = max(phase.steps for phase in phases)
        runs.append(Run(work.name, world, name, 0, work.recipe.lr, steps, phases, case=CASE))
    failed = execute(runs, path, again=options.again)
    measured = [row for row in rows.read(path) if "failed" not in row]
    print(aligned(table(measured)))
    for row in measured:
        print(f"{row['link']}, {row['config']['world']} ranks: {row['notes'][AUTO]['auto']}")
    return failed


def table(measured: Sequence[rows.Row]) -> Table:
    """Steps as fast as plain DDP's, median of the turns' ratios."""
    head = ["link", "ranks", *(SCHEMES[name].title for name in BESIDE[1:]), "auto / best of them"]
    out: Table = [tuple(head)]
    for row in measured:
        blocks = row["blocks"]
        plain = blocks[REFERENCE]
        speed = {
            name: statistics.median(p / s for p, s in zip(plain, blocks[name], strict=True))
            for name in BESIDE[1:]
        }
        best = max([1.0, *(v for name, v in speed.items() if name != AUTO)])
        cells = [f"{speed[name]:.2f}x" for name in BESIDE[1:]]
        out.append((row["link"], f"{row['config']['world']}", *cells, f"{speed[AUTO] / best:.0%}"))
    return out
