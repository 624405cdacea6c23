"""What the ``llama`` benchmark compares, in the order of importance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from benchmarks.federated import case as federated
from benchmarks.federated import fitted
from benchmarks.federated.case import auto, paper, signal, untrained
from benchmarks.federated.methods import Coded, Method
from benchmarks.federated.scheme import Make, Scheme
from benchmarks.federated.world import World
from benchmarks.llama.stages import Plan, Planned, PlannedServer
from gradcodec.codec import Codec
from gradcodec.codecs import RotatedSign, Subspace
from gradcodec.packers.rotsign import RotatedSignConfig
from gradcodec.registry import make_codec
from gradcodec.transforms.subspace.config import SubspaceConfig

GRID = (2e-3, 4e-3, 8e-3)


@dataclass(frozen=True)
class LlamaScheme(Scheme):
    """A scheme whose learning rate is that of its family.

    Attributes:
        family: name of the scheme that is tuned for all of them.
    """

    family: str = ""
    grid: tuple[float, ...] = GRID


def rotsign(kept: int, downlink: str = "int4") -> Make:
    """Signs of ``kept`` of 256 rotated values; nothing is fitted."""

    def make(world: World) -> Method:
        return Coded(world.initial, _codec(f"rotsign-{kept}"), _codec(downlink))

    return make


def _rotsign(kept: int, bits: str, downlink: str = "int4", quick: bool = False) -> LlamaScheme:
    suffix = "" if downlink == "int4" else f"-{downlink}"
    return LlamaScheme(
        f"rotsign-{kept}{suffix}",
        f"rotated signs, {bits}; {downlink} down",
        "ours",
        rotsign(kept, downlink),
        quick=quick,
        family="rotsign-64",
    )


SHARED = {"share": "kind", "basis_dtype": "int4"}
"""One basis for one kind of factor in all layers, four bits a number: tens of kB."""


def _subspace(ratio: float, quick: bool = False, **storage: str) -> LlamaScheme:
    title = f"subspace 1/{ratio:g}, 1 bit" + (", shared int4 bases" if storage else "")
    name = f"signal-{ratio:g}" + ("-shared" if storage else "")
    make = signal(ratio, 1, **storage)
    return LlamaScheme(name, title, "ours", make, quick=quick, family="signal-64")


def planned(
    plan: Plan, kept: int, downlink: str = "int2", ratio: float = 64, lr: float = 1.0
) -> Make:
    """Stages by plan; see ``benchmarks.llama.stages``."""
    subspace = SubspaceConfig(ratio=ratio, allocation="tempered", side="long", **SHARED)

    def make(world: World) -> Method:
        pre, nbytes = None, 0
        if any(kind == "pre" for _, kind in plan):
            name = f"signal-{ratio:g}-shared"
            pre, nbytes = fitted.kept(world, name, lambda: fitted.signal(world, subspace))
        wide = RotatedSign(RotatedSignConfig(kept=kept)), _codec(downlink)
        schedule = Planned(plan, wide, subspace, cast(Subspace | None, pre), lr)
        made = Coded.of(PlannedServer(world.initial, schedule))
        made.codec_bytes = nbytes
        return made

    return make


def _codec(name: str) -> Codec:
    if name.startswith("rotsign-"):
        return RotatedSign(RotatedSignConfig(kept=int(name.removeprefix("rotsign-"))))
    return make_codec(name)


def _planned(name: str, title: str, make: Make) -> LlamaScheme:
    return LlamaScheme(name, title, "ours", make, family="narrow-wide-16")


def _peer(name: str, quick: bool = False) -> LlamaScheme:
    known = federated.SCHEMES[name]
    return LlamaScheme(
        name, known.title, known.kind, known.make, known.cite, quick=quick, family=name
    )


_ALL = (
    LlamaScheme(
        "fp32", "fp32 LoRA FedAvg", "reference", untrained("fp32"), quick=True, family="fp32"
    ),
    _rotsign(64, "1/4 bit", quick=True),
    _subspace(64, quick=True),
    _rotsign(16, "1/16 bit"),
    _subspace(64, **SHARED),
    _planned(
        "narrow-wide-16",
        "3 rounds of 1/64 (shared int4), then 1/16 bit; int2 down",
        planned(((0, "pre"), (3, "wide")), 16),
    ),
    _planned(
        "fit-16",
        "2 rounds of 1/16 bit, 1/64 fitted on them, 1/16 bit from round 6",
        planned(((0, "wide"), (2, "fit"), (6, "wide")), 16),
    ),
    _planned(
        "refit-16",
        "1/64 (shared int4), refitted on rounds 4 and 7 of 1/16 bit",
        planned(((0, "pre"), (3, "wide"), (4, "fit"), (6, "wide"), (7, "fit")), 16),
    ),
    _planned(
        "narrow-wide-64",
        "3 rounds of 1/64 (shared int4), then 1/4 bit; 1 bit down",
        planned(((0, "pre"), (3, "wide")), 64, "rotsign-256"),
    ),
    LlamaScheme("auto-64", "subspace:auto 1/64, 1 bit", "ours", auto(64), family="auto-64"),
    _peer("eden-1"),
    _peer("flasc-8", quick=True),
    _peer("sparseloco"),
    _peer("ecolora"),
    _peer("sign-ef-both"),
    _peer("ffa"),
    _rotsign(64, "1/4 bit", "topk"),
    _rotsign(64, "1/4 bit", "sign-rotated"),
    _planned(
        "narrow-wide-16-topk",
        "3 rounds of 1/64 (shared int4), then 1/16 bit; topk down",
        planned(((0, "pre"), (3, "wide")), 16, "topk"),
    ),
    _planned(
        "narrow-wide-64-topk",
        "3 rounds of 1/64 (shared int4), then 1/4 bit; topk down",
        planned(((0, "pre"), (3, "wide")), 64, "topk"),
    ),
    _rotsign(64, "1/4 bit", "rotsign-256"),
    _rotsign(64, "1/4 bit", "int2"),
    _subspace(18),
    _subspace(128),
    _rotsign(256, "1 bit"),
    _rotsign(32, "1/8 bit"),
    _rotsign(8, "1/32 bit"),
    LlamaScheme(
        "paper-working",
        "ResNet-3 AE, working",
        "paper",
        paper("resnet3-working"),
        "CG-FedLLM, arXiv 2405.13746",
        family="paper-working",
    ),
)

SCHEMES = {scheme.name: scheme for scheme in _ALL}
