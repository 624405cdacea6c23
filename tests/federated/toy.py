"""A federation small enough for a test: LoRA-like factors, clients with data of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradcodec.chain import Chain
from gradcodec.codec import Codec
from gradcodec.codecs import Autoencoder, BlockQuant, Identity, Subspace
from gradcodec.federated.envelope import Reply
from gradcodec.federated.loop import LocalResult, RoundReport
from gradcodec.federated.participants import ClientId
from gradcodec.federated.server import Server
from gradcodec.packers.blockquant import BlockQuantConfig
from gradcodec.packers.raw import RawPacker
from gradcodec.pipeline import Pipeline
from gradcodec.transforms.autoencoder.config import AutoencoderConfig
from gradcodec.transforms.subspace.config import Axis, SubspaceConfig
from gradcodec.transforms.subspace.transform import SubspaceTransform
from gradcodec.transforms.transform import Transform
from gradcodec.types import Update, UpdateSpec

A, B, BIAS = "layer.lora_A.weight", "layer.lora_B.weight", "bias"


class Toy:
    """``y = B A x + b`` to each client's own noisy view of one map; a ``Task``.

    Args:
        behaviour: by client: ``"nan"`` trains to NaN, ``"empty"`` has no examples.
    """

    def __init__(
        self,
        behaviour: Mapping[int, str] | None = None,
        *,
        optimizer: type[torch.optim.Optimizer] = torch.optim.SGD,
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> None:
        g = torch.Generator().manual_seed(4)
        self.parameters = {
            A: nn.Parameter(torch.randn(2, 8, generator=g).to(dtype)),
            B: nn.Parameter((0.3 * torch.randn(6, 2, generator=g)).to(dtype)),
            BIAS: nn.Parameter(torch.zeros(6, dtype=dtype)),
        }
        self.target = torch.randn(6, 2, generator=g) @ torch.randn(2, 8, generator=g)
        self.optimizer = optimizer
        self.optimizer_options: Mapping[str, Any] = options or {"lr": 0.05}
        self.behaviour = dict(behaviour or {})
        self.held_out = torch.randn(64, 8, generator=g)

    @property
    def initial(self) -> dict[str, Tensor]:
        return {n: p.detach().clone() for n, p in self.parameters.items()}

    def train(self, client: int, round: int, optimizer: torch.optim.Optimizer) -> LocalResult:
        """More steps and more examples for some clients than for others."""
        what = self.behaviour.get(client)
        if what == "empty":
            return LocalResult(0, 0.0)
        rng = np.random.default_rng([client, round])
        losses = []
        for _ in range(2 + client % 3):
            x = torch.from_numpy(rng.standard_normal((8, 8))).float() * (1 + client % 2)
            optimizer.zero_grad()
            loss = self.loss(x)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        if what == "nan":
            with torch.no_grad():
                self.parameters[B][0, 0] = torch.nan
        return LocalResult(5 + 3 * client, float(np.mean(losses)))

    def evaluate(self) -> float:
        with torch.no_grad():
            return self.loss(self.held_out).item()

    def loss(self, x: Tensor) -> Tensor:
        p = {n: t.float() for n, t in self.parameters.items()}
        return (x @ (p[B] @ p[A] - self.target).T + p[BIAS]).square().mean()


def spec() -> UpdateSpec:
    return UpdateSpec.of(Toy().parameters)


def subspace(share: float = 0.5) -> Subspace:
    """Random orthonormal bases."""
    generator = torch.Generator().manual_seed(6)
    bases = {}
    for t in spec():
        rows, cols = (t.shape[0], t.numel // t.shape[0])
        axis = Axis(rows >= cols, max(rows, cols), min(rows, cols))
        q = torch.linalg.qr(torch.randn(axis.size, axis.size, generator=generator)).Q
        bases[t.name] = (axis, q[:, : max(1, int(share * axis.size))])
    return Subspace.from_bases(SubspaceConfig(ratio=2, basis_dtype="float32"), spec(), bases)


def quantised(bits: int = 4) -> Chain:
    return Chain(subspace(), BlockQuant(BlockQuantConfig(bits, block=16)))


class BentTransform(SubspaceTransform):
    """A cheap transform that is not linear and whose ``from_code(0)`` is not zero."""

    linear = False

    def from_code(self, z: Tensor, spec: UpdateSpec | None = None) -> dict[str, Tensor]:
        return super().from_code(z + 0.2 * torch.sin(z) + 0.1, spec)

    pullback = Transform.pullback
    step_scales = Transform.step_scales


class Bent(Subspace):
    """The codec of a transform that is not linear."""

    def _pipeline(self) -> Pipeline:
        transform = BentTransform(self.config, self.spec, self.weights)
        return Pipeline(self.config.kind, transform, RawPacker())


def bent() -> Bent:
    straight = subspace()
    return Bent(straight.config, spec=straight.spec, weights=straight.weights)


def autoencoder() -> Autoencoder:
    return Autoencoder.initialised(AutoencoderConfig(), spec(), 0)


CODECS: dict[str, Codec] = {
    "identity": Identity(),
    "int8": BlockQuant(BlockQuantConfig(8, block=16)),
    "subspace": subspace(),
    "subspace-int4": quantised(),
    "nonlinear": bent(),
}


def reply(server: Server, client: ClientId, update: Update, examples: int = 1) -> Reply:
    """A reply to the server's round, made by hand."""
    payload = server.uplink.encoder.encode(update)
    based = replace(payload, base=server.replica.digest)
    return Reply(client, server.round, examples, based)


def timeless(reports: list[RoundReport]) -> list[RoundReport]:
    """Reports without the only figures that differ between equal runs."""
    return [replace(r, encode_s=0.0, decode_s=0.0, seconds=0.0) for r in reports]


def equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return set(a) == set(b) and all(torch.equal(a[n], b[n]) for n in a)
