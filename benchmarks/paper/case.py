"""Everything that CG-FedLLM (arXiv 2405.13746) analyses, rerun, beside controls.

    python -m benchmarks.run paper --quick                          # minutes, embedded LLaMA
    python -m benchmarks.run paper                                  # over an hour of a core
    python -m benchmarks.run paper --quick --model FILE.gguf --data FOLDER   # SmolLM2-135M
    python -m benchmarks.run paper --quick --schemes entropy/       # one analysis, of every coder

Clients train LoRA adapters without compression and are recorded: D1 is what codecs are fitted on
(TGAP), D2 what they are tried on. All analyses read the recordings, in which no codec takes part;
``trained`` alone trains once more, through an autoencoder and on pooled data. Each row is one
analysis (``config.kind``) of one coder or object (``scheme``); rows that are there are not made
again. The full form has 10 rounds, 600 steps of each autoencoder and three seeds; what trains many
autoencoders is of the first seed alone. ``loss`` in a row is its first figure, for the command's
own lines.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

from benchmarks import jobs, report, rows
from benchmarks.jobs import Job
from benchmarks.llama.tasks import PLACES
from benchmarks.paper import fidelity, fits, robustness, shapes, trained
from benchmarks.paper import page as pages
from benchmarks.paper.coders import CODERS
from benchmarks.paper.recordings import OBJECTS, READINGS
from benchmarks.paper.setup import EMBEDDED, Setup
from benchmarks.run import Options, check_names
from gradcodec.transforms.autoencoder.config import RATIOS

CASE = "paper"
SEEDS = (0, 1, 2)
REPEATED = ("snr", "aggregation", "noise", "shape", "product", "entropy", "trained")
"""Kinds of analyses that other seeds than the first have, of updates alone."""

SLOW = "ae-uformer"
"""Its steps take seconds, half an hour in the full form: in the short one by name only."""
BRIEF = frozenset(name for name, coder in CODERS.items() if coder.brief)
"""Coders that are measured as briefly as ``Coder.brief`` says."""

Unit = tuple[str, str, str]
"""Kind of analysis, scheme, and a further word: the object, the reading, the source."""

KINDS: Mapping[str, Callable[[Setup, str, str], rows.Row]] = MappingProxyType(
    {
        "snr": fidelity.snr,
        "size": lambda setup, name, _: fidelity.size(setup, name),
        "aggregation": lambda setup, *_: fidelity.aggregation(setup),
        "noise": lambda setup, name, _: robustness.noise(setup, name),
        "shape": lambda setup, _, what: shapes.shape(setup, what),
        "product": lambda setup, *_: shapes.product(setup),
        "entropy": lambda setup, name, _: shapes.entropy(setup, name),
        "trained": lambda setup, name, _: trained.trained(setup, name),
        "transfer": fits.transfer,
        "reading": fits.reading,
        "ablation": lambda setup, name, _: fits.ablation(setup, name),
        "geometry": lambda _, arch, __: fits.geometry(arch),
    }
)


def units(setup: Setup) -> list[Unit]:
    """All analyses of a setup; of another seed than the first those that are ``REPEATED``."""
    if setup.seed != SEEDS[0]:
        first = units(dataclasses.replace(setup, seed=SEEDS[0]))
        kept = [unit for unit in first if unit[0] in REPEATED and unit[2] == "update"]
        return [unit for unit in kept if unit[1] not in BRIEF]
    out: list[Unit] = []
    for what in OBJECTS:
        out += [
            ("snr", name, what) for name, coder in CODERS.items() if what == "update" or coder.every
        ]
    out += [("size", name, "update") for name, coder in CODERS.items() if coder.codec]
    out.append(("aggregation", "none", "update"))
    out += [("noise", name, "update") for name in robustness.CODERS]
    out += [("shape", "none", what) for what in OBJECTS]
    out.append(("product", "none", "update"))
    out += [("entropy", name, "update") for name in CODERS if name not in BRIEF]
    out += [("trained", name, "update") for name in trained.TRAININGS]
    for name in fits.CODERS:
        out += [("transfer", name, source) for source in setup.sources()]
        out += [("reading", name, how) for how in READINGS]
    out += [("ablation", name, "update") for name in fits.VARIANTS]
    out += [("geometry", arch, "update") for arch in RATIOS]
    return out if setup.model == EMBEDDED else [unit for unit in out if not _costly(unit)]


def named(unit: Unit) -> tuple[str, str]:
    """What ``--schemes`` may call it: by what is tried, or, with a slash, by the analysis."""
    kind, scheme, _ = unit
    return scheme, f"{kind}/"


def _costly(unit: Unit) -> bool:
    """Whether it is left out on a real LLaMA, where a step of anything takes a second of a core.

    It trains an autoencoder of another kind, a literal one for another object, or the model again.
    """
    kind, scheme, of = unit
    return kind == "trained" or scheme in BRIEF or (scheme == "ae-literal" and of != "update")


def job(setup: Setup, unit: Unit) -> Job:
    """One row."""
    kind, scheme, of = unit
    config = {"kind": kind, "of": of, **setup.config()}
    return Job(CASE, scheme, setup.seed, 0.0, 1, f"{__name__}:play_job", tuple(config.items()))


def play_job(job: Job) -> Iterator[rows.Row]:
    """The row of one analysis, with how long it took.

    Whoever needs a recording or a codec first makes it, and others may wait for it meanwhile: both
    are in ``seconds``.
    """
    config = dict(job.config)
    began = time.perf_counter()
    found = KINDS[config["kind"]](Setup.of(job), job.scheme, config["of"])
    seconds = round(time.perf_counter() - began, 1)
    yield {"round": 1, "diverged": False, **found, "seconds": seconds}


def main(options: Options) -> list[str]:
    """Run what is missing; then the page and its plots."""
    for place, given in zip(PLACES, (options.model, options.data), strict=True):
        if given is not None:
            os.environ[place] = str(given)
    known = [name for unit in units(Setup()) for name in named(unit)]
    check_names(options.schemes or (), dict.fromkeys(known))
    todo = []
    for seed in options.seeds or (SEEDS[:1] if options.quick else SEEDS):
        setup = Setup.asked(options, seed)
        chosen = units(setup)
        if options.schemes is not None:
            chosen = [unit for unit in chosen if {*named(unit)} & {*options.schemes}]
        elif options.quick:
            chosen = [unit for unit in chosen if unit[1] != SLOW]
        todo += [job(setup, unit) for unit in chosen]
    path = options.out / f"{CASE}{'-smollm2' if options.model else ''}.jsonl"
    failed = jobs.execute(todo, path, options.workers, again=options.again)
    print(page(path).write(path))
    return failed


def page(path: Path) -> report.Page:
    """The page of these rows."""
    return pages.page(path)
