"""The command line of ``gradcodec eval``: a base model and its adapters, side by side."""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from gradcodec import files
from gradcodec.errors import ConfigError
from gradcodec.recipes import data, eval_table, models
from gradcodec.recipes.adapters import adapted
from gradcodec.recipes.eval_scores import Answer, chosen, score
from gradcodec.recipes.eval_tasks import Source, load_tasks, require_lm_eval
from gradcodec.recipes.results import run_versions
from gradcodec.recipes.run_folder import ADAPTERS, CONFIG

SCHEMA = 1
_BATCH = {"cpu": 1, "cuda": 16}
_DTYPES = ("float32", "bfloat16", "float16")


def add_eval_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``gradcodec eval``."""
    add = parser.add_argument
    add("--run", metavar="FOLDER", help="of run-federated: its base model and all its adapters")
    add("--schemes", help="with --run: comma-separated, only these schemes' adapters")
    add("--model", help="Hub id, folder or GGUF file of the base model (default: the run's)")
    add("--revision", help="of the model on the Hub")
    add("--adapter", nargs="+", default=[], metavar="PLACE", help="folders or Hub ids of adapters")
    add(
        "--tasks",
        required=True,
        help="comma-separated names of lm-eval's tasks, such as mmlu,ceval-valid,gsm8k",
    )
    add(
        "--dataset",
        nargs="+",
        metavar="FILE",
        help=".jsonl files of questions, one for each task, instead of what lm-eval downloads",
    )
    add(
        "--fewshot",
        nargs="+",
        metavar="FILE",
        help=".jsonl files of the examples that stand before a question, one for each task",
    )
    add(
        "--shots",
        type=int,
        help="examples before a question (default: 5 with --fewshot, else the task's own number)",
    )
    add("--limit", type=int, help="the first questions of each task, of MMLU's of each subject")
    add("--dtype", choices=_DTYPES, help="of the weights (default: the run's, or float32)")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--batch", type=int, help="prompts per forward pass (default: 1 on a CPU, 16 on a GPU)")
    add("--out", metavar="FILE.json", help="figures and a row for each question; FILE.md: tables")


def run_eval(options: argparse.Namespace) -> int:
    """Score the base model and each adapter on the same questions; print the tables."""
    out = None if options.out is None else _out(options.out)
    sources = _sources(options)
    require_lm_eval()
    versions = {**run_versions(), "lm_eval": version("lm_eval")}  # now: the commit may move
    base, places, trained_on = _contenders(options)
    device = models.resolve_device(options.device)
    tasks = load_tasks(sources, options.shots)
    questions, skipped = chosen(tasks, options.limit, trained_on)
    model, tokenizer = models.load_base(
        base["model"],
        dtype=getattr(torch, base["dtype"]),
        device=device,
        revision=base["revision"],
    )
    for fits in filter(None, places.values()):
        with adapted(model, fits):
            pass  # does it fit? Now, not after hours with the base model
    batch = _BATCH[device.type] if options.batch is None else options.batch
    shots = {t.asked: int(t.task.get_config("num_fewshot")) for t in tasks.values()}
    settings = {
        **base,
        "adapters": places,
        "sources": [dataclasses.asdict(s) for s in sources],
        "shots": shots,
        "limit": options.limit,
        "batch": batch,
        "left_out": skipped,
    }
    answers: dict[str, list[Answer]] = {}
    seconds: dict[str, float] = {}
    page = ""
    for name, place in places.items():
        began = time.perf_counter()
        with nullcontext(model) if place is None else adapted(model, place) as contender:
            answers[name] = score(contender, tokenizer, tasks, questions, batch)
        seconds[name] = time.perf_counter() - began
        page = _page(base, sources, answers, shots, skipped)
        if out is not None:  # after each model, so that a kill loses at most one
            _write(out, settings, versions, answers, seconds)
            files.write_text(out.with_suffix(".md"), page)
    print("\n" + page)
    asked = sum(map(len, questions.values()))
    for name, took in seconds.items():
        print(f"{name}: {took:.1f} s, {took / asked:.2f} s a question")
    if out is not None:
        print("files:", out, out.with_suffix(".md"))
    return 0


def _out(name: str) -> Path:
    """The path of ``--out``; only what an earlier call wrote is written anew, FILE.md likewise."""
    path = Path(name)
    if path.suffix != ".json" or path.is_dir():
        raise ConfigError(f"expected a file name that ends in .json (--out), got {name!r}")
    there = [str(file) for file in (path, path.with_suffix(".md")) if file.exists()]
    if there and not _is_written(path):
        raise ConfigError(
            f"expected a new file or one of an earlier `gradcodec eval` (--out), got {name!r}: "
            f"{' and '.join(there)} would be lost"
        )
    return path


def _is_written(path: Path) -> bool:
    """Whether ``_write`` wrote this file."""
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(document, dict) and {"schema", "settings", "figures"} <= document.keys()


def _sources(options: argparse.Namespace) -> list[Source]:
    """Tasks with their files, in the order in which both were given."""
    tasks = [name.strip() for name in options.tasks.split(",") if name.strip()]
    if not tasks:
        raise ConfigError(f"expected comma-separated names (--tasks), got {options.tasks!r}")
    again = {name for name in tasks if tasks.count(name) > 1}
    if again:
        raise ConfigError(f"expected each task once (--tasks), got {', '.join(again)} twice")
    if options.shots is not None and options.shots < 0:
        raise ConfigError(f"expected --shots of at least 0, got {options.shots}")
    for flag in ("dataset", "fewshot"):
        given = getattr(options, flag)
        if given is not None and len(given) != len(tasks):
            raise ConfigError(
                f"expected a file for each of the {len(tasks)} tasks (--{flag}), got {len(given)}"
            )
    nothing: Sequence[str | None] = [None] * len(tasks)
    return [
        Source(*row)
        for row in zip(tasks, options.dataset or nothing, options.fewshot or nothing, strict=True)
    ]


def _contenders(
    options: argparse.Namespace,
) -> tuple[dict[str, Any], dict[str, str | None], Callable[[Mapping[str, Any]], bool]]:
    """The base model, adapters by name, and which rows they were trained on."""
    base = {"model": options.model, "revision": options.revision, "dtype": options.dtype}
    places: dict[str, str | None] = {"base": None}
    trained: set[str] = set()
    if options.run is not None:
        run = Path(options.run)
        config = _config_of(run)
        base = {key: given if given is not None else config[key] for key, given in base.items()}
        places |= _adapters_of(run, options.schemes)
        trained = _trained_on(config)
    elif options.schemes is not None:
        raise ConfigError(f"--schemes {options.schemes} chooses among the schemes of a --run")
    if base["model"] is None:
        raise ConfigError("expected a model (--model) or the folder of a run (--run), got neither")
    base["dtype"] = base["dtype"] or "float32"
    for place in options.adapter:
        name = Path(place).name
        places[name if name not in places else place] = place
    return base, places, lambda row: _prompt(row) in trained


def _config_of(run: Path) -> dict[str, Any]:
    if not (run / CONFIG).is_file():
        raise ConfigError(f"expected the folder of a run (--run), got {run}: no {CONFIG} in it")
    config = files.load_json(run / CONFIG, "give the base model and adapters by name instead")
    needed = ("model", "revision", "dtype", "dataset", "limit", "held_out", "seed")
    missing = [key for key in needed if key not in config]
    if missing:
        raise ConfigError(f"{run / CONFIG} is not of this version: no {missing[0]} in it")
    return config


def _adapters_of(run: Path, schemes: str | None) -> dict[str, str | None]:
    """The folders of a run's adapters by scheme, in the order in which they were made."""
    found = [p for p in (run / ADAPTERS).glob("*") if (run / "schemes" / f"{p.name}.json").exists()]
    there = {p.name: str(p) for p in sorted(found, key=lambda p: p.stat().st_mtime_ns)}
    if not there:
        raise ConfigError(
            f"expected a run with a finished scheme, got {run}: no adapter in {run / ADAPTERS}"
        )
    if schemes is None:
        return dict(there)
    wanted = [name.strip() for name in schemes.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in there]
    if unknown or not wanted:
        raise ConfigError(f"{run} has no adapter of {schemes!r}; it has {', '.join(there)}")
    return {name: there[name] for name in wanted}


