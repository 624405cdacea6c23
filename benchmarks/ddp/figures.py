"""The numbers behind the DDP benchmark's tables and plots; rows in, figures out.

*Seconds on a link*: where a scheme was trained to the end on a link, those of that training.
Elsewhere they are composed: the losses of the unshaped link at its own steps, and for the time of
``n`` steps what its first steps took on this link plus the median of the later ones for each
further step. *Time to a loss* is interpolated between evaluations. *Ratio* is bytes that plain DDP
put on its interface in a step over the scheme's, on the same link.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import rows
from benchmarks.ddp.schemes import REFERENCE, SCHEMES
from benchmarks.report import Goal
from benchmarks.rows import Row

WIRE_LINKS = ("100mbit", "1gbit", "unshaped")
"""Where bytes are read: frames of the slowest link are whole (see ``links.namespaces``)."""

NEAR = 0.01
"""Time to a loss: to the first that is within this share of plain DDP's last one."""

Point = tuple[int, float, float]
"""Step, seconds, held-out loss."""


@dataclass
class Trained:
    """One scheme with one work, world and seed, on all links."""

    scheme: str
    links: dict[str, Row] = field(default_factory=dict)

    @property
    def base(self) -> Row:
        """The unshaped link's row: the whole training."""
        return self.links["unshaped"]

    def row(self, link: str) -> Row:
        """The row that says how a training on this link ends."""
        there = self.links.get(link)
        return there if there is not None and there["whole"] else self.base

    def loss(self, link: str | None = None) -> float:
        """Held-out loss at the end; by default on the link that bytes are read on.

        What ``auto`` computes depends on the link: on a fast one it may not compress at all.
        """
        if link is None:
            there = self.sent()
            link = "unshaped" if there is None else there[0]
        return float(self.row(link)["evaluations"][-1][1])

    def curve(self, link: str) -> list[Point] | None:
        """Held-out loss against steps and seconds; ``None`` where the link was not run."""
        there = self.links.get(link)
        if there is None:
            return None
        if there["whole"]:
            return [(step, seconds, loss) for step, loss, seconds in there["evaluations"]]
        return [(step, taken(there, step), loss) for step, loss, _ in self.base["evaluations"]]

    def sent(self) -> tuple[str, float] | None:
        """The link that bytes are read on, and bytes per step there."""
        for link in WIRE_LINKS:
            if link in self.links:
                return link, float(self.links[link]["sent"])
        return None

    def same_path(self, link: str) -> bool:
        """Whether this link saw the first losses of the unshaped one, to the bit."""
        same: bool = self.links[link]["path"] == self.base["path"]
        return same


Group = dict[str, Trained]
"""By scheme, plain DDP among them."""


def taken(row: Row, step: int) -> float:
    """Seconds of the first ``step`` steps on a row's link."""
    settle = int(row["settle"])
    if step <= settle:
        return float(row["settle_s"]) * step / settle if settle else 0.0
    return float(row["settle_s"]) + (step - settle) * float(row["p50_s"])


def load(path: Path) -> dict[tuple[str, int], dict[int, Group]]:
    """By work and world, then by seed; of each run and link the last row of the longest training.

    A scheme whose unshaped training is not there, or which is of fewer steps than plain DDP's, is
    left out: trials do no harm.
    """
    kept: dict[tuple[str, int, int, str, str], Row] = {}
    for row in rows.read(path):
        if "failed" in row or "blocks" in row:
            continue
        config = row["config"]
        key = (config["work"], config["world"], row["seed"], row["scheme"], row["link"])
        old = kept.get(key)
        if old is None or (config["steps"], row["asked"]) >= (old["config"]["steps"], old["asked"]):
            kept[key] = row
    out: dict[tuple[str, int], dict[int, Group]] = {}
    for (work, world, seed, scheme, link), row in kept.items():
        group = out.setdefault((work, world), {}).setdefault(seed, {})
        group.setdefault(scheme, Trained(scheme)).links[link] = row
    for by_seed in out.values():
        for seed in [s for s, g in by_seed.items() if not _complete(g.get(REFERENCE))]:
            del by_seed[seed]
        for group in by_seed.values():
            steps = group[REFERENCE].base["config"]["steps"]
            for name in [n for n, t in group.items() if not _complete(t, steps)]:
                del group[name]
            for trained in group.values():
                trained.links = {
                    link: row
                    for link, row in trained.links.items()
                    if row["config"]["steps"] == steps
                }
    return {key: by_seed for key, by_seed in out.items() if by_seed}


def _complete(trained: Trained | None, steps: int | None = None) -> bool:
    if trained is None or "unshaped" not in trained.links:
        return False
    row = trained.base
    return bool(row["whole"] or row["diverged"]) and steps in (None, row["config"]["steps"])


def beside(path: Path) -> dict[str, dict[str, list[float]]]:
    """By link: for each scheme that took turns with plain DDP, the ratios of step times, sorted.

    One ratio per turn: the scheme's median step over plain DDP's in the same turn.
    """
    out: dict[str, dict[str, list[float]]] = {}
    for row in rows.read(path):
        if "blocks" not in row:
            continue
        blocks: Mapping[str, list[float]] = row["blocks"]
        out[row["link"]] = {
            name: sorted(a / b for a, b in zip(times, blocks[REFERENCE], strict=True))
            for name, times in blocks.items()
            if name != REFERENCE
        }
    return out


def failures(path: Path) -> list[str]:
    """What never came to its end, and why."""
    done = {(r["run"], r["commit"]) for r in rows.read(path) if "failed" not in r}
    out = {}
    for row in rows.read(path):
        if "failed" in row and (row["run"], row["commit"]) not in done:
            config = row["config"]
            out[row["run"]] = (
                f"{config['work']} x{config['world']}, {row['scheme']}: {row['failed']}"
            )
    return list(out.values())


