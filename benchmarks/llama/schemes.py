"""What the ``llama`` benchmark compares, in the order of importance."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.federated import case as federated
from benchmarks.federated import fitted
from benchmarks.federated.case import auto, paper, signal, untrained
from benchmarks.federated.methods import Coded, Method
from benchmarks.federated.scheme import Make, Scheme
from benchmarks.federated.world import World
from benchmarks.llama.bands import banded, factors, signs
from benchmarks.llama.gradients import frames
from benchmarks.llama.stages import Plan, Planned, PlannedServer
from benchmarks.llama.transfer import bundled, other_task, unfitted
from benchmarks.peers.federated import FedKSeed, FedSB, Ferret
from gradcodec.chain import Chain
from gradcodec.codec import Codec
from gradcodec.codecs import BlockQuant, RotatedSign, Subspace
from gradcodec.federated import ServerConfig
from gradcodec.packers.blockquant import BlockQuantConfig
from gradcodec.packers.rotsign import RotatedSignConfig
from gradcodec.registry import make_codec
from gradcodec.tgap import fit_subspace
from gradcodec.transforms.subspace.config import SubspaceConfig

GRID = (4e-3, 8e-3, 1.6e-2)
SLOW, FAST = (2e-3, 4e-3, 8e-3), (8e-3, 1.6e-2, 3.2e-2)
SHARED = SubspaceConfig(
    allocation="tempered", side="long", share="kind", basis_dtype="int4"
)  # one basis for one kind of factor in all layers, four bits a number: tens of kB
OWN = dataclasses.replace(SHARED, share="none", basis_dtype="int8")


@dataclass(frozen=True)
class LlamaScheme(Scheme):
    """A scheme whose learning rate is that of its family.

    Attributes:
        family: name of the scheme that is tuned for all of them.
    """

    family: str = ""
    grid: tuple[float, ...] = GRID


def coded(up: str, down: str, config: ServerConfig | None = None) -> Make:
    """Whole updates, in any two codecs that need no fitting."""
    return lambda world: Coded(world.initial, _codec(up), _codec(down), config)


def latent(
    config: SubspaceConfig, up: str, down: str = "int2-rotated", records: str = "signal"
) -> Make:
    """Training in the code space of a subspace that TGAP fitted, codes in any two packers."""

    def fit(world: World) -> Codec:
        if records == "signal":
            return fitted.signal(world, config)
        return fit_subspace(fitted.moments(world, config, records), config)

    def make(world: World) -> Method:
        name = f"{records}-{config.ratio:g}-{config.share}-{config.basis_dtype}"
        transform, nbytes = fitted.kept(world, name, lambda: fit(world))
        both = Chain(transform, _codec(up)), Chain(transform, _codec(down))
        return Coded(world.initial, *both, ServerConfig(mode="latent"), codec_bytes=nbytes)

    return make


def planned(plan: Plan, kept: int, downlink: str = "int2", narrow_down: str = "int2") -> Make:
    """Stages by plan; see ``benchmarks.llama.stages``.

    Args:
        plan: the stages.
        kept: of 256 values in wide stages, how many are sent.
        downlink: codec of broadcasts in wide stages.
        narrow_down: the same in stages of a subspace.
    """

    def make(world: World) -> Method:
        pre: dict[str, Subspace] = {}
        nbytes = 0
        for _, kind in plan:
            if kind.startswith("pre"):
                ratio = float(kind.split(":")[1]) if ":" in kind else 64.0
                config = dataclasses.replace(SHARED, ratio=ratio)
                fit = functools.partial(fitted.signal, world, config)
                made, size = fitted.kept(world, f"signal-{ratio:g}-kind-int4", fit)
                assert isinstance(made, Subspace)
                pre[kind] = made
                nbytes = nbytes or size  # later bases come in the stream and are counted there
        wide = _codec(f"rotsign-{kept}"), _codec(downlink)
        fit_later = dataclasses.replace(SHARED, ratio=64.0)
        schedule = Planned(plan, wide, fit_later, pre, down=narrow_down)
        federation = Coded.of(PlannedServer(world.initial, schedule))
        federation.codec_bytes = nbytes
        return federation

    return make


def _codec(name: str) -> Codec:
    """A codec by name.

    ``rotsign-64`` sends the first 64 of 256 rotated values, ``rotsign-1280of4096`` as it says, and
    ``peaks-56of4096`` the largest.
    """
    start, _, rest = name.partition("-")
    if start in ("rotsign", "peaks") and rest:
        kept, _, block = rest.partition("of")
        which = "largest" if start == "peaks" else "first"
        return RotatedSign(RotatedSignConfig(int(block or 256), int(kept), which))
    if name == "int2":
        return BlockQuant(BlockQuantConfig(2))
    return make_codec(name)


def _reference() -> Iterator[LlamaScheme]:
    yield LlamaScheme(
        "fp32", "fp32 LoRA FedAvg", "reference", untrained("fp32"), quick=True, family="fp32"
    )
    yield LlamaScheme(
        "fp32-8e-3",
        "fp32 LoRA FedAvg, at 8e-3",
        "reference",
        untrained("fp32"),
        family="fp32-8e-3",
        grid=(8e-3,),
        plotted=False,
    )


def _rotated_signs() -> Iterator[LlamaScheme]:
    ways = (
        ("rotsign-1280of4096", "5/16 bit in blocks of 4096", "int2-rotated"),
        ("rotsign-64", "1/4 bit", "int4"),
        ("rotsign-64-int2r", "1/4 bit", "int2-rotated"),
        ("rotsign-64-signr", "1/4 bit", "sign-rotated"),
        ("rotsign-64-topk", "1/4 bit", "topk"),
        ("rotsign-256", "1 bit", "int4"),
        ("rotsign-16", "1/16 bit", "int4"),
        ("rotsign-512of4096", "1/8 bit in blocks of 4096", "int2-rotated"),
        ("peaks-170of4096", "the largest, bytes of 5/16 bit", "int2-rotated"),
        ("peaks-128of4096", "the largest, bytes of 1/4 bit", "int2-rotated"),
        ("peaks-56of4096", "the largest, bytes of 1/8 bit", "int2-rotated"),
        ("peaks-25of4096", "the largest, bytes of 1/16 bit", "int2-rotated"),
    )
    for name, bits, down in ways:
        up = "-".join(name.split("-")[:2])
        title = f"rotated signs, {bits}; {down} down"
        yield LlamaScheme(name, title, "ours", coded(up, down), family="rotsign-64")
    smooth = ServerConfig(momentum=0.5, lr=0.5)
    title = "rotated signs, 1/4 bit; server momentum"
    yield LlamaScheme(
        "rotsign-64-m5", title, "ours", coded("rotsign-64", "int4", smooth), family="rotsign-64"
    )
    yield LlamaScheme(
        "fp32-m5",
        "fp32, server momentum",
        "reference",
        coded("fp32", "fp32", smooth),
        family="fp32-m5",
        plotted=False,
    )


def _subspaces() -> Iterator[LlamaScheme]:
    def scheme(name: str, title: str, make: Make, quick: bool = False) -> LlamaScheme:
        return LlamaScheme(name, title, "ours", make, quick=quick, family="sub-8")

    def shared(ratio: float) -> SubspaceConfig:
        return dataclasses.replace(SHARED, ratio=ratio)

    for ratio in (8, 16, 4, 32, 64, 128, 192):
        title = f"subspace 1/{ratio}, 1 bit"
        make = latent(shared(ratio), "rotsign-256")
        yield scheme(f"sub-{ratio}", title, make, quick=ratio == 8)
    own = "a basis for each tensor"
    for ratio in (64, 8):
        make = latent(dataclasses.replace(OWN, ratio=ratio), "rotsign-256")
        yield scheme(f"sub-{ratio}-own", f"subspace 1/{ratio}, 1 bit, {own}", make)
    yield scheme("signal-64", f"subspace 1/64, 1 bit, {own}; int2 down", signal(64, 1))
    for ratio in (4, 8, 16):
        make = latent(shared(ratio), "rotsign-64")
        yield scheme(f"sub-{ratio}-k64", f"subspace 1/{ratio}, 1/4 bit", make)
    at_8 = shared(8)
    yield scheme("sub-8-2bit", "subspace 1/8, 2 bit", latent(at_8, "int2"))
    yield scheme("sub-8-fp32", "subspace 1/8, fp32", latent(at_8, "fp32", "fp32"))
    for name, records, ratio in (
        ("upd-8", "update", 8),
        ("grad-8", "gradient", 8),
        ("grad-64", "gradient", 64),
    ):
        make = latent(shared(ratio), "rotsign-256", records=records)
        title = f"subspace 1/{ratio}, 1 bit, fitted on single {records}s"
        yield scheme(name, title, make)
    yield LlamaScheme("auto-64", "subspace:auto 1/64, 1 bit", "ours", auto(64), family="auto-64")


def _progressive() -> Iterator[LlamaScheme]:
    def scheme(name: str, title: str, make: Make) -> LlamaScheme:
        return LlamaScheme(name, title, "ours", make, family=name)

    nested: dict[str, Plan] = {
        "64-8-wide6": ((0, "pre:64:256"), (2, "pre:8:256"), (6, "wide")),
        "64-8-wide": ((0, "pre:64:256"), (3, "pre:8:256"), (8, "wide")),
        "64-8": ((0, "pre:64:256"), (4, "pre:8:256")),
        "64-4": ((0, "pre:64:256"), (4, "pre:4:256")),
        "64-8-k64": ((0, "pre:64:256"), (4, "pre:8:64")),
        "64-16-4": ((0, "pre:64:256"), (2, "pre:16:256"), (6, "pre:4:256")),
        "128-32-8": ((0, "pre:128:256"), (2, "pre:32:256"), (6, "pre:8:256")),
        "128-64-32": ((0, "pre:128:256"), (3, "pre:64:256"), (7, "pre:32:256")),
    }
    for name, plan in nested.items():
        title = "progressive: " + ", ".join(_stage(first, kind) for first, kind in plan)
        yield scheme(f"nest-{name}", title, planned(plan, 64, narrow_down="int2-rotated"))
    narrow_wide: Plan = ((0, "pre"), (3, "wide"))
    for kept, down in ((16, "int2"), (64, "topk")):
        name = f"narrow-wide-{kept}" + ("" if down == "int2" else f"-{down}")
        title = f"progressive: 1/64 from round 0, {kept}/256 bit from round 3; {down} down"
        yield scheme(name, title, planned(narrow_wide, kept, down))
    yield scheme(
        "fit-16",
        "progressive: 1/16 bit, 1/64 fitted on it from round 2, 1/16 bit from round 6",
        planned(((0, "wide"), (2, "fit"), (6, "wide")), 16),
    )
    yield scheme(
        "refit-16",
        "progressive: 1/64, refitted on rounds 4 and 7 of 1/16 bit",
        planned(((0, "pre"), (3, "wide"), (4, "fit"), (6, "wide"), (7, "fit")), 16),
    )


def _stage(first: int, kind: str) -> str:
    if kind == "wide":
        return f"1/4 bit of all from round {first}"
    _, ratio, kept = kind.split(":")
    bits = "" if kept == "256" else f" at {kept}/256 bit"
    return f"1/{ratio}{bits} from round {first}"


def _transferred() -> Iterator[LlamaScheme]:
    """Codecs that were not fitted on what they are used on; see ``benchmarks.llama.transfer``."""
    for ratio, how in ((8, SHARED), (64, OWN)):
        config = dataclasses.replace(how, ratio=ratio)
        for name, title, make in (
            ("bundled", "of the package", bundled(f"smollm2-135m-lora-r8-qv-{ratio}x")),
            ("other", "fitted on the other task", other_task(config)),
            ("random", "random bases", unfitted(config)),
        ):
            title = f"subspace 1/{ratio}, 1 bit, {title}"
            yield LlamaScheme(f"{name}-{ratio}", title, "ours", make, family="sub-8")


def _bands() -> Iterator[LlamaScheme]:
    def scheme(name: str, title: str, make: Make) -> LlamaScheme:
        return LlamaScheme(name, title, "ours", make, family=name)

    for kept in (1280, 1024, 512):
        title = f"rotated signs, {kept}/4096 bit; replies relayed down"
        yield scheme(f"w-{kept}of4096", title, signs(kept))
    title = "rotated signs, 1024/4096 bit, halved; replies relayed down"
    yield scheme("w-1024of4096-s5", title, signs(1024, 0.5))
    for ratio, inside, outside, shrink in (
        (8, 1, 4, 1.0),
        (8, 1, 8, 1.0),
        (8, 1, 8, 0.5),
        (8, 1, 16, 1.0),
        (8, 1, 16, 0.5),
        (8, 2, 16, 1.0),
        (8, 4, 32, 1.0),
        (16, 1, 8, 1.0),
        (16, 1, 16, 1.0),
        (16, 1, 32, 1.0),
        (16, 1, 32, 0.3),
        (16, 2, 32, 1.0),
        (32, 1, 64, 1.0),
    ):
        near = (256, 256) if inside == 1 else (1024 // inside, 1024)
        parts = [f"h{ratio}", "1" if inside == 1 else f"1/{inside}", f"1/{outside}"]
        parts += [] if shrink == 1 else [f"s{10 * shrink:g}"]
        title = f"bands: 1/{ratio} at {parts[1]} bit, the rest at 1/{outside} bit"
        title += "" if shrink == 1 else f" times {shrink:g}"
        make = banded(ratio, near, 4096 // outside, shrink)
        yield scheme("-".join(parts), title, make)
    for outside in (8, 16):
        title = f"bands: 1/64 (own bases) at 1 bit, the rest at 1/{outside} bit"
        make = banded(64, (256, 256), 4096 // outside, share="none", basis_dtype="int8")
        yield scheme(f"h64o-1-1/{outside}", title, make)


def _below_a_bit() -> Iterator[LlamaScheme]:
    """Few signs up, of all values or of LoRA's factors apart; two ways down."""

    def scheme(name: str, title: str, family: str, make: Make) -> LlamaScheme:
        grid = SLOW if family in ("s-256", "p-25") else FAST if family == "b-640" else GRID
        quick = name == "p-56"
        return LlamaScheme(name, title, "ours", make, quick=quick, family=family, grid=grid)

    for kept, down in ((1280, 4096), (512, None), (512, 2048), (256, None)):
        family = "s-1280-o4096" if kept == 1280 else "s-256"
        name = f"s-{kept}" + ("" if down is None else f"-o{down}")
        title = f"rotated signs, {kept}/4096 bit; {_way(down)}"
        yield scheme(name, title, family, signs(kept, down=down))
    for kept, bits in ((170, "5/16"), (56, "1/8")):
        title = f"largest rotated signs, bytes of {bits} bit; the largest 2214/4096 to each client"
        make = signs(kept, down=2214, which="largest", which_down="largest")
        yield scheme(f"p-{kept}-l2214", title, f"p-{kept}", make)
    for kept, bits in ((170, "5/16"), (56, "1/8"), (25, "1/16")):
        for down in (4096, None):
            name = f"p-{kept}" + ("" if down is None else f"-o{down}")
            title = f"largest rotated signs, bytes of {bits} bit; {_way(down)}"
            yield scheme(name, title, f"p-{kept}", signs(kept, down=down, which="largest"))
    title = f"rotated signs, 512/4096 bit of B and 128/4096 of A; {_way(None)}"
    yield scheme("f-512-128", title, "f-512-128", factors(128, 512))
    title = f"A frozen, rotated signs, 640/4096 bit of B; {_way(None)}"
    yield scheme("b-640", title, "b-640", factors(None, 640))


