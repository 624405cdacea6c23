"""Many runs, in processes side by side.

The models here are so small that two processes with a thread each do more than one with two.
"""

from __future__ import annotations

import dataclasses
import importlib
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import rows


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        case, scheme, seed: what to run.
        lr, rounds: how.
        source: ``"module:function"``; called with the job, it yields a row per round.
        config: what else the run depends on, as pairs; part of its id.
        together: the same for several jobs that differ in scheme and rate alone; called with their
            tuple, it yields pairs of a job and its row. Empty: they are played one by one.
    """

    case: str
    scheme: str
    seed: int
    lr: float
    rounds: int
    source: str
    config: tuple[tuple[str, Any], ...] = ()
    together: str = ""

    def stamp(self) -> rows.Row:
        """The part that its rows have in common."""
        config = {"lr": self.lr, "rounds": self.rounds, **dict(self.config)}
        return rows.stamp(self.case, self.scheme, self.seed, config)

    def __str__(self) -> str:
        return f"{self.case}: {self.scheme}, seed {self.seed}, lr {self.lr:g}"


Batch = tuple[Job, ...]
Place = Path | Callable[[Job], Path]


def execute(
    jobs: Sequence[Job], path: Place, workers: int, *, again: bool = False, together: int = 1
) -> list[str]:
    """Run what is not finished yet; returns what failed, as text.

    Args:
        jobs: in the order of their importance.
        path: where rows are appended, one file or a job's own.
        workers: processes, one thread each; 1 runs here, with torch's own number of threads.
        again: also run what is finished; the new rows supersede the old ones.
        together: how many jobs a process plays in step, where they can be.
    """
    where = path if callable(path) else lambda job: path
    known = {p: rows.runs(p) for p in {where(job) for job in jobs}}
    asked = [(job, known[where(job)].get(job.stamp()["run"], [])) for job in jobs]
    todo = [job for job, made in asked if again or not rows.finished(made)]
    places = ", ".join(str(_short(p)) for p in sorted(known))
    print(f"{len(todo)} of {len(jobs)} runs to do, rows in {places}", flush=True)
    batches = [
        tuple((job, where(job)) for job in batch) for batch in _batches(todo, max(1, together))
    ]
    failed: list[str] = []
    done = 0
    for outcomes in _outcomes(batches, workers):
        for job, problem, text in outcomes:
            done += 1
            print(f"[{done}/{len(todo)}] {job}: {text}", flush=True)
            if problem:
                failed.append(f"{job}: {text}")
    return failed


def _batches(jobs: Sequence[Job], size: int) -> list[Batch]:
    """Jobs next to each other that may be played in step."""
    out: list[Batch] = []
    for job in jobs:
        alike = out and job.together and _alone(out[-1][0]) == _alone(job) and len(out[-1]) < size
        out[-1:] = [(*out[-1], job)] if alike else [*out[-1:], (job,)]
    return out


def _alone(job: Job) -> Job:
    return dataclasses.replace(job, scheme="", lr=0.0)


Outcome = tuple[Job, bool, str]
Placed = tuple[tuple[Job, Path], ...]


def _outcomes(batches: Sequence[Placed], workers: int) -> Iterator[list[Outcome]]:
    """Each job with whether it failed and what came out, as they end."""
    if workers == 1:
        yield from map(_attempt, batches)
        return
    os.environ["OMP_NUM_THREADS"] = "1"  # read by torch when a child imports it
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        workers, context, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        futures: list[Future[list[Outcome]]] = [pool.submit(_attempt, batch) for batch in batches]
        for future in as_completed(futures):
            yield future.result()


def _attempt(batch: Placed) -> list[Outcome]:
    """Some runs, their rows written as they come. A failure costs these runs, not the others."""
    began = time.perf_counter()
    jobs = tuple(job for job, _ in batch)
    last: dict[Job, rows.Row] = {}
    problem = ""
    try:
        for job, row in _played(jobs):
            rows.append(dict(batch)[job], {**job.stamp(), **row})
            last[job] = row
    except Exception as err:
        problem = f"{type(err).__name__}: {err}"
    spent = f"{time.perf_counter() - began:.0f} s"
    out: list[Outcome] = []
    for job in jobs:
        row = last.get(job, {})
        if problem and not rows.finished([{**job.stamp(), **row}] if row else []):
            out.append((job, True, problem))
            continue
        loss = "diverged" if row["diverged"] else f"loss {row['loss']:.4f}"
        out.append((job, False, f"{loss} after round {row['round']}, {spent}"))
    return out


def _played(jobs: Batch) -> Iterator[tuple[Job, rows.Row]]:
    if len(jobs) > 1:
        yield from _imported(jobs[0].together)(jobs)
        return
    yield from ((jobs[0], row) for row in _imported(jobs[0].source)(jobs[0]))


def _imported(source: str) -> Callable[[Any], Any]:
    module, _, function = source.partition(":")
    found: Callable[[Any], Any] = getattr(importlib.import_module(module), function)
    return found


def _short(path: Path) -> Path:
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path
