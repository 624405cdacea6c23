"""Federated fine-tuning of a real pretrained LLaMA: quality against bytes.

    python -m benchmarks.run llama --model FILE.gguf --data FOLDER [--quick]

SmolLM2-135M-Instruct with LoRA (r = 8 on q and v: 460,800 values) on GSM8K and on MMLU; 20
Dirichlet(0.5) clients by topic or subject, 4 of them in each of 10 rounds, 6 steps of AdamW of 4
questions each. Otherwise as the ``federated`` benchmark: same messages, same counting, the learning
rate of each family of schemes from one grid on a seed that is not reported.

Rows: ``llama-gsm8k.jsonl``, ``llama-mmlu.jsonl`` and, of the learning rates, ``*-tune.jsonl``; MMLU
takes the rates that were best on GSM8K. ``benchmarks.gpu.llama`` makes ``llama-gsm8k-all.jsonl``.
``accuracy`` in a run's last row is that of held-out multiple-choice questions.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks import jobs, report, rows
from benchmarks.federated import page as pages
from benchmarks.federated import tune
from benchmarks.federated.figures import REFERENCE
from benchmarks.federated.world import play_together, world_of
from benchmarks.jobs import Job
from benchmarks.llama.schemes import SCHEMES, LlamaScheme
from benchmarks.llama.tasks import MODEL, PLACES, TASKS, accuracy, settings
from benchmarks.run import Options, choose

CASE = "llama"
SEEDS = (0, 1, 2)
ROUNDS = 10


def job(task: str, scheme: LlamaScheme, seed: int, lr: float, rounds: int) -> Job:
    """One run of this benchmark."""
    s = settings(task, seed, rounds)
    config = {
        "task": task,
        "clients": s.clients,
        "per_round": s.per_round,
        "steps": s.local.steps,
        "batch": s.local.batch,
        "model": MODEL,
        "lora_r": s.lora_r,
        "held_out": s.held_out,
    }
    source = f"{__name__}:play_job"
    together = f"{__name__}:play_jobs"
    pairs = tuple(config.items())
    return Job(f"{CASE}-{task}", scheme.name, seed, lr, rounds, source, pairs, together)


def play_job(job: Job) -> Iterator[rows.Row]:
    """The rows of one run; the last has the accuracy."""
    yield from (row for _, row in play_jobs((job,)))


def play_jobs(jobs: Sequence[Job]) -> Iterator[tuple[Job, rows.Row]]:
    """The same of several runs in one world, in step; see ``play_together``."""
    first = jobs[0]
    here = world_of(settings(str(dict(first.config)["task"]), first.seed, first.rounds))
    methods = [SCHEMES[job.scheme].make(here) for job in jobs]
    runs = [(method, job.lr) for method, job in zip(methods, jobs, strict=True)]
    for i, row in play_together(here, runs, rounds=first.rounds):
        job, method = jobs[i], methods[i]
        if row["round"] == job.rounds and not row["diverged"]:
            if job.scheme == "fp32":  # the others start from the same state
                row["start_accuracy"] = accuracy(here, here.initial)
            row["accuracy"] = accuracy(here, method.state())
        row["device"] = str(here.device)
        yield job, row


def main(options: Options) -> list[str]:
    """Tune on GSM8K, then run what is missing, task by task; then tables and plots."""
    for place, given in zip(PLACES, (options.model, options.data), strict=True):
        if given is not None:
            os.environ[place] = str(given)
    for threshold in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"):
        os.environ.setdefault(threshold, str(1 << 27))  # glibc then keeps activations' memory
    schemes = choose(SCHEMES, options, REFERENCE)
    rounds = options.rounds or ROUNDS
    seeds = options.seeds or (SEEDS[:1] if options.quick else SEEDS)
    failed: list[str] = []
    for task in list(TASKS)[: 1 if options.quick else None]:
        path = options.out / f"{CASE}-{task}.jsonl"
        tuned = options.out / f"{CASE}-{TASKS[task].tuned or task}-tune.jsonl"
        if not options.quick and not TASKS[task].tuned:
            families = [s for s in SCHEMES.values() if s.name in {s.family for s in schemes}]
            tries = [job(task, s, tune.SEED, lr, rounds) for s in families for lr in s.grid]
            failed += jobs.execute(tries, tuned, options.workers, again=options.again)
        rates = tune.best(list(SCHEMES.values()), tuned)
        todo = [job(task, s, seed, rates[s.family], rounds) for seed in seeds for s in schemes]
        failed += jobs.execute(todo, path, options.workers, again=options.again)
        made = page(path)
        print(f"no finished fp32 run in {path}" if made is None else made.write(path))
    return failed


def page(path: Path) -> report.Page | None:
    """The page of a task's rows."""
    title = "SmolLM2-135M: federated fine-tuning by LoRA"
    return pages.page(path, list(SCHEMES.values()), title, CASE)
