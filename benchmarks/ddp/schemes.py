"""The ways of exchanging gradients that the DDP benchmark puts side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from benchmarks.ddp.scheme import Scheme, chosen_codec
from benchmarks.ddp.trainers import (
    HookTrainer,
    LocalTrainer,
    ShardedTrainer,
    Trainer,
    library_times,
)
from benchmarks.ddp.work import Recipe, Work
from benchmarks.peers.ddp.checkout import DEMO, EPFML, GRACE
from benchmarks.peers.ddp.demo import Demo
from benchmarks.peers.ddp.epfml import EpfmlPowerSGD
from benchmarks.peers.ddp.grace import Grace
from benchmarks.peers.ddp.stock import fp16, power_sgd

Make = Callable[[nn.Module, Recipe], Trainer]

REFERENCE = "ddp"
KINDS = ("reference", "ours", "peer")

WARM = 10
"""Steps that PowerSGD, either one's, leaves uncompressed; their defaults are longer than these
trainings. ``lowrank-warm`` leaves as many."""


@dataclass(frozen=True)
class GradientScheme(Scheme):
    """One way of exchanging gradients.

    Attributes:
        rates: by work, the peak learning rate of a scheme that is an optimiser of its own.
        settle: first steps that are not like the others, left out of a step's median time.
        alike: walks the same path on every link, so that one link's losses are all links'.
        few: also run with 4 ranks.
        once: run on the LLaMA with 2 ranks only.
        plotted: has a line in the plots; tables have everything.
    """

    rates: dict[str, float] = field(default_factory=dict)
    settle: int = 3
    alike: bool = True
    few: bool = False
    once: bool = False
    plotted: bool = True

    def rate(self, work: Work) -> float:
        """The peak learning rate: the work's, unless the scheme has its own."""
        return self.rates.get(work.name, work.recipe.lr)


def ours(
    codec: str | Callable[[], Any], ddp: Mapping[str, Any] | None = None, **options: Any
) -> Make:
    """This project's hook.

    Args:
        codec: what ``CompressState`` takes, or a function that makes it in the rank's process.
        ddp: further arguments of DDP.
        options: further arguments of ``CompressState``.
    """

    def make(model: nn.Module, recipe: Recipe) -> Trainer:
        from gradcodec.distributed import CompressState, compress_hook

        state = CompressState(model, codec=chosen_codec(codec), **options)

        def notes() -> dict[str, Any]:
            stats = state.stats()
            return {name: stats[name] for name in ("auto", "wire_bytes", "residual_bytes")}

        return HookTrainer(
            model,
            recipe,
            lambda ddp: ddp.register_comm_hook(state, compress_hook),
            report=partial(library_times, state),
            notes=notes,
            close=state.close,
            ddp=ddp,
        )

    return make


def _low_rank(**settings: Any) -> Make:
    def codec() -> Any:
        from gradcodec.distributed import LowRank

        return LowRank(**settings)

    return ours(codec)


def _plain(model: nn.Module, recipe: Recipe) -> Trainer:
    return HookTrainer(model, recipe)


def _epfml(rank: int) -> Make:
    return lambda model, recipe: EpfmlPowerSGD(model, recipe, rank=rank, start=WARM)


def _torch_power_sgd(rank: int) -> Make:
    return lambda model, recipe: power_sgd(model, recipe, rank=rank, start=WARM)


def _grace(**params: Any) -> Make:
    return lambda model, recipe: Grace(model, recipe, params)


def _demo(model: nn.Module, recipe: Recipe) -> Trainer:
    return Demo(model, recipe, lr=recipe.lr)


_POWER_SGD = "PowerSGD, arXiv 1905.13727"
_GRACE = "GRACE, ICDCS 2021"

