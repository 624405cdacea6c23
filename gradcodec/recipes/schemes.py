"""The ways of sending updates that the federated example compares, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from gradcodec.chain import Chain
from gradcodec.codec import Codec
from gradcodec.codecs import BlockQuant, Identity
from gradcodec.errors import ConfigError
from gradcodec.federated.config import ServerConfig
from gradcodec.names import wrong_name
from gradcodec.packers.blockquant import BlockQuantConfig
from gradcodec.registry import make_codec
from gradcodec.transforms.autoencoder.config import AutoencoderConfig
from gradcodec.transforms.subspace.config import SubspaceConfig

Trained = Mapping[str, Codec]
"""Codecs that TGAP fitted, by their names in ``TRAINED``."""

#: The codecs that TGAP can fit for a scheme, by name.
TRAINED: dict[str, SubspaceConfig | AutoencoderConfig] = {
    "subspace-7": SubspaceConfig(ratio=7, allocation="tempered"),
    "subspace-32": SubspaceConfig(ratio=32, allocation="tempered"),
    "subspace-64": SubspaceConfig(ratio=64, allocation="tempered"),
    "resnet3-literal": AutoencoderConfig(variant="literal", normalise="none"),
    "resnet3-working": AutoencoderConfig(variant="working", normalise="tensor_rms"),
}


@dataclass(frozen=True)
class Scheme:
    """One row of the comparison.

    Attributes:
        name: key in tables, files and the command line.
        title: what a reader of the table sees.
        codecs: makes the codecs (uplink, downlink) from those that TGAP fitted.
        server: mode and aggregation.
        needs: names of the trained codecs.
        kind: ``"federated"``, ``"base"`` (no training) or ``"centralised"`` (pooled data).
    """

    name: str
    title: str
    codecs: Callable[[Trained], tuple[Codec, Codec]]
    server: ServerConfig = field(default_factory=ServerConfig)
    needs: tuple[str, ...] = ()
    kind: str = "federated"


def _plain(uplink: str, downlink: str | None = None) -> Callable[[Trained], tuple[Codec, Codec]]:
    return lambda trained: (make_codec(uplink), make_codec(downlink or uplink))


def _coded(name: str, bits: int, down_bits: int) -> Callable[[Trained], tuple[Codec, Codec]]:
    """A trained transform with quantised codes in both directions."""
    return lambda trained: (
        Chain(trained[name], BlockQuant(BlockQuantConfig(bits))),
        Chain(trained[name], BlockQuant(BlockQuantConfig(down_bits))),
    )


def _uplink_only(name: str) -> Callable[[Trained], tuple[Codec, Codec]]:
    """The paper's accounting: fp32 latents up, the whole state down."""
    return lambda trained: (trained[name], Identity())


_LATENT = ServerConfig(mode="latent")

_ALL = (
    Scheme("fp32", "LoRA FedAvg, fp32", _plain("fp32")),
    Scheme(
        "paper-literal",
        "CG-FedLLM ResNet-3, literal",
        _uplink_only("resnet3-literal"),
        needs=("resnet3-literal",),
    ),
    Scheme(
        "paper-working",
        "CG-FedLLM ResNet-3, working",
        _uplink_only("resnet3-working"),
        needs=("resnet3-working",),
    ),
    Scheme(
        "subspace-post",
        "subspace 1/32, 2 bit, post",
        _coded("subspace-32", 2, 4),
        needs=("subspace-32",),
    ),
    Scheme(
        "subspace-7",
        "subspace 1/7, 2 bit, latent",
        _coded("subspace-7", 2, 4),
        _LATENT,
        ("subspace-7",),
    ),
    Scheme(
        "subspace-32",
        "subspace 1/32, 2 bit, latent",
        _coded("subspace-32", 2, 4),
        _LATENT,
        ("subspace-32",),
    ),
    Scheme("base", "base model, no fine-tuning", _plain("fp32"), kind="base"),
    Scheme("centralised", "centralised, pooled data", _plain("fp32"), kind="centralised"),
    Scheme("fp16", "fp16 cast", _plain("fp16")),
    Scheme("sign", "sign, mean scale per block", _plain("sign", "int8")),
    Scheme("topk", "top-64 of 4096, 8 bit", _plain("topk", "int8")),
    Scheme(
        "paper-latent",
        "CG-FedLLM ResNet-3, working, latent",
        _coded("resnet3-working", 8, 8),
        _LATENT,
        ("resnet3-working",),
    ),
    Scheme(
        "subspace-64",
        "subspace 1/64, 4 bit, latent",
        _coded("subspace-64", 4, 4),
        _LATENT,
        ("subspace-64",),
    ),
)

SCHEMES = {s.name: s for s in _ALL}
DEFAULT = ("fp32", "paper-literal", "paper-working", "subspace-post", "subspace-7", "subspace-32")
FULL = tuple(SCHEMES)
QUICK = ("fp32", "paper-working", "subspace-32")


def choose(names: tuple[str, ...]) -> list[Scheme]:
    """The schemes with these names; ``fp32``, to which ratios refer, is always the first."""
    unknown = [n for n in names if n not in SCHEMES]
    if unknown:
        where = "`gradcodec run-federated --help` lists all"
        raise ConfigError(wrong_name("a scheme", unknown[0], SCHEMES, where))
    return [SCHEMES[n] for n in dict.fromkeys(("fp32", *names))]