def _trained_on(config: Mapping[str, Any]) -> set[str]:
    """The prompts that a run's clients had: they must not be asked."""
    try:
        examples = data.load_examples(config["dataset"], limit=config["limit"])
    except ConfigError as error:
        raise ConfigError(
            f"cannot tell on which questions the run was trained, to leave them out: {error}"
        ) from error
    kept, _ = data.held_out(examples, config["held_out"], config["seed"])
    return {example.prompt for example in kept}


def _prompt(row: Mapping[str, Any]) -> str | None:
    try:
        return data.example_of(row, "row").prompt
    except ConfigError:  # columns of another task, on which no run is trained
        return None


def _page(
    base: Mapping[str, Any],
    sources: Sequence[Source],
    answers: Mapping[str, Sequence[Answer]],
    shots: Mapping[str, int],
    skipped: int,
) -> str:
    """The tables, and above them what was asked."""
    # A question has an answer for each metric, but one prompt.
    first = next(iter(answers.values()))
    prompts = {(a.task, a.subtask, a.question) for a in first if a.cut}
    cut = Counter(task for task, _, _ in prompts)
    files_of = [Path(s.dataset).name if s.dataset else s.task for s in sources]
    top = f"{Path(base['model']).name} on {', '.join(files_of)}"
    if skipped:
        top += f"; {skipped:,} questions that the run was trained on are left out"
    return f"{top}\n\n{eval_table.markdown(answers, shots, cut)}"


def _write(
    out: Path,
    settings: Mapping[str, Any],
    versions: Mapping[str, str | None],
    answers: Mapping[str, Sequence[Answer]],
    seconds: Mapping[str, float],
) -> None:
    document = {
        "schema": SCHEMA,
        "settings": settings,
        "versions": versions,
        "seconds": seconds,
        "figures": eval_table.figures(answers),
        "differences": eval_table.differences(answers),
        "rows": [
            {"model": name, **dataclasses.asdict(answer)}
            for name, own in answers.items()
            for answer in own
        ],
    }
    files.write_text(out, json.dumps(document, indent=1) + "\n")
