"""The autoencoder codecs of CG-FedLLM, literal and working."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gradcodec import layout
from gradcodec.codecs import autoencoder_nets as nets
from gradcodec.codecs.base import Codec, register
from gradcodec.codecs.layout_image import Columns, Image
from gradcodec.codecs.settings import CodecConfig, check_one_of, check_whole
from gradcodec.encodable import MAX_NUMEL, shown
from gradcodec.errors import ConfigError, UpdateError
from gradcodec.types import Update, UpdateSpec

RATIOS = {"resnet3": 64, "cnn1d": 32, "uformer": 64}
"""Update elements per code value, by architecture."""
VARIANTS = ("literal", "working")
BASES = ("kind", "tensor")
NORMALISATIONS = ("none", "global_rms", "factor_rms", "tensor_rms")


@dataclass(frozen=True)
class AutoencoderConfig(CodecConfig):
    """Which autoencoder; what it learned are the codec's weights.

    Attributes:
        arch: ``"resnet3"`` (1/64), ``"cnn1d"`` (1/32) or ``"uformer"`` (1/64).
        variant: ``"literal"``, the paper's networks on the paper's image, or ``"working"``, the
            same trunks behind a learned row basis; see ``Autoencoder``.
        normalise: what tensors are divided by before they enter the network: ``"none"``, the
            paper says nothing; ``"global_rms"``, one number; ``"factor_rms"``, one for wide
            matrices (LoRA's A) and one for the rest (B); ``"tensor_rms"``, one per tensor.
        oversample: working variant: how many times more coefficients a column has in the
            networks than on the wire.
        bases: working variant: ``"kind"``, one row basis for all layers' tensors of a kind, or
            ``"tensor"``, one each: more exact, and as many times larger as there are layers.
    """

    kind: ClassVar[str] = "autoencoder"
    arch: str = "resnet3"
    variant: str = "working"
    normalise: str = "tensor_rms"
    oversample: int = 4
    bases: str = "kind"

    def __post_init__(self) -> None:
        for name, value, known in (
            ("arch", self.arch, tuple(RATIOS)),
            ("variant", self.variant, VARIANTS),
            ("normalise", self.normalise, NORMALISATIONS),
            ("bases", self.bases, BASES),
        ):
            check_one_of(self.kind, name, value, known)
        check_whole(self.kind, "oversample", self.oversample, 1, 64)

    @property
    def ratio(self) -> int:
        """Update elements per code value, up to padding."""
        return RATIOS[self.arch]


@register
class Autoencoder(Codec):
    """A trained pair of networks; the paper's way (CG-FedLLM, arXiv 2405.13746).

    Literal, the published networks on the published image (``layout_image.Image``)::

        update --/scales--> image [1, H, W] --six stride-2 stages, 3 residual blocks--> z [64, h, w]
        update <-*scales-- image [1, H, W] <--six transposed stages, Tanh, 3 blocks---- z

    Working, the same residual blocks, with learned linear maps in place of the stages::

        update --/scales--> columns [d, W] --U^T--> grid [oversample k, W] --mix, blocks--> z [k, W]
        update <-*scales-- columns [d, W] <--U'--- grid [oversample k, W] <--blocks, mix-- z

    Why there are two. An update is white in the image: neighbouring pixels are unrelated hidden
    units, so stacked convolutions have nothing to compress and the literal form ends near the
    zero predictor, as an independent reproduction found and ours confirms. It is here to measure
    that. What the columns of one kind of factor do share over layers, clients and time is the
    subspace they lie in. The working form learns that: a dense map along the rows, one basis per
    kind; then the coefficients fold into the paper's latent grid (64 neighbouring columns are the
    64 channels; at r = 8 they are exactly one layer's q, k, v, o), a 1x1 convolution mixes what
    belongs together there, and the paper's three residual blocks refine it.

    The paper's: ResNet-3's layers and sizes, latent ratios, separate encoder and decoder, MSE and
    Adam at 2e-4. Ours, literal: images of anything but uniform matrices, normalisation (published
    is none), everything about the 1-D CNN and the U-Former except latent ratio and name. Ours,
    working: row basis and mix in place of the stages; no one-channel stem or head, no Tanh, no
    BN; zero padding; blocks that start as the identity, so that the fit starts at a closed-form
    linear code, and only what validates better replaces it. On the LoRA updates we tried nothing
    did: what the working form gains is linear, and ``subspace`` is the simpler, additive codec.

    Weights: ``encoder.*``, ``decoder.*``, ``shared.scales`` ``[tensors]``; either half works alone.
    The code is not linear; its vector-Jacobian product is autograd's through the decoder.

    Raises:
        ConfigError: no spec, or weights that are not this network's; on use of a half whose
            weights are not here.
    """

    Config = AutoencoderConfig
    config: AutoencoderConfig
    linear: ClassVar[bool] = False
    learned: ClassVar[bool] = True

    def __init__(self, config: CodecConfig, **parts: Any) -> None:
        super().__init__(config, **parts)
        if self.spec is None:
            raise ConfigError("autoencoder: a spec is needed; the image is laid out for it")
        known = ("encoder.", "decoder.", "shared.scales")
        unknown = sorted(n for n in self.weights if not n.startswith(known))
        if unknown:
            raise ConfigError(f"autoencoder: unknown weights {', '.join(map(shown, unknown[:3]))}")
        for name, tensor in self.weights.items():
            if tensor.dtype != torch.float32:
                raise ConfigError(
                    f"autoencoder: {shown(name)}: expected float32, got {tensor.dtype}"
                )
        self._nets: dict[str, nn.Module] = {}
        for half in ("encoder", "decoder"):
            given = self._weights_of(half)
            if given:
                self._nets[half] = _load(half, self.config, self.spec, given)
        scales = self.weights.get("shared.scales")
        if scales is not None and tuple(scales.shape) != (len(self.spec),):
            raise ConfigError(
                f"autoencoder: expected shared.scales [{len(self.spec)}], got {list(scales.shape)}"
            )
        if scales is not None and not bool((scales > 0).all()):
            raise ConfigError("autoencoder: expected shared.scales that are positive")

    @classmethod
    def initialised(cls, config: AutoencoderConfig, spec: UpdateSpec, seed: int) -> Autoencoder:
        """Codec with random weights and scales of one; the global RNG is left as it was."""
        encoder, decoder = build_nets(config, spec, seed)
        return cls.from_nets(config, spec, encoder, decoder, torch.ones(len(spec)))

    @classmethod
    def from_nets(
        cls,
        config: AutoencoderConfig,
        spec: UpdateSpec,
        encoder: nn.Module,
        decoder: nn.Module,
        scales: Tensor,
    ) -> Autoencoder:
        """Codec of trained networks, whose tensors are copied; ``scales`` ``[tensors]``."""
        weights = {"shared.scales": scales.detach().float().clone()}
        for half, net in (("encoder", encoder), ("decoder", decoder)):
            for name, tensor in _state(net).items():
                weights[f"{half}.{name}"] = tensor.detach().clone().contiguous()
        return cls(config, spec=spec, weights=weights)

    @property
    def code_space(self) -> bytes:
        """These very networks."""
        return self.digest

    def code_numel(self, spec: UpdateSpec) -> int:
        """Latent elements; padding of the image included in the literal form."""
        self._own(spec)
        return self._latent_numel

    def to_code(self, update: Update) -> Tensor:
        """Flatten, normalise, encode; ``z`` ``[m]`` fp32.

        Raises:
            NonFiniteError: the update holds NaN or Inf.
        """
        x = layout.flatten(update, self._spec_of(update))
        layout.check_finite(x, "autoencoder")
        net = self._net("encoder")
        scales = self._scales()
        with torch.no_grad():
            z: Tensor = net((x.to(scales.device) / self._per_element(scales))[None])
        return z[0].to(x.device)

    def from_code(self, z: Tensor, spec: UpdateSpec | None = None) -> dict[str, Tensor]:
        """Decode, denormalise, shape; differentiable in ``z``."""
        spec = self._own(spec)
        if z.numel() != self._latent_numel:
            raise UpdateError(f"autoencoder: expected {self._latent_numel} values, got {z.numel()}")
        net = self._net("decoder")
        scales = self._scales()
        x = net(z.to(scales.device, torch.float32).reshape(1, -1))[0] * self._per_element(scales)
        return layout.unflatten(x.to(z.device), spec)

    def packed_nbytes(self, numel: int) -> int:
        """Four bytes a value; chain a quantiser behind to send fewer."""
        return 4 * numel

    @cached_property
    def _latent_numel(self) -> int:
        return latent_numel(self.config, self._known_spec(None))

    def _per_element(self, scales: Tensor) -> Tensor:
        counts = [t.numel for t in self._known_spec(None)]
        return scales.repeat_interleave(
            torch.tensor(counts, dtype=torch.long, device=scales.device)
        )

    def _weights_of(self, half: str) -> dict[str, Tensor]:
        prefix = half + "."
        return {n.removeprefix(prefix): t for n, t in self.weights.items() if n.startswith(prefix)}

    def _net(self, half: str) -> nn.Module:
        if half not in self._nets:
            here = sorted({n.split(".")[0] for n in self.weights}) or "none"
            raise ConfigError(
                f"autoencoder: the {half}'s weights are needed and not here (loaded: {here}); load "
                f"the whole codec or its {half} half"
            )
        return self._nets[half]

    def _scales(self) -> Tensor:
        if "shared.scales" not in self.weights:
            raise ConfigError("autoencoder: the weight shared.scales is not here")
        return self.weights["shared.scales"]

    def _own(self, spec: UpdateSpec | None) -> UpdateSpec:
        if spec is not None and spec != self.spec:
            raise UpdateError("autoencoder: the networks belong to another tensor table")
        return self._known_spec(None)


class ImageEncoder(nn.Module):
    """Normalised vectors -> image -> literal network -> flat latent, ``[N, n] -> [N, m]``."""

    def __init__(self, arch: str, image: Image) -> None:
        super().__init__()
        self.image = image
        self.net = {
            "resnet3": nets.ResNetEncoder,
            "cnn1d": nets.Cnn1dEncoder,
            "uformer": nets.UFormerEncoder,
        }[arch]()

    def forward(self, x: Tensor) -> Tensor:
        """``[N, n] -> [N, m]``."""
        z: Tensor = self.net(self.image.pack(x))
        return z.flatten(1)


class ImageDecoder(nn.Module):
    """Inverse of ``ImageEncoder``, ``[N, m] -> [N, n]``."""

    def __init__(self, arch: str, image: Image) -> None:
        super().__init__()
        self.image = image
        grids = {
            "resnet3": (64, image.height // 64, image.width // 64),
            "cnn1d": (64, image.height * image.width // 2048),
            "uformer": (4, image.height // 16, image.width // 16),
        }
        self.grid = grids[arch]
        self.net: nn.Module
        if arch == "cnn1d":
            self.net = nets.Cnn1dDecoder(image.height)
        else:
            self.net = nets.ResNetDecoder() if arch == "resnet3" else nets.UFormerDecoder()

    def forward(self, z: Tensor) -> Tensor:
        """``[N, m] -> [N, n]``."""
        return self.image.unpack(self.net(z.reshape(-1, *self.grid)))


class ColumnEncoder(nn.Module):
    """Row bases, then the trunk, ``[N, n] -> [N, m]``."""

    def __init__(self, arch: str, columns: Columns) -> None:
        super().__init__()
        self.columns = columns
        self.rows = _bases(columns)
        self.trunk = nets.Trunk(arch, columns.rank, columns.oversample, encoder=True)

    def grid(self, x: Tensor) -> Tensor:
        """Coefficients ``[N, oversample * k, W]`` in the row bases."""
        matrices = self.columns.pack(x)
        coefficients = [u.T @ g for u, g in zip(self.rows, matrices, strict=True)]
        return self.columns.place(coefficients, x)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, n] -> [N, m]``."""
        return self.columns.send(self.trunk(self.grid(x)))


class ColumnDecoder(nn.Module):
    """The trunk, then row bases of its own, ``[N, m] -> [N, n]``."""

    def __init__(self, arch: str, columns: Columns) -> None:
        super().__init__()
        self.columns = columns
        self.rows = _bases(columns)
        self.trunk = nets.Trunk(arch, columns.rank, columns.oversample, encoder=False)

    def forward(self, z: Tensor) -> Tensor:
        """``[N, m] -> [N, n]``."""
        coefficients = self.columns.take(self.trunk(self.columns.receive(z)))
        matrices = [u @ c for u, c in zip(self.rows, coefficients, strict=True)]
        return self.columns.unpack(matrices, z)


def build_nets(
    config: AutoencoderConfig, spec: UpdateSpec, seed: int
) -> tuple[nn.Module, nn.Module]:
    """Seeded random encoder ``[N, n] -> [N, m]`` and decoder; the global RNG is left as it was.

    In the working form both start from the same random orthonormal row bases, so that the pair is
    an orthogonal projection.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder, decoder = _net("encoder", config, spec), _net("decoder", config, spec)
        if isinstance(encoder, ColumnEncoder) and isinstance(decoder, ColumnDecoder):
            for up, down in zip(encoder.rows, decoder.rows, strict=True):
                nn.init.orthogonal_(up)
                down.data.copy_(up.data)
    return encoder, decoder


def latent_numel(config: AutoencoderConfig, spec: UpdateSpec) -> int:
    """Number of code values ``m`` for these tensors."""
    if config.variant == "working":
        return _columns(config, spec).latent_numel
    image = Image.of(spec)
    return image.height * image.width // config.ratio


def _net(half: str, config: AutoencoderConfig, spec: UpdateSpec) -> nn.Module:
    if config.variant == "literal":
        return (ImageEncoder if half == "encoder" else ImageDecoder)(config.arch, Image.of(spec))
    columns = _columns(config, spec)
    return (ColumnEncoder if half == "encoder" else ColumnDecoder)(config.arch, columns)


def _columns(config: AutoencoderConfig, spec: UpdateSpec) -> Columns:
    return Columns(spec, config.ratio, config.oversample, config.bases == "tensor")


def _bases(columns: Columns) -> nn.ParameterList:
    for g in columns.groups:
        if g.side * columns.basis_size(g) > MAX_NUMEL:
            raise ConfigError(
                f"autoencoder: columns of {g.side} values need a row basis "
                f"[{g.side}, {columns.basis_size(g)}], of more than {MAX_NUMEL} values"
            )
    return nn.ParameterList(
        [nn.Parameter(torch.zeros(g.side, columns.basis_size(g))) for g in columns.groups]
    )


def _state(net: nn.Module) -> dict[str, Tensor]:
    """Weights and BN's running statistics; its batch counter has no use here."""
    return {n: t for n, t in net.state_dict().items() if not n.endswith("num_batches_tracked")}


def _load(
    half: str, config: AutoencoderConfig, spec: UpdateSpec, given: Mapping[str, Tensor]
) -> nn.Module:
    """The half with these weights, in evaluation mode, sharing their memory."""
    # On the meta device, since how large it is follows from a table that a stranger may have made;
    # all that is kept of it is what has the shapes of the weights that are here.
    with torch.device("meta"):
        net = _net(half, config, spec)
    wanted = {n: tuple(t.shape) for n, t in _state(net).items()}
    found = {n: tuple(t.shape) for n, t in given.items()}
    if wanted != found:
        wrong = sorted(n for n in wanted | found if wanted.get(n) != found.get(n))
        raise ConfigError(
            f"autoencoder: the {half}'s weights do not fit {config.arch!r} {config.variant!r}: "
            f"{shown(wrong[0])} expected {wanted.get(wrong[0])}, got {found.get(wrong[0])}"
        )
    batches = {n: torch.zeros((), dtype=torch.long) for n in net.state_dict() if n not in wanted}
    net.load_state_dict({**given, **batches}, assign=True)
    return net.requires_grad_(False).eval()
