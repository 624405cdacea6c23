"""The benchmarks by name: ``python -m benchmarks.run CASE [CASE ...]``; rows, tables and plots."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from gradcodec.errors import ConfigError, GradcodecError
from gradcodec.names import wrong_name

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Options:
    """What a case is asked for.

    Attributes:
        out: folder of its rows, tables and plots.
        quick: the short form, minutes instead of hours.
        seeds, schemes: only these; ``None`` means the case's own.
        rounds: fewer or more than the case's own.
        workers: processes.
        again: run what is finished once more.
        model, data: where ``llama`` finds its model and its data, the Hub by default. Without
            them ``paper`` runs on the embedded model.
    """

    out: Path
    quick: bool = False
    seeds: tuple[int, ...] | None = None
    schemes: tuple[str, ...] | None = None
    rounds: int | None = None
    workers: int = 2
    again: bool = False
    model: Path | None = None
    data: Path | None = None


class Choosable(Protocol):
    """What a case compares: it has a name and may be part of the short form."""

    @property
    def name(self) -> str:
        """In rows and on the command line."""

    @property
    def quick(self) -> bool:
        """Part of the short form."""


S = TypeVar("S", bound=Choosable)


def check_names(names: Iterable[str], known: Iterable[str]) -> None:
    """Refuse what a case does not have.

    Raises:
        ConfigError: a name is unknown.
    """
    unknown = [name for name in names if name not in set(known)]
    if unknown:
        raise ConfigError(wrong_name("a name", unknown[0], known))


def choose(schemes: Mapping[str, S], options: Options, reference: str) -> list[S]:
    """The schemes that were asked for, in order; the reference is always among them.

    All by default, or those of the short form if ``options.quick``.

    Raises:
        ConfigError: a name is unknown.
    """
    if options.schemes is None:
        return [s for s in schemes.values() if s.quick or not options.quick]
    check_names(options.schemes, schemes)
    return [s for s in schemes.values() if s.name in (reference, *options.schemes)]


@dataclass(frozen=True)
class Case:
    """A benchmark. Functions are ``"module:function"``, imported when they are called.

    Attributes:
        name: on the command line and of the rows' file.
        help: a line.
        function: takes ``Options``, measures, and returns what failed, as lines of text.
        page: takes the rows' path and returns their ``report.Page``; ``None`` where there is none.
        stems: names of the rows' files that have a page, if not the case's own name alone.
        tests: files and folders of tests that have to be green, in the same command, before the
            case measures anything: no speed is reported of code that may be wrong.
        tunes: whether it only chooses settings for another case. ``all`` leaves it out: what was
            chosen is committed.
    """

    name: str
    help: str
    function: str
    page: str | None = None
    stems: tuple[str, ...] = ()
    tests: tuple[str, ...] = ()
    tunes: bool = False

    def load(self) -> Callable[[Options], list[str]]:
        """Import the function that measures."""
        function: Callable[[Options], list[str]] = _imported(self.function)
        return function

    def load_page(self) -> Callable[[Path], Any]:
        """Import the function that makes the page.

        Raises:
            ConfigError: the case has no page.
        """
        if self.page is None:
            raise ConfigError(f"the case {self.name!r} has rows and no page")
        function: Callable[[Path], Any] = _imported(self.page)
        return function

    def pages(self) -> tuple[str, ...]:
        """Names of the rows' files that have a page."""
        return () if self.page is None else self.stems or (self.name,)


def red(case: Case) -> str | None:
    """Run a case's tests; what to say if they are not green.

    Raises:
        ConfigError: pytest is not installed.
    """
    if not case.tests:
        return None
    if importlib.util.find_spec("pytest") is None:
        raise ConfigError(f"{case.name!r} runs its tests first: pip install 'gradcodec[dev]'")
    options = ["-q", "-x", "--tb=short", "-p", "no:cacheprovider", "-m", "not slow and not gpu"]
    print(f"{case.name}: its tests first: {' '.join(case.tests)}", flush=True)
    done = subprocess.run([sys.executable, "-m", "pytest", *options, *case.tests], cwd=ROOT)
    if done.returncode == 0:
        return None
    return f"{case.name}: its tests are not green, nothing was measured"


