"""Pretraining from scratch by ranks that exchange seldom: loss against bytes.

    python -m benchmarks.run local-tune local --workers 4       # 16 cores
    python -m benchmarks.run local --quick --workers 1          # 2 cores, minutes

The embedded LLaMA (5.8 M parameters) from random weights, 4 gloo ranks of one thread, 256 steps of
8 sequences of 64 tokens, the same tokens for every scheme. A run is 4 processes; ``--workers``
counts runs side by side. What is finished is not run again, so a command that was broken off goes
on.

Rates: for each scheme the best of its grid on a seed that is not reported (``local-tune.jsonl``);
without those rows the first of the grid. Schemes that differ in ``H`` alone share them.

Bytes are those that TCP sent on a rank's connections, as the kernel counts them, without headers of
packets; the exchanges that agree on settings and the last ``finish`` among them, evaluations not.

Rows: ``local.jsonl``, one per run; page and plots beside it (``page``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks import rows
from benchmarks.ddp.launch import play
from benchmarks.ddp.rank import Phase, Spec
from benchmarks.ddp.scheme import available
from benchmarks.ddp.work import kept_data, work_named
from benchmarks.jobs import Job, execute
from benchmarks.links.pacing import Paced
from benchmarks.local.page import page
from benchmarks.local.schemes import REFERENCE, SCHEMES, LocalScheme, spelt
from benchmarks.run import ROOT, Options, choose

CASE, TUNE, WORK = "local", "local-tune", "scratch"
SEEDS = (0, 1, 2)
TUNE_SEED = 100
WORLD = 4
QUICK_STEPS = 64
EVERY = 32
"""Steps between evaluations: replicas are one there for every ``H`` that divides it."""
DATA = ROOT / "runs" / "bench-ddp"
PATIENCE = 240.0
_SOURCE = "benchmarks.local.case:perform"


def job(case: str, scheme: str, seed: int, steps: int, rates: tuple[float, float | None]) -> Job:
    """One run."""
    lr, outer = rates
    batch = work_named(WORK).recipe.batch
    config = (("outer_lr", outer), ("work", WORK), ("world", WORLD), ("batch", batch))
    return Job(case, scheme, seed, lr, steps, _SOURCE, config)


def perform(asked: Job) -> Iterator[rows.Row]:
    """The one row of a run, when it has ended."""
    config = dict(asked.config)
    spec = Spec(
        work=WORK,
        scheme=spelt(asked.scheme, config["outer_lr"]),
        seed=asked.seed,
        steps=asked.rounds,
        every=EVERY,
        lr=asked.lr,
        phases=(Phase("unshaped", asked.rounds),),
        data=kept_data(work_named(WORK), asked.seed, DATA),
        schemes="benchmarks.local.schemes",
    )
    with Paced(WORLD) as links:
        for row in play(links, WORLD, spec, patience=PATIENCE):
            last = row["evaluations"][-1]
            yield {**row, "round": last[0], "loss": last[1], "network": links.kind}


def tuned(path: Path, scheme: LocalScheme, steps: int) -> tuple[float, float | None]:
    """Inner and outer rate of the lowest loss in the tuning rows of this many steps."""
    name = scheme.like or scheme.name
    found = [
        (run[-1]["loss"], run[-1]["config"])
        for run in rows.runs(path).values()
        if run[-1]["scheme"] == name
        and run[-1]["config"]["rounds"] == steps
        and not run[-1]["diverged"]
    ]
    if not found:
        return SCHEMES[name].grid[0]
    _, config = min(found, key=lambda pair: pair[0])
    return config["lr"], config["outer_lr"]


def main(options: Options) -> list[str]:
    """Run what is missing, then the page of everything that is there."""
    steps = _steps(options)
    seeds = options.seeds or (SEEDS[:1] if options.quick else SEEDS)
    schemes = available(choose(SCHEMES, options, REFERENCE))
    _prepare(seeds)
    tuning = options.out / f"{TUNE}.jsonl"
    rates = {scheme.name: tuned(tuning, scheme, steps) for scheme in schemes}
    jobs = [job(CASE, s.name, seed, steps, rates[s.name]) for seed in seeds for s in schemes]
    path = options.out / f"{CASE}.jsonl"
    failed = execute(jobs, path, options.workers, again=options.again)
    made = page(path)
    print(f"no finished {REFERENCE} run in {path}" if made is None else made.write(path))
    return failed


def tune(options: Options) -> list[str]:
    """The grid of every scheme that does not take another one's rates."""
    steps = _steps(options)
    schemes = [s for s in available(choose(SCHEMES, options, REFERENCE)) if s.like is None]
    _prepare((TUNE_SEED,))
    # The first point of every grid before the second of any: broken off, all had the same effort.
    longest = max(len(s.grid) for s in schemes)
    points = [(s, s.grid[i]) for i in range(longest) for s in schemes if i < len(s.grid)]
    jobs = [job(TUNE, s.name, TUNE_SEED, steps, rates) for s, rates in points]
    return execute(jobs, options.out / f"{TUNE}.jsonl", options.workers, again=options.again)


def _steps(options: Options) -> int:
    return options.rounds or (QUICK_STEPS if options.quick else work_named(WORK).recipe.steps)


def _prepare(seeds: Sequence[int]) -> None:
    """Write the data before runs are side by side, so that none reads half a file."""
    for seed in seeds:
        kept_data(work_named(WORK), seed, DATA)
