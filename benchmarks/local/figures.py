"""The numbers behind the page of ``local.jsonl``; rows in, figures out.

*Bytes* are those of a whole training, of a rank, mean over ranks. *Ratio* is plain DDP's bytes over
the scheme's, of the same seed. *Excess* is how far a scheme's last held-out loss is above plain
DDP's, of the same seed. All are means over seeds. *Seconds on a link* are computed: steps times
what a step takes without any exchange (the median of all rows, alike for all schemes) plus the
scheme's own coding, plus bytes over the rate, nothing hidden behind anything.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import rows
from benchmarks.local.schemes import REFERENCE, SCHEMES
from benchmarks.report import Goal
from benchmarks.rows import Row

NEAR = 0.01
"""What counts as plain DDP's loss: within this share of it."""
LEAST_RATIO, LEAST_AHEAD = 1000.0, 3.0
LINKS = (10, 100)
"""Mbit/s."""

Group = dict[str, Row]
"""Rows of one seed by scheme, plain DDP's among them."""


def load(path: Path) -> dict[int, Group]:
    """By seed; seeds without plain DDP, and runs shorter than its longest, are left out."""
    ended = [run[-1] for run in rows.runs(path).values() if rows.finished(run)]
    ended = [row for row in ended if row["scheme"] in SCHEMES]
    longest = max((r["config"]["rounds"] for r in ended if r["scheme"] == REFERENCE), default=0)
    out: dict[int, Group] = {}
    for row in ended:
        if row["config"]["rounds"] == longest:
            out.setdefault(row["seed"], {})[row["scheme"]] = row
    return {seed: out[seed] for seed in sorted(out) if REFERENCE in out[seed]}


def total(row: Row) -> float:
    """Bytes of a training."""
    return float(row["sent"]) * int(row["steps"])


@dataclass(frozen=True)
class Figures:
    """One scheme over all seeds that have it.

    Attributes:
        name: of the scheme.
        lr, outer: its rates.
        losses: last held-out losses, one a seed.
        excess: means over seeds.
        nbytes: of a training.
        ratio: plain DDP's bytes over the scheme's.
        diverged: how many did.
        equal: all replicas of all runs ended equal to the bit.
        coding_s: seconds of coding in a step, as far as the scheme tells them.
    """

    name: str
    lr: float
    outer: float | None
    losses: tuple[float, ...]
    excess: float
    nbytes: float
    ratio: float
    diverged: int
    equal: bool
    coding_s: float

    @property
    def near(self) -> bool:
        """Whether the loss is plain DDP's."""
        return not self.diverged and self.excess <= NEAR


def figures(by_seed: Mapping[int, Group]) -> dict[str, Figures]:
    """Every scheme that was run, in the order of the table."""
    out = {}
    for name in SCHEMES:
        pairs = [(g[name], g[REFERENCE]) for g in by_seed.values() if name in g]
        if not pairs:
            continue
        mine = [row for row, _ in pairs]
        out[name] = Figures(
            name=name,
            lr=mine[0]["config"]["lr"],
            outer=mine[0]["config"]["outer_lr"],
            losses=tuple(row["loss"] for row in mine),
            excess=statistics.fmean(row["loss"] / plain["loss"] - 1 for row, plain in pairs),
            nbytes=statistics.fmean(map(total, mine)),
            ratio=statistics.fmean(total(plain) / total(row) for row, plain in pairs),
            diverged=sum(row["diverged"] for row in mine),
            equal=all(row["replicas_equal"] for row in mine),
            coding_s=statistics.fmean(map(_coding, mine)),
        )
    return out


def _coding(row: Row) -> float:
    """Encoding and decoding, told apart or not."""
    return sum(float(row.get(f"{part}_s", 0.0)) for part in ("encode", "decode", "coding"))


def compute_seconds(by_seed: Mapping[int, Group]) -> float:
    """A step without any exchange, all ranks at it."""
    every = (row for group in by_seed.values() for row in group.values())
    return statistics.median(float(row["compute_s"]) for row in every)


def steps_to(row: Row, loss: float) -> float | None:
    """Steps until the held-out loss is first down to ``loss``; between evaluations, a line."""
    before: tuple[float, float] | None = None
    points: list[tuple[float, float, float]] = row["evaluations"]
    for step, held_out, _ in points:
        if held_out <= loss:
            if before is None or before[1] == held_out:
                return float(step)
            return before[0] + (before[1] - loss) / (before[1] - held_out) * (step - before[0])
        before = (step, held_out)
    return None


def seconds_to(row: Row, loss: float, mbit: int, compute: float) -> float | None:
    """Seconds until then on a link of that rate, computed (see above)."""
    steps = steps_to(row, loss)
    if steps is None:
        return None
    return steps * (compute + _coding(row) + float(row["sent"]) * 8 / (mbit * 1e6))


def mean_seconds(by_seed: Mapping[int, Group], name: str, mbit: int) -> float | None:
    """Over seeds, to ``NEAR`` of plain DDP's last loss; ``None`` if one of them never got there."""
    compute = compute_seconds(by_seed)
    found = [
        seconds_to(g[name], g[REFERENCE]["loss"] * (1 + NEAR), mbit, compute)
        for g in by_seed.values()
        if name in g
    ]
    reached = [seconds for seconds in found if seconds is not None]
    return statistics.fmean(reached) if reached and len(reached) == len(found) else None


def goals(known: Mapping[str, Figures]) -> list[Goal]:
    """The goals, judged on means over seeds."""
    ours = [f for f in known.values() if SCHEMES[f.name].kind == "ours"]
    peers = [f for f in known.values() if SCHEMES[f.name].kind == "peer"]
    return [_fewer(ours), _ahead(ours, peers)]


def _best(some: Sequence[Figures]) -> Figures | None:
    """The fewest bytes at plain DDP's loss."""
    return max((f for f in some if f.near), key=lambda f: f.ratio, default=None)


def _fewer(ours: Sequence[Figures]) -> Goal:
    words = f"at least {LEAST_RATIO:,.0f}x fewer bytes than plain DDP within {NEAR:.0%} of its loss"
    if not ours:
        return Goal(words, None, "no scheme of ours was run")
    best = _best(ours)
    if best is None:
        nearest = min(ours, key=lambda f: f.excess)
        said = f"none within {NEAR:.0%}; nearest {nearest.name}: {nearest.excess:+.2%}"
        return Goal(words, False, said)
    said = f"{best.name}: {best.ratio:,.0f}x at {best.excess:+.2%}"
    return Goal(words, best.ratio >= LEAST_RATIO, said)


def _ahead(ours: Sequence[Figures], peers: Sequence[Figures]) -> Goal:
    words = f"at least {LEAST_AHEAD:g}x fewer bytes than the best peer at that loss"
    mine, theirs = _best(ours), _best(peers)
    if not ours or not peers:
        return Goal(words, None, "not both were run")
    if mine is None:
        return Goal(words, False, "none of ours is at that loss")
    if theirs is None:
        nearest = min(peers, key=lambda f: f.excess)
        said = f"no peer is at that loss; nearest {nearest.name}: {nearest.excess:+.2%}"
        return Goal(words, None, said)
    ahead = theirs.nbytes / mine.nbytes
    said = f"{mine.name}: {ahead:.1f}x fewer than {theirs.name} ({theirs.ratio:,.0f}x)"
    return Goal(words, ahead >= LEAST_AHEAD, said)
