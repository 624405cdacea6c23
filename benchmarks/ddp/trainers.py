"""One rank's training under one way of exchanging gradients.

Two forms cover every scheme that exchanges gradients: a hook in DDP's slot (``HookTrainer``), and
gradients that are taken from a plain backward pass, aggregated, and given to the optimiser
(``AggregateTrainer``).
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from benchmarks.ddp.work import Recipe
from gradcodec import Compression, LocalSteps, compress

Times = dict[str, float]
"""Seconds by part of a step: ``encode``, ``exchange``, ``decode``; ``coding`` where the first and
the last cannot be told apart. A scheme names those it can tell."""


class Trainer(Protocol):
    """What a rank does with its share of a batch."""

    @property
    def model(self) -> nn.Module:
        """What is trained, wrapped or not."""

    def step(self, batch: list[Tensor], rate: float) -> float:
        """Train at ``rate`` times the peak learning rate; this rank's loss before the step."""

    def finish(self) -> None:
        """Called after the last step: replicas that train apart become one."""

    def times(self) -> Times:
        """Sums over all steps so far."""

    def notes(self) -> dict[str, Any]:
        """What a row should say besides, as plain JSON values."""

    def close(self) -> None:
        """Threads and groups that were made here end."""


class OptimiserTrainer:
    """A model and the recipe's optimiser; what exchanges anything comes with the subclass.

    Args:
        model: the same on all ranks, wrapped if it is to be.
        recipe: its optimiser.
    """

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        self.model = model
        self.optimizer: torch.optim.Optimizer = recipe.optimiser(list(model.parameters()))
        self.peak = recipe.lr

    def step(self, batch: list[Tensor], rate: float) -> float:
        """Forward, backward, update."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.model(*batch)
        loss.backward()
        set_rate(self.optimizer, self.peak * rate)
        self.update()
        return float(loss.detach())

    def update(self) -> None:
        """The optimiser's step."""
        self.optimizer.step()

    def finish(self) -> None:
        """Replicas are one after every step, or are never to be."""

    def times(self) -> Times:
        """None are kept."""
        return {}

    def notes(self) -> dict[str, Any]:
        """None."""
        return {}

    def close(self) -> None:
        """Nothing was begun."""


class HookTrainer(OptimiserTrainer):
    """A model in DDP, with a hook or without.

    Args:
        model: the same on all ranks.
        recipe: its optimiser.
        register: called with the DDP module; puts a hook into its slot, or nothing.
        report: the hook's own times, if it keeps any.
        notes: the hook's own remarks.
        close: ends what the hook began.
        ddp: further arguments of DDP.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        register: Callable[[DistributedDataParallel], None] | None = None,
        *,
        report: Callable[[], Times] | None = None,
        notes: Callable[[], dict[str, Any]] | None = None,
        close: Callable[[], None] | None = None,
        ddp: Mapping[str, Any] | None = None,
    ) -> None:
        wrapped = DistributedDataParallel(model, **(ddp or {}))
        if register is not None:
            register(wrapped)
        super().__init__(wrapped, recipe)
        self._report, self._notes, self._close = report, notes, close

    def times(self) -> Times:
        """The hook's own; none for a hook that keeps none."""
        return self._report() if self._report else {}

    def notes(self) -> dict[str, Any]:
        """The hook's own."""
        return self._notes() if self._notes else {}

    def close(self) -> None:
        """The hook's own end."""
        if self._close:
            self._close()


class ShardedTrainer(OptimiserTrainer):
    """A model that ``fully_shard`` shards, layer by layer; its reduce-scatters compressed or not.

    Args:
        model: the same on all ranks; what is in a ``ModuleList`` is a unit.
        recipe: its optimiser.
        codec: of the reduce-scatters; ``None`` for torch's own.
        waits: have FSDP2 read each gradient as soon as it is reduced, so that no reduction goes on
            behind the backward pass.
    """

    def __init__(
        self, model: nn.Module, recipe: Recipe, codec: str | None, *, waits: bool = False
    ) -> None:
        for layers in [m for m in model.modules() if isinstance(m, nn.ModuleList)]:
            for layer in layers:
                fully_shard(layer)
        fully_shard(model)
        super().__init__(model, recipe)
        self._compression = None if codec is None else compress(model, codec)
        if waits:
            for parameter in model.parameters():
                parameter.register_post_accumulate_grad_hook(lambda _: None)

    def times(self) -> Times:
        """The library's own."""
        return {} if self._compression is None else library_times(self._compression)

    def notes(self) -> dict[str, Any]:
        """Bytes of the reduce-scatters."""
        if self._compression is None:
            return {}
        stats = self._compression.stats()
        return {name: stats[name] for name in ("wire_bytes", "dense_wire_bytes", "codecs")}

    def close(self) -> None:
        """End the compression."""
        if self._compression is not None:
            self._compression.close()


class AggregateTrainer(OptimiserTrainer):
    """A plain model; what happens between backward and update is the subclass's.

    Seconds in collectives are ``exchange`` (the wait for a slower rank among them), the rest of the
    aggregation is ``coding``.
    """

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        super().__init__(model, recipe)
        self._clock = CollectiveClock()
        self._synchronised = 0.0

    def step(self, batch: list[Tensor], rate: float) -> float:
        """Forward, backward, aggregation, update."""
        loss = self.model(*batch)
        loss.backward()
        set_rate(self.optimizer, self.peak * rate)
        with self.aggregating():
            self.aggregate()
        self.update()
        return float(loss.detach())

    @contextmanager
    def aggregating(self) -> Iterator[None]:
        """The block's time is exchange or coding."""
        began = time.perf_counter()
        with self._clock.running(), torch.no_grad():
            yield
        self._synchronised += time.perf_counter() - began

    @abstractmethod
    def aggregate(self) -> None:
        """Put the averaged gradients into ``grad``."""

    def update(self) -> None:
        """The optimiser's step; gradients are gone after it."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def times(self) -> Times:
        """Exchange and coding."""
        exchange = self._clock.seconds
        return {"exchange": exchange, "coding": self._synchronised - exchange}


class LocalTrainer(AggregateTrainer):
    """No exchange at all: what a step computes, the yardstick of everything else."""

    def aggregate(self) -> None:
        """Each rank keeps its own gradient."""


class CollectiveClock:
    """Seconds that this process spends in collectives, of whoever calls them.

    While it runs, the functions of ``torch.distributed`` are ones that take the time as well; the
    wait for an asynchronous one counts, not what is done meanwhile.
    """

    _NAMES = ("all_gather", "all_reduce", "all_to_all", "all_to_all_single", "broadcast")

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Time the collectives of this block."""
        kept = {name: getattr(dist, name) for name in self._NAMES}
        for name, function in kept.items():
            setattr(dist, name, self._timed(function))
        try:
            yield
        finally:
            for name, function in kept.items():
                setattr(dist, name, function)

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            work = function(*args, **kwargs)
            self.seconds += time.perf_counter() - began
            return None if work is None else _TimedWork(work, self)

        return call


class _TimedWork:
    def __init__(self, work: Any, clock: CollectiveClock) -> None:
        self._work, self._clock = work, clock

    def wait(self) -> Any:
        began = time.perf_counter()
        out = self._work.wait()
        self._clock.seconds += time.perf_counter() - began
        return out


def library_times(compression: Compression | LocalSteps) -> Times:
    """The library's own."""
    stats = compression.stats()
    return {part: stats[f"{part}_seconds"] for part in ("encode", "exchange", "decode")}


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The learning rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = lr
