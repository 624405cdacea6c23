"""Loss against epsilon: where noise is cheapest.

    python -m benchmarks.run privacy

The embedded LLaMA with LoRA, as in the ``federated`` benchmark, but all 40 clients train in each of
4 rounds. Every client clips what it sends and adds a share of the noise (``ClientPrivacy``), so the
guarantee holds for whoever sees sums alone: other clients, or a server behind secure aggregation.
Noise multipliers are dp-accounting's (PLD), for one client added or removed.

What is noised has 98,304 values (``fp32``, ``rotsign-64``), a 64th of them (the autoencoder) or
fewer (subspaces). The bound of a scheme is the median norm of what its clients send without noise
on a seed that is not reported. The autoencoder and ``signal-128`` are fitted on the clients' D1:
**what that gives away is not in epsilon**. Random bases are drawn from a public seed.
"""

from __future__ import annotations

import bisect
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from benchmarks import jobs, report, rows
from benchmarks.federated import case as federated
from benchmarks.federated import fitted
from benchmarks.federated.figures import load
from benchmarks.federated.methods import Coded
from benchmarks.federated.world import World, play
from benchmarks.jobs import Job
from benchmarks.privacy import subspaces
from benchmarks.run import Options, check_names
from gradcodec.codec import Codec
from gradcodec.codecs import Identity, RotatedSign
from gradcodec.federated import ServerConfig
from gradcodec.federated.envelope import Reply
from gradcodec.packers.rotsign import RotatedSignConfig
from gradcodec.privacy import EPSILONS, ClientPrivacy, calibrate

CASE = "privacy"
SEEDS = (0, 1, 2)
TUNING_SEED = 100
ROUNDS, DELTA = 4, 1e-3
LEVELS = (None, *reversed(EPSILONS))
"""Epsilons; ``None`` is the bound without noise."""

TITLES = {
    "fp32": "whole update, fp32",
    "rotsign-64": "rotated signs, 1/4 bit",
    "paper-working": "ResNet-3 AE, working",
    "random-128": "random subspace 1/128, 8 bit",
    "signal-128": "fitted subspace 1/128, 8 bit",
    "random-1024": "random subspace 1/256, one direction a tensor, 8 bit",
}
QUICK = ("fp32", "random-128")
LR = 1.2e-2


@lru_cache(maxsize=1)
def world_of(seed: int) -> World:
    """The ``federated`` benchmark's world, with everyone in each round."""
    s = federated.settings(seed, ROUNDS)
    return World(replace(s, fraction=1.0, local=replace(s.local, steps=4)))


def scheme(name: str, world: World, privacy: ClientPrivacy | None) -> Coded:
    """Both ends of a private federation."""
    kind, _, ratio = name.partition("-")
    if kind in ("fp32", "rotsign"):
        up: Codec = Identity()
        if kind == "rotsign":
            up = RotatedSign(RotatedSignConfig(kept=int(ratio)))
        return Coded(world.initial, up, Identity(), ServerConfig(privacy=privacy))
    if kind == "paper":
        codec, nbytes = fitted.codec(world, "resnet3-working")
        config = ServerConfig(privacy=privacy)
        return Coded(world.initial, codec, Identity(), config, codec_bytes=nbytes)
    nbytes = 0
    if kind == "random":
        coded = subspaces.random(world, float(ratio))
    else:
        coded, nbytes = subspaces.signal(world, float(ratio))
    rule = ServerConfig(mode="latent", privacy=privacy)
    return Coded(world.initial, coded, coded, rule, codec_bytes=nbytes)


class Measured(Coded):
    """Notes the norms of what clients send."""

    norms: list[float]

    def reply(self, client: int, optimizer: Any, end: Any, n: int) -> bytes:
        """As of ``Coded``."""
        blob = super().reply(client, optimizer, end, n)
        codec = self.server.uplink
        payload = replace(Reply.from_bytes(blob).payload, base=codec.base)
        self.norms.append(float(codec.read_code(payload).norm()))
        return blob


def clip_of(name: str, out: Path) -> float:
    """The bound of a scheme; measured once and kept beside the rows."""
    name = _clipped_as(name)
    path = out / f"{CASE}-clip.jsonl"
    stamp = rows.stamp(CASE, name, TUNING_SEED, {"rounds": 1, "lr": LR})
    for run in rows.runs(path).values():
        if run[0]["run"] == stamp["run"]:
            return float(run[0]["clip"])
    world = world_of(TUNING_SEED)
    plain = scheme(name, world, None)
    method = Measured.of(plain.server)
    method.codec_bytes, method.norms = plain.codec_bytes, []
    list(play(world, method, lr=LR, rounds=1))
    found = statistics.median(method.norms)
    rows.append(path, {**stamp, "clip": found, "round": 1, "diverged": False})
    return found


def _clipped_as(name: str) -> str:
    """Signs are made of the same vector as ``fp32`` sends, after it was clipped."""
    return "fp32" if name.startswith("rotsign") else name


def job(name: str, epsilon: float | None, seed: int, clip: float) -> Job:
    """One run."""
    config = (("epsilon", epsilon), ("delta", DELTA), ("clip", clip))
    source = f"{__name__}:play_job"
    key = name if epsilon is None else f"{name}@{epsilon:g}"
    return Job(CASE, key, seed, LR, ROUNDS, source, config)


