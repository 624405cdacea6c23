"""``codec="auto"``: time steps with ever narrower codecs on the real link, keep the fastest."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

import torch
import torch.distributed as dist

from gradcodec.encodable import shown
from gradcodec.errors import ConfigError

WARM = 2
"""First steps, which are not timed: buckets are rebuilt, compilers run, memory is mapped."""

ROUNDS = 3
"""Steps of each way that are timed; the fastest counts."""

GAIN = 0.97
"""A step of a narrower codec must take at most this share of the other; the rest may be noise."""

RECHECK = 2000
"""Steps after a decision until it is looked at again: links change, and so do jobs beside this."""

FAR = 10.0
"""A second look leaves out what took this many times as long: it would cost too much."""

AUTO, QUALITY = "auto", 0.02

#: Codecs from wide to narrow, with their relative squared error on Gaussian values.
RUNGS: Mapping[str, float] = MappingProxyType(
    {"int8": 5e-5, "int4": 0.016, "int2-rotated": 0.12, "sign-rotated": 0.37}
)


def is_auto(codec: object) -> bool:
    """Whether a codec's name asks for a trial."""
    return isinstance(codec, str) and codec.split(":")[0] == AUTO


def no_choice(codec: object) -> ConfigError:
    """The error about a ``quality`` that would decide nothing."""
    return ConfigError(
        f"quality= says which codecs 'auto' may choose from; beside codec={shown(str(codec))} it "
        "decides nothing: leave it out, or choose codec='auto'"
    )


def ladder(codec: str, quality: float | None = None) -> tuple[str, ...]:
    """The codecs that ``"auto"`` may choose, from wide to narrow.

    ``"auto:A,B"`` names them. ``"auto"`` takes those of ``RUNGS`` whose error is at most
    ``quality`` (``QUALITY`` by default), from ``"int4"`` on where that is allowed: what gains with
    8 bits gains more with 4.

    Raises:
        ConfigError: ``quality`` allows none, or codecs are named beside it; a name is empty or
            comes twice.
    """
    if quality is not None and codec != AUTO:
        raise no_choice(codec)
    quality = QUALITY if quality is None else quality
    if not (isinstance(quality, int | float) and 0 < quality < math.inf):
        raise ConfigError(f"expected a finite quality > 0, got {quality!r}")
    if codec != AUTO:
        names = tuple(codec.partition(":")[2].split(","))
        if "" in names or len(set(names)) != len(names):
            raise ConfigError(f"expected 'auto:NAME,NAME' with different names, got {codec!r}")
        if "fp32" in names or ("lowrank" in names and len(names) > 1):
            raise ConfigError(
                f"expected codecs whose residuals can be exchanged, got {codec!r}: dense steps are "
                "timed anyway, and 'lowrank' can only be alone"
            )
        return names
    found = tuple(name for name, error in RUNGS.items() if error <= quality)
    if not found:
        least = min(RUNGS.values())
        raise ConfigError(f"expected a quality of at least {least:g} (int8's error), got {quality}")
    return found[1:] if len(found) > 1 else found


class Trial:
    """Times dense steps and those of every codec of the ladder, and takes the fastest.

        dense, dense, .. | int4, int4, .. | int2-rotated, .. | sign-rotated, ..   -> the fastest

    Whole steps are timed, because they include all that matters: the link, encoding and decoding,
    and how much of these is hidden behind the backward pass or takes cores from it. Some steps
    also hold other work (a validation, a checkpoint), so the fastest step of each way is compared.
    The slowest rank's times count, so that all ranks decide the same. A narrower codec is taken
    only if it gains 3 % over the ways before it.

    After ``RECHECK`` steps it looks again, at all ways that took at most ``FAR`` times as long as
    the one in use: on a slow link dense steps are not timed twice. What a codec has lost is
    expressed as the next one keeps it, or added to the gradients of a dense step: a switch loses
    nothing.

    Args:
        rungs: names of the codecs, from wide to narrow; rung 0, before them, is dense.

    Attributes:
        decision: ``None`` in the first trial, then the rung that is used.
        times: seconds of the fastest step by rung, on the slowest rank; what was measured last.
    """

    def __init__(self, rungs: Sequence[str]) -> None:
        self.names = ("dense", *rungs)
        self.decision: int | None = None
        self.times: dict[int, float] = {}
        self._steps = 0
        self._begin(range(len(self.names)), WARM)

    def _begin(self, rungs: Iterable[int], warm: int) -> None:
        """Plan the steps: for each way one that is not timed, then those that are.

        In the first one residuals change their form.
        """
        self._plan: list[tuple[int, bool]] = []
        for rung in rungs:
            self._plan += [(rung, False)] * (1 if self._plan else warm) + [(rung, True)] * ROUNDS
        self._since: float | None = None
        self._taken: dict[int, list[float]] = {}

    @property
    def measuring(self) -> bool:
        """Whether steps are timed."""
        return bool(self._plan)

    @property
    def rung(self) -> int:
        """The way of the current step: 0 is dense, others are codecs by their place."""
        return self._plan[0][0] if self._plan else self.decision or 0

    def restart(self) -> None:
        """Begin anew: with other ranks, what was measured says nothing."""
        self.decision, self.times, self._steps = None, {}, 0
        self._begin(range(len(self.names)), WARM)

    def settle(self, rung: int) -> None:
        """Decide without a trial: after a restart, or where nothing is exchanged."""
        self.decision, self._plan, self._steps = rung, [], 0

    def step_done(self, group: dist.ProcessGroup, device: torch.device) -> bool:
        """Call it after the last bucket of each step, on all ranks; ``True`` if it decided."""
        if not self._plan:
            self._steps += 1
            if self._steps >= RECHECK:
                used = self.times.get(self.decision or 0, math.inf)
                near = (r for r in range(len(self.names)) if self.times.get(r, 0.0) <= FAR * used)
                self._begin(near, 1)
            return False
        now = time.perf_counter()
        rung, timed = self._plan.pop(0)
        if timed and self._since is not None:
            self._taken.setdefault(rung, []).append(now - self._since)
        self._since = now
        if self._plan:
            return False
        self._decide(group, device)
        return True

    def _decide(self, group: dist.ProcessGroup, device: torch.device) -> None:
        """Take the fastest way, by the slowest rank's times."""
        rungs = sorted(self._taken)
        seconds = torch.tensor([min(self._taken[rung]) for rung in rungs], device=device)
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX, group=group)
        self.times.update(zip(rungs, seconds.tolist(), strict=True))
        best = rungs[0]
        for rung in rungs[1:]:
            if self.times[rung] < GAIN * self.times[best]:
                best = rung
        self.settle(best)

    def describe(self) -> str:
        """One sentence for a log: what it chose, and what it expects of that."""
        if self.decision is None:
            return "auto: still measuring"
        name = self.names[self.decision]
        verdict = f"compressing by {name}" if self.decision else "not compressing"
        if not self.times:
            return f"auto: {verdict} (decided before the restart)"
        took = ", ".join(f"{self.times[r]:.4f} s {self.names[r]}" for r in sorted(self.times))
        gain = ""
        if self.decision and 0 in self.times:
            gain = f", {self.times[0] / self.times[self.decision]:.2f}x as fast as dense"
        elif not self.decision:
            gain = ": it would lose time"
        return f"auto: {verdict}{gain}; a step took {took}"
