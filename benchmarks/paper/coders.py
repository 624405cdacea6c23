"""What is measured: the paper's autoencoder, this project's codecs, and controls.

A control knows nothing, and so shows what a number is worth. One that sends nothing, or always the
same, or noise, must lose; where it does not, the metric is blind or the codec has learned nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from benchmarks.federated.fitted import one_at_a_time, whole
from benchmarks.paper.measures import noise_like
from benchmarks.peers.federated.random_subspace import random_bases
from gradcodec import layout
from gradcodec.codec import Codec
from gradcodec.codecs import Identity, RotatedSign
from gradcodec.packers.rotsign import RotatedSignConfig
from gradcodec.registry import make_codec
from gradcodec.tgap import SecondMoments, fit_autoencoder, fit_subspace
from gradcodec.transforms.autoencoder.config import AutoencoderConfig
from gradcodec.transforms.subspace.config import SubspaceConfig
from gradcodec.types import Update, UpdateSpec
from gradcodec.wire import Payload

RATIO = 64
WORKING = AutoencoderConfig(variant="working", normalise="tensor_rms")
LITERAL = AutoencoderConfig(variant="literal", normalise="factor_rms")
CNN1D, UFORMER = (replace(LITERAL, arch=arch) for arch in ("cnn1d", "uformer"))
"""The paper's other two; their layers are not published (``gradcodec``'s interpretations)."""
UNSCALED = replace(LITERAL, normalise="none")
"""The paper mentions no scaling."""
SUBSPACE = SubspaceConfig(ratio=RATIO, allocation="tempered", side="long", basis_dtype="float32")


class Decodes(Protocol):
    """A round trip of one snapshot, ``[n] -> [n]``; equal seeds give equal random numbers."""

    def __call__(self, x: Tensor, seed: int = 0) -> Tensor:
        """Encode, send, decode."""


@dataclass(frozen=True)
class Through:
    """The round trip of a codec, over bytes."""

    codec: Codec
    spec: UpdateSpec

    def __call__(self, x: Tensor, seed: int = 0) -> Tensor:
        """Encode to bytes, and decode these."""
        return layout.flatten(self.codec.decoder.decode(self.payload(x, seed)), self.spec)

    def payload(self, x: Tensor, seed: int = 0) -> Payload:
        """As it arrives."""
        update = layout.unflatten(x, self.spec)
        blob = self.codec.encoder.encode(update, seed=seed).to_bytes()
        return Payload.from_bytes(blob)

    def with_noise(self, x: Tensor, sigma: float, seed: int = 0) -> Tensor:
        """The same, with noise on the code; ``sigma`` is relative to the code's own RMS."""
        z = self.codec.read_code(self.payload(x, seed))
        z = z + noise_like(z, sigma * float(z.square().mean().sqrt()), seed + 1)
        return layout.flatten(self.codec.from_code(z, self.spec), self.spec)


@dataclass(frozen=True)
class Fitting:
    """What a coder is made of.

    Attributes:
        train: snapshots ``[N, n]`` of the object that it will encode.
        spec: their tensors.
        steps, rate: of an autoencoder's training.
        seed: of weights and bases.
    """

    train: Tensor
    spec: UpdateSpec
    steps: int
    rate: float
    seed: int

    @property
    def updates(self) -> list[Update]:
        """The snapshots as named tensors."""
        return [layout.unflatten(x, self.spec) for x in self.train]


@dataclass(frozen=True)
class Coder:
    """One row of the tables.

    Attributes:
        title: what a reader sees.
        kind: ``"paper"``, ``"ours"`` or ``"control"``.
        codec: makes the codec; ``None`` for a control that is none.
        control: makes the round trip of such a control.
        every: measured on every object; else on updates alone.
        brief: its errors and its size alone, on the embedded model, of the first seed: it costs
            minutes.
    """

    title: str
    kind: str
    codec: Callable[[Fitting], Codec] | None = None
    control: Callable[[Fitting], Decodes] | None = None
    every: bool = True
    brief: bool = False


