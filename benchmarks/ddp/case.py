"""Ways of exchanging gradients under DDP, ours and others', on slow and fast links.

    python -m benchmarks.run ddp            # an hour and a half on 2 cores
    python -m benchmarks.run ddp --quick    # minutes: one work, few schemes, few steps

Two works (``work``), 2 and 4 gloo ranks of one thread each, links of 100 Mbit/s, 1 Gbit/s and
unshaped (``benchmarks.links``; ``GRADCODEC_LINKS=pacing`` takes the fallback), every scheme of
``schemes``. Peers run by their own code, found in ``GRADCODEC_PEERS`` (``benchmarks.peers.ddp``);
those that are not there are left out.

What a scheme computes does not depend on the link. So each is trained to the end on the unshaped
link and for some steps on the others: loss against seconds there is the losses of the first with
the step times of the second, and rows prove that both saw the same losses to the bit. ``CONFIRMED``
schemes are trained to the end at 100 Mbit/s too, where the two can be compared; ``auto`` decides by
the link and is trained to the end on each.

Differences of a few percent (the hook's own cost; ``auto`` against plain) are smaller than what a
shared machine does from one minute to the next: there schemes take turns, ``BESIDE``.

Rows: ``ddp.jsonl``, one per run and link; tables and plots beside it (``page``).
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks import rows
from benchmarks.ddp.launch import play
from benchmarks.ddp.page import page
from benchmarks.ddp.rank import BLOCK, Phase, Spec
from benchmarks.ddp.scheme import available
from benchmarks.ddp.schemes import REFERENCE, SCHEMES, GradientScheme
from benchmarks.ddp.work import WORKS, Work, kept_data, work_named
from benchmarks.links.link import LINKS, network
from benchmarks.run import ROOT, Options, choose
from gradcodec.errors import ConfigError, TrainingError

CASE = "ddp"
TUNE = "ddp-tune"
SEEDS = (0,)
TUNE_SEED = 100
GRIDS = {
    ("llama", REFERENCE): (2.5e-4, 5e-4, 1e-3),
    ("llama", "demo"): (3e-4, 1e-3, 3e-3),
    ("vision", REFERENCE): (0.0025, 0.005, 0.01, 0.02),
    ("vision", "demo"): (3e-4, 1e-3, 3e-3, 1e-2),
}
"""Plain DDP's rate is everyone's, but for DeMo, which is an optimiser of its own."""

QUICK_STEPS = 40
EVALUATIONS = 12
TIMED = 10
"""Steps on a slow link after those in which a scheme settles."""
CONFIRMED = (REFERENCE, "int4", "sign-rot", "powersgd")
BESIDE = (REFERENCE, "identity", "auto")
BESIDE_LINKS = ("unshaped", "1gbit")
BLOCKS = 10
DATA = ROOT / "runs" / "bench-ddp"
PATIENCE = 240.0
"""Seconds without a word after which ranks are given up, at 100 Mbit/s and more."""
LINKS_VARIABLE = "GRADCODEC_LINKS"


@dataclass(frozen=True)
class Run:
    """One scheme with one work, world and seed."""

    work: str
    world: int
    scheme: str
    seed: int
    lr: float
    steps: int
    phases: tuple[Phase, ...]
    case: str = CASE

    def stamp(self) -> rows.Row:
        """What its rows have in common."""
        recipe = work_named(self.work).recipe
        config = {
            "work": self.work,
            "world": self.world,
            "lr": self.lr,
            "steps": self.steps,
            "batch": recipe.batch,
            "optimizer": recipe.optimizer,
        }
        return rows.stamp(self.case, self.scheme, self.seed, config)

    def __str__(self) -> str:
        return f"{self.work} x{self.world}: {self.scheme}, seed {self.seed}"


def phases(scheme: GradientScheme, steps: int, *, quick: bool, confirm: bool) -> tuple[Phase, ...]:
    """The links of a run, and how far it goes on each."""
    short = min(steps, scheme.settle + (TIMED // 2 if quick else TIMED))
    out = [Phase("unshaped", steps)]
    for link in ("100mbit",) if quick else ("1gbit", "100mbit"):
        whole = not scheme.alike or (confirm and link == "100mbit")
        out.append(Phase(link, steps if whole else short))
    return tuple(out)


def planned(options: Options, schemes: Sequence[GradientScheme]) -> list[Run]:
    """All runs, in the order of their importance."""
    out: list[Run] = []
    quick = options.quick
    for seed in options.seeds or SEEDS:
        for world, name in ((2, "llama"), (2, "vision"), (4, "llama"), (4, "vision")):
            if quick and (world, name) == (4, "vision"):
                continue
            work = work_named(name)
            steps = options.rounds or (QUICK_STEPS if quick else work.recipe.steps)
            for scheme in schemes:
                if not _wanted(scheme, name, world, quick=quick):
                    continue
                confirm = scheme.name in CONFIRMED and (world, name) == (2, "llama") and not quick
                those = phases(scheme, steps, quick=quick, confirm=confirm)
                out.append(Run(name, world, scheme.name, seed, scheme.rate(work), steps, those))
        out += _beside(options, schemes, seed)
    return out


def _wanted(scheme: GradientScheme, work: str, world: int, *, quick: bool) -> bool:
    if scheme.once and (work, world) != ("llama", 2):
        return False
    if world == 4:
        return scheme.name in (REFERENCE, "int4") if quick else scheme.few
    return True


def _beside(options: Options, schemes: Sequence[GradientScheme], seed: int) -> list[Run]:
    names = tuple(s.name for s in schemes if s.name in BESIDE)
    if len(names) < 2:
        return []
    steps = BLOCK * (BLOCKS // 2 if options.quick else BLOCKS)
    those = tuple(Phase(link, steps, names) for link in BESIDE_LINKS)
    work = work_named("llama")
    return [Run(work.name, 2, "+".join(names), seed, work.recipe.lr, steps, those)]


def missing(run: Run, known: Sequence[rows.Row]) -> tuple[Phase, ...]:
    """The phases that have no row yet."""
    key = run.stamp()["run"]
    there = {(r["link"], r["asked"]) for r in known if r["run"] == key and "failed" not in r}
    return tuple(p for p in run.phases if (p.link, p.steps) not in there)


def execute(runs: Sequence[Run], path: Path, *, again: bool = False) -> list[str]:
    """Run what is not there yet, one after another; returns what failed, as text."""
    known = rows.read(path)
    todo = [(run, run.phases if again else missing(run, known)) for run in runs]
    todo = [(run, those) for run, those in todo if those]
    print(f"{len(todo)} of {len(runs)} runs to do, rows in {path.name}", flush=True)
    failed: list[str] = []
    # Ended from outside, namespaces and ranks must still go: as if interrupted by hand.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    for done, (run, those) in enumerate(todo, 1):
        began = time.perf_counter()
        text = ""
        try:
            for row in perform(replace(run, phases=those)):
                rows.append(path, row)
                text = _said(row)
                print(f"[{done}/{len(todo)}] {run}, {row['link']}: {text}", flush=True)
        except (ConfigError, TrainingError) as err:
            last = str(err).splitlines()[-1]
            rows.append(path, {**run.stamp(), "failed": last})
            failed.append(f"{run}: {last}")
            print(f"[{done}/{len(todo)}] {run} failed:\n{err}", flush=True)
        print(f"[{done}/{len(todo)}] {run}: {time.perf_counter() - began:.0f} s", flush=True)
    return failed


def perform(run: Run) -> Iterator[rows.Row]:
    """The rows of one run, as they come."""
    spec = Spec(
        work=run.work,
        scheme=run.scheme,
        seed=run.seed,
        steps=run.steps,
        every=max(1, run.steps // EVALUATIONS),
        lr=run.lr,
        phases=run.phases,
        data=kept_data(work_named(run.work), run.seed, DATA),
    )
    stamp = run.stamp()
    kind = os.environ.get(LINKS_VARIABLE)
    slowest = min(LINKS[phase.link].mbit or 100 for phase in run.phases)
    patience = PATIENCE * max(1.0, 100 / slowest)
    with network(run.world, kind) as links:
        came = play(links, run.world, spec, patience=patience)
        for phase, row in zip(run.phases, came, strict=True):
            yield {**stamp, "network": links.kind, "asked": phase.steps, **row}


def _said(row: rows.Row) -> str:
    if "blocks" in row:
        medians = {n: sorted(b)[len(b) // 2] for n, b in row["blocks"].items()}
        return ", ".join(f"{name} {1000 * s:.0f} ms" for name, s in medians.items())
    step, loss, _ = row["evaluations"][-1]
    equal = "" if row["replicas_equal"] else ", REPLICAS DIFFER"
    return (
        f"loss {loss:.4f} after {step} steps, {1000 * row['p50_s']:.0f} ms and "
        f"{row['sent']:,} B a step{equal}"
    )


def main(options: Options) -> list[str]:
    """Run what is missing, then tables and plots of everything that is there."""
    schemes = available(choose(SCHEMES, options, REFERENCE))
    path = options.out / f"{CASE}.jsonl"
    failed = execute(planned(options, schemes), path, again=options.again)
    made = page(path)
    print(f"no finished {REFERENCE} run in {path}" if made is None else made.write(path))
    return failed


def tune(options: Options) -> list[str]:
    """The learning rates of ``GRIDS``, on a seed that is not reported."""
    path = options.out / f"{TUNE}.jsonl"
    runs = []
    for (name, scheme), grid in GRIDS.items():
        work: Work = WORKS[name]
        if SCHEMES[scheme].missing():
            continue
        steps = options.rounds or work.recipe.steps
        for lr in grid:
            those = (Phase("unshaped", steps),)
            runs.append(Run(name, 2, scheme, TUNE_SEED, lr, steps, those, case=TUNE))
    failed = execute(runs, path, again=options.again)
    for row in rows.read(path):
        if "failed" not in row:
            config = row["config"]
            print(f"{config['work']:8} {row['scheme']:8} {config['lr']:<8g} {_said(row)}")
    return failed
