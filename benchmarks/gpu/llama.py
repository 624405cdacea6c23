"""The ``llama`` benchmark in the minutes of a lent GPU: the most important runs first.

    nvidia-cuda-mps-control -d      # twice as fast: kernels of several processes side by side
    python -m benchmarks.gpu.llama --out OUT --model FOLDER --data FOLDER [--rounds 2]

1. learning rates on the tuning seed: all of GSM8K in 20 rounds; of peers also in 10 rounds
2. on seeds 0, 1 and 2 side by side: all of GSM8K, the 10 rounds, other adapters, MMLU

A process plays several schemes in step, which a GPU needs. Rows come as rounds end: whoever stops
this loses the unfinished runs alone. On the CPU use ``python -m benchmarks.run llama``.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks import jobs
from benchmarks.federated import tune
from benchmarks.jobs import Job
from benchmarks.llama.case import CASE, SEEDS, job
from benchmarks.llama.schemes import SCHEMES, LlamaScheme
from benchmarks.llama.tasks import MORE, PLACES, TASKS
from benchmarks.run import RESULTS

#: Groups in the order of importance; schemes of a group are played in step.
TWENTY = (
    ("fp32", "s-1280-o4096", "s-256"),
    ("p-170-l2214", "p-56", "p-25"),
    ("f-512-128", "eden-1", "s-512"),
    ("sub-8", "sub-64-own", "sub-4"),
    ("sign-ef-both", "ffa", "b-640"),
    ("bundled-8", "w-1280of4096", "sub-16"),
    ("sparseloco", "ecolora", "flasc-8"),
    ("fed-sb", "bundled-64", "random-8"),
    ("other-8", "h8-1-1/16-s5", "auto-64"),
)
TEN = (
    ("fp32", "s-1280-o4096", "eden-1"),
    ("p-170-l2214", "p-56", "p-25"),
    ("sign-ef-both", "ffa", "w-1280of4096"),
    ("sub-8", "sub-4", "sub-64-own"),
    ("bundled-8", "bundled-64", "sub-16"),
    ("other-8", "other-64", "rotsign-1280of4096"),
    ("random-8", "random-64", "rotsign-64"),
    ("sparseloco", "ecolora", "flasc-8", "fed-sb"),
)
#: Their directions are drawn, or their autoencoder is fitted, on the CPU.
LAST = (("ferret", "fedkseed"), ("auto-64",), ("paper-working",))
OTHER = (("fp32", "s-1280-o4096"), ("sub-8", "eden-1"))
MMLU = (("fp32", "bundled-8", "bundled-64"), ("other-8", "other-64"), ("random-8", "random-64"))
KNOWN = {**TASKS, **MORE}
PEERS = ("fedkseed", "ferret", "ecolora", "sparseloco", "flasc-8", "fed-sb", "ffa", "sign-ef-both")


def main() -> int:
    """Everything, in order; fails if a run did."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rounds", type=int, help="of every run, to try the script")
    parser.add_argument("--workers", type=int, default=6)
    parser.add_argument("--together", type=int, default=3)
    args = parser.parse_args()
    os.environ.update(zip(PLACES, (args.model, str(args.data)), strict=True))
    rounds = args.rounds

    def place(job: Job) -> Path:
        tuning = "-tune" if job.seed == tune.SEED else ""
        return Path(args.out / f"{job.case}{tuning}.jsonl")

    def runs(todo: Iterable[Job], workers: int) -> list[str]:
        return jobs.execute(list(todo), place, workers, together=args.together)

    families = list(dict.fromkeys(SCHEMES[n].family for group in TWENTY for n in group))
    asked = [("gsm8k", name) for name in PEERS]
    asked += [("gsm8k-all", name) for name in reversed(families)]
    tries = [
        job(task, SCHEMES[name], tune.SEED, lr, rounds or KNOWN[task].rounds)
        for task, name in asked  # what takes long comes first, since all wait for its end
        for lr in SCHEMES[name].grid
    ]
    failed = runs(tries, args.workers)
    rates = {task: _rates(task, args.out) for task in ("gsm8k-all", "gsm8k")}

    def of(seed: int) -> list[Job]:
        plans: list[tuple[str, Sequence[str]]] = [("gsm8k-all", g) for g in TWENTY]
        plans += [("gsm8k", group) for group in TEN]
        plans += [("gsm8k-r16", g) for g in OTHER if seed == 0]
        plans += [("gsm8k-qkvo", g) for g in OTHER if seed == 0]
        plans += [("mmlu", group) for group in MMLU]
        plans += [("gsm8k", group) for group in LAST]
        out = []
        for task, names in plans:
            asked = KNOWN[task]
            for scheme in (SCHEMES[name] for name in names):
                rate = rates[asked.tuned or task][scheme.family]
                out.append(job(task, scheme, seed, rate, rounds or asked.rounds))
        return out

    with ThreadPoolExecutor(len(SEEDS)) as pools:
        each = max(1, args.workers // len(SEEDS))
        for lines in pools.map(lambda seed: runs(of(seed), max(2, each)), SEEDS):
            failed += lines
    print("\n".join(failed))
    return 1 if failed else 0


def _rates(task: str, out: Path) -> dict[str, float]:
    """The best rate of each scheme: of what was just tried, else of committed rows."""
    file = f"{CASE}-{task}-tune.jsonl"
    schemes: list[LlamaScheme] = list(SCHEMES.values())
    fresh = tune.best(schemes, out / file)
    return {**tune.best(schemes, RESULTS / file), **{n: fresh[n] for n in tune.results(out / file)}}


if __name__ == "__main__":
    sys.exit(main())