def play_job(job: Job) -> Iterator[rows.Row]:
    """The rows of one run."""
    world = world_of(job.seed)
    config = dict(job.config)
    epsilon = config["epsilon"]
    spent = None if epsilon is None else calibrate(float(epsilon), ROUNDS, delta=DELTA)
    privacy = ClientPrivacy(
        float(config["clip"]),
        0.0 if spent is None else spent.noise,
        shares=world.settings.clients,
        seed=job.seed,  # rows can be made again; in earnest there is none
    )
    method = scheme(job.scheme.partition("@")[0], world, privacy)
    said = "no noise, no guarantee" if spent is None else str(spent)
    for row in play(world, method, lr=job.lr, rounds=job.rounds):
        yield {**row, "guarantee": said, "noise": privacy.noise}


def main(options: Options) -> list[str]:
    """Run what is missing; then the table and the plot."""
    names = list(options.schemes or (QUICK if options.quick else TITLES))
    check_names(names, TITLES)
    seeds = options.seeds or (SEEDS[:1] if options.quick else SEEDS)
    clips = {name: clip_of(name, options.out) for name in names}
    todo = [job(n, e, seed, clips[n]) for seed in seeds for n in names for e in LEVELS]
    path = options.out / f"{CASE}.jsonl"
    failed = jobs.execute(todo, path, options.workers, again=options.again)
    print(page(path).write(path))
    return failed


def page(path: Path) -> report.Page:
    """The page of these rows; a line of the table is of the seeds that have all of its cells."""
    runs = load(path)
    out = report.Page("What privacy costs", f"python -m benchmarks.run {CASE}")
    head = ("what is clipped and noised", "values", "bound", "no noise")
    names = (f"epsilon {e:g}" for e in reversed(EPSILONS))
    table: report.Table = [(*head, *names, "seeds")]
    lines: dict[str, list[list[float]]] = {}
    starts: dict[int, float] = {}
    guarantees: dict[float, str] = {}
    clients = 0
    for name, title in TITLES.items():
        cells = [runs.get(name if e is None else f"{name}@{e:g}", {}) for e in LEVELS]
        seeds = sorted(set.intersection(*map(set, cells)))
        if not seeds:
            continue
        losses = [[_loss(by_seed[seed][-1]) for seed in seeds] for by_seed in cells]
        lines[title] = losses
        firsts = {seed: cells[0][seed][0] for seed in seeds}
        starts |= {seed: first["start_loss"] for seed, first in firsts.items()}
        clients = firsts[seeds[0]]["participations"]
        bound = f"{firsts[seeds[0]]['config']['clip']:.3g}"
        values = f"{_values(runs[_clipped_as(name)]):,}"
        table.append((title, values, bound, *map(_cell, losses), ", ".join(map(str, seeds))))
        for epsilon, by_seed in zip(LEVELS, cells, strict=True):
            if epsilon is not None:
                guarantees[epsilon] = by_seed[seeds[0]][0]["guarantee"]
    out.table("Held-out loss", table)
    out.lines(
        [
            f"{ROUNDS} rounds of all {clients} clients; of several seeds the mean, and the least "
            f"and the greatest; loss before training {_cell(list(starts.values()))}; learning rate "
            f"{LR:g} for all, not tuned for noise",
            *(guarantees[e] for e in sorted(guarantees)),
            "the bound is the median norm of what clients send without noise on another seed; "
            "epsilon does not count that",
            "for whoever sees sums alone; a server that sees single replies gets a far weaker "
            "guarantee, since each holds one of 40 shares of the noise",
            "the autoencoder and the fitted subspace were fitted on the clients' own data, without "
            "noise: that is not in epsilon",
        ]
    )
    out.plots({"": lambda to: _draw(lines, statistics.fmean(starts.values()), to)})
    return out


def _values(by_seed: Mapping[int, Sequence[rows.Row]]) -> int:
    """How many values a client clips: those that it sends, counted by their bytes.

    Subspaces send 8 bits a value and a scale for each block, the others 4 bytes.
    """
    first = next(iter(by_seed.values()))[0]
    nbytes = first["uplink_payload_bytes"] // first["participations"]
    if first["scheme"].partition("-")[0] in ("random", "signal"):
        packer = subspaces.PACKED.packer
        return bisect.bisect_left(range(nbytes), nbytes, key=packer.nbytes)
    return nbytes // 4


def _loss(last: rows.Row) -> float:
    """Final loss; infinite where training diverged."""
    return float("inf") if last["diverged"] else float(last["loss"])


def _cell(losses: Sequence[float]) -> str:
    """Mean and range; how many diverged, if some did."""
    good = [loss for loss in losses if math.isfinite(loss)]
    if len(good) < len(losses):
        return "inf" if not good else f"inf in {len(losses) - len(good)} of {len(losses)}"
    mean = f"{statistics.fmean(good):.3f}"
    return mean if max(good) == min(good) else f"{mean} ({min(good):.3f} to {max(good):.3f})"


def _draw(lines: dict[str, list[list[float]]], start: float, path: Path) -> None:
    figure, axes = report.figure(1, 1, figsize=(7, 4.5))
    at = list(range(len(LEVELS)))
    for title, levels in lines.items():
        shown = [[min(loss, start + 1) for loss in losses] for losses in levels]
        middle = [statistics.fmean(losses) for losses in shown]
        (line,) = axes.plot(at, middle, "o-", label=title)
        least, most = [min(losses) for losses in shown], [max(losses) for losses in shown]
        axes.vlines(at, least, most, color=line.get_color(), linewidth=3, alpha=0.4)
    axes.axhline(start, color="gray", linestyle=":", label="before training")
    axes.set_xticks(at, ["no noise", *(f"{e:g}" for e in reversed(EPSILONS))])
    axes.set(xlabel=f"epsilon at delta {DELTA:g}", ylabel="held-out loss", title="")
    axes.set_ylim(top=start + 1)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    report.save(figure, path)
