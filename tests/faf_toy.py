"""Small models, codecs and loops for the tests of training in code space."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gradcodec.codec import Codec
from gradcodec.codecs import Autoencoder, Subspace
from gradcodec.transforms.autoencoder.config import AutoencoderConfig
from gradcodec.transforms.subspace.config import Axis, SubspaceConfig
from gradcodec.types import UpdateSpec

EPS = torch.finfo(torch.float32).eps


def make_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).to(dtype)


def spec_of(model: nn.Module) -> UpdateSpec:
    return UpdateSpec.of(dict(model.named_parameters()))


def subspace(model: nn.Module, share: float = 0.5) -> Subspace:
    """Random orthonormal bases of ``share`` of each parameter's first side."""
    generator = torch.Generator().manual_seed(5)
    bases = {}
    for t in spec_of(model):
        size = t.shape[0]
        q = torch.linalg.qr(torch.randn(size, size, generator=generator)).Q
        axis = Axis(True, size, t.numel // size)
        bases[t.name] = (axis, q[:, : max(1, int(share * size))])
    return Subspace.from_bases(
        SubspaceConfig(ratio=1, basis_dtype="float32"), spec_of(model), bases
    )


def batches(count: int = 5, dtype: torch.dtype = torch.float32) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(2)
    for _ in range(count):
        yield torch.randn(7, 6, generator=generator).to(dtype)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - 1).float().square().mean()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: Any = None) -> None:
    for x in batches() if data is None else data:
        optimizer.zero_grad()
        loss_of(model, x).backward()
        optimizer.step()


def state(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return float(sum((a[n].double() - b[n].double()).square().sum() for n in a)) ** 0.5


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[n], b[n]) for n in a)


def outside(codec: Subspace, moved: dict[str, Tensor]) -> float:
    """Norm of what of a difference lies outside the span of the bases."""
    total = 0.0
    for name, (_, u) in codec.bases().items():
        g = moved[name].double().reshape(len(moved[name]), -1)
        total += float((g - u.double() @ (u.double().T @ g)).square().sum())
    return total**0.5


def nonlinear(variant: str) -> tuple[nn.Module, Codec]:
    """Trained-looking networks: the literal form has biases, so its ``Dec(0)`` is not zero."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(128, 8, bias=False), nn.Linear(8, 128, bias=False))
    # The other literal networks have dead gradients at z = 0 on so small an image.
    config = AutoencoderConfig("uformer" if variant == "literal" else "resnet3", variant)
    codec = Autoencoder.initialised(config, spec_of(model), 0)
    if variant == "literal":
        return model, codec
    generator = torch.Generator().manual_seed(7)
    weights = {
        n: w + 0.05 * torch.randn(w.shape, generator=generator) if "trunk" in n else w
        for n, w in codec.weights.items()
    }
    return model, codec._remade(weights=weights)