def _autoencoder(config: AutoencoderConfig, share: float = 1.0) -> Callable[[Fitting], Codec]:
    """Trained for a share of the steps; a share of 0 leaves it as it is initialised."""

    def make(given: Fitting) -> Codec:
        steps = int(share * given.steps)
        options = {"steps": steps, "lr": given.rate, "seed": given.seed}
        return fit_autoencoder(given.updates, config, given.spec, **options).codec

    return make


def _subspace(given: Fitting) -> Codec:
    moments = SecondMoments(given.spec, SUBSPACE)
    for update in given.updates:
        moments.add(update)
    return fit_subspace(moments, SUBSPACE)


def _random_bases(given: Fitting) -> Codec:
    return random_bases(given.updates[0], ratio=RATIO, seed=given.seed)


def random_prior(given: Fitting) -> Codec:
    """The autoencoder on noise with the mean and variance of each tensor: all it sees of the data.

    DR-Encoder (arXiv 2412.17053) trains on such draws, so that the codec gives no update away.
    """
    means, deviations = [], []
    for part in torch.split(given.train, [t.numel for t in given.spec], dim=1):
        means.append(part.mean().expand(part.shape[1]))
        deviations.append(part.std().expand(part.shape[1]))
    noise = noise_like(given.train, 1.0, given.seed)
    drawn = torch.cat(means) + torch.cat(deviations) * noise
    return _autoencoder(WORKING)(replace(given, train=drawn))


def _brief(title: str, config: AutoencoderConfig) -> Coder:
    return Coder(title, "paper", _autoencoder(config), every=False, brief=True)


def _zero(_: Fitting) -> Decodes:
    return lambda x, seed=0: torch.zeros_like(x)


def _train_mean(given: Fitting) -> Decodes:
    mean = given.train.mean(0)
    return lambda x, seed=0: mean


def _noise(_: Fitting) -> Decodes:
    def decode(x: Tensor, seed: int = 0) -> Tensor:
        noise = noise_like(x, 1.0, seed)
        return noise * (x.norm() / noise.norm())

    return decode


CODERS: Mapping[str, Coder] = MappingProxyType(
    {
        "identity": Coder("identity, fp32", "control", lambda _: Identity()),
        "int4": Coder("int4", "ours", lambda _: make_codec("int4")),
        "rotsign": Coder("rotated signs, 1 bit", "ours", lambda _: _signs(256), every=False),
        "rotsign-128": Coder("rotated signs, 1/2 bit", "ours", lambda _: _signs(128)),
        "subspace": Coder("subspace 1/64, fp32", "ours", _subspace),
        "ae-working": Coder("ResNet-3 AE, working", "paper", _autoencoder(WORKING)),
        "ae-literal": Coder("ResNet-3 AE, literal, scaled", "paper", _autoencoder(LITERAL)),
        "ae-unscaled": Coder(
            "ResNet-3 AE, literal, as stated", "paper", _autoencoder(UNSCALED), every=False
        ),
        "ae-cnn1d": _brief("1-D CNN AE 1/32, literal, scaled", CNN1D),
        "ae-uformer": _brief("U-Former AE, literal, scaled", UFORMER),
        "prior": Coder("working AE, fitted on noise", "control", random_prior, every=False),
        "untrained": Coder(
            "literal AE, untrained", "control", _autoencoder(LITERAL, 0.0), every=False
        ),
        "random-subspace": Coder("subspace 1/64, random bases", "control", _random_bases),
        "train-mean": Coder("always the training mean", "control", control=_train_mean),
        "noise": Coder("noise of the same norm", "control", control=_noise),
        "zero": Coder("nothing (zero)", "control", control=_zero),
    }
)


def _signs(kept: int) -> Codec:
    return RotatedSign(RotatedSignConfig(kept=kept))


def fitted(name: str, given: Fitting, folder: Path) -> Decodes:
    """A coder of ``CODERS``; its codec is made once and kept in ``folder``."""
    coder = CODERS[name]
    if coder.codec is None:
        assert coder.control is not None
        return coder.control(given)
    make = coder.codec
    with one_at_a_time(folder):
        if not folder.exists():
            codec = make(given).bind(given.spec)
            whole(folder, lambda beside: codec.save_pretrained(beside))
    return Through(Codec.from_pretrained(folder), given.spec)