def time_to(curve: Sequence[Point], loss: float) -> float | None:
    """Seconds until the held-out loss is first down to ``loss``; between evaluations, a line."""
    before: Point | None = None
    for point in curve:
        if point[2] <= loss:
            if before is None or before[2] == point[2]:
                return point[1]
            share = (before[2] - loss) / (before[2] - point[2])
            return before[1] + share * (point[1] - before[1])
        before = point
    return None


def target(group: Group) -> float:
    """What time is taken to."""
    return group[REFERENCE].loss() * (1 + NEAR)


def excess(group: Group, scheme: str, link: str | None = None) -> float:
    """How far a scheme's last loss is above plain DDP's, as a share of it; below is negative."""
    return group[scheme].loss(link) / group[REFERENCE].loss() - 1


def ratio(group: Group, scheme: str) -> float | None:
    """Plain DDP's bytes per step over the scheme's."""
    there = group[scheme].sent()
    if there is None:
        return None
    link, count = there
    plain = group[REFERENCE].links.get(link)
    return float(plain["sent"]) / count if plain is not None and count else None


def speed_up(group: Group, scheme: str, link: str) -> float | None:
    """Plain DDP's time to the target over the scheme's, on a link; ``None`` if either has none."""
    mine, plain = (group[name].curve(link) for name in (scheme, REFERENCE))
    if mine is None or plain is None:
        return None
    mine_s, plain_s = (time_to(curve, target(group)) for curve in (mine, plain))
    return plain_s / mine_s if mine_s and plain_s else None


def step_ratio(group: Group, scheme: str, link: str) -> float | None:
    """Plain DDP's median step over the scheme's, on a link."""
    mine, plain = (group[name].links.get(link) for name in (scheme, REFERENCE))
    return None if mine is None or plain is None else plain["p50_s"] / mine["p50_s"]


def goals(group: Group, turns: Mapping[str, Mapping[str, Sequence[float]]]) -> list[Goal]:
    """The goals, judged on one work and world, and on the turns taken."""
    mine = [n for n in group if n in SCHEMES and SCHEMES[n].kind == "ours"]
    peers = [n for n in group if n in SCHEMES and SCHEMES[n].kind == "peer"]
    fixed = [n for n in mine if SCHEMES[n].alike]
    return [
        _loss_goal(group, fixed, 7.0, 0.005, "final loss within 0.5 % of plain DDP at 8x (4 bit)"),
        _loss_goal(group, fixed, 30.0, 0.01, "final loss within 1 % of plain DDP at 30x or more"),
        _fast_goal(group, mine),
        _peer_goal(group, mine, peers),
        _turn_goal(turns, "auto", "1gbit", 1.0, "`auto` never slower than plain DDP at 1 Gbit/s"),
        _turn_goal(
            turns, "identity", "unshaped", 1.05, "overhead of the identity hook under 5 % of a step"
        ),
    ]


def _loss_goal(group: Group, names: Iterable[str], least: float, share: float, words: str) -> Goal:
    """The best loss among the schemes of at least that ratio; 4 bits with their scales are 7.8x."""
    found = [(excess(group, n), n) for n in names if (ratio(group, n) or 0) >= least]
    if not found:
        return Goal(words, None, f"no scheme of {least:g}x or more was run")
    best, name = min(found)
    times = ratio(group, name) or 0
    return Goal(words, best <= share, f"{SCHEMES[name].title}: {best:+.2%} at {times:.1f}x")


def _best(group: Group, names: Iterable[str]) -> tuple[float, str] | None:
    found = [(s, n) for n in names if (s := speed_up(group, n, "100mbit")) is not None]
    return max(found) if found else None


def _fast_goal(group: Group, mine: Iterable[str]) -> Goal:
    words = "time to loss at 100 Mbit/s at least 5x faster than plain DDP"
    best = _best(group, mine)
    if best is None:
        return Goal(words, None, "not measured, or no scheme got there")
    return Goal(words, best[0] >= 5, f"{SCHEMES[best[1]].title}: {best[0]:.2f}x")


def _peer_goal(group: Group, mine: Iterable[str], peers: Iterable[str]) -> Goal:
    words = "time to loss at 100 Mbit/s at least 1.5x faster than the best peer"
    best, theirs = _best(group, mine), _best(group, peers)
    if best is None or theirs is None:
        return Goal(words, None, "not measured, or no peer or scheme got there")
    found = (
        f"{SCHEMES[best[1]].title}: {best[0] / theirs[0]:.2f}x "
        f"{SCHEMES[theirs[1]].title} ({theirs[0]:.2f}x plain DDP)"
    )
    return Goal(words, best[0] / theirs[0] >= 1.5, found)


def _turn_goal(
    turns: Mapping[str, Mapping[str, Sequence[float]]],
    scheme: str,
    link: str,
    most: float,
    words: str,
) -> Goal:
    """The median of the turns' ratios; missed only if three quarters of the turns are above."""
    ratios = turns.get(link, {}).get(scheme)
    if not ratios:
        return Goal(words, None, "not measured")
    middle, quarter = statistics.median(ratios), ratios[len(ratios) // 4]
    found = (
        f"step / plain DDP's step, in turns: median {middle:.3f}, "
        f"quartiles {quarter:.3f}..{ratios[3 * len(ratios) // 4]:.3f}, {len(ratios)} turns"
    )
    return Goal(words, (middle if most > 1 else quarter) <= most, found)
