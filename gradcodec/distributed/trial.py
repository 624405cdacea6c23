"""``codec="auto"``: time dense and coded steps on the real link, then decide once for all ranks."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

WARM = 2
"""First steps, which are not timed: buckets are rebuilt, compilers run, memory is mapped."""

ROUNDS = 3
"""Dense and coded steps that are timed, in turns; the fastest of each kind counts."""

GAIN = 0.97
"""A compressed step must take at most this share of a dense one; the rest may be noise."""


class Trial:
    """Times whole training steps, dense and coded in turn, and takes the faster way.

    Whole steps are timed because they include all that matters: the link, encoding and decoding,
    and how much of these is hidden behind the backward pass or takes cores from it. Some steps also
    hold other work (a validation, a checkpoint), so the fastest step of each kind is compared. The
    slowest rank's times count, so that all ranks decide the same.

    Attributes:
        decision: ``None`` while measuring, then whether to compress.
        dense: seconds of the fastest dense step on the slowest rank; 0 if not measured.
        coded: the same for compressed steps.
    """

    def __init__(self) -> None:
        self.decision: bool | None = None
        self.dense = 0.0
        self.coded = 0.0
        self._steps = 0
        self._since: float | None = None
        self._times: dict[bool, list[float]] = {False: [], True: []}

    @property
    def compress(self) -> bool:
        """Whether the gradients of the current step are compressed."""
        if self.decision is not None:
            return self.decision
        return self._steps >= WARM and (self._steps - WARM) % 2 == 1

    @property
    def measuring(self) -> bool:
        """Whether there is no decision yet."""
        return self.decision is None

    def step_done(self, group: dist.ProcessGroup, device: torch.device) -> bool:
        """Call it after the last bucket of each step, on all ranks; ``True`` if it decided."""
        if self.decision is not None:
            return False
        now, compressed = time.perf_counter(), self.compress
        if self._since is not None and self._steps >= WARM:
            self._times[compressed].append(now - self._since)
        self._steps += 1
        if self._steps < WARM + 2 * ROUNDS:
            self._since = now
            return False
        both = torch.tensor([min(self._times[False]), min(self._times[True])], device=device)
        dist.all_reduce(both, op=dist.ReduceOp.MAX, group=group)
        self.dense, self.coded = both.tolist()
        self.decision = self.coded < GAIN * self.dense
        return True

    def describe(self) -> str:
        """One sentence for a log."""
        if self.decision is None:
            return "auto: still measuring"
        verdict = "compressing" if self.decision else "not compressing: it would lose time"
        if not self.dense:
            return f"auto: {verdict} (decided before the restart)"
        return f"auto: {verdict}; a step took {self.dense:.4f} s dense, {self.coded:.4f} s coded"
