"""One rank of the DDP benchmark, in a process of its own.

    enter the link's place -> process group -> for each phase: [link is shaped] -> train -> a row

A *phase* is a training from the start on one link. The parent shapes links when rank 0 asks it to.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib
import math
import os
import statistics
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.ddp import schemes as ddp_schemes
from benchmarks.ddp.trainers import Trainer
from benchmarks.ddp.work import Batches, Work, work_named
from benchmarks.links.link import LINKS, Place

LOCAL_STEPS = 6
LOOKED_AT = 8
"""First losses that are kept to the bit: equal ones say that two links saw the same training."""
BLOCK = 6
"""Steps of each scheme in turn, where several are run beside each other."""


@dataclass(frozen=True)
class Phase:
    """One training, or several beside each other.

    Attributes:
        link: its name.
        steps: from the start; fewer than the run's for a phase that is for times only.
        beside: schemes that take turns of ``BLOCK`` steps, for differences that are smaller than a
            machine's changes of mind; empty for the run's scheme alone.
    """

    link: str
    steps: int
    beside: tuple[str, ...] = ()


@dataclass(frozen=True)
class Spec:
    """What the ranks of a run are told.

    Attributes:
        work, scheme, seed: what to train.
        steps: of the learning-rate schedule.
        every: steps between evaluations.
        lr: peak.
        phases: in order.
        data: the work's file.
        timeout: seconds that a collective may take.
        schemes: the module whose ``scheme_named`` knows the schemes by name.
    """

    work: str
    scheme: str
    seed: int
    steps: int
    every: int
    lr: float
    phases: tuple[Phase, ...]
    data: Path
    timeout: float = 120.0
    schemes: str = "benchmarks.ddp.schemes"


def main(rank: int, world: int, place: Place, port: int, spec: Spec, pipe: Connection) -> None:
    """The process: rows and requests go up the pipe, and at the end ``("done", None)``.

    Messages up: ``("shape", link)``, ``("alive", step)`` and ``("row", row)`` from rank 0,
    ``("error", text)`` from any. Down comes ``True`` when a link was shaped.
    """
    try:
        place.enter()
        torch.set_num_threads(1)
        os.environ["GLOO_SOCKET_IFNAME"] = place.interface
        os.environ["TP_SOCKET_IFNAME"] = place.interface
        dist.init_process_group(
            "gloo",
            init_method=f"tcp://{place.master}:{port}",
            rank=rank,
            world_size=world,
            timeout=datetime.timedelta(seconds=spec.timeout),
        )
        _Rank(rank, world, place, spec, pipe).run()
        dist.destroy_process_group()
        pipe.send(("done", None))
    except BaseException:
        pipe.send(("error", traceback.format_exc()))
        raise SystemExit(1) from None


class _Rank:
    def __init__(self, rank: int, world: int, place: Place, spec: Spec, pipe: Connection) -> None:
        self.rank, self.world, self.place, self.spec, self.pipe = rank, world, place, spec, pipe
        self.work: Work = work_named(spec.work)
        self.recipe = replace(self.work.recipe, lr=spec.lr)
        self.batches = Batches(spec.data, self.recipe, spec.seed, rank, world)
        self.scheme_named = importlib.import_module(spec.schemes).scheme_named

    def run(self) -> None:
        self.shape(LINKS["unshaped"].name)
        compute = self.local_seconds()
        for phase in self.spec.phases:
            self.shape(phase.link)
            row = self.beside(phase) if phase.beside else self.train(phase)
            self.send("row", {**row, "link": phase.link, "compute_s": round(compute, 5)})

    def send(self, kind: str, what: Any) -> None:
        if self.rank == 0:
            self.pipe.send((kind, what))

    def shape(self, link: str) -> None:
        """All ranks wait until the links are this one; the wait is on the old one."""
        dist.barrier()
        self.send("shape", link)
        if self.rank == 0:
            self.pipe.recv()
        dist.barrier()
        self.place.pace(LINKS[link])

    def trainer(self, name: str, link: str) -> Trainer:
        """Fresh: the same on every rank and for every phase."""
        torch.manual_seed(self.spec.seed)
        model = self.work.model(self.spec.seed)
        trainer: Trainer = self.scheme_named(name).make(model, self.recipe)
        self.place.pace(LINKS[link])  # groups that it made
        # What is drawn from now on (QSGD's rounding) is each rank's own.
        torch.manual_seed(1000 * self.spec.seed + self.rank)
        return trainer

    def local_seconds(self) -> float:
        """Median step without exchange, while all ranks are at it: they share the machine."""
        trainer = self.trainer(ddp_schemes.LOCAL.name, "unshaped")
        dist.barrier()
        seconds = [self.step(trainer, step)[1] for step in range(LOCAL_STEPS)]
        dist.barrier()
        return statistics.median(seconds[1:])

    def step(self, trainer: Trainer, step: int) -> tuple[float, float]:
        """This rank's loss and seconds."""
        batch = self.batches.step(step)
        began = time.perf_counter()
        loss = trainer.step(batch, self.recipe.rate(step, self.spec.steps))
        return loss, time.perf_counter() - began

    def train(self, phase: Phase) -> dict[str, Any]:
        """A training; what came of it."""
        scheme = self.scheme_named(self.spec.scheme)
        settle = max(0, min(scheme.settle, phase.steps - 3))
        trainer = self.trainer(self.spec.scheme, phase.link)
        model = _bare(trainer.model)
        evaluations = [(0, round(self.evaluate(model), 5), 0.0)]
        losses: list[float] = []
        seconds: list[float] = []
        aside = settled_bytes = 0  # bytes of evaluations; all bytes when it had settled
        settled_times: dict[str, float] = {}
        dist.barrier()
        first_bytes = self.place.sent()
        for step in range(phase.steps):
            if step == settle:
                dist.barrier()  # what is still under way belongs to the steps before
                settled_bytes = self.place.sent() - aside
                settled_times = trainer.times()
            loss, taken = self.step(trainer, step)
            if step + 1 == phase.steps:
                began = time.perf_counter()
                trainer.finish()
                taken += time.perf_counter() - began
            losses.append(loss)
            seconds.append(taken)
            if step < 3:
                self.place.pace(LINKS[phase.link])  # groups made at their first use
            self.send("alive", step)
            if (step + 1) % self.spec.every == 0 or step + 1 == phase.steps:
                dist.barrier()
                before = self.place.sent()
                held_out = self.evaluate(model)
                dist.barrier()
                aside += self.place.sent() - before
                evaluations.append((step + 1, round(held_out, 5), round(sum(seconds), 4)))
                if not math.isfinite(held_out):
                    break
        last_bytes = self.place.sent() - aside
        rest = seconds[settle:] or seconds
        times = {
            f"{part}_s": round((total - settled_times.get(part, 0.0)) / len(rest), 5)
            for part, total in trainer.times().items()
        }
        row = {
            "steps": len(seconds),
            "whole": len(seconds) == self.spec.steps,
            "diverged": not all(map(math.isfinite, (evaluations[-1][1], *losses))),
            "evaluations": evaluations,
            "losses": [round(loss, 4) for loss in losses[:: self.spec.every]],
            "path": [_exact(loss) for loss in losses[:LOOKED_AT]],
            "settle": settle,
            "settle_s": round(sum(seconds[:settle]), 4),
            **_spread(rest),
            "sent": round(self.mean((last_bytes - settled_bytes) / len(rest))),
            "sent_settling": round(self.mean((settled_bytes - first_bytes) / max(1, settle))),
            **times,
            "replicas_equal": self.equal(model),
            "notes": trainer.notes(),
        }
        trainer.close()
        return row

    def beside(self, phase: Phase) -> dict[str, Any]:
        """Several schemes take turns; seconds of each, block by block."""
        trainers = {name: self.trainer(name, phase.link) for name in phase.beside}
        at = dict.fromkeys(trainers, 0)
        blocks: dict[str, list[float]] = {name: [] for name in trainers}
        for name, trainer in trainers.items():
            for _ in range(self.scheme_named(name).settle):
                self.step(trainer, at[name])
                at[name] += 1
        settled = {name: (at[name], dict(trainer.times())) for name, trainer in trainers.items()}
        for _ in range(max(1, phase.steps // BLOCK)):
            for name, trainer in trainers.items():
                dist.barrier()
                self.place.pace(LINKS[phase.link])
                taken = []
                for _ in range(BLOCK):
                    taken.append(self.step(trainer, at[name])[1])
                    at[name] += 1
                blocks[name].append(round(statistics.median(taken), 5))
                self.send("alive", at[name])
        notes = {name: trainer.notes() for name, trainer in trainers.items()}
        parts = {}
        for name, trainer in trainers.items():
            steps, before = at[name] - settled[name][0], settled[name][1]
            parts[name] = {
                part: round((total - before.get(part, 0.0)) / steps, 5)
                for part, total in trainer.times().items()
            }
        for trainer in trainers.values():
            trainer.close()
        return {"blocks": blocks, "block": BLOCK, "notes": notes, "parts": parts}

    def evaluate(self, model: nn.Module) -> float:
        """Held-out loss, each rank over its share."""
        with torch.no_grad():
            mine = statistics.fmean(float(model(*batch)) for batch in self.batches.held_out())
        return self.mean(mine)

    def mean(self, value: float) -> float:
        """Over ranks."""
        total = torch.tensor([value], dtype=torch.float64)
        dist.all_reduce(total)
        return float(total) / self.world

    def equal(self, model: nn.Module) -> bool:
        """Whether all ranks hold the same parameters, to the bit."""
        mine = torch.tensor([_digest(model)])
        all_of_them = [torch.zeros_like(mine) for _ in range(self.world)]
        dist.all_gather(all_of_them, mine)
        return len({int(each) for each in all_of_them}) == 1


def _bare(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, DistributedDataParallel) else model


def _spread(seconds: Sequence[float]) -> dict[str, float]:
    """Quantiles of the steps' times."""
    ordered = sorted(seconds)
    at = {f"p{q}_s": ordered[(len(ordered) - 1) * q // 100] for q in (20, 50, 80)}
    return {name: round(value, 5) for name, value in at.items()}


def _exact(loss: float) -> str:
    """A loss to the last bit, in JSON too."""
    return float(loss).hex()


def _digest(model: nn.Module) -> int:
    """Of all parameters, to the bit; the same on all ranks or replicas have parted."""
    sha = hashlib.sha256()
    for parameter in model.parameters():
        sha.update(parameter.detach().contiguous().numpy().tobytes())
    return int.from_bytes(sha.digest()[:7], "little")
