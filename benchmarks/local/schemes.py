"""The ways of exchanging seldom, or little, that the benchmark puts side by side."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from benchmarks.ddp import schemes as ddp_schemes
from benchmarks.ddp.scheme import Scheme, chosen_codec
from benchmarks.ddp.trainers import HookTrainer, Trainer
from benchmarks.ddp.work import Recipe
from benchmarks.local.trainer import LocalStepsTrainer
from benchmarks.peers.ddp.checkout import DEMO
from benchmarks.peers.ddp.demo import Demo
from gradcodec import Codec, OuterSGD, TopK, TopKConfig

REFERENCE = "ddp"

Make = Callable[[nn.Module, Recipe, float | None], Trainer]
"""A rank's trainer of a model, a recipe and an outer rate."""

INNER = (3e-3, 6e-3)
"""Grid of inner rates, the same for all."""


@dataclass(frozen=True)
class LocalScheme(Scheme):
    """One way of exchanging seldom.

    Attributes:
        inner: grid of inner learning rates.
        outer: grid of outer learning rates; ``None`` alone where there is no outer step.
        like: the scheme whose tuned rates this one takes; itself by default.
        settle: first steps that are not like the others: none, since all bytes count.
    """

    inner: tuple[float, ...] = INNER
    outer: tuple[float | None, ...] = (None,)
    like: str | None = None
    settle: int = 0

    @property
    def grid(self) -> list[tuple[float, float | None]]:
        """Inner and outer rates to try, the first ones the defaults."""
        return [(inner, outer) for outer in self.outer for inner in self.inner]


@dataclass(frozen=True)
class Ready:
    """A scheme whose outer rate is settled: what a rank is given."""

    make: Callable[[nn.Module, Recipe], Trainer]
    settle: int = 0


def _plain(model: nn.Module, recipe: Recipe, outer: float | None) -> Trainer:
    return HookTrainer(model, recipe)


def _demo(model: nn.Module, recipe: Recipe, outer: float | None) -> Trainer:
    return Demo(model, recipe, lr=recipe.lr)


def local(codec: str | Callable[[], Codec], *, momentum: float, **options: Any) -> Make:
    """``gc.LocalSteps``; an outer rate comes when it is made."""

    def make(model: nn.Module, recipe: Recipe, outer: float | None) -> Trainer:
        sgd = OuterSGD(lr=1.0 if outer is None else outer, momentum=momentum)
        return LocalStepsTrainer(model, recipe, codec=chosen_codec(codec), outer=sgd, **options)

    return make


def _topk(k: int, bits: int, index: str) -> Callable[[], Codec]:
    return lambda: TopK(TopKConfig(k=k, bits=bits, index=index))


NESTEROV = (0.7, 0.4)
"""Outer rates with momentum: DiLoCo's and Streaming DiLoCo's."""
PLAIN = (1.0, 0.7)
"""Outer rates without momentum: SparseLoCo's, and a smaller one."""

_DILOCO = "DiLoCo, arXiv 2311.08105: AdamW inside, Nesterov outside"
_STREAMING = (
    "Streaming DiLoCo, arXiv 2501.18512: fragments, overlap, 4-bit outer gradients; here 15 "
    "integer levels for each 256 values instead of 4-bit floats, fragments of equal size"
)
_SPARSELOCO = (
    "SparseLoCo, arXiv 2508.15706: 64 of each 4096 values in 2 bits, gathered, error feedback "
    "decays by 0.95, no outer momentum"
)
_DEMO = "DeMo, arXiv 2411.19870, by its authors' file with its defaults, indices of 64 bits too"


def _diloco(every: int) -> Make:
    return local("fp32", momentum=0.9, every=every)


def _streaming(every: int) -> Make:
    options: dict[str, Any] = {"fragments": 4, "overlap": 2, "error_feedback": False}
    return local("int4", momentum=0.9, every=every, **options)


def _sparseloco(every: int) -> Make:
    codec = _topk(64, 2, "packed")
    return local(codec, momentum=0.0, every=every, decay=0.95, exchange="gather")


def _dense(codec: str, every: int, momentum: float = 0.0, **options: Any) -> Make:
    """Few bits for every value, norms among them; no fp32 for small tensors."""
    return local(codec, momentum=momentum, every=every, min_numel=1, **options)