def _way(down: int | None) -> str:
    return "replies relayed down" if down is None else f"{down}/4096 bit to each client"


def _peers() -> Iterator[LlamaScheme]:
    for name in ("eden-1", "sign-ef-both", "ffa"):
        yield _known(name)
    yield LlamaScheme(
        "fed-sb",
        "Fed-SB",
        "peer",
        lambda world: FedSB(world.initial, frames(world, 1e-3)),
        "Fed-SB, arXiv 2502.15436",
        family="fed-sb",
        grid=(1e-2, 3e-2, 1e-1),
    )
    yield _known("flasc-8", quick=True)
    for name in ("ecolora", "sparseloco"):
        yield _known(name)
    yield LlamaScheme(
        "ferret",
        "Ferret, 64 directions for 4096 values",
        "peer",
        lambda world: Ferret(world.initial, lr=1 / 16),
        "Ferret, arXiv 2409.06277",
        family="ferret",
    )
    yield LlamaScheme(
        "fedkseed",
        "FedKSeed, 192 of 4096 seeds a round",
        "peer",
        lambda world: FedKSeed(world.initial),
        "FedKSeed, arXiv 2312.06353",
        family="fedkseed",
        # Noise bounds the rate, as draws / values: 0.2 was best for the embedded model's 98,304.
        grid=(1e-2, 3e-2, 1e-1),
    )
    yield LlamaScheme(
        "paper-working",
        "ResNet-3 AE, working",
        "paper",
        paper("resnet3-working"),
        "CG-FedLLM, arXiv 2405.13746",
        family="paper-working",
    )


def _known(name: str, quick: bool = False) -> LlamaScheme:
    """A peer of the ``federated`` benchmark."""
    known = federated.SCHEMES[name]
    return LlamaScheme(
        name, known.title, known.kind, known.make, known.cite, quick=quick, family=name
    )


SCHEMES = {
    scheme.name: scheme
    for group in (
        _reference,
        _rotated_signs,
        _subspaces,
        _transferred,
        _progressive,
        _bands,
        _below_a_bit,
        _peers,
    )
    for scheme in group()
}
