"""One half of an autoencoder, as a module on flat vectors; how halves are made and loaded."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from gradcodec.encodable import MAX_NUMEL, shown
from gradcodec.errors import ConfigError
from gradcodec.transforms.autoencoder import nets
from gradcodec.transforms.autoencoder.config import AutoencoderConfig
from gradcodec.transforms.autoencoder.image import Columns, Image
from gradcodec.types import UpdateSpec


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
    """The trunk, then row bases, not the encoder's, ``[N, m] -> [N, n]``."""

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


def state_of(net: nn.Module) -> dict[str, Tensor]:
    """Weights and BN's running statistics; its batch counter has no use here."""
    return {n: t for n, t in net.state_dict().items() if not n.endswith("num_batches_tracked")}


def load(
    half: str, config: AutoencoderConfig, spec: UpdateSpec, given: Mapping[str, Tensor]
) -> nn.Module:
    """The half with these weights, in evaluation mode, sharing their memory."""
    # On the meta device, which allocates nothing: the network's size follows from a tensor table
    # that a stranger may have made. Only tensors of the given weights' shapes are kept.
    with torch.device("meta"):
        net = _net(half, config, spec)
    wanted = {n: tuple(t.shape) for n, t in state_of(net).items()}
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