_ALL = (
    LocalScheme(REFERENCE, "plain DDP, fp32", "reference", _plain, quick=True),
    LocalScheme(
        "diloco-32", "DiLoCo fp32, H 32", "peer", _diloco(32), outer=NESTEROV, cite=_DILOCO
    ),
    LocalScheme(
        "streaming-32",
        "Streaming DiLoCo, 4 bit, H 32",
        "peer",
        _streaming(32),
        outer=NESTEROV,
        cite=_STREAMING,
    ),
    LocalScheme(
        "sparseloco-16",
        "SparseLoCo, H 16",
        "peer",
        _sparseloco(16),
        outer=PLAIN,
        cite=_SPARSELOCO,
        quick=True,
    ),
    LocalScheme("demo", "DeMo", "peer", _demo, inner=(1e-3, 3e-3), cite=_DEMO, checkout=DEMO),
    LocalScheme(
        "sign-32",
        "LocalSteps, rotated signs, H 32",
        "ours",
        _dense("sign-rotated", 32),
        outer=PLAIN,
        quick=True,
    ),
    LocalScheme(
        "sign-64",
        "LocalSteps, rotated signs, H 64",
        "ours",
        _dense("sign-rotated", 64),
        outer=PLAIN,
        like="sign-32",
    ),
    LocalScheme(
        "int2-64",
        "LocalSteps, rotated 2 bit, H 64",
        "ours",
        _dense("int2-rotated", 64),
        outer=PLAIN,
        like="sign-32",
    ),
    LocalScheme(
        "sign-128",
        "LocalSteps, rotated signs, H 128",
        "ours",
        _dense("sign-rotated", 128),
        outer=PLAIN,
        like="sign-32",
    ),
    LocalScheme(
        "sign-32-momentum",
        "LocalSteps, rotated signs, H 32, Nesterov",
        "ours",
        _dense("sign-rotated", 32, momentum=0.9),
        outer=NESTEROV,
    ),
    LocalScheme(
        "sign-64-fragments",
        "LocalSteps, rotated signs, H 64, 4 fragments, overlap 2",
        "ours",
        _dense("sign-rotated", 64, fragments=4, overlap=2),
        outer=PLAIN,
        like="sign-32",
    ),
    LocalScheme(
        "topk-32",
        "LocalSteps, top 1.6 % in 1 bit, H 32",
        "ours",
        local(
            _topk(64, 1, "elias-fano"),
            momentum=0.0,
            every=32,
            decay=0.95,
            exchange="gather",
            min_numel=1,
        ),
        outer=PLAIN,
        like="sign-32",
    ),
    LocalScheme(
        "diloco-64",
        "DiLoCo fp32, H 64",
        "peer",
        _diloco(64),
        outer=NESTEROV,
        like="diloco-32",
        cite=_DILOCO,
    ),
    LocalScheme(
        "streaming-64",
        "Streaming DiLoCo, 4 bit, H 64",
        "peer",
        _streaming(64),
        outer=NESTEROV,
        like="streaming-32",
        cite=_STREAMING,
    ),
    LocalScheme(
        "sparseloco-32",
        "SparseLoCo, H 32",
        "peer",
        _sparseloco(32),
        outer=PLAIN,
        like="sparseloco-16",
        cite=_SPARSELOCO,
    ),
)

SCHEMES = {scheme.name: scheme for scheme in _ALL}


def spelt(name: str, outer: float | None) -> str:
    """A scheme with its outer rate, as ``scheme_named`` reads it."""
    return name if outer is None else f"{name}@{outer!r}"


def scheme_named(name: str) -> Any:
    """What a rank asks for: a scheme as ``spelt``, or the training without any exchange."""
    if name == ddp_schemes.LOCAL.name:
        return ddp_schemes.LOCAL
    plain, _, outer = name.partition("@")
    scheme = SCHEMES[plain]
    rate = float(outer) if outer else None
    return Ready(functools.partial(_make, scheme.make, rate), scheme.settle)


def _make(make: Make, outer: float | None, model: nn.Module, recipe: Recipe) -> Trainer:
    return make(model, recipe, outer)
