"""The learning rate of every scheme: the same small grid for all, on a seed that is not reported.

Peers get the same effort as our own codecs. The choice is the lowest held-out loss after the last
round; where it lies at an end of the grid the report says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks import jobs, rows
from benchmarks.federated.figures import REFERENCE
from benchmarks.federated.scheme import Scheme
from benchmarks.run import RESULTS as FOLDER
from benchmarks.run import Options, choose

CASE = "tune"
SEED = 100  # of development; the reported ones are federated.SEEDS
RESULTS = FOLDER / f"{CASE}.jsonl"


def best(schemes: Sequence[Scheme], path: Path = RESULTS) -> dict[str, float]:
    """The best learning rate of each scheme; the middle of its grid, with a note, if not tuned."""
    losses = results(path)
    out = {scheme.name: scheme.grid[len(scheme.grid) // 2] for scheme in schemes}
    untuned = [name for name in out if name not in losses]
    if untuned:
        print(f"not tuned yet, at the middle of their grids: {', '.join(untuned)}")
    for name, tried in losses.items():
        if name in out:
            out[name] = min(tried, key=lambda lr: (tried[lr], lr))
    return out


def results(path: Path = RESULTS) -> dict[str, dict[float, float]]:
    """Final held-out loss by scheme and learning rate; infinite where training diverged.

    Of runs with different numbers of rounds the longest ones count.
    """
    ended = [run for run in rows.runs(path).values() if rows.finished(run)]
    longest = max((run[0]["config"]["rounds"] for run in ended), default=0)
    out: dict[str, dict[float, float]] = {}
    for run in ended:
        last = run[-1]
        if last["config"]["rounds"] == longest:
            loss = float("inf") if last["diverged"] else last["loss"]
            out.setdefault(last["scheme"], {})[last["config"]["lr"]] = loss
    return out


def main(options: Options) -> list[str]:
    """Every scheme at every learning rate of its grid."""
    from benchmarks.federated import case as federated

    schemes = choose(federated.SCHEMES, options, REFERENCE)
    rounds = options.rounds or federated.ROUNDS
    todo = [
        federated.job(CASE, scheme, SEED, lr, rounds) for scheme in schemes for lr in scheme.grid
    ]
    path = options.out / f"{CASE}.jsonl"
    failed = jobs.execute(todo, path, options.workers, again=options.again)
    for name, tried in results(path).items():
        losses = ", ".join(f"{lr:g}: {loss:.4f}" for lr, loss in sorted(tried.items()))
        print(f"{name:20} {losses}")
    return failed
