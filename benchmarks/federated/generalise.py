"""A fitted subspace used where it was not fitted: on other data, adapters and LoRA ranks.

    python -m benchmarks.run generalise

One codec size for all (``RATIO``, one bit), one world to use it in, and another source of the
updates that it is fitted on in each scheme: the clients' own D1, public text of another kind and of
the same kind, another seed of the adapter, shuffled answers, nothing at all. Then the same codec at
other LoRA ranks, each beside fp32 at that rank. Everything is played at one learning rate.

A codec of a smaller model is not among them: its bases have other sides, no column of theirs fits.
"""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from benchmarks import jobs, report, rows
from benchmarks.federated import case as federated
from benchmarks.federated import fitted, generalise_page
from benchmarks.federated.methods import Coded, Method
from benchmarks.federated.world import World, play, world_of
from benchmarks.jobs import Job
from benchmarks.peers.federated.random_subspace import random_bases
from benchmarks.run import ROOT, Options, check_names
from gradcodec.chain import Chain
from gradcodec.codec import Codec
from gradcodec.codecs import BlockQuant, Identity, RotatedSign
from gradcodec.errors import ConfigError
from gradcodec.federated import ServerConfig
from gradcodec.packers.blockquant import BlockQuantConfig
from gradcodec.recipes import corpus, data
from gradcodec.recipes.data import Example
from gradcodec.recipes.settings import Settings
from gradcodec.transforms.subspace.config import SubspaceConfig

CASE = "generalise"
SEEDS = (0, 1)
RATIO, LR = 17.46, 1.2e-2
RANKS = (2, 4, 16, 32)
QUICK = ("fp32", "own", "random")
TEXTS = ROOT / "runs" / "bench-texts"

Source = Callable[[Settings], Settings]
"""From the world that a codec is used in to the one that it is fitted in."""


def _text(name: str, make: Callable[[], Sequence[Example]]) -> Source:
    """Fitted on other examples, dealt to clients in the same way."""

    def source(settings: Settings) -> Settings:
        path = TEXTS / f"{name}.jsonl"
        if not path.exists():
            TEXTS.mkdir(parents=True, exist_ok=True)
            lines = [json.dumps({k: v for k, v in asdict(e).items() if v}) for e in make()]
            beside = path.with_suffix(".partial")
            beside.write_text("\n".join(lines) + "\n")
            beside.replace(path)
        return replace(settings, dataset=str(path))

    return source


def public_code(chunk: int = 160) -> list[Example]:
    """Public text of another kind: pieces of source code, the second half to be continued."""
    out = []
    for module, text in corpus.source_text():
        for at in range(0, min(len(text), 40 * chunk) - chunk, chunk):
            piece = text[at : at + chunk]
            out.append(Example(piece[: chunk // 2], piece[chunk // 2 :], module.partition(".")[0]))
    return _sampled(out)


def public_docstrings(packages: tuple[str, ...] = ("torch", "numpy")) -> list[Example]:
    """Public text of the same kind: docstrings of installed packages."""
    found: dict[str, Example] = {}
    for package in packages:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise ConfigError(f"expected {package} to be installed, it is not")
        for pair in corpus.docstring_pairs_in(Path(spec.origin).parent, package):
            # Two packages would be two kinds of clients; their parts are as many as the library's.
            part = ".".join(pair.prompt.partition("does ")[2].split(".")[:2])
            found.setdefault(pair.answer, Example(pair.prompt, pair.answer, part))
    return _sampled(list(found.values()))


def shuffled_answers() -> list[Example]:
    """The task's own questions, each with the answer to another one."""
    examples = data.load_examples("stdlib")
    order = np.random.default_rng(0).permutation(len(examples))
    return [replace(e, answer=examples[i].answer) for e, i in zip(examples, order, strict=True)]


def _sampled(examples: list[Example], most: int = 4000) -> list[Example]:
    chosen = np.random.default_rng(0).permutation(len(examples))[:most]
    return [examples[i] for i in sorted(chosen)]


#: Where a codec comes from; ``None`` means bases drawn from the seed.
SOURCES: dict[str, tuple[str, Source | None]] = {
    "own": ("the clients' D1", lambda s: s),
    "adapter-seed": (
        "D1 of another seed: adapter, clients",
        lambda s: replace(s, seed=s.seed + 50),
    ),
    "public-docstrings": (
        "docstrings of torch and numpy",
        _text("docstrings", public_docstrings),
    ),
    "public-code": ("source code, no questions", _text("code", public_code)),
    "shuffled": ("D1 with shuffled answers", _text("shuffled", shuffled_answers)),
    "random": ("random bases", None),
}


def _signal(world: World, fitted_in: World) -> Coded:
    config = SubspaceConfig(ratio=RATIO, allocation="tempered", side="long")
    name = f"signal-{RATIO:g}"
    transform, nbytes = fitted.kept(fitted_in, name, lambda: fitted.signal(fitted_in, config))
    return _coded(world, transform, nbytes)


def _coded(world: World, transform: Codec, nbytes: int = 0) -> Coded:
    """Rotated signs up, two bits down."""
    up, down = Chain(transform, RotatedSign()), Chain(transform, BlockQuant(BlockQuantConfig(2)))
    return Coded(world.initial, up, down, ServerConfig(mode="latent"), codec_bytes=nbytes)


def method(world: World, scheme: str) -> Method:
    """Both ends under a scheme's name: ``fp32``, a source, or ``fp32-rN``, ``own-rN``."""
    name = scheme.partition("-r")[0] if _rank(scheme) else scheme
    if name == "fp32":
        return Coded(world.initial, Identity())
    source = SOURCES[name][1]
    if source is None:
        return _coded(world, random_bases(world.initial, ratio=RATIO, seed=world.settings.seed))
    return _signal(world, world_of(source(world.settings)))


def _rank(scheme: str) -> int | None:
    tail = scheme.rpartition("-r")[2]
    return int(tail) if tail.isdigit() else None


@functools.cache
def schemes() -> tuple[str, ...]:
    """All of them, ``fp32`` first."""
    ranks = [f"{name}-r{r}" for r in RANKS for name in ("fp32", "own")]
    return ("fp32", *SOURCES, *ranks)


def play_job(job: Job) -> Iterator[rows.Row]:
    """The rows of one run."""
    settings = federated.settings(job.seed, job.rounds)
    rank = _rank(job.scheme)
    if rank is not None:  # alpha in proportion: the adapter's scale stays what it is
        alpha = settings.lora_alpha * rank / settings.lora_r
        settings = replace(settings, lora_r=rank, lora_alpha=alpha)
    world = world_of(settings)
    yield from play(world, method(world, job.scheme), lr=job.lr, rounds=job.rounds)


def main(options: Options) -> list[str]:
    """Run what is missing, then the table and the plot."""
    own = QUICK if options.quick else schemes()
    chosen = own if options.schemes is None else ("fp32", *options.schemes)
    check_names(chosen, schemes())
    rounds = options.rounds or federated.ROUNDS
    source = f"{__name__}:play_job"
    config = (("ratio", RATIO), ("bits", 1))
    todo = [
        Job(CASE, scheme, seed, LR, rounds, source, config)
        for seed in options.seeds or (SEEDS[:1] if options.quick else SEEDS)
        for scheme in dict.fromkeys(chosen)
    ]
    path = options.out / f"{CASE}.jsonl"
    failed = jobs.execute(todo, path, options.workers, again=options.again)
    print(page(path).write(path))
    return failed


def page(path: Path) -> report.Page:
    """The page of this case's rows."""
    return generalise_page.page(path, {name: title for name, (title, _) in SOURCES.items()})
