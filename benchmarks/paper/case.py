"""Everything that CG-FedLLM (arXiv 2405.13746) analyses, rerun, beside controls.

    python -m benchmarks.run paper --quick                            # minutes, embedded LLaMA
    python -m benchmarks.run paper --model FILE.gguf --data FOLDER    # SmolLM2-135M

Clients train LoRA adapters without compression and are recorded: D1 is what codecs are fitted on
(TGAP), D2 what they are tried on. All analyses read the recordings; no codec takes part in the
training. Each row is one analysis (``config.kind``) of one coder or object (``scheme``); rows that
are there are not made again. ``loss`` in a row is its first figure, for the command's own lines.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

from benchmarks import jobs, report, rows
from benchmarks.jobs import Job
from benchmarks.llama.tasks import PLACES
from benchmarks.paper import fidelity
from benchmarks.paper import page as pages
from benchmarks.paper.coders import CODERS
from benchmarks.paper.recordings import OBJECTS
from benchmarks.paper.setup import Setup
from benchmarks.run import Options, check_names

CASE = "paper"
SEEDS = (0, 1, 2)

Unit = tuple[str, str, str]
"""Kind of analysis, scheme, and a further word: the object, the reading, the source."""

KINDS: Mapping[str, Callable[[Setup, str, str], rows.Row]] = MappingProxyType(
    {
        "snr": fidelity.snr,
        "size": lambda setup, name, _: fidelity.size(setup, name),
        "aggregation": lambda setup, *_: fidelity.aggregation(setup),
    }
)


def units(setup: Setup) -> list[Unit]:
    """All analyses of a setup."""
    out: list[Unit] = []
    for what in OBJECTS:
        out += [
            ("snr", name, what) for name, coder in CODERS.items() if what == "update" or coder.every
        ]
    out += [("size", name, "update") for name, coder in CODERS.items() if coder.codec]
    out.append(("aggregation", "none", "update"))
    return out


def job(setup: Setup, unit: Unit) -> Job:
    """One row."""
    kind, scheme, of = unit
    config = {"kind": kind, "of": of, **setup.config()}
    return Job(CASE, scheme, setup.seed, 0.0, 1, f"{__name__}:play_job", tuple(config.items()))


def play_job(job: Job) -> Iterator[rows.Row]:
    """The row of one analysis."""
    config = dict(job.config)
    found = KINDS[config["kind"]](Setup.of(job), job.scheme, config["of"])
    yield {"round": 1, "diverged": False, **found}


def main(options: Options) -> list[str]:
    """Run what is missing; then the page and its plots."""
    for place, given in zip(PLACES, (options.model, options.data), strict=True):
        if given is not None:
            os.environ[place] = str(given)
    check_names(options.schemes or (), CODERS)
    todo = []
    for seed in options.seeds or (SEEDS[:1] if options.quick else SEEDS):
        setup = Setup.asked(options, seed)
        chosen = [u for u in units(setup) if options.schemes is None or u[1] in options.schemes]
        todo += [job(setup, unit) for unit in chosen]
    path = options.out / f"{CASE}{'-smollm2' if options.model else ''}.jsonl"
    failed = jobs.execute(todo, path, options.workers, again=options.again)
    print(page(path).write(path))
    return failed


def page(path: Path) -> report.Page:
    """The page of these rows."""
    return pages.page(path)