def _imported(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


_CODING = ("tests/codecs", "tests/test_golden.py", "tests/test_ops.py", "tests/native")
_EXCHANGE = ("tests/distributed/test_hook.py", "tests/distributed/test_collectives.py")

_ALL = (
    Case(
        "federated",
        "every scheme on the embedded model: loss, bytes, bytes to a given quality",
        "benchmarks.federated.case:main",
        "benchmarks.federated.case:page",
    ),
    Case(
        "llama",
        "the same on a real pretrained LLaMA: SmolLM2-135M on GSM8K and MMLU",
        "benchmarks.llama.case:main",
        "benchmarks.llama.case:page",
        stems=("llama-gsm8k", "llama-gsm8k-all", "llama-gsm8k-cpu", "llama-mmlu", "llama-mmlu-cpu"),
    ),
    Case(
        "generalise",
        "codecs fitted on other data, other adapters, nothing; other LoRA ranks",
        "benchmarks.federated.generalise:main",
        "benchmarks.federated.generalise:page",
    ),
    Case(
        "tune",
        "learning rate of every scheme of `federated`, on a seed that is never reported",
        "benchmarks.federated.tune:main",
        tunes=True,
    ),
    Case(
        "speed",
        "seconds, bytes and memory of coding a 7B adapter; what TGAP's collection costs",
        "benchmarks.codecs.adapter:main",
        "benchmarks.codecs.adapter:page",
        tests=_CODING,
    ),
    Case(
        "codecs",
        "error, bits and speed of every fixed-rate codec and its peers, on recorded gradients",
        "benchmarks.codecs.case:main",
        "benchmarks.codecs.page:page",
        tests=_CODING,
    ),
    Case(
        "growth",
        "time and memory from 1e5 to 1e9 values, 1 to 10,000 clients; ranks, by a model",
        "benchmarks.growth.case:main",
        "benchmarks.growth.case:page",
        tests=(*_CODING, "tests/federated/test_exact.py"),
    ),
    Case(
        "kernels",
        "Triton kernels: GB/s against copy on a GPU, else what their binaries cost",
        "benchmarks.kernels.case:main",
        "benchmarks.kernels.case:page",
    ),
    Case(
        "ddp",
        "data-parallel training over shaped links: loss against steps, seconds and bytes",
        "benchmarks.ddp.case:main",
        "benchmarks.ddp.page:page",
        tests=_EXCHANGE,
    ),
    Case(
        "ddp_auto",
        "codec='auto' beside each codec that it may choose, on links of four rates",
        "benchmarks.ddp.turns:auto",
        "benchmarks.ddp.turns:auto_page",
        tests=_EXCHANGE,
    ),
    Case(
        "ddp_buckets",
        "buckets of 4 MB in turns with those of 25 MB, compressed and not",
        "benchmarks.ddp.turns:buckets",
        "benchmarks.ddp.turns:buckets_page",
        tests=_EXCHANGE,
    ),
    Case(
        "fsdp2",
        "fully_shard with compressed reduce-scatters in turns with torch's own",
        "benchmarks.ddp.turns:sharded",
        "benchmarks.ddp.turns:sharded_page",
        tests=("tests/distributed/test_fsdp2.py",),
    ),
    Case(
        "local-tune",
        "rates of every scheme of `local`, on a seed that is never reported",
        "benchmarks.local.case:tune",
        tunes=True,
    ),
    Case(
        "local",
        "pretraining that exchanges seldom: DiLoCo, SparseLoCo, DeMo and `LocalSteps`; loss, bytes",
        "benchmarks.local.case:main",
        "benchmarks.local.page:page",
        tests=("tests/distributed/test_local_steps.py", "tests/distributed/test_collectives.py"),
    ),
    Case(
        "link_swap",
        "two ranks swapping bytes over shaped links: gloo's all-to-all and ours",
        "benchmarks.links.swap:main",
        tests=("tests/distributed/test_collectives.py",),
    ),
    Case(
        "flower",
        "a federation deployed in Flower on this machine: TCP bytes, losses, seconds",
        "benchmarks.flower.case:main",
        "benchmarks.flower.case:page",
        tests=("tests/integrations/test_flower.py",),
    ),
    Case(
        "privacy",
        "loss against epsilon: noise on whole updates, signs, an autoencoder's and small codes",
        "benchmarks.privacy.case:main",
        "benchmarks.privacy.case:page",
    ),
    Case(
        "leakage",
        "which words of a client's sentence an attacker reads out of what the client sent",
        "benchmarks.privacy.leakage:main",
        "benchmarks.privacy.leakage:page",
    ),
    Case(
        "paper",
        "everything that CG-FedLLM analyses, beside controls and honest metrics",
        "benchmarks.paper.case:main",
        "benchmarks.paper.case:page",
        stems=("paper", "paper-smollm2"),
    ),
    Case(
        "nvflare",
        "NVFLARE's simulator with our filters and with its own quantisers: bytes and losses",
        "benchmarks.nvflare.case:main",
        "benchmarks.nvflare.page:page",
    ),
)

CASES = {case.name: case for case in _ALL}
EVERY = "all"
"""What stands for every case that needs nothing but this checkout."""


def chosen(names: Sequence[str], model: Path | None) -> list[Case]:
    """The cases of a command line; says which of ``all`` are left out, and why."""
    if EVERY not in names:
        return [CASES[name] for name in names]
    out = []
    for case in _ALL:
        why = "it only chooses settings, and they are committed" if case.tunes else ""
        if case.name == "llama" and model is None:
            why = "it needs a model and questions (--model, --data)"
        if why and case.name not in names:
            print(f"{case.name} is left out: {why}", flush=True)
        else:
            out.append(case)
    return out


def attempt(case: Case, options: Options) -> list[str]:
    """Run a case; what failed, as text. What it cannot run at all is no reason to leave others."""
    bad = red(case)
    if bad:
        return [bad]
    began = time.monotonic()
    try:
        return case.load()(options)
    except (GradcodecError, ImportError) as err:
        return [f"{case.name}: {err}"]
    finally:
        print(f"{case.name}: {time.monotonic() - began:.0f} s", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the named cases; 1 if anything of them failed."""
    cases = "\n".join(f"  {case.name:12} {case.help}" for case in _ALL)
    cases += f"\n  {EVERY:12} every case but those that tune, and `llama` without --model"
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description=f"{__doc__}\n\ncases:\n{cases}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("cases", nargs="+", choices=[*CASES, EVERY], metavar="CASE")
    parser.add_argument("--quick", action="store_true", help="one seed, few schemes, minutes")
    parser.add_argument("--seeds", type=_integers, help="such as 0,1,2")
    parser.add_argument("--schemes", type=_names, help="such as fp32,topk")
    parser.add_argument("--rounds", type=int, help="for trials; other rounds are other runs")
    parser.add_argument("--workers", type=int, default=2, help="processes, a thread each (2)")
    parser.add_argument("--model", type=Path, help="llama, paper: a folder or a GGUF file")
    parser.add_argument("--data", type=Path, help="llama, paper: folder of *.jsonl files")
    parser.add_argument("--again", action="store_true", help="also run what is finished")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder of rows, tables, plots (benchmarks/results; runs/bench-quick when quick)",
    )
    args = parser.parse_args(argv)
    if args.workers < 1 or (args.rounds is not None and args.rounds < 1):
        parser.error("expected --workers and --rounds of at least 1")
    default = ROOT / "runs" / "bench-quick" if args.quick else RESULTS
    options = Options(
        out=args.out or default,
        quick=args.quick,
        seeds=args.seeds,
        schemes=args.schemes,
        rounds=args.rounds,
        workers=args.workers,
        again=args.again,
        model=args.model,
        data=args.data,
    )
    failed = [text for case in chosen(args.cases, args.model) for text in attempt(case, options)]
    if failed:
        print("failed:\n  " + "\n  ".join(failed), file=sys.stderr)
    return 1 if failed else 0


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


if __name__ == "__main__":
    sys.exit(main())