_ALL = (
    GradientScheme(REFERENCE, "plain DDP", "reference", _plain, few=True, quick=True),
    GradientScheme("identity", "identity hook", "ours", ours("fp32"), once=True, plotted=False),
    GradientScheme("int8", "int8", "ours", ours("int8"), once=True, plotted=False),
    GradientScheme("int4", "int4", "ours", ours("int4"), few=True, quick=True),
    GradientScheme("int4-rot", "int4, rotated", "ours", ours("int4-rotated"), plotted=False),
    GradientScheme("int2", "int2", "ours", ours("int2"), once=True, plotted=False),
    GradientScheme("int2-rot", "int2, rotated", "ours", ours("int2-rotated"), quick=True),
    GradientScheme("sign", "sign", "ours", ours("sign"), plotted=False),
    GradientScheme("sign-rot", "sign, rotated", "ours", ours("sign-rotated"), few=True, quick=True),
    GradientScheme("topk", "top-k 1/64", "ours", ours("topk")),
    GradientScheme("lowrank", "adaptive low rank 4", "ours", ours("lowrank"), few=True, quick=True),
    GradientScheme(
        "lowrank-warm",
        "adaptive low rank 4 after exact steps",
        "ours",
        ours("lowrank", start_step=WARM),
        settle=WARM + 3,
        once=True,
        plotted=False,
    ),
    GradientScheme(
        "lowrank-12",
        "adaptive low rank 12, int4",
        "ours",
        _low_rank(rank=12, code="int4"),
    ),
    GradientScheme(
        "lowrank-16",
        "adaptive low rank 16, int8",
        "ours",
        _low_rank(rank=16, code="int8"),
        once=True,
        plotted=False,
    ),
    GradientScheme("auto", "auto", "ours", ours("auto"), alike=False, few=True, settle=10),
    GradientScheme(
        "auto-wide",
        "auto, quality 0.4",
        "ours",
        ours("auto", quality=0.4),
        alike=False,
        once=True,
        settle=20,
        plotted=False,
    ),
    GradientScheme("fp16", "torch's fp16 hook", "peer", fp16, "torch.distributed", quick=True),
    GradientScheme(
        "powersgd-torch",
        "torch's PowerSGD, rank 4",
        "peer",
        _torch_power_sgd(4),
        f"{_POWER_SGD}, by torch's code",
        settle=WARM + 3,
    ),
    GradientScheme(
        "powersgd",
        "epfml's PowerSGD, rank 4",
        "peer",
        _epfml(4),
        f"{_POWER_SGD}, by its authors' code",
        EPFML,
        settle=WARM + 3,
        few=True,
        quick=True,
    ),
    GradientScheme(
        "powersgd-16",
        "epfml's PowerSGD, rank 16",
        "peer",
        _epfml(16),
        f"{_POWER_SGD}, by its authors' code",
        EPFML,
        settle=WARM + 3,
        once=True,
    ),
    GradientScheme(
        "demo",
        "DeMo",
        "peer",
        _demo,
        "DeMo, arXiv 2411.19870, by its authors' code",
        DEMO,
        rates={"llama": 1e-3, "vision": 3e-3},
        quick=True,
    ),
    GradientScheme(
        "grace-topk",
        "GRACE top-k 1 %",
        "peer",
        _grace(compressor="topk", compress_ratio=0.01, memory="residual", communicator="allgather"),
        f"{_GRACE}, by its authors' code",
        GRACE,
        quick=True,
    ),
    GradientScheme(
        "grace-qsgd",
        "GRACE QSGD, 8 bit",
        "peer",
        _grace(compressor="qsgd", quantum_num=127, memory="none", communicator="allgather"),
        f"QSGD, arXiv 1610.02132; {_GRACE}, by its authors' code",
        GRACE,
        plotted=False,
    ),
)

SCHEMES = {scheme.name: scheme for scheme in _ALL}

LOCAL = GradientScheme("local", "no exchange", "reference", LocalTrainer)
"""Not a way of exchanging anything: what a step takes without."""


def _sharded(codec: str | None = None, *, waits: bool = False) -> Make:
    return lambda model, recipe: ShardedTrainer(model, recipe, codec, waits=waits)


_SHARDED = (
    GradientScheme("fsdp2", "fully_shard", "reference", _sharded()),
    GradientScheme("fsdp2-int4", "int4", "ours", _sharded("int4")),
    GradientScheme("fsdp2-int4-waits", "int4, waited for", "ours", _sharded("int4", waits=True)),
    GradientScheme("fsdp2-int2", "int2", "ours", _sharded("int2")),
)
"""Of the case ``fsdp2``, in turns; not in DDP's tables."""

_SMALL = {"bucket_cap_mb": 4}


def _plain_small(model: nn.Module, recipe: Recipe) -> Trainer:
    return HookTrainer(model, recipe, ddp=_SMALL)


_SMALL_BUCKETS = (
    GradientScheme("ddp-4mb", "plain DDP, buckets of 4 MB", "reference", _plain_small),
    GradientScheme("int4-4mb", "int4, 4 MB", "ours", ours("int4", _SMALL)),
    GradientScheme("sign-rot-4mb", "sign, rotated, 4 MB", "ours", ours("sign-rotated", _SMALL)),
)
"""Of the case ``ddp_buckets``, in turns with those of DDP's own 25 MB."""

_NAMED = {s.name: s for s in (LOCAL, *_ALL, *_SHARDED, *_SMALL_BUCKETS)}


def scheme_named(name: str) -> GradientScheme:
    """A scheme of any table, or ``LOCAL``."""
    return _NAMED[name]
