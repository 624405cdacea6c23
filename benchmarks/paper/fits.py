"""Analyses 5 to 7: codecs fitted elsewhere, other autoencoders, and TGAP's two readings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.paper.coders import LITERAL
from benchmarks.paper.fidelity import Whose, one_round
from benchmarks.paper.measures import gain
from benchmarks.paper.setup import Setup
from gradcodec import layout
from gradcodec.tgap.fit_autoencoder import Vectors, train_pair
from gradcodec.transforms.autoencoder.halves import ImageDecoder, ImageEncoder, build_nets
from gradcodec.transforms.autoencoder.image import Image
from gradcodec.transforms.autoencoder.nets import ResidualBlock, count_macs
from gradcodec.types import TensorSpec, UpdateSpec

CONTROLS: Mapping[str, str] = MappingProxyType(
    {"ae-working": "prior", "subspace": "random-subspace", "train-mean": "zero"}
)
"""What is fitted anew in analyses 5 and 7, and the same without any data.

The training mean is a control itself. Where it is as good as a codec that was fitted on the same
updates, the codec does not carry over: means are alike.
"""
CODERS = tuple(CONTROLS)

Row = dict[str, Any]


def transfer(setup: Setup, name: str, source: str) -> Row:
    """Errors on the clients' D2 of a coder that was fitted on another source."""
    return _tried(setup, setup.coder(name, source=source))


def reading(setup: Setup, name: str, how: str) -> Row:
    """The same of a coder that was fitted on TGAP's federated or local reading."""
    return _tried(setup, setup.coder(name, reading=how))


def _tried(setup: Setup, decode: Any) -> Row:
    test = setup.test()
    rounds: list[Whose] = [one_round(test, r, "update", decode) for r in range(setup.rounds)]
    errors = [r["client"]["all"]["rse"] for r in rounds]
    numbered = [{"number": r + 1, **found} for r, found in enumerate(rounds)]
    return {"rounds": numbered, "loss": sum(e or 0.0 for e in errors) / len(errors)}


# -- other autoencoders ----------------------------------------------------------------------------


class Variant(NamedTuple):
    """A literal ResNet-n.

    Attributes:
        title: what a reader sees.
        depth: residual blocks in each half; the paper's primary has 3.
        up: how the decoder doubles a map.
        smooth: trained on smooth pictures instead of updates: the control of the training itself.
    """

    title: str
    depth: int = 3
    up: str = "transposed"
    smooth: bool = False


VARIANTS: Mapping[str, Variant] = MappingProxyType(
    {
        "depth-0": Variant("no residual block", depth=0),
        "depth-1": Variant("ResNet-1", depth=1),
        "depth-3": Variant("ResNet-3, transposed convolutions (the paper's)"),
        "depth-6": Variant("ResNet-6", depth=6),
        "nearest": Variant("ResNet-3, nearest neighbour, convolution", up="nearest"),
        "bilinear": Variant("ResNet-3, bilinear, convolution", up="bilinear"),
        "shuffle": Variant("ResNet-3, sub-pixel convolution", up="shuffle"),
        "smooth": Variant("ResNet-3 on smooth pictures", smooth=True),
    }
)
TOP = 0.95
"""Largest absolute value after scaling: within Tanh's range, so that range is no obstacle."""


def ablation(setup: Setup, name: str) -> Row:
    """One variant: its size, its training, its error on D2, and whether it listens to its input."""
    variant = VARIANTS[name]
    spec = setup.test().spec
    encoder, decoder = networks(spec, variant.depth, variant.up, setup.seed)
    train, test = setup.train().updates.flatten(0, 1), setup.test().updates.flatten(0, 1)
    if variant.smooth:
        pictures = smooth(spec, len(train) + len(test), setup.seed)
        train, test = pictures.split((len(train), len(test)))
    pair = nn.Sequential(encoder, decoder)
    scale = train.abs().max() / TOP
    data = Vectors([layout.unflatten(x / scale, spec) for x in train], spec)
    history = train_pair(pair, data, setup.steps, 4, setup.rate, setup.seed, 10, None)
    with torch.no_grad():
        y = torch.cat([pair(x[None] / scale) * scale for x in test])
    error = float((y - test).double().square().sum() / test.double().square().sum())
    mean = train.mean(0)
    image = Image.of(spec)
    picture, latent = (1, 1, image.height, image.width), (1, *decoder.grid)
    return {
        "parameters": {h: _count(net) for h, net in (("encoder", encoder), ("decoder", decoder))},
        "macs": {
            "encoder": count_macs(encoder.net, picture),
            "decoder": count_macs(decoder.net, latent),
            "decoder_on_output": count_macs(decoder.net, latent, "output"),
        },
        "history": [asdict(line) for line in history],
        "rse": error,
        "mean_rse": float((mean - test).double().square().sum() / test.double().square().sum()),
        "client_gain": gain(y - y.roll(1, 0), test - test.roll(1, 0)),
        "loss": error,
    }


