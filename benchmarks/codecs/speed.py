"""The speed of coding on one core: every scheme in one process, timed in turns.

A *round* times a copy and then every scheme once, encode and decode, each over as many calls as
take 20 ms. How busy the machine is thus changes for all of them alike. Reported
are medians over rounds, and ratios to the copy of the same round.
"""

from __future__ import annotations

import functools
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from benchmarks import rows
from benchmarks.codecs.coders import BY_TORCH, SCHEMES, Coder, computed_by
from benchmarks.codecs.data import Snapshot
from benchmarks.measure import peak
from gradcodec import ops

_SPAN = 0.02

Way = Callable[[], AbstractContextManager[None]]


def _timed(call: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Wall and processor seconds of one call, as the mean of ``repeats``."""
    wall, busy = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - wall) / repeats, (time.process_time() - busy) / repeats


def _repeats(call: Callable[[], Any]) -> int:
    call()
    return max(1, round(_SPAN / max(1e-6, _timed(call, 1)[0])))


class _Subject:
    """A scheme as one implementation computes it, ready to be timed."""

    def __init__(self, name: str, impl: str, snapshot: Snapshot) -> None:
        self.name, self.impl = name, impl
        # Who computes is chosen for each call; a peer has no choice.
        self.way: Way = functools.partial(computed_by, impl) if impl else nullcontext
        self.coder: Coder = SCHEMES[name].make(snapshot)
        with self.way():
            coded = self.coder.encode(snapshot)
            self.calls: dict[str, Callable[[], Any]] = {
                "encode": lambda: self.coder.encode(snapshot),
                "decode": lambda: self.coder.decode(coded),
            }
            self.nbytes = self.coder.nbytes(coded)
            self.peaks = {what: peak(call) for what, call in self.calls.items()}
            self.repeats = {what: _repeats(call) for what, call in self.calls.items()}
        self.seconds: dict[str, list[tuple[float, float]]] = {what: [] for what in self.calls}

    def time(self) -> None:
        """One round."""
        with self.way():
            for what, call in self.calls.items():
                self.seconds[what].append(_timed(call, self.repeats[what]))


def measure(names: Sequence[str], numel: int, rounds: int) -> tuple[list[rows.Row], list[str]]:
    """A row per scheme and implementation, and why some are missing.

    Args:
        names: of ``SCHEMES``.
        numel: values, standard normal, fp32.
        rounds: how often each is timed.
    """
    torch.set_num_threads(1)
    side = int(numel**0.5)
    snapshot = {"v": torch.randn(side, side, generator=torch.Generator().manual_seed(0))}
    source = snapshot["v"].view(-1)
    target = torch.empty_like(source)
    subjects, missing = [], []
    default = ops.implementation("cpu")
    for name in names:
        ours = SCHEMES[name].kind == "ours"
        both = [default, "reference"] if name in BY_TORCH else [default]
        for impl in dict.fromkeys(both) if ours else ("",):
            try:
                subjects.append(_Subject(name, impl, snapshot))
            except ImportError as reason:
                missing.append(f"{name}: {reason}")
    repeats = _repeats(lambda: target.copy_(source))
    copies = []
    for _ in range(rounds):
        gc.collect()
        copies.append(_timed(lambda: target.copy_(source), repeats))
        for subject in subjects:
            subject.time()
    nbytes = 4 * source.numel()
    found = [
        {
            "scheme": "copy",
            "impl": "",
            "encode": _figures(copies, copies, nbytes),
            "decode": _figures(copies, copies, nbytes),
        }
    ]
    for s in subjects:
        found.append(
            {
                "scheme": s.name,
                "impl": s.impl,
                "bits": round(8 * s.nbytes / source.numel(), 4),
                **{
                    what: {
                        **_figures(s.seconds[what], copies, nbytes),
                        "peak_of_input": None if most is None else round(most / nbytes, 3),
                    }
                    for what, most in s.peaks.items()
                },
            }
        )
    return found, missing


def _figures(
    seconds: Sequence[tuple[float, float]], copies: Sequence[tuple[float, float]], nbytes: int
) -> rows.Row:
    """Speed over the fp32 bytes that are coded, by the clock and by the processor's time."""
    wall = sorted(s[0] for s in seconds)
    ratios = [c[0] / s[0] for s, c in zip(seconds, copies, strict=True)]
    busy = statistics.median(s[1] for s in seconds)
    cut = len(wall) // 5
    return {
        "gb_s": round(nbytes / statistics.median(wall) / 1e9, 4),
        "cpu_gb_s": round(nbytes / busy / 1e9, 4) if busy else None,
        "of_copy": round(statistics.median(ratios), 4),
        "ms": [round(1e3 * t, 3) for t in (wall[cut], statistics.median(wall), wall[-1 - cut])],
        "cpu_ms": round(1e3 * busy, 3),
    }
