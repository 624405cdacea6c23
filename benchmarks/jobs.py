"""Many runs, in processes side by side.

The models here are so small that two processes with a thread each do more than one with two.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
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
    """

    case: str
    scheme: str
    seed: int
    lr: float
    rounds: int
    source: str
    config: tuple[tuple[str, Any], ...] = ()

    def stamp(self) -> rows.Row:
        """The part that its rows have in common."""
        config = {"lr": self.lr, "rounds": self.rounds, **dict(self.config)}
        return rows.stamp(self.case, self.scheme, self.seed, config)

    def __str__(self) -> str:
        return f"{self.case}: {self.scheme}, seed {self.seed}, lr {self.lr:g}"


def execute(jobs: Sequence[Job], path: Path, workers: int, *, again: bool = False) -> list[str]:
    """Run what is not finished yet; returns what failed, as text.

    Args:
        jobs: in the order of their importance.
        path: where rows are appended.
        workers: processes, one thread each; 1 runs here, with torch's own number of threads.
        again: also run what is finished; the new rows supersede the old ones.
    """
    known = rows.runs(path)
    asked = [(job, job.stamp()) for job in jobs]
    todo = [j for j, s in asked if again or not rows.finished(known.get(s["run"], []))]
    print(f"{len(todo)} of {len(jobs)} runs to do, rows in {_short(path)}", flush=True)
    failed: list[str] = []
    for done, (job, problem, text) in enumerate(_outcomes(todo, path, workers), 1):
        print(f"[{done}/{len(todo)}] {job}: {text}", flush=True)
        if problem:
            failed.append(f"{job}: {text}")
    return failed


def _outcomes(jobs: Sequence[Job], path: Path, workers: int) -> Iterator[tuple[Job, bool, str]]:
    """Each job with whether it failed and what came out, as they end."""
    if workers == 1:
        yield from ((job, *_attempt(job, path)) for job in jobs)
        return
    os.environ["OMP_NUM_THREADS"] = "1"  # read by torch when a child imports it
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        workers, context, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        futures: dict[Future[tuple[bool, str]], Job] = {
            pool.submit(_attempt, job, path): job for job in jobs
        }
        for future in as_completed(futures):
            yield futures[future], *future.result()


def _attempt(job: Job, path: Path) -> tuple[bool, str]:
    """One run, its rows written as they come. A failure costs this run, not the others."""
    began = time.perf_counter()
    module, _, function = job.source.partition(":")
    stamp = job.stamp()
    row: rows.Row = {}
    try:
        for row in getattr(importlib.import_module(module), function)(job):
            rows.append(path, {**stamp, **row})
    except Exception as err:
        return True, f"{type(err).__name__}: {err}"
    loss = "diverged" if row["diverged"] else f"loss {row['loss']:.4f}"
    return False, f"{loss} after round {row['round']}, {time.perf_counter() - began:.0f} s"


def _short(path: Path) -> Path:
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path