def networks(spec: UpdateSpec, depth: int, up: str, seed: int) -> tuple[ImageEncoder, ImageDecoder]:
    """The paper's halves with another number of blocks and another way up."""
    encoder, decoder = build_nets(LITERAL, spec, seed)
    assert isinstance(encoder, ImageEncoder)
    assert isinstance(decoder, ImageDecoder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        blocks = [[ResidualBlock(64) for _ in range(depth)] for _ in range(2)]
        down = [m for m in encoder.net.children() if not isinstance(m, ResidualBlock)]
        rest = [_upwards(m, up) for m in decoder.net.children() if not isinstance(m, ResidualBlock)]
    encoder.net = nn.Sequential(*down, *blocks[0])
    decoder.net = nn.Sequential(*blocks[1], *rest)
    return encoder, decoder


def _upwards(layer: nn.Module, up: str) -> nn.Module:
    """A transposed convolution's replacement, of the same shapes; other layers as they are."""
    if up == "transposed" or not isinstance(layer, nn.ConvTranspose2d):
        return layer
    into, out = layer.in_channels, layer.out_channels
    if up == "shuffle":
        return nn.Sequential(nn.Conv2d(into, 4 * out, 3, padding=1, bias=False), nn.PixelShuffle(2))
    return nn.Sequential(
        nn.Upsample(scale_factor=2, mode=up), nn.Conv2d(into, out, 3, padding=1, bias=False)
    )


def smooth(spec: UpdateSpec, count: int, seed: int) -> Tensor:
    """Pictures that convolutions can compress, as vectors ``[count, n]``: waves of two phases."""
    image = Image.of(spec)
    generator = torch.Generator().manual_seed(seed)
    phases = 2 * math.pi * torch.rand(count, 2, 1, generator=generator)
    down = torch.linspace(0, 2 * math.pi, image.height) + phases[:, 0]
    right = torch.linspace(0, 2 * math.pi, image.width) + phases[:, 1]
    pictures = torch.tanh(2 * down.sin()[:, :, None] * right.sin()[:, None, :])
    return image.unpack(pictures[:, None])


def _count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


# -- the paper's own sizes -------------------------------------------------------------------------


def llama_7b() -> UpdateSpec:
    """LoRA's factors at r = 8 on q, k, v and o of LLaMA-7B: 8,388,608 values."""
    shapes = (("lora_A", (8, 4096)), ("lora_B", (4096, 8)))
    return UpdateSpec(
        tuple(
            TensorSpec(f"model.layers.{layer}.self_attn.{module}_proj.{half}.weight", shape)
            for layer in range(32)
            for module in "qkvo"
            for half, shape in shapes
        )
    )


def geometry(arch: str) -> Row:
    """Size and arithmetic of a literal autoencoder on the paper's picture, ``4096 x 2048``."""
    spec = llama_7b()
    with torch.device("meta"):
        image = Image.of(spec)
        encoder, decoder = ImageEncoder(arch, image), ImageDecoder(arch, image)
    config = replace(LITERAL, arch=arch)
    latent = (1, *decoder.grid)
    values = math.prod(latent)
    return {
        "numel": spec.numel,
        "latent": list(decoder.grid),
        "code_numel": values,
        "ratio": values / spec.numel,
        "stated_ratio": {"resnet3": 0.0156, "cnn1d": 0.0321}.get(config.arch),
        "payload_bytes": 4 * values,
        "parameters": {h: _count(net) for h, net in (("encoder", encoder), ("decoder", decoder))},
        "macs": {
            "encoder": count_macs(encoder.net, (1, 1, image.height, image.width)),
            "decoder": count_macs(decoder.net, latent),
            "decoder_on_output": count_macs(decoder.net, latent, "output"),
        },
        "loss": values / spec.numel,
    }
