"""Fragments under way: sent by each rank, averaged over all, waited for when they are merged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from gradcodec.distributed.anchors import Anchors
from gradcodec.distributed.exchange.agreement import Agreed
from gradcodec.distributed.exchange.link import Link, control_link, place
from gradcodec.distributed.exchange.terms import values_text
from gradcodec.distributed.meter import Counters
from gradcodec.distributed.wrappers.bucket import BucketReducer, Slot
from gradcodec.distributed.wrappers.torch_compat import sister_group
from gradcodec.distributed.wrappers.worker import Future, Worker


@dataclass
class _Flight:
    """Pseudo-gradients, and their means once the future is done."""

    tensors: dict[str, Tensor]
    future: Future[Tensor] | None = None


class Flights:
    """The exchanges of ``LocalSteps``, of one fragment each.

    Args:
        what: the call that ranks agree on, for error messages.
        anchors: what pseudo-gradients are relative to.
        reducer: codes and averages them.
        decay: share of the residual that is fed back.
        counters: what was sent is added there.
        device: where the parameters are.

    Attributes:
        rank: this rank in the group of ``start``.
        world: number of its ranks.
    """

    def __init__(
        self,
        what: str,
        anchors: Anchors,
        reducer: BucketReducer,
        decay: float,
        counters: Counters,
        device: torch.device,
    ) -> None:
        self._what, self._anchors, self._decay = what, anchors, decay
        self._reducer, self._counters, self._device = reducer, counters, device
        self._flights: dict[int, _Flight] = {}
        self._agreed = Agreed()
        self._worker: Worker | None = None

    def __iter__(self) -> Iterator[int]:
        """The fragments under way; some may be taken meanwhile."""
        return iter(list(self._flights))

    def start(self, group: dist.ProcessGroup | None, background: bool) -> None:
        """Exchange over these ranks from now on; in the background a thread of its own does it."""
        self.close()
        self.rank, self.world = place(group)
        self._group = group
        self._agreed.clear()  # the terms may have changed
        if background and self.world > 1:
            self._group = sister_group(group)  # the worker's thread has its own
            self._worker = Worker()

    def close(self) -> None:
        """End the thread."""
        if self._worker is not None:
            self._worker.stop()
            self._worker = None

    def send(self, fragment: int, names: Sequence[str], step: int) -> None:
        """Send the pseudo-gradients of these parameters."""
        tensors = {n: self._anchors.pseudo_gradient(n) for n in names}
        work = partial(self._average, fragment, tensors, step)
        flight = self._flights[fragment] = _Flight(tensors)
        if self._worker is not None:
            flight.future = self._worker.enqueue(work, *tensors.values())
            return
        try:
            work()
        except BaseException:
            del self._flights[fragment]
            raise

    def take(self, fragment: int) -> dict[str, Tensor] | None:
        """Wait for the means of a fragment and hand them over; ``None`` if it is not under way.

        Raises:
            TrainingError: the exchange failed; it is not under way any more.
        """
        flight = self._flights.pop(fragment, None)
        return None if flight is None else self._waited(flight)

    @torch.no_grad()
    def _average(self, fragment: int, tensors: dict[str, Tensor], step: int) -> Tensor:
        """Replace pseudo-gradients by their means; in the worker's thread if there is one."""
        link, control = Link(self._group, self._device), control_link(self._group)
        link.meter.dense = sum(t.numel() * t.element_size() for t in tensors.values())
        residuals = self._reducer.residuals
        saved = residuals.saved(tensors)
        try:
            terms = partial(self._common, tensors, step)
            self._agreed.ensure(fragment, control, self._what, terms)
            residuals.decay(tensors, self._decay)
            self._reducer.reduce([Slot(n, t.view(-1), t) for n, t in tensors.items()], link, step)
            if not all(bool(torch.isfinite(t).all()) for t in tensors.values()):
                residuals.restore(saved)  # they will be refused, so nothing counts as sent
        except BaseException:
            residuals.restore(saved)
            raise
        finally:
            self._counters.add(link.meter.traffic + control.meter.traffic)
        return next(iter(tensors.values()))

    def _common(self, names: Mapping[str, Tensor], step: int) -> dict[str, str]:
        """What ranks compare before a fragment's first exchange, and its first after loading."""
        anchors = {f"anchor of {n}": values_text(self._anchors.values[n]) for n in names}
        return {"step": str(step), "seed": str(self._reducer.seed), **anchors}

    # -- what is kept ---------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """``flight.NAME``: copies of the means under way, for which it waits."""
        return {
            f"flight.{name}": mean.to("cpu", copy=True)
            for flight in self._flights.values()
            for name, mean in self._waited(flight).items()
        }

    def load(self, fragment: int, means: Mapping[str, Tensor]) -> None:
        """Put a fragment under way whose means have come already."""
        there = {n: mean.to(self._device, copy=True) for n, mean in means.items()}
        self._flights[fragment] = _Flight(there)

    def clear(self) -> None:
        """Drop what is under way, and let ranks compare again at the next exchange."""
        for flight in self._flights.values():
            self._waited(flight)
        self._flights.clear()
        self._agreed.clear()

    def _waited(self, flight: _Flight) -> dict[str, Tensor]:
        if flight.future is not None:
            flight.future.wait()
        return flight.tensors
